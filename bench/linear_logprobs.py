"""Log-probs straight from hidden states: the matrix products are the floor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.logprobs import eager as eager_logprobs
from bench.variants import dtypes, variants, with_backward
from fastppo import ops

N, H, V = 768, 576, 49152  # 32 replies of 24 tokens, SmolLM2-135M


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return eager_logprobs(hidden @ weight.T, ids, temperature=temperature)


def product(hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The matrix product alone."""
    return hidden @ weight.T


def three_products(hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0) -> None:
    """What forward and backward cannot do without: logits, and the gradients of hidden and weight."""
    with torch.no_grad():
        logits = hidden @ weight.T
        _ = logits @ weight, logits.T @ hidden


def inputs(dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=requires_grad)
    weight = (torch.randn(V, H) * H**-0.5).to(dtype).requires_grad_(requires_grad)
    return hidden, weight, torch.randint(V, (N,))


@dtypes
@variants(ours=ops.linear_logprobs, eager=eager, floor=product)
def bench_linear_logprobs(
    measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype
) -> None:
    measure(function, *inputs(dtype), size=f"{N} × {H} → {V}", reads=0)


@dtypes
@variants(ours=with_backward(ops.linear_logprobs), eager=with_backward(eager), floor=three_products)
def bench_linear_logprobs_backward(
    measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype
) -> None:
    measure(function, *inputs(dtype, requires_grad=True), size=f"{N} × {H} → {V}", reads=0)
