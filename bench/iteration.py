"""One PPO iteration, fastppo against the PPO trainer of TRL 1.12.0: time by room and peak memory.

Both sides train the same 135M model on the same 16 prompts with a separate critic and the same reward
model (a classifier on the same trunk, the only kind of reward TRL's PPO takes): 16 episodes of exactly 32
tokens, 4 epochs of one optimizer step, micro-batches of 4. Nothing stops early, so both do the same
number of tokens.

Each side runs in a process of its own, so that peak memory (VmHWM, all since its start) is its own. The
first iteration warms up and is not counted. TRL runs in every precision named by --trl-precision:
  float32   weights and arithmetic
  autocast  float32 weights, bfloat16 products (TRL's own bf16=True)
  bfloat16  bfloat16 weights: fast and small, but at this learning rate most of its steps round to nothing
The comparison is with the fastest and with the smallest of the first two. fastppo's bfloat16 keeps the
float32 master weights, as 16 more bits beside the bfloat16 ones, so it does learn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import fetch_trl

ROOT = Path(__file__).resolve().parents[1]
TRL_FOLDER = ROOT / ".cache" / "trl-1.12.0"
EPISODES, TOKENS, EPOCHS, MICRO_BATCH = 16, 32, 4, 4
ROOMS = ("rollout", "score", "update")
LEARNING_RATE = 3e-6
# Precisions in which a step of this learning rate is not rounded away.
LEARNS = {"trl": ("float32", "autocast"), "fastppo": ("float32", "bfloat16")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=["trl", "fastppo"], help="run one side alone, in this process")
    parser.add_argument(
        "--precision", choices=["float32", "autocast", "bfloat16"], default="bfloat16", help="for --side"
    )
    parser.add_argument(
        "--trl-precision", nargs="+", default=["float32", "autocast"], help="precisions to run TRL in"
    )
    parser.add_argument(
        "--fastppo-precision", nargs="+", default=["bfloat16"], help="precisions to run fastppo in"
    )
    parser.add_argument(
        "--iterations", type=int, default=2, help="counted iterations, after one that warms up"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "bench-iteration", help="folder for JSON and PNG"
    )
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.precision, options.iterations)))
        return

    from examples.warm_replies.policy import model_folder

    model_folder()  # unpack once, outside both measurements
    fetch_trl("1.12.0")
    results = []
    sides = [("trl", p) for p in options.trl_precision] + [("fastppo", p) for p in options.fastppo_precision]
    for side, precision in sides:
        print(f"{side} in {precision} …", flush=True)
        results.append(run_in_process(side, precision, options.iterations))
    report(results, options.output)


# One side, in a process of its own


def run_side(side: str, precision: str, iterations: int) -> dict[str, Any]:
    """Train 1 + `iterations` iterations; seconds by room (mean over the counted ones) and peak memory."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    clock = RoomClock()
    train_trl(clock, precision, 1 + iterations) if side == "trl" else train_fastppo(
        clock, precision, 1 + iterations
    )
    counted = clock.iterations[1:]
    rooms = {room: sum(it.get(room, 0.0) for it in counted) / len(counted) for room in ROOMS}
    return {
        "side": side,
        "precision": precision,
        "seconds": sum(it["total"] for it in counted) / len(counted),
        "rooms": rooms,
        "seconds_each": [it["total"] for it in clock.iterations],
        "peak_gb": peak_bytes() / 1e9,
        "loaded_gb": clock.loaded_bytes / 1e9,
    }


