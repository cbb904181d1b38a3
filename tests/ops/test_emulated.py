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


def ppo_loss(rows, columns, normalizer=None):
    x, mask = inputs(rows, columns)[1:4], inputs(rows, columns)[4]
    return ops.ppo_loss(
        *x,
        mask,
        new_values=x[0],
        values=x[1],
        returns=x[2],
        entropy=x[0],
        ref_logprobs=x[1],
        normalizer=normalizer,
    )


def from_logits(rows, vocabulary, dtype=torch.float32, normalizer=None):
    x = inputs(2, rows // 2)[1:4]
    logits = inputs(rows, vocabulary, dtype)[1].view(2, rows // 2, vocabulary).requires_grad_()
    ids = torch.arange(rows).view(2, -1) % vocabulary
    positional = (logits, ids, x[0] - 6, x[1], torch.ones(2, rows // 2, dtype=torch.bool))
    loss, stats = ops.ppo_loss_from_logits(
        *positional, ref_logprobs=x[0] - 6, kl_coef=0.1, entropy_coef=0.1, normalizer=normalizer
    )
    return loss.detach(), stats, torch.autograd.grad(loss, logits)


def scale_():
    x = LARGE[1].clone()
    torch.ops.fastppo.scale_(x, torch.tensor(0.3))
    return x


def adamw_step_(count):
    x = inputs(1, count)[1].flatten()
    state = [*ops.split_master(x), x.bfloat16(), x.square()]
    ops.adamw_step_(
        *state[:2], x, *state[2:], lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1, step=1
    )
    return state


def decode_attention(dtype):
    generator, (slots, heads, capacity, width) = seeded(4), (3, 2, 300, 20)
    q, k, v = (torch.randn(2, h, width, generator=generator).to(dtype) for h in (10, heads, heads))
    caches = [torch.randn(slots, heads, capacity, width, generator=generator).to(dtype) for _ in range(2)]
    out = ops.decode_attention(q, k, v, *caches, torch.tensor([2, 0]), torch.tensor([290, 3]), scale=0.2)
    return out, *caches


def of_logits(op, *shape, dtype=torch.float32):
    """Run an op of logits and ids, or of two tensors of logits, forward and backward."""
    generator = seeded(1)
    x, y = ((torch.randn(*shape, generator=generator) * 3).to(dtype).requires_grad_() for _ in range(2))
    if op is ops.logprobs:
        results = op(x, torch.arange(shape[0]) * 7, temperature=0.7)
    else:
        results = (op(x, y, temperature=0.7),)
    weights = torch.arange(float(shape[0]))  # the first row is without gradient
    sum((r * weights).sum() for r in results).backward()
    return *results, x.grad, *([] if y.grad is None else [y.grad])


def of_head(rows, width, vocabulary, dtype=torch.float32):
    """Run linear_logprobs with a bias and a cap, forward and backward."""
    generator = seeded(3)
    leaves = [
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    ]
    ids, weights = torch.arange(rows) % vocabulary, torch.arange(float(rows))
    results = ops.linear_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], softcap=5.0)
    sum((r * weights).sum() for r in results).backward()
    return *results, *[leaf.grad for leaf in leaves]


# Every kernel, in shapes that take each of its launches: one block and several, rows longer than a warp's step.
SMALL, LARGE = inputs(5, 300, torch.bfloat16), inputs(24, 700)
CALLS = {
    "gae": lambda: ops.gae(LARGE[1], LARGE[2], LARGE[4]),
    "whiten, one block": lambda: ops.whiten(SMALL[1], SMALL[4]),
    "whiten, several": lambda: ops.whiten(LARGE[1], LARGE[4]),
    "rewards_and_advantages, one block": lambda: ops.rewards_and_advantages(*SMALL, whiten_rewards=True),
    "rewards_and_advantages, several": lambda: ops.rewards_and_advantages(*LARGE, whiten_rewards=True),
    "ppo_loss, one block": lambda: ppo_loss(5, 300),
    "ppo_loss, several": lambda: ppo_loss(24, 700),
    "ppo_loss, several, normalizer": lambda: ppo_loss(24, 700, normalizer=torch.tensor(100.0)),
    "ppo_loss_from_logits": lambda: from_logits(8, 4099, torch.bfloat16),
    "scale_": scale_,
    "adamw_step_": lambda: adamw_step_(5003),
    "logprobs, whole rows": lambda: of_logits(ops.logprobs, 520, 100, dtype=torch.bfloat16),
    "logprobs, rows in parts": lambda: of_logits(ops.logprobs, 3, 9001),
    "logprobs_backward": lambda: of_logits(ops.logprobs, 2, 5000, dtype=torch.bfloat16),
    "distribution_kl, whole rows": lambda: of_logits(ops.distribution_kl, 520, 100, dtype=torch.bfloat16),
    "distribution_kl, rows in parts": lambda: of_logits(ops.distribution_kl, 3, 9001),
    "distribution_kl_backward": lambda: of_logits(ops.distribution_kl, 2, 5000, dtype=torch.bfloat16),
    "linear_logprobs, several tiles": lambda: of_head(3, 8, 20001),
    "linear_logprobs, several blocks of rows": lambda: of_head(8200, 4, 30, torch.bfloat16),
    "linear_logprobs_backward": lambda: of_head(5, 8, 301),
    "decode_attention": lambda: decode_attention(torch.float32),
    "decode_attention, bfloat16": lambda: decode_attention(torch.bfloat16),
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


# A minute a run: what is new in it, beside the launches of the other calls, is a sum over two blocks of rows.
LONG = {"linear_logprobs, several blocks of rows"}

ROW_THREADS = 256  # csrc/cuda/softmax.cuh


def flat(results):
    if torch.is_tensor(results):
        return [results]
    return [x for result in results for x in flat(result)]


@pytest.mark.parametrize("name", CALLS)
def test_every_order_of_threads_gives_the_same_bits(name):
    orders = [("forward", 1, 4), ("shuffled", 2, 2), ("reverse", 1, 4), ("shuffled", 1, 4)]
    if name in LONG:
        orders = orders[:2]
    with backends.emulated() as machine:
        runs = []
        for order, seed, blocks in orders:
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
        ("ppo_loss, one block", 1),
        ("ppo_loss, several", 2),
        ("ppo_loss, several, normalizer", 2),
        ("ppo_loss_from_logits", 3 + 1),  # the tokens counted, rows, tokens; the backward looks at its factor
        ("scale_", 1),
        ("adamw_step_", 1),
        ("logprobs, whole rows", 2),  # forward and backward
        ("logprobs, rows in parts", 2),
        ("distribution_kl, whole rows", 2),
        ("distribution_kl, rows in parts", 2),
        (
            "linear_logprobs_backward",
            1 + 1 + 3,
        ),  # fold; active rows; gradient of the tile, of hidden, of bias
        ("decode_attention", 1),
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
        ppo_loss(5, 304)  # in one block
        loaded, stored = (8 * 4 + 1) * 5 * 304, 3 * 4 * 5 * 304
        counted, results = 5 * 304 + 8 + 8, 8 + 4 * 10  # the mask once more to count it; loss and stats
        assert machine.counts()[1:] == (loaded + counted - 8, stored + results)
        adamw_step_(5000)
        assert machine.counts()[1:] == ((2 + 2 + 4 + 2 + 4) * 5000, (2 + 2 + 2 + 4) * 5000)


def test_the_loss_from_logits_reads_and_writes_each_row_once():
    with backends.emulated() as machine:
        for shared, reads in [(227 << 10, 1), (3 << 10, 1 + 3840 / 4096)]:  # 1024 bytes, 256 logits, are held
            machine.set(max_shared=shared)
            machine.counts()
            from_logits(8, 4096, normalizer=8.0)
            counts = machine.counts()
            assert counts.launches == 2 + 1
            row_bytes = 8 * 4096 * 4
            factor = (
                8 * 4096 // 4 * 4
            )  # the backward's scale_: each thread looks at the factor, for four elements
            assert row_bytes * reads <= counts.bytes_loaded - factor < row_bytes * reads + 2500
            assert row_bytes <= counts.bytes_stored < row_bytes + 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 520])  # in parts and whole
def test_logits_are_read_once_and_gradients_written_once(rows, dtype):
    vocabulary, width = 2056, dtype.itemsize
    logits = torch.randn(rows, vocabulary, generator=seeded(2)).to(dtype)
    ref_logits, ids = logits.flip(0), torch.zeros(rows, dtype=torch.int64)
    weights = torch.ones(rows)
    weights[::2] = 0
    active = int(weights.sum())
    parts = rows * 2 if rows < 512 else 0
    with backends.emulated() as machine:
        machine.counts()
        op = torch.ops.fastppo
        _, *saved = op.logprobs(logits, ids, 1.0)
        # The picked logit, then a part's 24 bytes of sums, and what a row gives back.
        assert machine.counts()[1:] == (
            rows * (vocabulary + 1) * width + parts * 24,
            rows * 4 * 4 + parts * 24,
        )
        op.logprobs_backward(weights, None, logits, ids, *saved, 1.0)
        assert machine.counts()[1:] == (
            active * (vocabulary + 1) * width,
            rows * vocabulary * width + active * width,
        )
        kl, stats = op.distribution_kl(logits, ref_logits, 1.0)
        assert machine.counts()[1:] == (
            rows * 2 * vocabulary * width + parts * 40,
            rows * 5 * 4 + parts * 40,
        )
        op.distribution_kl_backward(weights, logits, ref_logits, kl, stats, 1.0, True, True)
        loaded, stored = machine.counts()[1:]
        assert stored == rows * 2 * vocabulary * width
        statistics = active * ROW_THREADS * 4 * 4 * (2 if parts else 1)  # every thread reads the row's
        assert loaded == active * 2 * vocabulary * width + statistics


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
