"""`fastppo eval`: a trained model beside its reference on held-out prompts.

Both answer every prompt with the same random numbers. Besides the rewards it was trained on, a judge it never saw says
which of the two replies is better; a gain under the first that the judge does not share is the sign of reward hacking.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import UsageError, judging
from .answers import Answers, answer
from .arguments import Command, Parser, number
from .console import Screen
from .data import check_dialogues, check_prompt_lengths, check_prompts, load_data, whole_texts
from .models import check_model, context_of, load_config, load_policy, load_tokenizer
from .rewards import load_rewards


@dataclass
class EvalArguments:
    """What is compared on what."""

    model: str = field(metadata={"help": "Trained policy: folder or Hub id."})
    ref_model: str = field(metadata={"help": "What it was trained from (the SFT model)."})
    dataset: str = field(metadata={"help": "Held-out prompts: file, folder or named set (chat-openings)."})
    reward: list[str] = field(metadata={"help": "Rewards it was trained on, as `fastppo ppo --reward`."})
    output_dir: str = field(metadata={"help": "Folder of eval.json and samples.jsonl."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Their weights; 1 each."})
    judge: str | None = field(
        default=None, metadata={"help": "A reward it was not trained on: who wins, and who hacks?"}
    )
    texts: str | None = field(
        default=None, metadata={"help": "Held-out dialogues or texts: the perplexity of both models."}
    )
    split: str = field(default="test", metadata={"help": "Split of dataset and texts."})
    rows: int | None = field(default=None, metadata={"help": "Use the first rows of dataset only."})
    text_rows: int | None = field(default=None, metadata={"help": "Use the first rows of texts only."})
    text_length: int = field(default=512, metadata={"help": "Tokens read of each of the texts."})
    response_length: int = field(default=53, metadata={"help": "Most tokens in a reply."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits."})
    ema: bool = field(default=False, metadata={"help": "Evaluate the model's average, ema/, in its place."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})


COMMAND = Command(
    name="eval",
    purpose="Compare a trained model with its reference on held-out prompts: reward, KL, win rate, variety, length.",
    example="fastppo eval --model runs/ppo --ref_model runs/sft --dataset chat-openings --reward runs/reward vader \\\n"
    "      --judge runs/judge --output_dir runs/eval",
    reads="prompts with a column `prompt`; texts with `messages` or `text`",
    writes="output_dir: eval.json (figures with 95 % intervals), samples.jsonl (every reply of both, with its scores)",
    settings=(EvalArguments,),
    usual=tuple(EvalArguments.__dataclass_fields__),
)


def parser() -> Parser:
    """Of this command."""
    return Parser(COMMAND)


def read(script: EvalArguments) -> tuple[Any, Any]:
    """The prompts and the texts, if any, checked."""
    rows = load_data(script.dataset, script.split, most=script.rows)
    check_prompts(rows, script.dataset)
    texts = None
    if script.texts is not None:
        texts = load_data(script.texts, script.split, most=script.text_rows)
        check_dialogues(texts, script.texts)
    return rows, texts


def run(settings: Sequence[Any], screen: Screen) -> dict[str, Any]:
    """Answer, judge, write; return the figures."""
    (script,) = settings
    started = time.perf_counter()
    if script.response_length < 1 or not script.temperature > 0:
        raise UsageError(
            "fastppo eval: response_length must be at least 1 and temperature above 0, got "
            f"{script.response_length} and {script.temperature}"
        )
    weights = [1.0] * len(script.reward) if script.reward_weights is None else script.reward_weights
    if len(weights) != len(script.reward):
        raise UsageError(
            f"reward_weights must have one number per reward ({len(script.reward)}), got {len(weights)}"
        )
    rows, texts = read(script)
    path, ref_path = check_model(script.model, "model"), check_model(script.ref_model, "ref_model")
    if script.ema:
        path = check_model(str(Path(path) / "ema"), "model's average (ema_decay)")
    tokenizer = load_tokenizer(ref_path, padding_side="left")
    limit = context_of(load_config(ref_path))
    check_prompt_lengths(rows, script.dataset, tokenizer, limit, script.response_length)
    judges = [*script.reward, *([] if script.judge is None else [script.judge])]
    rewards, reward_tokenizers = load_rewards(judges)
    names = _names(judges)

    reference = _on_device(load_policy(ref_path))
    policy = _on_device(load_policy(path))
    both: dict[str, Answers] = {}
    for side, model, base in (("ref_model", reference, None), ("model", policy, reference)):
        screen.say(f"{side} answers {len(rows)} prompts")
        both[side] = answer(
            model,
            base,
            tokenizer,
            list(rows["prompt"]),
            response_length=script.response_length,
            temperature=script.temperature,
            seed=script.seed,
        )
    scored = {
        side: {n: a.scored(r, t) for n, r, t in zip(names, rewards, reward_tokenizers, strict=True)}
        for side, a in both.items()
    }
    for given in scored.values():
        given["total"] = [
            sum(w * x for w, x in zip(weights, each, strict=True))
            for each in zip(*(given[n] for n in names[: len(weights)]), strict=True)
        ]
    perplexity = None
    if texts is not None:
        perplexity = {
            side: asdict(
                judging.perplexity(model, tokenizer, whole_texts(texts), max_length=script.text_length)
            )
            for side, model in (("ref_model", reference), ("model", policy))
        }
    figures = compare(both, scored, names[-1] if script.judge is not None else None, names[0])
    report = {
        "command": "eval",
        "output_dir": script.output_dir,
        **figures,
        "reward_weights": dict(zip(names, weights, strict=False)),
        "perplexity": perplexity,
        "seconds": time.perf_counter() - started,
    }
    write(Path(script.output_dir), report, both, scored)
    return report


def compare(
    both: dict[str, Answers], scored: dict[str, dict[str, list[float]]], judge: str | None, trained_on: str
) -> dict[str, Any]:
    """Figures of reference and model, and of their difference, each paired by prompt.

    `gap` is the gain under the learnt reward it was trained on less the gain under the judge, both in standard
    deviations over the reference's replies: above 0, the model pleases the one more than the other.
    """
    figures: dict[str, Any] = {"prompts": len(both["model"].prompts)}
    for side, answers in both.items():
        figures[side] = {
            "scores": {name: estimate(given) for name, given in scored[side].items()},
            "kl": estimate(answers.kl),
            "tokens": estimate(answers.tokens),
            "finished": statistics.fmean(answers.finished),
            "distinct_1": judging.distinct(answers.replies, 1),
            "distinct_2": judging.distinct(answers.replies, 2),
        }
    before, after = scored["ref_model"], scored["model"]
    gains = {name: [a - b for a, b in zip(after[name], before[name], strict=True)] for name in before}
    figures["gain"] = {name: estimate(given) for name, given in gains.items()}
    figures["judge"] = judge
    figures["win_rate"] = figures["gap"] = None
    if judge is not None:
        figures["win_rate"] = asdict(judging.win_rate(after[judge], before[judge]))
        units = [statistics.stdev(before[name]) or 1.0 for name in (trained_on, judge)]
        figures["gap"] = estimate(
            [a / units[0] - b / units[1] for a, b in zip(gains[trained_on], gains[judge], strict=True)]
        )
    return figures


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval."""
    return asdict(judging.mean(values))


