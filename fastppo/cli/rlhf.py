"""`fastppo rlhf`: base model, SFT, two reward models, PPO, evaluation and report, one after the other.

Each step is one of the other commands (or as small), run in `<output_dir>/<step>.tmp` and renamed to
`<output_dir>/<step>` when it is complete and its output has been checked, with a `step.json` of settings, figures,
command and seconds. A rerun keeps complete steps whose settings are unchanged and goes on inside an interrupted one
from its last checkpoint.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import importlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import UsageError
from .arguments import Command, Parser, closest, read_yaml
from .console import Screen
from .models import check_model, load_config, load_policy, load_tokenizer
from .training import complete_checkpoint, save_whole

STEPS = ("base", "sft", "reward", "judge", "ppo", "eval", "report")
# Step → the command that it is. `base` and `report` have no settings of their own.
COMMANDS = {"sft": "sft", "reward": "reward", "judge": "reward", "ppo": "ppo", "eval": "eval"}
# Step → the steps whose output it reads.
READS = {
    "base": (),
    "sft": ("base",),
    "reward": (),
    "judge": (),
    "ppo": ("sft", "reward"),
    "eval": ("sft", "ppo", "reward", "judge"),
    "report": ("base", "sft", "reward", "judge", "ppo", "eval"),
}
RESUMABLE = ("sft", "reward", "judge", "ppo")  # by the trainer's own checkpoints
RECORD = "step.json"
STARTED = "started.json"
PRESETS = Path(__file__).parent / "presets"


@dataclass
class RLHFArguments:
    """Settings of the whole; those of a step are under its name in YAML, `--STEP.NAME` as a flag."""

    output_dir: str = field(metadata={"help": "Folder of all steps; a run that stopped goes on in it."})
    preset: str = field(default="small", metadata={"help": "Settings to begin with."})
    base_model: str | None = field(
        default=None, metadata={"help": "Model to begin with: folder, Hub id, or a packaged model's name."}
    )
    reward_weight: float | None = field(
        default=None, metadata={"help": "Weight of the learnt human preference in PPO's reward."}
    )
    task_reward: list[str] | None = field(
        default=None, metadata={"help": "The task's rewards, as `fastppo ppo --reward` takes them."}
    )
    task_reward_weights: list[float] | None = field(default=None, metadata={"help": "Their weights."})
    seed: int | None = field(default=None, metadata={"help": "Of every draw and order."})
    restart_from: str | None = field(
        default=None, metadata={"help": f"Throw away this step and the later ones: {', '.join(STEPS)}."}
    )


WHOLE = ("base_model", "reward_weight", "task_reward", "task_reward_weights", "seed")

COMMAND = Command(
    name="rlhf",
    purpose="Human feedback from end to end: SFT, reward model, a second one as judge, PPO, evaluation, report.",
    example="fastppo rlhf --preset small --output_dir runs/small --reward_weight 0.5 --ppo.total_episodes 512",
    reads="a preset, a YAML file of the same form over it (--config), flags over both; a step's settings are those of "
    "\n        its command: --sft.max_steps 50, or in YAML  sft: {max_steps: 50}",
    writes="output_dir/base, sft, reward, judge, ppo, eval, report/report.html; each with step.json",
    settings=(RLHFArguments,),
    usual=tuple(RLHFArguments.__dataclass_fields__),
)


class RLHFParser(Parser):
    """Preset, then YAML, then flags; settings of steps are checked by their own commands' parsers."""

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """(arguments, merged settings).

        Raises:
            UsageError: an unknown or wrong setting; the message says where it stands.
        """
        of_steps, own = _split(arguments)
        read, unknown = self.parser.parse_known_args(own)
        self.help_if_asked(read)
        self.reject_unknown(unknown)
        (script,) = self.build(own)
        path = PRESETS / f"{script.preset}.yaml"
        if not path.exists():
            known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
            raise UsageError(
                f"--preset {script.preset}: no such preset{closest(script.preset, known)} ({', '.join(known)})"
            )
        if script.restart_from is not None and script.restart_from not in STEPS:
            raise UsageError(
                f"--restart_from {script.restart_from}: no such step{closest(script.restart_from, STEPS)} "
                f"({', '.join(STEPS)})"
            )
        settings = read_yaml(path)
        if read.config is not None:
            merge(settings, read_yaml(read.config), str(read.config))
        merge(settings, {k: getattr(script, k) for k in WHOLE if getattr(script, k) is not None}, "flags")
        return script, settings, of_steps


