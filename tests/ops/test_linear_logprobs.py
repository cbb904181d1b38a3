"""linear_logprobs: what it promises."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from backends import seeded
from torch import Tensor

from fastppo import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.7
HEADS = [
    {},
    {"bias": True},
    {"softcap": 4.0},
    {"logit_scale": 0.5},
    {"bias": True, "softcap": 3.0, "logit_scale": 1.5},
]


class Example:
    def __init__(self, rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> None:
        generator = seeded(rows + width + vocabulary)
        self.hidden = torch.randn(rows, width, generator=generator).to(dtype)
        self.weight = (torch.randn(vocabulary, width, generator=generator) * 3 / max(width, 1) ** 0.5).to(
            dtype
        )
        self.bias = torch.randn(vocabulary, generator=generator).to(dtype)
        self.ids = torch.randint(vocabulary, (rows,), generator=generator)
        self.weights = torch.randn(2, rows, generator=generator)

    def run(self, op, dtype: torch.dtype | None = None, **head) -> dict[str, Tensor]:
        """Results and gradients of one op, in another dtype if asked."""
        leaves = {
            name: getattr(self, name).to(dtype or self.hidden.dtype).detach().requires_grad_()
            for name in ("hidden", "weight", "bias")
        }
        bias = leaves["bias"] if head.pop("bias", False) else None
        picked, entropy = op(
            leaves["hidden"], leaves["weight"], self.ids, bias=bias, temperature=TEMPERATURE, **head
        )
        (picked * self.weights[0] + entropy * self.weights[1]).sum().backward()
        results = {"logprobs": picked.detach(), "entropy": entropy.detach()}
        return results | {
            f"grad of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
        }


def assert_close_to_float64(example: Example, floor: float, **head) -> None:
    """Errors against float64 are at most those of torch with full logits in the same dtype, or `floor`."""
    actual = example.run(ops.linear_logprobs, **head)
    exact = example.run(reference.linear_logprobs, torch.float64, **head)
    torch_own = example.run(reference.linear_logprobs, **head)
    assert actual.keys() == exact.keys()
    for name in exact:
        largest = exact[name].abs().max().item() if exact[name].numel() else 0.0
        error = (actual[name].double() - exact[name]).abs().max().item() if exact[name].numel() else 0.0
        theirs = (torch_own[name].double() - exact[name]).abs().max().item() if exact[name].numel() else 0.0
        assert error <= max(1.5 * theirs, floor * max(1.0, largest)), (name, error, theirs)
        assert actual[name].dtype == torch_own[name].dtype


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_full_logits_in_float64(head: dict, dtype: torch.dtype) -> None:
    floor = 3e-6 if dtype == torch.float32 else 2**-8 if dtype == torch.bfloat16 else 2**-10
    assert_close_to_float64(Example(65, 33, 9001, dtype), floor, **head)


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [
        (0, 8, 11),
        (1, 8, 1),
        (1, 16, 50257),
        (2, 1, 4099),
        (3, 8, 151936),
        (2, 4, 262144),
        (8195, 4, 101),  # more rows than one product takes: gradients are summed over blocks of rows
    ],
)
def test_sizes_around_the_tiles(rows: int, width: int, vocabulary: int) -> None:
    assert_close_to_float64(Example(rows, width, vocabulary), 5e-6, bias=True)


@pytest.mark.parametrize("softcap", [1e-3, 5.0, 1e4])
def test_a_softcap_from_saturated_to_absent(softcap: float) -> None:
    assert_close_to_float64(Example(20, 16, 997), 5e-6, softcap=softcap)


def test_reference_passes_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (7, 4), (7,))
    ]
    ids = torch.tensor([0, 6, 2])
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: reference.linear_logprobs(
            hidden, weight, ids, bias=bias, temperature=TEMPERATURE, softcap=3.0, logit_scale=0.7
        ),
        inputs,
    )


def test_agrees_with_logprobs_on_the_same_logits() -> None:
    example = Example(40, 24, 5003)
    picked, entropy = ops.linear_logprobs(
        example.hidden, example.weight, example.ids, temperature=TEMPERATURE
    )
    logits = example.hidden @ example.weight.T
    expected, expected_entropy = ops.logprobs(logits, example.ids, temperature=TEMPERATURE)
    torch.testing.assert_close(picked, expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=5e-6, rtol=0)


def test_all_negative_logits_never_give_a_positive_logprob() -> None:
    hidden, weight = torch.ones(9, 4), -torch.rand(4099, 4) - 20
    picked, _ = ops.linear_logprobs(hidden, weight, torch.arange(9) * 500, temperature=TEMPERATURE)
    assert (picked <= 0).all()


def test_a_bias_of_minus_infinity_forbids_a_token() -> None:
    example = Example(6, 8, 4999)
    example.bias[::2] = -math.inf
    example.ids |= 1
    example.weights[1] = 0  # eager's entropy of -inf logits has no gradient to compare with
    assert_close_to_float64(example, 5e-6, bias=True)
    assert (example.run(ops.linear_logprobs, bias=True)["grad of bias"][::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_gradient_are_left_out_exactly(dtype: torch.dtype, backend: str) -> None:
    everything = Example(60, 16, 5003, dtype)
    active = torch.arange(0, 60, 3)
    some = Example(60, 16, 5003, dtype)
    for name in ("hidden", "ids"):
        setattr(some, name, getattr(some, name)[active])
    some.weights = some.weights[:, active]
    expected = some.run(ops.linear_logprobs, bias=True)

    skipped = torch.ones(60, dtype=torch.bool)
    skipped[active] = False
    everything.weights[:, skipped] = 0
    everything.hidden[skipped] = math.nan  # 0 * NaN would show
    leaf, weight, bias = (
        x.clone().requires_grad_() for x in (everything.hidden, everything.weight, everything.bias)
    )
    results = ops.linear_logprobs(leaf, weight, everything.ids, bias=bias, temperature=TEMPERATURE)
    torch.autograd.backward(results, tuple(everything.weights))
    got = {
        "grad of hidden": leaf.grad[active],
        "grad of weight": weight.grad,
        "grad of bias": bias.grad,
    }
    assert (leaf.grad[skipped] == 0).all()
    for name, value in got.items():
        if backend == "cpu":
            assert torch.equal(value, expected[name])
        else:  # the products are of all rows, with zeros in the place of these: sums in another order
            tolerance = 1e-5 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=tolerance)


def test_no_row_with_gradient() -> None:
    example = Example(5, 8, 301)
    example.weights[:] = 0
    results = example.run(ops.linear_logprobs, bias=True)
    assert all((results[f"grad of {name}"] == 0).all() for name in ("hidden", "weight", "bias"))


def test_a_frozen_weight_gets_no_gradient_and_changes_nothing_else() -> None:
    example = Example(30, 8, 5003)
    expected = example.run(ops.linear_logprobs)
    hidden = example.hidden.clone().requires_grad_()
    picked, entropy = ops.linear_logprobs(hidden, example.weight, example.ids, temperature=TEMPERATURE)
    torch.autograd.backward((picked, entropy), tuple(example.weights))
    assert example.weight.grad is None and torch.equal(hidden.grad, expected["grad of hidden"])
    weight = example.weight.clone().requires_grad_()
    picked, entropy = ops.linear_logprobs(example.hidden, weight, example.ids, temperature=TEMPERATURE)
    torch.autograd.backward((picked, entropy), tuple(example.weights))
    assert torch.equal(weight.grad, expected["grad of weight"])


def test_a_tied_weight_gets_both_gradients() -> None:
    tokens, ids = torch.tensor([3, 3, 250, 0]), torch.tensor([250, 1, 3, 0])

    def gradient(op, weight: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_()
        picked, entropy = op(weight[tokens].tanh(), weight, ids, temperature=TEMPERATURE)
        (picked.sum() + 0.1 * entropy.sum()).backward()
        return weight.grad

    weight = torch.randn(251, 16)
    expected = gradient(reference.linear_logprobs, weight.double())
    torch.testing.assert_close(gradient(ops.linear_logprobs, weight).double(), expected, atol=2e-6, rtol=0)


def test_strided_hidden_and_weight() -> None:
    example = Example(20, 16, 3001)
    wide_hidden, wide_weight = torch.randn(40, 20), torch.randn(3001, 19)
    wide_hidden[::2, 1:17], wide_weight[:, 3:] = example.hidden, example.weight
    expected = example.run(ops.linear_logprobs)
    example.hidden, example.weight = wide_hidden[::2, 1:17], wide_weight[:, 3:]
    for name, value in example.run(ops.linear_logprobs).items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=0)


def test_the_same_bits_on_every_run() -> None:
    example = Example(100, 64, 9001, torch.bfloat16)
    first, second = (example.run(ops.linear_logprobs, bias=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


PEAK_MEMORY = """
import contextlib, pathlib, re, sys, torch
from fastppo import ops
backend, dtype, rows = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
kernels = contextlib.nullcontext()
if backend == "emulated":
    import backends
    kernels = backends.emulated()
