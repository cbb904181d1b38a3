"""What a run reports: numbers under TRL's metric names, a progress bar, a table of completions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback

from .batch import Rollout
from .environment import Dialogues
from .objective import Objective
from .ops import RewardsAndAdvantages


def episode_metrics(
    rollout: Rollout,
    scores: Tensor,
    each: Mapping[str, Tensor],
    logprobs: Tensor,
    result: RewardsAndAdvantages,
    values: Tensor,
    kl_coef: float,
    importance_weights: Tensor | None = None,
) -> dict[str, float]:
    """Metrics of the episodes of one batch, before the update.

    Those of tokens are of the tokens that count: sums over an episode, then means over the episodes that have any.
    """
    mask = rollout.response_mask
    episodes = mask.any(1).sum().clamp_min(1)

    def per_episode(x: Tensor) -> float:
        return (x.masked_fill(~mask, 0.0).sum() / episodes).item()

    kl = per_episode(result.kl)
    counted = mask.sum().clamp_min(1)
    residual = (result.returns - values).masked_fill(~mask, 0.0)
    mean_return = result.returns.masked_fill(~mask, 0.0).sum() / counted
    spread = (result.returns - mean_return).masked_fill(~mask, 0.0).square().sum()
    metrics = {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": per_episode(-logprobs),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": -kl_coef * kl + scores.mean().item(),
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(correction=0).item(),
        "val/num_eos_tokens": float((~rollout.truncated).sum()),
        "val/explained_variance": (1 - residual.square().sum() / spread.clamp_min(1e-8)).item(),
        "completions/mean_length": rollout.response_lengths.float().mean().item(),
        "completions/clipped_ratio": rollout.truncated.float().mean().item(),
    }
    if isinstance(rollout, Dialogues):
        metrics["dialogues/turns"] = rollout.turns.float().mean().item()
        metrics["dialogues/policy_tokens"] = mask.sum().item() / len(rollout)
    if importance_weights is not None:
        weights = importance_weights[mask] if mask.any() else torch.ones(1)
        name = "sampling/importance_sampling_ratio"
        metrics |= {f"{name}/{f}": getattr(weights, f)().item() for f in ("min", "mean", "max")}
    if len(each) > 1:
        metrics |= {f"rewards/{name}/mean": x.mean().item() for name, x in each.items()}
    return metrics


def sampling_gap(
    rollout: Rollout, logprobs: Tensor, old_logprobs: str, means: Mapping[str, float]
) -> dict[str, float]:
    """How far the path that samples is from the one that trains: large gaps make the data off-policy.

    Where the log-probs were recomputed, the difference of the two. Else only the update knows: at its first optimizer
    step both paths have the same weights, and the ratio would be 1 everywhere.
    """
    if old_logprobs == "rollout":
        return {
            f"sampling/first_step/{name}": means[f"first_{name}"]
            for name in ("ratio", "ratio_max", "approx_kl")
        }
    mask = rollout.response_mask
    gap = (rollout.logprobs - logprobs).abs().masked_fill(~mask, 0.0)
    return {
        "sampling/sampling_logp_difference/mean": (gap.sum() / mask.sum().clamp_min(1)).item(),
        "sampling/sampling_logp_difference/max": gap.max().item() if gap.numel() else 0.0,
    }


def update_metrics(means: Mapping[str, float], objective: Objective) -> dict[str, float]:
    """`update`'s means under TRL's names, and those of the parts that the objective has beyond TRL's."""
    metrics = {
        "policy/approxkl_avg": means["approx_kl"],
        "policy/clipfrac_avg": means["clip_fraction"],
        "policy/entropy_avg": means["entropy"],
        "loss/policy_avg": means["policy_loss"],
        "loss/value_avg": means["value_loss"],
        "val/clipfrac_avg": means["value_clip_fraction"],
        "val/ratio": means["ratio"],
        "val/ratio_var": means["ratio_var"],
        "val/ratio_max": means["ratio_max"],
        "grad_norm": means["grad_norm"],
        "policy/optimizer_steps": means["steps"],
        "policy/entropy_coef": objective.entropy_coef,
    }
    if objective.kl_coef:
        metrics["loss/kl_avg"] = means["kl"]
    if objective.ptx_coef:
        metrics["loss/ptx_avg"] = means["ptx_loss"]
    if objective.ratio_threshold is not None:
        metrics["policy/skipped_steps"] = means["skipped_steps"]
    return metrics


def mean_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Each metric's mean over all ranks (every rank holds as many episodes)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64)
    if torch.distributed.get_backend() == "nccl":
        values = values.cuda()
    torch.distributed.all_reduce(values)
    values /= torch.distributed.get_world_size()
    return dict(zip(metrics, values.tolist(), strict=True))


class ProgressCallback(TrainerCallback):
    """One live line: updates, reward, KL, tokens per second, time left."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, on the main process alone."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="update", dynamic_ncols=True
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show reward, KL and speed of the update."""
        if self.bar is not None and logs and "objective/scores" in logs:
            self.bar.set_postfix(
                reward=f"{logs['objective/scores']:.3f}",
                kl=f"{logs['objective/kl']:.2f}",
                tokens_per_s=f"{logs['tokens_per_second']:.0f}",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on by one update."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def print_completions(rows: Sequence[Mapping[str, Any]], title: str, most: int = 5) -> None:
    """The first rows of a completions table on the terminal, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(title)
        for row in rows[:most]:
            print("  " + " | ".join(f"{k}: {v}" for k, v in row.items()))
        return
    table = Table(title=title, show_lines=True)
    for name in rows[0]:
        table.add_column(name)
    for row in rows[:most]:
        # Text, not markup: a completion may hold square brackets.
        table.add_row(*(Text(f"{v:.3f}" if isinstance(v, float) else str(v)) for v in row.values()))
    Console().print(table)


def save_completions(rows: Sequence[Mapping[str, Any]], output_dir: str, step: int) -> Path:
    """The table as JSON lines in `completions/completions_<step>.jsonl`."""
    path = Path(output_dir) / "completions" / f"completions_{step:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(temporary, path)
    return path
