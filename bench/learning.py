"""Does fastppo learn what the PPO trainer of TRL 1.12.0 learns? Reward against episodes, KL and time, over seeds.

Both sides train the same policy with a separate critic on the same openings, reward, critic initialisation and
settings, and neither clips gradients: TRL never does. Tasks:
  warm   VADER's sentiment of the reply, -1 to 1: the demo's
  short  share of the reply's words that have at most four letters, 0 to 1: a rule of format
Models:
  small    1.1 million parameters (bench/small_lm.py): a run takes a minute or two, so there can be many seeds
  smollm2  SmolLM2-135M-Instruct, the demo's: a run takes a quarter of an hour, or hours
Sides:
  trl                float32
  trl-autocast       float32 weights; the update in bfloat16 autocast, the rollout in float32 (Accelerate wraps the
                     former alone)
  fastppo            float32
  fastppo-bfloat16   bfloat16 weights with float32 masters

Each run has a process of its own and leaves one JSON in --output; finished runs are not repeated, so an interrupted
benchmark goes on where it was. When all are there, a table and learning.png are made of them.

What counts is the reward of the last iterations and that of the trained policy on held-out openings, each opening
answered once; the latter is measured in float32 with the same code on both sides, and so is its exact KL to the
policy that training started from.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.peers import PPO, fetch_trl

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("warm", "short")
SIDES = ("trl", "trl-autocast", "fastppo", "fastppo-bfloat16")
COLOURS = dict(zip(SIDES, ("#eb6834", "#eda100", "#2a78d6", "#1baf7a"), strict=True))
BATCH, EPOCHS = 16, 4
HELD_OUT = 128
LAST = 3  # the reward of training is the mean over this many last iterations
# What changes with the model: iterations, episodes per micro-batch, settings.
RECIPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "small": (40, 16, {"learning_rate": 3e-4}),
    "smollm2": (10, 4, {"learning_rate": 2e-5}),
}
SETTINGS: dict[str, Any] = {
    "num_ppo_epochs": EPOCHS,
    "num_mini_batches": 1,
    "response_length": 24,
    "stop_token": "eos",
    "temperature": 1.0,
    "kl_coef": 0.05,
    "local_rollout_forward_batch_size": BATCH,
    "gradient_checkpointing": False,
    "num_sample_generations": 0,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(RECIPES), default="small")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["trl", "fastppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "bench-learning", help="folder for JSON and PNG"
    )
    parser.add_argument(
        "--time",
        choices=["wall", "processor"],
        default="wall",
        help="axis of the last plot: on a shared machine processor time is the fairer",
    )
    parser.add_argument("--here", action="store_true", help="train the one given side, and report nothing")
    options = parser.parse_args()
    output: Path = options.output / options.model
    output.mkdir(parents=True, exist_ok=True)
    if options.here:
        (side,) = options.sides
        train_all(options.model, side, options.tasks, options.seeds, output)
        return
    folder_of(options.model)  # made once
    fetch_trl(PPO)
    for side in options.sides:
        missing = [
            (task, seed)
            for task in options.tasks
            for seed in options.seeds
            if not path_of(output, task, side, seed).exists()
        ]
        if missing:
            print(f"{side}: {len(missing)} runs …", flush=True)
            start_side(options, side)
    runs = [
        json.loads(path_of(output, task, side, seed).read_text())
        for task in options.tasks
        for side in options.sides
        for seed in options.seeds
    ]
    report(runs, output, options.time)


def folder_of(model: str) -> str:
    """Folder of the policy that training starts from."""
    if model == "small":
        from bench.small_lm import model_folder
    else:
        from examples.warm_replies.policy import model_folder
    return model_folder()


def path_of(folder: Path, task: str, side: str, seed: int) -> Path:
    return folder / f"{task}-{side}-{seed}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: a run that is there is a run that is finished."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1))
    os.replace(unfinished, path)


def start_side(options: argparse.Namespace, side: str) -> None:
    """All runs of a side that are missing, below a process in which TRL, or no TRL, can be imported."""
    trl = side.startswith("trl")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(fetch_trl(PPO))] * trl + [str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        # What bf16=True used to set; transformers 5 leaves it to the user.
        "ACCELERATE_MIXED_PRECISION": "bf16" if side == "trl-autocast" else "no",
    }
    command = [sys.executable, "-m", "bench.learning", "--here", "--model", options.model, "--sides", side]
    command += ["--output", str(options.output), "--tasks", *options.tasks]
    done = subprocess.run(
        [*command, "--seeds", *map(str, options.seeds)], cwd=ROOT, env=environment, stdout=sys.stderr
    )
    if done.returncode:
        raise SystemExit(f"{side} failed; its own message is above")


def train_all(model: str, side: str, tasks: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Each run that is missing, in a fork of this process: what they import takes longer than some of them."""
    import transformers

    import fastppo.trainer  # noqa: F401

    if side.startswith("trl"):
        import trl.experimental.ppo  # noqa: F401
    transformers.utils.logging.set_verbosity_error()
    fork = multiprocessing.get_context("fork")
    for seed in seeds:
        for task in tasks:
            path = path_of(output, task, side, seed)
            if not path.exists():
                run = fork.Process(target=lambda: write(path, train(model, task, side, seed)))  # noqa: B023
                run.start()
                run.join()
                if run.exitcode:
                    raise SystemExit(f"{task}, {side}, seed {seed} failed; its own message is above")