if backend == "cuda":
    torch.set_default_device("cuda")
def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
def now():
    return torch.cuda.memory_allocated() / 2**20 if backend == "cuda" else resident("VmRSS")
def peak():
    return torch.cuda.max_memory_allocated() / 2**20 if backend == "cuda" else resident("VmHWM")
width, vocabulary = 16, 151936
hidden = torch.randn(rows, width).to(dtype).requires_grad_()
weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
ids = torch.randint(vocabulary, (rows,))
few = hidden[:8].detach()
with kernels:
    ops.linear_logprobs(few, weight, ids[:8])[0].sum().backward()  # what the first call allocates once
    weight.grad = None
    if backend == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = now()
    sum(x.sum() for x in ops.linear_logprobs(hidden, weight, ids)).backward()
gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight)) / 2**20
print(peak() - before - gradients)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_logits_never_exist(dtype: str, backend: str) -> None:
    # At N = 1024, V = 151936 they would take 310 or 620 MB, once forward and once backward; at N = 256, all that the
    # emulator has the time for, 78 or 156 MB.
    rows = "256" if backend == "emulated" else "1024"
    run = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, backend, dtype, rows],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert float(run.stdout) < 64


def test_opcheck() -> None:
    example = Example(5, 8, 37)
    hidden, weight, bias = (x.requires_grad_() for x in (example.hidden, example.weight, example.bias))
    op = torch.ops.fastppo.linear_logprobs.default
    torch.library.opcheck(op, (hidden, weight, example.ids, None, TEMPERATURE, None, 1.0))
    torch.library.opcheck(op, (hidden, weight, example.ids, bias, TEMPERATURE, 3.0, 0.5))
    torch.library.opcheck(op, (hidden, weight.detach(), example.ids, None, TEMPERATURE, None, 1.0))
    detached = (hidden.detach(), weight.detach(), example.ids, bias.detach())
    numbers = (TEMPERATURE, None, 1.0)
    _, *saved = op(*detached, *numbers)
    torch.library.opcheck(
        torch.ops.fastppo.linear_logprobs_backward.default,
        (*example.weights, *detached, *saved, *numbers, True, False, True),
    )


