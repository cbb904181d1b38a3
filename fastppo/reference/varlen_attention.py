"""Causal attention over packed sequences, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Twin of :func:`fastppo.ops.varlen_attention`."""
    group = query.shape[1] // key.shape[1]
    accumulate = torch.float64 if query.dtype is torch.float64 else torch.float32
    outs = []
    for queries, keys, values in zip(
        query.to(accumulate).tensor_split(cu_seqlens_q[1:-1].cpu()),
        key.to(accumulate).repeat_interleave(group, dim=1).tensor_split(cu_seqlens_k[1:-1].cpu()),
        value.to(accumulate).repeat_interleave(group, dim=1).tensor_split(cu_seqlens_k[1:-1].cpu()),
        strict=True,
    ):
        m, n = len(queries), len(keys)
        last = torch.arange(m, device=query.device)[:, None] + n - m
        place = torch.arange(n, device=query.device)
        seen = place <= last
        if window is not None:
            seen &= place > last - window
        scores = scale * torch.einsum("ihd,jhd->hij", queries, keys)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(outs).to(query.dtype)
