"""`fastppo sft`: TRL's SFTTrainer from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import SFTConfig

from . import judging
from .arguments import Command, Parser
from .console import Screen
from .data import NAMED, check_dialogues, load_data, whole_texts
from .models import check_model, load_policy, load_tokenizer
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
class SFTArguments:
    """Model and data; all else is `trl.SFTConfig`."""

    model: str = field(metadata={"help": "Model to tune: folder, Hub id, or the name of a packaged model."})
    dataset: str = field(
        metadata={"help": "Texts to learn: file, dataset folder, or named set (chat-dialogues)."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out texts of the perplexities; a named set has its own."},
    )
    split: str = field(default="train", metadata={"help": "Split of dataset."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_dataset."})
    rows: int | None = field(default=None, metadata={"help": "Use the first rows of dataset only."})
    eval_rows: int | None = field(default=None, metadata={"help": "Use the first rows of eval_dataset only."})
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep checkpoint-N once the whole model is saved."}
    )


COMMAND = Command(
    name="sft",
    purpose="Tune a language model on texts or dialogues (TRL's SFTTrainer).",
    example="fastppo sft --model smollm2-135m-instruct --dataset chat-dialogues --output_dir runs/sft --max_steps 100",
    reads="rows with `messages` (a chat), `text`, or `prompt` and `completion`",
    writes="output_dir: model, tokenizer, log.jsonl; checkpoint-N on the way",
    settings=(SFTArguments, SFTConfig),
    usual=(
        *(
            "model",
            "dataset",
            "eval_dataset",
            "split",
            "eval_split",
            "rows",
            "eval_rows",
            "max_length",
            "packing",
        ),
        *TAKEN_FROM_TRAINING,
    ),
)


def parser() -> Parser:
    """Of this command."""
    return Parser(COMMAND, machine_defaults(), required=("output_dir",))


def read(script: SFTArguments) -> tuple[Any, Any]:
    """The rows to train on and the held-out ones, if any, checked."""
    rows = load_data(script.dataset, script.split, most=script.rows)
    check_dialogues(rows, script.dataset)
    held_out_name = script.eval_dataset or (script.dataset if script.dataset in NAMED else None)
    held_out = None
    if held_out_name is not None:
        held_out = load_data(held_out_name, script.eval_split, most=script.eval_rows)
        check_dialogues(held_out, held_out_name)
    return rows, held_out


def run(settings: Sequence[Any], screen: Screen) -> dict[str, Any]:
    """Check, measure, train, measure, save; return the figures."""
    script, config = settings
    started = time.perf_counter()
    rows, held_out = read(script)
    path = check_model(script.model, "model")
    resume = resume_point(config)
    tokenizer = load_tokenizer(path)
    model = load_policy(path)
    use_cache = model.config.use_cache

    from trl import SFTTrainer

    def perplexity() -> dict[str, Any] | None:
        if held_out is None:
            return None
        return asdict(
            judging.perplexity(
                trained_model, tokenizer, whole_texts(held_out), max_length=config.max_length or 512
            )
        )

    with teaching("sft"):
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
        )
    show_progress(trainer, screen)
    trained_model: Any = trainer.model
    out = Path(config.output_dir)
    before = _once(out / "perplexity_before.json", perplexity, again=resume is None)
    screen.say(f"{len(rows)} texts" + ("" if resume is None else f"; going on from {resume}"))
    trained = trainer.train(resume_from_checkpoint=resume)
    after = perplexity()
    trained_model.config.use_cache = use_cache  # training turned it off, and it would be saved so
    save_whole(trained_model, tokenizer, out)
    save_log(trainer.state.log_history, out)
    (out / "perplexity_before.json").unlink()
    if not script.keep_checkpoints:
        drop_checkpoints(out)
    return {
        "command": "sft",
        "output_dir": str(out),
        "steps": trainer.state.global_step,
        "tokens": int(
            next((h["num_tokens"] for h in trainer.state.log_history[::-1] if "num_tokens" in h), 0)
        ),
        "resumed_from": resume,
        "loss": trained.training_loss,
        "perplexity_before": before,
        "perplexity_after": after,
        "held_out_texts": 0 if held_out is None else len(held_out),
        "seconds": time.perf_counter() - started,
    }


def _once(path: Path, measure: Callable[[], Any], *, again: bool) -> Any:
    """What was measured before an interruption; measured now where there was none."""
    if again or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(measure()), encoding="utf-8")
        unfinished.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def summary(report: dict[str, Any], screen: Screen) -> None:
    """For a person."""
    before, after = report["perplexity_before"], report["perplexity_after"]
    rows = []
    if before is not None:
        what = f"perplexity of {report['held_out_texts']} held-out texts"
        rows.append((what, str(judging.Estimate(**before)), str(judging.Estimate(**after))))
    title = f"SFT: {report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s"
    screen.table(title, ("", "before", "after"), rows)
    screen.say(f"model  {report['output_dir']}", "bold")
