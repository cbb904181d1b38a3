"""ppo_loss keeps its promises."""

import math

import pytest
import torch
from backends import seeded

from fastppo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0,), (1,), (1700,), (0, 4), (4, 0), (1, 1), (3, 5), (2, 512), (2, 513), (2, 3, 4)]
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
        "normalizer": 77.0,
    },
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "abs": {"kl_coef": 0.3, "kl_estimator": "abs"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
}
NAMES = (
    "new_logprobs",
    "logprobs",
    "advantages",
    "new_values",
    "values",
    "returns",
    "entropy",
    "ref_logprobs",
)
TRAINED = ("new_logprobs", "new_values", "entropy")


def draw(shape, dtype=torch.float32, seed=0):
    generator = seeded(seed)
    inputs = {name: (0.5 * torch.randn(shape, generator=generator)).to(dtype) for name in NAMES}
    return inputs, torch.rand(shape, generator=generator) > 0.3


def loss_stats_grads(ppo_loss, inputs, mask, **settings):
    inputs = {name: x.detach().clone().requires_grad_(name in TRAINED) for name, x in inputs.items()}
    positional = [inputs.pop(name) for name in NAMES[:3]]
    loss, stats = ppo_loss(*positional, mask, **inputs, **settings)
    trained = [positional[0]] + [inputs[name] for name in TRAINED[1:] if name in inputs]
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss, stats, [torch.zeros_like(x) if g is None else g for x, g in zip(trained, grads, strict=True)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_stats_and_gradients_match_the_float64_reference(shape, dtype, settings):
    inputs, mask = draw(shape, dtype)
    loss, stats, grads = loss_stats_grads(ops.ppo_loss, inputs, mask, **settings)
    wide = {name: x.double() for name, x in inputs.items()}
    expected_loss, expected_stats, expected_grads = loss_stats_grads(
        reference.ppo_loss, wide, mask, **settings
    )
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-6, rtol=1e-5)
    for name, got, expected in zip(stats._fields, stats, expected_stats, strict=True):
        assert got.dtype == torch.float32 and got.shape == () and not got.requires_grad, name
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # of grads' own dtype
    # Gradients are near 1e-2 and sums of terms that may cancel: a float32 ulp of those, or float16's step.
    absolute = 6e-8 if dtype == torch.float16 else 1e-8
    for got, expected in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected.double(), atol=absolute, rtol=rounding)


def one_token(ratio, advantage, **settings):
    """Return (loss, d loss / d new_logprobs, clip fraction) of one token."""
    new_logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, stats = ops.ppo_loss(
        new_logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool), **settings
    )
    loss.backward()
    return [
        pytest.approx(x, abs=1e-6)
        for x in (loss.item(), new_logprobs.grad.item(), stats.clip_fraction.item())
    ]


def test_clipping_by_hand():
    # ratio, advantage -> loss, slope, clipped; clip range 0.2 below and above
    assert one_token(1.1, 2.0) == [-2.2, -2.2, 0]  # inside
    assert one_token(1.5, 2.0) == [-2.4, 0, 1]  # gained enough: cut
    assert one_token(0.5, 2.0) == [-1.0, -1.0, 0]  # lost: pull back
    assert one_token(0.5, -2.0) == [1.6, 0, 1]  # avoided enough: cut
    assert one_token(1.5, -2.0) == [3.0, 3.0, 0]  # made likelier what was bad: push back
    assert one_token(1.5, 0.0) == [0, 0, 0]


def test_clip_higher_and_dual_clip_by_hand():
    assert one_token(1.25, 2.0, clip_range_high=0.28) == [-2.5, -2.5, 0]
    assert one_token(1.5, 2.0, clip_range_high=0.28) == [-2.56, 0, 1]
    assert one_token(0.75, -2.0, clip_range_high=0.28) == [1.6, 0, 1]  # the lower side keeps clip_range
    assert one_token(5.0, -2.0) == [10.0, 10.0, 0]
    assert one_token(5.0, -2.0, dual_clip=3.0) == [6.0, 0, 0]
    assert one_token(5.0, 2.0, dual_clip=3.0) == [-2.4, 0, 1]  # only where the advantage is negative
    assert one_token(2.0, -2.0, dual_clip=3.0) == [4.0, 4.0, 0]


