"""Advantages and returns alone, whitening, and the whole way from scores to whitened advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bench.measure import MODES, quick, reading, readme, sizes
from bench.peers import trl_gae, trl_rewards_and_advantages, trl_whiten
from fastppo import ops, reference

GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.05


def lengths_mask(b: int, t: int) -> Tensor:
    """Responses of 1 to T tokens, padded on the right."""
    return torch.arange(t) < torch.randint(1, t + 1, (b, 1))


# Plain torch for responses without gaps, which is less than our op does: a token's successor is the next column.


@cache
def decay(t: int) -> Tensor:
    """[j, t] = (gamma lambda)^(j - t) for j >= t: GAE as one matrix product. A trainer makes it once."""
    distance = torch.arange(t)[:, None] - torch.arange(t)
    return torch.where(distance >= 0, (GAMMA * LAM) ** distance.clamp(min=0), 0.0)


def deltas(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.where(mask, values, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return torch.where(mask, rewards + GAMMA * following - values, 0.0), values


def by_matrix(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The time loop as a product with a triangular matrix."""
    delta, values = deltas(rewards, values, mask)
    advantages = delta @ decay(mask.shape[1])
    return advantages, advantages + values


def by_doubling(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The time loop as log2(T) shifts: after step k each place holds the sum of 2^k terms."""
    advantages, values = deltas(rewards, values, mask)
    shift = 1
    while shift < mask.shape[1]:
        rest = torch.nn.functional.pad(advantages[:, shift:], (0, shift))
        advantages = torch.add(advantages, rest, alpha=(GAMMA * LAM) ** shift)
        shift *= 2
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    x = torch.where(mask, x, 0.0)
    mean = x.sum() / count
    centered = torch.where(mask, x - mean, 0.0)
    return centered * torch.rsqrt(centered.square().sum() / count + 1e-8)


def shaped(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    rewards = -KL_COEF * kl
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards, kl


def everything(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, kl = shaped(scores, logprobs, ref_logprobs, mask)
    advantages, returns = by_matrix(rewards, values, mask)
    return rewards, kl, whiten(advantages, mask), torch.where(mask, returns, 0.0)


def everything_by_doubling(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, kl = shaped(scores, logprobs, ref_logprobs, mask)
    advantages, returns = by_doubling(rewards, values, mask)
    return rewards, kl, whiten(advantages, mask), torch.where(mask, returns, 0.0)


def gae_inputs(b: int, t: int, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.ones(b, t, dtype=torch.bool) if full else lengths_mask(b, t)
    return torch.randn(b, t), torch.randn(b, t), mask


def inputs(b: int, t: int, full: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rewards, values, mask = gae_inputs(b, t, full)
    return torch.randn(b), -rewards.abs(), -torch.rand(b, t), values, mask


# TRL puts the score one token later and divides the variance by one less: compared on whole rows, to 3 digits.
TOLERANCE = {"TRL 1.12": 5e-3}


@sizes("b, t, modes", readme(64, 512, MODES), (16, 53, ()), (256, 1024, ()))
def bench_gae(measure: Callable[..., None], b: int, t: int, modes: tuple[str, ...]) -> None:
    measure(
        "gae",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: gae_inputs(b, t),
        ours=ops.gae,
        eager={"matrix": by_matrix, "doubling": by_doubling, "loop": reference.gae},
        compiled=by_doubling,
        modes=modes,
        peers={"TRL 1.12": trl_gae()},
        floors=reading(17 * b * t),
        bytes_moved=17 * b * t,
        tolerance=TOLERANCE,
        peers_agree_on=lambda: gae_inputs(b, t, full=True),
        hot=True,
    )


@sizes("b, t, modes", quick(64, 512, MODES), (16, 53, MODES[:1]), (256, 1024, ()))
def bench_rewards_and_advantages(
    measure: Callable[..., None], b: int, t: int, modes: tuple[str, ...]
) -> None:
    measure(
        "rewards_and_advantages",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: inputs(b, t),
        ours=ops.rewards_and_advantages,
        eager={
            "matrix": everything,
            "doubling": everything_by_doubling,
            "loop": reference.rewards_and_advantages,
        },
        compiled=everything_by_doubling,
        modes=modes,
        peers={"TRL 1.12": trl_rewards_and_advantages()},
        floors=reading(29 * b * t),
        bytes_moved=29 * b * t,
        tolerance=TOLERANCE,
        peers_agree_on=lambda: inputs(b, t, full=True),
        hot=True,
        memory=True,
    )


@sizes("b, t, modes", (64, 512, MODES[:1]))
def bench_whiten(measure: Callable[..., None], b: int, t: int, modes: tuple[str, ...]) -> None:
    measure(
        "whiten",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: (torch.randn(b, t), lengths_mask(b, t)),
        ours=ops.whiten,
        eager={"whiten": whiten},
        compiled=whiten,
        modes=modes,
        peers={"TRL 1.12": trl_whiten()},
        floors=reading(9 * b * t),
        bytes_moved=9 * b * t,
        tolerance=TOLERANCE,
        hot=True,
    )


@sizes("b, t", quick(1, 8))
def bench_gae_call(measure: Callable[..., None], b: int, t: int) -> None:
    measure("gae call", f"[{b}, {t}]", torch.float32, inputs=lambda: gae_inputs(b, t), ours=ops.gae, hot=True)


@sizes("b, t", quick(1, 8))
def bench_rewards_and_advantages_call(measure: Callable[..., None], b: int, t: int) -> None:
    measure(
        "rewards_and_advantages call",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: inputs(b, t),
        ours=ops.rewards_and_advantages,
        hot=True,
    )


@sizes("b, t", quick(1, 8))
def bench_whiten_call(measure: Callable[..., None], b: int, t: int) -> None:
    measure(
        "whiten call",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: (torch.randn(b, t), lengths_mask(b, t)),
        ours=ops.whiten,
        hot=True,
    )
