"""Rewards, generalized advantages and whitening in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kl import _wide, kl_penalty

EPS = 1e-8  # added to the variance before the square root


class RewardsAndAdvantages(NamedTuple):
    """What :func:`fastppo.ops.rewards_and_advantages` returns; all (B, T), float32, 0 where masked."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`fastppo.ops.gae`."""
    rewards, values = _wide(rewards), _wide(values)
    advantage = torch.zeros_like(rewards[:, 0]) if rewards.size(1) else rewards.new_zeros(rewards.size(0))
    next_value = advantage if bootstrap_values is None else _wide(bootstrap_values)
    columns = []
    for t in reversed(range(rewards.size(1))):
        counts = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A token that does not count neither decays nor feeds the sum: both carries pass through it
        # unchanged.
        advantage = torch.where(counts, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    advantages = torch.where(response_mask, advantages, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def _mean_and_inverse_std(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum() / count
    variance = torch.where(mask, (x - mean) ** 2, 0.0).sum() / count
    return mean, (variance + EPS).rsqrt()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Twin of :func:`fastppo.ops.whiten`."""
    x = torch.where(mask, _wide(x), 0.0)
    mean, inverse_std = _mean_and_inverse_std(x, mask)
    return torch.where(mask, (x - mean) * inverse_std, 0.0)


def scale_to_unit_std(x: Tensor, mask: Tensor) -> Tensor:
    """Twin of :func:`fastppo.ops.scale_to_unit_std`."""
    x = torch.where(mask, _wide(x), 0.0)
    mean, inverse_std = _mean_and_inverse_std(x, mask)
    return torch.where(mask, (x - mean) * inverse_std + mean, 0.0)


def rewards_and_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float = 0.05,
    estimator: str = "k1",
    reward_clip: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
) -> RewardsAndAdvantages:
    """Twin of :func:`fastppo.ops.rewards_and_advantages`."""
    kl = torch.where(response_mask, kl_penalty(logprobs, ref_logprobs, estimator=estimator), 0.0)
    scores = _wide(scores)
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip, reward_clip)
    tokens_from_here = response_mask.flip(1).cumsum(1).flip(1)
    is_last = response_mask & (tokens_from_here == 1)
    rewards = -kl_coef * kl + torch.where(is_last, scores[:, None], 0.0)
    if whiten_rewards:
        rewards = scale_to_unit_std(rewards, response_mask)
    advantages, returns = gae(
        rewards, values, response_mask, gamma=gamma, lam=lam, bootstrap_values=bootstrap_values
    )
    if whiten_advantages:
        advantages = whiten(advantages, response_mask)
    return RewardsAndAdvantages(rewards, kl, advantages, returns)