def test_compiles_without_graph_breaks() -> None:
    example = Example(9, 8, 301)
    compiled = torch.compile(ops.linear_logprobs, fullgraph=True, backend="aot_eager")
    expected = example.run(ops.linear_logprobs, bias=True, softcap=3.0)
    actual = example.run(compiled, bias=True, softcap=3.0)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_differentiable_once() -> None:
    example = Example(3, 4, 11)
    hidden = example.hidden.requires_grad_()
    picked = ops.linear_logprobs(hidden, example.weight, example.ids)[0].sum()
    (grad,) = torch.autograd.grad(picked, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_ids_out_of_range(bad: int, backend: str) -> None:
    hidden, weight, ids = torch.zeros(2, 4), torch.zeros(11, 4), torch.tensor([0, bad])
    if backend == "cpu":
        with pytest.raises(ValueError) as error:
            ops.linear_logprobs(hidden, weight, ids)
        assert str(error.value) == f"linear_logprobs: ids[1] must be in [0, 11), got {bad}"
        return
    # The host cannot look without waiting for the device: the device says so in the result, and reads nothing.
    picked, entropy = ops.linear_logprobs(hidden.requires_grad_(), weight, ids)
    (picked[0] + entropy.sum()).backward()
    assert picked.isnan().tolist() == [False, True] and not entropy.isnan().any()
    assert not hidden.grad.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ids": torch.tensor([0, 1, 2])},
            "linear_logprobs: ids must have shape (2,) like the rows of hidden, got (3,)",
        ),
        ({"ids": torch.zeros(2).int()}, "linear_logprobs: ids must be int64, got int32"),
        ({"hidden": torch.zeros(2, 2, 4)}, "linear_logprobs: hidden must have shape (N, H), got (2, 2, 4)"),
        (
            {"weight": torch.zeros(11, 5)},
            "linear_logprobs: weight must have shape (V, 4) like hidden (2, 4), got (11, 5)",
        ),
        (
            {"weight": torch.zeros(11, 4).bfloat16()},
            "linear_logprobs: weight must be float32 like hidden, got bfloat16",
        ),
        ({"weight": torch.zeros(0, 4)}, "linear_logprobs: weight must have at least one row, got (0, 4)"),
        (
            {"bias": torch.zeros(4)},
            "linear_logprobs: bias must have shape (11,) like the rows of weight, got (4,)",
        ),
        ({"bias": torch.zeros(11).half()}, "linear_logprobs: bias must be float32 like hidden, got float16"),
        ({"temperature": 0.0}, "linear_logprobs: temperature must be positive and finite, got 0"),
        ({"softcap": 0.0}, "linear_logprobs: softcap must be positive and finite, or None, got 0"),
        ({"logit_scale": math.inf}, "linear_logprobs: logit_scale must be finite, got inf"),
    ],
)
def test_errors_name_the_tensor_what_was_expected_and_what_came(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(11, 4),
        "ids": torch.tensor([0, 1]),
    } | change
    with pytest.raises(ValueError) as error:
        ops.linear_logprobs(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("ids"), **arguments
        )
    assert str(error.value) == message
