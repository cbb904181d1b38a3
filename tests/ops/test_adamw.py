"""adamw_step_ keeps its promises."""

import math

import pytest
import torch
from backends import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo import ops, reference
from fastppo.reference.adamw import round_by_chance, rounding_bits

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def start(shape, moments_dtype=torch.bfloat16, seed=0):
    """Return a float32 master weight and the op's state for it."""
    master = torch.randn(shape, generator=seeded(seed))
    return master, [*ops.split_master(master), *torch.zeros(2, *shape, dtype=moments_dtype)]


def gradients(shape, steps, dtype=torch.bfloat16):
    generator = seeded(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def step(state, grad, **changes):
    ops.adamw_step_(*state[:2], grad, *state[2:], **{**SETTINGS, "step": 1, **changes})


def torch_adamw(master, grads):
    weight = master.clone().requires_grad_()
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    rest = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([weight], betas=betas, foreach=False, **rest)
    for grad in grads:
        weight.grad = grad.float()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_two_halves_are_the_master_bit_for_bit(bits):
    master = torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32).view(torch.float32)
    if master.isnan():
        return
    param, residual = ops.split_master(master)
    assert torch.equal(ops.join_master(param, residual).view(torch.int32), master.view(torch.int32))


def test_param_is_the_nearest_bfloat16():
    master = torch.randn(10000, generator=seeded(0))
    param, _ = ops.split_master(master)
    error = (param.float() - master).abs()
    assert (
        error <= (master.bfloat16().float() - master).abs()
    ).all()  # ties may go the other way, no further
    exact = ops.split_master(master.bfloat16().float())
    assert torch.equal(exact[0], master.bfloat16()) and (exact[1] == 0).all()


def test_one_step_splits_as_the_reference_does():
    # lr = 0 and no decay: the master passes through the kernel's join and split unchanged.
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32, generator=seeded(0))
    master = bits.view(torch.float32)
    master = master[master.isfinite()]
    zeros = torch.zeros_like(master)
    state = [*ops.split_master(master), zeros.bfloat16(), zeros.clone()]
    before = [x.clone() for x in state]
    step(state, zeros.bfloat16(), lr=0.0)
    assert torch.equal(ops.join_master(*state[:2]).view(torch.int32), master.view(torch.int32))
    assert all(
        torch.equal(x.view(torch.int16), y.view(torch.int16))
        for x, y in zip(state[:2], before[:2], strict=True)
    )


@pytest.mark.parametrize("shape", [(0,), (1,), (511,), (513,), (3, 1000), ()])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16])
def test_one_step_matches_the_reference(shape, grad_dtype, moments_dtype):
    _, state = start(shape, moments_dtype)
    expected = [x.clone() for x in state]
    for t, grad in enumerate(gradients(shape, 3, grad_dtype), 1):
        step(state, grad, step=t, grad_scale=0.7)
        reference.adamw_step_(*expected[:2], grad, *expected[2:], **SETTINGS, step=t, grad_scale=0.7)
    # A last bit of a float32 moment may tip its rounding to bfloat16: 2^-7 of it, and as much of a step of 0.01.
    half = moments_dtype == torch.bfloat16
    masters = [ops.join_master(*s[:2]) for s in (state, expected)]
    torch.testing.assert_close(*masters, atol=2e-4 if half else 1e-6, rtol=1e-6)
    for got, want in zip(state[2:], expected[2:], strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=2**-7 if half else 1e-5)
        assert half is False or (got == want).float().mean() > 0.99 or got.numel() < 2


def test_bfloat16_moments_are_exact_in_the_mean():
    # A gradient that has gone away: exp_avg_sq then shrinks by a thousandth a step, which rounding to nearest never
    # shows; after 1000 steps 1/e is left.
    state = [*ops.split_master(torch.zeros(4096)), *torch.ones(2, 4096, dtype=torch.bfloat16)]
    for t in range(1, 1001):
        step(state, torch.zeros(4096), lr=0.0, beta2=0.999, step=t)
    left = state[3].float()
    # One element wanders by sqrt(1000) roundings of at most 2^-8 of itself, their mean by 64 times less.
    assert left.mean().item() == pytest.approx(0.999**1000, rel=0.01)
    assert left.std().item() < 0.15 * left.mean().item()
    rounded = torch.tensor(1.0, dtype=torch.bfloat16)
    assert (rounded.float() * 0.999).bfloat16() == rounded


