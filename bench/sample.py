"""One token per row with its log-probs and entropy: reads the logits once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import MODES, READ, Function, quick, readme, sizes
from bench.peers import hf_sample
from fastppo import ops
from fastppo.reference.sample import keep_mask

F32, BF16 = torch.float32, torch.bfloat16
TEMPERATURE = 0.7
PLAIN: dict[str, Any] = {}
ALL: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.05}
TOP_P: dict[str, Any] = {"top_p": 0.9}
NAMES = {"": PLAIN, "top-k, top-p, min-p": ALL, "top-p": TOP_P}


def ours(settings: dict[str, Any]) -> Function:
    return lambda logits, counters: ops.sample(
        logits, temperature=TEMPERATURE, seed=1, counters=counters, **settings
    )


def policy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, probabilities, entropies."""
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)
    probabilities = logprobs.exp()
    return logprobs, probabilities, -(probabilities * logprobs).sum(-1)


def by_multinomial(logits: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
    logprobs, probabilities, entropy = policy(logits)
    ids = torch.multinomial(probabilities, 1)
    drawn = logprobs.gather(-1, ids)[:, 0]
    return ids[:, 0], drawn, drawn, entropy


def by_inversion(logits: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
    """One uniform number per row instead of one per token, at the price of a running sum."""
    logprobs, probabilities, entropy = policy(logits)
    running = probabilities.cumsum(-1)
    target = torch.rand(len(logits), 1) * running[:, -1:]
    ids = torch.searchsorted(running, target, right=True).clamp(max=logits.shape[-1] - 1)
    drawn = logprobs.gather(-1, ids)[:, 0]
    return ids[:, 0], drawn, drawn, entropy


def truncated(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Function:
    """Truncation on the sorted log-probs, of which top-k leaves few."""

    def run(logits: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
        logprobs, probabilities, entropy = policy(logits)
        ranked, order = probabilities.topk(top_k) if top_k else probabilities.sort(-1, descending=True)
        dropped = ranked.cumsum(-1) - ranked >= top_p * ranked.sum(-1, keepdim=True)
        ranked = ranked.masked_fill(dropped | (ranked < min_p * ranked[:, :1]), 0.0)
        place = torch.multinomial(ranked, 1)
        ids = order.gather(-1, place)
        drawn = (ranked.gather(-1, place)[:, 0] / ranked.sum(-1)).log()
        return ids[:, 0], logprobs.gather(-1, ids)[:, 0], drawn, entropy

    return run


def consistent(settings: dict[str, Any]) -> Callable[[str, Any, Any, tuple[Any, ...]], None]:
    """Draws differ, so: is the token among the allowed ones, and is what is said about it true."""

    def agree(name: str, result: Any, ours: Any, arguments: tuple[Any, ...]) -> None:
        logits = arguments[0].float()
        ids, *others = result
        logprobs = (logits / TEMPERATURE).log_softmax(-1)
        options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
        kept = keep_mask(logits, (logprobs - logprobs.amax(-1, keepdim=True)).exp(), **options)
        lowest = torch.where(kept, logits, torch.inf).amin(-1)
        drawn_logits = logits.gather(-1, ids[:, None])[:, 0]
        # At the boundary sums round differently, and Hugging Face keeps every tie: one grain of bfloat16 of slack.
        assert (drawn_logits >= lowest - 0.01 * lowest.abs()).all(), (
            "a token outside the truncated set was drawn"
        )
        if not others:
            return
        drawn, sampling, entropy = others
        total = torch.where(kept, logprobs.exp(), 0.0).sum(-1).log()
        expected = logprobs.gather(-1, ids[:, None])[:, 0]
        for what, got, want in (
            ("log-prob", drawn, expected),
            ("log-prob of the truncated distribution", sampling, expected - total),
            ("entropy", entropy, ours[3]),
        ):
            error = float((got - want).abs().max())
            slack = 1e-3 if what != "log-prob of the truncated distribution" or not settings else 5e-2
            assert error <= slack, f"{what} is off by {error:.1e}"

    return agree


def exp_sum(b: int, v: int, dtype: torch.dtype) -> dict[str, Function]:
    """The arithmetic that a row needs at least, on rows that stay in the cache, into memory that is already there."""
    block, wide, narrow = torch.randn(b, v), torch.empty(b, v), torch.empty(b, v, dtype=dtype)
    return {
        "exp-sum in float32": lambda *_: torch.exp(block, out=wide).sum(-1),
        "exp-sum in the dtype": lambda logits, *_: torch.exp(logits, out=narrow).sum(-1),
    }


@sizes(
    "b, v, dtype, setting, hot",
    quick(16, 49152, BF16, "", False),
    quick(16, 49152, BF16, "top-k, top-p, min-p", False),
    readme(16, 49152, F32, "", False),
    (16, 49152, F32, "top-k, top-p, min-p", False),
    *((b, 49152, dtype, "", False) for b in (1, 4, 64) for dtype in (F32, BF16)),
    *((b, 49152, dtype, "", True) for b in (1, 4, 16, 64) for dtype in (F32, BF16)),
    *((b, 49152, dtype, "top-k, top-p, min-p", False) for b in (1, 4, 64) for dtype in (F32, BF16)),
    *((b, 49152, dtype, "top-p", False) for b in (1, 16, 64) for dtype in (F32, BF16)),
    *((b, 151936, BF16, setting, False) for b in (1, 16) for setting in ("", "top-k, top-p, min-p")),
    (16, 151936, F32, "", False),
)
def bench_sample(
    measure: Callable[..., None], b: int, v: int, dtype: torch.dtype, setting: str, hot: bool
) -> None:
    settings = NAMES[setting]
    typical = b == 16 and v == 49152 and not hot and setting != "top-p"
    eager: dict[str, Function] = {"multinomial": by_multinomial, "inversion": by_inversion}
    if settings:
        eager = {"sorted": truncated(**settings)}
    peers = {"Hugging Face": hf_sample(TEMPERATURE, **settings)}
    if typical:
        peers["Hugging Face and log-probs"] = hf_sample(TEMPERATURE, **settings, logprobs=True)
    measure(
        f"sample ({setting or 'temperature'})",
        f"[{b}, {v}]",
        dtype,
        inputs=lambda: (3 * torch.randn(b, v).to(dtype), torch.arange(b)),
        ours=ours(settings),
        eager=eager,
        compiled=eager["sorted"] if settings else by_inversion,
        modes=MODES if typical else (),
        peers=peers,
        floors=exp_sum(b, v, dtype) if hot else READ,
        hot=hot,
        bytes_moved=b * v * dtype.itemsize,
        agree=consistent(settings),
        memory=typical,
        seconds=0.4,
    )


@sizes("b, v", quick(1, 8))
def bench_sample_call(measure: Callable[..., None], b: int, v: int) -> None:
    measure(
        "sample call",
        f"[{b}, {v}]",
        F32,
        inputs=lambda: (torch.randn(b, v), torch.arange(b)),
        ours=ours(PLAIN),
        agree=consistent(PLAIN),
        hot=True,
    )
