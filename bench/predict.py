"""What bounds each CUDA kernel on the GPUs people have: `python -m bench.predict` writes docs/cuda-predicted.md.

Predicted, not measured, and without a GPU. From three things:
  - the machine code of the built library (`bench.sass`): instructions, operations and bytes of each row loop;
  - the launches that the op's launcher asks for at the size in question: the emulator notes them without running them;
  - published figures of the devices, below.

Times, each as if it were the only one; the longest is the bound, and the prediction:
  memory    bytes that must be moved / memory bandwidth
  issue     the unit that takes longest: slots, special functions, integers, fma, float64. Every byte is counted at
            the rate of the row loop that costs most per byte, so this errs on the high side
  latency   a launch takes LAUNCH, and a byte LATENCY to come; under way are as many as the resident threads ask for in
            a turn of the row loop, with nothing asked for between two turns, so this errs on the high side, too

Not modelled: caches (inputs come from memory), clocks that fall under load, the matrix products of linear_logprobs,
what truncated sampling reads a second time, the sums at the end of a row, and everything the host does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Source, cases
from bench.sass import MASK, ROOM, UNITS, Beside, Cost, Kernel, Loop, kernels, occupancy, resident_blocks

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cuda-predicted.md"
COMMAND = "python -m bench.predict"

LAUNCH = 2.5e-6  # seconds from one launch on a stream to the next: an assumption, usual figures are 2 to 4 µs
# Seconds until a byte arrives under load: an assumption. At rest about 480 cycles (arxiv.org/abs/2402.13499, table of
# memory latencies of A100, H100 and RTX 4090), 0.3 µs; queues about double that when memory is busy.
LATENCY = 0.7e-6


@dataclass(frozen=True)
class Device:
    """Published figures. Rates are results per clock and multiprocessor."""

    name: str
    arch: str  # whose machine code runs there
    room: str  # whose multiprocessors it has
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second
    max_shared: int  # bytes a block may have
    rates: dict[str, int]

    def per_byte(self, unit: str) -> float:
        """Operations that the device does in the time it moves a byte."""
        return self.multiprocessors * self.clock * self.rates[unit] / self.bandwidth


def rates(fma: int, double: int) -> dict[str, int]:
    # Four schedulers issue one instruction of 32 threads per clock each. The others: docs.nvidia.com/cuda/
    # cuda-c-programming-guide, "Throughput of Native Arithmetic Instructions", compute capabilities 8.0 to 10.0.
    return {"slots": 128, "special": 16, "integer": 64, "fma": fma, "double": double}


DEVICES = (
    # NVIDIA A100 datasheet and Ampere whitepaper (glennklockwood.com/garden/processors/A100 collects them)
    Device("A100", "sm_80", "sm_80", 108, 1.41e9, 2.039e12, 163 << 10, rates(64, 32)),
    # NVIDIA H100 datasheet, SXM5; clock: pmc.ncbi.nlm.nih.gov/articles/PMC10448217 table 3
    Device("H100", "sm_90", "sm_90", 132, 1.755e9, 3.35e12, 227 << 10, rates(128, 64)),
    # chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut (148 multiprocessors); hmc-tech.com/gpus/nvidia-b200
    # (clock); 8 TB/s: HGX B200 datasheet (glennklockwood.com/garden/processors/B200)
    Device("B200", "sm_100", "sm_100", 148, 1.98e9, 8e12, 227 << 10, rates(128, 64)),
    # NVIDIA L4 datasheet (fpsbench.com/compare/gpu/nvidia-l4-vs-nvidia-tesla-m40): 7424 lanes, 300 GB/s, 2040 MHz
    Device("L4", "sm_80", "sm_89", 58, 2.04e9, 3e11, 99 << 10, rates(128, 2)),
)

# Kernels with a loop over the vocabulary, priced at its quick way (bench/sass.py). They do a batch again, carefully,
# only where the quick way will not do: at the first batch of a row and where a logit stands out.
OVER_VOCABULARY = {
    "logprobs_kernel",
    "logprobs_backward_kernel",
    "sample_kernel",
    "distribution_kl_kernel",
    "distribution_kl_backward_kernel",
    "ppo_rows_kernel",
    "fold_kernel",
    "tile_grad_kernel",  # dearest: with a cap on the logits, which of the usual models Gemma 2 alone has
}
# What a turn of the row loop moves, at least, where others read parts of a row again: the drawn tile, candidates.
ROW_TURN = {"sample_kernel": 64}
# Beside a mask: a number for each batch that a thread takes, its maximum.
BESIDE = {"sample_kernel": MASK | {("STG", 4)}}
NAMES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


def beside(kernel: Kernel) -> Beside:
    return BESIDE.get(kernel.base, MASK)


def vector_loops(kernel: Kernel) -> list[Loop]:
    """Loops with 16-byte accesses."""
    return [loop for loop in kernel.loops if loop.is_vector(beside(kernel))]


def row_loops(kernel: Kernel) -> list[Loop]:
    """Those of them that take whole rows."""
    least = ROW_TURN.get(kernel.base, 0)
    return [loop for loop in vector_loops(kernel) if loop.quick(beside(kernel)).moved >= least]


def cost(kernel: Kernel, loop: Loop, unit: str) -> Cost:
    """Of the way through a row loop that counts."""
    if kernel.base in OVER_VOCABULARY:
        return loop.quick(beside(kernel))
    return loop.dearest(unit, beside(kernel))


def per_byte(kernel: Kernel, unit: str) -> float:
    """Of the row loop that takes most."""
    return max((cost(kernel, loop, unit).per_byte(unit) for loop in row_loops(kernel)), default=0.0)


def in_flight(kernel: Kernel) -> int:
    """Bytes that a thread has under way, of the row loop with the fewest that loads at all."""
    return min((b for b in (loop.in_flight(beside(kernel)) for loop in row_loops(kernel)) if b), default=0)


@dataclass(frozen=True)
class Prediction:
    """Seconds, each as if alone."""

    memory: float
    issue: float
    unit: str  # that takes longest of those that issue
    latency: float
    launches: int

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue, self.latency)

    @property
    def bound(self) -> str:
        if self.seconds == self.latency:
            return "latency"
        return "memory" if self.seconds == self.memory else f"issue ({self.unit})"


def predict(case: Case, device: Device, found: list[Kernel]) -> Prediction:
    """`found`: the library's kernels of the device's architecture."""
    moved = case.bytes_moved()
    launches, read = launches_of(case, device)
    # Where some go over a vocabulary, the others move a number per row.
    moving = [launch for launch in launches if launch.kernel in OVER_VOCABULARY] or launches
    units = dict.fromkeys(UNITS, 0.0)
    under_way = float("inf")
    for launch in moving:
        for kernel in instances(found, launch, case.dtype):
            for unit in UNITS:
                units[unit] = max(units[unit], moved * per_byte(kernel, unit) / device.per_byte(unit))
            if in_flight(kernel):
                under_way = min(under_way, resident_threads(launch, kernel, device) * in_flight(kernel))
    unit = max(units, key=lambda name: units[name])
    memory = moved / device.bandwidth
    issue = units[unit] / device.bandwidth
    # Nobody waits for a store.
    latency = len(launches) * LAUNCH + read * moved / under_way * LATENCY
    return Prediction(memory, issue, unit, latency, len(launches))


def resident_threads(launch: Any, kernel: Kernel, device: Device) -> int:
    """Threads of a launch that the device holds at once."""
    room = ROOM[device.room]
    fit = resident_blocks(room, launch.threads, kernel.registers, kernel.shared, launch.dynamic_shared)
    return min(launch.blocks, fit * device.multiprocessors) * launch.threads


def instances(found: list[Kernel], launch: Any, dtype: torch.dtype) -> list[Kernel]:
    """Kernels that a launch may mean: those for the dtype and with the flags that are template arguments."""
    named = [kernel for kernel in found if kernel.base == launch.kernel]
    typed = [kernel for kernel in named if NAMES[dtype] in kernel.name.partition("<")[2]] or named
    return [kernel for kernel in typed if flags_of(kernel) == launch.flags]


def flags_of(kernel: Kernel) -> tuple[str, ...]:
    return tuple(re.findall(r"\b(?:true|false)\b", kernel.name))


def emulator() -> Any:
    """tests/backends.py, which builds the emulator and knows how to put its kernels under the ops."""
    sys.path.insert(0, str(ROOT / "tests"))
    import backends

    return backends


LAUNCHES: dict[tuple[str, int], tuple[list[Any], float]] = {}


def launches_of(case: Case, device: Device) -> tuple[list[Any], float]:
    """What the op launches at this size, and which share of what it moves is read.

    Nothing runs at this size, so the arguments' memory is never touched. The share is that of the case's tiny shape.
    """
    key = (case.label, device.max_shared)
    if key not in LAUNCHES:
        arguments, few = case.arguments(Source(untouched=True)), case.arguments(Source(), tiny=True)
        with emulator().emulated() as machine:
            machine.set(max_shared=device.max_shared)
            launches = machine.planned(lambda: case.ours(*arguments))
            machine.counts()
            case.ours(*few)
            counts = machine.counts()
        LAUNCHES[key] = launches, counts.bytes_loaded / (counts.bytes_loaded + counts.bytes_stored)
    return LAUNCHES[key]


# --- the page ---------------------------------------------------------------------------------------------------------

TOP = """# What bounds the CUDA kernels

