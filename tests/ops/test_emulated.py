"""The emulated backend is what it says: the CUDA kernels, under the product's ops, in any order of threads."""

import os

import backends
import pytest
import torch
from backends import ORDERS, seeded

from fastppo import ops, reference
from fastppo.reference.sample import keep_mask, philox_uniform


def inputs(rows, columns, dtype=torch.float32):
    generator = seeded(0)
    tensors = [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(3)]
    mask = torch.rand(rows, columns, generator=generator) > 0.3
    return torch.randn(rows, generator=generator), *tensors, mask


# Every kernel, in shapes that take each of its launches: one block and several, rows longer than a warp's step.
SMALL, LARGE = inputs(5, 300, torch.bfloat16), inputs(24, 700)
CALLS = {
    "gae": lambda: ops.gae(LARGE[1], LARGE[2], LARGE[4]),
    "whiten, one block": lambda: ops.whiten(SMALL[1], SMALL[4]),
    "whiten, several": lambda: ops.whiten(LARGE[1], LARGE[4]),
    "rewards_and_advantages, one block": lambda: ops.rewards_and_advantages(*SMALL, whiten_rewards=True),
    "rewards_and_advantages, several": lambda: ops.rewards_and_advantages(*LARGE, whiten_rewards=True),
    "kl_penalty": lambda: ops.kl_penalty(LARGE[1], LARGE[2], estimator="k3"),
    "kl_penalty_backward": lambda: torch.ops.fastppo.kl_penalty_backward(*LARGE[1:4], "k2"),
}

# One block per row, and rows that are shared by two blocks; truncated in every way.
ROWS = (3 * torch.randn(5, 700, generator=seeded(0))).bfloat16()
LONG_ROWS = 3 * torch.randn(2, 33_001, generator=seeded(0))
TRUNCATED = {"top_k": 90, "top_p": 0.9, "min_p": 0.01}


def sample(logits, **settings):
    return ops.sample(logits, seed=3, counters=torch.arange(len(logits)), **settings)


CALLS |= {
    "sample": lambda: sample(ROWS),
    "sample, rows in parts": lambda: sample(LONG_ROWS),
    "sample, truncated": lambda: sample(ROWS, **TRUNCATED),
    "sample, truncated rows in parts": lambda: sample(LONG_ROWS, **TRUNCATED),
    "sample, top_p alone": lambda: sample(LONG_ROWS, top_p=0.99),
}


def flat(results):
    return [results] if torch.is_tensor(results) else list(results)


@pytest.mark.parametrize("name", CALLS)
def test_every_order_of_threads_gives_the_same_bits(name):
    with backends.emulated() as machine:
        runs = []
        for order, seed, blocks in [
            ("forward", 1, 4),
            ("reverse", 1, 4),
            ("shuffled", 1, 4),
            ("shuffled", 2, 2),
        ]:
            machine.set(order, seed, blocks)
            runs.append(flat(CALLS[name]()))
    for run in runs[1:]:
        for got, expected in zip(run, runs[0], strict=True):
            assert got.untyped_storage().tolist() == expected.untyped_storage().tolist()


def test_the_library_is_built_for_the_sanitizers_that_were_asked_for():
    asked = "address" in os.environ.get("FASTPPO_EMULATED_SANITIZE", "")
    assert (b"__asan_report_load4" in backends.build_emulated().read_bytes()) == asked


def test_every_emulated_op_is_in_the_list_above():
    kernels = {name.removeprefix("fastppo_emulated::") for name in backends.emulator().ops()}
    assert kernels <= {name.split(",")[0] for name in CALLS} | {
        "scale_to_unit_std"
    }  # which is whiten's kernel


# The promises of csrc/cuda: launches per call, and reads and writes of global memory in bytes per token.
@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("gae", 1),
        ("whiten, one block", 1),
        ("whiten, several", 2),
        ("rewards_and_advantages, one block", 1),
        ("rewards_and_advantages, several", 3),
        ("kl_penalty", 1),
        ("kl_penalty_backward", 1),
        ("sample", 1),
        ("sample, rows in parts", 1),
        ("sample, truncated rows in parts", 1),
    ],
)
def test_launches_per_call(name, launches):
    with backends.emulated() as machine:
        machine.counts()
        CALLS[name]()
        assert machine.counts().launches == launches