# One run, in a process of its own


def train(model: str, task: str, side: str, seed: int) -> dict[str, Any]:
    """Train one side; reward, KL and time of each iteration, and what the policy is worth on held-out openings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from bench.machine import describe
    from examples.warm_replies.openings import read_openings, split
    from examples.warm_replies.warmth import measure

    iterations, micro_batch, recipe = RECIPES[model]
    folder, reward = folder_of(model), reward_of(task)
    openings, held_out = split(read_openings(), HELD_OUT)
    # TRL takes an optimizer step after every micro-batch of the last batch of its data loader (Accelerate takes the
    # loader's end for the end of the accumulation): with one batch more than is trained on, it never gets there.
    openings = random.Random(seed).sample(openings, BATCH * (iterations + 1))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    torch.manual_seed(seed)  # the critic's head is drawn
    critic = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    history: list[dict[str, float]] = []
    parts = {
        "model": policy,
        "ref_model": reference,
        "value_model": critic,
        "processing_class": tokenizer,
        "callbacks": [recorder(history)],
    }
    settings = {
        **SETTINGS,
        **recipe,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BATCH // micro_batch,
        "total_episodes": BATCH * iterations,
        "seed": seed,
        "output_dir": str(ROOT / "runs" / "bench-learning" / "scratch"),
    }
    build = trl_trainer if side.startswith("trl") else fastppo_trainer
    trainer = build(parts, settings, openings, reward, side)
    steps = [0]
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    trainer.train()
    # Ours steps for the policy, then for the critic; TRL for both at once.
    expected = iterations * EPOCHS * (2 if side.startswith("fastppo") else 1)
    if (len(history), steps[0]) != (iterations, expected):
        raise RuntimeError(
            f"expected {iterations} iterations, {expected} optimizer steps, got {len(history)} and {steps[0]}"
        )
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worth = measure(
        policy.float(),
        start,
        tokenizer,
        held_out,
        reward=reward,
        response_length=SETTINGS["response_length"],
        temperature=SETTINGS["temperature"],
    )
    return {
        "model": model,
        "task": task,
        "side": side,
        "seed": seed,
        "iterations": history,
        "held_out": {"reward": worth.reward, "kl": sum(worth.kl) / len(worth.kl), "openings": len(held_out)},
        "replies": worth.replies[:8],
        "settings": settings,
        "machine": describe(),
    }


def reward_of(task: str) -> Callable[..., list[float]]:
    if task == "warm":
        from examples.warm_replies.warmth import warmth

        return warmth()

    from examples.warm_replies.warmth import reply_text

    def short_words(prompts: Any, completions: Sequence[Any], **columns: Any) -> list[float]:
        """Share of the words that have at most four letters; 0 where there is no word."""
        replies = [re.findall(r"[^\W\d_]+", reply_text(completion)) for completion in completions]
        return [sum(len(word) <= 4 for word in words) / max(1, len(words)) for words in replies]

    return short_words


def recorder(history: list[dict[str, float]]) -> Any:
    """A callback that notes reward, KL and time of each iteration."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "objective/scores" not in logs:
                return
            history.append(
                {
                    "episodes": logs["episode"],
                    "reward": logs["objective/scores"],
                    "kl": logs["objective/kl"],
                    "wall": time.perf_counter() - self.start[0],
                    "processor": time.process_time() - self.start[1],
                }
            )

    return Recorder()


