"""gae, whiten, scale_to_unit_std and rewards_and_advantages keep their promises."""

import pytest
import torch
from backends import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 0 and 1; less than a register; around the 512-column block; several blocks; more rows than threads.
SHAPES = [(0, 4), (4, 0), (1, 1), (3, 5), (2, 511), (2, 512), (2, 513), (5, 1300), (64, 53)]
POISONS = [100.0, float("nan"), float("inf"), -float("inf")]


def draw(shape, dtype=torch.float32, seed=0, n=4):
    """Return n random tensors, a mask with gaps, and one number per row."""
    generator = seeded(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]
    mask = torch.rand(shape, generator=generator) > 0.3
    return tensors, mask, torch.randn(shape[0], generator=generator).to(dtype)


def assert_near_oracle(got, inputs_to_expected, *inputs, **settings):
    """The oracle sees the same numbers in float64, so what is left is float32 rounding, over sums of at most
    a few thousand terms of size 1."""
    expected = inputs_to_expected(*[x.double() if x.is_floating_point() else x for x in inputs], **settings)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), e, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gae_matches_the_float64_reference(shape, dtype):
    (rewards, values, *_), mask, bootstrap = draw(shape, dtype)
    for settings_ in (
        {},
        {"gamma": 0.9, "lam": 0.8},
        {"gamma": 0.99, "lam": 1.0, "bootstrap_values": bootstrap},
    ):
        got = ops.gae(rewards, values, mask, **settings_)
        wide = {k: v.double() if torch.is_tensor(v) else v for k, v in settings_.items()}
        assert_near_oracle(got, reference.gae, rewards, values, mask, **wide)


def test_gae_by_hand():
    # gamma = lam = 1/2. Row 0: three tokens. From the back:
    #   t=2: delta = 3 - 2 = 1                    A = 1
    #   t=1: delta = 2 + 1/2*2 - 1 = 2            A = 2 + 1/4*1 = 2.25
    #   t=0: delta = 1 + 1/2*1 - 4 = -2.5         A = -2.5 + 1/4*2.25 = -1.9375
    # Row 1: the same tokens with two observation tokens before the third: the same advantages.
    nan = float("nan")
    rewards = torch.tensor([[1.0, 2, 3, nan, nan], [1, 2, 77, nan, 3]])
    values = torch.tensor([[4.0, 1, 2, nan, nan], [4, 1, 55, nan, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    advantages, returns = ops.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-1.9375, 2.25, 1, 0, 0], [-1.9375, 2.25, 0, 0, 1]]
    assert returns.tolist() == [[2.0625, 3.25, 3, 0, 0], [2.0625, 3.25, 0, 0, 3]]


def test_bootstrap_values_stand_after_the_last_token_that_counts():
    rewards, values = torch.tensor([[1.0, 1, 9], [1, 9, 9]]), torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    bootstrap = torch.tensor([10.0, 20.0])
    advantages, _ = ops.gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap_values=bootstrap)
    assert advantages.tolist() == [[1 + 0.5 * (1 + 0.5 * 10), 6, 0], [11, 0, 0]]


def test_lam_1_gives_the_discounted_return_and_lam_0_the_one_step_error():
    (rewards, values, *_), _, _ = draw((3, 20))
    every = torch.ones(3, 20, dtype=torch.bool)
    _, returns = ops.gae(rewards, values, every, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-5, rtol=1e-5)
    advantages, _ = ops.gae(rewards, values, every, gamma=0.9, lam=0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("poison", POISONS)
def test_masked_places_are_never_read_into_a_sum(poison):
    (logprobs, ref_logprobs, values, x), mask, scores = draw((7, 530))
    mask[3] = False  # a row without any token that counts
    clean = ops.rewards_and_advantages(scores, logprobs, ref_logprobs, values, mask, whiten_rewards=True)
    poisoned_inputs = [y.masked_fill(~mask, poison) for y in (logprobs, ref_logprobs, values)]
    scores[3] = poison
    for got, expected in zip(
        ops.rewards_and_advantages(scores, *poisoned_inputs, mask, whiten_rewards=True), clean, strict=True
    ):
        assert torch.equal(got, expected)
        assert (got[~mask] == 0).all()
    for op in (ops.whiten, ops.scale_to_unit_std):
        assert torch.equal(op(x.masked_fill(~mask, poison), mask), op(x, mask))


@pytest.mark.parametrize("n", [2, 511, 512, 513, 5000])
def test_whitened_values_have_mean_0_and_population_variance_1(n):
    x = 3 + 2 * torch.randn(n, generator=seeded(n))
    mask = torch.arange(n) % 3 != 2
    white, scaled = ops.whiten(x, mask)[mask].double(), ops.scale_to_unit_std(x, mask)[mask].double()
    for y, mean in ((white, 0.0), (scaled, x[mask].double().mean().item())):
        assert abs(y.mean().item() - mean) < 1e-5
        assert abs(y.var(unbiased=False).item() - 1) < 1e-5


def test_whitening_one_place_none_and_constants():
    x, one = torch.tensor([[5.0, 7.0]]), torch.tensor([[True, False]])
    assert ops.whiten(x, one).tolist() == [[0, 0]]
    assert ops.scale_to_unit_std(x, one).tolist() == [[5, 0]]
    for op in (ops.whiten, ops.scale_to_unit_std):
        assert op(x, ~(one | True)).tolist() == [[0, 0]]
        assert op(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.bool)).shape == (0, 3)
    assert ops.whiten(torch.full((4, 4), 3.0), torch.ones(4, 4, dtype=torch.bool)).abs().max() == 0


