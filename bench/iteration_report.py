"""What `bench.iteration` measured: one JSON for all runs, one table per recipe, one PNG."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOMS = ("rollout", "score", "update")
KEY = (
    "recipe",
    "model",
    "side",
    "layout",
    "precision",
    "micro_batch",
    "device",
    "episodes",
    "reuse",
    "cuda_graphs",
)
# Precisions in which a step of the learning rate is not rounded away.
LEARNS = {"trl": ("float32", "autocast"), "fastppo": ("float32", "bfloat16")}
Result = dict[str, Any]


def read(folder: Path) -> list[Result]:
    """Results of earlier runs."""
    path = folder / "iteration.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def merge(results: Sequence[Result], new: Result) -> list[Result]:
    """Results with a new one, in place of one of the same run."""

    def key(result: Result) -> list[Any]:
        return [result.get(name) or False for name in KEY]

    return [r for r in results if key(r) != key(new)] + [new]


def write(results: Sequence[Result], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"ratios": {recipe: ratios(some) for recipe, some in by_recipe(results)}, "results": results}
    (folder / "iteration.json").write_text(json.dumps(content, indent=1))


def show(results: Sequence[Result], folder: Path) -> None:
    """Tables on the terminal, iteration.json and iteration.png in `folder`."""
    for recipe, some in by_recipe(results):
        print(f"\n{table(recipe, some)}")
    write(results, folder)
    draw(results, folder / "iteration.png")
    print(f"\nwrote {folder / 'iteration.json'} and {folder / 'iteration.png'}")


def by_recipe(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Results of one recipe (and model) under its name, in the order of their first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(f"{result['recipe']} ({Path(result['model']).name})", []).append(result)
    return list(groups.items())


# One result


def median(result: Result, room: str = "total") -> float:
    """Seconds of a counted iteration in a room."""
    return statistics.median(iteration[room] for iteration in result["iterations"])


def floor(result: Result, room: str = "total") -> float:
    """Seconds that the bare products of a counted iteration take."""
    return statistics.median(one[room] for one in result["floors"])


def episodes_per_second(result: Result) -> float:
    return statistics.median(len(one["lengths"]) / one["total"] for one in result["iterations"])


def tokens_per_second(result: Result) -> float:
    """Tokens of responses, up to the EOS."""
    return statistics.median(sum(one["lengths"]) / one["total"] for one in result["iterations"])


def name(result: Result) -> str:
    extras = ", reused" * result.get("reuse", False) + ", graphs" * result.get("cuda_graphs", False)
    return f"{result['side']} {result['layout']} {result['precision']}, {result['micro_batch']}{extras}"


def lengths(result: Result) -> str:
    """The spread of its responses."""
    every = [n for one in result["iterations"] for n in one["lengths"]]
    cut = sum(one["truncated"] for one in result["iterations"])
    return (
        f"{min(every)} to {max(every)} tokens, median {statistics.median(every):g}; {cut} of {len(every)} cut"
    )


# All of them


def ratios(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """By layout: our fastest run against the fastest and the smallest of TRL that learns."""
    peers = [r for r in results if r["side"] == "trl" and r["precision"] in LEARNS["trl"]]
    found = {}
    for layout in ("separate", "shared"):
        ours = [
            r
            for r in results
            if r["side"] == "fastppo" and r["layout"] == layout and r["precision"] in LEARNS["fastppo"]
        ]
        if peers and ours:
            own = max(ours, key=episodes_per_second)
            fastest = max(peers, key=episodes_per_second)
            smallest = min(peers, key=lambda r: r["peak_gb"])
            found[layout] = {
                "own": name(own),
                "fastest": name(fastest),
                "smallest": name(smallest),
                "episodes/s": episodes_per_second(own) / episodes_per_second(fastest),
                "tokens/s": tokens_per_second(own) / max(map(tokens_per_second, peers)),
                "memory": own["peak_gb"] / smallest["peak_gb"],
            }
    return found


def table(recipe: str, results: Sequence[Result]) -> str:
    """Seconds by room with the share of the floor, speed and memory; then the ratios."""
    first = results[0]
    ends = "real ends" if first["stops"] else "no end before"
    width = max(len(name(r)) for r in results) + 2
    columns = (*ROOMS, "seconds", "episodes/s", "tokens/s", "peak GB")
    lines = [
        f"{recipe}: {len(first['iterations'][0]['lengths'])} episodes of at most {first['tokens']} tokens, {ends}",
        " " * width + "".join(f"{column:>16}" for column in columns),
    ]
    for r in results:
        cells = [
            f"{median(r, room):.2f} ({100 * floor(r, room) / median(r, room):.0f} %)"
            for room in (*ROOMS, "total")
        ]
        cells += [f"{x:.2f}" for x in (episodes_per_second(r), tokens_per_second(r), r["peak_gb"])]
        lines.append(name(r).ljust(width) + "".join(f"{cell:>16}" for cell in cells))
    lines.append(
        f"in brackets: the share of the floor, the bare {first['products']['dtype']} products timed in the same process"
    )
    if first["stops"]:
        lines += [f"{name(r)}: {lengths(r)}" for r in results]
    for layout, found in ratios(results).items():
        lines.append(
            f"{found['own']} ({layout}): {found['episodes/s']:.2f} times TRL's episodes/s, "
            f"{found['tokens/s']:.2f} times its tokens/s ({found['fastest']}), "
            f"{100 * found['memory']:.0f} % of its smallest peak ({found['smallest']})"
        )
    machines = {
        f"{r['machine']['processor']}, {r['machine']['threads']} threads, torch {r['machine']['torch']}"
        for r in results
    }
    return "\n".join(lines + sorted(machines))


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars by room with the floor as a line, and peak memory: one row of axes per recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_recipe(results)
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(10, 0.9 * len(groups) + 0.5 * len(results) + 0.4),
        squeeze=False,
        gridspec_kw={"height_ratios": [len(some) + 1 for _, some in groups]},
    )
    for (recipe, some), (time_axis, memory_axis) in zip(groups, axes, strict=True):
        places = range(len(some))
        left = [0.0] * len(some)
        for room, colour in zip(ROOMS, ("#2a78d6", "#1baf7a", "#eda100"), strict=True):
            widths = [median(r, room) for r in some]
            time_axis.barh(places, widths, left=left, color=colour, label=room, height=0.6)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, result in zip(places, some, strict=True):
            label = "floor" if place == 0 else None
            time_axis.vlines(floor(result), place - 0.4, place + 0.4, color="black", label=label)
        time_axis.set_yticks(places, [name(r) for r in some])
        time_axis.set_title(recipe, loc="left", fontsize="medium")
        time_axis.set_xlabel("seconds per iteration")
        memory_axis.barh(places, [r["peak_gb"] for r in some], color="#898781", height=0.6)
        memory_axis.set_yticks(places, [""] * len(some))
        memory_axis.set_xlabel("peak memory, GB")
        for axis in (time_axis, memory_axis):
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.1), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
