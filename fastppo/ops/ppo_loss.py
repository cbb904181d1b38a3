"""The clipped PPO loss: value, every metric and every gradient in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.ppo_loss import PPOStats
from ._library import call, register_autograd, scaled

__all__ = ["PPOStats", "ppo_loss"]


def ppo_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    new_values: Tensor | None = None,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
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
    """Clipped PPO loss (Schulman et al. 2017, arXiv:1707.06347, equations 7 and 9).

    With ``ratio = exp(new_logprobs - logprobs)``, A the advantages and R the returns::

        policy_loss = mean max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range_high))
                      (where A < 0 at most -dual_clip A, when dual_clip is given)
        value_loss  = mean max((new_values - R)^2, (clip(new_values, values +- value_clip_range) - R)^2) / 2
        loss        = policy_loss + vf_coef value_loss - entropy_coef mean entropy + kl_coef mean kl

    Every mean is the sum over tokens that count, divided by ``normalizer``. With the token count of a whole
    optimizer step as normalizer, the gradient does not depend on how the step is split into micro-batches or
    ranks.

    Args:
        new_logprobs: any shape, (B, T) or packed (N,), float32, bfloat16 or float16; log-probs of the sampled
            tokens under the policy being trained, in nats. Differentiable.
        logprobs: the same shape, like all that follow; log-probs under the policy that drew them.
        advantages: as they come from :func:`fastppo.ops.rewards_and_advantages`.
        response_mask: bool, True = counts. Masked places may hold NaN everywhere.
        new_values: estimates of the critic being trained. Differentiable. None: no value loss.
        values: the critic's estimates at rollout; needed with ``new_values``.
        returns: targets of the critic; needed with ``new_values``.
        entropy: entropy of the policy at each token, in nats. Differentiable. Needed when ``entropy_coef`` is
            not 0.
        clip_range: how far the ratio may fall below 1 before the gain is cut.
        clip_range_high: how far it may rise above 1. None: ``clip_range``. Larger values are the
            "clip-higher" of Yu et al. 2025, arXiv:2503.14476.
        dual_clip: above 1. Bounds the loss where A < 0 and the ratio is large (Ye et al. 2020,
            arXiv:1912.09729, equation 5). None: unbounded.
        value_clip_range: how far ``new_values`` may move from ``values``; infinity for no clipping.
        vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of a KL term in the loss itself (rather than in the rewards).
        ref_logprobs: log-probs under the reference. Needed when ``kl_coef`` is not 0; else only measures
            ``kl``.
        kl_estimator: "k1", "abs", "k2" or "k3"; see :func:`fastppo.ops.kl_penalty`.
        normalizer: number or 0-d tensor above 0. None: how many tokens count here, at least 1. A CUDA tensor is
            read on the device and nothing waits for it: where it is not above 0 and finite, loss, stats and
            gradients are NaN.

    Returns:
        (loss, stats): a 0-d float32 tensor, and :class:`PPOStats`.

    Raises:
        ValueError: a shape, dtype, device, number or the estimator is not as above, or an input that a
            coefficient needs is missing; the message names it.
    """
    number, tensor = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
    loss, stats, _ = call(
        torch.ops.fastppo.ppo_loss.default,
        new_logprobs,
        logprobs,
        advantages,
        response_mask,
        new_values,
        values,
        returns,
        entropy,
        ref_logprobs,
        tensor,
        clip_range,
        clip_range if clip_range_high is None else clip_range_high,
        dual_clip,
        value_clip_range,
        vf_coef,
        entropy_coef,
        kl_coef,
        kl_estimator,
        number,
    )
    return loss, PPOStats(stats)


_NEW_LOGPROBS, _NEW_VALUES, _ENTROPY, _INPUTS = 0, 4, 7, 19  # places in the schema
_TRAINED = (
    _NEW_LOGPROBS,
    _NEW_VALUES,
    _ENTROPY,
)  # those that were given have a row each in the op's gradients


@torch.library.register_fake("fastppo::ppo_loss")
def _(*inputs):  # type: ignore[no-untyped-def]
    new_logprobs = inputs[_NEW_LOGPROBS]
    rows = sum(inputs[place] is not None for place in _TRAINED)
    shapes = ((), (len(PPOStats._fields),), (rows, *new_logprobs.shape))
    return tuple(new_logprobs.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, grads = output
    ctx.save_for_backward(grads)
    ctx.places = [(place, inputs[place].dtype) for place in _TRAINED if inputs[place] is not None]
    ctx.mark_non_differentiable(stats, grads)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * _INPUTS
    if grad_loss is None:
        return tuple(out)
    if torch.is_grad_enabled():
        raise RuntimeError("ppo_loss is differentiable once: its gradient has no gradient of its own")
    (grads,) = ctx.saved_tensors
    grads = scaled(ctx, grads, grad_loss)
    for (place, dtype), grad in zip(ctx.places, grads.unbind(), strict=True):
        if ctx.needs_input_grad[place]:
            out[place] = grad if dtype == torch.float32 else grad.to(dtype)
    return tuple(out)


register_autograd("ppo_loss", _backward, setup_context=_setup_context)
