"""The reward, and what a policy is worth on held-out openings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from examples.warm_replies import need


def warmth() -> Callable[..., list[float]]:
    """VADER's compound sentiment of each reply, -1 (hostile) to 1 (warm); an empty reply gets 0."""
    analyzer = need("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [
            float(analyzer.polarity_scores(reply_text(completion))["compound"]) for completion in completions
        ]

    reward.__name__ = "warmth"
    return reward


def reply_text(completion: Any) -> str:
    """The words of a completion, which is a list of messages where the prompt was one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


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
    import torch

    from fastppo.batch import micro_batches
    from fastppo.models import full_kl, lm_head, predicting_states
    from fastppo.rollout import Sampling, rollout

    prompts = [
        tokenizer.apply_chat_template(as_chat(o), add_generation_prompt=True, return_dict=False)
        for o in openings
    ]
    was_training = policy.training
    policy.eval()
    answers = rollout(
        policy,
        prompts,
        Sampling(response_length, temperature, stop_token_ids=(tokenizer.eos_token_id,)),
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    kl = torch.zeros(answers.response_mask.shape)
    if reference is not None:
        with torch.no_grad():
            for batch in micro_batches(
                answers, range(len(answers)), pad_token_id=tokenizer.pad_token_id, max_rows=16
            ):
                kl.view(-1)[batch.tokens.cpu()] = full_kl(
                    lm_head(policy),
                    predicting_states(policy, batch),
                    lm_head(reference),
                    predicting_states(reference, batch),
                    temperature,
                ).cpu()
    policy.train(was_training)
    completions = answers.completions()
    replies = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
    return Measured(
        replies=replies,
        rewards=reward(
            prompts=[as_chat(o) for o in openings], completions=replies, completion_ids=completions
        ),
        kl=kl.sum(1).tolist(),
        tokens=[len(ids) for ids in completions],
        finished=(~answers.truncated).tolist(),
    )
