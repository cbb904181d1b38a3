"""Per-token estimates of the KL from two log-probs: reads both, writes one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import MODES, quick, reading, sizes
from bench.peers import trl_kl
from fastppo import ops


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


def ours(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return ops.kl_penalty(logprobs, ref_logprobs, estimator="k3")


def inputs(b: int, t: int) -> tuple[Tensor, Tensor]:
    return -torch.rand(b, t), -torch.rand(b, t)


@sizes("b, t, modes", quick(64, 512, MODES), (16, 53, ()), (256, 1024, ()))
def bench_kl_penalty(measure: Callable[..., None], b: int, t: int, modes: tuple[str, ...]) -> None:
    measure(
        "kl_penalty (k3)",
        f"[{b}, {t}]",
        torch.float32,
        inputs=lambda: inputs(b, t),
        ours=ours,
        eager={"expm1": k3},
        compiled=k3,
        modes=modes,
        peers={"TRL 1.12": trl_kl()},
        floors=reading(12 * b * t),
        bytes_moved=12 * b * t,
        hot=True,
    )


@sizes("b, t", quick(1, 8))
def bench_kl_penalty_call(measure: Callable[..., None], b: int, t: int) -> None:
    measure("kl_penalty call", f"[{b}, {t}]", torch.float32, inputs=lambda: inputs(b, t), ours=ours, hot=True)
