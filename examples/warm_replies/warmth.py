"""The reward, and what a policy is worth on held-out openings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from examples.warm_replies import need
from fastppo.cli.answers import answer
from fastppo.cli.rewards import reply_text as reply_text
from fastppo.cli.rewards import sentiment


def warmth() -> Callable[..., list[float]]:
    """VADER's compound sentiment of each reply, -1 (hostile) to 1 (warm); an empty reply gets 0."""
    need("vaderSentiment", "vaderSentiment")
    reward = sentiment()
    reward.__name__ = "warmth"
    return reward


def as_chat(opening: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": opening}]


@dataclass(frozen=True)
class Measured:
    """One policy on the held-out openings. `kl` is nats per reply to the policy training started from."""

    replies: list[str]
    rewards: list[float]
    kl: list[float]
    tokens: list[int]
    finished: list[bool]

    @property
    def reward(self) -> float:
        return mean(self.rewards)

    @property
    def reward_interval(self) -> float:
        """Half the width of the 95 % interval of the mean reward."""
        return interval(self.rewards)

    @property
    def distinct_2(self) -> float:
        """Different word pairs among all word pairs: falls when the replies become alike."""
        replies = [reply.lower().split() for reply in self.replies]
        pairs = [pair for words in replies for pair in pairwise(words)]
        return len(set(pairs)) / max(1, len(pairs))


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def interval(numbers: Sequence[float]) -> float:
    if len(numbers) < 2:
        return math.inf
    centre = mean(numbers)
    variance = sum((x - centre) ** 2 for x in numbers) / (len(numbers) - 1)
    return 1.96 * math.sqrt(variance / len(numbers))


def measure(
    policy: Any,
    reference: Any | None,
    tokenizer: Any,
    openings: Sequence[str],
    *,
    reward: Callable[..., list[float]],
    response_length: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Measured:
    """Answer every opening once and judge the replies.

    A draw depends on (seed, opening, position) alone, so before and after differ by the policy and not by
    luck. The KL is exact at each token (over the whole vocabulary) and summed along the reply; without a
    reference it is 0.
    """
    chats = [as_chat(opening) for opening in openings]
    answers = answer(
        policy,
        reference,
        tokenizer,
        chats,
        response_length=response_length,
        temperature=temperature,
        seed=seed,
    )
    return Measured(
        replies=answers.replies,
        rewards=reward(prompts=chats, completions=answers.replies, completion_ids=answers.completion_ids),
        kl=answers.kl,
        tokens=answers.tokens,
        finished=answers.finished,
    )
