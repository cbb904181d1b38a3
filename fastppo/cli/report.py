"""One page over all steps of `fastppo rlhf`: curves, figures with intervals, sample dialogues. It needs no network."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .eval import interval, result_rows
from .judging import Estimate
from .page import (
    AFTER,
    BEFORE,
    SECOND,
    TEMPLATES,
    THIRD,
    describe_machine,
    inline,
    minutes_and_seconds,
    png,
    pyplot,
    render,
)
from .training import read_log

SHOWN = 12  # samples that are open at first


def write_report(steps: Mapping[str, Path], folder: Path) -> Path:
    """report.html in `folder`, from the folders of the steps before it."""
    records = {name: json.loads((path / "step.json").read_text()) for name, path in steps.items()}
    samples = [json.loads(line) for line in (steps["eval"] / "samples.jsonl").read_text().splitlines()]
    evaluation = records["eval"]["figures"]
    page = render(
        TEMPLATES / "rlhf.html.j2",
        records=records,
        evaluation=evaluation,
        results=result_rows(evaluation),
        samples=[{**s, "prompt": _dialogue(s["prompt"])} for s in samples],
        shown=SHOWN,
        curves=_curves(steps, records),
        interval=interval,
        estimate=lambda figure: str(Estimate(**figure)),
        minutes_and_seconds=minutes_and_seconds,
        seconds=sum(record["seconds"] for record in records.values()),
        machine=describe_machine(["fastppo", *sys.argv[1:]]),
        spread=inline(draw_spread(evaluation, samples)),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _dialogue(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt


def _curves(steps: Mapping[str, Path], records: Mapping[str, Any]) -> dict[str, str]:
    """Step → its curves as an image, where it logged any."""
    curves = {}
    for name in ("sft", "reward", "judge", "ppo"):
        image = draw_curves(read_log(steps[name]), _panels(name, records[name]["figures"]))
        if image is not None:
            curves[name] = inline(image)
    return curves


def _panels(step: str, figures: Mapping[str, Any]) -> list[tuple[str, dict[str, str], str]]:
    """(title, word → metric, colour of a single line) of a step's curves."""
    if step == "ppo":
        rewards = {n: f"rewards/{m}/mean" for n, m in figures.get("reward_metrics", {}).items()}
        return [
            ("reward of the training replies", {"weighted sum": "objective/scores", **rewards}, AFTER),
            ("KL to the SFT model, nats per reply", {"KL": "objective/kl"}, SECOND),
            ("tokens per reply", {"tokens": "completions/mean_length"}, BEFORE),
        ]
    loss = [("loss", {"loss": "loss"}, SECOND)]
    if step == "sft":
        return [*loss, ("accuracy of the next token", {"accuracy": "mean_token_accuracy"}, THIRD)]
    if figures["kind"] == "preferences":
        return [*loss, ("pairs in the right order, training", {"accuracy": "accuracy"}, THIRD)]
    return loss


def draw_curves(
    log: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, dict[str, str], str]]
) -> bytes | None:
    """The panels that have at least two points, side by side as a PNG."""
    drawn = []
    for title, lines, colour in panels:
        points = {
            word: [(e["step"], e[key]) for e in log if key in e and "step" in e]
            for word, key in lines.items()
        }
        points = {word: line for word, line in points.items() if len(line) > 1}
        if points:
            drawn.append((title, points, colour))
    if not drawn:
        return None
    width = 3.6 * max(2, len(drawn))  # one panel is as high on the page as two
    figure, axes = pyplot().subplots(1, len(drawn), figsize=(width, 2.9), squeeze=False)
    for axis, (title, points, colour) in zip(axes[0], drawn, strict=True):
        for (word, line), shade in zip(points.items(), (colour, SECOND, THIRD, BEFORE), strict=False):
            axis.plot(*zip(*line, strict=True), color=shade, linewidth=1.8, label=word)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02, y=0.12)
        if len(points) > 1:
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.2 * (high - low))  # room for the legend, where no line runs
            axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(points))
    return png(figure)


def draw_spread(evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> bytes:
    """How many held-out replies got which score, of both models, by each reward."""
    names = list(samples[0]["model"]["scores"])
    figure, axes = pyplot().subplots(1, len(names), figsize=(2.7 * len(names), 2.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.hist(
            [[s[side]["scores"][name] for s in samples] for side in ("ref_model", "model")],
            bins=10,
            color=[BEFORE, AFTER],
            label=["SFT", "PPO"],
            rwidth=0.85,
        )
        axis.set_title("weighted sum" if name == "total" else name, loc="left", fontsize=10)
    axes[0][0].set_ylabel("replies", fontsize=9)
    axes[0][0].legend(frameon=False, fontsize=8)
    return png(figure)
