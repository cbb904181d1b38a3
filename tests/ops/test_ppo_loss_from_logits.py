"""ppo_loss_from_logits keeps its promises."""

import math

import backends
import pytest
import torch
from backends import seeded

from fastppo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.7
SETTINGS = {
    "defaults": {},
    "everything": {
        "clip_range": 0.1,
        "clip_range_high": 0.3,
        "dual_clip": 1.5,
        "value_clip_range": 0.3,  # no dyadic: clipped and unclipped losses must not be the same, where torch halves
        "vf_coef": 0.7,
        "entropy_coef": 0.01,
        "kl_coef": 0.2,
        "normalizer": 7.0,
    },
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
}
TOKENS = ("logprobs", "advantages", "new_values", "values", "returns", "ref_logprobs")


def draw(*shape, dtype=torch.float32, scale=3.0):
    """Return logits, ids, a mask and everything else that is per token; ratios are around 1."""
    generator = seeded(sum(shape))
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    ids = torch.randint(shape[-1], shape[:-1], generator=generator)
    x = {name: torch.randn(shape[:-1], generator=generator) for name in TOKENS}
    chosen = reference.logprobs(logits.double(), ids, temperature=TEMPERATURE)[0].float()
    for name in ("logprobs", "ref_logprobs"):
        x[name] = chosen + 0.3 * x[name]
    return logits, ids, x, torch.rand(shape[:-1], generator=generator) > 0.3


def loss_stats_grads(op, logits, ids, x, mask, *, weight=1.0, **settings):
    logits = logits.detach().clone().requires_grad_()
    x = {name: t.detach().clone() for name, t in x.items()}
    trained = [logits] + [x[name].requires_grad_() for name in ("new_values",) if name in x]
    settings = {"temperature": TEMPERATURE, **settings}
    loss, stats = op(logits, ids, x.pop("logprobs"), x.pop("advantages"), mask, **x, **settings)
    grads = torch.autograd.grad(weight * loss, trained, allow_unused=True)
    return loss.detach(), stats, grads


def composed(logits, ids, logprobs, advantages, mask, *, temperature, **rest):
    new_logprobs, entropy = ops.logprobs(logits, ids, temperature=temperature)
    return ops.ppo_loss(new_logprobs, logprobs, advantages, mask, entropy=entropy, **rest)


