"""The loss with every metric and every gradient: one pass, against forward and backward in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.variants import variants
from fastppo import ops, reference

B, T = 64, 1024


def with_gradients(loss: Callable[..., tuple[Tensor, object]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        new_logprobs: Tensor,
        new_values: Tensor,
        logprobs: Tensor,
        values: Tensor,
        returns: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total, _ = loss(
            new_logprobs,
            logprobs,
            returns - values,
            mask,
            new_values=new_values,
            values=values,
            returns=returns,
        )
        gradients = torch.autograd.grad(total, [new_logprobs, new_values])
        return gradients[0], gradients[1]

    return run


@variants(ours=with_gradients(ops.ppo_loss), eager=with_gradients(reference.ppo_loss))
def bench_ppo_loss(measure: Callable[..., None], function: Callable[..., object]) -> None:
    logprobs, values, returns = -torch.rand(B, T), torch.randn(B, T), torch.randn(B, T)
    new_logprobs = (logprobs + 0.1 * torch.randn(B, T)).requires_grad_()
    new_values = (values + 0.1 * torch.randn(B, T)).requires_grad_()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    measure(
        function,
        new_logprobs,
        new_values,
        logprobs,
        values,
        returns,
        mask,
        size=f"{B} × {T}",
        reads=37 * B * T,
    )
