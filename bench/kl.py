"""Exact KL between two vocabularies' worth of logits, and the per-token estimators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.variants import dtypes, variants
from fastppo import ops, reference

N, V = 256, 49152
B, T = 64, 1024


def eager(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    logprobs, ref_logprobs = ((x.float() / temperature).log_softmax(-1) for x in (logits, ref_logits))
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


@dtypes
@variants(ours=ops.distribution_kl, eager=eager)
def bench_distribution_kl(
    measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype
) -> None:
    logits, ref_logits = (torch.randn(N, V, dtype=dtype) for _ in range(2))
    measure(function, logits, ref_logits, temperature=0.7, size=f"{N} × {V}", reads=2 * logits.nbytes)


@variants(ours=ops.kl_penalty, eager=reference.kl_penalty)
def bench_kl_penalty(measure: Callable[..., None], function: Callable[..., object]) -> None:
    logprobs, ref_logprobs = (-torch.rand(B, T) for _ in range(2))
    measure(function, logprobs, ref_logprobs, estimator="k3", size=f"{B} × {T}", reads=3 * logprobs.nbytes)
