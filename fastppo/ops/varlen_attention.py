"""Causal attention over sequences packed one after the other, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import call, register_autograd

__all__ = ["varlen_attention"]


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
    """Each sequence attends to itself, and no row is padding.

    Sequence s has the queries ``cu_seqlens_q[s]:cu_seqlens_q[s + 1]`` and the keys ``cu_seqlens_k[s]:cu_seqlens_k[s
    + 1]``; its last query stands at its last key. With m queries and n >= m keys::

        last = i + n - m                                            of query i
        weights = softmax(scale * query[i, h] · key[j, h // group]),  max(0, last - window + 1) <= j <= last
        out[i, h] = weights · value[j, h // group]

    with ``group = Hq / Hk`` query heads per key head. Lengths and alignment are those of FlashAttention's ``varlen``
    functions (Dao, 2023, arXiv:2307.08691). Keys before a sequence's queries are those of a beginning that other rows
    computed; their gradient is that of this sequence alone, and who repeated them adds up.

    Scores exist for 32 queries at a time, in float32, and are computed a second time in the backward.

    Args:
        query: (Nq, Hq, D), float32, bfloat16 or float16.
        key: (Nk, Hk, D), dtype of ``query``; Hq is a multiple of Hk.
        value: shape and dtype of ``key``.
        cu_seqlens_q: (S + 1,) int64, from 0 to Nq, not falling.
        cu_seqlens_k: (S + 1,) int64, from 0 to Nk; no sequence has fewer keys than queries.
        scale: what scores are multiplied by, in general ``D ** -0.5``.
        window: how many tokens a query sees at most, itself included, at least 1; None: all.

    Returns:
        (Nq, Hq, D), contiguous, dtype of ``query``. Differentiable in ``query``, ``key`` and ``value``, once.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message names it.
    """
    return call(
        torch.ops.fastppo.varlen_attention.default,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        scale,
        window,
    )[0]


@torch.library.register_fake("fastppo::varlen_attention")
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, window):  # type: ignore[no-untyped-def]
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.register_fake("fastppo::varlen_attention_backward")
def _(grad, query, key, value, *others):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    query, key, value, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    grads = call(
        torch.ops.fastppo.varlen_attention_backward.default,
        *(grad, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.window),
    )
    return (*grads, None, None, None, None)


register_autograd("varlen_attention", _backward, setup_context=_setup_context)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("varlen_attention is differentiable once: its gradient has no gradient of its own")


register_autograd("varlen_attention_backward", _refuse)
