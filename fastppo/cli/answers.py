"""A policy's answers to prompts, with their length and their distance from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """One reply to each prompt.

    Attributes:
        prompts: as the dataset had them.
        replies: the words.
        completion_ids: their tokens.
        kl: nats per reply from the reference; 0 without one.
        finished: ended by themselves.
    """

    prompts: list[Any]
    replies: list[str]
    completion_ids: list[list[int]]
    kl: list[float]
    finished: list[bool]

    @property
    def tokens(self) -> list[int]:
        """Length of each reply."""
        return [len(ids) for ids in self.completion_ids]

    def completions(self) -> list[Any]:
        """As rewards see them: messages where the prompt was a chat."""
        return [
            reply if isinstance(prompt, str) else [{"role": "assistant", "content": reply}]
            for prompt, reply in zip(self.prompts, self.replies, strict=True)
        ]

    def scored(self, reward_model: Any, tokenizer: Any = None) -> list[float]:
        """What one reward (`PPOTrainer`'s `reward_model`) says of each reply."""
        import torch

        from ..score import Episodes, make_rewards, score

        episodes = Episodes(self.prompts, self.completions(), self.completion_ids, [[]] * len(self.prompts))
        rewards = make_rewards(reward_model, None, tokenizer)
        return score(rewards, episodes, torch.device("cpu"))[0].tolist()


def answer(
    policy: Any,
    reference: Any | None,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    response_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 64,
) -> Answers:
    """Answer every prompt (text or chat) once.

    A draw depends on (seed, prompt's number, position) alone, so two policies differ by themselves and not by luck. The
    KL is exact at each token (over the whole vocabulary) and summed along the reply.
    """
    import torch

    from ..batch import micro_batches
    from ..models import full_kl, lm_head, predicting_states
    from ..prompts import read_prompts
    from ..rollout import Sampling, rollout

    read = read_prompts([{"prompt": prompt} for prompt in prompts], tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = policy.training
    policy.eval()
    answers = rollout(
        policy,
        read.ids,
        Sampling(response_length, temperature, stop_token_ids=(tokenizer.eos_token_id,)),
        pad_token_id=pad,
        seed=seed,
        max_rows=rows,
    )
    kl = torch.zeros(answers.response_mask.shape)
    if reference is not None:
        with torch.no_grad():
            for batch in micro_batches(answers, range(len(answers)), pad_token_id=pad, max_rows=16):
                kl.view(-1)[batch.tokens.cpu()] = full_kl(
                    lm_head(policy),
                    predicting_states(policy, batch),
                    lm_head(reference),
                    predicting_states(reference, batch),
                    temperature,
                ).cpu()
    policy.train(was_training)
    completions = answers.completions()
    return Answers(
        prompts=list(prompts),
        replies=[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions],
        completion_ids=completions,
        kl=kl.sum(1).tolist(),
        finished=(~answers.truncated).tolist(),
    )
