"""Log-probs straight from hidden states: the matrix products are the floor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import logprobs
from bench.measure import MODES, Function, quick, readme, sizes, with_backward
from bench.peers import trl_linear_logprobs
from fastppo import ops

F32, BF16 = torch.float32, torch.bfloat16


def log_softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logprobs.log_softmax(hidden @ weight.T, ids)


def inputs(
    n: int, h: int, v: int, dtype: torch.dtype, requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, h).to(dtype).requires_grad_(requires_grad)
    weight = (torch.randn(v, h) * h**-0.5).to(dtype).requires_grad_(requires_grad)
    return hidden, weight, torch.randint(v, (n,))


def products(n: int, h: int, v: int, dtype: torch.dtype, backward: bool) -> dict[str, Function]:
    """The bare products on the full matrices, into memory that is already there.

    Forward: the logits. Backward: the logits again, the gradient of hidden, the gradient of weight.
    """
    logits = torch.empty(n, v, dtype=dtype)
    grad_hidden, grad_weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)

    @torch.no_grad()
    def one(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
        torch.mm(hidden, weight.T, out=logits)

    @torch.no_grad()
    def four(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return {"4 products": four} if backward else {"1 product": one}


@sizes("n, h, v, dtype", (2048, 576, 49152, BF16))
def bench_linear_logprobs(measure: Callable[..., None], n: int, h: int, v: int, dtype: torch.dtype) -> None:
    measure(
        "linear_logprobs forward",
        f"[{n}, {h}] → {v}",
        dtype,
        inputs=lambda: inputs(n, h, v, dtype),
        ours=ops.linear_logprobs,
        eager={"log_softmax": log_softmax},
        peers={"TRL 1.16": trl_linear_logprobs},
        floors=products(n, h, v, dtype, backward=False),
    )


@sizes(
    "n, h, v, dtype, modes",
    quick(2048, 576, 49152, BF16, MODES),
    readme(2048, 1024, 49152, BF16, ()),
    (2048, 576, 49152, F32, ()),
    (2048, 1024, 49152, F32, ()),
)
def bench_linear_logprobs_backward(
    measure: Callable[..., None], n: int, h: int, v: int, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    measure(
        "linear_logprobs forward + backward",
        f"[{n}, {h}] → {v}",
        dtype,
        inputs=lambda: inputs(n, h, v, dtype, requires_grad=True),
        ours=with_backward(ops.linear_logprobs, 0, 1),
        eager={"log_softmax": with_backward(log_softmax, 0, 1)} if dtype is BF16 or h < 1024 else None,
        compiled=with_backward(log_softmax, 0, 1),
        modes=modes,
        peers={"TRL 1.16": with_backward(trl_linear_logprobs, 0, 1)},
        floors=products(n, h, v, dtype, backward=True),
        memory=dtype is BF16,
    )


@sizes("n, h, v, dtype", readme(4096, 576, 151936, BF16))
def bench_linear_logprobs_memory(
    measure: Callable[..., None], n: int, h: int, v: int, dtype: torch.dtype
) -> None:
    """A vocabulary at which the logits alone are 1.2 GB: for our memory, so one round, and no peer."""
    measure(
        "linear_logprobs forward + backward",
        f"[{n}, {h}] → {v}",
        dtype,
        inputs=lambda: inputs(n, h, v, dtype, requires_grad=True),
        ours=with_backward(ops.linear_logprobs, 0, 1),
        floors=products(n, h, v, dtype, backward=True),
        memory=True,
        min_rounds=1,
    )


@sizes("n, h, v", quick(1, 8, 16))
def bench_linear_logprobs_call(measure: Callable[..., None], n: int, h: int, v: int) -> None:
    measure(
        "linear_logprobs call",
        f"[{n}, {h}] → {v}",
        F32,
        inputs=lambda: inputs(n, h, v, F32),
        ours=ops.linear_logprobs,
        hot=True,
    )
