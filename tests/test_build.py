"""The build says what it decided and why; the library depends on nothing but torch's stable ABI."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastppo
from fastppo import info
from fastppo.ops._library import library as _C  # loads torch first, whose libraries it is linked against

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("fastppo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path):
    """Return a folder that looks like a CUDA toolkit."""
    for name in ("include/cuda_bf16.h", "bin/nvcc"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    return tmp_path


def test_cuda_off_on_demand(setup_py, toolkit):
    choice = setup_py.choose_cuda({"FASTPPO_CUDA": "0", "CUDA_HOME": str(toolkit)})
    assert choice == (False, None, "FASTPPO_CUDA=0")


def test_cuda_on_with_a_toolkit_and_without_a_gpu(setup_py, toolkit):
    for asked in ({}, {"FASTPPO_CUDA": "1"}):
        choice = setup_py.choose_cuda({"CUDA_HOME": str(toolkit), **asked})
        assert choice == (True, toolkit, f"toolkit at {toolkit}")


def test_cuda_demanded_and_absent_is_a_clear_failure(setup_py, tmp_path):
    with pytest.raises(SystemExit) as error:
        setup_py.choose_cuda({"FASTPPO_CUDA": "1", "CUDA_HOME": str(tmp_path)})
    assert str(error.value) == (
        "fastppo: FASTPPO_CUDA=1 asks for CUDA, but no toolkit with include/cuda_bf16.h and bin/nvcc was "
        f"found (looked at: CUDA_HOME={tmp_path}). Install the CUDA toolkit, or point CUDA_HOME at it, or "
        "unset FASTPPO_CUDA."
    )


def test_cuda_absent_and_not_demanded_builds_for_the_cpu(setup_py, tmp_path):
    choice = setup_py.choose_cuda({"CUDA_HOME": str(tmp_path)})
    assert not choice.build and choice.why == f"no CUDA toolkit found (looked at: CUDA_HOME={tmp_path})"


def test_any_other_demand_is_an_error(setup_py):
    with pytest.raises(SystemExit, match="FASTPPO_CUDA must be 0 or 1, got 'yes'"):
        setup_py.choose_cuda({"FASTPPO_CUDA": "yes"})


@pytest.mark.parametrize("kind", ["plain", "link", "script"])
def test_the_toolkit_behind_nvcc_is_found(setup_py, toolkit, tmp_path_factory, monkeypatch, kind):
    # nvcc --dryrun names the folder it lives in, also when a link or a script on PATH stands before it.
    real = toolkit / "bin" / "nvcc"
    real.write_text(f"#!/bin/sh\necho '#$ _HERE_={toolkit}/bin' >&2\n")
    real.chmod(0o755)
    folder = tmp_path_factory.mktemp("path")
    if kind == "plain":
        folder = toolkit / "bin"
    elif kind == "link":
        (folder / "nvcc").symlink_to(real)
    else:
        (folder / "nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert setup_py.find_toolkit({})[0] == toolkit


def test_torchs_list_of_architectures_becomes_cmakes(setup_py):
    assert setup_py.cuda_architectures("8.0;9.0;10.0;12.0+PTX") == "80-real;90-real;100-real;120"
    assert setup_py.cuda_architectures("8.6 9.0a") == "86-real;90a-real"
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must be like '8.0;.*got 'Hopper'"):
        setup_py.cuda_architectures("Hopper")


def test_what_the_build_says_about_cuda_is_what_the_library_has():
    from fastppo import ops  # noqa: F401  registers them

    built = _C.build_facts()["cuda"].startswith("on: ")
    assert bool(_C.build_facts()["cuda_archs"]) == built
    for op in (
        "gae",
        "whiten",
        "scale_to_unit_std",
        "rewards_and_advantages",
        "kl_penalty",
        "kl_penalty_backward",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastppo::{op}", "CUDA") == built


def test_the_library_loads_without_a_driver_and_without_torchs_cuda_libraries():
    listing = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.+)\]", listing.stdout)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if "cuda" in name] == []


def test_the_library_loads_where_torch_was_built_without_cuda(tmp_path):
    # There libtorch.so does not bring libtorch_cuda.so. Nor does this one, which stands before torch's own.
    subprocess.run(
        [
            "g++",
            "-shared",
            "-x",
            "c++",
            os.devnull,
            "-Wl,-soname,libtorch.so",
            "-o",
            tmp_path / "libtorch.so",
        ],
        check=True,
    )
    folders = f"{tmp_path}:{Path(torch.__file__).parent / 'lib'}"
    code = f"""
import ctypes, os
ctypes.CDLL({_C.__file__!r}, mode=os.RTLD_NOW)
loaded = open("/proc/self/maps").read()
assert "libtorch_cpu.so" in loaded and "libtorch_cuda.so" not in loaded
"""
    got = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": folders},
    )
    assert got.returncode == 0, got.stderr


def test_jobs_are_capped_by_memory_and_processors(setup_py):
    assert setup_py.build_jobs({}, cpus=64, memory_gib=7) == 3
    assert setup_py.build_jobs({}, cpus=2, memory_gib=500) == 2
    assert setup_py.build_jobs({}, cpus=8, memory_gib=0.5) == 1
    assert setup_py.build_jobs({"MAX_JOBS": "5"}, cpus=2, memory_gib=1) == 5


def test_the_library_needs_nothing_of_torchs_cpp_abi():
    if shutil.which("nm") is None:
        pytest.skip("binutils is not installed")
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", _C.__file__], capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]
    assert any("aoti_torch" in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if re.search(r"\b(c10|at|torch|caffe2)::", symbol)] == []


def test_the_library_is_small():
    assert Path(_C.__file__).stat().st_size < 25e6


def test_info_names_versions_instruction_sets_and_the_cuda_choice(capsys):
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fastppo"] == fastppo.__version__
    assert facts["torch"]["built_against"] == _C.build_facts()["torch"]
    assert facts["cpu"]["instruction_sets"]["active"] in facts["cpu"]["instruction_sets"]["compiled"]
    assert facts["cuda"]["build"].startswith(("on: ", "off: "))
    assert {"sdpa", "flash_attention_2"} <= set(facts["attention"])
    assert info.main([]) == 0
    page = capsys.readouterr().out
    for name in ("fastppo", "torch", "transformers", "instruction sets", "CUDA kernels", "attention"):
        assert re.search(rf"^{name} ", page, re.MULTILINE)


def test_import_is_light():
    # Time is not asserted, machines differ; what costs time is.
    code = """
import sys, time, torch, transformers
before, start = set(sys.modules), time.perf_counter()
import fastppo
print(time.perf_counter() - start, [m for m in set(sys.modules) - before if not m.startswith("fastppo")])
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, new = got.stdout.split(maxsplit=1)
    print(f"import fastppo: {float(seconds):.3f} s")
    assert new.strip() == "[]"


def test_the_environments_own_cmake_comes_before_path(setup_py, monkeypatch):
    import cmake  # noqa: F401  the build asks for it

    monkeypatch.setenv("PATH", "/nowhere")
    program = setup_py.build_tool("cmake")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"version (\d+)", version).group(1)) >= 4
    assert setup_py.build_tool("no_such_tool") == "no_such_tool"
