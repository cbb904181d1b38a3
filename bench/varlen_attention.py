"""Attention over packed sequences, forward and backward, at the heads of SmolLM2-135M.

Against `scaled_dot_product_attention` on the same sequences side by side, all of one length, which it needs: the only
form in which torch has it on the CPU. In the second case a beginning of 24 tokens was computed once; sdpa computes it
for every sequence again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import MODES, quick, sizes, with_backward
from fastppo import ops

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
BF16, F32 = torch.bfloat16, torch.float32


def inputs(s: int, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value, and borders of s sequences with m queries and n keys each."""
    shapes = (s * m, HEADS, WIDTH), (s * n, KEY_HEADS, WIDTH), (s * n, KEY_HEADS, WIDTH)
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return *tensors, m * torch.arange(s + 1), n * torch.arange(s + 1)


def ours(*tensors: Tensor) -> Tensor:
    return ops.varlen_attention(*tensors, scale=WIDTH**-0.5)


def eager(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """The sequences as a batch. Queries that the packed form has not are zeros: their work is done, to no effect."""
    s = len(cu_seqlens_q) - 1
    m, n = len(query) // s, len(key) // s
    q = query.view(s, m, HEADS, WIDTH).transpose(1, 2)
    k, v = (x.view(s, n, KEY_HEADS, WIDTH).transpose(1, 2) for x in (key, value))
    q = torch.nn.functional.pad(q, (0, 0, n - m, 0))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[:, :, n - m :].transpose(1, 2).reshape(s * m, HEADS, WIDTH)


@sizes(
    "s, n, shared, dtype",
    quick(16, 72, 0, BF16),
    (16, 72, 24, BF16),
    (16, 72, 0, F32),
    (16, 316, 0, BF16),
    (2, 2048, 0, BF16),
)
def bench_varlen_attention(
    measure: Callable[..., None], s: int, n: int, shared: int, dtype: torch.dtype
) -> None:
    m = max(1, n - shared)
    measure(
        "varlen_attention, fwd + bwd",
        f"[{s} × {m}]" if m == n else f"[{s} × {m} of {n}]",
        dtype,
        inputs=lambda: inputs(s, m, n, dtype),
        ours=with_backward(ours, 0, 1, 2),
        eager={"sdpa": with_backward(eager, 0, 1, 2)},
        compiled=with_backward(eager, 0, 1, 2),
        modes=MODES[:1],
        hot=True,
    )
