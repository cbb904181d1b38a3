"""AdamW on bfloat16 weights that are trained as if they were float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.adamw import join_master, split_master
from ._library import library  # noqa: F401  registers torch.ops.fastppo

__all__ = ["adamw_step_", "join_master", "split_master"]


@torch.no_grad()
def adamw_step_(
    param: Tensor,
    residual: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), in place and in one pass over memory.

    ``param`` and ``residual`` are the two halves of a float32 master weight, see :func:`split_master`: its
    bits are ``(param bits << 16) + residual``, so no step is lost to bfloat16 rounding and no third copy
    exists. With ``g = grad * grad_scale``, all in float32::

        exp_avg    += (1 - beta1) (g - exp_avg)
        exp_avg_sq  = beta2 exp_avg_sq + (1 - beta2) g^2
        master     *= 1 - lr weight_decay
        master     -= lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    as ``torch.optim.AdamW`` does. A moment kept in bfloat16 is rounded where it is stored, up or down by chance
    so that its mean is exact (stochastic rounding): to nearest, ``exp_avg_sq`` would stand still, since a step
    changes it by a thousandth of itself. The chance is a hash of (``step``, element): repeats give the same bits.

    Args:
        param: any shape, bfloat16, contiguous; written.
        residual: shape of ``param``, int16, contiguous; written. Zeros when training starts from bfloat16
            weights.
        grad: shape of ``param``, float32, bfloat16 or float16.
        exp_avg: shape of ``param``, bfloat16 or float32, contiguous; written. Zeros before the first step.
        exp_avg_sq: shape of ``param``, bfloat16 or float32, contiguous; written. Zeros before the first step.
        lr: step size, at least 0.
        beta1: decay of the first moment, at least 0 and below 1.
        beta2: decay of the second moment, at least 0 and below 1.
        eps: added to the square root, at least 0.
        weight_decay: share of the weight that one unit of ``lr`` takes away, at least 0.
        step: number of this step, from 1.
        grad_scale: what ``grad`` is multiplied by, for example the factor of gradient clipping; a 0-d tensor
            saves a host sync.

    Raises:
        ValueError: a shape, dtype, device, layout or number is not as above; the message names it.
    """
    number, tensor = (1.0, grad_scale) if isinstance(grad_scale, Tensor) else (grad_scale, None)
    torch.ops.fastppo.adamw_step_.default(
        param, residual, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, number, tensor
    )
    if not torch.compiler.is_compiling():
        # Kernels behind the stable ABI do not tell autograd what they wrote.
        torch.autograd.graph.increment_version((param, residual, exp_avg, exp_avg_sq))


@torch.library.register_fake("fastppo::adamw_step_")
def _(*inputs):  # type: ignore[no-untyped-def]
    return None
