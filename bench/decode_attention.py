"""Attention of one new token per row on a cache that is written in place, at the heads of SmolLM2-135M.

Against `scaled_dot_product_attention` on the same cache, all rows of one length, which it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import MODES, quick, reading, sizes
from fastppo import ops

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
BF16, F32 = torch.bfloat16, torch.float32


def inputs(b: int, t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value, caches of t tokens of which the last is new, slots, lengths."""
    query = torch.randn(b, HEADS, WIDTH).to(dtype)
    key, value = (torch.randn(b, KEY_HEADS, WIDTH).to(dtype) for _ in range(2))
    caches = (torch.randn(b, KEY_HEADS, t, WIDTH).to(dtype) for _ in range(2))
    return query, key, value, *caches, torch.arange(b), torch.full((b,), t - 1)


def ours(*tensors: Tensor) -> Tensor:
    return ops.decode_attention(*tensors, scale=WIDTH**-0.5)


def eager(grouped: bool) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        query, key, value, key_cache, value_cache, slots, lengths = tensors
        key_cache[slots, :, lengths] = key
        value_cache[slots, :, lengths] = value
        if grouped:  # the heads of a group as if they were several queries
            b = len(query)
            query = query.view(b, KEY_HEADS, HEADS // KEY_HEADS, WIDTH)
            out = torch.nn.functional.scaled_dot_product_attention(query, key_cache, value_cache)
            return out.view(b, HEADS, WIDTH)
        return torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None], key_cache, value_cache, enable_gqa=True
        )[:, :, 0]

    return run


@sizes("b, t, dtype", quick(16, 64, BF16), (16, 64, F32), (16, 1024, BF16))
def bench_decode_attention(measure: Callable[..., None], b: int, t: int, dtype: torch.dtype) -> None:
    moved = 2 * b * KEY_HEADS * t * WIDTH * dtype.itemsize
    measure(
        "decode_attention",
        f"[{b}, {t}]",
        dtype,
        inputs=lambda: inputs(b, t, dtype),
        ours=ours,
        eager={"sdpa": eager(False), "sdpa, grouped": eager(True)},
        compiled=eager(True),
        modes=MODES,
        floors=reading(moved),
        bytes_moved=moved,
        hot=True,
    )


@sizes("b, t", quick(1, 2))
def bench_decode_attention_call(measure: Callable[..., None], b: int, t: int) -> None:
    measure(
        "decode_attention call", f"[{b}, {t}]", BF16, inputs=lambda: inputs(b, t, BF16), ours=ours, hot=True
    )
