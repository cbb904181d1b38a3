"""logprobs: what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from backends import seeded
from torch import Tensor

from fastppo import ops, reference

# Around a register, a chunk, a part and a tile; real vocabularies.
VOCABULARIES = [1, 2, 31, 32, 33, 127, 129, 511, 513, 8191, 8192, 8195, 49152, 50257, 151936, 262144]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.7


def example(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = seeded(sum(shape))
    logits = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def oracle(logits: Tensor, ids: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    return reference.logprobs(logits.double(), ids, temperature=temperature)


def gradient(op, logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    picked, entropy = op(leaf, ids, temperature=TEMPERATURE)
    (picked * weights[0] + entropy * weights[1]).sum().backward()
    return leaf.grad


def assert_close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_forward_is_within_rounding_of_float64(vocabulary: int, dtype: torch.dtype) -> None:
    logits, ids = example(3, vocabulary, dtype=dtype)
    picked, entropy = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    expected, expected_entropy = oracle(logits, ids)
    assert picked.dtype == entropy.dtype == torch.float32
    # A bfloat16 logit is itself off by up to 2e-3 of it: its weights are computed to 1e-6.
    assert_close(picked, expected, atol=5e-6 if dtype == torch.bfloat16 else 2e-6)
    assert_close(entropy, expected_entropy, atol=1e-5 if dtype == torch.bfloat16 else 5e-6)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [-200.0, -50.0, -15.0, -math.inf, LOWEST, 15.0, 200.0])
def test_the_start_of_a_row_may_be_far_from_the_rest(first: float, dtype: torch.dtype) -> None:
    """A tile is summed relative to the maximum of its first 128 logits, unless that turns out too far off."""
    logits, ids = example(4, 8192 + 300, dtype=dtype)
    logits[:, :128] = logits[:, 8192:8320] = (
        first if first == -math.inf else max(first, torch.finfo(dtype).min)
    )
    logits[1, 300:] = logits[0, 0]  # nothing but a few logits near 0
    ids[2] = 5
    picked, entropy = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    expected, expected_entropy = oracle(logits, ids)
    assert_close(picked, expected.float().double(), atol=5e-6, rtol=1e-6)
    assert_close(entropy, expected_entropy, atol=1e-5)


@pytest.mark.parametrize("value", [LOWEST, -3e38, 0.0, 3e38])
def test_a_row_of_one_value_is_uniform(value: float) -> None:
    picked, entropy = ops.logprobs(torch.full((2, 1000), value), torch.tensor([0, 999]))
    assert_close(picked, torch.full((2,), -math.log(1000), dtype=torch.float64), atol=2e-6)
    assert_close(entropy, torch.full((2,), math.log(1000), dtype=torch.float64), atol=5e-6)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 127, 128, 700, 8191, 8192, 9000])
def test_nan_and_inf_reach_the_result_from_everywhere(bad: float, place: int) -> None:
    logits, ids = example(2, 9001)
    logits[1, place] = bad
    picked, entropy = ops.logprobs(logits, ids)
    assert picked.isnan().tolist() == entropy.isnan().tolist() == [False, True]


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_shift_of_all_logits_costs_no_accuracy(shift: float) -> None:
    logits, ids = example(4, 151936)
    picked, entropy = ops.logprobs(logits + shift, ids, temperature=TEMPERATURE)
    expected, expected_entropy = oracle(logits + shift, ids)
    assert_close(picked, expected, atol=2e-6)
    assert_close(entropy, expected_entropy, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 33, 4099, 50257])
def test_gradient_matches_float64_and_is_no_worse_than_torch(vocabulary: int, dtype: torch.dtype) -> None:
    logits, ids = example(5, vocabulary, dtype=dtype)
    weights = torch.randn(2, 5, generator=seeded(1))
    actual = gradient(ops.logprobs, logits, ids, weights)
    expected = gradient(reference.logprobs, logits.double(), ids, weights.double())
    torch_error = (gradient(reference.logprobs, logits, ids, weights).double() - expected).abs().max().item()
    assert actual.dtype == dtype
    assert_close(actual, expected, atol=max(1e-6, torch_error))


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_may_be_missing(which: int) -> None:
    logits, ids = example(3, 1009)
    leaf = logits.clone().requires_grad_()
    ops.logprobs(leaf, ids, temperature=TEMPERATURE)[which].sum().backward()
    weights = torch.zeros(2, 3, dtype=torch.float64)
    weights[which] = 1
    assert_close(leaf.grad, gradient(reference.logprobs, logits.double(), ids, weights), atol=1e-6)


def test_a_gradient_on_large_pages_has_the_bits_of_its_rows() -> None:
    """On the CPU memory for a gradient of 32 MiB or more is asked for in pages of 2 MiB."""
    logits, ids = example(1, 2**20 + 3, dtype=torch.bfloat16)
    saved = torch.ops.fastppo.logprobs.default(logits, ids, TEMPERATURE)[1:]
    backward = torch.ops.fastppo.logprobs_backward.default
    grads = torch.zeros(2, 17)
    grads[:, ::16] = torch.randn(2, 1, generator=seeded(1))
    whole = backward(*grads, *(x.expand(17, *x.shape[1:]) for x in (logits, ids, *saved)), TEMPERATURE)
    assert whole.numel() * whole.element_size() > 2**25
    one = backward(*grads[:, :1], logits, ids, *saved, TEMPERATURE)
    assert torch.equal(whole[::16], one.expand(2, -1)) and (whole[1:16] == 0).all()


def test_reference_passes_gradcheck() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 6, 3])
    assert torch.autograd.gradcheck(lambda x: reference.logprobs(x, ids, temperature=TEMPERATURE), (logits,))


@pytest.mark.parametrize("vocabulary", [33, 4099])
def test_all_negative_logits_never_give_a_positive_logprob(vocabulary: int) -> None:
    # A tail of the row counted as logit 0 shows here at once.
    logits, ids = example(64, vocabulary, dtype=torch.bfloat16)
    picked, _ = ops.logprobs(logits.abs().neg() - 50, ids, temperature=TEMPERATURE)
    assert (picked <= 0).all()
    one_token = torch.full((2, vocabulary), -200.0)
    one_token[:, vocabulary - 1] = -1.0
    picked, entropy = ops.logprobs(one_token, torch.full((2,), vocabulary - 1), temperature=TEMPERATURE)
    assert (picked == 0).all() and (entropy.abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_cannot_occur(dtype: torch.dtype) -> None:
    logits, ids = example(4, 9001, dtype=dtype)
    logits[:, ::3] = -math.inf
    logits[1, :8192] = -math.inf  # whole tiles
    logits[2] = -math.inf
    logits[2, 17] = 0.0  # one token left
    ids[:] = torch.tensor([1, 8193, 17, 3])  # the last one cannot occur
    weights = torch.randn(2, 4)
    picked, entropy = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    expected, expected_entropy = oracle(logits, ids)
    assert_close(picked, expected, atol=2e-6)
    assert_close(entropy, expected_entropy, atol=5e-6)
    assert picked[3] == -math.inf and picked[2] == 0 and entropy[2] == 0
    actual = gradient(ops.logprobs, logits, ids, weights)
    assert (actual[logits == -math.inf] == 0).all()
    expected_gradient = gradient(reference.logprobs, logits.double(), ids, weights.double())
    assert_close(actual, expected_gradient, atol=1e-6, rtol=2**-8 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_distribution_give_nan_and_leave_the_others_alone(bad: float) -> None:
    logits, ids = example(3, 5003)
    clean = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    logits[1, 4999] = bad
    picked, entropy = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    assert picked[1].isnan() and entropy[1].isnan()
    assert torch.equal(picked[::2], clean[0][::2]) and torch.equal(entropy[::2], clean[1][::2])
    assert all(x.isnan().all() for x in ops.logprobs(torch.full((1, 9), -math.inf), torch.tensor([1])))


def test_a_row_without_gradient_gets_exact_zeros_even_when_it_holds_nan() -> None:
    logits, ids = example(3, 5003)
    weights = torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    clean = gradient(ops.logprobs, logits, ids, weights)
    logits[1, 7] = math.nan
    poisoned = gradient(ops.logprobs, logits, ids, weights)
    assert torch.equal(poisoned, clean) and (poisoned[1] == 0).all()


def test_rows_of_any_stride_and_shape() -> None:
    whole, _ = example(4, 6, 5003)
    ids = torch.randint(5000, (3, 2))
    views = {
        "columns of a wider tensor": (whole[:3, :2, :5000], ids),
        "every other row": (whole[1:, ::3, :5000], ids),
        "transposed leading dimensions": (whole.transpose(0, 1)[:3, :2], ids),
        "one row for all": (whole[0, 0].expand(3, 2, -1), ids),
        "no leading dimension": (whole[1, 1], ids[0, 0]),
    }
    for name, (view, chosen) in views.items():
        expected = ops.logprobs(view.contiguous(), chosen, temperature=TEMPERATURE)
        actual = ops.logprobs(view, chosen, temperature=TEMPERATURE)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name
    leaf = whole.clone().requires_grad_()
    ops.logprobs(leaf[:, 1:5:2, 1:], torch.ones(4, 2, dtype=torch.int64))[0].sum().backward()
    assert (
        (leaf.grad[:, ::2] == 0).all() and (leaf.grad[..., 0] == 0).all() and (leaf.grad[:, 1, 2] > 0).all()
    )


def test_no_rows() -> None:
    leaf = torch.empty(0, 3, 11, requires_grad=True)
    picked, entropy = ops.logprobs(leaf, torch.empty(0, 3, dtype=torch.int64))
    (picked.sum() + entropy.sum()).backward()
    assert picked.shape == entropy.shape == (0, 3) and leaf.grad.shape == (0, 3, 11)


@pytest.mark.parametrize("shape", [(1, 151936), (37, 4099)])
def test_the_same_bits_on_every_run_and_thread_count(shape: tuple[int, int]) -> None:
    logits, ids = example(*shape)
    weights = torch.ones(2, shape[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(
                (
                    *ops.logprobs(logits, ids, temperature=TEMPERATURE),
                    gradient(ops.logprobs, logits, ids, weights),
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck() -> None:
    logits, ids = example(3, 2, 37)
    op = torch.ops.fastppo.logprobs.default
    torch.library.opcheck(op, (logits.requires_grad_(), ids, TEMPERATURE))
    torch.library.opcheck(op, (logits.detach().bfloat16(), ids, TEMPERATURE))
    _, entropy, row_max, log_sum = op(logits.detach(), ids, TEMPERATURE)
    torch.library.opcheck(
        torch.ops.fastppo.logprobs_backward.default,
        (torch.randn(3, 2), None, logits.detach(), ids, entropy, row_max, log_sum, TEMPERATURE),
    )


def test_compiles_without_graph_breaks() -> None:
    logits, ids = example(3, 1009)
    weights = torch.randn(2, 3)
    compiled = torch.compile(ops.logprobs, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled, logits, ids, weights), gradient(ops.logprobs, logits, ids, weights))


def test_differentiable_once() -> None:
    logits, ids = example(2, 11)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(ops.logprobs(logits, ids)[0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logprobs is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3], [4, 11, 0]], "logprobs: ids[1, 1] must be in [0, 11), got 11"),
        ([[1, -1, 3], [4, 11, 0]], "logprobs: ids[0, 1] must be in [0, 11), got -1"),
        ([[1, 2**40, 3], [4, 5, 0]], "logprobs: ids[0, 1] must be in [0, 11), got 1099511627776"),
    ],
)
def test_ids_out_of_range(ids: list, message: str, backend: str) -> None:
    logits, chosen = torch.zeros(2, 3, 11), torch.tensor(ids)
    if backend == "cpu":
        with pytest.raises(ValueError) as error:
            ops.logprobs(logits, chosen)
        assert str(error.value) == message
        return
    # The host cannot look without waiting for the device: the device says so in the result, and reads nothing.
    outside = (chosen < 0) | (chosen >= 11)
    leaf = logits.requires_grad_()
    picked, entropy = ops.logprobs(leaf, chosen)
    (picked[~outside].sum() + entropy[outside].sum()).backward()
    assert torch.equal(picked.isnan(), outside) and not entropy.isnan().any()
    assert not leaf.grad.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(520, 100), (515, 8500), (511, 2100), (2, 20001)])
def test_rows_that_a_block_has_alone_and_rows_in_parts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """On CUDA 512 rows or more have a block each, fewer are cut into parts; 8500 is more than a block's step."""
    logits, ids = example(*shape, dtype=dtype)
    logits[3 % shape[0], :99] = -math.inf
    weights = torch.randn(2, shape[0], generator=seeded(5))
    weights[:, 1] = 0
    picked, entropy = ops.logprobs(logits, ids, temperature=TEMPERATURE)
    expected, expected_entropy = oracle(logits, ids)
    assert_close(picked, expected, atol=5e-6)
    assert_close(entropy, expected_entropy, atol=1e-5)
    actual = gradient(ops.logprobs, logits, ids, weights)
    exact = gradient(reference.logprobs, logits.double(), ids, weights.double())
    assert_close(actual, exact, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 2049, 9001])
