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
    lam_critic: float | None = None,
    full_kl: Tensor | None = None,
    turn_rewards: Tensor | None = None,
) -> RewardsAndAdvantages:
    """`ops.rewards_and_advantages`, with statistics of whitening taken over the batch of all ranks.

    On one process this is the op itself, in one launch. On several, the op runs without whitening and the moments
    are summed over ranks, so that N ranks give what one rank gives on the joined batch.

    In dialogues, `turn_rewards` (B, T) float32 are added where they stand, each clipped to +-`reward_clip`, and what
    follows from the rewards is computed from the sum.

    Beyond the op: `lam_critic` is the lambda of the returns, where it is not that of the advantages (VC-PPO, Yuan et
    al. 2025, arXiv:2503.01491: a critic that regresses on Monte Carlo returns, 1, is not biased by its own start).
    With the estimator "full", `full_kl` is the exact KL at each token, (B, T) float32.
    """
    if estimator == "full":
        assert full_kl is not None
        # k1 is logprobs - ref_logprobs: of the KL and 0, the KL itself.
        logprobs, ref_logprobs, estimator = full_kl, torch.zeros_like(full_kl), "k1"
    settings = {
        "kl_coef": kl_coef,
        "estimator": estimator,
        "reward_clip": reward_clip,
        "gamma": gamma,
        "lam": lam,
    }
    at_once = turn_rewards is None and not _distributed()
    rewards, kl, advantages, returns = ops.rewards_and_advantages(
        scores,
        logprobs,
        ref_logprobs,
        values,
        response_mask,
        whiten_rewards=whiten_rewards and at_once,
        whiten_advantages=whiten_advantages and at_once,
        **settings,  # type: ignore[arg-type]
    )
    if turn_rewards is not None:
        if reward_clip is not None:
            turn_rewards = turn_rewards.clamp(-reward_clip, reward_clip)
        rewards = rewards + turn_rewards.masked_fill(~response_mask, 0.0)
    if whiten_rewards and not at_once:
        mean, std = all_ranks_moments(rewards, response_mask)
        rewards = ((rewards - mean) / std + mean).masked_fill(~response_mask, 0.0)
    if turn_rewards is not None or (whiten_rewards and not at_once):
        advantages, returns = ops.gae(rewards, values, response_mask, gamma=gamma, lam=lam)
    if whiten_advantages and not at_once:
        mean, std = all_ranks_moments(advantages, response_mask)
        advantages = ((advantages - mean) / std).masked_fill(~response_mask, 0.0)
    if lam_critic is not None and lam_critic != lam:
        _, returns = ops.gae(rewards, values, response_mask, gamma=gamma, lam=lam_critic)
    return RewardsAndAdvantages(rewards, kl, advantages, returns)


def importance_weights(logprobs: Tensor, sampling_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling (Yao et al. 2025, fengyao.notion.site/off-policy-rl): min(p_train / p_sample, cap).

    The policy loss is proportional to the advantage at any ratio, clipped, dual-clipped or not, so advantages times
    these weights are the weighted loss.

    Args:
        logprobs: of the sampled tokens on the path that training takes, in nats.
        sampling_logprobs: the same shape, on the path that generated them.
        cap: largest weight, above 0.
    """
    return (logprobs - sampling_logprobs).exp().clamp_max(cap)


def _distributed() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def _sum_over_ranks(x: Tensor) -> None:
    if _distributed():
        torch.distributed.all_reduce(x)


def all_ranks_moments(x: Tensor, mask: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation sqrt(variance + eps) of the counted elements of all ranks, as float32 scalars.

    Two passes (the mean, then squared distances to it) in float64: E[x²] − E[x]² would cancel.
    """
    counted = x.double().masked_fill(~mask, 0.0)
    totals = torch.stack([counted.sum(), mask.sum().double()])
    _sum_over_ranks(totals)
    count = totals[1].clamp_min(1)
    mean = totals[0] / count
    variance = (counted - mean).masked_fill(~mask, 0.0).square().sum()
    _sum_over_ranks(variance)
    return mean.float(), (variance / count + eps).sqrt().float()
