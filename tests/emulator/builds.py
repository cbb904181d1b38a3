"""Compiles and runs the emulator's own programs."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import backends

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILDS = {
    "fibers": ["-O1", "-g1"],
    "ucontext": ["-O1", "-g1", "-DFASTPPO_EMULATOR_UCONTEXT"],  # as on processors other than x86-64
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-DFASTPPO_EMULATOR_THREADS"],
}


def compile_with(source: Path, output: Path, options: list[str]) -> None:
    """Compile a program of the emulator; without a C++ compiler the tests fail, for it is what they are about."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *[os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Wno-tsan", *options],
        *["-DFASTPPO_EMULATED", f"-I{ROOT}", f"-I{ROOT / 'csrc'}", "-isystem", str(backends.cuda_headers())],
        *[str(source), str(ROOT / "csrc/emulator/machine.cpp"), "-pthread", "-o", str(output)],
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def program(build: str, source: str = "programs") -> Path:
    """Return a program built one way: compiled when a test first asks for it, and again when something changed."""
    output = ROOT / "build" / "emulator" / f"{source}-{build}"
    sources = [HERE / f"{source}.cpp", *(ROOT / "csrc").rglob("*.*"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in sources)
    with backends.one_at_a_time(output):
        if not output.is_file() or output.stat().st_mtime < newest:
            compile_with(HERE / f"{source}.cpp", output, BUILDS[build])
    return output


def run(executable: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "FASTPPO_EMULATOR_PATIENCE": "3",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [str(executable), *arguments], capture_output=True, text=True, timeout=900, env=environment
    )
