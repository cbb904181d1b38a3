"""The compiled CUDA kernels, judged by their machine code: no spills, 16-byte accesses, costs that memory allows.

Read from fastppo/_C itself, so compiling is not done twice; `bench/sass.py` says how. planted.cu has a kernel for each
fault, and the check that is there for it must name it.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import backends
import pytest

from bench import sass
from bench.predict import DEVICES, LATENCY, beside, cost, flags_of, row_loops, vector_loops
from bench.sass import UNITS, Instruction, Kernel

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
TYPES = ("float", "__nv_bfloat16", "__half")


@dataclass(frozen=True)
class Expected:
    """What a kernel is made of.

    Attributes:
        vector: loops over global memory with 16-byte accesses, at least.
        narrow: loops over global memory in smaller pieces, at most, in any architecture: each has its reason in a
            comment. More means that a row loop has lost its vectors.
        slots, special: limits per 2 bytes moved, where the goal is tighter than what memory allows.
        shifted: whether rows that do not begin on 16 bytes, too, must be within what memory allows.
        fills_memory: whether a full multiprocessor must ask for enough at once to keep an H100's memory busy. For
            loops over a vocabulary; those over tokens move too little to matter.
        occupancy: share of a multiprocessor's warps, at least, on the GPUs with 64 of them.
    """

    vector: int
    narrow: int = 0
    slots: float = float("inf")
    special: float = float("inf")
    shifted: bool = False
    fills_memory: bool = False
    occupancy: float = 0.5


KERNELS = {
    # narrow: rows are walked with one bootstrap value each
    "gae_kernel": Expected(vector=1, narrow=1),
    # narrow: the parts of a statistic, 24 bytes each; the phases around it
    "standardize_kernel": Expected(vector=2, narrow=2),
    # narrow: the parts of two statistics; the phases; rows with one score and one bootstrap value each
    "rewards_and_advantages_kernel": Expected(vector=3, narrow=4, occupancy=0.25),
    "kl_kernel": Expected(vector=1),
    # narrow: the mask, for the count; counts and sums of all blocks, unrolled
    "ppo_loss_kernel": Expected(vector=1, narrow=6, occupancy=0.25),
    "adamw_kernel": Expected(vector=1, occupancy=0.375),
    # narrow: the new token into the cache, the queries in, the results out (twice on 10.0 and 12.0), NaN in their
    # place: one row each. A thread keeps 32 sums in registers.
    "decode_attention_kernel": Expected(vector=2, narrow=5, fills_memory=True, occupancy=0.1875),
    # narrow, here and below: the parts of split rows; and on 8.0 the loop over rows around some row loops, for ptxas
    # makes a loop of its own for rows without columns
    "logprobs_kernel": Expected(vector=1, narrow=1, slots=12, special=1.2, shifted=True, fills_memory=True),
    "logprobs_backward_kernel": Expected(vector=2, shifted=True, fills_memory=True),
    "distribution_kl_kernel": Expected(vector=1, narrow=2, shifted=True, fills_memory=True),
    "distribution_kl_backward_kernel": Expected(vector=3, shifted=True, fills_memory=True, occupancy=0.375),
    # narrow: the tiles of split rows
    "sample_kernel<false>": Expected(vector=2, narrow=2, slots=14, special=1.2, fills_memory=True),
    # narrow: these; the maxima of batches, and of each batch the few logits that matter, in four searches
    "sample_kernel<true>": Expected(vector=6, narrow=8, special=1.2, fills_memory=True, occupancy=0.375),
    # Shared memory, which holds a row, is the limit of how many blocks fit, not what is known here.
    "ppo_rows_kernel": Expected(vector=5, shifted=True, fills_memory=True, occupancy=0.375),
    "count_tokens_kernel": Expected(vector=0, narrow=1),  # narrow: a mask, and nothing else
    "scale_kernel": Expected(vector=1, fills_memory=True),
    "fold_kernel": Expected(vector=1, narrow=1, fills_memory=True),
    "tile_grad_kernel": Expected(vector=2, fills_memory=True, occupancy=0.375),
    "accumulate_kernel": Expected(vector=1, narrow=1, fills_memory=True),
    "column_sums_kernel": Expected(vector=1, fills_memory=True),
    "active_rows_kernel": Expected(vector=2, fills_memory=True),
}


def expected_of(kernel: Kernel) -> Expected:
    flags = ", ".join(flags_of(kernel))
    return KERNELS[f"{kernel.base}<{flags}>" if flags else kernel.base]


# --- what is judged ---------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("cuda_library")


@functools.cache
def built() -> tuple[Kernel, ...]:
    """The library's kernels. Not of one that is older than its sources: it would be judged for what they were."""
    from fastppo import _C

    path = Path(_C.__file__)
    sources = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*h"), *ROOT.glob("csrc/cuda/*.cu")]
    newer = [one.name for one in sources if one.stat().st_mtime > path.stat().st_mtime]
    assert not newer, f"{path.name} is older than {', '.join(sorted(newer))}: make build"
    return tuple(sass.kernels(path))


def of(arch: str) -> list[Kernel]:
    return [kernel for kernel in built() if kernel.arch == arch]


# Checks return what is wrong, in words.


def local_memory(kernel: Kernel) -> list[str]:
    used = sorted({one.name for one in kernel.instructions if one.name in sass.LOCAL})
    if not kernel.uses_local_memory():
        return []
    return [f"{kernel.arch} {kernel.name}: {kernel.stack} bytes of local memory ({', '.join(used)})"]


def accesses(kernel: Kernel, expected: Expected) -> list[str]:
    wide, narrow = vector_loops(kernel), [loop for loop in kernel.loops if not loop.is_vector(beside(kernel))]
    found = []
    if len(wide) < expected.vector:
        found.append(
            f"{kernel.arch} {kernel.name}: {len(wide)} row loops with 16-byte accesses, not {expected.vector}"
        )
    if len(narrow) > expected.narrow:
        places = ", ".join(
            f"{loop.first:#x} ({', '.join(sorted({f'{one.name} of {one.width} bytes' for one in loop.accesses}))})"
            for loop in narrow
        )
        found.append(
            f"{kernel.arch} {kernel.name}: {len(narrow)} loops over global memory in small pieces, at most "
            f"{expected.narrow}: {places}"
        )
    return found


def costs(kernel: Kernel, expected: Expected) -> list[str]:
    """Of each row loop, against what the device of this architecture does while it moves the bytes."""
    found = []
    for device in (one for one in DEVICES if one.name in ("A100", "H100") and one.arch == kernel.arch):
        for loop in row_loops(kernel):
            for unit in UNITS:
                budget = 2 * device.per_byte(unit)
                limits = [(cost(kernel, loop, unit), min(budget, getattr(expected, unit, float("inf"))), "")]
                if expected.shifted:
                    limits.append((loop.shifted(beside(kernel)), budget, " of an unaligned row"))
                for spent, limit, where in limits:
                    if (each := 2 * spent.per_byte(unit)) > limit:
                        found.append(
                            f"{kernel.arch} {kernel.name} at {loop.first:#x}: {each:.2f} {unit} per 2 bytes{where}, "
                            f"the limit for an {device.name} is {limit:.2f}"
                        )
    return found


def residency(kernel: Kernel, expected: Expected) -> list[str]:
    if kernel.threads == 0:
        return [f"{kernel.arch} {kernel.name}: no __launch_bounds__"]
    found = []
    share, room = sass.occupancy(kernel), sass.ROOM[kernel.arch]
    if room.warps == 64 and share < expected.occupancy:
        found.append(f"{kernel.arch} {kernel.name}: occupancy {share:.0%}, not {expected.occupancy:.0%}")
    h100 = next(one for one in DEVICES if one.name == "H100")
    if expected.fills_memory and kernel.arch == h100.arch:
        needed = h100.bandwidth / h100.multiprocessors * LATENCY
        for loop in row_loops(kernel):
            asked = share * room.warps * 32 * loop.in_flight(beside(kernel))
            if 0 < asked < needed:
                found.append(
                    f"{kernel.arch} {kernel.name} at {loop.first:#x}: {asked / 1024:.0f} KB under way, an H100 needs "
                    f"{needed / 1024:.0f}"
                )
    return found


def complaints(kernel: Kernel, expected: Expected) -> list[str]:
    checks = (accesses, costs, residency)
    return local_memory(kernel) + [text for check in checks for text in check(kernel, expected)]


# --- the library ------------------------------------------------------------------------------------------------------


def test_every_kernel_is_in_the_table():
    assert {kernel.base for kernel in built()} == {name.partition("<")[0] for name in KERNELS}
    assert {id(expected_of(kernel)) for kernel in built()} == set(map(id, KERNELS.values()))


def test_every_architecture_of_a_wheel_is_there():
    from fastppo import _C

    wanted = [f"sm_{arch.partition('+')[0].replace('.', '')}" for arch in _C.build_facts()["cuda_archs"]]
    assert wanted == list(ARCHS), "built with another TORCH_CUDA_ARCH_LIST"
    for arch in ARCHS:
        assert {kernel.name for kernel in of(arch)} == {kernel.name for kernel in of("sm_90")}


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_uses_local_memory(arch):
    assert [text for kernel in of(arch) for text in local_memory(kernel)] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_row_loops_access_memory_16_bytes_at_a_time(arch):
    assert [text for kernel in of(arch) for text in accesses(kernel, expected_of(kernel))] == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_row_loops_leave_memory_the_bound(arch):
    assert [text for kernel in of(arch) for text in costs(kernel, expected_of(kernel))] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_enough_threads_fit(arch):
    assert [text for kernel in of(arch) for text in residency(kernel, expected_of(kernel))] == []


def test_templates_are_instantiated_for_every_dtype():
    templates = {kernel.base for kernel in built() if any(f"<{one}" in kernel.name for one in TYPES)}
    for base in templates:
        names = {kernel.name for kernel in of("sm_90") if kernel.base == base}
        assert {one for one in TYPES for name in names if f"<{one}" in name} == set(TYPES), base


# As nvdisasm prints them for these kernels. The table of rates: bench/predict.py.
UNIT_OF = {
    "MUFU.EX2": "special",
    "F2F.F64.F32": "special",
    "I2F.U64": "special",
    "PRMT": "integer",  # a bfloat16 out of its half of a register
    "IMAD.U32": "fma",  # the other half
    "HADD2.F32": "fma",  # a float16
    "HFMA2.BF16_V2": "fma",
    "F2FP.BF16.F32.PACK_AB": "integer",
    "FSETP.GT.AND": "integer",
    "FMNMX": "integer",
    "LOP3.LUT": "integer",
    "IMAD.WIDE": "fma",
    "DFMA": "double",
    "ATOMS.ADD": "other",
    "LDG.E.128.CONSTANT": "other",
    "UIADD3": "other",
    "BSYNC": "other",
}


def test_operations_are_counted_by_the_unit_that_runs_them():
    assert {opcode: Instruction(0, "", opcode, "").unit for opcode in UNIT_OF} == UNIT_OF


def test_every_kernel_uses_instructions_that_are_known():
    names = {one.name for kernel in built() for one in kernel.instructions if one.unit == "integer"}
    assert names <= INTEGER, names - INTEGER  # a new one: look up which unit runs it


# What is no other unit's, as met so far.
MET = """
    FCHK FMNMX FMNMX3 FSEL FSET FSETP F2FP I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SHF
    VIADD VIADDMNMX VIMNMX VIMNMX3"""
INTEGER = set(MET.split())


# --- planted faults ---------------------------------------------------------------------------------------------------

# What the kernel of planted.cu is judged as, and words of the complaint.
ROW = Expected(vector=1, slots=12, special=1.2, fills_memory=True)
FAULTS = {
    "spills": (ROW, r"spills: \d+ bytes of local memory \(LDL, STL\)"),
    "indexes_registers": (ROW, r"indexes_registers: \d+ bytes of local memory"),
    "loads_one_by_one": (ROW, r"loads_one_by_one: 0 row loops with 16-byte accesses, not 1"),
    "stores_one_by_one": (
        ROW,
        r"stores_one_by_one: 1 loops over global memory in small pieces, at most 0: .*STG of 4",
    ),
    "too_many_exponentials": (ROW, r"too_many_exponentials at .*: [34]\.\d\d special per 2 bytes, .* 1\.20"),
    "too_many_instructions": (ROW, r"too_many_instructions at .*: \d\d\.\d\d slots per 2 bytes, .* 12\.00"),
    "integers_beyond_memory": (
        Expected(vector=1, occupancy=0),
        r"integers_beyond_memory at .*: \d+\.\d\d integer per 2 bytes, the limit for an H100 is 8\.85",
    ),
    "few_threads": (ROW, r"few_threads: occupancy \d+%, not 50%"),
    "little_under_way": (ROW, r"little_under_way at .*: \d+ KB under way, an H100 needs 17"),
    "no_bounds": (ROW, r"no_bounds: no __launch_bounds__"),
}


@functools.cache
def planted() -> dict[str, Kernel]:
    """planted.cu, compiled as CMakeLists.txt does, for one architecture: again when it or a header changes."""
    source, output = Path(__file__).with_name("planted.cu"), ROOT / "build" / "planted" / "planted.cubin"
    inputs = [source, *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cuh")]
    with backends.one_at_a_time(output):
        if not output.is_file() or output.stat().st_mtime < max(one.stat().st_mtime for one in inputs):
            toolkit, looked = backends.setup_py().find_toolkit(os.environ)
            assert toolkit is not None, (
                f"the faults are compiled with nvcc, which was not found (looked at: {looked})"
            )
            command = [str(toolkit / "bin" / "nvcc"), "-cubin", "-arch=sm_90", "-O3", "-std=c++20"]
            command += [
                "--expt-relaxed-constexpr",
                f"-I{ROOT}",
                f"-I{ROOT / 'csrc'}",
                str(source),
                "-o",
                str(output),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return {kernel.base: kernel for kernel in sass.kernels(output)}


def test_a_sound_kernel_has_no_complaints():
    assert complaints(planted()["sound"], ROW) == []


def test_the_sound_kernel_costs_what_it_says():
    (loop,) = planted()["sound"].loops
    for found in (loop.quick(), loop.dearest(), loop.shifted()):
        assert (found.loaded, found.stored) == (64, 64)  # four vectors each way
        assert found.special == 32  # one exponential for each of 32 elements
    assert loop.in_flight() == 64


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name):
    expected, words = FAULTS[name]
    found = complaints(planted()[name], expected)
    assert any(re.search(words, text) for text in found), found


def test_every_planted_kernel_is_looked_at():
    assert set(planted()) == {"sound", *FAULTS}
