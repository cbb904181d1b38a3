"""`fastppo.sb3.PPO` against stable-baselines3's own: GAE, loss, optimizer step, update and whole training, in one run.

Both sides take turns. They train on CartPole and on the text-generation environment of examples/text_generation_env.py,
from the same seed; how far their weights are apart afterwards, relative to their size, stands in the last column.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common import buffers
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor
from torch.nn import functional as F

import fastppo.sb3
from bench.machine import describe
from bench.timing import interleave
from examples import text_generation_env as text
from fastppo import ops

SIDES = {"stable-baselines3": stable_baselines3.PPO, "fastppo.sb3": fastppo.sb3.PPO}
BUFFERS = {"stable-baselines3": buffers.RolloutBuffer, "fastppo.sb3": fastppo.sb3.RolloutBuffer}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
N_STEPS, N_ENVS, BATCH, EPOCHS = 256, 8, 64, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rollouts", type=int, default=8, help="rollouts of 8 x 256 steps of a whole training"
    )
    parser.add_argument("--runs", type=int, default=3, help="whole trainings per side")
    parser.add_argument(
        "--time",
        choices=list(CLOCKS),
        default="wall",
        help="of the whole trainings: on a shared machine processor time is the fairer",
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    options = parser.parse_args()
    table = Table("", "size", *SIDES, "speed", "difference", title="ms, medians")
    rows = [
        row_of("GAE of a rollout", f"[{t}, {e}]", *time_gae(t, e))
        for t, e in ((256, 8), (2048, 8), (2048, 64))
    ]
    rows += [row_of("loss, forward + backward", f"[{n}]", *time_loss(n)) for n in (64, 2048)]
    for task in options.tasks:
        rows += whole_training(task, options.rollouts, options.runs, CLOCKS[options.time])
    for row in rows:
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    machine = describe()
    console.print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")


def row_of(name: str, size: str, stock: float, ours: float, difference: float) -> tuple[str, ...]:
    return name, size, f"{stock * 1e3:.3g}", f"{ours * 1e3:.3g}", f"{stock / ours:.2f} x", f"{difference:.0e}"


def compare(functions: Mapping[str, Callable[[], Any]]) -> tuple[float, float]:
    """Median seconds of both sides, in turns."""

    def no_arguments() -> Iterator[tuple[()]]:
        while True:
            yield ()

    timings = interleave(dict(functions), no_arguments(), hot=True)
    stock, ours = (timings[side].median for side in SIDES)
    return stock, ours


def time_gae(steps: int, environments: int) -> tuple[float, float, float]:
    """A rollout of random numbers whose episodes are 100 steps long in the mean."""
    draw = np.random.default_rng(0)
    rewards, values = (draw.normal(size=(steps, environments)).astype(np.float32) for _ in range(2))
    starts = (draw.random((steps, environments)) < 0.01).astype(np.float32)
    last_values, dones = torch.randn(environments), draw.random(environments) < 0.5
    filled = {}
    for side, kind in BUFFERS.items():
        buffer = filled[side] = kind(
            steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), gae_lambda=0.95, n_envs=environments
        )
        buffer.rewards, buffer.values, buffer.episode_starts = rewards, values, starts
        buffer.compute_returns_and_advantage(last_values, dones)
    stock, ours = (buffer.advantages for buffer in filled.values())
    difference = float(np.abs(stock - ours).max() / np.abs(stock).max())
    functions = {
        side: partial(buffer.compute_returns_and_advantage, last_values, dones)
        for side, buffer in filled.items()
    }
    return *compare(functions), difference


def plain_loss(
    logprobs: Tensor,
    values: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> Tensor:
    """The objective in plain torch, with the metrics that stable-baselines3 reads after every mini-batch."""
    ratio = (logprobs - old_logprobs).exp()
    policy_loss = -torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
    value_loss = F.mse_loss(values, returns)
    entropy_loss = -entropy.mean()
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs
        metrics = ((ratio - 1).abs() > 0.2).float().mean(), (log_ratio.exp() - 1 - log_ratio).mean()
    for metric in (policy_loss, value_loss, entropy_loss, *metrics):
        metric.item()
    return policy_loss + 0.5 * value_loss + 0.01 * entropy_loss


def our_loss(
    logprobs: Tensor,
    values: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> Tensor:
    """As `fastppo.sb3` calls it."""
    loss, _ = ops.ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        torch.ones_like(logprobs, dtype=torch.bool),
        new_values=values,
        values=values.detach(),
        returns=returns,
        entropy=entropy,
        value_clip_range=float("inf"),
        vf_coef=1.0,
        entropy_coef=0.01,
    )
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs
        moved = torch.expm1(log_ratio)
        _ = (moved.abs() > 0.2).float().mean(), (moved - log_ratio).mean()
    return loss


def time_loss(size: int) -> tuple[float, float, float]:
    torch.manual_seed(0)
    trained = [torch.randn(size, requires_grad=True) for _ in range(3)]
    logprobs = trained[0].detach()
    constants = [logprobs + 0.2 * torch.randn(size), torch.randn(size), torch.randn(size)]

    def gradients(loss: Callable[..., Tensor]) -> Tensor:
        return torch.stack(torch.autograd.grad(loss(*trained, *constants), trained))

    losses = dict(zip(SIDES, (plain_loss, our_loss), strict=True))
    stock, ours = (gradients(loss) for loss in losses.values())
    difference = float((stock - ours).norm() / stock.norm())
    return *compare({side: partial(gradients, loss) for side, loss in losses.items()}), difference


def cart_pole(kind: type, seed: int) -> Any:
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=seed)
    return kind("MlpPolicy", env, n_steps=N_STEPS, batch_size=BATCH, n_epochs=EPOCHS, seed=seed, device="cpu")


def text_generation(kind: type, seed: int) -> Any:
    env = text.make_env(text.read_references(20), N_ENVS, seed)
    return kind(
        *("MlpPolicy", env),
        n_steps=N_STEPS,
        batch_size=BATCH,
        n_epochs=EPOCHS,
        ent_coef=0.01,
        policy_kwargs=text.POLICY,
        seed=seed,
        device="cpu",
    )


TASKS = {"CartPole": cart_pole, "text generation": text_generation}


class Clocked:
    """Counts the seconds that a method of a model takes."""

    def __init__(self, model: Any, method: str, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.wrapped = clock, 0.0, getattr(model, method)
        setattr(model, method, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        start = self.clock()
        try:
            return self.wrapped(*arguments, **named)
        finally:
            self.seconds += self.clock() - start


def whole_training(task: str, rollouts: int, runs: int, clock: Callable[[], float]) -> list[tuple[str, ...]]:
    """Rows: rollout, update, optimizer step within it, and all of `learn`."""
    seconds: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    weights: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for run in range(runs):
        for side, kind in list(SIDES.items())[:: 1 if run % 2 else -1]:
            model = TASKS[task](kind, run)
            clocks = {
                "rollout": Clocked(model, "collect_rollouts", clock),
                "update": Clocked(model, "train", clock),
                "optimizer step in it": Clocked(model.policy.optimizer, "step", clock),
            }
            start = clock()
            model.learn(rollouts * N_STEPS * N_ENVS)
            whole = clock() - start
            for name, each in {**{n: c.seconds for n, c in clocks.items()}, "whole training": whole}.items():
                seconds[side].setdefault(name, []).append(each)
            weights[side].append(torch.cat([p.detach().flatten() for p in model.policy.parameters()]))
    differences = [float((a - b).norm() / a.norm()) for a, b in zip(*weights.values(), strict=True)]
    size = f"{rollouts} x [{N_STEPS}, {N_ENVS}]"
    rows = []
    for name in ("rollout", "update", "optimizer step in it", "whole training"):
        stock, ours = (statistics.median(seconds[side][name]) for side in SIDES)
        rows.append(row_of(f"{task}: {name}", size, stock, ours, max(differences)))
    return rows


if __name__ == "__main__":
    main()