def test_value_clipping_by_hand():
    # Value at rollout 0, target 1, clip range 0.2. 0.1: inside. 0.6: clipped to 0.2, error 0.64 > 0.16.
    # -0.6: clipped to -0.2, error 1.44 < 2.56, so the unclipped one counts.
    x, every = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    new_values = torch.tensor([0.1, 0.6, -0.6], requires_grad=True)
    loss, stats = ops.ppo_loss(
        x, x, x, every, new_values=new_values, values=torch.zeros(3), returns=torch.ones(3), vf_coef=1.0
    )
    loss.backward()
    assert stats.value_loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 2.56) / 3)
    assert stats.value_clip_fraction.item() == pytest.approx(1 / 3)
    assert new_values.grad.tolist() == pytest.approx([-0.9 / 3, 0, -1.6 / 3])


def test_first_step_has_ratio_1_and_the_plain_policy_gradient():
    inputs, mask = draw((5, 60), torch.bfloat16)
    new_logprobs = inputs["logprobs"].clone().requires_grad_()
    loss, stats = ops.ppo_loss(new_logprobs, inputs["logprobs"], inputs["advantages"].float(), mask)
    assert stats.ratio == 1 and stats.ratio_max == 1 and stats.approx_kl == 0 and stats.clip_fraction == 0
    (grad,) = torch.autograd.grad(loss, new_logprobs)
    expected = torch.where(mask, -inputs["advantages"].float() / mask.sum(), 0.0)
    torch.testing.assert_close(grad, expected.bfloat16(), atol=0, rtol=0.01)


@pytest.mark.parametrize(
    "dtype", [None, torch.float32, torch.float64, torch.int64, torch.int32, torch.bfloat16]
)
def test_gradient_and_stats_do_not_depend_on_the_split_into_micro_batches(dtype):
    normalizer = 100.0 if dtype is None else torch.tensor(100, dtype=dtype)
    inputs, mask = draw((12, 30))
    loss, stats, grads = loss_stats_grads(ops.ppo_loss, inputs, mask, normalizer=normalizer)
    for sizes in ([1] * 12, [5, 7], [11, 1]):
        parts = []
        for rows in torch.arange(12).split(sizes):
            part = {name: x[rows] for name, x in inputs.items()}
            parts.append(loss_stats_grads(ops.ppo_loss, part, mask[rows], normalizer=normalizer))
        torch.testing.assert_close(sum(p[0] for p in parts), loss, atol=1e-6, rtol=1e-5)
        for i, name in enumerate(stats._fields[:-1]):
            torch.testing.assert_close(sum(p[1][i] for p in parts), stats[i], atol=1e-6, rtol=1e-5, msg=name)
        assert max(p[1].ratio_max for p in parts) == stats.ratio_max
        for i, grad in enumerate(grads):
            assert torch.equal(torch.cat([p[2][i] for p in parts]), grad)  # the split changes no bit of it


def test_packed_and_padded_batches_agree():
    inputs, mask = draw((6, 50))
    loss, _, grads = loss_stats_grads(ops.ppo_loss, inputs, mask)
    packed = {name: x[mask] for name, x in inputs.items()}
    every = torch.ones(int(mask.sum()), dtype=torch.bool)
    packed_loss, _, packed_grads = loss_stats_grads(ops.ppo_loss, packed, every)
    torch.testing.assert_close(packed_loss, loss, atol=1e-6, rtol=1e-5)
    for packed_grad, grad in zip(packed_grads, grads, strict=True):
        assert torch.equal(packed_grad, grad[mask])


