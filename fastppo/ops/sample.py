"""Draw one token per row, with everything PPO wants to know about it, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.sample import Sample
from ._library import library  # noqa: F401  registers torch.ops.fastppo

__all__ = ["Sample", "sample"]


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
    """Draw one token per row from ``softmax(logits / temperature)``, truncated.

    Tokens are ranked by (logit descending, id ascending). Each truncation keeps a prefix of that ranking,
    in the order in which Hugging Face's ``generate`` applies them: the first ``top_k`` tokens; of those,
    the ones with less than ``top_p`` of their mass ranked before them; of those, the ones at least
    ``min_p`` times as likely as the best. So ties at a boundary are resolved by lowest id, and ``top_k=1``
    is argmax.

    The draw is an inverse transform of one uniform, the 53 high bits of Philox4x32-10 (Salmon et al. 2011)
    with key ``seed`` and counter ``counters[row]``: it depends on the row, the settings, the seed and its
    counter, and neither on the batch nor on the thread count. Never reuse a counter under one seed.

    Args:
        logits: (B, V) float32, bfloat16 or float16, any row stride. -inf is a token that cannot occur.
        temperature: divides the logits, above 0.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, in (0, 1], 1 for all.
        min_p: least weight relative to the best token, in [0, 1], 0 for all.
        seed: any 64-bit integer.
        counters: (B,) int64, any values; (sequence, position) packed into one, for example.

    Returns:
        ``Sample(token_ids, logprobs, sampling_logprobs, entropy)``, each (B,): int64, then float32 in nats.
        ``logprobs`` and ``entropy`` are of ``softmax(logits / temperature)`` before truncation, the
        behaviour policy of PPO's ratio; ``sampling_logprobs`` is of the truncated, renormalised
        distribution. No gradient.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message names it. On the CPU also: a row
            holds NaN or +inf or is -inf everywhere. On CUDA, where asking would make the host wait for the device,
            such a row gets the token id -1 and NaN in the other results: look for it where you read ids anyway.
    """
    return Sample(
        *torch.ops.fastppo.sample.default(logits.detach(), temperature, top_k, top_p, min_p, seed, counters)
    )


@torch.library.register_fake("fastppo::sample")
def _(logits, temperature, top_k, top_p, min_p, seed, counters):  # type: ignore[no-untyped-def]
    row = logits.new_empty(counters.shape, dtype=torch.float32)
    return torch.empty_like(row, dtype=torch.int64), row, torch.empty_like(row), torch.empty_like(row)