def write(
    out: Path, report: dict[str, Any], both: dict[str, Answers], scored: dict[str, dict[str, list[float]]]
) -> None:
    """eval.json and samples.jsonl."""
    from ..checkpoint import written_then_renamed

    with written_then_renamed(out) as folder:
        (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for i, prompt in enumerate(both["model"].prompts):
                sample: dict[str, Any] = {"prompt": prompt}
                for side, answers in both.items():
                    sample[side] = {
                        "reply": answers.replies[i],
                        "scores": {name: given[i] for name, given in scored[side].items()},
                        "kl": answers.kl[i],
                    }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def _names(judges: Sequence[str]) -> list[str]:
    """Short names of rewards: the last part of a path, made different where two are alike."""
    names: list[str] = []
    for judge in judges:
        name = judge.rstrip("/").split("/")[-1]
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _on_device(model: Any) -> Any:
    import torch

    return model.to(
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    ).eval()


def interval(figure: dict[str, float]) -> str:
    """A mean with its 95 % interval, for a table."""
    return f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"


def _plain(figure: Any) -> str:
    return number(figure["value"] if isinstance(figure, dict) else figure)


def result_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, reference, model, gain) as words."""
    before, after, gain = report["ref_model"], report["model"], report["gain"]
    rows = []
    for name, given in before["scores"].items():
        what = "reward, weighted sum" if name == "total" else f"score of {name}"
        rows.append((what, interval(given), interval(after["scores"][name]), interval(gain[name])))
    rows.append(("KL to the reference, nats per reply", "0", interval(after["kl"]), ""))
    for key, what in (
        ("tokens", "tokens per reply"),
        ("finished", "share of replies that ended by themselves"),
        ("distinct_1", "distinct-1 (variety of words)"),
        ("distinct_2", "distinct-2 (variety of word pairs)"),
    ):
        rows.append((what, _plain(before[key]), _plain(after[key]), ""))
    if report["perplexity"] is not None:
        both = report["perplexity"]
        rows.append(("perplexity of held-out texts", _plain(both["ref_model"]), _plain(both["model"]), ""))
    return rows


def summary(report: dict[str, Any], screen: Screen) -> None:
    """For a person."""
    screen.table(
        f"{report['prompts']} held-out prompts; mean and 95 % interval",
        ("", "reference", "model", "gain, paired"),
        result_rows(report),
    )
    if report["win_rate"] is not None:
        rate, gap = report["win_rate"], report["gap"]
        screen.say(
            f"{report['judge']}, which training never saw, prefers the model's reply in {100 * rate['value']:.0f} % "
            f"[{100 * rate['low']:.0f}, {100 * rate['high']:.0f}] of the prompts",
            "bold",
        )
        screen.say(
            f"gap of the gains, trained-on reward less judge, in standard deviations: {interval(gap)}"
            + (" (the judge shares less of the gain: a sign of reward hacking)" if gap["low"] > 0 else "")
        )
    screen.say(f"figures  {report['output_dir']}/eval.json", "bold")