def test_the_default_whitening_takes_two_launches_and_none_takes_one():
    with backends.emulated() as machine:
        for settings, launches in [({}, 2), ({"whiten_advantages": False}, 1)]:
            machine.counts()
            ops.rewards_and_advantages(*LARGE, **settings)
            assert machine.counts().launches == launches


def test_every_input_is_read_once_and_every_result_written_once():
    tokens = LARGE[1].numel()
    with backends.emulated() as machine:
        machine.counts()
        ops.gae(LARGE[1], LARGE[2], LARGE[4])
        assert machine.counts()[1:] == ((4 + 4 + 1) * tokens, (4 + 4) * tokens)
        ops.kl_penalty(LARGE[1], LARGE[2])
        assert machine.counts()[1:] == ((4 + 4) * tokens, 4 * tokens)


def test_sample_reads_the_logits_once_and_one_tile_again():
    with backends.emulated() as machine:
        for logits, tile in [(ROWS, 768), (LONG_ROWS, 1280)]:
            machine.counts()
            sample(logits)
            rows, size = len(logits), logits.element_size()
            loaded = machine.counts().bytes_loaded
            # Beside the logits: the drawn one's, a counter and where rows are split 24 bytes per tile.
            assert 0 <= loaded - logits.numel() * size <= rows * (tile * size + 8 + 4 + 32 * 24)


DRAWN = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.7},
    {"min_p": 0.02},
    {"top_k": 60, "top_p": 0.9},
    {"top_k": 60, "min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 80, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("backend", ["emulated"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize(
    ("rows", "vocabulary", "scale"), [(400, 997, 3.0), (400, 997, 0.5), (12, 40_000, 2.0)]
)
def test_sample_draws_the_tokens_that_the_cpu_draws(rows, vocabulary, scale, backend):
    logits = torch.randn(rows, vocabulary, generator=seeded(rows)) * scale
    counters = torch.arange(rows) * 31
    different = []
    for settings in DRAWN:
        arguments = {"temperature": 0.8, "seed": 17, **settings}
        expected = ops.sample(logits, counters=counters, **arguments)
        if backend == "emulated":
            with backends.emulated():
                got = ops.sample(logits, counters=counters, **arguments)
        else:
            got = ops.sample(logits.cuda(), counters=counters.cuda(), **arguments)
        for ours, theirs in zip(got[1:], expected[1:], strict=True):
            same = got.token_ids.cpu() == expected.token_ids
            torch.testing.assert_close(ours.cpu()[same], theirs[same], atol=3e-6, rtol=0)
        # Only where the uniform falls within rounding of a boundary between two neighbours of the kept set.
        for row in (got.token_ids.cpu() != expected.token_ids).nonzero().flatten().tolist():
            x = logits[row].double()[None]
            weights = ((x - x.max()) / 0.8).exp()
            kept = keep_mask(
                logits[row][None], weights, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
            )
            running = (weights * kept)[0].cumsum(0) / (weights * kept).sum()
            boundary = running[min(int(got.token_ids[row]), int(expected.token_ids[row]))]
            away = abs(float(philox_uniform(17, counters[row : row + 1]) - boundary))
            different.append((settings, row, away))
    assert all(away < 1e-6 for *_, away in different), different
    # Of 3600 draws, each within 1e-6 of one of up to 1000 boundaries; none here.
    assert len(different) <= 1, different


def test_the_cpu_kernels_are_back_afterwards():
    x, mask = LARGE[1], LARGE[4]
    before = ops.gae(x, x, mask)
    with backends.emulated() as machine:
        machine.counts()
        got = ops.gae(x, x, mask)
        assert machine.counts().launches == 1
    after = ops.gae(x, x, mask)
    assert machine.counts().launches == 0
    for b, g, a, e in zip(before, got, after, reference.gae(x, x, mask), strict=True):
        assert torch.equal(b, a)
        torch.testing.assert_close(g, e, atol=1e-4, rtol=1e-5)


def test_orders_are_known_by_name():
    assert ORDERS == ("forward", "reverse", "shuffled")
    with pytest.raises(ValueError), backends.emulated() as machine:
        machine.set("sideways")
