"""Attention of one new token per row over a key-value cache, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Twin of :func:`fastppo.ops.decode_attention`."""
    key_cache[slots, :, lengths] = key
    value_cache[slots, :, lengths] = value
    group = query.shape[1] // key.shape[1]
    accumulate = torch.float64 if query.dtype is torch.float64 else torch.float32
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        last = length + 1
        first = 0 if window is None else max(0, last - window)
        keys, values = (
            cache[slot, :, first:last].to(accumulate).repeat_interleave(group, dim=0)
            for cache in (key_cache, value_cache)
        )
        scores = scale * (keys @ query[row].to(accumulate)[:, :, None])
        out[row] = (scores.softmax(1) * values).sum(1)
    return out
