"""What the training commands share: defaults for this machine, resuming, and saving a whole model or none."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..metrics import ProgressCallback as PPOProgressCallback
from . import UsageError
from .console import Screen

LOG = "log.jsonl"
TAKEN_FROM_TRAINING = (
    "output_dir",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "seed",
)


def machine_defaults() -> dict[str, Any]:
    """Defaults of `TrainingArguments` that suit the machine: bfloat16 where it is multiplied, the CPU where nothing
    else is.
    """
    import torch

    from ..config import multiplies_bfloat16

    return {"bf16": multiplies_bfloat16(), "use_cpu": not torch.accelerator.is_available()}


def resume_point(config: Any) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint` is a folder, or "auto" for the newest if there is one.

    Raises:
        UsageError: the folder is no checkpoint.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if str(wanted).lower() in ("auto", "true"):
        found = complete_checkpoint(Path(config.output_dir))
        return None if found is None else str(found)
    if not (Path(wanted) / "trainer_state.json").exists():
        raise UsageError(f"--resume_from_checkpoint: expected 'auto' or a checkpoint folder, got {wanted}")
    return str(wanted)


def complete_checkpoint(folder: Path) -> Path | None:
    """The newest whole `checkpoint-N`. transformers' Trainer writes them in place, and trainer_state.json last: where
    that cannot be read, the process was killed over it.
    """
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return checkpoint
    return None


@contextmanager
def teaching(command: str) -> Iterator[None]:
    """Within the block a library's complaint about settings, models or data is shown without a traceback."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UsageError(f"fastppo {command}: {error}") from error


def save_log(history: list[dict[str, Any]], folder: Path) -> None:
    """What the trainer logged, one JSON object a line."""
    (folder / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What `save_log` wrote; nothing where it did not."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def drop_checkpoints(folder: str | Path) -> None:
    """Remove `checkpoint-N`, which serve nothing once the whole model is saved."""
    for checkpoint in Path(folder).glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def save_whole(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer, written under a temporary name and renamed: never half a model."""
    from ..checkpoint import written_then_renamed

    with written_then_renamed(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


# What a log line shows: metric → word.
SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "objective/scores": "reward",
    "objective/kl": "KL",
    "tokens_per_second": "tokens/s",
}


class Progress(TrainerCallback):
    """A live bar with the latest figures; where there is no terminal, a line for each."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.bar: Any = None
        self.started = 0.0
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.started, self.first = time.perf_counter(), state.global_step
        self.bar = self.screen.bar(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on by one."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the figures that tell how it goes."""
        figures = {word: f"{float(logs[key]):.3g}" for key, word in SHOWN.items() if key in (logs or {})}
        if not figures:
            return
        if self.bar is not None:
            self.bar.set_postfix(figures)
            return
        done = state.global_step - self.first
        left = (time.perf_counter() - self.started) / max(1, done) * (state.max_steps - state.global_step)
        words = "  ".join(f"{word} {value}" for word, value in figures.items())
        self.screen.say(f"step {state.global_step}/{state.max_steps}  {words}  {left:.0f} s to go", "dim")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def show_progress(trainer: Trainer, screen: Screen) -> None:
    """This package's bar in place of the trainer's own."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    for other in (PrinterCallback, ProgressCallback, PPOProgressCallback):
        trainer.remove_callback(other)
    trainer.add_callback(Progress(screen))
