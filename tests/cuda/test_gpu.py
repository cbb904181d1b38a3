"""What `make gpu` does, as far as a machine without a GPU can run it: on CPU tensors, tiny, with figures made up."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import backends
import pytest
import torch

from bench import gpu
from bench.cases import Source, cases
from bench.gpu import Clock, Row

ROOT = Path(__file__).resolve().parents[2]
CASES = cases()
CPU = Source("cpu")


def test_without_a_gpu_there_is_one_message_and_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "no_gpu", lambda: "no driver: libcuda.so.1 is not found")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for arguments in ([], ["--check"], ["--exercise"], ["--only", "gae"]):
        with pytest.raises(SystemExit) as error:
            gpu.main(arguments)
        assert str(error.value) == (
            "make gpu needs an NVIDIA GPU, and this machine has none (no driver: libcuda.so.1 is not found). Nothing "
            "was built, run or written."
        )
    assert list(tmp_path.iterdir()) == []


def test_the_question_needs_no_packages():
    # `make gpu` asks with the system's Python, before anything is installed.
    command = [sys.executable, "-I", "-S", str(ROOT / "bench" / "gpu.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if gpu.no_gpu() is None else 1)


def test_a_driver_that_answers_counts(monkeypatch):
    class Driver:
        def __init__(self, status, devices):
            self.status, self.devices = status, devices

        def cuInit(self, flags):  # noqa: N802
            return self.status

        def cuDeviceGetCount(self, place):  # noqa: N802
            place._obj.value = self.devices
            return 0

    for status, devices, answer in [(0, 1, None), (0, 0, "counts 0 devices"), (100, 0, "cuInit returns 100")]:
        driver = Driver(status, devices)
        monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name, driver=driver: driver)
        found = gpu.no_gpu()
        assert found is answer or (found is not None and answer is not None and answer in found)


def test_every_op_with_kernels_has_a_case():
    covered = {f"fastppo::{op}" for case in CASES for op in case.kernels}
    kernels = {name.replace("fastppo_emulated::", "fastppo::") for name in backends.emulator().ops()}
    assert kernels <= covered


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_case_runs_and_agrees_with_plain_torch(case):
    ours = gpu.flat(case.ours(*case.arguments(CPU, tiny=True)))
    eager = gpu.flat(case.eager(*case.arguments(CPU, tiny=True)))
    assert len(ours) == len(eager)
    if "sample" in case.op:  # drawn from streams of their own; entropy is of the logits alone
        ours, eager = ours[-1:], eager[-1:]
    for x, y in zip(ours, eager, strict=True):
        if x.dtype == torch.int16:
            continue  # the low half of a weight: its own tests know when the two halves agree
        tolerance = 3e-2 if case.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(x.float(), y.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_case_is_measured(case, monkeypatch):
    if case.op != "kl_penalty":  # once with the compiler, which takes seconds each time
        monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    small = replace(case, peers={**case.peers, "TRL": missing, "Liger": broken})
    row = gpu.measure(small, Clock("cpu", seconds=0, rounds=1), tiny=True, capture=as_if_captured)
    assert row.ours > 0 and row.bytes_moved == case.bytes_moved(case.tiny)
    assert all(isinstance(row.others[name], float) for name in ("graph", "eager", "compile"))
    assert row.others["TRL"] == "not installed" and row.others["Liger"] == "fails: RuntimeError"


def missing():
    raise ImportError


def broken():
    def run(*arguments):
        raise RuntimeError("not today")

    return run


def as_if_captured(call):
    """A graph's stand-in: a replay writes into the results of the capture."""
    results = call()

    def replay():
        fresh = gpu.flat(call())
        with torch.no_grad():
            for x, y in zip(gpu.flat(results), fresh, strict=True):
                if x is not y:
                    x.copy_(y)

    return replay, results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_replay_must_leave_what_a_call_does(case):
    gpu.replayed(case, CPU, tiny=True, capture=as_if_captured)()
    with pytest.raises(AssertionError, match="CUDA graph replay differs"):
        gpu.replayed(case, CPU, tiny=True, capture=lambda call: (lambda: None, call()))


def test_a_graph_for_which_there_is_no_memory_is_a_word_in_the_table():
    def capture(call):
        raise torch.OutOfMemoryError("tried to allocate")

    row = gpu.measure(CASES[0], Clock("cpu", seconds=0, rounds=1), tiny=True, capture=capture)
    assert row.others["graph"] == "out of memory" and row.ours > 0


def test_small_tensors_exercise_every_op():
    assert gpu.exercise(CASES, "cpu") == len(CASES)


def test_copy_bandwidth_is_of_bytes_read_and_written():
    assert 1e8 < gpu.copy_bandwidth(Clock("cpu", seconds=0, rounds=1), nbytes=1 << 24) < 1e13


