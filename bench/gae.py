"""Advantages and returns alone, and the whole way from scores to whitened advantages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.variants import variants
from fastppo import ops, reference

B, T = 64, 256  # torch.compile unrolls the time loop of the eager version, and takes minutes beyond this


def mask() -> Tensor:
    """Responses of 1 to T tokens."""
    return torch.arange(T) < torch.randint(1, T + 1, (B, 1))


@variants(ours=ops.gae, eager=reference.gae)
def bench_gae(measure: Callable[..., None], function: Callable[..., object]) -> None:
    rewards, values = torch.randn(B, T), torch.randn(B, T)
    measure(function, rewards, values, mask(), size=f"{B} × {T}", reads=17 * B * T)


@variants(ours=ops.rewards_and_advantages, eager=reference.rewards_and_advantages)
def bench_rewards_and_advantages(measure: Callable[..., None], function: Callable[..., object]) -> None:
    logprobs, ref_logprobs, values = -torch.rand(B, T), -torch.rand(B, T), torch.randn(B, T)
    measure(
        function, torch.randn(B), logprobs, ref_logprobs, values, mask(), size=f"{B} × {T}", reads=29 * B * T
    )
