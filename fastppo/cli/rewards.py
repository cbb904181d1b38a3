"""Rewards by name: what `--reward` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import UsageError, need
from .models import check_model, load_classifier, load_tokenizer

SENTIMENT = "vader"


def load_rewards(names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """What `PPOTrainer` takes as `reward_model` and `reward_processing_classes`.

    Args:
        names: each "vader" (sentiment of the reply), `module:function` (TRL's GRPO signature), the URL of a reward
            server, or a folder or Hub id of a classifier.

    Raises:
        UsageError: there is no such reward.
    """
    rewards, tokenizers = [], []
    for name in names:
        tokenizer = None
        if name == SENTIMENT:
            reward: Any = sentiment()
        elif name.startswith(("http://", "https://")):
            reward = name
        elif ":" in name and not Path(name).exists():
            reward = _function(name)
        else:
            path = check_model(name, "reward")
            tokenizer, reward = load_tokenizer(path), load_classifier(path)
        rewards.append(reward)
        tokenizers.append(tokenizer)
    return rewards, tokenizers


def sentiment() -> Callable[..., list[float]]:
    """VADER's compound sentiment of each reply, -1 to 1; an empty reply gets 0."""
    analyzer = need("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()

    def vader(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(analyzer.polarity_scores(reply_text(c))["compound"]) for c in completions]

    return vader


def reply_text(completion: Any) -> str:
    """The words of a completion, which is a list of messages where the prompt was one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--reward {name}: expected module:function that can be imported: {error}"
        ) from error
    if not callable(found):
        raise UsageError(f"--reward {name}: expected a function, got {type(found).__name__}")
    return found
