"""The loop without people: a rule rates answers, rounds are played, and the rating is seen to rise, or not.

Each round the model answers every prompt a few times, the rater likes the best answer and dislikes the worst, and a
round is played on all feedback so far.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.feedback.rounds import RoundSettings, last_round, play_round
from examples.feedback.store import DISLIKE, LIKE, Messages, Store

Rater = Callable[[str], float]


def warm() -> Rater:
    """VADER's sentiment, -1 to 1."""
    from examples.warm_replies.warmth import warmth

    reward = warmth()
    return lambda answer: float(reward(prompts=[""], completions=[answer], completion_ids=[[]])[0])


def short() -> Rater:
    """Words, counted down."""
    return lambda answer: -float(len(answer.split()))


def letter_e() -> Rater:
    """Share of the letter e."""
    return lambda answer: answer.lower().count("e") / max(len(answer), 1)


RATERS: dict[str, Callable[[], Rater]] = {"warm": warm, "short": short, "letter-e": letter_e}


def simulate(
    model: str,
    prompts: list[Messages],
    rater: Rater,
    folder: Path,
    *,
    rounds: int = 2,
    answers: int = 4,
    settings: RoundSettings = RoundSettings(),  # noqa: B008
    report: Callable[[str], None] = print,
) -> list[float]:
    """Play `rounds` rounds in `folder`; returns the mean rating of the answers before, and after each round.

    Args:
        model: folder of the chat model to start from.
        prompts: what the rater asks.
        rater: text of an answer → a number, more is better.
        folder: holds `feedback.db` and the rounds.
        rounds: how many.
        answers: to each prompt, per round; at least 2.
        settings: of the rounds.
        report: told what happens.
    """
    if answers < 2:
        raise ValueError(f"answers must be at least 2, for one to be better than another, got {answers}")
    if last_round(folder) is not None:
        raise ValueError(f"{folder} holds rounds already: use another folder")
    store = Store(folder / "feedback.db")
    means = []
    current = model
    for number in range(rounds + 1):
        said = ask(current, prompts, answers, settings, seed=settings.seed + 1000 * (number + 1))
        ratings = [[rater(text) for text in texts] for texts in said]
        means.append(sum(map(sum, ratings)) / (answers * len(prompts)))
        report(f"{'before' if number == 0 else f'after round {number}'}: mean rating {means[-1]:+.4f}")
        if number == rounds:
            break
        for prompt, texts, numbers in zip(prompts, said, ratings, strict=True):
            best, worst = (
                max(range(answers), key=numbers.__getitem__),
                min(range(answers), key=numbers.__getitem__),
            )
            if numbers[best] > numbers[worst]:
                store.rate(prompt, texts[best], LIKE, rater="simulated", model=current)
                store.rate(prompt, texts[worst], DISLIKE, rater="simulated", model=current)
        play_round(store, folder, model, settings=settings, report=report)
        current = str(folder / f"round-{number + 1}" / "policy")
    return means


def ask(
    folder: str, prompts: list[Messages], answers: int, settings: RoundSettings, seed: int
) -> list[list[str]]:
    """What the model in `folder` answers, `answers` times to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastppo.rollout import Sampling, rollout

    policy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in prompts
        for _ in range(answers)
    ]
    drawn = rollout(
        policy,
        ids,
        Sampling(settings.response_length, settings.temperature, stop_token_ids=(tokenizer.eos_token_id,)),
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    texts = [tokenizer.decode(c, skip_special_tokens=True).strip() for c in drawn.completions()]
    return [texts[i : i + answers] for i in range(0, len(texts), answers)]
