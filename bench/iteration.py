"""One PPO iteration, fastppo against the PPO trainer of TRL 1.12.0: time by room, peak memory, share of the floor.

Both sides train the same model on the same prompts (16, or --episodes) with the same reward model (a classifier on the
same trunk, the only kind of reward TRL's PPO takes), 4 epochs of one optimizer step. Recipes:
  short  SmolLM2-135M, 32 tokens in every response: nothing stops early, so both do the same number of tokens
  long   SmolLM2-135M, at most 256 tokens and real ends. TRL generates and trains every response to the length of the
         longest; tokens count up to the first EOS on both sides. Lengths are drawn: compare tokens/s, too
  wide   Gemma-3 270M, whose vocabulary has 262,144 tokens, 32 tokens in every response
Layouts: a critic of its own (separate), or a value head on the policy's trunk (shared), which TRL does not have.

Precisions:
  float32   weights and arithmetic
  autocast  float32 weights, bfloat16 products in the update (TRL's own bf16=True). transformers 5.24 does not hand
            bf16=True on to Accelerate, so ACCELERATE_MIXED_PRECISION=bf16 is set, and the run fails if it did nothing
  bfloat16  bfloat16 weights. fastppo keeps the float32 master, as 16 more bits beside them, so it does learn. For TRL
            this is fast and small, but at this learning rate most of its steps round to nothing
Where none is asked for, each side gets those that learn and may be its best: float32 and autocast of TRL, bfloat16 of
fastppo; float32 of both on a processor that does not multiply bfloat16. The comparison is with the fastest
and with the smallest run of TRL that learns, over all its micro-batch sizes.

Each run has a process of its own, so that peak memory is its own: VmHWM, all since its start, or on --device cuda what
torch's allocator handed out. The floor is measured there too, after the training: see bench/iteration_floor.py.

    python -m bench.iteration --recipe short --side fastppo --layout shared
    python -m bench.iteration --recipe short --side trl --precision autocast --micro-batch 16 --add
    python -m bench.iteration --scaling vocabulary
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import iteration_report, iteration_scaling
from bench.gemma3 import model_folder as gemma3_folder
from bench.machine import describe
from bench.memory import end_above, status
from bench.peers import fetch_trl
from examples.warm_replies.policy import model_folder as smollm2_folder

ROOT = Path(__file__).resolve().parents[1]
EPISODES, EPOCHS = 16, 4
ROOMS = iteration_report.ROOMS
LEARNING_RATE = 3e-6
SIDES = ("trl", "fastppo")
LAYOUTS = {"trl": ("separate",), "fastppo": ("separate", "shared")}
PRECISIONS = {"trl": ("float32", "autocast", "bfloat16"), "fastppo": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Recipe:
    """What is trained. `stops`: responses end at an EOS; else each has `tokens` tokens."""

    folder: Callable[[], str]
    tokens: int
    stops: bool
    micro_batches: dict[str, tuple[int, ...]]  # of each side: what may be its best


RECIPES = {
    "short": Recipe(smollm2_folder, 32, False, {"trl": (4, 16), "fastppo": (4, 16)}),
    "long": Recipe(smollm2_folder, 256, True, {"trl": (4, 16), "fastppo": (4, 16)}),
    "wide": Recipe(gemma3_folder, 32, False, {"trl": (4, 16), "fastppo": (4, 16)}),
}


@dataclass(frozen=True)
class Run:
    """One side with one choice of everything."""

    recipe: str
    side: str
    layout: str
    precision: str
    micro_batch: int
    model: str  # folder
    warm_up: int = 1
    iterations: int = 2
    memory_limit: float | None = None  # GB
    device: str = "cpu"
    episodes: int = EPISODES
    reuse: bool = False  # PPOConfig.reuse_scoring_forward
    cuda_graphs: bool = False

    @property
    def tokens(self) -> int:
        return RECIPES[self.recipe].tokens

    def __str__(self) -> str:
        shape = f"{self.layout} in {self.precision}, micro-batches of {self.micro_batch}"
        extras = ", scoring reused" * self.reuse + ", CUDA graphs" * self.cuda_graphs
        return f"{self.recipe}: {self.side} {shape}{extras}"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.run:
        print(json.dumps(measure(Run(**json.loads(options.run)))))
        return
    if options.scaling:
        precision = options.precision[0] if options.precision else best_precisions("fastppo")[0]
        iteration_scaling.main(options.scaling, precision, options.output)
        return
    results = iteration_report.read(options.output) if options.add else []
    for run in plan(options):
        print(f"{run} …", flush=True)
        results = iteration_report.merge(results, in_process(run))
        iteration_report.write(results, options.output)  # each is kept, should a later one fail
    iteration_report.show(results, options.output)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted({precision for some in PRECISIONS.values() for precision in some})
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=["short"])
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS["fastppo"], default=["separate"], help="TRL has only separate"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=every,
        help="default: what may be the best of each side on this processor",
    )
    parser.add_argument(
        "--micro-batch",
        nargs="+",
        type=int,
        help="episodes; default: 4 and 16, of which the faster and the smaller count",
    )
    parser.add_argument(
        "--reuse-scoring-forward",
        nargs="+",
        choices=("no", "yes"),
        default=["no"],
        help="PPOConfig.reuse_scoring_forward, which TRL does not have",
    )
    parser.add_argument("--model", help="another model folder than the recipe's")
    parser.add_argument("--warm-up", type=int, default=1, help="iterations that do not count")
    parser.add_argument("--iterations", type=int, default=2, help="iterations that do")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="fail once a run takes more")
    parser.add_argument("--add", action="store_true", help="keep what earlier runs left in --output")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "bench-iteration", help="folder for JSON and PNG"
    )
    parser.add_argument(
        "--scaling",
        nargs="+",
        choices=list(iteration_scaling.AXES),
        help="instead: time and memory of our iteration along these axes, and fitted exponents",
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # a Run as JSON, to be measured in this process
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on --device cuda: PPOConfig.cuda_graphs, which TRL does not have",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--episodes", type=int, default=EPISODES, help="in an iteration, each on its own prompt"
    )
    options = parser.parse_args(arguments)
    if options.scaling and options.device != "cpu":
        parser.error("--scaling measures resident memory, so only --device cpu")
    if options.cuda_graphs and options.device != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    if options.episodes < 1:
        parser.error(f"--episodes must be at least 1, got {options.episodes}")
    if options.warm_up < 0 or options.iterations < 1:
        parser.error("--warm-up must be at least 0 and --iterations at least 1")
    for size in options.micro_batch or ():
        if size < 1 or options.episodes % size:
            parser.error(f"--micro-batch must divide {options.episodes} (--episodes), got {size}")
    if not (options.run or options.scaling or plan(options)):
        parser.error("no side has such a layout and precision")
    return options


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs that are asked for, in order. What a side does not have is left out."""
    return [
        Run(
            recipe,
            side,
            layout,
            precision,
            micro_batch,
            options.model or RECIPES[recipe].folder(),
            options.warm_up,
            options.iterations,
            options.memory_limit,
            options.device,
            options.episodes,
            reuse == "yes",
            side == "fastppo" and options.cuda_graphs,
        )
        for recipe in options.recipe
        for side in options.side
        for layout in options.layout
        if layout in LAYOUTS[side]
        for precision in options.precision or best_precisions(side, options.device)
        if precision in PRECISIONS[side]
        for micro_batch in options.micro_batch or RECIPES[recipe].micro_batches[side]
        for reuse in options.reuse_scoring_forward
        if side == "fastppo" or reuse == "no"
    ]


