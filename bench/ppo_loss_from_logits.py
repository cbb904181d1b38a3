"""The loss and the gradient of the logits in one pass over each row, against log-probs, loss and backward apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.logprobs import logsumexp
from bench.measure import MODES, READ_AND_COPY, quick, sizes
from bench.ppo_loss import ENTROPY_COEF, WithGradients, step
from fastppo import ops

F32, BF16 = torch.float32, torch.bfloat16


def plain(
    logits: Tensor, ids: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    new_logprobs, entropy = logsumexp(logits, ids)
    weight = mask / mask.sum()
    ratio = (new_logprobs - logprobs).exp()
    policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (((policy_loss - ENTROPY_COEF * entropy) * weight).sum(),)


def two_ops(
    logits: Tensor, ids: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    new_logprobs, entropy = ops.logprobs(logits, ids)
    return ops.ppo_loss(new_logprobs, logprobs, advantages, mask, entropy=entropy, entropy_coef=ENTROPY_COEF)[
        :1
    ]


def one_op(
    logits: Tensor, ids: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    return ops.ppo_loss_from_logits(logits, ids, logprobs, advantages, mask, entropy_coef=ENTROPY_COEF)[:1]


def inputs(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    logits = torch.randn(n, v).to(dtype).requires_grad_()
    ids = torch.randint(v, (n,))
    new_logprobs, _ = ops.logprobs(logits.detach(), ids)
    return logits, ids, new_logprobs + step(1, n)[0], torch.randn(n), torch.ones(n, dtype=torch.bool)


@sizes(
    "n, v, dtype, modes",
    quick(512, 49152, F32, MODES[:1]),
    (512, 49152, BF16, MODES[:1]),
    (512, 151936, BF16, ()),
)
def bench_ppo_loss_from_logits(
    measure: Callable[..., None], n: int, v: int, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    measure(
        "ppo_loss_from_logits with gradient",
        f"[{n}, {v}]",
        dtype,
        inputs=lambda: inputs(n, v, dtype),
        ours=WithGradients(one_op, 1),
        eager={"logsumexp": WithGradients(plain, 1)},
        compiled=WithGradients(plain, 1),
        modes=modes,
        peers={"logprobs and ppo_loss": WithGradients(two_ops, 1)},
        floors=READ_AND_COPY,
        bytes_moved=2 * n * v * dtype.itemsize,
        memory=bool(modes),
    )
