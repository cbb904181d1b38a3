"""How an iteration grows with response length, batch and vocabulary: seconds by room, peak memory, fitted exponents.

The model is as wide as SmolLM2-135M with 4 of its 30 layers and random weights, its embedding tied to its LM head, its
value head on the same trunk; 16 prompts of 16 tokens, 32 tokens in every response, each with a gradient, 2 epochs of
one optimizer step, micro-batches of 4, vocabulary 49,152, but for the axis that varies.

An exponent is the slope of a line through log(seconds) over log(size): 1 is proportional. `last` is the slope between
the two largest sizes, where what does not grow weighs least. Memory of a room is its peak resident size beyond what is
resident between iterations (weights, reference, optimizer state), which has a column of its own.

    python -m bench.iteration --scaling length batch vocabulary
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.memory import reset_peak, settle, status

ROOMS = ("rollout", "score", "update")
HIDDEN, PROMPT_TOKENS, EPOCHS, MICRO_BATCH = 576, 16, 2, 4
WARM_UP, ITERATIONS = 1, 2


@dataclass(frozen=True)
class Size:
    """Sizes of one iteration."""

    length: int = 32
    batch: int = 16
    vocabulary: int = 49152
    layers: int = 4
    precision: str = "bfloat16"


BASE = Size()
AXES = {
    "length": (32, 64, 128, 256, 512),
    "batch": (4, 8, 16, 32, 64),
    "vocabulary": (16384, 32768, 65536, 131072, 262144),
}
Point = dict[str, Any]


def main(axes: Sequence[str], precision: str, folder: Path) -> None:
    """Measure along each axis; table, scaling.json and scaling.png in `folder`."""
    from bench.machine import describe

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scaling.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for axis in axes:
        points = [measure(replace(BASE, precision=precision, **{axis: size})) for size in AXES[axis]]
        found[axis] = {"points": points, "fit": fit(axis, points), "machine": describe()}
        print(table(axis, points) + "\n", flush=True)
        path.write_text(json.dumps(found, indent=1))
    draw(found, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")


def measure(size: Size) -> Point:
    """Seconds and peak bytes by room, medians over the counted iterations, and the bytes resident between them."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    trainer = make_trainer(size)
    seconds: list[dict[str, float]] = []
    peaks: list[dict[str, int]] = []
    resident: list[int] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            settle()
            resident.append(status("VmRSS"))
            peaks.append(dict.fromkeys(ROOMS, 0))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "time/rollout" in logs:
                seconds.append({room: logs[f"time/{room}"] for room in ROOMS})

    def watched(room: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reset_peak()
            result = function(*args, **kwargs)
            peaks[-1][room] = max(peaks[-1][room], status("VmHWM") - resident[-1])
            return result

        return call

    for method, room in (
        ("_rollout", "rollout"), ("_evaluate_tokens", "score"), ("_score", "score"), ("_advantages", "update"),
        ("_update", "update"),
    ):  # fmt: skip
        setattr(trainer, method, watched(room, getattr(trainer, method)))
    trainer.add_callback(Watch())
    trainer.remove_callback(transformers.PrinterCallback)  # the table is what one wants to see
    trainer.train()
    median = {room: statistics.median(x[room] for x in seconds[WARM_UP:]) for room in ROOMS}
    peak = {room: statistics.median(x[room] for x in peaks[WARM_UP:]) for room in ROOMS}
    del trainer
    settle()
    return {
        **asdict(size),
        "seconds": {**median, "total": sum(median.values())},
        "peak_bytes": {**peak, "total": max(peak.values())},
        "resident_bytes": statistics.median(resident[WARM_UP:]),
    }


def make_trainer(size: Size) -> Any:
    """A trainer of a random model; no response ends early."""
    import tempfile

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from fastppo import PPOConfig, PPOTrainer

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=1536,
            num_hidden_layers=size.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    args = PPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=size.batch // MICRO_BATCH,
        total_episodes=(WARM_UP + ITERATIONS) * size.batch,
        num_ppo_epochs=EPOCHS,
        cliprange=10.0,  # a clipped token has no gradient, and the head leaves its row out
        response_length=size.length,
        min_new_tokens=size.length,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=size.precision == "bfloat16",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    # It names three tokens; the others decode to nothing.
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    return PPOTrainer(
        args,
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<eos>",
        ),
        model,
        # No two alike: advantages of 0 would leave the update nothing to do.
        reward_model=lambda completion_ids, **_: [
            sum(ids) / size.vocabulary / len(ids) for ids in completion_ids
        ],
        # Their first tokens differ, so that the rollout has no common beginning to prefill only once.
        train_dataset=[{"input_ids": [3 + i] * PROMPT_TOKENS} for i in range(size.batch)],
    )


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line."""
    x, y = statistics.fmean(sizes), statistics.fmean(values)
    return sum((a - x) * (b - y) for a, b in zip(sizes, values, strict=True)) / sum(
        (a - x) ** 2 for a in sizes
    )


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size)."""
    return slope([math.log(x) for x in sizes], [math.log(x) for x in seconds])


