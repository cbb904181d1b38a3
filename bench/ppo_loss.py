"""The loss with every metric and every gradient: one pass, against forward and backward in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import MODES, quick, reading, sizes, with_compiled
from bench.peers import trl_ppo_loss
from fastppo import ops, reference

CLIP, VALUE_CLIP, VF_COEF, ENTROPY_COEF, KL_COEF = 0.2, 0.2, 0.1, 0.01, 0.05
Loss = Callable[..., tuple[Tensor, Any]]  # the metrics: nine tensors, or what reads like them


def by(loss: Loss) -> Loss:
    """`loss` with the four terms of the benchmark, as a function of tensors alone."""

    def run(
        new_logprobs: Tensor,
        new_values: Tensor,
        entropy: Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return loss(
            *(new_logprobs, logprobs, advantages, mask),
            new_values=new_values,
            values=values,
            returns=returns,
            entropy=entropy,
            entropy_coef=ENTROPY_COEF,
            ref_logprobs=ref_logprobs,
            kl_coef=KL_COEF,
        )

    return run


def lean(
    new_logprobs: Tensor,
    new_values: Tensor,
    entropy: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same terms and metrics in as few operations as we found; masked places must hold numbers."""
    weight = mask / mask.sum()
    log_ratio = new_logprobs - logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    policy_loss = (torch.maximum(unclipped, clipped) * weight).sum()
    error = (new_values - returns).square()
    clipped_error = (values + (new_values - values).clamp(-VALUE_CLIP, VALUE_CLIP) - returns).square()
    value_loss = 0.5 * (torch.maximum(error, clipped_error) * weight).sum()
    entropy_mean = (entropy * weight).sum()
    difference = ref_logprobs - new_logprobs
    kl = ((torch.expm1(difference) - difference) * weight).sum()
    loss = policy_loss + VF_COEF * value_loss - ENTROPY_COEF * entropy_mean + KL_COEF * kl
    with torch.no_grad():
        stats = (
            *(policy_loss.detach(), value_loss.detach(), entropy_mean.detach(), kl.detach()),
            0.5 * (log_ratio.square() * weight).sum(),
            ((clipped > unclipped) * weight).sum(),
            ((clipped_error > error) * weight).sum(),
            (ratio * weight).sum(),
            (ratio * mask).amax(),
        )
    return loss, stats


def policy_and_value(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    """`loss` with the two terms, and the metrics, that TRL has."""

    def run(
        new_logprobs: Tensor,
        new_values: Tensor,
        logprobs: Tensor,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        total, stats = loss(
            *(new_logprobs, logprobs, advantages, mask),
            new_values=new_values,
            values=values,
            returns=returns,
        )
        policy_loss, value_loss, _, _, approx_kl, clip_fraction, value_clip_fraction, ratio, _ = stats
        return total, policy_loss, value_loss, approx_kl, clip_fraction, value_clip_fraction, ratio

    return run


class WithGradients:
    """A loss, and its gradients for the first `count` arguments. `compiled(mode)` compiles what is inside."""

    def __init__(self, loss: Callable[..., tuple[Any, ...]], count: int) -> None:
        self.loss, self.count = loss, count

    def __call__(self, *args: Tensor) -> tuple[Any, ...]:
        results = self.loss(*args)
        return results, torch.autograd.grad(results[0], args[: self.count])

    def compiled(self, mode: str) -> WithGradients:
        return WithGradients(with_compiled(self.loss, mode), self.count)


def step(b: int, t: int) -> Tensor:
    """How far the update has moved log-probs or values: never onto the edge of a clip, where rounding decides."""
    moved = 0.1 * torch.randn(b, t)
    edges = (math.log(1 - CLIP), math.log(1 + CLIP), -VALUE_CLIP, VALUE_CLIP)
    for edge in edges:
        moved = torch.where((moved - edge).abs() < 1e-4, 0.0, moved)
    return moved


def inputs(b: int, t: int, full: bool = False) -> tuple[Tensor, ...]:
    logprobs, values = -torch.rand(b, t), torch.randn(b, t)
    new_logprobs = (logprobs + step(b, t)).requires_grad_()
    new_values = (values + step(b, t)).requires_grad_()
    entropy = torch.rand(b, t).requires_grad_()
    mask = torch.arange(t) < (t if full else torch.randint(1, t + 1, (b, 1)))
    ref_logprobs = logprobs + 0.1 * torch.randn(b, t)
    advantages, returns = torch.randn(b, t), values + torch.randn(b, t)
    return (
        *(new_logprobs, new_values, entropy, logprobs, ref_logprobs, values, advantages, returns),
        mask.expand(b, t).contiguous(),
    )


def trl_inputs(b: int, t: int, full: bool = False) -> tuple[Tensor, ...]:
    new_logprobs, new_values, _, logprobs, _, *others = inputs(b, t, full)
    return new_logprobs, new_values, logprobs, *others


@sizes("b, t, modes", quick(64, 512, MODES), (16, 53, MODES[:1]), (256, 1024, ()))
def bench_ppo_loss(measure: Callable[..., None], b: int, t: int, modes: tuple[str, ...]) -> None:
    count = 3  # gradients: of new_logprobs, new_values, entropy
    measure(
        "ppo_loss with gradients",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: inputs(b, t),
        ours=WithGradients(by(ops.ppo_loss), count),
        eager={
            "lean": WithGradients(lean, count),
            "reference": WithGradients(by(reference.ppo_loss), count),
        },
        compiled=WithGradients(lean, count),
        modes=modes,
        floors=reading(45 * b * t),
        bytes_moved=45 * b * t,
        hot=True,
        memory=True,
    )


@sizes("b, t", (64, 512))
def bench_ppo_loss_trl(measure: Callable[..., None], b: int, t: int) -> None:
    """The terms that TRL's loss has: policy and value."""
    measure(
        "ppo_loss, policy and value",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: trl_inputs(b, t),
        ours=WithGradients(policy_and_value(ops.ppo_loss), 2),
        eager={"reference": WithGradients(policy_and_value(reference.ppo_loss), 2)},
        peers={"TRL 1.12": WithGradients(trl_ppo_loss(), 2)},
        floors=reading(33 * b * t),
        bytes_moved=33 * b * t,
        peers_agree_on=lambda: trl_inputs(b, t, full=True),
        hot=True,
    )


@sizes("b, t", quick(1, 8))
def bench_ppo_loss_call(measure: Callable[..., None], b: int, t: int) -> None:
    measure(
        "ppo_loss call",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: tuple(x.detach() for x in inputs(b, t)),
        ours=by(ops.ppo_loss),
        hot=True,
    )
