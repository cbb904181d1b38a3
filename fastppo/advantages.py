"""Per-token rewards, advantages and returns of a batch, with whitening over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .ops import RewardsAndAdvantages


def rewards_and_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    estimator: str,
    reward_clip: float | None,
    whiten_rewards: bool,
    whiten_advantages: bool,
    gamma: float,
    lam: float,
) -> RewardsAndAdvantages:
    """`ops.rewards_and_advantages`, with statistics of whitening taken over the batch of all ranks.

    On one process this is the op itself, in one launch. On several, the op runs without whitening and the moments
    are summed over ranks, so that N ranks give what one rank gives on the joined batch.
    """
    settings = {
        "kl_coef": kl_coef,
        "estimator": estimator,
        "reward_clip": reward_clip,
        "gamma": gamma,
        "lam": lam,
    }
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return ops.rewards_and_advantages(
            scores,
            logprobs,
            ref_logprobs,
            values,
            response_mask,
            whiten_rewards=whiten_rewards,
            whiten_advantages=whiten_advantages,
            **settings,  # type: ignore[arg-type]
        )
    rewards, kl, advantages, returns = ops.rewards_and_advantages(
        scores,
        logprobs,
        ref_logprobs,
        values,
        response_mask,
        whiten_rewards=False,
        whiten_advantages=False,
        **settings,  # type: ignore[arg-type]
    )
    if whiten_rewards:
        _, std = all_ranks_moments(rewards, response_mask)
        rewards = rewards / std
        advantages, returns = ops.gae(rewards, values, response_mask, gamma=gamma, lam=lam)
    if whiten_advantages:
        mean, std = all_ranks_moments(advantages, response_mask)
        advantages = ((advantages - mean) / std).masked_fill(~response_mask, 0.0)
    return RewardsAndAdvantages(rewards, kl, advantages, returns)


def all_ranks_moments(x: Tensor, mask: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation sqrt(variance + eps) of the counted elements of all ranks, as float32 scalars.

    Two passes (the mean, then squared distances to it) in float64: E[x²] − E[x]² would cancel.
    """
    counted = x.double().masked_fill(~mask, 0.0)
    totals = torch.stack([counted.sum(), mask.sum().double()])
    torch.distributed.all_reduce(totals)
    count = totals[1].clamp_min(1)
    mean = totals[0] / count
    variance = (counted - mean).masked_fill(~mask, 0.0).square().sum()
    torch.distributed.all_reduce(variance)
    return mean.float(), (variance / count + eps).sqrt().float()
