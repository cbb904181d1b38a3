"""What a run adapts from update to update besides the weights: coefficients, the scale of scores, averages of weights.

Each is told once per update what came out (`observe`, `update`), with numbers that are the same on all ranks, and has
`state_dict` / `load_state_dict`, so that a resumed run goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class KLCoefficient:
    """Weight of the KL penalty in the reward: fixed, or after Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

    ::

        error = clip(kl / target - 1, -0.2, 0.2)
        value = value * (1 + error * episodes / horizon)

    Args:
        value: at first.
        adaptive: False: it stays so.
        target: KL per episode, in nats.
        horizon: episodes in which the value moves by at most 20 %.
    """

    def __init__(self, value: float, *, adaptive: bool, target: float, horizon: float) -> None:
        self.value, self.adaptive, self.target, self.horizon = value, adaptive, target, horizon

    def observe(self, kl: float, episodes: int) -> None:
        """`kl`: mean KL per episode of the update's `episodes`."""
        if self.adaptive:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint. A fixed coefficient stays what the settings say."""
        if self.adaptive:
            self.value = state["value"]


class EntropyCoefficient:
    """Weight of the entropy bonus: fixed, or moved as in TRL's GRPO (there per optimizer step, here per update).

    One `step` up after an update whose mean entropy was at most `target`, one down after any other, within [`least`,
    `most`]. No bonus is given as long as the last entropy seen exceeds the target.
    """

    def __init__(
        self, coef: float, *, adaptive: bool, target: float, least: float, most: float, step: float
    ) -> None:
        self.coef, self.adaptive, self.target = coef, adaptive, target
        self.least, self.most, self.step = least, most, step
        self.entropy: float | None = None

    @property
    def value(self) -> float:
        """Weight for the next update."""
        enough = self.adaptive and self.entropy is not None and self.entropy > self.target
        return 0.0 if enough else self.coef

    def observe(self, entropy: float) -> None:
        """`entropy`: mean per token over the update, in nats."""
        if self.adaptive:
            self.entropy = entropy
            moved = self.coef + (self.step if entropy <= self.target else -self.step)
            self.coef = min(max(moved, self.least), self.most)

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint holds."""
        return {"coef": self.coef, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. A fixed coefficient stays what the settings say."""
        if self.adaptive:
            self.coef, self.entropy = state["coef"], state["entropy"]


class ScoreScale:
    """Scores over the running standard deviation of all scores so far, on all ranks, these included.

    ::

        score / std          if scale
        (score - mean) / std if scale and center

    As classic TRL's `use_score_scaling` and `use_score_norm`; the variance of n scores is their squared distances over
    n - 1. As long as all scores are equal, the divisor is 1.
    """

    def __init__(self, *, scale: bool, center: bool) -> None:
        self.scale, self.center = scale, center
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of squared distances to the mean

    @property
    def std(self) -> float:
        """Running standard deviation; 1 as long as there is none."""
        return math.sqrt(self.squares / (self.count - 1)) if self.squares > 0 else 1.0

    def __call__(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Take this update's scores in, and scale them.

        Args:
            scores: (B,) float32.
            counts: (B,) bool, True = this episode counts; the moments are of those.
        """
        if not self.scale:
            return scores
        self._take_in(scores[counts].double())
        return (scores - (self.mean if self.center else 0.0)) / self.std

    def _take_in(self, scores: Tensor) -> None:
        # Two passes in float64, as in `advantages.all_ranks_moments`, then Chan's formula for the union of two sets.
        count, total = _sum_over_ranks(torch.stack([scores.new_tensor(len(scores)), scores.sum()])).tolist()
        if count == 0:
            return
        mean = total / count
        squares = _sum_over_ranks((scores - mean).square().sum()).item()
        apart, both = mean - self.mean, self.count + count
        self.squares += squares + apart * apart * self.count * count / both
        self.mean += apart * count / both
        self.count = int(both)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


class WeightAverage:
    """Exponential moving average of a model's trainable weights: average = decay * average + (1 - decay) * weight.

    It lies in CPU memory, for it is needed once per update and would otherwise take room beside the optimizer's state;
    and in float32, for in bfloat16 a step of (1 - decay) times a small difference is rounded away.

    Args:
        model: its weights are the average at first.
        decay: between 0 and 1.
        skip_adapter: name of a PEFT adapter whose weights are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float, skip_adapter: str | None = None) -> None:
        self.decay, self.skip_adapter = decay, skip_adapter
        self.weights = {name: _float32_on_cpu(p) for name, p in self._averaged(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights as they are now."""
        for name, p in self._averaged(model):
            self.weights[name].lerp_(_float32_on_cpu(p), 1 - self.decay)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model's weights are the average, rounded to their dtype."""
        averaged = list(self._averaged(model))
        own = {name: p.detach().clone() for name, p in averaged}
        _fill(averaged, self.weights)
        try:
            yield
        finally:
            _fill(averaged, own)

    def _averaged(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        for name, p in model.named_parameters():
            if p.requires_grad and self.skip_adapter not in name.split("."):
                yield name, p

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return self.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is an average of other weights.
        """
        if {n: w.shape for n, w in state.items()} != {n: w.shape for n, w in self.weights.items()}:
            raise ValueError("the checkpoint's ema.safetensors does not fit the policy's trainable weights")
        self.weights = state


@torch.no_grad()
def mix_into(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Reference = alpha * policy + (1 - alpha) * reference (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.copy_(torch.lerp(old.float(), new.to(old.device).float(), alpha))


def check_mixable(reference: nn.Module, policy: nn.Module) -> None:
    """Raise a ValueError unless both have weights of the same names and shapes."""
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (reference, policy)]
    if shapes[0] != shapes[1]:
        raise ValueError("sync_ref_model: ref_model must have the weights of model, by name and shape")


def _float32_on_cpu(p: Tensor) -> Tensor:
    return p.detach().to(device="cpu", dtype=torch.float32, copy=True)


@torch.no_grad()
def _fill(parameters: list[tuple[str, nn.Parameter]], weights: dict[str, Tensor]) -> None:
    for name, p in parameters:
        p.copy_(weights[name])


def _sum_over_ranks(x: Tensor) -> Tensor:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(x)
    return x
