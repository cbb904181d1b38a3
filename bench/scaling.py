"""How time grows with tokens and vocabulary, and shrinks with threads: `make bench-scaling`.

Curves: time against N (1 to 4096) and V (1k to 262k). The slope is fitted to log time against log N for N ≥ 256; 1
is proportional. Threads: each count in a process of its own, since torch sets up its pools once; on inputs that stay
in one core's cache, where arithmetic is the bound, and on inputs that come from memory, where the memory is. Writes
runs/bench/scaling.json and scaling.png; the next `make bench` shows the slopes and speed-ups beside its goals.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import distribution_kl, gae, linear_logprobs, logprobs, ppo_loss, sample
from bench.machine import Others, describe
from bench.measure import with_backward
from bench.report import QUIET, aligned, time_text
from bench.timing import interleave, rotating
from fastppo import ops

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "bench"
BF16 = torch.bfloat16
TOKENS = 512  # of a reply, for the ops on (replies, tokens)
COUNTS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096)
VOCABULARIES = (1024, 4096, 16384, 49152, 151936, 262144)


@dataclass(frozen=True)
class Op:
    """An op as a function of one or two sizes."""

    name: str
    run: Callable[..., Any]
    inputs: Callable[[int, int], tuple[Any, ...]]  # of (N, V)
    in_cache: int  # N whose inputs fit the second-level cache of one core
    in_memory: int  # N whose inputs do not fit any
    row_op: bool = True  # a pass over rows, without matrix products
    has_vocabulary: bool = True

    def shape(self, n: int, v: int) -> str:
        return f"[{n}, {v if self.has_vocabulary else TOKENS}]"


OPS = (
    Op("logprobs", ops.logprobs, lambda n, v: logprobs.inputs(n, v, BF16), 8, 1024),
    Op(
        "sample",
        sample.ours(sample.PLAIN),
        lambda n, v: (3 * torch.randn(n, v).to(BF16), torch.arange(n)),
        8,
        1024,
    ),
    Op("distribution_kl", ops.distribution_kl, lambda n, v: distribution_kl.inputs(n, v, BF16), 4, 1024),
    Op(
        "linear_logprobs forward + backward",
        with_backward(ops.linear_logprobs, 0, 1),
        lambda n, v: linear_logprobs.inputs(n, 576, v, BF16, requires_grad=True),
        64,
        1024,
        row_op=False,
    ),
    Op(
        "ppo_loss with gradients",
        ppo_loss.WithGradients(ppo_loss.by(ops.ppo_loss), 3),
        lambda n, v: ppo_loss.inputs(n, TOKENS),
        32,
        4096,
        has_vocabulary=False,
    ),
    Op(
        "rewards_and_advantages",
        ops.rewards_and_advantages,
        lambda n, v: gae.inputs(n, TOKENS),
        32,
        4096,
        has_vocabulary=False,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="default: all")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each point")
    parser.add_argument("--threads", type=int, help="measure the thread cases alone, with so many threads")
    options = parser.parse_args()
    chosen = [op for op in OPS if not options.ops or op.name.split()[0] in options.ops]
    if not chosen:
        parser.error(f"ops are {', '.join(op.name.split()[0] for op in OPS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
        print(json.dumps(thread_cases(chosen, options.seconds)))
        return
    result: dict[str, Any] = {"machine": describe()}
    others = Others()
    result["curves"] = curves(chosen, options.seconds)
    result["others"] = others.share()
    result["threads"] = speedups(chosen, options.seconds)
    FOLDER.mkdir(parents=True, exist_ok=True)
    stem = "scaling" if len(chosen) == len(OPS) else "scaling-" + "-".join(options.ops)
    (FOLDER / f"{stem}.json").write_text(json.dumps(result, indent=1))
    draw(result, FOLDER / f"{stem}.png")
    print("\n" + tables(result) + f"\n\nwrote runs/bench/{stem}.json, runs/bench/{stem}.png")


def curves(chosen: Sequence[Op], seconds: float) -> list[dict[str, Any]]:
    """Time against N at V = 49152, and against V at N = 64."""
    found = []
    for op in chosen:
        axes = {"N": [(n, 49152) for n in COUNTS]}
        if op.has_vocabulary:
            axes["V"] = [(64, v) for v in VOCABULARIES]
        for axis, points in axes.items():
            times = [time_of(op, n, v, seconds, hot=False) for n, v in points]
            x = [n if axis == "N" else v for n, v in points]
            least = 256 if axis == "N" else 16384
            found.append(
                {"op": op.name, "axis": axis, "x": x, "seconds": times, "slope": slope(x, times, least)}
            )
            print(
                f"{op.name}, {axis}: " + ", ".join(time_text(t) for t in times), file=sys.stderr, flush=True
            )
    return found


def time_of(op: Op, n: int, v: int, seconds: float, *, hot: bool) -> float:
    """Median seconds of one call."""
    torch.manual_seed(0)
    arguments = rotating(lambda: op.inputs(n, v), hot)
    op.run(*next(arguments))
    return interleave({op.name: op.run}, arguments, hot=hot, seconds=seconds)[op.name].median


def slope(x: Sequence[float], times: Sequence[float], least: float) -> float:
    """Least-squares slope of log time against log x, over x of at least `least`."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, times, strict=True) if a >= least]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a, _ in points)


def thread_cases(chosen: Sequence[Op], seconds: float) -> list[dict[str, Any]]:
    """In this process: seconds of each op on hot and on cold inputs."""
    found = []
    for op in chosen:
        for state, n in (("hot", op.in_cache), ("cold", op.in_memory)):
            others = Others()
            seconds_each = time_of(op, n, 49152, seconds, hot=state == "hot")
            found.append(
                {
                    "op": op.name,
                    "shape": op.shape(n, 49152),
                    "state": state,
                    "row_op": op.row_op,
                    "seconds": seconds_each,
                    "others": others.share(),
                }
            )
    return found