def test_rounding_by_chance_keeps_infinities_and_nan():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    state = [*ops.split_master(torch.zeros(4)), *torch.zeros(2, 4, dtype=torch.bfloat16)]
    step(state, special, beta1=0.0, beta2=0.0)
    assert state[2][:2].tolist() == [torch.inf, -torch.inf] and state[2][2].isnan() and state[2][3] == 0
    assert state[3][:2].tolist() == [torch.inf, torch.inf] and state[3][2].isnan() and state[3][3] == 0


def test_50_steps_are_torchs_adamw_in_float32():
    master, state = start((20, 1000), torch.float32)
    grads = gradients((20, 1000), 50)
    for t, grad in enumerate(grads, 1):
        step(state, grad, step=t)
    expected, moments = torch_adamw(master, grads)
    # 50 updates of about 0.01 to weights of about 1: float32 rounding, 6e-8 each, over 50 steps.
    torch.testing.assert_close(ops.join_master(*state[:2]), expected, atol=3e-6, rtol=0)
    torch.testing.assert_close(state[2], moments["exp_avg"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state[3], moments["exp_avg_sq"], atol=1e-7, rtol=1e-5)


def test_50_steps_with_bfloat16_moments_stay_near_torchs_adamw():
    master, state = start((20, 1000), torch.bfloat16)
    grads = gradients((20, 1000), 50)
    for t, grad in enumerate(grads, 1):
        step(state, grad, step=t)
    expected, _ = torch_adamw(master, grads)
    distance = (ops.join_master(*state[:2]) - expected).abs()
    # Each store moves a moment by up to 2^-8 of itself, up or down by chance; such errors decay by 0.9 a step (a
    # moment is near 0.24) and 50 of them add up to about sqrt(50) of one: a percent of the way.
    moved = (expected - master).abs().mean()
    assert distance.mean() < 0.01 * moved
    assert distance.max() < 0.02


def test_small_steps_are_not_lost_to_bfloat16():
    # bfloat16 at 1.0 moves in steps of 0.0078: an update of 1e-4 would vanish, here a hundred of them add up.
    master = torch.ones(64)
    state = [*ops.split_master(master), *torch.zeros(2, 64, dtype=torch.bfloat16)]
    for t in range(1, 101):
        step(state, torch.ones(64).bfloat16(), lr=1e-4, weight_decay=0.0, step=t)
    # A hundred steps of 1e-4, each off by the rounding of two moments, 2^-8 at most.
    torch.testing.assert_close(ops.join_master(*state[:2]), torch.full((64,), 0.99), atol=0.01 * 0.01, rtol=0)
    torch.testing.assert_close(state[0].float(), torch.full((64,), 0.99), atol=0.004, rtol=0)


def test_grad_scale_may_be_a_tensor():
    grad = gradients((100,), 1)[0]
    runs = []
    for scale in (0.25, torch.tensor(0.25), torch.tensor(0.25).double()):
        _, state = start((100,))
        step(state, grad, grad_scale=scale)
        runs.append(state)
    _, state = start((100,))
    step(state, grad * 0.25)
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, state, strict=True))