def test_whitening_survives_a_mean_far_from_zero():
    # E[x^2] - E[x]^2 in float32 would have no digit left here.
    x = 1e4 + torch.randn(4096, generator=seeded(1))
    white = ops.whiten(x, torch.ones(4096, dtype=torch.bool)).double()
    oracle = reference.whiten(x.double(), torch.ones(4096, dtype=torch.bool))
    torch.testing.assert_close(white, oracle, atol=1e-3, rtol=0)  # x itself is rounded to 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rewards_and_advantages_matches_the_float64_reference(shape, dtype):
    tensors, mask, scores = draw(shape, dtype)
    logprobs, ref_logprobs, values, bootstrap = *tensors[:3], scores.flip(0)
    for estimator in reference.KL_ESTIMATORS:
        for whiten_rewards in (False, True):
            settings_ = {
                "estimator": estimator,
                "whiten_rewards": whiten_rewards,
                "whiten_advantages": not whiten_rewards,
                "kl_coef": 0.3,
                "reward_clip": 0.5,
                "gamma": 0.97,
                "lam": 0.9,
            }
            got = ops.rewards_and_advantages(
                scores, logprobs, ref_logprobs, values, mask, bootstrap_values=bootstrap, **settings_
            )
            settings_["bootstrap_values"] = bootstrap.double()
            assert_near_oracle(
                got,
                reference.rewards_and_advantages,
                scores,
                logprobs,
                ref_logprobs,
                values,
                mask,
                **settings_,
            )


def test_the_score_lands_on_the_last_token_that_counts():
    nan = float("nan")
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    logprobs = torch.tensor([[-1.0, -2, -3, nan]] * 2 + [[-1.0, -2, -3, -4]] + [[nan] * 4])
    ref_logprobs = torch.full((4, 4), -2.0)
    scores = torch.tensor([10.0, 20.0, -30.0, nan])
    got = ops.rewards_and_advantages(
        scores, logprobs, ref_logprobs, torch.zeros(4, 4), mask, kl_coef=0.5, reward_clip=15.0
    )
    assert got.kl.tolist() == [[1, 0, -1, 0], [1, 0, -1, 0], [1, 0, -1, -2], [0, 0, 0, 0]]
    assert got.rewards.tolist() == [[-0.5, 0, 10.5, 0], [-0.5, 0, 15.5, 0], [-0.5, 0, 0.5, -14], [0, 0, 0, 0]]


def test_a_nan_that_counts_is_not_hidden():
    every = torch.ones(1, 3, dtype=torch.bool)
    x = torch.zeros(1, 3)
    got = ops.rewards_and_advantages(torch.tensor([float("nan")]), x, x, x, every, reward_clip=1.0)
    assert got.rewards[0, 2].isnan() and got.advantages.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_matches_the_reference_on_any_mask(rows, columns, seed, gamma, lam):
    (rewards, values, *_), mask, _ = draw((rows, columns), seed=seed)
    assert_near_oracle(
        ops.gae(rewards, values, mask, gamma=gamma, lam=lam),
        reference.gae,
        rewards,
        values,
        mask,
        gamma=gamma,
        lam=lam,
    )


def test_any_row_stride_and_inner_stride():
    (a, b, c, _), mask, scores = draw((6, 40))
    expected = ops.rewards_and_advantages(scores, a, b, c, mask)
    wide = [torch.full((6, 90), float("nan")) for _ in range(3)]
    for target, source in zip(wide, (a, b, c), strict=True):
        target[:, 7:47] = source
    wide_mask = torch.zeros(6, 80, dtype=torch.bool)
    wide_mask[:, ::2] = mask
    got = ops.rewards_and_advantages(
        scores.repeat_interleave(2)[::2], *(w[:, 7:47] for w in wide), wide_mask[:, ::2]
    )
    transposed = ops.rewards_and_advantages(scores, a.t().contiguous().t(), b, c.t().contiguous().t(), mask)
    expanded = ops.whiten(a[:1].expand(6, 40), mask)
    for g, t, e in zip(got, transposed, expected, strict=True):
        assert torch.equal(g, e) and torch.equal(t, e)
    assert torch.equal(expanded, ops.whiten(a[:1].repeat(6, 1), mask))