class RoomClock:
    """Seconds by room and iteration; a room is charged until the next one is entered."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.loaded_bytes = 0
        self.room = ""
        self.entered = 0.0
        self.current: dict[str, float] = {}

    def start(self) -> None:
        """The next thing is the first iteration."""
        self.loaded_bytes = peak_bytes()
        self.room, self.entered, self.current = "", time.perf_counter(), {}

    def enter(self, room: str) -> None:
        """From now on time belongs to `room`."""
        now = time.perf_counter()
        if self.room:
            self.current[self.room] = self.current.get(self.room, 0.0) + now - self.entered
        self.room, self.entered = room, now

    def finish_iteration(self) -> None:
        """The last room is left; what follows is the next iteration."""
        self.enter("")
        self.iterations.append({**self.current, "total": sum(self.current.values())})
        self.current = {}


def peak_bytes() -> int:
    """Highest resident memory of this process so far; ru_maxrss would count a parent's before a fork."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def load(precision: str) -> dict[str, Any]:
    """Policy, reference, critic, reward model, tokenizer, 16 tokenised prompts: the same for both sides."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from examples.warm_replies.openings import read_openings
    from examples.warm_replies.policy import model_folder

    folder = model_folder()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": opening}], add_generation_prompt=True, return_dict=False
        )
        for opening in read_openings()[:EPISODES]
    ]
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        "ref_model": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        "value_model": critic,
        "reward_model": reward,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"input_ids": prompts}),
    }


def settings(precision: str, iterations: int) -> dict[str, Any]:
    return {
        "output_dir": str(ROOT / "runs" / "bench-iteration" / "scratch"),
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": EPISODES // MICRO_BATCH,
        "total_episodes": iterations * EPISODES,
        "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1,
        "response_length": TOKENS,
        "stop_token": None,
        "temperature": 0.7,
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "fp16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }


def train_trl(clock: RoomClock, precision: str, iterations: int) -> None:
    """TRL's trainer, timed from outside: generation, then scoring until the first forward with gradients."""
    import torch
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    config = PPOConfig(**settings(precision, iterations), bf16=precision == "autocast")
    forward, generation = ppo_trainer.forward, ppo_trainer.batch_generation

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        clock.enter("rollout")
        result = generation(*args, **kwargs)
        clock.enter("score")
        return result

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and clock.room == "score":
            clock.enter("update")
        return forward(*args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
    trainer = PPOTrainer(args=config, callbacks=[step_callback(clock.finish_iteration)], **load(precision))
    clock.start()
    trainer.train()


def train_fastppo(clock: RoomClock, precision: str, iterations: int) -> None:
    """Our trainer times its rooms itself and logs them."""
    from transformers import TrainerCallback

    from fastppo import PPOConfig, PPOTrainer

    class Rooms(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
        ) -> None:
            if logs and "time/rollout" in logs:
                now = time.perf_counter()
                clock.iterations.append(
                    {room: logs[f"time/{room}"] for room in ROOMS} | {"total": now - clock.entered}
                )
                clock.entered = now

    config = PPOConfig(**settings(precision, iterations), bf16=precision == "bfloat16", min_new_tokens=TOKENS)
    trainer = PPOTrainer(args=config, callbacks=[Rooms()], **load(precision))
    clock.start()
    trainer.train()


def step_callback(at_step_end: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class StepEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            at_step_end()

    return StepEnd()


# The comparison


def run_in_process(side: str, precision: str, iterations: int) -> dict[str, Any]:
    path = os.pathsep.join([str(TRL_FOLDER)] * (side == "trl") + [str(ROOT)])
    command = [sys.executable, "-m", "bench.iteration", "--side", side, "--precision", precision]
    done = subprocess.run(
        [*command, "--iterations", str(iterations)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{side} in {precision} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def report(results: list[dict[str, Any]], folder: Path) -> None:
    """Table on the terminal, iteration.json and iteration.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    print(f"\n{EPISODES} episodes of {TOKENS} tokens, {EPOCHS} epochs; four models of 135M")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {processor()}\n")
    columns = ("rollout", "score", "update", "seconds", "episodes/s", "tokens/s", "peak GB")
    print(f"{'':20}" + "".join(f"{column:>12}" for column in columns))
    for r in results:
        speed = EPISODES / r["seconds"]
        cells = (*r["rooms"].values(), r["seconds"], speed, TOKENS * speed, r["peak_gb"])
        print(f"{r['side']} {r['precision']}".ljust(20) + "".join(f"{cell:12.2f}" for cell in cells))
    ratios = {}
    peers = [r for r in results if r["side"] == "trl" and r["precision"] in LEARNS["trl"]]
    ours = [r for r in results if r["side"] == "fastppo"]
    if peers and ours:
        own, fastest = min(ours, key=lambda r: r["seconds"]), min(r["seconds"] for r in peers)
        ratios = {
            "speedup": fastest / own["seconds"],
            "memory": own["peak_gb"] / min(r["peak_gb"] for r in peers),
        }
        print(
            f"\nfastppo ({own['precision']}): {ratios['speedup']:.2f} times as fast as TRL at its fastest, "
            f"{100 * ratios['memory']:.0f} % of TRL's smallest peak memory"
        )
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": processor()}
    (folder / "iteration.json").write_text(
        json.dumps({"machine": machine, "results": results, "ratios": ratios}, indent=1)
    )
    draw(results, folder / "iteration.png")
    print(f"\nwrote {folder / 'iteration.json'} and {folder / 'iteration.png'}")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(9, 0.9 + 0.55 * len(results)), sharey=True)
    names = [f"{r['side']} {r['precision']}" for r in results]
    left = [0.0] * len(results)
    for room, colour in zip(ROOMS, ("#2a78d6", "#1baf7a", "#eda100"), strict=True):
        widths = [r["rooms"][room] for r in results]
        time_axis.barh(names, widths, left=left, color=colour, label=room, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    time_axis.set_xlabel("seconds per iteration")
    time_axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    memory_axis.barh(names, [r["peak_gb"] for r in results], color="#898781", height=0.6)
    memory_axis.set_xlabel("peak memory, GB")
    time_axis.invert_yaxis()
    for axis in (time_axis, memory_axis):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()