def test_grads_of_any_stride_and_parameters_that_require_grad():
    grad = gradients((30, 40), 1)[0]
    _, state = start((30, 40))
    _, expected = start((30, 40))
    state[0] = torch.nn.Parameter(state[0])
    step(state, grad.t().contiguous().t())
    step(expected, grad)
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def test_autograd_sees_the_write():
    _, state = start((4,))
    weight = state[0].requires_grad_()
    loss = (weight.float() ** 2).sum() + (weight * weight).sum()
    step(state, torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_same_bits_on_other_thread_counts():
    grad = gradients((100_000,), 1)[0]
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            _, state = start((100_000,))
            step(state, grad)
            runs.append(state)
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_opcheck_and_schema():
    _, state = start((30,))
    grad = gradients((30,), 1)[0]
    arguments = (*state[:2], grad, *state[2:], 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 0.5, torch.tensor(0.5))
    torch.library.opcheck(torch.ops.fastppo.adamw_step_.default, arguments)
    schema = torch.ops.fastppo.adamw_step_.default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["param", "residual", "exp_avg", "exp_avg_sq"]


def test_compiles_whole():
    grad = gradients((100,), 1)[0]
    _, state = start((100,))
    _, expected = start((100,))
    torch.compile(step, fullgraph=True, backend="aot_eager")(state, grad)
    step(expected, grad)
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def one_operation_at_a_time(state, grad, grad_scale, step):
    """Return (master, exp_avg, exp_avg_sq) after a step: torch rounds every one of these operations on its own."""
    t = {name: torch.tensor(x, dtype=torch.float64).float() for name, x in {
        "decay": 1 - SETTINGS["lr"] * SETTINGS["weight_decay"],
        "rate1": 1 - SETTINGS["beta1"],
        "beta2": SETTINGS["beta2"],
        "rate2": 1 - SETTINGS["beta2"],
        "step_size": SETTINGS["lr"] / (1 - SETTINGS["beta1"] ** step),
        "bias2": 1 / math.sqrt(1 - SETTINGS["beta2"] ** step),
        "eps": SETTINGS["eps"],
        "scale": grad_scale,
    }.items()}  # fmt: skip
    g = grad.float() * t["scale"]
    m = state[2].float()
    m = m + t["rate1"] * (g - m)
    v = t["beta2"] * state[3].float() + t["rate2"] * g * g
    master = ops.join_master(*state[:2])
    root = (
        v.double().sqrt().float()
    )  # torch's float32 sqrt is an ulp off in every sixth number on some processors
    return master * t["decay"] - t["step_size"] * m / (root * t["bias2"] + t["eps"]), m, v


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_every_backend_and_instruction_set_gives_these_bits(grad_dtype):
    master, state = start((3000,), torch.float32)
    for t, grad in enumerate(gradients((3000,), 3, grad_dtype), 1):
        expected = one_operation_at_a_time(state, grad, 0.7, t)
        half = [*(x.clone() for x in state[:2]), *(x.bfloat16() for x in state[2:])]
        half_expected = one_operation_at_a_time(half, grad, 0.7, t)
        step(state, grad, step=t, grad_scale=0.7)
        step(half, grad, step=t, grad_scale=0.7)
        for got, want in zip([ops.join_master(*state[:2]), *state[2:]], expected, strict=True):
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))
        assert torch.equal(ops.join_master(*half[:2]), half_expected[0])
        noise = rounding_bits(t, 3000).to(master.device)
        assert torch.equal(half[2], round_by_chance(half_expected[1], noise & 0xFFFF))
        assert torch.equal(half[3], round_by_chance(half_expected[2], noise >> 16))


def test_tensors_that_do_not_start_on_16_bytes():
    grad = gradients((1000,), 1)[0]
    _, expected = start((1000,))
    step(expected, grad)
    _, state = start((1000,))
    moved = []
    for i, x in enumerate([*state, grad]):
        wide = torch.full((1024,), 1, dtype=x.dtype)
        moved.append(wide[i + 1 : i + 1001])
        moved[-1].copy_(x)
    step(moved[:4], moved[4])
    assert all(torch.equal(a, b) for a, b in zip(moved[:4], expected, strict=True))
    assert all(
        (x._base[: i + 1] == 1).all() and (x._base[i + 1001 :] == 1).all() for i, x in enumerate(moved)
    )


@pytest.mark.parametrize(
    ("message", "state", "changes"),
    [
        ("param must be bfloat16, got float32", lambda w, r, f: (f, r, w, w, f), {}),
        ("residual must be int16, got bfloat16", lambda w, r, f: (w, w, w, w, f), {}),
        ("residual must have shape (4, 3) like param, got (3,)", lambda w, r, f: (w, r[0], w, w, f), {}),
        ("grad must have shape (4, 3) like param, got (3, 4)", lambda w, r, f: (w, r, w.t(), w, f), {}),
        ("exp_avg must be bfloat16 or float32, got float16", lambda w, r, f: (w, r, w, w.half(), f), {}),
        ("exp_avg_sq must be bfloat16 or float32, got float16", lambda w, r, f: (w, r, w, w, w.half()), {}),
        (
            "param must be contiguous: it is written in place",
            lambda w, r, f: (torch.zeros(3, 4).bfloat16().t(), r, w, w, f),
            {},
        ),
        (
            "step must be at least 1 (the first step is 1), got 0",
            lambda w, r, f: (w, r, w, w, f),
            {"step": 0},
        ),
        ("beta1 must be at least 0 and below 1, got 1", lambda w, r, f: (w, r, w, w, f), {"beta1": 1.0}),
        ("lr must be at least 0, got nan", lambda w, r, f: (w, r, w, w, f), {"lr": float("nan")}),
        (
            "grad_scale must have shape (), got (3,)",
            lambda w, r, f: (w, r, w, w, f),
            {"grad_scale": torch.ones(3)},
        ),
    ],
)
def test_errors_name_what_is_wrong(message, state, changes):
    f = torch.zeros(4, 3)
    with pytest.raises(ValueError) as error:
        ops.adamw_step_(*state(f.bfloat16(), f.short(), f), **{**SETTINGS, "step": 1, **changes})
    assert str(error.value) == f"adamw_step_: {message}"