def parser() -> Parser:
    """Of this command."""
    return RLHFParser(COMMAND)


def _split(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Flags of steps (`--ppo.kl_coef 0.1`), by step and without its name, and the others."""
    of_steps: dict[str, list[str]] = {}
    own: list[str] = []
    target = own
    for argument in arguments:
        if argument.startswith("--"):
            step, dot, rest = argument[2:].partition(".")
            if dot and "=" not in step:
                if step not in COMMANDS:
                    raise UsageError(
                        f"{argument}: no such step{closest(step, COMMANDS)} (steps with settings: "
                        f"{', '.join(COMMANDS)})"
                    )
                target = of_steps.setdefault(step, [])
                argument = f"--{rest}"
            else:
                target = own
        target.append(argument)
    return of_steps, own


def merge(settings: dict[str, Any], over: Mapping[str, Any], origin: str) -> None:
    """Lay a mapping of the same form over the settings.

    Raises:
        UsageError: a name is unknown, or a step's settings are no mapping.
    """
    known = [*WHOLE, *COMMANDS]
    for name, value in over.items():
        if name not in known:
            raise UsageError(f"{origin}: unknown setting {name!r}{closest(str(name), known)}")
        if name in COMMANDS:
            if not isinstance(value, Mapping):
                raise UsageError(f"{origin}: {name}: expected a mapping `setting: value`, got {value!r}")
            settings.setdefault(name, {}).update(value)
        else:
            settings[name] = value


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One step of a run: what it is asked to do.

    Attributes:
        name: of the step and of its folder.
        settings: as its command takes them, with the folders of other steps as `{step}`.
        fingerprint: of these settings and of those of all steps that it reads.
        flags: the command's arguments.
    """

    name: str
    settings: dict[str, Any]
    fingerprint: str
    flags: list[str]

    def read_data(self) -> None:
        """Read and check the data now: a bad row should not be found after half an hour of training."""
        module = importlib.import_module(f"fastppo.cli.{COMMANDS[self.name]}")
        module.read(module.parser().build([*self.flags, "--output_dir=unused"])[0])


def plan(out: Path, settings: dict[str, Any], of_steps: Mapping[str, list[str]]) -> list[Step]:
    """Every step with its settings, each checked by its command's own parser before anything runs.

    Raises:
        UsageError: a setting is unknown or wrong, or is one that the run itself decides.
    """
    for name in ("base_model", "task_reward"):
        if settings.get(name) is None:
            raise UsageError(f"--{name} is required")
    given = copy.deepcopy(settings)
    task = given["task_reward"]
    task_weights = given.get("task_reward_weights") or [1.0] * len(task)
    weight = float(given.get("reward_weight", 1.0))
    seed = given.get("seed", 0)
    decided: dict[str, dict[str, Any]] = {
        "base": {"model": given["base_model"]},
        "sft": {"model": "{base}", "seed": seed},
        "reward": {"seed": seed},
        "judge": {"seed": seed},
        "ppo": {
            "model": "{sft}",
            "reward": ["{reward}", *task],
            "reward_weights": [weight, *task_weights],
            "seed": seed,
        },
        "eval": {
            "model": "{ppo}",
            "ref_model": "{sft}",
            "reward": ["{reward}", *task],
            "reward_weights": [weight, *task_weights],
            "judge": "{judge}",
            "seed": seed,
        },
        "report": {},
    }
    steps: list[Step] = []
    prints: dict[str, str] = {}
    for name in STEPS:
        own = dict(given.get(name) or {})
        refuse_decided(name, own, decided[name])
        merged = {**own, **decided[name]}
        flags: list[str] = []
        if name in COMMANDS:
            parser = importlib.import_module(f"fastppo.cli.{COMMANDS[name]}").parser()
            flags = parser.flags(merged, name)
            typed = list(of_steps.get(name, ()))
            read, unknown = parser.parser.parse_known_args([*flags, *typed])
            parser.reject_unknown(unknown)
            from_yaml = vars(parser.parser.parse_known_args(flags)[0])
            changed = {k: v for k, v in vars(read).items() if v != from_yaml[k]}
            refuse_decided(name, changed, decided[name])
            merged |= changed
            flags += typed
            parser.build([*flags, f"--output_dir={out / name}"])  # each dataclass checks its fields
        told = json.dumps([name, merged, [prints[n] for n in READS[name]]], sort_keys=True)
        prints[name] = hashlib.sha256(told.encode()).hexdigest()[:16]
        steps.append(Step(name, merged, prints[name], flags))
    return steps


def refuse_decided(step: str, given: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    """Raise a UsageError for a setting that follows from where the step stands in the run."""
    for key in given:
        if key in decided or key in ("output_dir", "resume_from_checkpoint"):
            raise UsageError(f"{step}.{key} is decided by `fastppo rlhf` itself: take it out")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed between two settings, in words."""
    changed = [
        f"{k} was {before.get(k)!r}, is {now.get(k)!r}"
        for k in sorted({*before, *now})
        if before.get(k) != now.get(k)
    ]
    return "; ".join(changed) or "a step that it reads has changed"


# --- running ---------------------------------------------------------------------------------------------------------


def run(settings: Sequence[Any], screen: Screen) -> dict[str, Any]:
    """Run the steps that are not complete; return the record of each."""
    script, given, of_steps = settings
    out = Path(script.output_dir)
    started = time.perf_counter()
    steps = plan(out, given, of_steps)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        if script.restart_from is not None:
            for name in STEPS[STEPS.index(script.restart_from) :]:
                shutil.rmtree(out / name, ignore_errors=True)
                shutil.rmtree(out / f"{name}.tmp", ignore_errors=True)
        refuse_changed(out, steps)
        for step in steps:
            if step.name in COMMANDS and not (out / step.name).exists():
                step.read_data()
        records = {step.name: _one(out, step, i, screen) for i, step in enumerate(steps)}
    return {
        "command": "rlhf",
        "output_dir": str(out),
        "report": str(out / "report" / "report.html"),
        "steps": records,
        "seconds": time.perf_counter() - started,
        "seconds_of_steps": sum(r["seconds"] for r in records.values()),
    }


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Within the block no other `fastppo rlhf` may work in the folder; the lock falls with the process.

    Raises:
        UsageError: another does.
    """
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{out}: another `fastppo rlhf` is at work in this folder") from error
        yield


def refuse_changed(out: Path, steps: Sequence[Step]) -> None:
    """Raise a UsageError where a complete step was made with other settings."""
    for step in steps:
        record = read_record(out / step.name)
        if record is not None and record["fingerprint"] != step.fingerprint:
            raise UsageError(
                f"{out / step.name} was made with other settings: {differences(record['settings'], step.settings)}. "
                f"`--restart_from {step.name}` makes it and the later steps anew; another --output_dir keeps both"
            )


def read_record(folder: Path) -> dict[str, Any] | None:
    """`step.json` of a complete step."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _one(out: Path, step: Step, number: int, screen: Screen) -> dict[str, Any]:
    title = f"[{number + 1}/{len(STEPS)}] {step.name}"
    final, unfinished = out / step.name, out / f"{step.name}.tmp"
    record = read_record(final)
    if record is not None:
        check_output(step.name, final)
        screen.say(
            f"{title}: complete, its settings are unchanged: kept ({record['seconds']:.0f} s)", "green"
        )
        return record
    resumed = _begin(step, unfinished)
    screen.say(f"{title}" + (": goes on from where it stopped" if resumed else ""), "bold")
    before = json.loads((unfinished / STARTED).read_text())["seconds"]
    began, worked = time.perf_counter(), time.process_time()
    places = {**{name: str(out / name) for name in STEPS}, "presets": str(PRESETS)}
    command, figures = RUN[step.name](step, places, unfinished, screen)
    check_output(step.name, unfinished)
    record = {
        "step": step.name,
        "fingerprint": step.fingerprint,
        "settings": step.settings,
        "command": command,
        "seconds": before + time.perf_counter() - began,
        "processor_seconds": time.process_time() - worked,  # of the last of several starts
        "figures": figures,
    }
    (unfinished / STARTED).unlink()
    (unfinished / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, final)
    return record


def _begin(step: Step, unfinished: Path) -> bool:
    """Make the folder of a step, or keep that of an interrupted one if it had the same settings."""
    note = unfinished / STARTED
    if note.exists() and step.name in RESUMABLE:
        started = json.loads(note.read_text())
        checkpoint = complete_checkpoint(unfinished)
        if started["fingerprint"] == step.fingerprint and checkpoint is not None:
            newest = checkpoint.stat().st_mtime
            # The time up to the checkpoint has been well spent and counts.
            seconds = started["seconds"] + max(0.0, newest - started["at"])
            _write(note, {**started, "seconds": seconds, "at": time.time()})
            return True
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write(note, {"fingerprint": step.fingerprint, "seconds": 0.0, "at": time.time()})
    return False


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


def _base(step: Step, places: Mapping[str, str], folder: Path, screen: Screen) -> tuple[str, dict[str, Any]]:
    path = check_model(step.settings["model"], "base_model")
    model = load_policy(path)
    save_whole(model, load_tokenizer(path), folder)
    parameters = sum(p.numel() for p in model.parameters())
    return f"AutoModelForCausalLM.from_pretrained({path!r})", {"model": path, "parameters": parameters}


def _command(
    step: Step, places: Mapping[str, str], folder: Path, screen: Screen
) -> tuple[str, dict[str, Any]]:
    name = COMMANDS[step.name]
    module = importlib.import_module(f"fastppo.cli.{name}")
    flags = [_placed(flag, places) for flag in step.flags]
    shown = [*flags, f"--output_dir={places[step.name]}"]
    flags.append(f"--output_dir={folder}")
    if step.name in RESUMABLE:
        flags.append("--resume_from_checkpoint=auto")
    parser = module.parser()
    report = module.run(parser.build(flags), screen)
    report["output_dir"] = places[step.name]
    module.summary(report, screen)
    return shlex.join(["fastppo", name, *shown]), report


def _placed(flag: str, places: Mapping[str, str]) -> str:
    for name, place in places.items():
        flag = flag.replace("{" + name + "}", place)
    return flag


def _report(
    step: Step, places: Mapping[str, str], folder: Path, screen: Screen
) -> tuple[str, dict[str, Any]]:
    from .report import write_report

    page = write_report({n: Path(places[n]) for n in STEPS if n != "report"}, folder)
    return "fastppo rlhf", {"bytes": page.stat().st_size}


RUN = {"base": _base, **dict.fromkeys(COMMANDS, _command), "report": _report}


def check_output(name: str, folder: Path) -> None:
    """Raise a UsageError unless the step's output is whole: what the next step would stumble over.

    Weights are read, and must be finite.
    """
    again = f"`--restart_from {name}` makes it anew"
    needed = {"eval": ("eval.json", "samples.jsonl"), "report": ("report.html",)}.get(
        name, ("config.json", "model.safetensors", "tokenizer_config.json")
    )
    for file in needed:
        if not (folder / file).exists():
            raise UsageError(f"step {name}: expected {file} in {folder}, found none; {again}")
    if "config.json" not in needed:
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise UsageError(
            f"step {name}: {folder / 'model.safetensors'} cannot be read: {error}; {again}"
        ) from error
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UsageError(f"step {name}: expected finite weights, got NaN or inf in {key}; {again}")
    if name in ("reward", "judge") and load_config(str(folder)).num_labels != 1:
        raise UsageError(f"step {name}: expected a classifier with one output in {folder}; {again}")


def summary(report: dict[str, Any], screen: Screen) -> None:
    """For a person."""
    rows = [(name, f"{record['seconds']:.0f} s") for name, record in report["steps"].items()]
    rows.append(("all", f"{report['seconds_of_steps'] / 60:.1f} min"))
    screen.table("Steps", ("", "time"), rows)
    screen.say(f"report  {report['report']}", "bold")
