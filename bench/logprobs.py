"""Log-probs and entropies of given ids: reads the logits once; backward reads and writes them once more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.variants import dtypes, variants, with_backward
from fastppo import ops

N, V = 512, 49152


def eager(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What a trainer writes in plain torch."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


@dtypes
@variants(ours=ops.logprobs, eager=eager)
def bench_logprobs(measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype) -> None:
    logits, ids = torch.randn(N, V, dtype=dtype), torch.randint(V, (N,))
    measure(function, logits, ids, temperature=0.7, size=f"{N} × {V}", reads=logits.nbytes)


@dtypes
@variants(ours=with_backward(ops.logprobs), eager=with_backward(eager))
def bench_logprobs_backward(
    measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype
) -> None:
    logits, ids = torch.randn(N, V, dtype=dtype, requires_grad=True), torch.randint(V, (N,))
    measure(function, logits, ids, temperature=0.7, size=f"{N} × {V}", reads=3 * logits.nbytes)