def best_precisions(side: str, device: str = "cpu") -> tuple[str, ...]:
    """Those that learn and may be the fastest or the smallest on this processor."""
    from fastppo.config import multiplies_bfloat16  # here: TRL's process is not to load fastppo

    if not multiplies_bfloat16(use_cpu=device == "cpu"):
        return ("float32",)
    return ("float32", "autocast") if side == "trl" else ("bfloat16",)


def in_process(run: Run) -> dict[str, Any]:
    """Measure in a process of its own."""
    paths, variables = [str(ROOT)], {}
    if run.side == "trl":
        paths = [str(fetch_trl("1.12.0")), *paths]
        variables = {"TRL_EXPERIMENTAL_SILENCE": "1"}
        if run.precision == "autocast":
            variables["ACCELERATE_MIXED_PRECISION"] = "bf16"
    done = subprocess.run(
        [sys.executable, "-m", "bench.iteration", "--run", json.dumps(asdict(run))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{run} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# One run, in a process of its own


def measure(run: Run) -> dict[str, Any]:
    """Train; what every counted iteration took, the peak memory, and the floor."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    if run.memory_limit is not None and run.device == "cpu":
        end_above(int(run.memory_limit * 1e9), f"{run}: --memory-limit")
    clock = RoomClock(run.device)
    models = load(run)
    prompts = models["train_dataset"]["input_ids"]
    (train_trl if run.side == "trl" else train_fastppo)(clock, run, models)
    peak = peak_bytes(run.device)
    if run.memory_limit is not None and peak > run.memory_limit * 1e9:  # in the end_above's last nap
        raise SystemExit(f"{run}: took {peak / 1e9:.2f} GB, --memory-limit is {run.memory_limit:g} GB")
    del models
    gc.collect()

    from bench import iteration_floor

    counted = clock.iterations[run.warm_up :]
    products = iteration_floor.measure(run.model, prompts, [x["lengths"] for x in counted], run.device)
    floors = [
        iteration_floor.floor(
            products, prompts, x["lengths"], shared=run.layout == "shared", epochs=EPOCHS, reused=run.reuse
        )
        for x in counted
    ]
    return {
        **asdict(run),
        "tokens": run.tokens,
        "stops": RECIPES[run.recipe].stops,
        "iterations": counted,
        "warm_up": clock.iterations[: run.warm_up],
        "floors": floors,
        "products": asdict(products),
        "peak_gb": peak / 1e9,
        "loaded_gb": clock.loaded_bytes / 1e9,
        "machine": describe(run.device) | {"transformers": transformers.__version__},
    }


def peak_bytes(device: str) -> int:
    """The most memory since the start of this process."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


class RoomClock:
    """Seconds by room and iteration; a room is charged until the next one is entered."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.iterations: list[dict[str, Any]] = []
        self.loaded_bytes = 0
        self.room = ""
        self.entered = 0.0
        self.current: dict[str, float] = {}
        self.responses: dict[str, Any] = {}

    def start(self) -> None:
        """The next thing is the first iteration."""
        self.loaded_bytes = peak_bytes(self.device)
        self.room, self.entered, self.current = "", time.perf_counter(), {}

    def enter(self, room: str) -> None:
        """From now on time belongs to `room`."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.room:
            self.current[self.room] = self.current.get(self.room, 0.0) + now - self.entered
        self.room, self.entered = room, now

    def note(self, lengths: list[int], truncated: int) -> None:
        """Tokens of this iteration's responses, EOS included, and how many of them the length limit cut."""
        self.responses = {"lengths": lengths, "truncated": truncated}

    def finish_iteration(self) -> None:
        """The last room is left; what follows is the next iteration."""
        self.enter("")
        self.iterations.append({**self.current, "total": sum(self.current.values()), **self.responses})
        self.current = {}


def load(run: Run) -> dict[str, Any]:
    """Policy, reference, critic, reward model, tokenizer, 16 tokenised prompts: the same for both sides."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from examples.warm_replies.openings import read_openings

    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(run.model, padding_side="left")

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(run.model, num_labels=1, dtype=dtype)

    def ids(opening: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer(opening)["input_ids"]
        chat: list[Any] = [{"role": "user", "content": opening}]
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            chat, add_generation_prompt=True, return_dict=False
        )

    return {
        "model": AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype),
        "ref_model": AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype),
        "value_model": classifier() if run.layout == "separate" else None,
        "reward_model": classifier(),
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"input_ids": [ids(x) for x in read_openings()[: run.episodes]]}),
    }


def settings(run: Run) -> dict[str, Any]:
    """What both sides are told, under the same names."""
    return {
        "output_dir": str(ROOT / "runs" / "bench-iteration" / "scratch"),
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": run.micro_batch,
        "gradient_accumulation_steps": run.episodes // run.micro_batch,
        "total_episodes": (run.warm_up + run.iterations) * run.episodes,
        "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1,
        "response_length": run.tokens,
        "stop_token": "eos" if RECIPES[run.recipe].stops else None,
        "temperature": 0.7,
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "fp16": False,
        "use_cpu": run.device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }


def train_trl(clock: RoomClock, run: Run, models: dict[str, Any]) -> None:
    """TRL's trainer, timed from outside: generation, then scoring until the first forward with gradients."""
    import torch
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    config = PPOConfig(**settings(run), bf16=run.precision == "autocast")
    forward, generation = ppo_trainer.forward, ppo_trainer.batch_generation
    eos = models["processing_class"].eos_token_id if RECIPES[run.recipe].stops else None

    def timed_generation(model: Any, queries: Any, *args: Any, **kwargs: Any) -> Any:
        clock.enter("rollout")
        result = generation(model, queries, *args, **kwargs)
        clock.enter("score")
        clock.note(*lengths_to_eos(result[0][:, queries.shape[1] :].tolist(), eos))
        return result

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and clock.room == "score":
            clock.enter("update")
        return forward(*args, **kwargs)

    def check_autocast(*_: Any) -> None:
        on = torch.is_autocast_enabled(run.device) and torch.get_autocast_dtype(run.device) is torch.bfloat16
        if torch.is_grad_enabled() and on != (run.precision == "autocast"):
            raise RuntimeError(f"{run}: autocast to bfloat16 is {'on' if on else 'off'} in the update")

    models["model"].register_forward_pre_hook(check_autocast)
    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
    trainer = PPOTrainer(args=config, callbacks=[step_callback(clock.finish_iteration)], **models)
    if (trainer.accelerator.mixed_precision == "bf16") != (run.precision == "autocast"):
        raise RuntimeError(f"{run}: Accelerate's mixed precision is {trainer.accelerator.mixed_precision}")
    clock.start()
    trainer.train()


def lengths_to_eos(responses: list[list[int]], eos: int | None) -> tuple[list[int], int]:
    """Tokens of each response up to its first EOS, and how many have none."""
    ends = [ids.index(eos) + 1 if eos in ids else 0 for ids in responses]
    return [end or len(ids) for end, ids in zip(ends, responses, strict=True)], ends.count(0)


def train_fastppo(clock: RoomClock, run: Run, models: dict[str, Any]) -> None:
    """Our trainer times its rooms itself and logs them."""
    from transformers import TrainerCallback

    from fastppo import PPOTrainer

    class Rooms(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
        ) -> None:
            if logs and "time/rollout" in logs:
                now = time.perf_counter()
                rooms = {room: logs[f"time/{room}"] for room in ROOMS}
                clock.iterations.append({**rooms, "total": now - clock.entered, **clock.responses})
                clock.entered = now

    trainer = PPOTrainer(args=fastppo_config(run), callbacks=[Rooms()], **models)
    rollout = trainer._rollout

    def noted_rollout(batch: Any) -> Any:
        episodes = rollout(batch)
        clock.note(episodes.response_lengths.tolist(), int(episodes.truncated.sum()))
        return episodes

    trainer._rollout = noted_rollout  # type: ignore[method-assign]
    clock.start()
    trainer.train()


def fastppo_config(run: Run) -> Any:
    from fastppo import PPOConfig

    least = 0 if RECIPES[run.recipe].stops else run.tokens
    return PPOConfig(
        **settings(run),
        bf16=run.precision == "bfloat16",
        min_new_tokens=least,
        reuse_scoring_forward=run.reuse,
        cuda_graphs=run.cuda_graphs,
    )


def step_callback(at_step_end: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class StepEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            at_step_end()

    return StepEnd()


if __name__ == "__main__":
    main()
