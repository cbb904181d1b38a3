"""docs/cuda-predicted.md: written by the command that it names, complete, and labelled as what it is."""

from __future__ import annotations

import re

import backends
import torch

from bench import predict, sass
from bench.cases import Case, Source, cases
from bench.predict import DEVICES, PAGE

KERNEL = re.compile(r"^\| `(\w+)", re.MULTILINE)


def described() -> list[Case]:
    return [case for case in cases() if case.has_kernels() and case.bytes_moved()]


def test_the_page_says_that_nothing_was_measured():
    text = PAGE.read_text()
    assert "**Predicted, not measured.**" in text
    assert f"`{predict.COMMAND}`" in text


def test_the_page_lists_every_kernel_and_every_case(cuda_library):
    # Not its figures, which change with compilers. Stale? Run the command that the page names.
    text = PAGE.read_text()
    assert set(KERNEL.findall(text)) == {kernel.base for kernel in sass.kernels(cuda_library, ["sm_90"])}
    listed = re.findall(r"^\| (\w[^|`]* \[[\d, ]+\] \w+) \|", text, re.MULTILINE)
    assert listed == [case.label for case in described()]
    for device in DEVICES:
        assert f"| {device.name} |" in text


def test_what_a_case_must_move_is_what_the_kernels_move():
    # On the emulator, in a shape that takes the launches of the large one.
    kernels = {name.removeprefix("fastppo_emulated::") for name in backends.emulator().ops()}
    looked_at = [case for case in cases() if set(case.kernels) & kernels and case.bytes_moved(case.tiny)]
    assert looked_at
    for case in looked_at:
        with backends.emulated() as machine:
            arguments = case.arguments(Source(), tiny=True)
            machine.counts()
            case.ours(*arguments)
            counts = machine.counts()
        moved, wanted = counts.bytes_loaded + counts.bytes_stored, case.bytes_moved(case.tiny)
        # More: one number per row, parts of sums, which are much of what so small a shape moves. Truncated sampling
        # reads candidates again, which in so short a row are everywhere: for the cut, for the masses, for the draw.
        # decode_attention reads a token again for each that a row lacks to whole turns: many, where the row is short.
        times = 4 if "top_p" in case.op else 1.6 if case.op == "decode_attention" else 1.25
        # The threads of a block all read their row's four statistics, which costs a GPU one read; here each counts.
        broadcast = case.tiny[0] * 256 * 16 if case.op == "distribution_kl forward + backward" else 0
        assert 0.98 * wanted <= moved - broadcast <= times * wanted + 4096, (case.label, moved, wanted)


def test_a_plan_runs_nothing_and_names_the_launches():
    from fastppo import ops

    huge = torch.empty(1 << 15, 1 << 15)  # 4 GB, of which no byte is touched
    small = torch.full((64, 300), 7.0)
    with backends.emulated() as machine:
        launches = machine.planned(lambda: ops.kl_penalty(huge, huge))
        assert launches == [backends.Launch("kl_kernel", 2048, 256, 0)]
        machine.counts()
        whitened = machine.planned(lambda: ops.whiten(small, small > 0))
        assert [one.kernel for one in whitened] == ["standardize_kernel", "standardize_kernel"]
        assert machine.counts().bytes_loaded == 0
        assert not torch.equal(ops.whiten(small, small > 0), small)  # runs again


def test_occupancy_is_that_of_nvidias_calculator():
    # Worked out with the occupancy calculator's rules for 9.0: registers, shared memory, warps, blocks are the limit.
    room = sass.ROOM["sm_90"]
    for threads, registers, shared, blocks in [
        (256, 32, 0, 8),
        (256, 64, 0, 4),
        (256, 65, 0, 3),
        (1024, 64, 0, 1),
        (128, 16, 0, 16),
        (32, 16, 0, 32),
        (256, 32, 100 << 10, 2),
    ]:
        assert sass.resident_blocks(room, threads, registers, shared) == blocks, (threads, registers, shared)


def test_a_bound_is_the_longest_of_its_times():
    one = predict.Prediction(memory=3.0, issue=2.0, unit="special", latency=1.0, launches=1)
    assert (one.seconds, one.bound) == (3.0, "memory")
    two = predict.Prediction(memory=3.0, issue=4.0, unit="special", latency=1.0, launches=1)
    assert (two.seconds, two.bound) == (4.0, "issue (special)")
    three = predict.Prediction(memory=3.0, issue=4.0, unit="special", latency=5.0, launches=1)
    assert (three.seconds, three.bound) == (5.0, "latency")


def test_an_h100_has_the_budget_of_the_design():
    # While it reads one bfloat16: about 17.7 instructions, 2.2 special functions and 8.9 integer operations.
    h100 = next(device for device in DEVICES if device.name == "H100")
    assert [round(2 * h100.per_byte(unit), 1) for unit in ("slots", "special", "integer")] == [17.7, 2.2, 8.9]
