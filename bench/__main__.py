"""Every op in one table: `make bench`.

`make bench ARGS="logprobs sample"` measures some concepts, `ARGS=--quick` one case per op in about three minutes.
Writes runs/bench/ops.json, ops.md and ops.png, and pytest-benchmark's own JSON; a partial run writes files of its
own name, so that it does not replace the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.goals import goals_table, outcomes
from bench.machine import describe
from bench.report import Row, as_json, draw, markdown, rows_of, short, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "bench"
CONCEPTS = ("sample", "logprobs", "linear_logprobs", "distribution_kl", "kl", "gae", "ppo_loss", "adamw")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "concepts", nargs="*", choices=[[], *CONCEPTS], help=f"of {', '.join(CONCEPTS)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="one case per op, torch.compile in one mode")
    parser.add_argument("--seconds", type=float, default=0.7, help="time for each variant of a case")
    options = parser.parse_args()
    stem = "-".join(["ops", *options.concepts, *["quick"] * options.quick])
    FOLDER.mkdir(parents=True, exist_ok=True)
    raw = FOLDER / f"{stem}-pytest-benchmark.json"
    run(options.concepts or CONCEPTS, options.quick, options.seconds, raw)
    rows = rows_of(json.loads(raw.read_text())["benchmarks"])
    scaling = FOLDER / "scaling.json"
    report(rows, json.loads(scaling.read_text()) if scaling.exists() else {}, stem)


def run(concepts: Any, quick: bool, seconds: float, raw: Path) -> None:
    """All benchmarks in one process of pytest, which prints a line per case."""
    command = [
        *(sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--capture=no", "--benchmark-quiet"),
        *("-o", "python_files=*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"),
        *(f"--benchmark-max-time={seconds}", "--benchmark-min-rounds=5", f"--benchmark-json={raw}"),
        *(["--quick"] if quick else []),
        *(f"bench/{concept}.py" for concept in concepts),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"the benchmark stopped: {' '.join(command[2:])}")


def report(rows: list[Row], scaling: dict[str, Any], stem: str) -> None:
    """Both tables on the terminal; JSON, Markdown and picture in runs/bench."""
    machine = describe()
    line = f"{machine['processor']}, {machine['instruction_set']}, torch {machine['torch']}"
    found = outcomes(rows, scaling)
    files = {kind: FOLDER / f"{stem}.{kind}" for kind in ("json", "md", "png")}
    content = {"machine": machine, "rows": as_json(rows), "goals": [asdict(one) for one in found]}
    files["json"].write_text(json.dumps(content, indent=1))
    files["md"].write_text(markdown(short(rows)))
    draw(short(rows), files["png"], line)
    print(f"\n{line}, {machine['threads']} threads; medians of rounds in which all variants took turns\n")
    print(table(rows))
    print("\n× floor: our time over the floor's; × eager, compile, peer: how many times as fast we are\n")
    print(goals_table(found))
    if not scaling:
        print("\nthreads and slopes: make bench-scaling, then this table again")
    print("\nwrote " + ", ".join(str(path.relative_to(ROOT)) for path in files.values()))


if __name__ == "__main__":
    main()
