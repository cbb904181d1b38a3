"""One round of learning from feedback: pairs → reward model (TRL's RewardTrainer) → policy (fastppo.PPOTrainer).

A round is a folder, `round-1`, `round-2`, ..., that appears when it is whole:

    pairs.jsonl   what was learnt from
    reward/       the reward model: that of the round before, trained on all pairs there are now
    policy/       the policy: that of the round before, trained against `reward/`; serve it, and collect more feedback
    round.json    where both started, how many pairs, how well they are told apart, what PPO reached, settings, seconds

The reference of the KL penalty is the model that the first round started from, so rounds cannot drift further and
further by small steps.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from examples.feedback.pairs import Pair, export
from examples.feedback.store import Messages, Store, canonical

MIN_HELD_OUT = 10  # fewer pairs say nothing about accuracy, and are worth more in training


@dataclass(frozen=True)
class RoundSettings:
    """What a round may be told; the defaults suit SmolLM2-135M."""

    seed: int = 0
    reward_epochs: int = 3
    reward_learning_rate: float = 2e-5
    reward_batch_size: int = 8
    max_length: int = 512  # tokens of prompt and answer that the reward model reads
    held_out: float = 0.1  # share of pairs, by prompt, that measure the reward model
    updates: int = 8
    batch_size: int = 32  # answers per update
    response_length: int = 64
    learning_rate: float = 2e-5
    kl_coef: float = 0.05  # against scores of unit deviation
    temperature: float = 1.0


def play_round(
    store: Store,
    rounds: Path,
    model: str | None = None,
    *,
    reward_model: str | None = None,
    prompts: Iterable[Messages] = (),
    settings: RoundSettings = RoundSettings(),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Play the next round in the folder `rounds` and return what its `round.json` holds.

    Args:
        store: the feedback, all of it.
        rounds: where the rounds are; the next number is chosen.
        model: folder of the chat model that the first round starts from; later rounds know it.
        reward_model: folder of a sequence classifier with one output to start from. None: the last round's, or the
            chat model's own trunk under a new head.
        prompts: chats to train the policy on besides those that were rated.
        settings: see there.
        report: told what happens.

    Raises:
        ValueError: there is no pair or nothing new since the last round; the model is missing, or another one than
            the earlier rounds'. Nothing is written then.
    """
    before = last_round(rounds)
    number = 1 if before is None else before["round"] + 1
    base, policy_from, reward_from = _starts(rounds, before, model, reward_model)
    entries = store.entries()
    last_entry = max((e.id for e in entries), default=0)
    if before is not None and last_entry <= before["feedback"]["last_entry"]:
        raise ValueError(
            f"no new feedback in {store.path} since round {before['round']}: its last entry is number {last_entry}"
        )
    seconds: dict[str, float] = {}

    from fastppo.checkpoint import written_then_renamed

    rounds.mkdir(parents=True, exist_ok=True)
    with written_then_renamed(rounds / f"round-{number}") as folder:
        pairs = export(store, folder / "pairs.jsonl")
        rated = {canonical(e.prompt): e.prompt for e in entries}
        rated |= {canonical(p): p for p in prompts}
        report(f"round {number}: {len(pairs)} pairs, {len(rated)} prompts")
        started = time.perf_counter()
        told_apart = train_reward(pairs, reward_from, policy_from, folder / "reward", settings)
        seconds["reward"] = time.perf_counter() - started
        report(f"reward model: {_shown(told_apart)}")
        started = time.perf_counter()
        reached = train_policy(
            list(rated.values()), policy_from, base, folder / "reward", folder / "policy", settings
        )
        seconds["ppo"] = time.perf_counter() - started
        report(
            f"policy: score {reached['score_first']:+.3f} → {reached['score_last']:+.3f}, KL {reached['kl']:.2f}"
        )
        played = {
            "round": number,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "base": base,
            "policy_from": policy_from,
            "reward_from": reward_from,
            "feedback": {"file": str(store.path), "last_entry": last_entry, **store.counts()},
            "reward": told_apart,
            "ppo": reached,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "settings": asdict(settings),
        }
        (folder / "round.json").write_text(json.dumps(played, indent=2) + "\n")
    return played


def last_round(rounds: Path) -> dict[str, Any] | None:
    """`round.json` of the round with the highest number."""
    numbers = [
        int(match[1])
        for file in rounds.glob("round-*/round.json")
        if (match := re.fullmatch(r"round-(\d+)", file.parent.name))
    ]
    if not numbers:
        return None
    played: dict[str, Any] = json.loads((rounds / f"round-{max(numbers)}" / "round.json").read_text())
    return played


