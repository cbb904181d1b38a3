"""Figures and intervals: hand-computed, and against scipy where it has the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from scipy import stats

from fastppo.cli import UsageError, judging
from fastppo.cli.judging import Estimate

NAN = float("nan")


# Pairs


def test_a_tie_is_half_a_win():
    assert judging.wins([1, 2, 3], [0, 2, 4]) == [1.0, 0.5, 0.0]
    assert judging.win_rate([1, 2, 3, 9], [0, 2, 4, 0]).value == 0.625


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (5, 8), (610, 1000)])
def test_wilson_is_scipys(right, n):
    ours = judging.wilson(right, n)
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert (ours.value, ours.n) == (right / n, n)


def test_pair_accuracy_without_groups_is_wilsons():
    found = judging.pair_accuracy([3, 3, 3, 0], [1, 1, 1, 1])
    assert found == judging.wilson(3, 4)


def test_groups_that_agree_within_widen_the_interval():
    chosen = [1.0, 0.0] * 20  # of 40 groups of 25 pairs, half are all right and half all wrong
    groups = [g for g in range(40) for _ in range(25)]
    scores = [chosen[g] for g in groups]
    rejected = [0.5] * len(scores)
    alone, grouped = (
        judging.pair_accuracy(scores, rejected),
        judging.pair_accuracy(scores, rejected, groups),
    )
    assert alone.value == grouped.value == 0.5
    assert grouped.high - grouped.low > 4 * (alone.high - alone.low)
    # 40 observations of 0 or 1: the normal interval has half-width 1.96 × 0.5 / √40
    assert grouped.high - 0.5 == pytest.approx(1.96 * 0.5 / math.sqrt(40), rel=0.08)


def test_groups_of_different_size_are_weighted_by_size():
    found = judging.bootstrap_mean([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)


def test_gain_is_paired():
    rng = np.random.default_rng(0)
    rejected = np.zeros(400)
    baseline = rng.normal(0.2, 1, 400)
    model = np.where(rng.random(400) < 0.05, 1.0, baseline)  # the baseline, a twentieth of it set right
    gain = judging.accuracy_gain((model, rejected), (baseline, rejected))
    assert gain.value == pytest.approx(((model > 0).astype(float) - (baseline > 0)).mean())
    assert gain.above_zero  # although the two intervals overlap
    assert judging.pair_accuracy(model, rejected).low < judging.pair_accuracy(baseline, rejected).high
    none = judging.accuracy_gain((baseline, rejected), (baseline, rejected))
    assert (none.value, none.low, none.high, none.above_zero) == (0, 0, 0, False)


def test_intervals_are_the_same_each_time():
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert judging.bootstrap_mean(values) == judging.bootstrap_mean(values)


# Means and correlations


def test_mean_and_students_interval():
    # 1, 2, 3, 4: mean 2.5, standard error √(5/3)/2, t(3) = 3.18245
    found = judging.mean([1, 2, 3, 4])
    assert found.value == 2.5
    assert found.high - 2.5 == pytest.approx(3.18245 * math.sqrt(5 / 3) / 2, rel=1e-5)
    assert judging.mean([2, 2, 2]) == Estimate(2, 2, 2, 3)


def test_pearson_by_hand():
    # r of (1, 2, 3, 4) and (1, 3, 2, 4) is 0.8; Fisher's interval is tanh(atanh r ± 1.96/√1)
    found = judging.pearson([1, 2, 3, 4], [1, 3, 2, 4])
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.8) - 1.959964))


def test_spearman_by_hand():
    # the same ranks, so 0.8 again, and Bonett and Wright's half-width is 1.96 √((1 + 0.32)/1)
    found = judging.spearman([1, 20, 300, 4000], [1, 3, 2, 4])
    assert found.value == pytest.approx(0.8)
    assert found.high == pytest.approx(math.tanh(math.atanh(0.8) + 1.959964 * math.sqrt(1.32)))
    assert judging.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == Estimate(-1, -1, -1, 4)


def test_correlation_gain_is_the_difference_and_covers_the_truth():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=500)
    good, bad = truth + rng.normal(size=500), truth + 3 * rng.normal(size=500)
    gain = judging.correlation_gain(good, bad, truth)
    assert gain.value == pytest.approx(judging.pearson(good, truth).value - judging.pearson(bad, truth).value)
    assert gain.low < 1 / math.sqrt(2) - 1 / math.sqrt(10) < gain.high
    assert gain.above_zero


# Reward models against what needs no model


def test_baselines():
    assert judging.length(["one two", "", "a b c"]) == [2, 0, 3]
    good, none, bad = judging.sentiment(["what a lovely day", "", "this is horrible"])
    assert good > 0 == none > bad


def test_judged_preferences_hold_model_baselines_and_gains():
    chosen, rejected = ["a lovely day", "so good", "fine"], ["a horrible day", "so very bad", "bad"]
    found = judging.judge_preferences([1, 1, 0], [0, 0, 1], chosen, rejected)
    assert {name: round(x.value, 3) for name, x in found.items()} == {
        "accuracy": 0.667,
        "accuracy of length": 0.333,  # equal, shorter, equal
        "gain over length": 0.333,
        "accuracy of sentiment": 1.0,
        "gain over sentiment": -0.333,
    }


def test_judged_ratings_hold_model_baselines_and_gains():
    texts = ["good", "so good indeed", "bad", "this is really bad"] * 5
    found = judging.judge_ratings([4, 3, 2, 1] * 5, texts, [3, 4, 1, 2] * 5)
    assert found["pearson"].value == found["spearman"].value == pytest.approx(0.6)
    # words 1, 3, 1, 4: deviations -1.25, 0.75, -1.25, 1.75 against 0.5, 1.5, -1.5, -0.5
    assert found["pearson of length"].value == pytest.approx(1.5 / math.sqrt(6.75 * 5))
    assert found["gain over length"].value == pytest.approx(0.6 - 1.5 / math.sqrt(6.75 * 5))
    assert found["pearson of sentiment"].value > 0.6
    assert set(found) == {
        *("pearson", "spearman", "pearson of length", "gain over length"),
        *("pearson of sentiment", "gain over sentiment"),
    }


# Language models


def test_distinct_counts_different_runs():
    texts = ["a b a b", "A b", "c"]  # runs of two: ab ba ab, ab
    assert judging.distinct(texts, 2) == 2 / 4
    assert judging.distinct(texts, 1) == 3 / 7
    assert judging.distinct(["one"], 2) == 0


@pytest.mark.parametrize("max_rows", [1, 2, 8])
def test_perplexity_is_that_of_plain_cross_entropy(max_rows):
    model, tokenizer = tiny.policy("llama"), tiny.tokenizer()
    texts = ["how are you today ?", "i am fine", [{"role": "user", "content": "the lazy dog"}], "x"]
    losses = []
    for text in texts:
        ids = (
            tokenizer(text)["input_ids"]
            if isinstance(text, str)
            else tokenizer.apply_chat_template(text, return_dict=False)
        )
        ids = torch.tensor([ids[:6]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    found = judging.perplexity(model, tokenizer, texts, max_length=6, max_rows=max_rows)
    assert found.n == len(losses)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.low < found.value < found.high


def test_perplexity_needs_texts():
    with pytest.raises(UsageError, match="perplexity needs at least 2 texts of 2 tokens or more, got 1 of 2"):
        judging.perplexity(tiny.policy(), tiny.tokenizer(), ["how are you", ""])
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(UsageError, match=r"a chat was given, but .* has no chat template"):
        judging.perplexity(tiny.policy(), plain, [[{"role": "user", "content": "hi"}]])


# What cannot be judged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judging.wins([], []), "ours: expected at least 1 numbers, got 0"),
        (lambda: judging.wins([1, NAN], [1, 2]), "ours: expected finite numbers, got nan at 1"),
        (lambda: judging.wins([1, 2], [1]), r"expected as many theirs as ours \(2\), got 1"),
        (lambda: judging.wilson(0, 0), "a share needs at least 1 observation, got 0"),
        (lambda: judging.mean([1]), "values: expected at least 2 numbers, got 1"),
        (lambda: judging.bootstrap_mean([1, 2], ["a", "a"]), "needs at least 2 groups, got 1"),
        (lambda: judging.bootstrap_mean([1, 2], ["a"]), r"expected as many groups as values \(2\), got 1"),
        (
            lambda: judging.pearson([1, 2, 3, 4], [2, 2, 2, 2]),
            "ratings: a correlation needs different values",
        ),
        (lambda: judging.pearson([1, 2, 3], [1, 2, 3]), "scores: expected at least 4 numbers, got 3"),
        (lambda: judging.distinct(["a"], 0), "n must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_judged_is_named(call, message):
    with pytest.raises(UsageError, match=message):
        call()
