"""Per-token estimates of KL(policy ‖ reference) from the sampled token's log-probs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "abs", "k2", "k3")


def check_estimator(op: str, estimator: str) -> None:
    """Raise ValueError naming the choices unless ``estimator`` is one of them."""
    if estimator not in KL_ESTIMATORS:
        choices = ", ".join(repr(e) for e in KL_ESTIMATORS)
        raise ValueError(f"{op}: estimator must be one of {choices}, got {estimator!r}")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Twin of :func:`fastppo.ops.kl_penalty`."""
    check_estimator("kl_penalty", estimator)
    d = _wide(logprobs) - _wide(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(-d) + d


def _wide(x: Tensor) -> Tensor:
    """float64 stays float64 (the oracle); everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()
