"""How good is a model, and how sure can one be: figures with 95 % intervals.

Everything here takes numbers or texts; nothing trains. Intervals are deterministic. Where observations come in groups
that share something (pairs on one starter question share chats), pass `groups`: the bootstrap then draws whole groups,
because more pairs of the same chats are not more evidence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import UsageError, need

CONFIDENCE = 0.95
RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """A figure of `n` observations, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0: of a difference, what people call significant."""
        return self.low > 0


# --- pairs -------------------------------------------------------------------------------------------------------


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each pair: 1 where ours is higher, 0 where theirs is, 1/2 where they are equal."""
    _check_numbers("ours", ours)
    _check_numbers("theirs", theirs)
    _check_equally_many("ours", ours, "theirs", theirs)
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(ours, theirs, strict=True)]


def win_rate(ours: Sequence[float], theirs: Sequence[float], groups: Sequence[Any] | None = None) -> Estimate:
    """Share of pairs in which ours scores higher; a tie is half a win.

    The interval is Wilson's (1927), or with `groups` a bootstrap over groups.
    """
    won = wins(ours, theirs)
    return wilson(sum(won), len(won)) if groups is None else bootstrap_mean(won, groups)


def pair_accuracy(
    chosen: Sequence[float], rejected: Sequence[float], groups: Sequence[Any] | None = None
) -> Estimate:
    """Share of preference pairs that the scores put in people's order; equal scores are half right. As `win_rate`."""
    return win_rate(chosen, rejected, groups)


def accuracy_gain(
    model: tuple[Sequence[float], Sequence[float]],
    baseline: tuple[Sequence[float], Sequence[float]],
    groups: Sequence[Any] | None = None,
) -> Estimate:
    """Pair accuracy of the model less that of the baseline, by a bootstrap over the same pairs.

    Args:
        model: its scores of the chosen and of the rejected texts.
        baseline: the same for the baseline.
        groups: of each pair.
    """
    ours, theirs = wins(*model), wins(*baseline)
    _check_equally_many("pairs of the model", ours, "pairs of the baseline", theirs)
    return bootstrap_mean([a - b for a, b in zip(ours, theirs, strict=True)], groups)


def wilson(successes: float, n: int) -> Estimate:
    """A share and Wilson's interval; half successes (ties) make it no narrower than it should be."""
    if n < 1:
        raise UsageError(f"a share needs at least 1 observation, got {n}")
    z = float(need("scipy.stats", "scipy").norm.ppf((1 + CONFIDENCE) / 2))
    share, squared = successes / n, z * z / n
    centre = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared * squared / 4) / (1 + squared)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


# --- means and correlations --------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> Estimate:
    """Mean and Student's interval."""
    _check_numbers("values", values, least=2)
    centre = math.fsum(values) / len(values)
    if len(set(values)) == 1:  # no spread: scipy's interval would be NaN
        return Estimate(centre, centre, centre, len(values))
    interval = need("scipy.stats", "scipy").ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Estimate(centre, float(interval.low), float(interval.high), len(values))