def test_the_bits_do_not_depend_on_where_a_row_begins(vocabulary: int, dtype: torch.dtype) -> None:
    room, _ = example(3, vocabulary + 20, dtype=dtype)
    ids, weights = torch.zeros(3, dtype=torch.int64), torch.randn(2, 3, generator=seeded(6))
    aligned = torch.empty(3, vocabulary // 16 * 16 + 32, dtype=dtype)[:, :vocabulary]
    for offset in range(1, 9):
        view = room[:, offset : offset + vocabulary]
        aligned.copy_(view)
        for got, expected in zip(
            ops.logprobs(view, ids, temperature=TEMPERATURE),
            ops.logprobs(aligned, ids, temperature=TEMPERATURE),
            strict=True,
        ):
            assert torch.equal(got, expected)
        saved = torch.ops.fastppo.logprobs.default(view, ids, TEMPERATURE)[1:]
        got, expected = (
            torch.ops.fastppo.logprobs_backward.default(*weights, x, ids, *saved, TEMPERATURE)
            for x in (view, aligned)
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ids": torch.zeros(2, 4, dtype=torch.int64)},
            "logprobs: ids must have shape (2, 3) like logits without its last dimension, got (2, 4)",
        ),
        ({"ids": torch.zeros(2, 3)}, "logprobs: ids must be int64, got float32"),
        (
            {"logits": torch.zeros(2, 3, 11).double()},
            "logprobs: logits must be float32, bfloat16 or float16, got float64",
        ),
        (
            {"logits": torch.zeros(2, 11, 3).transpose(1, 2)},
            "logprobs: logits must be contiguous in the last dimension, got strides (33, 1, 3)",
        ),
        (
            {"logits": torch.zeros(2, 3, 0)},
            "logprobs: logits must have at least one column, got shape (2, 3, 0)",
        ),
        (
            {"logits": torch.tensor(1.0), "ids": torch.tensor(0)},
            "logprobs: logits must have a vocabulary dimension, got shape ()",
        ),
        ({"temperature": 0.0}, "logprobs: temperature must be positive and finite, got 0"),
        ({"temperature": -1.0}, "logprobs: temperature must be positive and finite, got -1"),
        ({"temperature": math.nan}, "logprobs: temperature must be positive and finite, got nan"),
    ],
)
def test_errors_name_the_tensor_what_was_expected_and_what_came(change: dict, message: str) -> None:
    arguments = {
        "logits": torch.zeros(2, 3, 11),
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "temperature": 1.0,
    }
    arguments |= change
    with pytest.raises(ValueError) as error:
        ops.logprobs(arguments["logits"], arguments["ids"], temperature=arguments["temperature"])
    assert str(error.value) == message
