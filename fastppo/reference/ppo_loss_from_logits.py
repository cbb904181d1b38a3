"""The clipped PPO loss of logits in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logprobs import logprobs as logprobs_of
from .ppo_loss import PPOStats, ppo_loss


def ppo_loss_from_logits(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
    new_values: Tensor | None = None,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_range: float = 0.2,
    vf_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """Twin of :func:`fastppo.ops.ppo_loss_from_logits`."""
    settings: dict[str, Any] = {
        "clip_range": clip_range,
        "clip_range_high": clip_range_high,
        "dual_clip": dual_clip,
        "value_clip_range": value_clip_range,
        "vf_coef": vf_coef,
        "entropy_coef": entropy_coef,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "normalizer": normalizer,
    }
    counted = torch.where(response_mask.unsqueeze(-1), logits, 0.0)  # a row that does not count may hold NaN
    new_logprobs, entropy = logprobs_of(counted, ids.where(response_mask, 0), temperature=temperature)
    return ppo_loss(
        new_logprobs,
        logprobs,
        advantages,
        response_mask,
        new_values=new_values,
        values=values,
        returns=returns,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        **settings,
    )
