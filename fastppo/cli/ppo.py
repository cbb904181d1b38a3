"""`fastppo ppo`: `fastppo.PPOTrainer` from the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import PPOConfig
from . import UsageError
from .arguments import Command, Parser, number
from .console import Screen
from .data import check_dialogues, check_prompt_lengths, check_prompts, load_data
from .models import check_model, context_of, load_config, load_policy, load_tokenizer
from .rewards import load_rewards
from .training import drop_checkpoints, machine_defaults, resume_point, save_log, show_progress, teaching


@dataclass
class PPOArguments:
    """Models and data; all else is `fastppo.PPOConfig`."""

    model: str = field(metadata={"help": "Policy to train: folder, Hub id, or the name of a packaged model."})
    dataset: str = field(metadata={"help": "Prompts: file, dataset folder, or named set (chat-openings)."})
    reward: list[str] = field(
        metadata={
            "help": "Rewards, summed with reward_weights: classifier (folder or Hub id), module:function, http(s) URL "
            "of a reward server, or vader (sentiment)."
        }
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference of the KL penalty; none: model as it is."}
    )
    split: str = field(default="train", metadata={"help": "Split of dataset."})
    rows: int | None = field(default=None, metadata={"help": "Use the first rows of dataset only."})
    ptx_dataset: str | None = field(
        default=None, metadata={"help": "Supervised texts of PPO-ptx (ptx_coef): file, folder or named set."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep checkpoint-N once the whole model is saved."}
    )


COMMAND = Command(
    name="ppo",
    purpose="Train a language model against rewards by proximal policy optimization (fastppo.PPOTrainer).",
    example="fastppo ppo --model runs/sft --dataset chat-openings --reward runs/reward vader --reward_weights 0.5 1 "
    "\\\n      --output_dir runs/ppo --total_episodes 1024 --response_length 32",
    reads="prompts with a column `prompt` (text, or messages with role and content); other columns go to rewards",
    writes="output_dir: policy, tokenizer, critic/ (and ema/), log.jsonl; checkpoint-N on the way",
    settings=(PPOArguments, PPOConfig),
    usual=(
        *(
            "model",
            "dataset",
            "reward",
            "reward_weights",
            "ref_model",
            "split",
            "rows",
            "output_dir",
            "total_episodes",
        ),
        *("response_length", "temperature", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *(
            "num_mini_batches",
            "num_ppo_epochs",
            "learning_rate",
            "kl_coef",
            "ptx_dataset",
            "ptx_coef",
            "ema_decay",
        ),
        *("gradient_checkpointing", "save_steps", "resume_from_checkpoint", "seed"),
    ),
)


def parser() -> Parser:
    """Of this command."""
    defaults = {"use_cpu": machine_defaults()["use_cpu"], "num_sample_generations": 0}
    return Parser(COMMAND, defaults, required=("output_dir",))


def read(script: PPOArguments) -> tuple[Any, Any]:
    """The prompts and the supervised texts, if any, checked."""
    rows = load_data(script.dataset, script.split, most=script.rows)
    check_prompts(rows, script.dataset)
    texts = None
    if script.ptx_dataset is not None:
        texts = load_data(script.ptx_dataset)
        check_dialogues(texts, script.ptx_dataset)
    return rows, texts


def run(settings: Sequence[Any], screen: Screen) -> dict[str, Any]:
    """Check, train, save; return the figures."""
    script, config = settings
    started = time.perf_counter()
    rows, texts = read(script)
    path = check_model(script.model, "model")
    reference_path = None if script.ref_model is None else check_model(script.ref_model, "ref_model")
    resume = resume_point(config)
    tokenizer = load_tokenizer(path, padding_side="left")
    with teaching("ppo"):
        limit = context_of(load_config(path))
        if config.max_prompt_length is None:
            check_prompt_lengths(rows, script.dataset, tokenizer, limit, config.response_length)
        elif limit is not None and config.max_prompt_length + config.response_length > limit:
            raise UsageError(
                f"max_prompt_length + response_length must be at most the model's context {limit}, got "
                f"{config.max_prompt_length} + {config.response_length}"
            )
    rewards, tokenizers = load_rewards(script.reward)

    from .. import PPOTrainer

    with teaching("ppo"):
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=load_policy(path),
            ref_model=None if reference_path is None else load_policy(reference_path),
            reward_model=rewards,
            reward_processing_classes=tokenizers,
            train_dataset=rows,
            ptx_dataset=texts,
        )
    show_progress(trainer, screen)
    screen.say(
        f"{config.num_total_batches} updates of {config.batch_size} episodes, {len(rows)} prompts"
        + ("" if resume is None else f"; going on from {resume}")
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(config.output_dir)
    out = Path(config.output_dir)
    history = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    save_log(history, out)
    names = [name.rstrip("/").split("/")[-1] for name in script.reward]
    reward_metrics = dict(zip(names, (r.name for r in trainer.rewards), strict=True))
    if not script.keep_checkpoints:
        drop_checkpoints(out)
    return {
        "command": "ppo",
        "output_dir": str(out),
        "updates": trainer.state.global_step,
        "episodes": trainer.state.episode,
        "resumed_from": resume,
        "reward_metrics": reward_metrics,
        "reward_first": history[0]["objective/scores"],
        "reward_last": history[-1]["objective/scores"],
        "kl_last": history[-1]["objective/kl"],
        "tokens_per_second": sum(h["tokens_per_second"] for h in history) / len(history),
        "seconds": time.perf_counter() - started,
    }


def summary(report: dict[str, Any], screen: Screen) -> None:
    """For a person."""
    screen.table(
        f"PPO: {report['updates']} updates, {report['episodes']} episodes in {report['seconds']:.0f} s",
        ("", "first update", "last update"),
        [
            ("reward", number(report["reward_first"]), number(report["reward_last"])),
            ("KL to the reference, nats per reply", "", number(report["kl_last"])),
            ("tokens of reply per second", "", number(report["tokens_per_second"])),
        ],
    )
    screen.say(f"model  {report['output_dir']}", "bold")