def in_float64(logits, ids, x, mask, **settings):
    wide = {name: t.double() for name, t in x.items()}
    return loss_stats_grads(reference.ppo_loss_from_logits, logits.double(), ids, wide, mask, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5, 1), (2, 3, 33), (7, 127), (4, 1025), (1, 3, 4099), (3, 8192), (2, 9001)]
)
def test_loss_stats_and_gradients_match_the_float64_reference(shape, dtype, settings):
    logits, ids, x, mask = draw(*shape, dtype=dtype)
    loss, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, **settings)
    expected_loss, expected_stats, expected_grads = in_float64(logits, ids, x, mask, **settings)
    assert loss.dtype == torch.float32 and loss.shape == ()
    # bfloat16's log-probs are good to 5e-6 (see test_logprobs.py); ratios and k3 pass that on.
    absolute = 3e-5 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(loss.double(), expected_loss, atol=absolute, rtol=1e-5)
    for name, got, expected in zip(stats._fields, stats, expected_stats, strict=True):
        assert got.dtype == torch.float32 and got.shape == () and not got.requires_grad, name
        torch.testing.assert_close(got.double(), expected, atol=absolute, rtol=1e-5)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert grads[0].dtype == dtype and grads[0].shape == logits.shape
    torch.testing.assert_close(
        grads[0].double(), expected_grads[0], atol=3e-6 if dtype == torch.bfloat16 else 1e-6, rtol=rounding
    )
    torch.testing.assert_close(grads[1].double(), expected_grads[1], atol=1e-7, rtol=1e-5)
    assert (grads[0][~mask] == 0).all() and (grads[1][~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_ppo_loss_of_logprobs(dtype, backend):
    logits, ids, x, mask = draw(6, 1001, dtype=dtype)
    got = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, **SETTINGS["everything"])
    expected = loss_stats_grads(composed, logits, ids, x, mask, **SETTINGS["everything"])
    if backend == "cpu":
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))
    torch.testing.assert_close(got[0], expected[0], atol=1e-6, rtol=1e-5)
    # The slope of a token may differ in its last bit, and with it one rounding of the gradient.
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got[2][0], expected[2][0], atol=1e-7, rtol=rounding)
    assert torch.equal(got[2][1], expected[2][1])


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_large_vocabulary_and_a_shift_of_all_logits_cost_no_accuracy(shift, backend):
    logits, ids, x, mask = draw(3, 151936 if backend != "emulated" else 20011)
    mask[:] = True
    logits = logits + shift
    loss, stats, grads = loss_stats_grads(
        ops.ppo_loss_from_logits, logits, ids, x, mask, entropy_coef=0.01, normalizer=1.0
    )
    expected_loss, expected_stats, expected_grads = in_float64(
        logits, ids, x, mask, entropy_coef=0.01, normalizer=1.0
    )
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-5, rtol=2e-6)
    torch.testing.assert_close(stats.entropy.double(), expected_stats.entropy, atol=1.5e-5, rtol=0)
    torch.testing.assert_close(grads[0].double(), expected_grads[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [33, 4099])
def test_all_negative_logits_never_give_a_ratio_above_what_a_probability_of_1_gives(vocabulary):
    # A tail of the row counted as logit 0 shows here at once.
    logits, ids, x, mask = draw(16, vocabulary, dtype=torch.bfloat16)
    logits = logits.abs().neg() - 50
    mask[:] = True
    x["logprobs"] = torch.zeros(16)
    _, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask)
    assert 0 < stats.ratio_max <= 1 and stats.entropy > 0
    # A gradient of a softmax sums to 0 over the row.
    assert grads[0].double().sum(-1).abs().max() < 1e-3


@pytest.mark.parametrize("poison", [100.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_that_do_not_count_are_not_read(poison, settings):
    logits, ids, x, mask = draw(6, 513)
    mask[0], mask[3], mask[5] = True, False, True
    clean = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, **settings)
    poisoned = {name: t.masked_fill(~mask, poison) for name, t in x.items()}
    logits = logits.masked_fill(~mask.unsqueeze(-1), poison)
    got = loss_stats_grads(
        ops.ppo_loss_from_logits, logits, ids.masked_fill(~mask, -100), poisoned, mask, **settings
    )
    for a, b in zip([got[0], *got[1], *got[2]], [clean[0], *clean[1], *clean[2]], strict=True):
        assert torch.equal(a, b)
    assert (got[2][0][~mask] == 0).all()


def test_no_token_at_all():
    logits, ids, x, mask = draw(3, 40)
    loss, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, torch.zeros_like(mask))
    assert loss == 0 and all(s == 0 for s in stats) and all((g == 0).all() for g in grads)
    loss, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, *draw(0, 3, 40))
    assert loss == 0 and grads[0].shape == (0, 3, 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_distribution_is_not_hidden_and_leaves_the_others_alone(bad):
    logits, ids, x, mask = draw(3, 700)
    mask[:] = True
    clean = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, normalizer=3.0)
    logits[1, 650] = bad
    loss, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, normalizer=3.0)
    assert loss.isnan() and stats.ratio_max.isnan() and grads[0][1, ids[1]].isnan()
    assert torch.equal(grads[0][::2], clean[2][0][::2])


def test_tokens_that_cannot_occur_get_no_gradient():
    logits, ids, x, mask = draw(4, 1030)
    mask[:] = True
    logits[:, 1::2] = -math.inf
    logits[1, :1024] = -math.inf
    ids[:] = torch.tensor([0, 1028, 2, 1024])
    x["logprobs"] = torch.full((4,), -6.0)
    got = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, entropy_coef=0.1)
    expected = in_float64(logits, ids, x, mask, entropy_coef=0.1)
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[2][0].double(), expected[2][0], atol=1e-6, rtol=1e-5)
    assert (got[2][0][logits == -math.inf] == 0).all()