def fastppo_trainer(
    parts: dict[str, Any], settings: dict[str, Any], openings: list[str], reward: Any, side: str
) -> Any:
    from examples.warm_replies.warmth import as_chat
    from fastppo import PPOConfig, PPOTrainer

    return PPOTrainer(
        # 0: no clipping. TRL never reads the setting.
        args=PPOConfig(**settings, bf16=side == "fastppo-bfloat16", max_grad_norm=0),
        train_dataset=[{"prompt": as_chat(opening)} for opening in openings],
        reward_model=reward,
        **parts,
    )


def trl_trainer(
    parts: dict[str, Any], settings: dict[str, Any], openings: list[str], reward: Any, side: str
) -> Any:
    import torch
    from datasets import Dataset
    from torch import nn
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from examples.warm_replies.warmth import as_chat

    tokenizer = parts["processing_class"]
    pad = tokenizer.pad_token_id
    placeholder = nn.Identity()  # TRL takes no rewards but models
    classifier_reward = ppo_trainer.get_reward

    def get_reward(model: nn.Module, query_responses: torch.Tensor, pad_id: int, context_length: int) -> Any:
        if model is not placeholder:
            return classifier_reward(model, query_responses, pad_id, context_length)
        # What comes after the stop token is padding by now.
        ids = [[i for i in row if i != pad] for row in query_responses[:, context_length:].tolist()]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores = torch.tensor(reward(prompts=None, completions=texts, completion_ids=ids))
        return None, scores.to(query_responses.device), None

    ppo_trainer.get_reward = get_reward
    prompts = [
        tokenizer.apply_chat_template(as_chat(opening), add_generation_prompt=True, return_dict=False)
        for opening in openings
    ]
    trainer = PPOTrainer(
        args=PPOConfig(**settings, bf16=side == "trl-autocast"),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        reward_model=placeholder,
        **parts,
    )

    def check_precision(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        expected = torch.bfloat16 if side == "trl-autocast" else torch.float32
        if torch.is_grad_enabled() and output.dtype is not expected:
            raise RuntimeError(f"{side}: the update should run in {expected}, its logits are {output.dtype}")

    parts["model"].get_output_embeddings().register_forward_hook(check_precision)
    return trainer


# The comparison


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds; the latter is NaN for one seed."""
    n = len(numbers)
    mean = sum(numbers) / n
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in numbers) / (n - 1) / n)


def figures(run: dict[str, Any]) -> dict[str, float]:
    """What a run comes to."""
    last = run["iterations"][-LAST:]
    return {
        "reward, last iterations": sum(it["reward"] for it in last) / LAST,
        "KL, last iterations": sum(it["kl"] for it in last) / LAST,
        "reward, held out": run["held_out"]["reward"],
        "KL, held out": run["held_out"]["kl"],
        "wall s": run["iterations"][-1]["wall"],
        "processor s": run["iterations"][-1]["processor"],
    }


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Is ours below theirs by more than one standard error of the difference?"""
    (mean, error), (their_mean, their_error) = mean_and_error(ours), mean_and_error(theirs)
    difference, spread = mean - their_mean, math.hypot(error, their_error)
    if math.isnan(spread):
        return f"{difference:+.3f} (one seed: no error known)"
    return f"{difference:+.3f} ± {spread:.3f}: " + (
        "BELOW by more than one standard error" if difference < -spread else "not below"
    )


def reward_by_kl(runs: Sequence[dict[str, Any]], width: float = 0.5) -> dict[float, tuple[float, float]]:
    """Mean reward of the iterations whose KL is in [k, k + width), and its standard error, by k.

    A side that learns faster is further from where it started: at equal KL the two can be compared.
    """
    bins: dict[int, list[float]] = {}
    for run in runs:
        for it in run["iterations"]:
            bins.setdefault(math.floor(it["kl"] / width), []).append(it["reward"])
    return {k * width: mean_and_error(rewards) for k, rewards in sorted(bins.items()) if len(rewards) > 1}


def report(runs: list[dict[str, Any]], folder: Path, clock: str) -> None:
    """Table on the terminal, learning.json and learning.png in `folder`."""
    tasks, sides = (list(dict.fromkeys(run[key] for run in runs)) for key in ("task", "side"))
    numbers = {
        (task, side): [figures(run) for run in runs if (run["task"], run["side"]) == (task, side)]
        for task in tasks
        for side in sides
    }
    names = list(figures(runs[0]))
    seeds = len(runs) // len(numbers)
    episodes = runs[0]["settings"]["total_episodes"]
    print(f"{runs[0]['model']}: {episodes} episodes, mean ± standard error over {seeds} seeds\n")
    table: list[dict[str, Any]] = []
    for task in tasks:
        print(f"{task:18}" + "".join(f"{name:>26}" for name in names))
        for side in sides:
            row = {name: mean_and_error([f[name] for f in numbers[task, side]]) for name in names}
            print(f"{side:18}" + "".join(f"{f'{m:.3f} ± {e:.3f}':>26}" for m, e in row.values()))
            table.append({"task": task, "side": side, **row})
        for side in sides:
            for peer in sides:
                if side.startswith("fastppo") and peer.startswith("trl"):
                    for name in names[:4]:
                        ours, theirs = ([f[name] for f in numbers[task, s]] for s in (side, peer))
                        if name.startswith("reward"):
                            print(f"  {side} against {peer}, {name}: {verdict(ours, theirs)}")
        print("\n  reward at a KL of")
        for side in sides:
            at = reward_by_kl([run for run in runs if (run["task"], run["side"]) == (task, side)])
            cells = "".join(f"  {k:.1f}+: {mean:.3f} ± {error:.3f}" for k, (mean, error) in at.items())
            print(f"  {side:18}{cells}")
        print()
    (folder / "learning.json").write_text(
        json.dumps({"table": table, "machine": runs[0]["machine"]}, indent=1)
    )
    draw(runs, tasks, sides, folder / "learning.png", clock)
    print(f"wrote {folder / 'learning.json'} and {folder / 'learning.png'}")


def draw(runs: list[dict[str, Any]], tasks: list[str], sides: list[str], path: Path, clock: str) -> None:
    """Reward against episodes, KL and time: means over seeds, with bands of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"episodes": "episodes", "kl": "KL, nats per reply", clock: f"{clock} time, s"}
    figure, axes = plt.subplots(len(tasks), 3, figsize=(12, 3.4 * len(tasks)), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, (key, label) in zip(row, labels.items(), strict=True):
            for side in sides:
                of_side = [run for run in runs if (run["task"], run["side"]) == (task, side)]
                if key == "kl":  # iterations of like KL: in the order of time the KL goes to and fro
                    at = reward_by_kl(of_side)
                    x, band = [k + 0.25 for k in at], list(at.values())
                else:
                    points = list(zip(*(run["iterations"] for run in of_side), strict=True))
                    x = [sum(it[key] for it in point) / len(point) for point in points]
                    band = [mean_and_error([it["reward"] for it in point]) for point in points]
                axis.plot(x, [m for m, _ in band], color=COLOURS[side], label=side, marker=".", ms=4)
                low, high = ([m + sign * e for m, e in band] for sign in (-1, 1))
                axis.fill_between(x, low, high, color=COLOURS[side], alpha=0.2, lw=0)
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"reward, {task}")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
