"""Per-token estimates of KL(policy ‖ reference) from the log-probs of the sampled tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.kl import KL_ESTIMATORS
from ._library import call, register_autograd

__all__ = ["KL_ESTIMATORS", "kl_penalty"]


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Estimate KL(policy ‖ reference) at each token the policy drew.

    With ``d = logprobs - ref_logprobs``::

        "k1"   d                    unbiased, may be negative
        "abs"  |d|
        "k2"   d^2 / 2              its gradient is that of the KL
        "k3"   exp(-d) - 1 + d      unbiased, never negative

    From Schulman, "Approximating KL Divergence" (2020, joschu.net/blog/kl-approx.html). Differentiable in
    both inputs. There is no mask: a NaN stays where it is, and the ops that sum over tokens take the mask.

    Args:
        logprobs: any shape, float32, bfloat16 or float16; log-probs under the policy, in nats.
        ref_logprobs: the same shape, any of these dtypes; log-probs of the same tokens under the reference.
        estimator: "k1", "abs", "k2" or "k3".

    Returns:
        Shape of ``logprobs``, float32, in nats.

    Raises:
        ValueError: a shape, dtype, device or the estimator is not as above; the message names it.
    """
    return call(torch.ops.fastppo.kl_penalty.default, logprobs, ref_logprobs, estimator)


@torch.library.register_fake("fastppo::kl_penalty")
def _(logprobs, ref_logprobs, estimator):  # type: ignore[no-untyped-def]
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


@torch.library.register_fake("fastppo::kl_penalty_backward")
def _(grad, logprobs, ref_logprobs, estimator):  # type: ignore[no-untyped-def]
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, ctx.estimator = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logprobs, ref_logprobs = ctx.saved_tensors
    out = call(torch.ops.fastppo.kl_penalty_backward.default, grad, logprobs, ref_logprobs, ctx.estimator)
    return (
        out.to(logprobs.dtype) if ctx.needs_input_grad[0] else None,
        -out.to(ref_logprobs.dtype) if ctx.needs_input_grad[1] else None,
        None,
    )


register_autograd("kl_penalty", _backward, setup_context=_setup_context)
