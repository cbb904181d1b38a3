"""Every op in one table: `make bench`.

`make bench ARGS="logprobs sample"` measures some concepts, `ARGS=--quick` one case per op, `ARGS=--report` nothing: it
prints the tables again, for example after `make bench-scaling`. Writes runs/bench/ops.json, ops.md and ops.png, and
pytest-benchmark's own JSON of each concept; what a partial run makes of them has a name of its own, so that it does
not replace the whole.
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
from bench.report import Row, as_json, disturbed, draw, markdown, rows_of, short, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "bench"
CONCEPTS = (
    "sample",
    "logprobs",
    "linear_logprobs",
    "distribution_kl",
    "kl",
    "gae",
    "ppo_loss",
    "ppo_loss_from_logits",
    "adamw",
    "decode_attention",
    "varlen_attention",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "concepts", nargs="*", choices=[[], *CONCEPTS], help=f"of {', '.join(CONCEPTS)}; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="one case per op, torch.compile in one mode")
    parser.add_argument(
        "--seconds", type=float, help="time for each variant of a case; default: 0.7, or 0.3 with --quick"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, show the last figures")
    options = parser.parse_args()
    stem = "-".join(["ops", *options.concepts, *["quick"] * options.quick])
    files = {concept: raw_file(concept, options.quick) for concept in options.concepts or CONCEPTS}
    if not options.report:
        for concept, file in files.items():
            run(concept, options.quick, options.seconds or (0.3 if options.quick else 0.7), file)
    missing = [concept for concept, file in files.items() if not file.exists()]
    if missing:
        raise SystemExit(f"not measured yet: {', '.join(missing)}")
    rows = rows_of(one for file in files.values() for one in json.loads(file.read_text())["benchmarks"])
    scaling = FOLDER / "scaling.json"
    report(rows, json.loads(scaling.read_text()) if scaling.exists() else {}, stem)


def raw_file(concept: str, quick: bool) -> Path:
    """Where pytest-benchmark leaves the figures of a concept."""
    return FOLDER / "pytest-benchmark" / f"{concept}{'-quick' if quick else ''}.json"


def run(concept: str, quick: bool, seconds: float, raw: Path) -> None:
    """All benchmarks of a concept, in a process of pytest of its own, which prints a line per case."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--capture=no", "--tb=short"),
        *("-o", "python_functions=bench_*", "-p", "no:cacheprovider", "--benchmark-quiet"),
        *(f"--benchmark-max-time={seconds}", "--benchmark-min-rounds=5", f"--benchmark-json={raw}"),
        *(["--quick"] if quick else []),
        f"bench/{concept}.py",
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
    print(goals_table(found if stem == "ops" else [one for one in found if one.met is not None]))
    if note := disturbed(rows):
        print(f"\n{note}")
    if not scaling and stem == "ops":
        print("\nthreads and slopes: make bench-scaling, then this table again")
    print("\nwrote " + ", ".join(str(path.relative_to(ROOT)) for path in files.values()))


if __name__ == "__main__":
    main()
