"""`fastppo reward`: a reward model from preferences (TRL's RewardTrainer), or from ratings (transformers' Trainer).

Scores have no natural zero nor unit, so the last layer is shifted and scaled at the end: held-out texts (else the
training texts) score 0 on average with standard deviation 1. A weight between rewards then means what it says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import RewardConfig

from . import UsageError, judging
from .arguments import Command, Parser
from .console import Screen
from .data import NAMED, check_columns, check_preferences, check_ratings, load_data
from .models import check_model, context_of, load_classifier, load_tokenizer
from .training import (
    TAKEN_FROM_TRAINING,
    drop_checkpoints,
    machine_defaults,
    resume_point,
    save_log,
    save_whole,
    show_progress,
    teaching,
)


@dataclass
class RewardArguments:
    """Model and data; all else is `trl.RewardConfig`."""

    model: str = field(
        metadata={"help": "Backbone: folder, Hub id, or the name of a packaged model (all-minilm-l6-v2)."}
    )
    dataset: str = field(
        metadata={
            "help": "Preferences or ratings: file, folder, or named set (chat-preferences, rated-snippets)."
        }
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows; a named set has its own."}
    )
    split: str = field(default="train", metadata={"help": "Split of dataset."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_dataset."})
    rows: int | None = field(default=None, metadata={"help": "Use the first rows of dataset only."})
    eval_rows: int | None = field(default=None, metadata={"help": "Use the first rows of eval_dataset only."})
    rating_min: float | None = field(default=None, metadata={"help": "Lowest rating that can be."})
    rating_max: float | None = field(default=None, metadata={"help": "Highest rating that can be."})
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Pairs alike in this column share something: intervals are over such groups (starter)."
        },
    )
    frozen_layers: int = field(
        default=0,
        metadata={"help": "Keep the embeddings and this many first layers of an encoder as they are."},
    )
    standardize: bool = field(
        default=True, metadata={"help": "Shift and scale the scores to mean 0 and standard deviation 1."}
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep checkpoint-N once the whole model is saved."}
    )


COMMAND = Command(
    name="reward",
    purpose="Train a reward model on people's preferences (TRL's RewardTrainer) or ratings.",
    example="fastppo reward --model all-minilm-l6-v2 --dataset chat-preferences --output_dir runs/reward",
    reads="rows with `chosen` and `rejected` (and `prompt`), or with `text` and `rating`",
    writes="output_dir: classifier with one output, tokenizer, log.jsonl; checkpoint-N on the way",
    settings=(RewardArguments, RewardConfig),
    usual=(
        *(
            "model",
            "dataset",
            "eval_dataset",
            "split",
            "eval_split",
            "rows",
            "eval_rows",
            "rating_min",
            "rating_max",
        ),
        *("frozen_layers", "standardize", "max_length", "center_rewards_coefficient"),
        *TAKEN_FROM_TRAINING,
    ),
)


def parser() -> Parser:
    """Of this command."""
    return Parser(COMMAND, machine_defaults(), required=("output_dir",))


def read(script: RewardArguments) -> tuple[Any, Any, bool]:
    """The rows to train on, the held-out ones, if any, checked, and whether they are ratings."""
    rows = load_data(script.dataset, script.split, most=script.rows)
    rated = check_columns(rows, script.dataset, ("chosen", "rejected"), ("text", "rating"))[0] == "text"
    rows = _checked(rows, script.dataset, rated, script)
    held_out_name = script.eval_dataset or (script.dataset if script.dataset in NAMED else None)
    held_out = None
    if held_out_name is not None:
        held_out = load_data(held_out_name, script.eval_split, most=script.eval_rows)
        held_out = _checked(held_out, held_out_name, rated, script)
    return rows, held_out, rated


def run(settings: Sequence[Any], screen: Screen) -> dict[str, Any]:
    """Check, train, measure, save; return the figures."""
    script, config = settings
    started = time.perf_counter()
    rows, held_out, rated = read(script)
    path = check_model(script.model, "model")
    resume = resume_point(config)
    # What a reply is worth shows at its end: that is what a long text keeps.
    tokenizer = load_tokenizer(path, truncation_side="left")
    model = load_classifier(path)
    limit = context_of(model.config)
    config.max_length = min(x for x in (config.max_length, limit) if x is not None)
    freeze(model, script.frozen_layers)
    with teaching("reward"):
        make = rating_trainer if rated else preference_trainer
        trainer = make(model, tokenizer, config, rows)
    show_progress(trainer, screen)
    screen.say(f"{len(rows)} rows" + ("" if resume is None else f"; going on from {resume}"))
    trained = trainer.train(resume_from_checkpoint=resume)

    measured = rows.select(range(min(1000, len(rows)))) if held_out is None else held_out
    texts = texts_of(measured, tokenizer, rated)
    given = scores(trainer.model, tokenizer, texts)
    if script.standardize:
        standardize(trainer.model, given)  # moves no figure: each is about order or correlation
    measure = measure_ratings if rated else measure_preferences
    figures = measure(given, texts, measured, script.group_column)
    out = Path(config.output_dir)
    save_whole(trainer.model, tokenizer, out)
    save_log(trainer.state.log_history, out)
    if not script.keep_checkpoints:
        drop_checkpoints(out)
    return {
        "command": "reward",
        "output_dir": str(out),
        "kind": "ratings" if rated else "preferences",
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "resumed_from": resume,
        "loss": trained.training_loss,
        "measured_on": "training rows" if held_out is None else "held-out rows",
        "measured_rows": len(measured),
        "measured": {name: asdict(figure) for name, figure in figures.items()},
        "seconds": time.perf_counter() - started,
    }


def _checked(rows: Any, name: str, rated: bool, script: RewardArguments) -> Any:
    if not rated:
        if script.group_column is not None:
            check_columns(rows, name, (script.group_column,))
        return check_preferences(rows, name)
    check_ratings(rows, name, script.rating_min, script.rating_max)
    return rows


def texts_of(rows: Any, tokenizer: Any, rated: bool) -> list[str]:
    """All texts of the rows as the reward model reads them, in PPO too: of pairs, first the chosen ones."""
    if rated:
        return list(rows["text"])
    prompts = rows["prompt"] if "prompt" in rows.column_names else [None] * len(rows)
    return [text for side in ("chosen", "rejected") for text in conversations(tokenizer, prompts, rows[side])]


def conversations(tokenizer: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> list[str]:
    """Prompt and completion as one text each; either may be a text or a chat."""
    from ..score import classifier_texts

    both = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str) and not isinstance(completion, str):
            prompt = [{"role": "user", "content": prompt}]
        elif isinstance(completion, str) and prompt is not None and not isinstance(prompt, str):
            completion = [{"role": "assistant", "content": completion}]
        elif prompt is None:
            prompt = "" if isinstance(completion, str) else []
        both.append((prompt, completion))
    return classifier_texts(tokenizer, *zip(*both, strict=True))


def preference_trainer(model: Any, tokenizer: Any, config: Any, rows: Any) -> Any:
    """TRL's RewardTrainer on token ids: it reads the very ids that the model will read in PPO."""
    from datasets import Dataset
    from trl import RewardTrainer

    from ..score import classifier_ids

    ids = classifier_ids(tokenizer, texts_of(rows, tokenizer, False), config.max_length)
    chosen, rejected = ids[: len(rows)], ids[len(rows) :]
    # TRL would drop the column that train_sampling_strategy="group_by_length" reads.
    config.remove_unused_columns = False
    lengths = [max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
    pairs = Dataset.from_dict(
        {"chosen_ids": chosen, "rejected_ids": rejected, config.length_column_name: lengths}
    )
    return RewardTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=pairs)


