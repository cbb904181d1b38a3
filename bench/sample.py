"""One token per row with its log-probs and entropy: reads the logits once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.variants import dtypes, variants
from fastppo import ops

B, V = 16, 49152


def ours(logits: Tensor, counters: Tensor, *, top_p: float) -> object:
    return ops.sample(logits, temperature=0.7, top_p=top_p, seed=1, counters=counters)


def eager(logits: Tensor, counters: Tensor, *, top_p: float) -> tuple[Tensor, ...]:
    """Temperature, nucleus, multinomial, both log-probs, entropy: a sampling loop in plain torch."""
    logits = logits.float() / 0.7
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    if top_p < 1:
        ascending, order = logits.sort(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    ids = torch.multinomial(logits.softmax(-1), 1)
    drawn_from = logits.log_softmax(-1)
    return ids.squeeze(-1), logprobs.gather(-1, ids), drawn_from.gather(-1, ids), entropy


@dtypes
@variants(ours=ours, eager=eager)
def bench_sample(measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(B, V, dtype=dtype)
    measure(function, logits, torch.arange(B), top_p=1.0, size=f"{B} × {V}", reads=logits.nbytes)


@dtypes
@variants(ours=ours, eager=eager)
def bench_sample_top_p(
    measure: Callable[..., None], function: Callable[..., object], dtype: torch.dtype
) -> None:
    logits = 3 * torch.randn(B, V, dtype=dtype)
    measure(function, logits, torch.arange(B), top_p=0.9, size=f"{B} × {V}, 0.9", reads=logits.nbytes)
