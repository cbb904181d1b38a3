"""Every op in one table: `make bench`, or `python -m bench gae sample` for some."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = ("sample", "logprobs", "linear_logprobs", "kl", "gae", "ppo_loss")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "concepts", nargs="*", choices=[[], *CONCEPTS], help=f"of {', '.join(CONCEPTS)}; default: all"
    )
    options = parser.parse_args()
    results = ROOT / "runs" / "bench" / "ops.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    files = [f"bench/{concept}.py" for concept in options.concepts or CONCEPTS]
    print("measuring … (torch.compile takes most of the time)", flush=True)
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-o",
                "python_files=*.py",
                "-o",
                "python_functions=bench_*",
            ),
            *("--benchmark-max-time=0.5", "--benchmark-min-rounds=5", f"--benchmark-json={results}", *files),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    print(table(json.loads(results.read_text())["benchmarks"], read_bandwidth()))
    print(f"\nall figures: {results.relative_to(ROOT)}")


def read_bandwidth() -> float:
    """Bytes per second at which torch reads 100 MB of float32: the floor of everything bound by memory."""
    import torch

    x = torch.randn(512, 49152)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x.amax(-1)
        seconds.append(time.perf_counter() - start)
    return x.nbytes / sorted(seconds)[len(seconds) // 2]


def table(benchmarks: list[dict[str, Any]], bandwidth: float) -> str:
    """One line per op, size and dtype: milliseconds of each variant, ratios, share of the floor."""
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    reads: dict[tuple[str, str, str], int] = {}
    for one in benchmarks:
        info = one["extra_info"]
        key = (info["op"], info["size"], info["dtype"])
        rows.setdefault(key, {})[info["variant"]] = 1e3 * one["stats"]["median"]
        reads[key] = info["reads"]
    head = ("fastppo ms", "eager ms", "compile ms", "× eager", "× compile", "floor ms", "% of floor")
    lines = [
        f"read floor: {bandwidth / 1e9:.1f} GB/s (amax over 100 MB of float32)\n",
        f"{'op':28}{'size':24}{'dtype':10}" + "".join(f"{column:>12}" for column in head),
    ]
    for key, ms in rows.items():
        floor = ms.get("floor", 1e3 * reads[key] / bandwidth)
        ours = ms["fastppo"]
        cells = (
            ours,
            ms["eager"],
            ms["compile"],
            ms["eager"] / ours,
            ms["compile"] / ours,
            floor,
            100 * floor / ours,
        )
        numbers = "".join(f"{cell:12.3f}" if cell < 10 else f"{cell:12.1f}" for cell in cells)
        lines.append(f"{key[0]:28}{key[1]:24}{key[2]:10}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
