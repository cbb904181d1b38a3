"""Exact KL divergence between two next-token distributions, in plain torch."""

from __future__ import annotations

import math

from torch import Tensor

from .logprobs import log_softmax


def distribution_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) per row: the sum over the vocabulary of p * (log p - log q).

    Tokens the policy cannot produce (logit -inf) add nothing, whatever the reference says about them;
    a token that only the policy can produce makes the divergence infinite.
    """
    policy, reference = log_softmax(logits, temperature), log_softmax(ref_logits, temperature)
    impossible = policy == -math.inf
    difference = policy.masked_fill(impossible, 0.0) - reference.masked_fill(impossible, 0.0)
    return (policy.exp() * difference).sum(-1)
