"""`make demo`: measure, train, measure again, show what changed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from examples.warm_replies import need

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.warm_replies",
        description="PPO teaches SmolLM2-135M-Instruct to answer strangers' opening messages more warmly.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts order and of every draw (default 0)")
    parser.add_argument("--updates", type=_at_least_one, default=12, help="PPO updates (default 12)")
    parser.add_argument(
        "--minutes", type=_above_zero, default=20.0, help="stop training by then (default 20)"
    )
    parser.add_argument(
        "--most-kl",
        type=_above_zero,
        default=7.0,
        help="stop when replies have drifted so far (default 7 nats)",
    )
    parser.add_argument(
        "--held-out", type=_at_least_one, default=128, help="openings kept for measuring (default 128)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "warm_replies", help="folder for model and report"
    )
    return parser.parse_args(arguments)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number}")
    return number


def main() -> None:
    options = parse()
    keep_quiet()
    for module, package in (
        ("chitchat_dataset", "chitchat-dataset"),
        ("vaderSentiment", "vaderSentiment"),
        ("rich", "rich"),
    ):
        need(module, package)
    for module, package in (
        ("jinja2", "jinja2"),
        ("matplotlib", "matplotlib"),
        ("fastppo", "fastppo (the kernels)"),
    ):
        need(module, package)
    from rich.console import Console

    from examples.warm_replies import openings, policy, progress, report, warmth

    console = Console()
    clock = Clock()
    console.print("[bold]Warmer replies by PPO[/bold]: SmolLM2-135M, strangers' openings, VADER as reward\n")

    train, held_out = openings.split(openings.read_openings(), options.held_out)
    with console.status("loading the model (the first time it is unpacked, which takes half a minute)"):
        folder = policy.model_folder()
        reward = warmth.warmth()
        bar = progress.LiveProgress(console, options.updates, options.minutes, options.most_kl)
        trainer, tokenizer = make_trainer(folder, train, reward, bar, options)
    clock.stop("loading")
    console.print(f"{len(train)} openings to train on, {len(held_out)} held out", highlight=False)

    def measure(reference: Any) -> warmth.Measured:
        return warmth.measure(
            trainer.actor_critic.policy,
            reference,
            tokenizer,
            held_out,
            reward=reward,
            response_length=trainer.args.response_length,
        )

    with console.status("measuring the model as it is"):
        before = measure(None)
    clock.stop("measuring before")
    console.print(f"reward before: {before.reward:+.3f} ± {before.reward_interval:.3f}", highlight=False)

    trainer.train()
    clock.stop("training")
    if not bar.records:
        raise SystemExit("training logged no update")
    if bar.why_stopped:
        done = len(bar.records)
        console.print(
            f"stopped after {done} of {options.updates} updates: {bar.why_stopped}", highlight=False
        )

    with console.status("measuring the trained model"):
        after = measure(trainer.ref_model)
    clock.stop("measuring after")
    with console.status("saving"):
        model_to = options.output / "model"
        trainer.save_model(str(model_to))
    clock.stop("saving")

    run = report.Run(
        openings=held_out,
        before=before,
        after=after,
        records=bar.records,
        seconds=clock.seconds,
        settings=shown_settings(trainer.args, options),
        talk_command=f"{_as_typed(Path(sys.executable))} -m examples.warm_replies.talk {_as_typed(model_to)}",
    )
    page = report.write_report(run, options.output)
    report.print_summary(run, console)
    console.print(
        f"\nreport  {_as_typed(page)}\ncurves  {_as_typed(options.output / 'curves.png')}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"talk to it:  {run.talk_command}", highlight=False, soft_wrap=True)


def make_trainer(
    folder: str, train: list[str], reward: Any, bar: Any, options: argparse.Namespace
) -> tuple[Any, Any]:
    """The whole use of fastppo: a model, a reward function, prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.warm_replies.warmth import as_chat
    from fastppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    config = PPOConfig(
        output_dir=str(options.output),
        seed=options.seed,
        # 48 replies of at most 24 tokens per update, two passes over them of one step each
        per_device_train_batch_size=24,
        gradient_accumulation_steps=2,
        total_episodes=48 * options.updates,
        response_length=24,
        num_ppo_epochs=2,
        # drifting further would buy more reward, and read worse
        kl_coef=0.03,
        lam=1.0,  # one score at the end: its credit must reach the first words, where the tone is set
        learning_rate=7.5e-5,
        lr_scheduler_type="linear",  # big steps while there is much to learn, none at the end
        temperature=1.0,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=None,  # a copy of the model as it is now
        reward_model=reward,
        train_dataset=[{"prompt": as_chat(opening)} for opening in train],
        value_model=None,  # the critic is a head on the policy's own trunk
        callbacks=[bar],
    )
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, tokenizer


def shown_settings(config: Any, options: argparse.Namespace) -> dict[str, Any]:
    names = "response_length temperature num_ppo_epochs learning_rate kl_coef kl_estimator cliprange"
    names += " cliprange_value vf_coef gamma lam max_grad_norm bf16 seed"
    return {
        "model": "SmolLM2-135M-Instruct",
        "critic": "value head on the policy's trunk",
        "replies per update": config.batch_size,
        **{name: getattr(config, name) for name in names.split()},
    }


class Clock:
    """Seconds of each part of the run, from one stop to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._since = now - self._since, now


def keep_quiet() -> None:
    """The demo's own lines are all that belongs on the screen."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _as_typed(path: Path) -> str:
    """The path as a person in the project's folder would type it."""
    path = path if path.is_absolute() else Path.cwd() / path
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
