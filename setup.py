"""Builds fastppo/_C through CMake and Ninja; everything else is in pyproject.toml.

Whether CUDA is built depends on the toolkit and on FASTPPO_CUDA=0|1, never on a GPU being present, and the
build prints its choice. Other variables: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, FASTPPO_DEBUG=1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_HEADER = Path("include", "cuda_bf16.h")  # a toolkit is a folder that holds this and bin/nvcc
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"
GIB_PER_JOB = 2.0  # a unit with ATen's vector headers peaks near 1 GiB; nvcc near 2


class CudaChoice(NamedTuple):
    """Whether CUDA is built, with which toolkit, and one sentence that says why."""

    build: bool
    toolkit: Path | None
    why: str


def real_nvcc() -> Path | None:
    """Return the compiler behind the ``nvcc`` on PATH: it may be a link, or a script that starts another."""
    found = shutil.which("nvcc")
    if found is None:
        return None
    answer = subprocess.run([found, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in (answer.stderr + answer.stdout).splitlines():
        name, _, value = line.lstrip("#$ ").partition("=")
        if name == "_HERE_":
            return Path(value.strip()) / "nvcc"
    return Path(found).resolve()


def find_toolkit(env: Mapping[str, str]) -> tuple[Path | None, str]:
    """Return (toolkit folder or None, where was looked)."""

    def complete(folder: Path) -> bool:
        return (folder / CUDA_HEADER).is_file() and (folder / "bin" / "nvcc").is_file()

    if env.get("CUDA_HOME"):  # asked for by name: nowhere else will do
        home = Path(env["CUDA_HOME"])
        return (home if complete(home) else None), f"CUDA_HOME={home}"
    nvcc = real_nvcc()
    candidates = ([nvcc.parent.parent] if nvcc else []) + [Path("/usr/local/cuda")]
    looked = ("nvcc on PATH, " if nvcc else "no nvcc on PATH, ") + "/usr/local/cuda"
    return next((folder for folder in candidates if complete(folder)), None), looked


def choose_cuda(env: Mapping[str, str]) -> CudaChoice:
    """Decide from FASTPPO_CUDA and the toolkit."""
    asked = env.get("FASTPPO_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"fastppo: FASTPPO_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        return CudaChoice(False, None, "FASTPPO_CUDA=0")
    toolkit, looked = find_toolkit(env)
    if toolkit is None:
        if asked == "1":
            raise SystemExit(
                f"fastppo: FASTPPO_CUDA=1 asks for CUDA, but no toolkit with {CUDA_HEADER} and bin/nvcc was "
                f"found (looked at: {looked}). Install the CUDA toolkit, or point CUDA_HOME at it, or unset "
                "FASTPPO_CUDA."
            )
        return CudaChoice(False, None, f"no CUDA toolkit found (looked at: {looked})")
    return CudaChoice(True, toolkit, f"toolkit at {toolkit}")


def build_jobs(env: Mapping[str, str], cpus: int, memory_gib: float) -> int:
    """Return the number of parallel compilers: MAX_JOBS, else one per processor while memory lasts."""
    if env.get("MAX_JOBS"):
        return max(1, int(env["MAX_JOBS"]))
    return max(1, min(cpus, int(memory_gib / GIB_PER_JOB)))


def available_gib() -> float:
    """Return the free memory in GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def usable_cpus() -> int:
    """Return the processors this process may run on, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_tool(name: str) -> str:
    """Return the program of this environment's package, which need not be on PATH, else the one on PATH.

    A system's own CMake may come first on PATH and be too old.
    """
    package = importlib.util.find_spec(name)
    for folder in (package.submodule_search_locations or []) if package else []:
        for program in (Path(folder, "data", "bin", name), Path(sysconfig.get_path("scripts"), name)):
            if program.is_file():
                return str(program)
    return shutil.which(name) or name


def cuda_architectures(archs: str) -> str:
    """Return CMake's way to say torch's list: "9.0;12.0+PTX" is "90-real;120"."""
    names = []
    for arch in archs.replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(
                f"fastppo: TORCH_CUDA_ARCH_LIST must be like {DEFAULT_CUDA_ARCHS!r}, got {archs!r} (at {arch!r})"
            )
        major, minor, variant, ptx = match.groups()
        names.append(f"{major}{minor}{variant}" + ("" if ptx else "-real"))
    return ";".join(names)


def cmake_arguments(cuda: CudaChoice) -> list[str]:
    """Return what CMake must be told because only Python knows it."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS) if cuda.build else ""
    settings = {
        "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("FASTPPO_DEBUG") == "1" else "Release",
        "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
        "TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
        "TORCH_VERSION": torch.__version__,
        "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
        "EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "FASTPPO_CUDA": "ON" if cuda.build else "OFF",
        "FASTPPO_CUDA_CHOICE": f"{'on' if cuda.build else 'off'}: {cuda.why}",
        "FASTPPO_CUDA_ARCHS": archs.replace(";", ",").replace(" ", ","),
    }
    if cuda.build:
        settings["CMAKE_CUDA_COMPILER"] = f"{cuda.toolkit}/bin/nvcc"
        settings["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures(archs)
    return [f"-D{name}={value}" for name, value in settings.items()]


class CMakeBuild(build_ext):
    """setuptools' build_ext step, handed to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, compile, and put the library where setuptools expects it."""
        cuda = choose_cuda(os.environ)
        print(f"fastppo: CUDA {'on' if cuda.build else 'off'} ({cuda.why})", file=sys.stderr, flush=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A folder per interpreter: CMake's cache holds its paths. Under build/, so that a rebuild is
        # incremental.
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        jobs = build_jobs(os.environ, usable_cpus(), available_gib())
        cmake = build_tool("cmake")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja')}"]
        self._run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *cmake_arguments(cuda)])
        self._run([cmake, "--build", str(folder), "--parallel", str(jobs)])
        self._run([cmake, "--install", str(folder), "--prefix", str(target)])

    @staticmethod
    def _run(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(f"fastppo: no {command[0]} here: pip install 'cmake>=4' ninja") from None
        except subprocess.CalledProcessError as error:
            step = " ".join(command[:3])
            raise SystemExit(f"fastppo: `{step} ...` failed, status {error.returncode}") from None


if __name__ == "__main__":
    setup(ext_modules=[Extension("fastppo._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
