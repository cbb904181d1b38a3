"""Log-probabilities of chosen tokens straight from hidden states: the logits never exist in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import call, register_autograd

__all__ = ["linear_logprobs"]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``ids`` and entropies under a language-model head, without its ``[N, V]`` logits.

    ::

        logits = logit_scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)             if softcap is given
        logprobs, entropy = fastppo.ops.logprobs(logits, ids, temperature=temperature)

    Forward and backward walk the vocabulary in tiles whose logits stay in the cache; the backward computes
    them a second time. Memory beyond the gradients stays below 64 MB at N = 4096, V = 151936. Rows whose
    incoming gradients are both 0 (clipped or masked tokens) are left out of the backward's matrix products
    and get exact zeros; on CUDA, where only the device knows how many they are, the products are computed
    with zeros in their place and are not shorter. Gradients are summed in float32; only those that are
    required are computed, so a frozen ``weight`` costs nothing. The products are in the dtype of ``hidden``:
    in bfloat16 a logit is rounded as a bfloat16 ``lm_head`` rounds it. They are torch's own, and are as
    reproducible across thread counts as those; everything else is bit for bit.

    Args:
        hidden: (N, H) float32, bfloat16 or float16.
        weight: (V, H), dtype of ``hidden``; may be the tied embedding.
        ids: (N,) int64, each in [0, V). On CUDA, where looking at them would wait for the device, one that
            is not gives a logprob of NaN; nothing is read at it.
        bias: (V,), dtype of ``hidden``, or None.
        temperature: divides the final logits, above 0.
        softcap: bound of the logits, above 0 (Gemma 2: 30), or None.
        logit_scale: factor on the product, before the cap (Cohere's ``logit_scale``; 1 / ``logits_scaling``
            of Granite).

    Returns:
        (logprobs, entropy), both (N,) float32, in nats. Differentiable in ``hidden``, ``weight`` and
        ``bias``, once.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message names it, and for ``ids``
            on the CPU the first bad position.
    """
    return call(
        torch.ops.fastppo.linear_logprobs.default,
        hidden,
        weight,
        ids,
        bias,
        temperature,
        softcap,
        logit_scale,
    )[:2]


@torch.library.register_fake("fastppo::linear_logprobs")
def _(hidden, weight, ids, bias, temperature, softcap, logit_scale):  # type: ignore[no-untyped-def]
    return tuple(hidden.new_empty(ids.shape, dtype=torch.float32) for _ in range(4))


@torch.library.register_fake("fastppo::linear_logprobs_backward")
def _(grad_logprobs, grad_entropy, hidden, weight, *others):  # type: ignore[no-untyped-def]
    needs_hidden, needs_weight, needs_bias = others[-3:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty((weight.shape[0] if needs_bias else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, bias, *ctx.numbers = inputs
    _, entropy, reference, log_sum = output
    ctx.save_for_backward(hidden, weight, ids, bias, entropy, reference, log_sum)
    ctx.mark_non_differentiable(reference, log_sum)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 7
    grad_hidden, grad_weight, grad_bias = call(
        torch.ops.fastppo.linear_logprobs_backward.default,
        grad_logprobs,
        grad_entropy,
        *ctx.saved_tensors,
        *ctx.numbers,
        needs_hidden,
        needs_weight,
        needs_bias,
    )
    return (
        grad_hidden if needs_hidden else None,
        grad_weight if needs_weight else None,
        None,
        grad_bias if needs_bias else None,
        None,
        None,
        None,
    )


register_autograd("linear_logprobs", _backward, setup_context=_setup_context)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("linear_logprobs is differentiable once: its gradient has no gradient of its own")


register_autograd("linear_logprobs_backward", _refuse)