def test_a_clipped_token_has_a_gradient_of_exact_zeros():
    logits, ids, x, mask = draw(2, 300)
    mask[:] = True
    new_logprobs, _ = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    x["logprobs"] = new_logprobs - torch.tensor([1.0, 0.0])  # ratios e and 1
    x["advantages"] = torch.ones(2)
    x["ref_logprobs"] = new_logprobs
    _, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask)
    assert stats.clip_fraction == 0.5
    assert (grads[0][0] == 0).all() and (grads[0][1] != 0).any()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.int64])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(dtype):
    normalizer = 9 if dtype is None else torch.tensor(9, dtype=dtype)
    logits, ids, x, mask = draw(8, 301, dtype=torch.bfloat16)
    settings = {**SETTINGS["everything"], "normalizer": normalizer}
    whole = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, **settings)
    for sizes in ([1] * 8, [3, 5]):
        parts = []
        for rows in torch.arange(8).split(sizes):
            part = {name: t[rows] for name, t in x.items()}
            parts.append(
                loss_stats_grads(
                    ops.ppo_loss_from_logits, logits[rows], ids[rows], part, mask[rows], **settings
                )
            )
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0], atol=1e-6, rtol=1e-5)
        for i, grad in enumerate(whole[2]):
            assert torch.equal(torch.cat([p[2][i] for p in parts]), grad)  # the split changes no bit of it


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_may_be_scaled(dtype):
    logits, ids, x, mask = draw(3, 999, dtype=dtype)
    once = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask)[2]
    for weight in (1.0, -4.0, 0.3):
        scaled = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask, weight=weight)[2]
        assert torch.equal(scaled[0], (once[0].float() * torch.tensor(weight)).to(dtype))
        assert torch.equal(scaled[1], once[1] * weight)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_graph_that_is_kept_can_be_gone_through_again(weight):
    logits, ids, x, mask = draw(3, 40)
    logits.requires_grad_()
    loss = ops.ppo_loss_from_logits(logits, ids, x["logprobs"], x["advantages"], mask)[0] * weight
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = expected.clone()
    for keep in (True, True, False):
        logits.grad = None
        loss.backward(retain_graph=keep)
        assert torch.equal(logits.grad, expected)
        logits.grad.mul_(3)  # the caller's own, not what the next backward gives
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    logits, ids, x, mask = draw(3, 40)
    logits.requires_grad_()
    loss, _ = ops.ppo_loss_from_logits(logits, ids, x["logprobs"], x["advantages"], mask)
    with pytest.raises(RuntimeError, match="ppo_loss_from_logits is differentiable once"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_without_a_gradient_nothing_of_the_size_of_the_logits_is_made(backend):
    logits, ids, x, mask = draw(3, 500)
    expected = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask)
    loss, stats = ops.ppo_loss_from_logits(
        logits,
        ids,
        x["logprobs"],
        x["advantages"],
        mask,
        temperature=TEMPERATURE,
        **dict(list(x.items())[2:]),
    )
    assert torch.equal(loss, expected[0]) and not loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(stats, expected[1], strict=True))
    if backend == "emulated":
        machine = backends.emulator()
        machine.counts()
        ops.ppo_loss_from_logits(logits, ids, x["logprobs"], x["advantages"], mask)
        assert machine.counts().bytes_stored < 4 * logits.numel() / 4


