"""One optimizer step: bfloat16 weights with a split float32 master, against torch's fused AdamW on float32 weights.

Different layouts of the same arithmetic: ours moves 18 bytes per weight with bfloat16 moments and gradients (what the
trainer keeps), 28 with float32 ones, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import quick, sizes
from fastppo import ops, reference

F32, BF16 = torch.float32, torch.bfloat16
SETTINGS: dict[str, Any] = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def state(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """param, residual, gradient, both moments before the first step."""
    param, residual = reference.split_master(torch.randn(count))
    zeros = torch.zeros(count, dtype=dtype)
    return param, residual, torch.randn(count).to(dtype), zeros, zeros.clone()


def ours(*state: Tensor) -> None:
    ops.adamw_step_(*state, step=1, **SETTINGS)


def optimizer(start: tuple[Tensor, ...], **how: bool) -> tuple[Tensor, Callable[..., None]]:
    """(weight, step) of torch's AdamW in float32, from the same weights and gradient."""
    weight = reference.join_master(start[0], start[1])
    weight.grad = start[2].float()
    adamw = torch.optim.AdamW(
        [weight],
        lr=SETTINGS["lr"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["weight_decay"],
        **how,
    )

    def step(*_: Tensor) -> None:
        adamw.step()

    return weight, step


@sizes("count, dtype", quick(49152 * 576, BF16), (49152 * 576, F32))
def bench_adamw(measure: Callable[..., None], count: int, dtype: torch.dtype) -> None:
    start = state(count, dtype)
    forms: dict[str, dict[str, bool]] = {"foreach": {"foreach": True}, "fused float32": {"fused": True}}
    steps = {name: optimizer(start, **how)[1] for name, how in forms.items()}

    def first_step_of_ours() -> Tensor:
        fresh = [x.clone() for x in start]
        ours(*fresh)
        return reference.join_master(fresh[0], fresh[1])

    def first_step(how: dict[str, bool]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            weight, step = optimizer(start, **how)
            step()
            return weight

        return run

    per_weight = 18 if dtype is BF16 else 28
    half = torch.zeros(count * per_weight // 8)
    other = torch.empty_like(half)
    measure(
        "adamw_step_" if dtype is BF16 else "adamw_step_ (float32 moments)",
        f"[{count}]",
        dtype,
        inputs=lambda: state(count, dtype),
        ours=ours,
        eager={"foreach": steps["foreach"]},
        peers={"fused float32": steps["fused float32"]},
        floors={"copy": lambda *_: other.copy_(half)},
        bytes_moved=per_weight * count,
        check={"fastppo": first_step_of_ours, **{name: first_step(how) for name, how in forms.items()}},
        tolerance={"fused float32": 1e-6, "foreach": 1e-6},
        memory=True,
    )


@sizes("count", quick(8))
def bench_adamw_call(measure: Callable[..., None], count: int) -> None:
    measure("adamw_step_ call", f"[{count}]", BF16, inputs=lambda: state(count, BF16), ours=ours, hot=True)
