"""distribution_kl: what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from backends import seeded
from torch import Tensor

from fastppo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 1.3


def example(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = seeded(sum(shape))
    logits = torch.randn(*shape, generator=generator) * 3
    return logits.to(dtype), (logits + torch.randn(*shape, generator=generator)).to(dtype)


def gradients(op, logits: Tensor, ref_logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    policy, ref = (x.detach().clone().requires_grad_() for x in (logits, ref_logits))
    (op(policy, ref, temperature=TEMPERATURE) * weights).sum().backward()
    return policy.grad, ref.grad


def assert_close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 33, 4099, 49152, 50257, 151936, 262144])
def test_forward_is_within_rounding_of_float64(vocabulary: int, dtype: torch.dtype) -> None:
    logits, ref_logits = example(3, vocabulary, dtype=dtype)
    expected = reference.distribution_kl(logits.double(), ref_logits.double(), temperature=TEMPERATURE)
    actual = ops.distribution_kl(logits, ref_logits, temperature=TEMPERATURE)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, atol=3e-6)


def test_shifts_of_either_cost_no_accuracy_and_equal_rows_have_none() -> None:
    logits, ref_logits = example(3, 50257)
    shifted, other = logits + 100, ref_logits - 100
    expected = reference.distribution_kl(shifted.double(), other.double(), temperature=TEMPERATURE)
    assert_close(ops.distribution_kl(shifted, other, temperature=TEMPERATURE), expected, atol=3e-6)
    same = ops.distribution_kl(logits, logits, temperature=TEMPERATURE)
    assert (same >= 0).all() and (same < 1e-6).all()


@pytest.mark.parametrize("first", [-200.0, -50.0, -15.0, 15.0, 200.0])
@pytest.mark.parametrize("which", [0, 1])
def test_the_start_of_a_row_may_be_far_from_the_rest(first: float, which: int) -> None:
    """A tile is summed relative to the maxima of its first 128 logits, unless those turn out too far off."""
    pair = example(3, 8192 + 300)
    pair[which][:, :128] = pair[which][:, 8192:8320] = first
    expected = reference.distribution_kl(*[x.double() for x in pair], temperature=TEMPERATURE)
    assert_close(ops.distribution_kl(*pair, temperature=TEMPERATURE), expected, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_float64_and_are_no_worse_than_torch(dtype: torch.dtype) -> None:
    logits, ref_logits = example(3, 2, 4099, dtype=dtype)
    weights = torch.randn(3, 2, generator=seeded(1))
    actual = gradients(ops.distribution_kl, logits, ref_logits, weights)
    expected = gradients(reference.distribution_kl, logits.double(), ref_logits.double(), weights.double())
    torch_own = gradients(reference.distribution_kl, logits, ref_logits, weights)
    for ours, exact, theirs in zip(actual, expected, torch_own, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, exact, atol=max(1e-6, (theirs.double() - exact).abs().max().item()))


def test_reference_passes_gradcheck() -> None:
    inputs = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda x, y: reference.distribution_kl(x, y, temperature=TEMPERATURE), inputs
    )


def test_only_the_required_gradient() -> None:
    logits, ref_logits = example(3, 101)
    both = gradients(ops.distribution_kl, logits, ref_logits, torch.ones(3))
    policy = logits.clone().requires_grad_()
    ops.distribution_kl(policy, ref_logits, temperature=TEMPERATURE).sum().backward()
    ref = ref_logits.clone().requires_grad_()
    ops.distribution_kl(logits, ref, temperature=TEMPERATURE).sum().backward()
    assert torch.equal(policy.grad, both[0]) and torch.equal(ref.grad, both[1])


def test_tokens_that_cannot_occur() -> None:
    logits, ref_logits = example(4, 9001)
    logits[:, ::3] = -math.inf
    logits[1, :8192] = -math.inf  # whole tiles of the policy
    ref_logits[0, ::3] = -math.inf  # where the policy has none either
    ref_logits[2, 4] = -math.inf  # only the policy can produce it
    actual = ops.distribution_kl(logits, ref_logits, temperature=TEMPERATURE)
    expected = reference.distribution_kl(logits.double(), ref_logits.double(), temperature=TEMPERATURE)
    assert actual[2] == expected[2] == math.inf
    assert_close(actual, expected, atol=3e-6)
    weights = torch.tensor([1.0, 2.0, 0.0, -1.0])  # no gradient from the infinite row
    policy_grad, ref_grad = gradients(ops.distribution_kl, logits, ref_logits, weights)
    assert (policy_grad[:, ::3] == 0).all() and (policy_grad[2] == 0).all() and (ref_grad[2] == 0).all()
    finite = [0, 1, 3]
    expected_grads = gradients(
        reference.distribution_kl,
        logits[finite].double(),
        ref_logits[finite].double(),
        weights[finite].double(),
    )
    assert_close(policy_grad[finite], expected_grads[0], atol=1e-6)
    assert_close(ref_grad[finite], expected_grads[1], atol=1e-6)


def test_nan_stays_in_its_row() -> None:
    logits, ref_logits = example(3, 4999)
    clean = ops.distribution_kl(logits, ref_logits)
    ref_logits[1, 4998] = math.nan
    actual = ops.distribution_kl(logits, ref_logits)
    assert actual[1].isnan() and torch.equal(actual[::2], clean[::2])


def test_rows_of_any_stride_and_none_at_all() -> None:
    logits, ref_logits = example(4, 6, 503)
    view, ref_view = logits[1:, ::2, :500], ref_logits.transpose(0, 1)[::2, 1:, 3:].transpose(0, 1)
    expected = ops.distribution_kl(view.contiguous(), ref_view.contiguous())
    assert torch.equal(ops.distribution_kl(view, ref_view), expected)
    empty = torch.empty(0, 7, requires_grad=True)
    ops.distribution_kl(empty, empty.detach()).sum().backward()
    assert empty.grad.shape == (0, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(520, 100), (515, 4500), (511, 2100), (2, 9001)])
def test_rows_that_a_block_has_alone_and_rows_in_parts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """On CUDA 512 rows or more have a block each, fewer are cut into parts; 4500 is more than a block's step."""
    logits, ref_logits = example(*shape, dtype=dtype)
    logits[0, :99] = -math.inf
    weights = torch.randn(shape[0], generator=seeded(5))
    weights[1] = 0
    expected = reference.distribution_kl(logits.double(), ref_logits.double(), temperature=TEMPERATURE)
    assert_close(ops.distribution_kl(logits, ref_logits, temperature=TEMPERATURE), expected, atol=3e-6)
    actual = gradients(ops.distribution_kl, logits, ref_logits, weights)
    exact = gradients(reference.distribution_kl, logits.double(), ref_logits.double(), weights.double())
    for ours, theirs in zip(actual, exact, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_where_a_row_begins(dtype: torch.dtype) -> None:
    room, ref_room = example(3, 2070, dtype=dtype)
    for offset, other in [(1, 1), (2, 0), (3, 7)]:
        views = room[:, offset : offset + 2049], ref_room[:, other : other + 2049]
        aligned = [torch.zeros(3, 2064, dtype=dtype)[:, :2049].copy_(view) for view in views]
        op = torch.ops.fastppo
        saved = op.distribution_kl(*views, TEMPERATURE)
        assert all(map(torch.equal, op.distribution_kl(*aligned, TEMPERATURE), saved))
        got, expected = (
            op.distribution_kl_backward(torch.ones(3), *x, *saved, TEMPERATURE, True, True)
            for x in (views, aligned)
        )
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("first", [-200.0, -15.0, 15.0, 200.0])
def test_the_start_of_either_row_may_be_far_from_the_rest(first: float) -> None:
    logits, ref_logits = example(4, 8192 + 300)
    logits[:2, :128] = first
    ref_logits[1:3, :128] = first
    expected = reference.distribution_kl(logits.double(), ref_logits.double(), temperature=TEMPERATURE)
    actual = ops.distribution_kl(logits, ref_logits, temperature=TEMPERATURE)
    assert_close(actual, expected, atol=5e-6, rtol=1e-6)


def test_the_same_bits_on_every_run_and_thread_count() -> None:
    logits, ref_logits = example(1, 151936)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(gradients(ops.distribution_kl, logits, ref_logits, torch.ones(1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck_and_compile() -> None:
    logits, ref_logits = example(3, 37)
    op = torch.ops.fastppo.distribution_kl.default
    torch.library.opcheck(op, (logits.requires_grad_(), ref_logits.requires_grad_(), TEMPERATURE))
    torch.library.opcheck(op, (logits, ref_logits.detach(), TEMPERATURE))
    detached = logits.detach(), ref_logits.detach()
    torch.library.opcheck(
        torch.ops.fastppo.distribution_kl_backward.default,
        (torch.ones(3), *detached, *op(*detached, TEMPERATURE), TEMPERATURE, False, True),
    )
    compiled = torch.compile(ops.distribution_kl, fullgraph=True, backend="aot_eager")
    weights = torch.randn(3)
    expected = gradients(ops.distribution_kl, *detached, weights)
    assert all(map(torch.equal, gradients(compiled, *detached, weights), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ref_logits": torch.zeros(2, 12)},
            "distribution_kl: ref_logits must have shape (2, 11) like logits, got (2, 12)",
        ),
        (
            {"ref_logits": torch.zeros(2, 11).bfloat16()},
            "distribution_kl: ref_logits must be float32 like logits, got bfloat16",
        ),
        (
            {"ref_logits": torch.zeros(11, 2).T},
            "distribution_kl: ref_logits must be contiguous in the last dimension, got strides (1, 2)",
        ),
        (
            {"logits": torch.zeros(2, 11).long()},
            "distribution_kl: logits must be float32, bfloat16 or float16, got int64",
        ),
        ({"temperature": 0.0}, "distribution_kl: temperature must be positive and finite, got 0"),
    ],
)
def test_errors_name_the_tensor_what_was_expected_and_what_came(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(2, 11), "ref_logits": torch.zeros(2, 11), "temperature": 1.0} | change
    with pytest.raises(ValueError) as error:
        ops.distribution_kl(
            arguments["logits"], arguments["ref_logits"], temperature=arguments["temperature"]
        )
    assert str(error.value) == message
