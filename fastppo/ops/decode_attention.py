"""Attention of one new token per row over a key-value cache that is written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import library  # noqa: F401  registers torch.ops.fastppo


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
    """Write each row's new key and value into its slot of the cache, and attend to all the slot holds.

    Row b has ``n = lengths[b] + 1`` tokens, the new one included, and sees the last ``window`` of them::

        key_cache[slots[b], :, n - 1], value_cache[slots[b], :, n - 1] = key[b], value[b]
        weights = softmax(scale * query[b, h] · key_cache[slots[b], h // group, first:n]),  first = max(0, n - window)
        out[b, h] = weights · value_cache[slots[b], h // group, first:n]

    with ``group = Hq / Hk`` query heads per key head (grouped-query attention, Ainslie et al. 2023,
    arXiv:2305.13245). One pass over the cache, float32 sums, no gradient.

    Args:
        query: (B, Hq, D), float32, bfloat16 or float16.
        key: (B, Hk, D), of the new tokens; Hq is a multiple of Hk. This and all below: dtype of ``query``.
        value: (B, Hk, D), of the new tokens.
        key_cache: (S, Hk, C, D), S slots of at most C tokens, last dimension of stride 1; written.
        value_cache: shape of ``key_cache``; written.
        slots: (B,) int64, which slot each row has, in [0, S), no slot twice.
        lengths: (B,) int64, tokens already in the slot, in [0, C).
        scale: what scores are multiplied by, in general ``D ** -0.5``.
        window: how many tokens a row sees at most, the new one included, at least 1; None: all.

    Returns:
        (B, Hq, D), contiguous, dtype of ``query``.

    Raises:
        ValueError: a shape, dtype, device, layout or number is not as above; the message names it. On CUDA nothing is
            read to find out: a row whose slot or length is out of range gives NaN and writes nothing.
    """
    out = torch.ops.fastppo.decode_attention.default(
        query, key, value, key_cache, value_cache, slots, lengths, scale, window
    )
    if not torch.compiler.is_compiling():
        # Kernels behind the stable ABI do not tell autograd what they wrote.
        torch.autograd.graph.increment_version((key_cache, value_cache))
    return out


@torch.library.register_fake("fastppo::decode_attention")
def _(query, key, value, key_cache, value_cache, slots, lengths, scale, window):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)
