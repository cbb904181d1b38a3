"""The live bar, and a record of every update for the curves."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback


class LiveProgress(TrainerCallback):
    """Shows update, reward, KL, tokens/s and time to go; stops the run when its time is up.

    Args:
        console: where to draw. Without a terminal, one line per update is printed instead of a bar.
        updates: updates planned.
        minutes: stop before an update that would likely end later than this; None: no limit.
        most_kl: stop after an update whose replies were this far from the start, in nats each; None: no limit.
    """

    def __init__(
        self, console: Console, updates: int, minutes: float | None = None, most_kl: float | None = None
    ) -> None:
        self.records: list[dict[str, float]] = []
        self.why_stopped = ""
        self.console, self.updates, self.minutes, self.most_kl = console, updates, minutes, most_kl
        self.started = 0.0
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=12),  # all of it fits 80 columns
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            refresh_per_second=2,  # drawing takes time from two busy cores
        )
        self.task = self.bar.add_task("", total=updates, numbers="first update …", eta="")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()
        if self.console.is_terminal:
            self.bar.start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "objective/scores" not in logs:
            return
        self.records.append({**logs, "seconds": self.seconds})
        done = len(self.records)
        per_update = self.seconds / done
        last = done == self.updates
        if not last and self.minutes is not None and self.seconds + per_update > 60 * self.minutes:
            self.why_stopped = (
                f"another one of {per_update:.0f} s would not end within --minutes {self.minutes:g}"
            )
        if not last and self.most_kl is not None and logs["objective/kl"] > self.most_kl:
            self.why_stopped = (
                f"replies are {logs['objective/kl']:.1f} nats from the start, --most-kl {self.most_kl:g}"
            )
        if self.why_stopped:
            last = control.should_training_stop = True
        numbers = f"reward {logs['objective/scores']:+.2f}  KL {logs['objective/kl']:4.1f}"
        numbers += f"  {logs['tokens_per_second']:.0f} tokens/s"
        left = 0.0 if last else per_update * (self.updates - done)
        eta = f"{int(left) // 60}:{int(left) % 60:02d} to go"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, numbers=numbers, eta=eta)
        else:
            self.console.print(f"update {done}/{self.updates}  {numbers}  {eta}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.console.is_terminal:
            self.bar.stop()
