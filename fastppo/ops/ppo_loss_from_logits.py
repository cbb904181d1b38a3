"""The clipped PPO loss and its gradient from logits: one read of them and one write of their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.ppo_loss import PPOStats
from ._library import call, register_autograd, scaled

__all__ = ["ppo_loss_from_logits"]


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
    """:func:`fastppo.ops.ppo_loss` of :func:`fastppo.ops.logprobs`, in one pass over the logits.

    Equivalent to::

        new_logprobs, entropy = logprobs(logits, ids, temperature=temperature)
        loss, stats = ppo_loss(new_logprobs, ..., entropy=entropy, ...)

    but each row is read once: log-prob, entropy, the token's loss and the gradient of the logits come from it while
    it is in shared memory (or in a cache of the CPU). The backward then has nothing left to compute. The gradient
    is a tensor like ``logits`` that lives from forward to backward; the logits themselves may go.

    The gradient is computed for a loss whose own gradient is 1, as ``loss.backward()`` has it, and rounded to the
    dtype of ``logits``. With another one, for example where the loss was divided by the number of micro-batches, the
    backward multiplies it in place: one more read and write, and one more rounding. ``normalizer`` does without. A
    loss scaler's large factor comes after the rounding and rescues nothing in float16. With ``retain_graph=True``
    the backward gives a copy, so that it can run again.

    Args:
        logits: (..., V) float32, bfloat16 or float16. Any strides but the last, which must be 1. Differentiable,
            once. Rows that do not count are not read.
        ids: (...) int64, each in [0, V) where it counts; the sampled tokens.
        logprobs: (...), like all that follow, float32, bfloat16 or float16; log-probs of ``ids`` under the policy
            that drew them, in nats and at the same temperature.
        advantages: as they come from :func:`fastppo.ops.rewards_and_advantages`.
        response_mask: bool, True = counts. Masked places may hold NaN everywhere, and any id.
        temperature: divides the logits, above 0.
        new_values: estimates of the critic being trained. Differentiable. None: no value loss.
        values: the critic's estimates at rollout; needed with ``new_values``.
        returns: targets of the critic; needed with ``new_values``.
        clip_range: how far the ratio may fall below 1 before the gain is cut.
        clip_range_high: how far it may rise above 1. None: ``clip_range``.
        dual_clip: above 1. Bounds the loss where the advantage is negative and the ratio is large. None: unbounded.
        value_clip_range: how far ``new_values`` may move from ``values``; infinity for no clipping.
        vf_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of a KL term in the loss itself (rather than in the rewards).
        ref_logprobs: log-probs under the reference. Needed when ``kl_coef`` is not 0; else only measures ``kl``.
        kl_estimator: "k1", "abs", "k2" or "k3"; see :func:`fastppo.ops.kl_penalty`.
        normalizer: number or 0-d tensor above 0. None: how many tokens count here, at least 1. A CUDA tensor is
            read on the device and nothing waits for it: where it is not above 0 and finite, loss, stats and
            gradients are NaN.

    Returns:
        (loss, stats): a 0-d float32 tensor, and :class:`PPOStats`. Sources are given at
        :func:`fastppo.ops.ppo_loss`. On CUDA an id out of range gives NaN.

    Raises:
        ValueError: a shape, dtype, device, number or the estimator is not as above, or an input that a
            coefficient needs is missing; the message names it.
    """
    number, tensor = (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)
    loss, stats, _, _ = call(
        torch.ops.fastppo.ppo_loss_from_logits.default,
        logits,
        ids,
        logprobs,
        advantages,
        response_mask,
        new_values,
        values,
        returns,
        ref_logprobs,
        tensor,
        temperature,
        clip_range,
        clip_range if clip_range_high is None else clip_range_high,
        dual_clip,
        value_clip_range,
        vf_coef,
        entropy_coef,
        kl_coef,
        kl_estimator,
        torch.is_grad_enabled() and logits.requires_grad,
        number,
    )
    return loss, PPOStats(stats)


_LOGITS, _NEW_VALUES, _NEEDS_LOGITS, _INPUTS = 0, 5, 19, 21  # places in the schema


@torch.library.register_fake("fastppo::ppo_loss_from_logits")
def _(*inputs):  # type: ignore[no-untyped-def]
    logits, new_values = inputs[_LOGITS], inputs[_NEW_VALUES]

    def empty(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    return (
        empty(),
        empty(len(PPOStats._fields)),
        logits.new_empty(logits.shape if inputs[_NEEDS_LOGITS] else (0,)),
        empty(0) if new_values is None else empty(*new_values.shape),
    )


@torch.library.register_fake("fastppo::scale_")
def _(x, factor):  # type: ignore[no-untyped-def]
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, grad_logits, grad_new_values = output
    ctx.save_for_backward(grad_logits, grad_new_values)
    ctx.values_dtype = None if inputs[_NEW_VALUES] is None else inputs[_NEW_VALUES].dtype
    ctx.mark_non_differentiable(stats, grad_logits, grad_new_values)
    ctx.set_materialize_grads(False)  # zeros the size of the logits


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * _INPUTS
    if grad_loss is None:
        return tuple(out)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ppo_loss_from_logits is differentiable once: its gradient has no gradient of its own"
        )
    grad_logits, grad_new_values = ctx.saved_tensors
    if ctx.needs_input_grad[_LOGITS]:
        out[_LOGITS] = scaled(ctx, grad_logits, grad_loss)
    if ctx.needs_input_grad[_NEW_VALUES]:
        out[_NEW_VALUES] = (grad_loss * grad_new_values).to(ctx.values_dtype)
    return tuple(out)


register_autograd("ppo_loss_from_logits", _backward, setup_context=_setup_context)
