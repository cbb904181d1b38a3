"""What fastppo's own Python costs: the share of an iteration outside models, backward, optimizer and the large ops.

The recipe is *short* of `bench.iteration`: SmolLM2-135M as policy, reference, critic and reward, 16 episodes of 32
tokens, 4 epochs, bfloat16. Timers are put around what any trainer has to do; the rest, by room, is what this one adds:
cutting micro-batches, masks, bookkeeping, metrics, the small ops of advantages and loss.

    python -m bench.overhead

On two cores of an AMD EPYC (Zen 4, AVX-512), torch 2.14.1: 0.24 of 40.5 s, 0.6 %; 1.8 % of the rollout, 0.2 % of the
scoring, 0.5 % of the update. Clipping gradients, which is torch's, takes another 0.27 s.

Time is that of the main thread's processor (`time.thread_time`): it runs the Python and its share of every op, and what
else the machine does is not counted. Where it sleeps until other threads have done theirs, the work seems shorter and
the rest larger than it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from bench.iteration import EPISODES, EPOCHS, RECIPES, Run, fastppo_config, load
from bench.machine import processor

ROOMS = ("rollout", "score", "update", "log")


class Ledger:
    """Seconds by room and kind of work; of nested works the outermost is charged."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self.room = "log"
        self.entered = clock()
        self.totals: dict[str, float] = defaultdict(float)
        self.works: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.calls: dict[str, int] = defaultdict(int)
        self.inside = False

    def enter(self, room: str) -> None:
        """From now on time belongs to `room`."""
        now = self.clock()
        self.totals[self.room] += now - self.entered
        self.room, self.entered = room, now

    def reset(self) -> None:
        """Forget all of it: what came so far was the warm-up."""
        self.enter(self.room)
        for table in (self.totals, self.works, self.calls):
            table.clear()

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to `kind`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.works[self.room][kind] += self.clock() - start
                self.calls[kind] += 1
                self.inside = False

        return call

    def in_room(self, room: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a visit to `room`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(room)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter("log")

        return call

    def rest(self, room: str) -> float:
        """Seconds of a room that no timed work took."""
        return self.totals[room] - sum(self.works[room].values())


def measure(iterations: int) -> Ledger:
    """Train one iteration to warm up and `iterations` to count."""
    import torch
    import transformers

    from fastppo import PPOTrainer, models, ops
    from fastppo.optimizer import AdamW

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    ledger = Ledger()
    run = Run("short", "fastppo", "separate", "bfloat16", 4, RECIPES["short"].folder(), 1, iterations)
    loaded = load(run)

    class WarmedUp(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                ledger.reset()

    # Before the trainer is built: the schedule wraps the step of the optimizer that it finds.
    AdamW.step = ledger.timed("optimizer", AdamW.step)  # type: ignore[method-assign]
    trainer = PPOTrainer(args=fastppo_config(run), callbacks=[WarmedUp()], **loaded)
    trunks = [
        loaded["model"],
        *(loaded[name].get_decoder() for name in ("model", "ref_model")),
        *(models.classifier_trunk(loaded[name]) for name in ("value_model", "reward_model")),
    ]
    for module in trunks:
        module.forward = ledger.timed("models", module.forward)
    works = [
        (torch.Tensor, "backward", "backward"),
        (ops, "linear_logprobs", "linear_logprobs"),
        (ops, "sample", "sample"),
        (trainer.accelerator, "clip_grad_norm_", "clip_grad_norm_"),
    ]
    for owner, name, kind in works:
        setattr(owner, name, ledger.timed(kind, getattr(owner, name)))
    for name, room in (
        ("_rollout", "rollout"), ("_evaluate_tokens", "score"), ("_score", "score"), ("_advantages", "update"),
        ("_update", "update"),
    ):  # fmt: skip
        setattr(trainer, name, ledger.in_room(room, getattr(trainer, name)))
    trainer.train()
    ledger.enter("log")
    return ledger


def report(ledger: Ledger, iterations: int) -> dict[str, Any]:
    """The table, and the same as numbers: seconds per iteration."""
    kinds = sorted({kind for room in ledger.works.values() for kind in room})
    whole = sum(ledger.totals[room] for room in ROOMS)
    print(f"{'room':8}" + "".join(f"{kind:>17}" for kind in kinds) + f"{'the rest':>12}{'of the room':>13}")
    for room in ROOMS:
        cells = "".join(f"{ledger.works[room].get(kind, 0.0) / iterations:17.3f}" for kind in kinds)
        rest, total = ledger.rest(room), ledger.totals[room]
        print(f"{room:8}{cells}{rest / iterations:12.3f}{100 * rest / max(total, 1e-9):11.1f} %")
    rest = sum(ledger.rest(room) for room in ROOMS)
    print(f"\nthe rest: {rest / iterations:.3f} of {whole / iterations:.2f} s, {100 * rest / whole:.2f} %")
    return {
        "seconds": {room: ledger.totals[room] / iterations for room in ROOMS},
        "rest": {room: ledger.rest(room) / iterations for room in ROOMS},
        "share": rest / whole,
        "calls": {kind: n / iterations for kind, n in ledger.calls.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations", type=int, default=1, help="counted iterations, after one that warms up"
    )
    options = parser.parse_args()
    import torch

    tokens = RECIPES["short"].tokens
    print(f"{EPISODES} episodes of {tokens} tokens, {EPOCHS} epochs; four models of 135M in bfloat16")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {processor()}\n")
    print(json.dumps(report(measure(options.iterations), options.iterations)))


if __name__ == "__main__":
    main()
