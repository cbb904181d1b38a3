"""One token per row by inverse transform sampling, in plain torch.

The draw rule, shared with every kernel:
  weight[i] = exp((logits[i] - max(logits)) / temperature)
  tokens are ranked by (logit descending, id ascending); a truncation keeps a prefix of that ranking:
    top_k  the first top_k tokens
    top_p  of those, the tokens with less than top_p of their mass ranked before them
    min_p  of those, the tokens with weight >= min_p (the weight of the best token is 1)
  u      = one 53-bit uniform in [0, 1) from Philox4x32-10 with key `seed` and counter `counters[row]`
  token  = the lowest id whose running sum of kept weights, in id order, exceeds u * (sum of kept weights)
Truncations come in the order in which Hugging Face's generate applies its warpers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .logprobs import logprobs


class Sample(NamedTuple):
    """What `sample` draws, one entry per row."""

    token_ids: Tensor  # int64[B]
    logprobs: Tensor  # float32[B], under softmax(logits / temperature): the behaviour policy of PPO's ratio
    sampling_logprobs: Tensor  # float32[B], under the truncated, renormalised distribution it was drawn from
    entropy: Tensor  # float32[B], nats, of softmax(logits / temperature)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    counters: Tensor,
) -> Sample:
    """Draw one token per row of `logits[B, V]` by the rule at the top of this file."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    weights = ((x - x.amax(-1, keepdim=True)) / temperature).exp()
    kept = keep_mask(x, weights, top_k=top_k, top_p=top_p, min_p=min_p)
    kept_weights = weights.double().masked_fill(~kept, 0.0)

    running = kept_weights.cumsum(-1)
    target = philox_uniform(seed, counters).unsqueeze(-1) * running[:, -1:]
    token_ids = torch.searchsorted(running, target, right=True)
    last = torch.where(kept_weights > 0, torch.arange(x.shape[-1], device=x.device), -1).amax(
        -1, keepdim=True
    )
    token_ids = token_ids.minimum(last)  # a running sum may round to below u * total

    policy_logprobs, entropy = logprobs(logits, token_ids.squeeze(-1), temperature=temperature)
    drawn = (kept_weights.gather(-1, token_ids) / running[:, -1:]).log().squeeze(-1).to(policy_logprobs.dtype)
    return Sample(token_ids.squeeze(-1), policy_logprobs, drawn, entropy)


def keep_mask(logits: Tensor, weights: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """True where a token survives top_k, then top_p, then min_p. The best weight is 1."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices  # stable: ties rank by lowest id
    ranked = weights.double().gather(-1, order)
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        ranked = ranked.masked_fill(torch.arange(vocabulary, device=logits.device) >= top_k, 0.0)
    kept = ranked > 0
    if top_p < 1.0:
        mass_before = ranked.cumsum(-1) - ranked
        kept &= mass_before < top_p * ranked.sum(-1, keepdim=True)
    if min_p > 0.0:
        kept &= ranked.to(weights.dtype) >= min_p
    return torch.zeros_like(kept).scatter(-1, order, kept)


def philox_uniform(seed: int, counters: Tensor) -> Tensor:
    """One float64 in [0, 1) per counter: the top 53 of the first 64 bits that Philox4x32-10 makes.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Key = the two halves of `seed`,
    counter block = (low half, high half, 0, 0) of the counter.
    """
    low32 = 0xFFFFFFFF
    key = [seed & low32, (seed >> 32) & low32]
    words = [
        counters & low32,
        (counters >> 32) & low32,
        torch.zeros_like(counters),
        torch.zeros_like(counters),
    ]
    for _ in range(10):
        high0, low0 = _multiply32(0xD2511F53, words[0])
        high1, low1 = _multiply32(0xCD9E8D57, words[2])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low32, (key[1] + 0xBB67AE85) & low32]
    bits = ((words[0] << 21) & ((1 << 53) - 1)) | (words[1] >> 11)
    return bits.double() * math.ldexp(1.0, -53)


def _multiply32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a 32 x 32 bit product, from pieces that fit a signed 64-bit integer."""
    low32 = 0xFFFFFFFF
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high & low32, (a * b) & low32
