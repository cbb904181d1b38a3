"""The emulator runs right kernels as a GPU would and stops at wrong ones; each sanitizer sees what it is there for.

programs.cpp holds the kernels. A fault that is planted must be named, with the file and line it is in.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulator.builds import BUILDS, compile_with, program, run

RIGHT = [
    *["reductions", "last_block", "warp_functions", "votes", "blocks_interleave", "copies"],
    *["reuse_shared", "through_warp"],
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_run(name, build):
    last_blocks = set()
    for order in range(3):
        got = run(program(build), name, str(order))
        assert got.returncode == 0 and got.stdout.endswith("ok\n"), got.stdout + got.stderr
        last_blocks.add(got.stdout)
    if name == "last_block" and build in ("fibers", "ucontext"):
        assert len(last_blocks) == 3  # the orders differ in which block comes last


# Words of the message; the line of the kernel that it points at.
FAULTS = {
    "divergent_barrier": ("divergent barrier: other threads of the block wait at", "    __syncthreads();"),
    "return_before_barrier": ("divergent barrier: ", "  __syncthreads();"),
    "deadlock": ("deadlock: this thread waits for others that never come", "    __s"),
    "livelock": ("livelock: threads spin on memory that nobody writes", "livelock"),
    "not_in_own_mask": ("partial mask: the calling lane is not in its own mask", "__shfl_sync(0x0000ffffu"),
    "absent_lane": ("partial mask: it names lane 20, which is not there", "__shfl_sync(kFullMask"),
    "returned_lane": ("partial mask: ", "__syncwarp(kFullMask)"),
    "different_masks": ("partial mask: ", "__ballot_sync"),
    "shuffle_from_outside": ("a shuffle reads from lane 8, which is outside the mask", "__shfl_sync(0xffu"),
    "divergent_warp": ("divergent warp: lane", "__shfl_sync(kFullMask"),
    "uninitialised_shared": ("uninitialised read of shared memory, index 7", "x[threadIdx.x ^ 1]"),
    "uninitialised_dynamic": ("uninitialised read of shared memory, index 0", "x[0] += 1;"),
    "shared_out_of_range": ("shared memory index 32 is out of range, size 32", "x[threadIdx.x + 1] = 1;"),
    "dynamic_out_of_range": ("shared memory index 31 is out of range, size 31", "x[threadIdx.x] = 1;"),
    "global_out_of_range": ("global memory index 32 is out of range, size 32", "{ x[threadIdx.x] = 1; }"),
    "global_read_out_of_range": ("global memory index -1 is out of range, size 32", "const float value = x["),
    "vector_out_of_range": ("16-byte load out of range", "x.size"),
    "misaligned_vector": ("misaligned 16-byte load", "is_aligned"),
    "misaligned_store": ("misaligned 16-byte store", "is_aligned"),
    "part_out_of_range": ("part of a span out of range", "size"),
    "static_shared_too_big": (
        "static shared memory over 48 KB: 49160 bytes",
        "FASTPPO_SHARED(double, x, 6145)",
    ),
    "too_many_threads": ("a block of 1056 threads: at most 1024", '{"too_many_threads"'),
    "no_blocks": ("a launch needs at least one block and one thread", '{"no_blocks"'),
    "too_much_shared": ("shared memory over 227 KB: 232464 bytes", '{"too_much_shared"'),
    "grid_too_big": ("a grid may have 2^31 - 1 blocks in x and 65535 in y and z", '{"grid_too_big"'),
    "shared_not_opted_in": ("over 48 KB of dynamic shared memory without opting in", "emulator::launch("),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_place(name):
    message, line = FAULTS[name]
    for order in range(3):
        got = run(program("fibers"), name, str(order))
        assert got.returncode == -6, got.stdout + got.stderr  # SIGABRT
        assert message in got.stderr
        file, number = re.search(r"^  at (.+):(\d+)$", got.stderr, re.MULTILINE).groups()
        assert line in Path(file).read_text().splitlines()[int(number) - 1], got.stderr
        kernel = "direct" if name == "shared_not_opted_in" else r"\w+"
        assert re.search(rf"^  kernel {kernel} launched at .+programs.cpp:\d+$", got.stderr, re.MULTILINE)


def test_the_message_names_block_and_thread():
    got = run(program("fibers"), "shared_out_of_range", "1")
    assert "\n  block (2, 0, 0) thread (31, 0, 0)\n" in got.stderr


@pytest.mark.parametrize(
    "name", ["divergent_barrier", "deadlock", "shuffle_from_outside", "uninitialised_shared"]
)
def test_threads_name_faults_as_fibers_do(name):
    got = run(program("thread"), name, "0")
    assert got.returncode != 0 and FAULTS[name][0] in got.stderr


@pytest.mark.parametrize(
    ("build", "name", "report"),
    [
        ("thread", "missing_barrier", "data race"),
        ("thread", "missing_syncwarp", "data race"),
        ("thread", "missing_fence", "data race"),
        ("address", "raw_out_of_range", "heap-buffer-overflow"),
        ("address", "raw_misaligned", "misaligned address"),
    ],
)
def test_each_sanitizer_sees_what_fibers_miss(build, name, report):
    assert run(program("fibers"), name, "0").returncode == 0
    got = run(program(build), name, "0")
    assert got.returncode != 0 and report in got.stderr, got.stdout + got.stderr


def test_there_are_no_floating_point_atomics(tmp_path):
    source = tmp_path / "atomic.cpp"
    code = '#include "cuda/device.cuh"\nvoid kernel({0}* x) {{ atomicAdd(x, {0}(1)); }}\nint main() {{}}\n'
    source.write_text(code.format("int"))
    compile_with(source, tmp_path / "atomic", ["-fsyntax-only"])
    source.write_text(code.format("float"))
    with pytest.raises(AssertionError, match=r"no matching function for call to .atomicAdd"):
        compile_with(source, tmp_path / "atomic", ["-fsyntax-only"])