**Predicted, not measured.** No GPU had a part in this page: `{command}` reads the compiled kernels' machine code, asks
the launchers what they would launch, and takes the devices' published figures. What each figure means and what is left
out is at the top of `bench/predict.py` and `bench/sass.py`; how a real device compares, `make gpu` measures.

## Row loops

Of the machine code for compute capability 9.0. Registers of a thread; static shared memory of a block; the share of a
multiprocessor's warps that fit; KB asked for at once by all threads of a full multiprocessor (an H100 needs
{needed:.0f} to keep its memory busy); and, per 2 bytes moved (one bfloat16), what the row loop that costs most takes.
An H100 has time for {budget} while it moves them.

"""


def kernel_table(found: list[Kernel]) -> list[str]:
    lines = [
        "| kernel | registers | shared | occupancy | KB in flight | issue slots | special | integer | fma | float64 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel in sorted(found, key=lambda one: one.name):
        share = occupancy(kernel)
        resident = share * ROOM[kernel.arch].warps * 32
        figures = " | ".join(f"{2 * per_byte(kernel, unit):.2f}" for unit in UNITS)
        lines.append(
            f"| `{kernel.name}` | {kernel.registers} | {kernel.shared} | {share:.0%} | "
            f"{resident * in_flight(kernel) / 1024:.0f} | {figures} |"
        )
    return lines


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} µs" if seconds < 0.9995e-3 else f"{1e3 * seconds:.3g} ms"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.3g}" if size < 100e6 else f"{size / 1e6:.0f}"


def time_table(listed: Iterable[Case], found: list[Kernel]) -> list[str]:
    lines = [
        "| op | MB | launches | " + " | ".join(device.name for device in DEVICES) + " |",
        "|---|---|---|" + "---|" * len(DEVICES),
    ]
    for case in listed:
        predictions = [
            predict(case, device, [kernel for kernel in found if kernel.arch == device.arch])
            for device in DEVICES
        ]
        cells = [f"{duration(one.seconds)}, {one.bound}" for one in predictions]
        lines.append(
            f"| {case.label} | {megabytes(case.bytes_moved())} | {predictions[0].launches} | {' | '.join(cells)} |"
        )
    return lines


def device_table() -> list[str]:
    lines = [
        "| | multiprocessors | GHz | TB/s | machine code | issue slots | special | integer | fma | float64 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in DEVICES:
        figures = " | ".join(f"{2 * one.per_byte(unit):.1f}" for unit in UNITS)
        lines.append(
            f"| {one.name} | {one.multiprocessors} | {one.clock / 1e9:.3g} | {one.bandwidth / 1e12:.3g} | "
            f"{one.arch} | {figures} |"
        )
    return lines


def page(library: Path) -> str:
    found = kernels(library, {device.arch for device in DEVICES})
    h100 = next(device for device in DEVICES if device.name == "H100")
    # Matrix products fill linear_logprobs' time: the kernels beside them are in the first table.
    listed = [case for case in cases() if case.has_kernels() and case.bytes_moved()]
    budget = ", ".join(f"{2 * h100.per_byte(unit):.1f} {unit}" for unit in UNITS)
    needed = h100.bandwidth / h100.multiprocessors * LATENCY / 1024
    sections = [
        TOP.format(command=COMMAND, budget=budget, needed=needed).strip(),
        "\n".join(kernel_table([kernel for kernel in found if kernel.arch == h100.arch])),
        "## Ops\n\nTime and what bounds it. MB: what must be read and written.",
        "\n".join(time_table(listed, found)),
        "## Devices\n\nWhat each has time for while it moves 2 bytes, from published figures.",
        "\n".join(device_table()),
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    from fastppo import _C

    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=PAGE, help="where to write; default: docs/cuda-predicted.md"
    )
    options = parser.parse_args()
    if not _C.build_facts()["cuda"].startswith("on: "):
        raise SystemExit(
            f"the library has no CUDA kernels to read ({_C.build_facts()['cuda']}): make build FASTPPO_CUDA=1"
        )
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(page(Path(_C.__file__)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
