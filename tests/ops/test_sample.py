"""sample: what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from backends import seeded
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo import ops, reference
from fastppo.reference.sample import keep_mask, philox_uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.8
TRUNCATIONS = [
    {},
    {"top_k": 1},
    {"top_k": 12},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9},
    {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 25, "top_p": 0.9, "min_p": 0.08},
    {"top_k": 7, "min_p": 0.3},
    {"top_k": 10**6, "top_p": 1.0, "min_p": 0.0},
]


def names(settings: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "none"


def example(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (torch.randn(*shape, generator=seeded(sum(shape))) * scale).to(dtype)


@pytest.fixture
def fewer(backend: str) -> int:
    """Of what only makes a test sharper, the emulator does a tenth."""
    return 10 if backend == "emulated" else 1


def draws(row: Tensor, count: int, seed: int = 0, **settings: float) -> ops.Sample:
    """Many draws from one row, which is never copied."""
    return ops.sample(
        row.expand(count, -1), temperature=TEMPERATURE, seed=seed, counters=torch.arange(count), **settings
    )


def hugging_face_probabilities(
    logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Probabilities after the warpers that `generate` builds, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits.double()).softmax(-1)


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=names)
def test_the_drawn_set_is_the_set_that_hugging_face_allows(settings: dict, fewer: int) -> None:
    row = torch.linspace(-2, 2, 43)[torch.randperm(43, generator=seeded(3))]
    drawn = draws(row, 20000 // fewer, **settings)
    expected = hugging_face_probabilities(row[None], **settings)[0]
    assert set(drawn.token_ids.tolist()) == set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(
        drawn.sampling_logprobs.double(), expected.log()[drawn.token_ids], atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=names)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_the_kept_mass_of_a_large_vocabulary_is_hugging_faces(vocabulary: int, settings: dict) -> None:
    logits = example(2, vocabulary)
    drawn = ops.sample(logits, temperature=TEMPERATURE, seed=1, counters=torch.arange(2), **settings)
    expected = hugging_face_probabilities(logits, **settings).gather(-1, drawn.token_ids[:, None])[:, 0].log()
    torch.testing.assert_close(drawn.sampling_logprobs.double(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 100, "min_p": 0.01}], ids=names)
@pytest.mark.parametrize(("vocabulary", "dtype"), [(211, torch.float32), (9001, torch.bfloat16)])
def test_draws_follow_the_distribution(
    vocabulary: int, dtype: torch.dtype, settings: dict, backend: str
) -> None:
    counts = (5_000, 600) if backend == "emulated" else (50_000, 20_000)
    count = counts[vocabulary > 1000]
    row = example(vocabulary, dtype=dtype, scale=1.5)
    weights = ((row.double() - row.max()) / TEMPERATURE).exp()
    # Not from Hugging Face, which keeps every tie at a boundary, and bf16 has many.
    kept = keep_mask(row.float(), weights, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings)
    expected = weights * kept / (weights * kept).sum()
    drawn = draws(row, count, seed=7, **settings).token_ids
    # Neighbouring ids share a bin until it expects 20 draws.
    bins = ((expected * count).cumsum(0) / 20).floor().long()
    bins = bins.unique(return_inverse=True)[1]
    wanted = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins, expected * count)
    got = torch.bincount(bins[drawn], minlength=wanted.numel()).double()
    assert got[wanted == 0].sum() == 0
    got, wanted = got[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = ((got - wanted) ** 2 / wanted).sum().item(), wanted.numel() - 1
    assert freedom > 5
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 65, 4099, 50257])
def test_kernel_and_reference_draw_the_same_tokens(vocabulary: int, dtype: torch.dtype) -> None:
    logits = example(8, vocabulary, dtype=dtype)
    different = total = 0
    for settings in TRUNCATIONS:
        arguments = {"temperature": TEMPERATURE, "seed": 5, "counters": torch.arange(8) * 977, **settings}
        actual, expected = ops.sample(logits, **arguments), reference.sample(logits.double(), **arguments)
        assert [x.dtype for x in actual] == [torch.int64] + [torch.float32] * 3
        same = actual.token_ids == expected.token_ids
        different, total = different + int((~same).sum()), total + same.numel()
        for ours, exact in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours[same].double(), exact[same], atol=5e-6, rtol=0)
    # Only where u falls within rounding of a boundary: about one draw in a million.
    assert different <= 1, f"{different} of {total} draws differ"


def test_both_log_probabilities_and_the_entropy_are_those_of_logprobs(backend: str) -> None:
    def assert_same(actual: Tensor, expected: Tensor) -> None:
        # On the CPU they are the same loops. On CUDA a warp has a tile there, here a block a row.
        atol = 0.0 if backend == "cpu" else 5e-6
        torch.testing.assert_close(actual, expected, atol=atol, rtol=0)

    logits = example(8, 50257)
    plain = ops.sample(logits, temperature=TEMPERATURE, seed=1, counters=torch.arange(8))
    picked, entropy = ops.logprobs(logits, plain.token_ids, temperature=TEMPERATURE)
    assert torch.equal(plain.logprobs, plain.sampling_logprobs)
    assert_same(plain.logprobs, picked)
    assert_same(plain.entropy, entropy)
    truncated = ops.sample(logits, temperature=TEMPERATURE, top_p=0.5, seed=1, counters=torch.arange(8))
    picked, entropy = ops.logprobs(logits, truncated.token_ids, temperature=TEMPERATURE)
    assert_same(truncated.logprobs, picked)
    assert_same(truncated.entropy, entropy)
    assert (truncated.sampling_logprobs > truncated.logprobs).all()


@pytest.mark.parametrize(
    ("row", "settings", "allowed"),
    [
        ([1.0] * 8, {"top_k": 3}, {0, 1, 2}),
        ([1.0] * 8, {"top_p": 0.5}, {0, 1, 2, 3}),
        ([1.0] * 8, {"top_p": 0.51}, {0, 1, 2, 3, 4}),
        ([1.0] * 8, {"min_p": 1.0}, set(range(8))),
        ([1.0, 3.0, 3.0, 3.0, 2.0], {"top_k": 2}, {1, 2}),
        ([1.0, 3.0, 3.0, 3.0, 2.0], {"top_k": 4}, {1, 2, 3, 4}),
        ([1.0, 3.0, 3.0, 3.0, 2.0], {"top_p": 0.1}, {1}),
        ([1.0, 3.0, 2.0, 3.0], {"top_k": 1}, {1}),
        ([-0.0, 0.0, -0.0], {"top_k": 1}, {0}),
        ([0.0, -math.inf, 1.0, -math.inf], {"top_k": 3}, {0, 2}),
        ([0.0, -math.inf, 1.0, -math.inf], {}, {0, 2}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_resolved_by_lowest_id(row: list, settings: dict, allowed: set, dtype: torch.dtype) -> None:
    assert set(draws(torch.tensor(row, dtype=dtype), 300, **settings).token_ids.tolist()) == allowed


def test_a_row_of_equal_logits_over_many_tiles(fewer: int) -> None:
    row = torch.full((151_937,), -3.5, dtype=torch.bfloat16)
    count = 50 // fewer
    drawn = draws(row, count, top_k=70_001)
    assert (drawn.token_ids < 70_001).all() and drawn.token_ids.max() > 4096
    torch.testing.assert_close(
        drawn.sampling_logprobs, torch.full((count,), -math.log(70_001)), atol=2e-6, rtol=0
    )
    assert (draws(row, count, top_p=0.25).token_ids <= 151_937 // 4).all()


def test_top_k_1_is_argmax(fewer: int) -> None:
    rows = 64 // fewer
    logits = example(rows, 50257, dtype=torch.bfloat16)  # bf16: ties are common
    drawn = ops.sample(logits, temperature=5.0, top_k=1, seed=3, counters=torch.arange(rows))
    lowest_best = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(drawn.token_ids, lowest_best) and (drawn.sampling_logprobs == 0).all()


def test_tokens_far_below_the_best_and_whole_tiles_of_them() -> None:
    row = torch.full((9001,), -math.inf)
    row[5000], row[8999], row[17] = 1e4, 1e4 - 1, -1e4
    assert set(draws(row, 100).token_ids.tolist()) == {5000, 8999}
    drawn = draws(row, 100, top_p=0.9999)
    assert set(drawn.token_ids.tolist()) == {5000, 8999}


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF])
def test_the_uniform_is_philox(seed: int) -> None:
    # Of 2^16 equal tokens the id is the uniform's first 16 bits.
    counters = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567])
    drawn = ops.sample(torch.zeros(6, 2**16), seed=seed, counters=counters)
    assert drawn.token_ids.tolist() == (philox_uniform(seed, counters) * 2**16).long().tolist()


def test_known_answer_of_philox() -> None:
    # Random123's vector for key 0, counter 0 starts 6627e8d5 e169c58d.
    assert philox_uniform(0, torch.tensor([0])).item() == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) / 2**53


@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}], ids=names)
def test_a_draw_depends_on_its_row_seed_and_counter_only(settings: dict) -> None:
    logits, counters = example(12, 50257), torch.arange(12) * 31 + 5

    def drawn(rows: list[int], seed: int = 9) -> list[Tensor]:
        chosen = ops.sample(
            logits[rows], temperature=TEMPERATURE, seed=seed, counters=counters[rows], **settings
        )
        return list(chosen)

    everything = drawn(list(range(12)))
    for rows in ([11, 3, 0, 7], [5], list(range(11, -1, -1))):
        assert all(torch.equal(x, y[rows]) for x, y in zip(drawn(rows), everything, strict=True))
    assert all(map(torch.equal, drawn(list(range(12))), everything))
    assert not torch.equal(drawn(list(range(12)), seed=10)[0], everything[0])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, drawn(list(range(12))), everything))
            assert torch.equal(drawn([4])[0], everything[0][4:5])
    finally:
        torch.set_num_threads(threads)


def test_rows_of_any_stride_and_none_at_all() -> None:
    whole, counters = example(6, 3000), torch.arange(3)
    view = whole[::2, 7:2900]
    for settings in ({}, {"top_k": 5}):
        expected = ops.sample(view.contiguous(), seed=1, counters=counters, **settings)
        assert all(map(torch.equal, ops.sample(view, seed=1, counters=counters, **settings), expected))
        empty = ops.sample(torch.empty(0, 9), seed=1, counters=torch.empty(0, dtype=torch.int64), **settings)
        assert [tuple(x.shape) for x in empty] == [(0,)] * 4
    assert torch.equal(
        ops.sample(view, seed=1, counters=torch.arange(6)[::2]).token_ids,
        ops.sample(view, seed=1, counters=torch.tensor([0, 2, 4])).token_ids,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([math.nan], "sample: logits row 2 holds NaN"),
        ([math.inf], "sample: logits row 2 holds +inf"),
        ([-math.inf] * 5003, "sample: logits row 2 is -inf everywhere"),
        ([math.nan] + [-math.inf] * 5002, "sample: logits row 2 holds NaN"),
    ],
)
def test_a_row_that_is_no_distribution_is_named(
    values: list, message: str, dtype: torch.dtype, backend: str
) -> None:
    clean = example(4, 5003, dtype=dtype)
    logits, counters = clean.clone(), torch.arange(4)
    logits[2, : len(values)] = torch.tensor(values, dtype=dtype)
    for settings in ({}, {"top_k": 3, "top_p": 0.9}):
        if backend == "cpu":
            with pytest.raises(ValueError) as error:
                ops.sample(logits, seed=1, counters=counters, **settings)
            assert str(error.value) == message
            continue
        # The host cannot be told without waiting for the device: the row's results say so.
        drawn = ops.sample(logits, seed=1, counters=counters, **settings)
        expected = ops.sample(clean, seed=1, counters=counters, **settings)
        assert drawn.token_ids[2] == -1 and all(x[2].isnan() for x in drawn[1:])
        for got, other in zip(drawn, expected, strict=True):
            assert torch.equal(got[[0, 1, 3]], other[[0, 1, 3]])


# On CUDA a row of fewer than 32768 logits has a block, longer ones have several where there are few rows.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(2, 5), (2, 1025), (2, 3001), (2, 20_001), (1, 40_003)])
def test_the_bits_do_not_depend_on_where_a_row_begins(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    room = example(rows, vocabulary + 20, dtype=dtype)
    aligned = torch.empty(rows, vocabulary // 16 * 16 + 32, dtype=dtype)[:, :vocabulary]
    for offset in (1, 2, 5, 8) if vocabulary < 5000 else (3,):
        view = room[:, offset : offset + vocabulary]
        aligned.copy_(view)
        for settings in ({}, {"top_k": 12, "top_p": 0.9, "min_p": 0.001}):
            got, expected = (
                ops.sample(x, temperature=TEMPERATURE, seed=2, counters=torch.arange(rows), **settings)
                for x in (view, aligned)
            )
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=names)
@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 3e4])
@pytest.mark.parametrize("vocabulary", [257, 4099, 33_001])
def test_a_level_far_from_0_changes_nothing(vocabulary: int, level: float, settings: dict) -> None:
    # Multiples of 2^-4, so that adding a level does not round. The best are the last, past every whole vector.
    logits = (example(2, vocabulary) * 16).round() / 16
    logits[:, -3:] += 12
    arguments = {"temperature": TEMPERATURE, "seed": 4, "counters": torch.arange(2), **settings}
    got, expected = ops.sample(logits + level, **arguments), ops.sample(logits, **arguments)
    assert torch.equal(got.token_ids, expected.token_ids)
    for ours, exact in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("rows", "vocabulary"), [(2, 33_001), (4, 9001)])
def test_truncations_that_keep_nearly_everything(rows: int, vocabulary: int) -> None:
    """Flat rows: no bound helps, every step goes over the whole row."""
    logits = torch.rand(rows, vocabulary, generator=seeded(8)) * 0.5
    counters = torch.arange(rows)
    for settings in ({"top_p": 0.999}, {"top_k": vocabulary - 99, "top_p": 0.99}):
        drawn = ops.sample(logits, seed=6, counters=counters, **settings)
        expected = reference.sample(logits.double(), seed=6, counters=counters, **settings)
        same = drawn.token_ids == expected.token_ids
        # A token has 3e-5 of the mass, so that rounding of 1e-8 decides one draw in a thousand.
        assert (~same).sum() <= 1
        torch.testing.assert_close(
            drawn.sampling_logprobs[same].double(), expected.sampling_logprobs[same], atol=2e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": lambda: torch.zeros(2, 3, 4)}, "sample: logits must have shape (B, V), got (2, 3, 4)"),
        (
            {"logits": lambda: torch.zeros(2, 0)},
            "sample: logits must have at least one column, got shape (2, 0)",
        ),
        (
            {"logits": lambda: torch.zeros(2, 4).int()},
            "sample: logits must be float32, bfloat16 or float16, got int32",
        ),
        (
            {"counters": lambda: torch.arange(3)},
            "sample: counters must have shape (2,) like the rows of logits, got (3,)",
        ),
        ({"counters": lambda: torch.zeros(2)}, "sample: counters must be int64, got float32"),
        ({"temperature": 0.0}, "sample: temperature must be positive and finite, got 0"),
        ({"top_k": -1}, "sample: top_k must be at least 0 (0 keeps all tokens), got -1"),
        ({"top_p": 0.0}, "sample: top_p must be in (0, 1], got 0"),
        ({"top_p": 1.5}, "sample: top_p must be in (0, 1], got 1.5"),
        ({"min_p": -0.5}, "sample: min_p must be in [0, 1], got -0.5"),
        ({"min_p": 2.0}, "sample: min_p must be in [0, 1], got 2"),
    ],
)
def test_errors_name_the_argument_what_was_expected_and_what_came(change: dict, message: str) -> None:
    change = {name: x() if callable(x) else x for name, x in change.items()}
    arguments = {"logits": torch.zeros(2, 4), "seed": 1, "counters": torch.arange(2)} | change
    with pytest.raises(ValueError) as error:
        ops.sample(arguments.pop("logits"), **arguments)
    assert str(error.value) == message


def test_opcheck_and_compile() -> None:
    logits, counters = example(3, 37), torch.arange(3)
    torch.library.opcheck(torch.ops.fastppo.sample.default, (logits, 0.7, 5, 0.9, 0.01, 3, counters))

    def draw(logits: Tensor, counters: Tensor, seed: int) -> ops.Sample:
        return ops.sample(logits, top_k=5, seed=seed, counters=counters)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for seed in (3, 4):
        assert all(map(torch.equal, compiled(logits, counters, seed), draw(logits, counters, seed)))
    assert not ops.sample(logits.requires_grad_(), seed=1, counters=counters).logprobs.requires_grad
