"""Log-probs and entropies of given ids: reads the logits once; backward reads and writes them once more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import MODES, READ, READ_AND_COPY, quick, readme, sizes, with_backward
from bench.peers import trl_logprobs
from fastppo import ops

F32, BF16 = torch.float32, torch.bfloat16
# TRL computes log-probs of bfloat16 logits in bfloat16: near 11 its numbers are 0.06 apart.
TOLERANCE = {"TRL 1.16": 5e-2}


def log_softmax(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def logsumexp(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The row sums of the entropy as a batch of dot products: the fewest passes that plain torch allows."""
    logits = logits.float()
    normalizer = logits.logsumexp(-1)
    mean_logit = torch.einsum("nv,nv->n", logits.softmax(-1), logits)
    return logits.gather(-1, ids[:, None])[:, 0] - normalizer, normalizer - mean_logit


EAGER = {"log_softmax": log_softmax, "logsumexp": logsumexp}


def inputs(n: int, v: int, dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    return torch.randn(n, v).to(dtype).requires_grad_(requires_grad), torch.randint(v, (n,))


@sizes(
    "n, v, dtype, modes",
    quick(512, 49152, F32, MODES),
    readme(512, 49152, BF16, MODES),
    (1, 49152, F32, ()),
    (16, 49152, F32, ()),
    (16, 49152, BF16, ()),
    (64, 49152, F32, ()),
    (4096, 49152, F32, ()),
    (4096, 49152, BF16, MODES[:1]),
    (1, 151936, F32, ()),
    (512, 151936, F32, ()),
    (512, 151936, BF16, MODES[:1]),
)
def bench_logprobs(
    measure: Callable[..., None], n: int, v: int, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    full = len(modes) > 1
    measure(
        "logprobs forward",
        f"[{n}, {v}]",
        dtype,
        inputs=lambda: inputs(n, v, dtype),
        ours=ops.logprobs,
        eager=EAGER,
        compiled=log_softmax,
        modes=modes,
        peers={"TRL 1.16": trl_logprobs} if full else None,
        floors=READ,
        bytes_moved=n * v * dtype.itemsize,
        tolerance=TOLERANCE,
        memory=full,
    )


@sizes(
    "n, v, dtype, modes",
    (512, 49152, F32, MODES),
    quick(512, 49152, BF16, MODES),
    (16, 49152, F32, ()),
    (4096, 49152, BF16, ()),
    (512, 151936, BF16, ()),
)
def bench_logprobs_backward(
    measure: Callable[..., None], n: int, v: int, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    full = len(modes) > 1
    measure(
        "logprobs forward + backward",
        f"[{n}, {v}]",
        dtype,
        inputs=lambda: inputs(n, v, dtype, requires_grad=True),
        ours=with_backward(ops.logprobs, 0),
        eager={name: with_backward(form, 0) for name, form in EAGER.items()},
        compiled=with_backward(log_softmax, 0),
        modes=modes,
        peers={"TRL 1.16": with_backward(trl_logprobs, 0)} if full else None,
        floors=READ_AND_COPY,
        bytes_moved=3 * n * v * dtype.itemsize,
        tolerance=TOLERANCE,
        memory=full,
    )


@sizes("n, v", quick(1, 8))
def bench_logprobs_call(measure: Callable[..., None], n: int, v: int) -> None:
    measure(
        "logprobs call", f"[{n}, {v}]", F32, inputs=lambda: inputs(n, v, F32), ours=ops.logprobs, hot=True
    )
