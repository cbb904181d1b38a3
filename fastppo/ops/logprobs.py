"""Log-probabilities of chosen tokens and entropies of their rows, from logits that already exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import call, register_autograd

__all__ = ["logprobs"]


def logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``ids`` and entropies of their rows, under ``softmax(logits / temperature)``.

    ::

        logprobs[...] = log_softmax(logits / temperature)[..., ids]
        entropy[...]  = -sum(p * log p),  p = softmax(logits / temperature)

    One read of the logits forward, one read and one write backward; sums in float32 and wider, and nothing of
    the size of the logits is kept for the backward but the logits themselves. Rows whose incoming gradients
    are both 0 get exact zeros, whatever they hold.

    Args:
        logits: (..., V) float32, bfloat16 or float16. Any strides but the last, which must be 1. A logit of
            -inf is a token that cannot occur: it adds nothing to the entropy and gets a gradient of 0.
        ids: (...) int64, each in [0, V). On CUDA, where looking at them would wait for the device, one that
            is not gives a logprob of NaN; nothing is read at it.
        temperature: divides the logits, above 0.

    Returns:
        (logprobs, entropy), both (...) float32, in nats. Differentiable in ``logits``, once. A row with NaN
        or +inf, or of only -inf, gives NaN.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message names it, and for ``ids``
            on the CPU the first bad position.
    """
    return call(torch.ops.fastppo.logprobs.default, logits, ids, temperature)[:2]


@torch.library.register_fake("fastppo::logprobs")
def _(logits, ids, temperature):  # type: ignore[no-untyped-def]
    return tuple(logits.new_empty(ids.shape, dtype=torch.float32) for _ in range(4))


@torch.library.register_fake("fastppo::logprobs_backward")
def _(grad_logprobs, grad_entropy, logits, *others):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.temperature = inputs
    _, entropy, reference, log_sum = output
    ctx.save_for_backward(logits, ids, entropy, reference, log_sum)
    ctx.mark_non_differentiable(reference, log_sum)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None
    grad = call(
        torch.ops.fastppo.logprobs_backward.default,
        grad_logprobs,
        grad_entropy,
        *ctx.saved_tensors,
        ctx.temperature,
    )
    return grad, None, None


register_autograd("logprobs", _backward, setup_context=_setup_context)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("logprobs is differentiable once: its gradient has no gradient of its own")


register_autograd("logprobs_backward", _refuse)
