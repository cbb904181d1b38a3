"""Exact KL between two vocabularies' worth of logits: reads both once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import MODES, READ_BOTH, READ_BOTH_AND_COPY, quick, readme, sizes, with_backward
from fastppo import ops

F32, BF16 = torch.float32, torch.bfloat16


def kl_div(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return F.kl_div(ref_logprobs, logprobs, log_target=True, reduction="none").sum(-1)


def logsumexp(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Sum of p (x - y) - log Z(x) + log Z(y); the sum is a batch of dot products."""
    logits, ref_logits = logits.float(), ref_logits.float()
    difference = torch.einsum("nv,nv->n", logits.softmax(-1), logits - ref_logits)
    return difference - logits.logsumexp(-1) + ref_logits.logsumexp(-1)


EAGER = {"kl_div": kl_div, "logsumexp": logsumexp}


def inputs(n: int, v: int, dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    return torch.randn(n, v).to(dtype).requires_grad_(requires_grad), torch.randn(n, v).to(dtype)


@sizes(
    "n, v, dtype, modes",
    quick(512, 49152, F32, MODES),
    readme(512, 49152, BF16, MODES),
    (1, 49152, F32, ()),
    (16, 49152, BF16, ()),
    (4096, 49152, BF16, ()),
    (512, 151936, BF16, ()),
)
def bench_distribution_kl(
    measure: Callable[..., None], n: int, v: int, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    measure(
        "distribution_kl forward",
        f"[{n}, {v}]",
        dtype,
        inputs=lambda: inputs(n, v, dtype),
        ours=ops.distribution_kl,
        eager=EAGER,
        compiled=kl_div,
        modes=modes,
        floors=READ_BOTH,
        bytes_moved=2 * n * v * dtype.itemsize,
        memory=len(modes) > 1,
    )


@sizes("n, v, dtype, modes", (512, 49152, F32, MODES[:1]), (512, 49152, BF16, MODES[:1]))
def bench_distribution_kl_backward(
    measure: Callable[..., None], n: int, v: int, dtype: torch.dtype, modes: tuple[str, ...]
) -> None:
    measure(
        "distribution_kl forward + backward",
        f"[{n}, {v}]",
        dtype,
        inputs=lambda: inputs(n, v, dtype, requires_grad=True),
        ours=with_backward(ops.distribution_kl, 0),
        eager={name: with_backward(form, 0) for name, form in EAGER.items()},
        compiled=with_backward(kl_div, 0),
        modes=modes,
        floors=READ_BOTH_AND_COPY,
        bytes_moved=5 * n * v * dtype.itemsize,
        memory=True,
    )


@sizes("n, v", quick(1, 8))
def bench_distribution_kl_call(measure: Callable[..., None], n: int, v: int) -> None:
    measure(
        "distribution_kl call",
        f"[{n}, {v}]",
        F32,
        inputs=lambda: inputs(n, v, F32),
        ours=ops.distribution_kl,
        hot=True,
    )