def speedups(chosen: Sequence[Op], seconds: float) -> list[dict[str, Any]]:
    """Thread cases with 1, 2, 4 … threads up to the cores there are. Counts take turns, three times; medians."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({2**i for i in range(cores.bit_length())} | {cores})
    runs: dict[int, list[list[dict[str, Any]]]] = {count: [] for count in counts}
    for _ in range(3):
        for count in counts:
            command = [sys.executable, "-m", "bench.scaling", f"--threads={count}", f"--seconds={seconds}"]
            done = subprocess.run(
                [*command, *{op.name.split()[0] for op in chosen}], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr[-4000:]}")
            runs[count].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{count} threads measured", file=sys.stderr, flush=True)
    found = []
    for i, case in enumerate(runs[1][0]):
        medians = {count: sorted(run[i]["seconds"] for run in runs[count])[1] for count in counts}
        found.append(
            case
            | {
                "others": max(run[i]["others"] for count in counts for run in runs[count]),
                "seconds": {str(count): medians[count] for count in counts},
                "speedup": {str(count): medians[1] / medians[count] for count in counts},
            }
        )
    return found


def tables(result: dict[str, Any]) -> str:
    """Slopes and speed-ups as text."""
    slopes = [
        (
            one["op"],
            f"{one['axis']} = {one['x'][0]} … {one['x'][-1]}",
            f"{time_text(one['seconds'][0])} … {time_text(one['seconds'][-1])}",
            f"{one['slope']:.3f}",
        )
        for one in result["curves"]
    ]
    threads = [
        (
            one["op"],
            one["shape"],
            one["state"],
            *(
                f"{time_text(one['seconds'][count])} ({one['speedup'][count]:.2f})"
                for count in one["seconds"]
            ),
        )
        for one in result["threads"]
    ]
    others = max(result.get("others", 0.0), *(one.get("others", 0.0) for one in result["threads"]))
    counts = [f"{count} threads" for count in result["threads"][0]["seconds"]]
    return (
        aligned(("op", "against", "time", "slope"), slopes, left=2)
        + "\n\n"
        + aligned(("op", "shape", "cache", *counts), threads, left=3)
        + (
            f"\n\nNOT QUIET: others used up to {100 * others:.0f} % of the processors"
            if others > QUIET
            else ""
        )
    )


# The picture

INK, MUTED, GRID = "#0b0b0b", "#5f5e5a", "#e4e3df"
COLOURS = ("#2a78d6", "#1baf7a", "#e0912b", "#8a4fc9", "#d6453d", "#5f5e5a")


def draw(result: dict[str, Any], path: Path) -> None:
    """Three panels: time against N, time against V, speed-up by threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {op.name: colour for op, colour in zip(OPS, COLOURS, strict=True)}
    figure, (by_n, by_v, by_threads) = plt.subplots(1, 3, figsize=(15, 5.2))
    for axis, name, label in (
        (by_n, "N", f"rows N (tokens at V = 49152; replies of {TOKENS} tokens)"),
        (by_v, "V", "vocabulary V, 64 rows"),
    ):
        for one in result["curves"]:
            if one["axis"] == name:
                legend = f"{one['op']}, slope {one['slope']:.2f}"
                milliseconds = [1e3 * t for t in one["seconds"]]
                axis.plot(one["x"], milliseconds, "o-", color=colours[one["op"]], ms=4, lw=1.6, label=legend)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("milliseconds")
        axis.legend(frameon=False, fontsize=8, loc="upper left", title="slope of log time", title_fontsize=8)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * 30)  # room for the legend
    by_n.set_xticks([4**i for i in range(7)], [str(4**i) for i in range(7)], fontsize=8)
    by_v.set_xticks(VOCABULARIES, [f"{round(v / 1000)}k" for v in VOCABULARIES], fontsize=8)
    by_n.axvspan(256, COUNTS[-1], color=GRID, alpha=0.4, zorder=0)
    by_v.axvspan(16384, VOCABULARIES[-1], color=GRID, alpha=0.4, zorder=0)
    bars(by_threads, result["threads"], colours)
    for axis, title in (
        (by_n, "time against rows (slope over the shaded part)"),
        (by_v, "time against vocabulary"),
        (by_threads, f"speed-up with {max(map(int, result['threads'][0]['speedup']))} threads"),
    ):
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.minorticks_off()
    machine = result["machine"]
    figure.text(
        *(0.995, 0.006, f"{machine['processor']}, {machine['instruction_set']}, torch {machine['torch']}"),
        ha="right",
        fontsize=7,
        color=MUTED,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(axis: Any, cases: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    """One bar per op and state: full colour where the inputs are in the cache, pale where they come from memory."""
    if not cases:
        return
    most = max(cases[0]["speedup"], key=int)
    labels = []
    for y, one in enumerate(cases):
        speedup = one["speedup"][most]
        alpha = 1.0 if one["state"] == "hot" else 0.4
        axis.barh(y, speedup, color=colours[one["op"]], alpha=alpha, height=0.7)
        axis.text(speedup + 0.02 * int(most), y, f"{speedup:.2f}", va="center", fontsize=8, color=INK)
        labels.append(f"{one['op'].split()[0]}\n{one['shape']} {one['state']}")
    axis.set_yticks(range(len(cases)), labels, fontsize=7)
    axis.axvline(int(most), color=INK, lw=1)
    axis.set_xlim(0, 1.15 * int(most))
    axis.set_xlabel(f"time with 1 thread / time with {most}")
    axis.invert_yaxis()


if __name__ == "__main__":
    main()
