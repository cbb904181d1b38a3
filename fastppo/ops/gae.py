"""Rewards, generalized advantages and whitening, each in one call.

Everything here makes constants for the policy gradient: results carry no autograd history.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.gae import RewardsAndAdvantages
from ._library import library  # noqa: F401  registers torch.ops.fastppo

__all__ = ["RewardsAndAdvantages", "gae", "rewards_and_advantages", "scale_to_unit_std", "whiten"]


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over responses (Schulman et al. 2016, arXiv:1506.02438, equation 16).

    ::

        delta[t]      = rewards[t] + gamma * values[next(t)] - values[t]
        advantages[t] = delta[t] + gamma * lam * advantages[next(t)]
        returns[t]    = advantages[t] + values[t]

    ``next(t)`` is the next token that counts. Tokens in between that do not count (an environment's
    observations) neither decay the sum nor lend it their value. After a row's last token that counts, the
    value is ``bootstrap_values`` and the advantage 0.

    Args:
        rewards: (B, T) float32, bfloat16 or float16; one reward per token.
        values: (B, T), any of these dtypes; the critic's estimates, in the unit of the rewards.
        response_mask: (B, T) bool, True = this token counts. Masked places are never read into the sums, so
            they may hold NaN.
        gamma: discount per token, from 0 to 1.
        lam: decay of the estimator, from 0 (one-step) to 1 (Monte Carlo).
        bootstrap_values: (B,) floating, the value after each row's last token, for responses that were cut
            short. None: 0 everywhere, the end is terminal.

    Returns:
        (advantages, returns), both (B, T) float32 and 0 where masked.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message names it.
    """
    return torch.ops.fastppo.gae.default(
        rewards.detach(), values.detach(), response_mask, gamma, lam, _detached(bootstrap_values)
    )


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1: ``(x - mean) / sqrt(variance + 1e-8)``.

    Mean and population variance (divided by the count, not the count less one) are over the places that
    count, in float64. A single place becomes 0.

    Args:
        x: any shape, float32, bfloat16 or float16.
        mask: shape of ``x``, bool, True = counts.

    Returns:
        Shape of ``x``, float32, 0 where masked.

    Raises:
        ValueError: a shape, dtype or device is not as above; the message names it.
    """
    return torch.ops.fastppo.whiten.default(x.detach(), mask)


def scale_to_unit_std(x: Tensor, mask: Tensor) -> Tensor:
    """Scale to variance 1 and keep the mean: ``(x - mean) / sqrt(variance + 1e-8) + mean``.

    Arguments, result and errors are those of :func:`whiten`. A single place keeps its value.
    """
    return torch.ops.fastppo.scale_to_unit_std.default(x.detach(), mask)


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
    """Everything between scoring and the update: KL, KL-shaped rewards, GAE, whitening, in one call.

    ::

        kl[t]      = kl_penalty(logprobs, ref_logprobs, estimator)[t]
        rewards[t] = -kl_coef * kl[t]  (+ score, clipped to +-reward_clip, at the last token that counts)
        rewards    = scale_to_unit_std(rewards)        if whiten_rewards
        advantages, returns = gae(rewards, values)
        advantages = whiten(advantages)                if whiten_advantages

    The shaping is that of Ziegler et al. 2019, arXiv:1909.08593, section 2.

    Args:
        scores: (B,) floating, one number per response. The score of a row without any token that counts is
            ignored.
        logprobs: (B, T) floating, log-probs of the sampled tokens under the policy that drew them, in nats.
        ref_logprobs: (B, T) floating, the same under the reference.
        values: (B, T) floating, the critic's estimates.
        response_mask: (B, T) bool, True = counts.
        kl_coef: reward lost per nat.
        estimator: "k1", "abs", "k2" or "k3"; see :func:`fastppo.ops.kl_penalty`.
        reward_clip: scores are clipped to this many units either side of 0. None: not at all.
        whiten_rewards: scale rewards to unit variance over all tokens that count, keeping their mean.
        whiten_advantages: shift and scale advantages to mean 0 and variance 1. Returns are of those before
            it.
        gamma: as in :func:`gae`.
        lam: as in :func:`gae`.
        bootstrap_values: as in :func:`gae`.

    Returns:
        ``RewardsAndAdvantages(rewards, kl, advantages, returns)``, all (B, T) float32 and 0 where masked.

    Raises:
        ValueError: a shape, dtype, device, number or the estimator is not as above; the message names it.
    """
    return RewardsAndAdvantages(
        *torch.ops.fastppo.rewards_and_advantages.default(
            scores.detach(),
            logprobs.detach(),
            ref_logprobs.detach(),
            values.detach(),
            response_mask,
            kl_coef,
            estimator,
            reward_clip,
            whiten_rewards,
            whiten_advantages,
            gamma,
            lam,
            _detached(bootstrap_values),
        )
    )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _float_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("fastppo::gae")
def _(rewards, values, response_mask, gamma, lam, bootstrap_values=None):  # type: ignore[no-untyped-def]
    return _float_like(rewards), _float_like(rewards)


@torch.library.register_fake("fastppo::whiten")
def _(x, mask):  # type: ignore[no-untyped-def]
    return _float_like(x)


@torch.library.register_fake("fastppo::scale_to_unit_std")
def _(x, mask):  # type: ignore[no-untyped-def]
    return _float_like(x)


@torch.library.register_fake("fastppo::rewards_and_advantages")
def _(scores, logprobs, *others):  # type: ignore[no-untyped-def]
    return tuple(_float_like(logprobs) for _ in range(4))