ROWS = [
    Row(
        "gae [512, 4096] float32",
        34_000_000,
        20e-6,
        {"graph": 18e-6, "eager": 3e-3, "compile": "out of memory"},
    ),
    Row("linear_logprobs [4096, 2048, 151936] bfloat16", 0, 7e-3, {"eager": 9e-3, "TRL": 8e-3}),
]


def test_the_table():
    assert gpu.table(ROWS, bandwidth=3.4e12).splitlines() == [
        "| op | MB | floor | fastppo | graph | eager | compile | TRL | Liger |",
        "|---|---|---|---|---|---|---|---|---|",
        "| gae [512, 4096] float32 | 34 | 10 | **20 (2.00)** | 18 (1.80) | 3000 (300.00) | out of memory | – | – |",
        "| linear_logprobs [4096, 2048, 151936] bfloat16 | – | – | **7000** | – | 9000 | – | 8000 | – |",
    ]


def test_the_page_says_when_where_and_how():
    facts = {
        "device": "NVIDIA H100 80GB HBM3",
        "date": "2026-01-02",
        "commit": "0123456789ab",
        "driver": "580.1",
    }
    text = gpu.page(ROWS, 2.9e12, facts, {"op tests": "pass", "compute-sanitizer memcheck": "no fault"})
    for words in (
        "# fastppo on NVIDIA H100 80GB HBM3",
        "Measured by `make gpu`",
        "2900 GB/s",
        "date: 2026-01-02",
    ):
        assert words in text
    for words in (
        "commit: 0123456789ab",
        "driver: 580.1",
        "memcheck: no fault",
        "| gae [512, 4096] float32 | 34 |",
    ):
        assert words in text
    assert gpu.slug(facts["device"]) == "h100-80gb-hbm3"


def test_facts_name_the_commit_and_the_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    facts = gpu.facts_of()
    assert facts["device"] == "NVIDIA L4" and facts["torch"] == torch.__version__
    assert set(facts) >= {"date", "commit", "driver", "CUDA", "TRL", "Liger"}


def test_compute_sanitizer_is_found_in_the_toolkit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert gpu.sanitizer() is None
    program = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    assert gpu.sanitizer() == str(program)


def test_a_failing_test_or_sanitizer_ends_the_run(tmp_path):
    assert gpu.run_sanitizer("memcheck", None) == "compute-sanitizer is not installed"
    program = tmp_path / "compute-sanitizer"
    for status, answer in [(0, "no fault"), (9, None)]:
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
        if answer is not None:
            assert gpu.run_sanitizer("memcheck", str(program)) == answer
        else:
            with pytest.raises(SystemExit, match=r"compute-sanitizer finds a fault: .* --tool memcheck"):
                gpu.run_sanitizer("memcheck", str(program))


def test_what_is_skipped_is_not_measured():
    def fails(*_):
        raise AssertionError("compiled")

    case = replace(CASES[0], eager=CASES[0].eager, peers={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", fails)
        row = gpu.measure(case, Clock("cpu", seconds=0, rounds=1), tiny=True, capture=None, skip=["compile"])
    assert set(row.others) == {"eager"}


def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    # The machine pretends; everything between the answers runs.
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "run_tests", lambda: "pass")
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda clock: 3e11)
    monkeypatch.setattr(gpu, "Clock", lambda device, seconds: Clock("cpu", 0, 1))
    monkeypatch.setattr(
        *(gpu, "measure"),
        lambda case, clock, skip: Row(
            case.label,
            case.bytes_moved(),
            1e-3,
            {"graph": 9e-4, "eager": 2e-3} | ({} if skip else {"compile": 3e-3}),
        ),
    )
    monkeypatch.setattr("bench.cases.Case.has_kernels", lambda self: True)
    monkeypatch.setattr("fastppo._C.build_facts", lambda: {"cuda": "on: pretended"})
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.main(["--only", "gae", "kl"])
    assert list(tmp_path.iterdir()) == []
    assert "kl_penalty [512, 4096] float32" in capsys.readouterr().out
    gpu.main([])
    text = (tmp_path / "docs" / "gpu-l4.md").read_text()
    assert all(f"| {case.label} |" in text for case in CASES)
    assert "op tests: pass" in text and "300 GB/s" in text
    assert f"CUDA graphs: {len(CASES)} of {len(CASES)} captured" in text
    assert "3000 (" in text  # the compile column
    gpu.main(["--skip", "tests", "sanitizer", "compile"])
    text = (tmp_path / "docs" / "gpu-l4.md").read_text()
    assert "op tests: not run" in text and "compute-sanitizer racecheck: not run" in text
    assert "3000 (" not in text
    with pytest.raises(SystemExit, match="no op begins with spam"):
        gpu.main(["--only", "spam"])