def fit(axis: str, points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Exponents of time, of all points and of the `last` two; bytes per unit of the axis, resident and of each room."""
    sizes = [p[axis] for p in points]
    seconds = {room: [p["seconds"][room] for p in points] for room in (*ROOMS, "total")}
    grown = {room: slope(sizes, [p["peak_bytes"][room] for p in points]) for room in ROOMS}
    return {
        "exponent": {room: exponent(sizes, x) for room, x in seconds.items()},
        "last": {room: exponent(sizes[-2:], x[-2:]) for room, x in seconds.items()},
        "bytes": {"resident": slope(sizes, [p["resident_bytes"] for p in points]), **grown},
    }


def table(axis: str, points: Sequence[Point]) -> str:
    columns = (*(f"{room}, s" for room in (*ROOMS, "total")), "resident, MB", *(f"{r}, MB" for r in ROOMS))
    lines = [f"{axis:12}" + "".join(f"{column:>14}" for column in columns)]
    for p in points:
        cells = [f"{p['seconds'][room]:.2f}" for room in (*ROOMS, "total")]
        cells += [f"{x / 1e6:.0f}" for x in (p["resident_bytes"], *(p["peak_bytes"][r] for r in ROOMS))]
        lines.append(f"{p[axis]:<12}" + "".join(f"{cell:>14}" for cell in cells))
    fitted = fit(axis, points)
    for row in ("exponent", "last"):
        lines.append(f"{row:12}" + "".join(f"{fitted[row][room]:14.2f}" for room in (*ROOMS, "total")))
    grown = fitted["bytes"]
    lines.append(
        f"memory per unit of {axis}: {grown['resident']:.0f} bytes resident between iterations; beyond these "
        + ", ".join(f"{grown[room]:.0f} in {room}" for room in ROOMS)
    )
    if axis == "vocabulary":
        bytes_per_row = {"bfloat16": 2, "float32": 4}[points[0]["precision"]] * HIDDEN
        lines.append(
            f"(one {points[0]['precision']} matrix of the vocabulary, its gradient say, has {bytes_per_row} per row)"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Seconds, and peak memory beyond what stays, over each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6), squeeze=False)
    for (axis, one), (time_axis, memory_axis) in zip(found.items(), axes.T, strict=True):
        sizes = [p[axis] for p in one["points"]]
        for room, colour in zip(ROOMS, ("#2a78d6", "#1baf7a", "#eda100"), strict=True):
            exponents = one["fit"]["exponent"]
            label = f"{room}, exponent {exponents[room]:.2f}"
            seconds = [p["seconds"][room] for p in one["points"]]
            time_axis.plot(sizes, seconds, "o-", color=colour, label=label)
            peaks = [p["peak_bytes"][room] / 1e6 for p in one["points"]]
            memory_axis.plot(sizes, peaks, "o-", color=colour, label=room)
        time_axis.set(xscale="log", yscale="log", ylabel="seconds", title=axis)
        memory_axis.set(xscale="log", ylim=(0, None), ylabel="MB beyond what stays", xlabel=axis)
        for one_axis in (time_axis, memory_axis):
            one_axis.set_xticks(sizes, [str(size) for size in sizes])
            one_axis.minorticks_off()
            one_axis.legend(frameon=False, fontsize="small")
            one_axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