def test_rows_of_any_stride_and_shape():
    whole, _, _, _ = draw(4, 6, 1003)
    _, ids, x, mask = draw(3, 2, 1000)
    strided = {name: t.t().contiguous().t() for name, t in x.items()}
    mask[0] = True
    views = {
        "columns of a wider tensor": whole[:3, :2, :1000],
        "every other row": whole[1:, ::3, :1000],
        "transposed leading dimensions": whole.transpose(0, 1)[:3, :2, 3:],
        "one row for all": whole[0, 0, :1000].expand(3, 2, -1),
    }
    for name, view in views.items():
        results = []
        for logits, tokens, chosen, counts in [
            (view.contiguous(), x, ids, mask),
            (view, strided, ids.t().contiguous().t(), mask.t().contiguous().t()),
        ]:
            leaf = logits.detach().requires_grad_()
            positional = (leaf, chosen, tokens["logprobs"], tokens["advantages"], counts)
            loss, stats = ops.ppo_loss_from_logits(*positional, temperature=TEMPERATURE, entropy_coef=0.1)
            results.append([loss.detach(), *stats, torch.autograd.grad(loss, leaf)[0]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
    leaf = whole.clone().requires_grad_()
    ops.ppo_loss_from_logits(leaf[:3, 1:5:2, 1:1001], ids, x["logprobs"], x["advantages"], mask)[0].backward()
    assert (leaf.grad[:, ::2] == 0).all() and (leaf.grad[..., 0] == 0).all() and (leaf.grad[:3] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_into_shared_memory_changes_no_bit(dtype, backend):
    logits, ids, x, mask = draw(3, 5001, dtype=dtype)
    runs = []
    for shared in (227 << 10, 99 << 10, 8 << 10, 3 << 10):
        if backend == "emulated":
            backends.emulator().set(max_shared=shared)
        loss, stats, grads = loss_stats_grads(
            ops.ppo_loss_from_logits, logits, ids, x, mask, **SETTINGS["everything"]
        )
        runs.append([loss, *stats, *grads])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_same_bits_on_every_run_and_thread_count():
    logits, ids, x, mask = draw(37, 1025)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            loss, stats, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask)
            runs.append([loss, *stats, *grads])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_reference_passes_gradcheck():
    logits, ids, x, mask = draw(3, 5)
    wide = {name: t.double() for name, t in x.items()}

    def loss(logits, new_values):
        rest = {name: wide[name] for name in ("values", "returns", "ref_logprobs")}
        return reference.ppo_loss_from_logits(
            *(logits, ids, wide["logprobs"], wide["advantages"], mask),
            **{**rest, "new_values": new_values, "entropy_coef": 0.1, "kl_coef": 0.2, "temperature": 0.7},
        )[0]

    assert torch.autograd.gradcheck(
        loss, (logits.double().requires_grad_(), wide["new_values"].clone().requires_grad_())
    )


def test_opcheck():
    logits, ids, x, mask = draw(3, 37)
    op = torch.ops.fastppo.ppo_loss_from_logits.default
    numbers = (0.7, 0.2, 0.3, 2.0, 0.2, 0.1, 0.01, 0.1, "k3")
    tokens = (ids, x["logprobs"], x["advantages"], mask)
    critic = (x["new_values"].requires_grad_(), x["values"], x["returns"])
    logits.requires_grad_()
    arguments = (*tokens, *critic, x["ref_logprobs"], torch.tensor(30.0), *numbers, True, None)
    torch.library.opcheck(op, (logits, *arguments))
    numbers = (1.0, 0.2, 0.2, None, 0.2, 0.1, 0.0, 0.0, "k1")
    arguments = (*tokens, *[None] * 5, *numbers, False, 30.0)
    torch.library.opcheck(op, (logits.detach().bfloat16(), *arguments))
    torch.library.opcheck(torch.ops.fastppo.scale_.default, (torch.ones(5, 7), torch.tensor(0.5)))
    written = [
        a.name
        for a in torch.ops.fastppo.scale_.default._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    assert written == ["x"]


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("normalizer", [None, 3.0, "tensor"])
def test_compiles_whole(normalizer, weight):
    normalizer = torch.tensor(3.0) if normalizer == "tensor" else normalizer
    arguments = draw(3, 101)
    compiled = torch.compile(ops.ppo_loss_from_logits, fullgraph=True, backend="aot_eager")
    got = loss_stats_grads(compiled, *arguments, normalizer=normalizer, weight=weight)
    expected = loss_stats_grads(ops.ppo_loss_from_logits, *arguments, normalizer=normalizer, weight=weight)
    for a, b in zip([got[0], *got[1], *got[2]], [expected[0], *expected[1], *expected[2]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_normalizer_that_cannot_divide_is_told_of_or_makes_everything_nan(bad, backend):
    arguments = draw(3, 40)
    mask = arguments[3]
    with pytest.raises(ValueError, match="normalizer must be above 0 and finite"):
        loss_stats_grads(ops.ppo_loss_from_logits, *arguments, normalizer=bad)
    if backend == "cpu":
        with pytest.raises(ValueError, match="ppo_loss_from_logits: normalizer must be above 0 and finite"):
            loss_stats_grads(ops.ppo_loss_from_logits, *arguments, normalizer=torch.tensor(bad))
        return
    loss, _, grads = loss_stats_grads(ops.ppo_loss_from_logits, *arguments, normalizer=torch.tensor(bad))
    assert loss.isnan()
    for grad in grads:
        assert grad[mask].isnan().all() and (grad[~mask] == 0).all()


def test_an_id_out_of_range_is_told_of_or_gives_nan(backend):
    logits, ids, x, mask = draw(2, 3, 11)
    mask[:] = True
    ids[1, 2] = 11
    if backend == "cpu":
        with pytest.raises(ValueError) as error:
            ops.ppo_loss_from_logits(logits, ids, x["logprobs"], x["advantages"], mask)
        assert str(error.value) == "ppo_loss_from_logits: ids[1, 2] must be in [0, 11), got 11"
        return
    loss, _, grads = loss_stats_grads(ops.ppo_loss_from_logits, logits, ids, x, mask)
    assert loss.isnan() and grads[0][1, 2].isnan().all() and not grads[0][0].isnan().any()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            "ids must have shape (2, 3) like logits without its last dimension, got (2, 4)",
            lambda: {"ids": torch.zeros(2, 4, dtype=torch.int64)},
        ),
        ("ids must be int64, got float32", lambda: {"ids": torch.zeros(2, 3)}),
        (
            "logits must be float32, bfloat16 or float16, got float64",
            lambda: {"logits": torch.zeros(2, 3, 11).double()},
        ),
        (
            "logits must be contiguous in the last dimension, got strides (33, 1, 3)",
            lambda: {"logits": torch.zeros(2, 11, 3).transpose(1, 2)},
        ),
        ("logprobs must have shape (2, 3) like ids, got (6,)", lambda: {"logprobs": torch.zeros(6)}),
        ("response_mask must be bool, got float32", lambda: {"response_mask": torch.zeros(2, 3)}),
        ("temperature must be positive and finite, got 0", lambda: {"temperature": 0.0}),
        ("kl_coef = 0.1 needs ref_logprobs, got None", lambda: {"kl_coef": 0.1}),
        (
            "new_values needs values and returns, got no returns",
            lambda: {"new_values": torch.zeros(2, 3), "values": torch.zeros(2, 3)},
        ),
        ("dual_clip must be above 1, got 0.5", lambda: {"dual_clip": 0.5}),
        ("normalizer must be above 0 and finite, got 0", lambda: {"normalizer": 0}),
        (
            "kl_estimator must be one of 'k1', 'abs', 'k2', 'k3', got 'full'",
            lambda: {"kl_estimator": "full"},
        ),
    ],
)
def test_errors_name_what_is_wrong(message, change):
    x = torch.zeros(2, 3)
    arguments = {"logits": torch.zeros(2, 3, 11), "ids": x.long(), "logprobs": x, "advantages": x}
    arguments = {**arguments, "response_mask": x == 0, **change()}
    with pytest.raises(ValueError) as error:
        ops.ppo_loss_from_logits(**arguments)
    assert str(error.value) == f"ppo_loss_from_logits: {message}"
