"""Exact KL divergence between two next-token distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import call, register_autograd

__all__ = ["distribution_kl"]


def distribution_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of each row, over the whole vocabulary.

    ::

        p, q    = softmax(logits / temperature), softmax(ref_logits / temperature)
        kl[...] = sum(p * (log p - log q))

    One read of both forward, one read and one write of what is required backward. Nothing of the size of the
    logits is kept but the logits themselves.

    Args:
        logits: (..., V) float32, bfloat16 or float16, the policy's. Any strides but the last, which must be
            1. A token that the policy cannot produce (-inf) adds nothing, whatever the reference holds
            there.
        ref_logits: the same shape and dtype, the reference's. A token that only the policy can produce makes
            the divergence infinite.
        temperature: divides both, above 0.

    Returns:
        (...) float32, in nats, never below 0. Differentiable in both, once. A row of either with NaN or
        +inf, or of only -inf, gives NaN.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; the message names it.
    """
    return call(torch.ops.fastppo.distribution_kl.default, logits, ref_logits, temperature)[0]


@torch.library.register_fake("fastppo::distribution_kl")
def _(logits, ref_logits, temperature):  # type: ignore[no-untyped-def]
    leading = logits.shape[:-1]
    return logits.new_empty(leading, dtype=torch.float32), logits.new_empty(
        (*leading, 4), dtype=torch.float32
    )


@torch.library.register_fake("fastppo::distribution_kl_backward")
def _(grad_kl, logits, ref_logits, *others):  # type: ignore[no-untyped-def]
    needs_logits, needs_ref_logits = others[-2:]
    return (
        logits.new_empty(logits.shape if needs_logits else (0,)),
        ref_logits.new_empty(logits.shape if needs_ref_logits else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, ctx.temperature = inputs
    kl, stats = output
    ctx.save_for_backward(logits, ref_logits, kl, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_kl: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_kl is None:
        return None, None, None
    needs_logits, needs_ref_logits, _ = ctx.needs_input_grad
    grad, ref_grad = call(
        torch.ops.fastppo.distribution_kl_backward.default,
        grad_kl,
        *ctx.saved_tensors,
        ctx.temperature,
        needs_logits,
        needs_ref_logits,
    )
    return grad if needs_logits else None, ref_grad if needs_ref_logits else None, None


register_autograd("distribution_kl", _backward, setup_context=_setup_context)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("distribution_kl is differentiable once: its gradient has no gradient of its own")


register_autograd("distribution_kl_backward", _refuse)
