"""kl_penalty keeps its promises."""

import pytest
import torch
from backends import seeded

from fastppo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (513,), (0, 4), (3, 5), (2, 3, 700)]


def draw(shape, dtype=torch.float32):
    generator = seeded(0)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("estimator", reference.KL_ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_match_the_float64_reference(shape, dtype, estimator):
    inputs = draw(shape, dtype)
    kl = ops.kl_penalty(*inputs, estimator=estimator)
    assert kl.dtype == torch.float32 and kl.shape == shape
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.kl_penalty(*wide, estimator=estimator)
    torch.testing.assert_close(kl.double(), expected, atol=1e-6, rtol=2e-6)
    weights = torch.linspace(-1, 1, kl.numel()).reshape(shape)
    grads = torch.autograd.grad((kl * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights.double()).sum(), wide)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[
        dtype
    ]  # of the gradient's own dtype
    for grad, e in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), e, atol=1e-6, rtol=rounding)


def test_by_hand():
    logprobs, ref_logprobs = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -1.0, -2.0])
    assert ops.kl_penalty(logprobs, ref_logprobs).tolist() == [1, -2, 0]
    assert ops.kl_penalty(logprobs, ref_logprobs, estimator="abs").tolist() == [1, 2, 0]
    assert ops.kl_penalty(logprobs, ref_logprobs, estimator="k2").tolist() == [0.5, 2, 0]
    e = torch.tensor(1.0).exp().item()
    k3 = ops.kl_penalty(logprobs, ref_logprobs, estimator="k3").tolist()
    assert k3 == pytest.approx([1 / e, e * e - 1 - 2, 0])


def test_k1_and_k3_estimate_the_kl():
    # Exact over a vocabulary of 3: the policy's expectation of both is KL(policy || reference).
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    kl = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * ops.kl_penalty(p, q, estimator=estimator)).sum(), kl)


def test_k3_keeps_its_digits_where_policy_and_reference_are_close():
    d = torch.tensor([1e-3, -1e-3, 1e-4])
    kl = ops.kl_penalty(d, torch.zeros(3), estimator="k3")
    torch.testing.assert_close(kl.double(), d.double() ** 2 / 2, atol=0, rtol=2e-3)
    assert (kl >= 0).all()


@pytest.mark.parametrize("estimator", reference.KL_ESTIMATORS)
def test_reference_passes_gradcheck(estimator):
    inputs = [x.double().requires_grad_() for x in draw((2, 3))]
    assert torch.autograd.gradcheck(lambda a, b: reference.kl_penalty(a, b, estimator=estimator), inputs)


def test_opcheck_and_whole_compilation():
    inputs = draw((3, 20))
    torch.library.opcheck(torch.ops.fastppo.kl_penalty.default, (*inputs, "k3"))
    compiled = torch.compile(ops.kl_penalty, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(*inputs, estimator="k3").sum(), inputs) for f in (compiled, ops.kl_penalty)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_strides():
    a, b = (x.detach() for x in draw((6, 40)))
    expected = ops.kl_penalty(a[:, ::2].contiguous(), b[:, 1:21].contiguous())
    assert torch.equal(ops.kl_penalty(a[:, ::2], b[:, 1:21]), expected)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("kl_penalty: ref_logprobs must have shape (2, 3) like logprobs, got (3, 2)", ((2, 3), (3, 2), "k1")),
        ("kl_penalty: estimator must be one of 'k1', 'abs', 'k2', 'k3', got 'mse'", ((2, 3), (2, 3), "mse")),
    ],
)
def test_errors_name_what_is_wrong(message, arguments):
    shape, ref_shape, estimator = arguments
    with pytest.raises(ValueError) as error:
        ops.kl_penalty(torch.zeros(shape), torch.zeros(ref_shape), estimator=estimator)
    assert str(error.value) == message


def test_reference_names_the_choices_too():
    with pytest.raises(ValueError, match="estimator must be one of 'k1', 'abs', 'k2', 'k3', got 'mse'"):
        reference.kl_penalty(torch.zeros(1), torch.zeros(1), estimator="mse")