def test_the_same_bits_on_a_rerun_and_on_other_thread_counts():
    (a, b, c, _), mask, scores = draw((64, 1100))
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            runs.append(ops.rewards_and_advantages(scores, a, b, c, mask, whiten_rewards=True))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_results_are_constants():
    (a, b, c, _), mask, scores = draw((2, 3))
    a.requires_grad_()
    assert not any(x.requires_grad for x in ops.rewards_and_advantages(scores, a, b, c, mask))
    assert not any(x.requires_grad for x in ops.gae(a, b, mask)) and not ops.whiten(a, mask).requires_grad


def test_opcheck():
    (a, b, c, _), mask, scores = draw((3, 20))
    for op, arguments in [
        ("gae", (a, b, mask, 0.9, 0.9, scores)),
        ("whiten", (a, mask)),
        ("scale_to_unit_std", (a, mask)),
        ("rewards_and_advantages", (scores, a, b, c, mask, 0.1, "k3", 1.0, True, True, 0.9, 0.9, None)),
    ]:
        torch.library.opcheck(getattr(torch.ops.fastppo, op).default, arguments)


def test_compiles_whole():
    (a, b, c, _), mask, scores = draw((3, 20))

    def everything(scores, a, b, c, mask):
        rewards, kl, advantages, returns = ops.rewards_and_advantages(scores, a, b, c, mask)
        return (
            ops.whiten(ops.gae(rewards, c, mask)[0], mask)
            + ops.scale_to_unit_std(advantages, mask)
            + kl
            + returns
        )

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, a, b, c, mask), everything(scores, a, b, c, mask))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "gae: values must have shape (4, 128) like rewards, got (4, 129)",
            lambda bt, mask: ops.gae(bt, torch.zeros(4, 129), mask),
        ),
        (
            "gae: rewards must have shape (B, T), got (4,)",
            lambda bt, mask: ops.gae(bt[:, 0], bt[:, 0], mask[:, 0]),
        ),
        (
            "gae: rewards must be float32, bfloat16 or float16, got float64",
            lambda bt, mask: ops.gae(bt.double(), bt, mask),
        ),
        ("gae: response_mask must be bool, got int64", lambda bt, mask: ops.gae(bt, bt, mask.long())),
        (
            "gae: response_mask must have shape (4, 128) like rewards, got (128, 4)",
            lambda bt, mask: ops.gae(bt, bt, mask.t()),
        ),
        ("gae: gamma must be between 0 and 1, got 1.5", lambda bt, mask: ops.gae(bt, bt, mask, gamma=1.5)),
        (
            "gae: lam must be between 0 and 1, got nan",
            lambda bt, mask: ops.gae(bt, bt, mask, lam=float("nan")),
        ),
        (
            "gae: bootstrap_values must have shape (4,), one for each row of rewards, got (3,)",
            lambda bt, mask: ops.gae(bt, bt, mask, bootstrap_values=torch.zeros(3)),
        ),
        ("whiten: mask must be bool, got float32", lambda bt, mask: ops.whiten(bt, bt)),
        (
            "scale_to_unit_std: mask must have shape (4, 128) like x, got (4,)",
            lambda bt, mask: ops.scale_to_unit_std(bt, mask[:, 0]),
        ),
        (
            "rewards_and_advantages: scores must have shape (4,), one for each row of logprobs, got (4, 128)",
            lambda bt, mask: ops.rewards_and_advantages(bt, bt, bt, bt, mask),
        ),
        (
            "rewards_and_advantages: estimator must be one of 'k1', 'abs', 'k2', 'k3', got 'kl'",
            lambda bt, mask: ops.rewards_and_advantages(bt[:, 0], bt, bt, bt, mask, estimator="kl"),
        ),
        (
            "rewards_and_advantages: reward_clip must be above 0, got -1",
            lambda bt, mask: ops.rewards_and_advantages(bt[:, 0], bt, bt, bt, mask, reward_clip=-1.0),
        ),
        (
            "rewards_and_advantages: kl_coef must be finite, got inf",
            lambda bt, mask: ops.rewards_and_advantages(bt[:, 0], bt, bt, bt, mask, kl_coef=float("inf")),
        ),
    ],
)
def test_errors_name_the_tensor_the_expected_and_the_got(message, call):
    with pytest.raises(ValueError) as error:
        call(torch.zeros(4, 128), torch.ones(4, 128, dtype=torch.bool))
    assert str(error.value) == message
