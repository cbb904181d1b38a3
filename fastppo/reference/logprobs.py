"""Log-probability of given ids and entropy of the whole row, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `ids` and row entropies under `softmax(logits / temperature)`.

    A logit of -inf is a token that cannot occur: it adds nothing to the entropy and gets no gradient.
    Everything is computed in float32, or in float64 for float64 logits.
    """
    all_logprobs = log_softmax(logits, temperature)
    picked = all_logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    finite = all_logprobs.masked_fill(all_logprobs == -math.inf, 0.0)
    return picked, -(all_logprobs.exp() * finite).sum(-1)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """`log_softmax(logits / temperature)` in at least float32, without gradient to -inf logits."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = x.masked_fill(x == -math.inf, -math.inf)
    return (x / temperature).log_softmax(-1)