def rating_trainer(model: Any, tokenizer: Any, config: Any, rows: Any) -> Any:
    """Least squares on the ratings, in units of their standard deviation from their mean."""
    import numpy as np
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer

    from ..score import classifier_ids

    ids = classifier_ids(tokenizer, texts_of(rows, tokenizer, True), config.max_length)
    ratings = np.asarray(rows["rating"], dtype=np.float32)
    labels = (ratings - ratings.mean()) / ratings.std()
    model.config.problem_type = "regression"
    return Trainer(
        model=model,
        args=config,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=tokenizer,
    )


def freeze(model: Any, layers: int) -> None:
    """Train neither the embeddings nor the first `layers` layers.

    Raises:
        UsageError: the model has no such layers.
    """
    from torch import nn

    if layers == 0:
        return
    stack = next((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), None)
    if stack is None or not 0 < layers <= len(stack):
        raise UsageError(f"frozen_layers must lie in 0..{len(stack or [])}, got {layers}")
    for module in (
        model.get_input_embeddings(),
        getattr(model.base_model, "embeddings", None),
        *stack[:layers],
    ):
        if module is not None:
            module.requires_grad_(False)


def scores(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[float]:
    """What the model gives each text, on the path that PPO takes."""
    from ..score import ClassifierReward, Episodes

    distinct = list(dict.fromkeys(texts))  # pairs share texts
    n = len(distinct)
    given = Episodes(distinct, [""] * n, [[]] * n, [[]] * n)
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        of = dict(zip(distinct, ClassifierReward(model, tokenizer, max_rows=64)(given), strict=True))
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
    return [of[text] for text in texts]


def standardize(model: Any, given: Sequence[float]) -> None:
    """Shift and scale the last layer so that these scores would be 0 on average with standard deviation 1.

    A layer without bias (decoders have none) is scaled alone.
    """
    import torch
    from torch import nn

    layer = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]
    mean, std = torch.tensor(given).mean().item(), torch.tensor(given).std().item()
    if not std > 0:
        raise UsageError("the reward model gives every text the same score: it has learnt nothing")
    with torch.no_grad():
        layer.weight /= std
        if layer.bias is not None:
            layer.bias.copy_((layer.bias - mean) / std)


def measure_preferences(
    given: Sequence[float], texts: Sequence[str], rows: Any, group_column: str | None
) -> dict[str, judging.Estimate]:
    """Share of pairs that the scores put in people's order, beside what length and sentiment alone get right."""
    n = len(rows)
    groups = None if group_column is None else rows[group_column]
    return judging.judge_preferences(given[:n], given[n:], texts[:n], texts[n:], groups)


def measure_ratings(
    given: Sequence[float], texts: Sequence[str], rows: Any, group_column: str | None
) -> dict[str, judging.Estimate]:
    """Correlation of the scores with the ratings, beside that of length and sentiment."""
    return judging.judge_ratings(given, texts, rows["rating"])


def summary(report: dict[str, Any], screen: Screen) -> None:
    """For a person."""
    title = f"Reward model: {report['steps']} steps, {report['rows']} {report['kind']} in {report['seconds']:.0f} s"
    rows = [(name, str(judging.Estimate(**figure))) for name, figure in report["measured"].items()]
    screen.table(title, ("", f"{report['measured_rows']} {report['measured_on']}, 95 % interval"), rows)
    screen.say(f"model  {report['output_dir']}", "bold")