def bootstrap_mean(values: Sequence[float], groups: Sequence[Any] | None = None) -> Estimate:
    """Mean and percentile interval of a bootstrap over the values, or over their groups."""
    np, stats = need("numpy"), need("scipy.stats", "scipy")
    _check_numbers("values", values, least=2)
    labels = list(range(len(values))) if groups is None else list(groups)
    _check_equally_many("values", values, "groups", labels)
    sums: dict[Any, float] = {}
    for value, label in zip(values, labels, strict=True):
        sums[label] = sums.get(label, 0.0) + value
    if len(sums) < 2:
        raise UsageError(f"a bootstrap over groups needs at least 2 groups, got {len(sums)}")
    counts = Counter(labels)
    totals, sizes = np.array(list(sums.values())), np.array([counts[label] for label in sums])
    interval = stats.bootstrap(
        (totals, sizes),
        lambda total, size, axis=-1: total.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Estimate(math.fsum(values) / len(values), float(interval.low), float(interval.high), len(values))


def pearson(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Correlation and Fisher's interval."""
    _check_correlation(x, y)
    result = need("scipy.stats", "scipy").pearsonr(x, y)
    interval = result.confidence_interval(CONFIDENCE)
    return Estimate(float(result.statistic), float(interval.low), float(interval.high), len(x))


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Rank correlation and the interval of Bonett & Wright (2000): Fisher's, with variance (1 + r²/2)/(n - 3)."""
    _check_correlation(x, y)
    stats = need("scipy.stats", "scipy")
    r = float(stats.spearmanr(x, y).statistic)
    if abs(r) >= 1:
        return Estimate(r, r, r, len(x))
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((1 + r * r / 2) / (len(x) - 3))
    return Estimate(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), len(x))


def correlation_gain(model: Sequence[float], baseline: Sequence[float], truth: Sequence[float]) -> Estimate:
    """Pearson's r of the model with the truth less that of the baseline, by a bootstrap over the same texts."""
    np, stats = need("numpy"), need("scipy.stats", "scipy")
    _check_correlation(model, truth)
    _check_correlation(baseline, truth)

    def gain(a: Any, b: Any, y: Any, axis: int = -1) -> Any:
        return _pearson(a, y, axis) - _pearson(b, y, axis)

    data = tuple(np.asarray(x, dtype=float) for x in (model, baseline, truth))
    interval = stats.bootstrap(
        data,
        gain,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=200,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Estimate(float(gain(*data)), float(interval.low), float(interval.high), len(truth))


def _pearson(x: Any, y: Any, axis: int) -> Any:
    x = x - x.mean(axis, keepdims=True)
    y = y - y.mean(axis, keepdims=True)
    return (x * y).sum(axis) / ((x * x).sum(axis) * (y * y).sum(axis)) ** 0.5


# --- reward models against what needs no model -------------------------------------------------------------------


def length(texts: Sequence[str]) -> list[float]:
    """Words of each text: the shortcut that a reward model must beat."""
    return [float(len(text.split())) for text in texts]


def sentiment(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, -1 to 1."""
    analyzer = need("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


BASELINES: dict[str, Callable[[Sequence[str]], list[float]]] = {"length": length, "sentiment": sentiment}


def judge_preferences(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_texts: Sequence[str],
    rejected_texts: Sequence[str],
    groups: Sequence[Any] | None = None,
) -> dict[str, Estimate]:
    """Pair accuracy of a model's scores, of the baselines on the same pairs, and the gains over them.

    Returns:
        "accuracy", and for each baseline B "accuracy of B" and "gain over B".
    """
    found = {"accuracy": pair_accuracy(chosen, rejected, groups)}
    for name, baseline in BASELINES.items():
        theirs = baseline(chosen_texts), baseline(rejected_texts)
        found[f"accuracy of {name}"] = pair_accuracy(*theirs, groups)
        found[f"gain over {name}"] = accuracy_gain((chosen, rejected), theirs, groups)
    return found


def judge_ratings(
    scores: Sequence[float], texts: Sequence[str], ratings: Sequence[float]
) -> dict[str, Estimate]:
    """Correlation of a model's scores with people's ratings, of the baselines on the same texts, and the gains.

    Returns:
        "pearson", "spearman", and for each baseline B "pearson of B" and "gain over B" (of Pearson's r).
    """
    found = {"pearson": pearson(scores, ratings), "spearman": spearman(scores, ratings)}
    for name, baseline in BASELINES.items():
        theirs = baseline(texts)
        found[f"pearson of {name}"] = pearson(theirs, ratings)
        found[f"gain over {name}"] = correlation_gain(scores, theirs, ratings)
    return found


# --- language models ---------------------------------------------------------------------------------------------


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different runs of n words among all runs of n words (Li et al., 2016): falls when texts become alike."""
    if n < 1:
        raise UsageError(f"n must be at least 1, got {n}")
    runs: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        runs.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(runs) / max(1, runs.total())


def perplexity(
    model: Any, tokenizer: Any, texts: Sequence[Any], *, max_length: int = 512, max_rows: int = 8
) -> Estimate:
    """Exp of the mean negative log-prob of a token, each text's first token apart.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, which needs a chat template where there are chats.
        texts: texts or chats (lists of messages).
        max_length: tokens read of each, from its start.
        max_rows: texts in one forward pass.

    Returns:
        The perplexity; its interval comes of a bootstrap over texts, and `n` counts tokens.

    Raises:
        UsageError: no text has two tokens, or only one has.
    """
    import torch

    from .. import ops
    from ..models import causal_trunk, hidden_states, lm_head

    ids = [_ids(tokenizer, text)[:max_length] for text in texts]
    ids = sorted((x for x in ids if len(x) > 1), key=len)
    if len(ids) < 2:
        raise UsageError(
            f"perplexity needs at least 2 texts of 2 tokens or more, got {len(ids)} of {len(texts)}"
        )
    trunk, head = causal_trunk(model), lm_head(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[float] = []
    owners: list[int] = []
    with torch.no_grad():
        for start in range(0, len(ids), max_rows):
            rows = ids[start : start + max_rows]
            longest = len(rows[-1])
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            counts = torch.arange(1, longest, device=device) < torch.tensor(
                [[len(row)] for row in rows], device=device
            )
            hidden = hidden_states(trunk, padded)[:, :-1][counts]
            logprobs, _ = ops.linear_logprobs(
                hidden,
                head.weight,
                padded[:, 1:][counts],
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            losses += (-logprobs.float()).tolist()
            owners += (torch.nonzero(counts)[:, 0] + start).tolist()
    model.train(was_training)
    loss = bootstrap_mean(losses, owners)
    return Estimate(math.exp(loss.value), math.exp(loss.low), math.exp(loss.high), loss.n)


def _ids(tokenizer: Any, text: Any) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"perplexity: a chat was given, but {type(tokenizer).__name__} has no chat template")
    return list(tokenizer.apply_chat_template(text, return_dict=False))


# --- checks ------------------------------------------------------------------------------------------------------


def _check_numbers(name: str, values: Sequence[float], least: int = 1) -> None:
    if len(values) < least:
        raise UsageError(f"{name}: expected at least {least} numbers, got {len(values)}")
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise UsageError(f"{name}: expected finite numbers, got {value} at {i}")


def _check_equally_many(name: str, a: Sequence[Any], other: str, b: Sequence[Any]) -> None:
    if len(a) != len(b):
        raise UsageError(f"expected as many {other} as {name} ({len(a)}), got {len(b)}")


def _check_correlation(x: Sequence[float], y: Sequence[float]) -> None:
    _check_equally_many("scores", x, "ratings", y)
    for name, values in (("scores", x), ("ratings", y)):
        _check_numbers(name, values, least=4)
        if len(set(values)) == 1:
            raise UsageError(
                f"{name}: a correlation needs different values, got {values[0]} {len(values)} times"
            )
