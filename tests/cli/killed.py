"""Kills `fastppo rlhf` in each of its steps and starts it again: one JSON line per kill, and one of the last run.

Every run is a process of its own, forked from this one, which has imported everything once, and is killed with SIGKILL.

    python tests/cli/killed.py ARGUMENTS-OF-RLHF
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import fastppo.trainer  # noqa: F401
from fastppo.cli.__main__ import main
from fastppo.cli.rlhf import RESUMABLE, STEPS, parser
from fastppo.cli.training import complete_checkpoint


def start(arguments: list[str]) -> int:
    """A run, in a child; what it prints goes to a file beside its output."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open("output.txt", "a") as file, contextlib.redirect_stdout(file):
            status = main(["rlhf", *arguments])
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def kill_in(step: str, arguments: list[str], out: Path) -> dict[str, object]:
    """Start a run and kill it as soon as `step` is under way, in a step with checkpoints after one of them."""
    unfinished = out / f"{step}.tmp"
    child = start(arguments)
    while not (complete_checkpoint(unfinished) if step in RESUMABLE else unfinished.exists()):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            raise SystemExit(f"the run ended before {step} could be seen: {status}")
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {
        "killed in": step,
        "by": os.WTERMSIG(status),
        "complete": [s for s in STEPS if (out / s).exists()],
        "whole": [s for s in STEPS if (out / s / "step.json").exists()],
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    out = Path(arguments[arguments.index("--output_dir") + 1])
    parser()  # imports all that a run imports
    for name in ("sft", "reward", "ppo", "eval", "report"):
        __import__(f"fastppo.cli.{name}")
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        from trl import RewardTrainer, SFTTrainer  # noqa: F401
    for step in STEPS:
        print(json.dumps(kill_in(step, arguments, out)), flush=True)
    _, status = os.waitpid(start(arguments), 0)
    print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
