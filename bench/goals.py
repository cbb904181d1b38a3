"""What the ops should reach, as data, and the table that says whether they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import MISSING, Row, aligned, bytes_text, ratio_text

Measured = list[tuple[str, float]]  # (where, figure)


@dataclass(frozen=True)
class Goal:
    """A figure that should stay below or above a bound, wherever `find` looks it up."""

    what: str
    unit: str
    bound: float
    find: Callable[[Sequence[Row], dict[str, Any]], Measured]
    at_least: bool = False
    text: Callable[[float], str] = ratio_text

    def met(self, measured: Measured) -> bool:
        return all(x >= self.bound if self.at_least else x <= self.bound for _, x in measured)

    def worst(self, measured: Measured) -> tuple[str, float]:
        return (min if self.at_least else max)(measured, key=lambda one: one[1])


def ratios(op: str, kind: str, shape: str = "", state: str = "", most_bytes: int | None = None) -> Any:
    """Ratios to `kind` of all rows of an op; optionally of one shape, one state, or inputs up to a size."""

    def find(rows: Sequence[Row], scaling: dict[str, Any]) -> Measured:
        return [
            (row.label, ratio)
            for row in rows
            if row.op == op and shape in row.shape and state in row.state
            if most_bytes is None or row.bytes <= most_bytes
            if (ratio := row.ratio(kind)) is not None
        ]

    return find


def slower_than(op: str, other: str) -> Any:
    """Time of an op over that of another one on the same inputs."""

    def find(rows: Sequence[Row], scaling: dict[str, Any]) -> Measured:
        base = {row.label: row.ours for row in rows if row.op == other}
        return [(row.label, row.ours / base[row.label]) for row in rows if row.op == op and row.label in base]

    return find


def extra_memory(op: str, shape: str) -> Any:
    def find(rows: Sequence[Row], scaling: dict[str, Any]) -> Measured:
        return [
            (row.label, row.extra_memory["ours"])
            for row in rows
            if row.op == op and shape in row.shape and "ours" in row.extra_memory
        ]

    return find


def call_overheads(rows: Sequence[Row], scaling: dict[str, Any]) -> Measured:
    return [(row.op, 1e6 * row.ours) for row in rows if row.op.endswith(" call")]


def speedups(rows: Sequence[Row], scaling: dict[str, Any]) -> Measured:
    return [
        (f"{one['op']} {one['shape']}", one["speedup"]["2"])
        for one in scaling.get("threads", [])
        if one["state"] == "hot" and one["row_op"] and "2" in one["speedup"]
    ]


def slopes(rows: Sequence[Row], scaling: dict[str, Any]) -> Measured:
    return [(one["op"], one["slope"]) for one in scaling.get("curves", []) if one["axis"] == "N"]


def megabytes(count: float) -> str:
    return bytes_text(int(count))


FORWARD, BOTH, LINEAR = (
    "logprobs forward",
    "logprobs forward + backward",
    "linear_logprobs forward + backward",
)
PLAIN, TRUNCATED = "sample (temperature)", "sample (top-k, top-p, min-p)"
L2 = 2 << 20  # of two cores
GOALS = (
    Goal("logprobs forward [512, 49152]", "× read floor", 1.5, ratios(FORWARD, "floor", "[512, 49152]")),
    Goal("", "× torch.compile", 3, ratios(FORWARD, "compile", "[512, 49152]"), at_least=True),
    Goal("", "× eager", 25, ratios(FORWARD, "eager", "[512, 49152]"), at_least=True),
    Goal(
        "logprobs forward + backward [512, 49152]",
        "× (read + copy floor)",
        1.5,
        ratios(BOTH, "floor", "[512, 49152]"),
    ),
    Goal("", "× torch.compile", 2, ratios(BOTH, "compile", "[512, 49152]"), at_least=True),
    Goal(
        "sample, temperature, B = 1 … 64", "× read floor, cold", 1.6, ratios(PLAIN, "floor", "49152]", "cold")
    ),
    Goal("", "× in-cache exp-sum, in L2", 1.3, ratios(PLAIN, "floor", "49152]", "hot", L2)),
    Goal("", "× eager, cold", 15, ratios(PLAIN, "eager", "49152]", "cold"), at_least=True),
    Goal("sample, top-k 50, top-p 0.9, min-p 0.05", "× temperature only", 3, slower_than(TRUNCATED, PLAIN)),
    Goal("", "× Hugging Face", 30, ratios(TRUNCATED, "peer"), at_least=True),
    Goal(
        "linear_logprobs forward + backward, N = 2048",
        "× bare products",
        1.10,
        ratios(LINEAR, "floor", "[2048"),
    ),
    Goal("", "× TRL's chunked function", 1.3, ratios(LINEAR, "peer", "[2048"), at_least=True),
    Goal("", "extra memory, N = 4096, V = 151936", 64e6, extra_memory(LINEAR, "151936"), text=megabytes),
    Goal(
        "distribution_kl forward [512, 49152]",
        "× reading both",
        1.6,
        ratios("distribution_kl forward", "floor", "[512, 49152]"),
    ),
    Goal(
        "rewards_and_advantages [64, 512]",
        "× TRL 1.12",
        50,
        ratios("rewards_and_advantages", "peer", "[64, 512]"),
        at_least=True,
    ),
    Goal("", "× torch.compile", 3, ratios("rewards_and_advantages", "compile", "[64, 512]"), at_least=True),
    Goal(
        "ppo_loss with gradients [64, 512]",
        "× eager",
        10,
        ratios("ppo_loss with gradients", "eager", "[64, 512]"),
        at_least=True,
    ),
    Goal("", "× torch.compile", 3, ratios("ppo_loss with gradients", "compile", "[64, 512]"), at_least=True),
    Goal("row ops, 1 to 2 threads, in the cache", "× as fast", 1.8, speedups, at_least=True),
    Goal("call on tiny inputs", "µs", 15, call_overheads),
    Goal("log time against log N, N ≥ 256", "slope", 1.03, slopes),
)


@dataclass(frozen=True)
class Outcome:
    """A goal and what was measured for it."""

    what: str
    unit: str
    goal: str
    measured: Measured
    worst: str
    where: str
    met: bool | None


def outcomes(rows: Sequence[Row], scaling: dict[str, Any], goals: Sequence[Goal] = GOALS) -> list[Outcome]:
    """All goals; `met` is None where nothing was measured."""
    found, what = [], ""
    for goal in goals:
        what = goal.what or what
        measured = goal.find(rows, scaling)
        where, worst = goal.worst(measured) if measured else ("", None)
        number = f"{goal.bound:g}" if goal.text is ratio_text else goal.text(goal.bound)
        bound = f"{'≥' if goal.at_least else '≤'} {number}"
        shown = MISSING if worst is None else goal.text(worst)
        met = goal.met(measured) if measured else None
        found.append(Outcome(what, goal.unit, bound, measured, shown, where, met))
    return found


def goals_table(found: Sequence[Outcome]) -> str:
    """One line per goal: the worst of its figures, where that was, and whether all of them meet it."""
    verdict = {True: "met", False: "missed", None: "not measured"}
    lines = [
        (one.what, one.unit, one.goal, one.worst, verdict[one.met], one.where + several(one)) for one in found
    ]
    return aligned(("goal", "unit", "bound", "worst", "", "where"), lines, left=2)


def several(one: Outcome) -> str:
    return f" (of {len(one.measured)})" if len(one.measured) > 1 else ""
