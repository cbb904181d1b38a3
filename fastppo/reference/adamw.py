"""AdamW on bfloat16 parameters whose float32 master is split in two, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def join_master(param: Tensor, residual: Tensor) -> Tensor:
    """Return the float32 master weight whose bits are ``(param bits << 16) + residual``."""
    high = param.contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + residual.to(torch.int32)).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return (param bfloat16, residual int16) with ``join_master(param, residual)`` equal to ``master`` bit
    for bit.

    ``param`` is ``master`` rounded to the nearest bfloat16, half up in the bits (away from zero).
    """
    bits = master.float().contiguous().view(torch.int32).to(torch.int64)
    high = (bits + 0x8000) >> 16
    residual = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), residual


def rounding_bits(step: int, count: int) -> Tensor:
    """Return 32 well-mixed bits of (step, element) for ``count`` elements, as int64."""
    x = (torch.arange(count) + step * 0x9E3779B9) & 0xFFFFFFFF
    x ^= x >> 16
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_by_chance(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down by chance, so that the mean over ``noise`` in [0, 2^16) is exact."""
    bits = x.contiguous().view(torch.int32).to(torch.int64)
    rounded = torch.where(x.isfinite(), bits + noise, bits) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16)


def _store(moment: Tensor, value: Tensor, noise: Tensor) -> None:
    if moment.dtype is torch.bfloat16:
        value = round_by_chance(value, noise.view(value.shape).to(value.device))
    moment.copy_(value)


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
    """Twin of :func:`fastppo.ops.adamw_step_`."""
    g = grad.float() * grad_scale
    master = join_master(param, residual) * (1 - lr * weight_decay)
    m = torch.lerp(exp_avg.float(), g, 1 - beta1)
    v = exp_avg_sq.float() * beta2 + (1 - beta2) * g * g
    denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
    master = master - (lr / (1 - beta1**step)) * m / denominator
    new_param, new_residual = split_master(master)
    param.copy_(new_param)
    residual.copy_(new_residual)
    noise = rounding_bits(step, param.numel())
    _store(exp_avg, m, noise & 0xFFFF)
    _store(exp_avg_sq, v, noise >> 16)
