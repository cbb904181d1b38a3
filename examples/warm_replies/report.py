"""What happened, for a person: a table in the terminal, curves as PNG, a page that needs no network."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.warm_replies.warmth import Measured, interval, mean
from fastppo.cli.page import AFTER, BEFORE, SECOND, describe_machine, minutes_and_seconds, png, pyplot, render

ROOMS = ("rollout", "score", "update")


@dataclass(frozen=True)
class Run:
    """All that the report shows: `records` has every update's metrics, `seconds` the parts of the run."""

    openings: list[str]
    before: Measured
    after: Measured
    records: list[dict[str, float]]
    seconds: dict[str, float]
    settings: dict[str, Any]
    talk_command: str
    machine: dict[str, str] = field(
        default_factory=lambda: describe_machine(["python", "-m", "examples.warm_replies", *sys.argv[1:]])
    )

    @property
    def gain(self) -> float:
        return self.after.reward - self.before.reward

    @property
    def gain_interval(self) -> float:
        """Half the 95 % interval of the gain, paired by opening."""
        return interval([a - b for a, b in zip(self.after.rewards, self.before.rewards, strict=True)])

    @property
    def warmer(self) -> int:
        """Openings whose reply got a higher reward than before."""
        return sum(a > b for a, b in zip(self.after.rewards, self.before.rewards, strict=True))

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """(name, before, after) of the before/after table."""
        b, a = self.before, self.after
        return [
            (
                "mean reward (-1 to 1)",
                f"{b.reward:+.3f} ± {b.reward_interval:.3f}",
                f"{a.reward:+.3f} ± {a.reward_interval:.3f}",
            ),
            ("KL to the start, nats per reply", "0", f"{mean(a.kl):.2f}"),
            ("tokens per reply", f"{mean(b.tokens):.1f}", f"{mean(a.tokens):.1f}"),
            (
                "replies that ended by themselves",
                f"{100 * mean(b.finished):.0f} %",
                f"{100 * mean(a.finished):.0f} %",
            ),
            ("distinct-2 (variety of wording)", f"{b.distinct_2:.2f}", f"{a.distinct_2:.2f}"),
        ]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Openings with both replies and both rewards, in the order of the held-out set."""
        return [
            {"opening": opening, "before": b, "after": a, "reward_before": rb, "reward_after": ra}
            for opening, b, a, rb, ra in zip(
                self.openings,
                self.before.replies,
                self.after.replies,
                self.before.rewards,
                self.after.rewards,
                strict=True,
            )
        ]

    @property
    def rooms(self) -> list[tuple[str, float]]:
        """(room, seconds) over the whole training; what the rooms do not cover is `other`."""
        spent = [(room, sum(record.get(f"time/{room}", 0.0) for record in self.records)) for room in ROOMS]
        other = self.seconds["training"] - sum(seconds for _, seconds in spent)
        return [*spent, ("other", max(0.0, other))]


def print_summary(run: Run, console: Any, samples: int = 4) -> None:
    """The before/after table and a few replies."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{len(run.openings)} openings that training never saw", title_justify="left", show_edge=False
    )
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for row in run.figures:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(
        f"\nreward {run.gain:+.3f} ± {run.gain_interval:.3f} (95 %), "
        f"a warmer reply to {run.warmer} of {len(run.openings)}",
        highlight=False,
    )
    replies = Table(title="the first of them", title_justify="left", show_edge=False, show_lines=True)
    for name in ("opening", "before", "after"):
        replies.add_column(name, ratio=1, overflow="fold")
    for s in run.samples[:samples]:
        replies.add_row(
            escape(s["opening"]),
            f"{escape(s['before'])} [dim]{s['reward_before']:+.2f}[/dim]",
            f"{escape(s['after'])} [dim]{s['reward_after']:+.2f}[/dim]",
        )
    console.print()
    console.print(replies)


def write_report(run: Run, folder: Path) -> Path:
    """curves.png and report.html in `folder`; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = draw_curves(run)
    (folder / "curves.png").write_bytes(curves)
    page = render(
        Path(__file__).parent / "report.html.j2",
        run=run,
        mean=mean,
        curves=base64.b64encode(curves).decode(),
        spread=base64.b64encode(draw_spread(run)).decode(),
        training=minutes_and_seconds(run.seconds["training"]),
        minutes_and_seconds=minutes_and_seconds,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def draw_curves(run: Run) -> bytes:
    """Reward, KL and speed per update as a PNG."""
    plt = pyplot()
    updates = range(1, len(run.records) + 1)
    panels = [
        ("reward of the training replies", "objective/scores", AFTER),
        ("KL to the start, nats per reply", "objective/kl", SECOND),
        ("tokens of reply per second", "tokens_per_second", BEFORE),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9))
    for axis, (title, key, colour) in zip(axes, panels, strict=True):
        axis.plot(
            updates,
            [record[key] for record in run.records],
            color=colour,
            linewidth=2,
            marker="o",
            markersize=3,
        )
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("update", fontsize=9)
        axis.margins(x=0.02, y=0.15)
        if key != "objective/scores":
            axis.set_ylim(bottom=0)
    axes[0].axhline(run.before.reward, color=BEFORE, linewidth=1, linestyle="--")
    axes[0].axhline(run.after.reward, color=AFTER, linewidth=1, linestyle="--")
    for name, level, colour in (("before", run.before.reward, BEFORE), ("after", run.after.reward, AFTER)):
        place = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": colour}
        axes[0].annotate(f"held-out, {name}", (len(run.records), level), (0, 4), **place)
    return png(figure)


def draw_spread(run: Run) -> bytes:
    """How many held-out replies got which reward, before and after."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.4, 2.6))
    edges = [-1 + 0.2 * i for i in range(11)]
    axis.hist(
        [run.before.rewards, run.after.rewards],
        bins=edges,
        color=[BEFORE, AFTER],
        label=["before", "after"],
        rwidth=0.85,
    )
    axis.set_xlabel("reward of a reply (VADER compound)", fontsize=9)
    axis.set_ylabel("replies", fontsize=9)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    return png(figure)