@pytest.mark.parametrize("poison", [100.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_masked_places_are_never_read_into_a_sum(poison, settings):
    inputs, mask = draw((4, 530))
    mask[2] = False
    poisoned = {name: x.masked_fill(~mask, poison) for name, x in inputs.items()}
    clean = loss_stats_grads(ops.ppo_loss, inputs, mask, **settings)
    got = loss_stats_grads(ops.ppo_loss, poisoned, mask, **settings)
    assert torch.equal(got[0], clean[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], clean[1], strict=True))
    for grad, expected in zip(got[2], clean[2], strict=True):
        assert torch.equal(grad, expected) and (grad[~mask] == 0).all()


def test_no_token_at_all_is_a_loss_of_0():
    inputs, mask = draw((3, 4))
    loss, stats, grads = loss_stats_grads(ops.ppo_loss, inputs, torch.zeros_like(mask))
    assert loss == 0 and all(x == 0 for x in stats) and all((g == 0).all() for g in grads)


def test_a_nan_that_counts_is_not_hidden():
    inputs, mask = draw((3, 4))
    mask[1, 2] = True
    inputs["new_logprobs"][1, 2] = float("nan")
    loss, stats, grads = loss_stats_grads(ops.ppo_loss, inputs, mask)
    assert loss.isnan() and stats.ratio.isnan() and stats.ratio_max.isnan() and grads[0][1, 2].isnan()


def test_terms_that_are_not_given_are_0():
    inputs, mask = draw((3, 4))
    new_logprobs, logprobs, advantages = (inputs[name] for name in NAMES[:3])
    loss, stats = ops.ppo_loss(new_logprobs, logprobs, advantages, mask)
    assert loss == stats.policy_loss
    assert stats.value_loss == stats.entropy == stats.kl == stats.value_clip_fraction == 0
    _, stats = ops.ppo_loss(
        new_logprobs, logprobs, advantages, mask, ref_logprobs=logprobs, kl_estimator="k1"
    )
    torch.testing.assert_close(
        stats.kl, (new_logprobs - logprobs)[mask].mean()
    )  # measured though its weight is 0


def test_upstream_gradient_scales():
    inputs, mask = draw((3, 4))
    new_logprobs = inputs["new_logprobs"].requires_grad_()
    loss, _ = ops.ppo_loss(new_logprobs, inputs["logprobs"], inputs["advantages"], mask)
    (once,) = torch.autograd.grad(loss, new_logprobs, retain_graph=True)
    (scaled,) = torch.autograd.grad(-4 * loss, new_logprobs)
    assert torch.equal(scaled, -4 * once)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept_can_be_gone_through_again(dtype, weight):
    inputs, mask = draw((3, 40), dtype)
    x = {name: t.requires_grad_(name in TRAINED) for name, t in inputs.items()}
    positional, others = [x[name] for name in NAMES[:3]], {name: x[name] for name in NAMES[3:]}
    loss = ops.ppo_loss(*positional, mask, **others, entropy_coef=0.1)[0] * weight
    trained = [x[name] for name in TRAINED]
    expected = [g.clone() for g in torch.autograd.grad(loss, trained, retain_graph=True)]
    for keep in (True, True, False):
        for t in trained:
            t.grad = None
        loss.backward(retain_graph=keep)
        for t, want in zip(trained, expected, strict=True):
            assert torch.equal(t.grad, want)
            t.grad.mul_(3)  # as clipping does: the caller's own, not what the next backward gives
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    inputs, mask = draw((3, 4))
    new_logprobs = inputs["new_logprobs"].requires_grad_()
    loss, _ = ops.ppo_loss(new_logprobs, inputs["logprobs"], inputs["advantages"], mask)
    with pytest.raises(RuntimeError, match="ppo_loss is differentiable once"):
        torch.autograd.grad(loss, new_logprobs, create_graph=True)


def test_only_what_is_trained_gets_a_gradient():
    inputs, mask = draw((3, 4))
    expected = loss_stats_grads(ops.ppo_loss, inputs, mask, entropy_coef=0.1)[2]
    for name, want in zip(TRAINED, expected, strict=True):
        x = {key: t.detach().clone().requires_grad_(key == name) for key, t in inputs.items()}
        positional, others = [x[key] for key in NAMES[:3]], {key: x[key] for key in NAMES[3:]}
        ops.ppo_loss(*positional, mask, **others, entropy_coef=0.1)[0].backward()
        assert [key for key, t in x.items() if t.grad is not None] == [name]
        assert torch.equal(x[name].grad, want)


@pytest.mark.parametrize("twin", [ops.ppo_loss, reference.ppo_loss])
def test_stats_read_like_a_named_tuple(twin):
    inputs, mask = draw((3, 4))
    _, stats, _ = loss_stats_grads(twin, inputs, mask)
    assert isinstance(stats, ops.PPOStats) and len(stats) == 9 and stats.tensor.shape == (9,)
    for i, (name, x) in enumerate(stats._asdict().items()):
        assert name == stats._fields[i] and f"{name}=tensor(" in repr(stats)
        assert x == getattr(stats, name) == stats[i] == stats.tensor[i]
    assert [x.item() for x in stats[4:8]] == stats.tensor[4:8].tolist()
    assert torch.equal(torch.stack([*stats]), stats.tensor)


def test_reference_passes_gradcheck():
    inputs, mask = draw((3, 4))
    wide = {name: x.double() for name, x in inputs.items()}

    def loss(new_logprobs, new_values, entropy):
        wide.update(new_logprobs=new_logprobs, new_values=new_values, entropy=entropy)
        positional = [wide[name] for name in NAMES[:3]]
        rest = {name: wide[name] for name in NAMES[3:]}
        return reference.ppo_loss(*positional, mask, **rest, dual_clip=1.5, entropy_coef=0.1, kl_coef=0.2)[0]

    assert torch.autograd.gradcheck(loss, [wide[name].clone().requires_grad_() for name in TRAINED])


def test_strides_and_mixed_dtypes():
    inputs, mask = draw((6, 40))
    expected = loss_stats_grads(ops.ppo_loss, inputs, mask)
    strided = {}
    for i, (name, x) in enumerate(inputs.items()):
        wide = torch.full((6, 100), float("nan"))
        view = [wide[:, 3:43], wide[:, ::2][:, 5:45], torch.empty(40, 6).t()][i % 3]
        view.copy_(x)
        strided[name] = view
    positional = [strided[name] for name in NAMES[:3]]
    loss, stats = ops.ppo_loss(*positional, mask, **{name: strided[name] for name in NAMES[3:]})
    assert torch.equal(loss, expected[0]) and all(
        torch.equal(a, b) for a, b in zip(stats, expected[1], strict=True)
    )
    exact = {name: x.bfloat16() for name, x in inputs.items()}
    mixed = {name: x if i % 2 else x.float() for i, (name, x) in enumerate(exact.items())}
    assert torch.equal(
        loss_stats_grads(ops.ppo_loss, mixed, mask)[0], loss_stats_grads(ops.ppo_loss, exact, mask)[0]
    )


def test_the_same_bits_on_a_rerun_and_on_other_thread_counts():
    inputs, mask = draw((40, 1100))
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            loss, stats, grads = loss_stats_grads(ops.ppo_loss, inputs, mask, **SETTINGS["everything"])
            runs.append([loss, *stats, *grads])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_opcheck():
    inputs, mask = draw((3, 20))
    x = {name: t.requires_grad_(name in TRAINED) for name, t in inputs.items()}
    positional = (x["new_logprobs"], x["logprobs"], x["advantages"], mask)
    numbers = (0.2, 0.2, None, 0.2, 0.1, 0.01, 0.1, "k3", None)
    optional = (
        x["new_values"],
        x["values"],
        x["returns"],
        x["entropy"],
        x["ref_logprobs"],
        torch.tensor(30.0),
    )
    torch.library.opcheck(torch.ops.fastppo.ppo_loss.default, (*positional, *optional, *numbers))
    numbers = (0.2, 0.3, 2.0, 0.2, 0.1, 0.0, 0.0, "k1", 30.0)
    torch.library.opcheck(torch.ops.fastppo.ppo_loss.default, (*positional, *[None] * 6, *numbers))


def test_a_backward_leaves_what_the_op_returned_as_it_was():
    inputs, mask = draw((3, 20))
    x = {name: t.requires_grad_(name in TRAINED) for name, t in inputs.items()}
    positional = (x["new_logprobs"], x["logprobs"], x["advantages"], mask)
    loss, _, grads = torch.ops.fastppo.ppo_loss.default(
        *positional, *[None] * 6, 0.2, 0.2, None, 0.2, 0.1, 0.0, 0.0, "k1", 30.0
    )
    before = grads.clone()
    (-2 * loss).backward()
    assert torch.equal(grads, before)
    assert torch.equal(x["new_logprobs"].grad, -2 * before[0])


@pytest.mark.parametrize("normalizer", [None, 30, 30.0, "tensor"])
def test_compiles_whole(normalizer):
    normalizer = torch.tensor(30.0) if normalizer == "tensor" else normalizer
    inputs, mask = draw((3, 20))
    compiled = torch.compile(ops.ppo_loss, fullgraph=True, backend="aot_eager")
    got = loss_stats_grads(compiled, inputs, mask, normalizer=normalizer)
    expected = loss_stats_grads(ops.ppo_loss, inputs, mask, normalizer=normalizer)
    assert torch.equal(got[0], expected[0])
    for a, b in zip([*got[1], *got[2]], [*expected[1], *expected[2]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_normalizer_that_cannot_divide_is_told_of_or_makes_everything_nan(bad, backend):
    inputs, mask = draw((3, 20))
    with pytest.raises(ValueError, match="normalizer must be above 0 and finite"):
        loss_stats_grads(ops.ppo_loss, inputs, mask, normalizer=bad)
    if backend == "cpu":
        with pytest.raises(ValueError, match="normalizer must be above 0 and finite"):
            loss_stats_grads(ops.ppo_loss, inputs, mask, normalizer=torch.tensor(bad))
        return
    # On a device nobody waits to read it.
    loss, stats, grads = loss_stats_grads(
        ops.ppo_loss, inputs, mask, normalizer=torch.tensor(bad), entropy_coef=0.1
    )
    assert loss.isnan() and all(x.isnan() for x in stats[:-1])
    for grad in grads:
        assert grad[mask].isnan().all() and (grad[~mask] == 0).all()


def test_many_tokens():
    """More than one block of the CUDA kernel takes, rows that start at every alignment, and a row that is long."""
    for shape in [(5, 4099), (33000,)]:
        inputs, mask = draw(shape)
        loss, stats, grads = loss_stats_grads(ops.ppo_loss, inputs, mask, kl_coef=0.1, entropy_coef=0.01)
        wide = {name: x.double() for name, x in inputs.items()}
        expected_loss, expected_stats, expected_grads = loss_stats_grads(
            reference.ppo_loss, wide, mask, kl_coef=0.1, entropy_coef=0.01
        )
        torch.testing.assert_close(loss.double(), expected_loss, atol=1e-6, rtol=1e-5)
        for got, expected in zip([*stats, *grads], [*expected_stats, *expected_grads], strict=True):
            torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "advantages must have shape (4, 128) like new_logprobs, got (4,)",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x[:, 0], mask),
        ),
        ("response_mask must be bool, got float32", lambda ppo_loss, x, mask: ppo_loss(x, x, x, x)),
        (
            "logprobs must be float32, bfloat16 or float16, got int64",
            lambda ppo_loss, x, mask: ppo_loss(x, x.long(), x, mask),
        ),
        (
            "new_values needs values and returns, got no values",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, new_values=x, returns=x),
        ),
        (
            "returns must have shape (4, 128) like new_logprobs, got (512,)",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, new_values=x, values=x, returns=x.flatten()),
        ),
        (
            "entropy_coef = 0.01 needs entropy, got None",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, entropy_coef=0.01),
        ),
        (
            "kl_coef = 0.1 needs ref_logprobs, got None",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, kl_coef=0.1),
        ),
        (
            "clip_range must be at least 0, got -0.2",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, clip_range=-0.2),
        ),
        (
            "dual_clip must be above 1, got 0.5",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, dual_clip=0.5),
        ),
        (
            "normalizer must be above 0 and finite, got 0",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, normalizer=0),
        ),
        (
            "normalizer must have shape (), got (4,)",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, normalizer=x[:, 0]),
        ),
        (
            "kl_estimator must be one of 'k1', 'abs', 'k2', 'k3', got 'full'",
            lambda ppo_loss, x, mask: ppo_loss(x, x, x, mask, kl_estimator="full"),
        ),
    ],
)
def test_errors_name_what_is_wrong(message, call):
    with pytest.raises(ValueError) as error:
        call(ops.ppo_loss, torch.zeros(4, 128), torch.ones(4, 128, dtype=torch.bool))
    assert str(error.value) == f"ppo_loss: {message}"