def _starts(
    rounds: Path, before: dict[str, Any] | None, model: str | None, reward_model: str | None
) -> tuple[str, str, str]:
    """(base, where the policy starts, where the reward model starts), each a folder that is there."""
    if before is None:
        if model is None:
            raise ValueError(
                f"{rounds} holds no round yet: name the folder of the chat model to start from, with --model"
            )
        base = policy_from = _folder(model, "model")
        reward_from = base
    else:
        base = before["base"]
        if model is not None and Path(model).resolve() != Path(base):
            raise ValueError(
                f"the rounds in {rounds} started from {base}, got --model {model}: use another folder"
            )
        last = rounds / f"round-{before['round']}"
        policy_from, reward_from = (
            _folder(last / "policy", "policy"),
            _folder(last / "reward", "reward model"),
        )
    if reward_model is not None:
        reward_from = _folder(reward_model, "reward model")
    return _folder(base, "model"), policy_from, reward_from


def _folder(path: str | Path, what: str) -> str:
    folder = Path(path).resolve()
    if not (folder / "config.json").exists():
        raise ValueError(f"there is no {what} in {folder}: expected a folder with config.json")
    return str(folder)


def train_reward(
    pairs: list[Pair], start: str, tokenizer_from: str, output: Path, settings: RoundSettings
) -> dict[str, Any]:
    """Train a reward model on `pairs` and save it; returns the counts, and the share of pairs told apart."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, set_seed
    from trl import RewardConfig, RewardTrainer

    train, held_out = hold_out(pairs, settings.held_out)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    set_seed(settings.seed)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(output),
            seed=settings.seed,
            num_train_epochs=settings.reward_epochs,
            learning_rate=settings.reward_learning_rate,
            per_device_train_batch_size=settings.reward_batch_size,
            per_device_eval_batch_size=settings.reward_batch_size,
            max_length=settings.max_length,
            center_rewards_coefficient=0.01,  # only differences are learnt; this keeps scores around 0
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    def accuracy(some: list[Pair]) -> float:
        chosen, rejected = (_scores(model, tokenizer, some, side) for side in ("chosen", "rejected"))
        return sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(some)

    model.eval()
    told_apart: dict[str, Any] = {
        "pairs": len(train),
        "accuracy": accuracy(train),
        "held_out_pairs": len(held_out),
    }
    if held_out:
        told_apart["held_out_accuracy"] = accuracy(held_out)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return told_apart


def hold_out(pairs: list[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): split by prompt, alike in every round; where too few would be held out, none is."""

    def is_held_out(pair: Pair) -> bool:
        digest = hashlib.sha256(canonical(pair["prompt"]).encode()).digest()
        return int.from_bytes(digest[:4], "big") < share * 2**32

    held_out = [pair for pair in pairs if is_held_out(pair)]
    if len(held_out) < MIN_HELD_OUT or len(held_out) == len(pairs):
        return pairs, []
    return [pair for pair in pairs if not is_held_out(pair)], held_out


def _scores(model: Any, tokenizer: Any, pairs: list[Pair], side: str) -> list[float]:
    from fastppo.score import ClassifierReward, Episodes

    reward = ClassifierReward(model, tokenizer, max_rows=32)
    empty: list[list[int]] = [[] for _ in pairs]
    scores = reward(Episodes([p["prompt"] for p in pairs], [p[side] for p in pairs], empty, empty))
    model.requires_grad_(True)
    return scores


def train_policy(
    prompts: list[Messages], start: str, base: str, reward: Path, output: Path, settings: RoundSettings
) -> dict[str, Any]:
    """PPO of the policy in `start` against the reward model, saved to `output`; returns what the log says."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
    )

    from fastppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    classifier = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(output),
            seed=settings.seed,
            per_device_train_batch_size=settings.batch_size,
            total_episodes=settings.batch_size * settings.updates,
            response_length=settings.response_length,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            kl_coef=settings.kl_coef,
            temperature=settings.temperature,
            lam=1.0,  # one score at the end
            num_ppo_epochs=2,
            # The reward model's scale is its own, and another one every round.
            use_score_scaling=True,
            use_score_norm=True,
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_model=classifier,
        # Given the tokenizer it reads chats through their template, as it did when it was trained.
        reward_processing_classes=AutoTokenizer.from_pretrained(reward),
        train_dataset=[{"prompt": prompt} for prompt in prompts],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(output))
    log = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    return {
        "updates": len(log),
        "prompts": len(prompts),
        "score_first": log[0]["objective/scores"],
        "score_last": log[-1]["objective/scores"],
        "kl": log[-1]["objective/kl"],
    }


def _shown(told_apart: dict[str, Any]) -> str:
    shown = f"tells {told_apart['accuracy']:.0%} of {told_apart['pairs']} pairs apart"
    if told_apart["held_out_pairs"]:
        shown += f", {told_apart['held_out_accuracy']:.0%} of {told_apart['held_out_pairs']} held out"
    return shown
