"""What the op tests run on: the CPU kernels, the CUDA kernels emulated on the CPU, and CUDA where there is a device.

``emulated()`` puts the emulated kernels in the place of the CPU ones, under the product's own ops: wrappers, checks,
fakes and gradients are those that users get. The library is compiled by g++ from csrc/cuda and csrc/emulator when a
test first asks for it, into build/emulated, and again when a source changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
ORDERS = ("forward", "reverse", "shuffled")
MAX_SHARED = 227 << 10
BLOCKS_IN_FLIGHT = 4


def seeded(seed: int) -> torch.Generator:
    """Return a generator on the device that the running test makes its tensors on."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


@functools.cache
def setup_py() -> ModuleType:
    """Return setup.py as a module: it knows how to call CMake."""
    spec = importlib.util.spec_from_file_location("fastppo_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def cuda_headers() -> Path:
    """Return a folder with CUDA's headers: the toolkit's, or those that torch's CUDA build brings along."""
    toolkit, looked = setup_py().find_toolkit({})
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    folders = ([toolkit / "include"] if toolkit else []) + [
        folder for package in packages for folder in sorted(package.glob("*/include"))
    ]
    for folder in folders:
        if (folder / "cuda_bf16.h").is_file() and (folder / "vector_types.h").is_file():
            return folder
    raise FileNotFoundError(
        f"the emulated CUDA kernels need CUDA's headers (no compiler): install a toolkit ({looked}) or "
        "`pip install nvidia-cuda-runtime nvidia-cuda-crt`"
    )


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Keep other test processes (pytest -n) from building the same thing meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_emulated() -> Path:
    """Compile the emulated kernels, or what changed of them; return the library.

    With FASTPPO_EMULATED_SANITIZE=address,undefined in the environment, for those sanitizers (`make sanitize`).
    """
    setup = setup_py()
    sanitize = os.environ.get("FASTPPO_EMULATED_SANITIZE", "")
    folder = ROOT / "build" / ("emulated" + f"-{sanitize.replace(',', '-')}" * bool(sanitize))
    options = f"-fsanitize={sanitize};-fno-sanitize-recover=all" if sanitize else ""
    cmake, ninja = setup.build_tool("cmake"), setup.build_tool("ninja")
    jobs = setup.build_jobs({}, setup.usable_cpus(), setup.available_gib())
    commands = [
        [
            *[cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"],
            *setup.cmake_arguments(setup.CudaChoice(False, None, "emulated")),
            f"-DCUDA_INCLUDE_DIR={cuda_headers()}",
            f"-DFASTPPO_EMULATED_OPTIONS={options}",
        ],
        [cmake, "--build", str(folder), "--target", "fastppo_emulated", "--parallel", str(jobs)],
    ]
    with one_at_a_time(folder):
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return folder / "libfastppo_emulated.so"


class Counts(NamedTuple):
    """Launches, and bytes that kernels moved to and from global memory through spans."""

    launches: int
    bytes_loaded: int
    bytes_stored: int


class Launch(NamedTuple):
    """One launch as the launcher in csrc/cuda asked for it; `kernel` without template arguments, but for flags."""

    kernel: str
    blocks: int
    threads: int
    dynamic_shared: int
    flags: tuple[str, ...] = ()  # "true", "false"


class Emulator:
    """The loaded library's settings and counts."""

    def __init__(self) -> None:
        library = build_emulated()
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._library.fastppo_emulator_set.argtypes = [
            *[ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int64]
        ]
        self.set()

    def set(
        self,
        order: str = "forward",
        seed: int = 1,
        blocks_in_flight: int = BLOCKS_IN_FLIGHT,
        max_shared: int = MAX_SHARED,
    ) -> None:
        """Choose the order in which threads take turns, and what kernels find when they ask the device."""
        self._library.fastppo_emulator_set(ORDERS.index(order), seed, blocks_in_flight, max_shared)

    def counts(self) -> Counts:
        """Return the counts since the last call, and start again at 0."""
        counts = (ctypes.c_int64 * 3)()
        self._library.fastppo_emulator_counts(counts, ctypes.c_bool(True))
        return Counts(*counts)

    def planned(self, call: Callable[[], object]) -> list[Launch]:
        """Return what `call` launches, without running any of it: what it computes is not to be looked at."""
        self._library.fastppo_emulator_plan(ctypes.c_bool(True))
        try:
            call()
            self._library.fastppo_emulator_planned.restype = ctypes.c_char_p
            lines = self._library.fastppo_emulator_planned().decode().splitlines()
        finally:
            self._library.fastppo_emulator_plan(ctypes.c_bool(False))
        found = []
        for line in lines:
            kernel, *numbers = line.split("\t")
            name, _, arguments = kernel.strip("() ").partition("<")
            flags = tuple(re.findall(r"\b(?:true|false)\b", arguments))
            found.append(Launch(name.rpartition("::")[2], *map(int, numbers), flags))
        return found

    def ops(self) -> list[str]:
        """Return the ops that have kernels."""
        return [
            name
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("fastppo_emulated::")
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        ]


@functools.cache
def emulator() -> Emulator:
    """Return the emulator, built when first asked for."""
    return Emulator()


@contextmanager
def emulated() -> Iterator[Emulator]:
    """Run torch.ops.fastppo's ops on CPU tensors with the emulated CUDA kernels."""
    from fastppo import ops  # noqa: F401  registers what is overridden

    machine = emulator()
    machine.set()
    library = torch.library.Library("fastppo", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden is the point
            for name in machine.ops():
                packet, _, overload = name.removeprefix("fastppo_emulated::").partition(".")
                op = getattr(getattr(torch.ops.fastppo_emulated, packet), overload or "default")
                library.impl(packet, op, "CPU", allow_override=True)
        yield machine
    finally:
        library._destroy()
        machine.set()
