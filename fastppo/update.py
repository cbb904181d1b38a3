"""PPO epochs over one batch of episodes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .batch import MicroBatch, Rollout, micro_batches
from .models import Evaluation
from .ops import PPOStats


def update(
    model: nn.Module,
    optimizer: Any,
    rollout: Rollout,
    *,
    logprobs: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    temperature: float,
    epochs: int,
    mini_batches: int,
    micro_batch_rows: int | None,
    micro_batch_tokens: int | None,
    clip_range: float,
    value_clip_range: float,
    vf_coef: float,
    max_grad_norm: float | None,
    target_kl: float | None,
    pad_token_id: int,
    seed: int,
    accelerator: Any,
) -> dict[str, float]:
    """Train `model` (an `ActorCritic`, wrapped or not) on a rollout.

    Each epoch visits the episodes in a fresh order, in `mini_batches` optimizer steps. A loss is the sum over its
    tokens divided by the number of counted tokens of the whole step on all ranks, so neither the cut into
    micro-batches nor the number of ranks changes the gradient.

    Args:
        model: an `ActorCritic`, wrapped by Accelerate or not.
        optimizer: of the model's trainable parameters.
        rollout: B episodes.
        logprobs: (B, T) float32, of the policy that made the rollout, in nats.
        values: (B, T) float32, of the critic before this update.
        advantages: (B, T) float32.
        returns: (B, T) float32, what the values should have been.
        temperature: divides the logits, as it did in the rollout.
        epochs: passes over the episodes.
        mini_batches: optimizer steps per epoch.
        micro_batch_rows: most episodes in one forward and backward; None: no limit.
        micro_batch_tokens: most tokens (with padding) in one forward and backward; None: no limit.
        clip_range: of the ratio, around 1.
        value_clip_range: of the value, around its old estimate.
        vf_coef: weight of the value loss.
        max_grad_norm: the gradient of each network is scaled down to this norm; None or 0: not.
        target_kl: stop, before the step is taken, once a step's approx_kl = mean(½ (log ratio)²) exceeds this.
        pad_token_id: filler of micro-batches.
        seed: of the order of the episodes.
        accelerator: `accelerate.Accelerator`, for backward, clipping and gradient synchronisation.

    Returns:
        Means over the steps taken of `PPOStats`' fields, plus `grad_norm`, `ratio_var` (of the steps' mean ratios),
        `ratio_max` (over all), `steps`, and `stopped_early` (0 or 1).

    Raises:
        FloatingPointError: the gradient holds NaN or inf; the model is left as it was before the step.
    """
    device = rollout.response_ids.device
    old = tuple(x.flatten() for x in (logprobs, values, advantages, returns))
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps: list[Tensor] = []
    norms: list[float] = []
    stopped_early = False

    for _ in range(epochs):
        order = torch.randperm(len(rollout), generator=generator)
        for rows in order.tensor_split(mini_batches):
            normalizer = _sum_over_ranks(rollout.response_mask[rows.to(device)].sum().float()).clamp_min(1)
            pieces = list(
                micro_batches(
                    rollout,
                    rows.tolist(),
                    pad_token_id=pad_token_id,
                    max_rows=micro_batch_rows,
                    max_tokens=micro_batch_tokens,
                )
            )
            step_stats = torch.zeros(len(PPOStats._fields), device=device)
            # Separate networks share no gradient: one after the other, the activations and gradients of one suffice.
            for network in accelerator.unwrap_model(model).networks:
                stats = torch.zeros_like(step_stats)
                for i, piece in enumerate(pieces):
                    with nullcontext() if i + 1 == len(pieces) else accelerator.no_sync(model):
                        new = model(piece, temperature, network)
                        loss, part = _loss(new, piece, old, clip_range, value_clip_range, vf_coef, normalizer)
                        # DDP averages over ranks what the normalizer has already divided by all ranks' tokens.
                        accelerator.backward(loss * accelerator.num_processes)
                    stats = _accumulate(stats, part)
                stats = _over_ranks(stats)
                step_stats = _accumulate(step_stats, stats)
                if target_kl is not None and stats[PPOStats._fields.index("approx_kl")].item() > target_kl:
                    stopped_early = True
                    optimizer.zero_grad(set_to_none=True)
                    break
                norm = float(
                    accelerator.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm else float("inf"))
                )
                if not math.isfinite(norm):
                    optimizer.zero_grad(set_to_none=True)
                    named = dict(zip(PPOStats._fields, stats.tolist(), strict=True))
                    raise FloatingPointError(
                        f"update: the gradient norm is {norm}, so this step was not taken; policy_loss "
                        f"{named['policy_loss']:.4g}, value_loss {named['value_loss']:.4g}, ratio_max "
                        f"{named['ratio_max']:.4g}. Lower the learning rate, or check the rewards"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                norms.append(norm)
            if stopped_early:
                break
            steps.append(step_stats)
        if stopped_early:
            break

    taken = torch.stack(steps) if steps else torch.zeros(1, len(PPOStats._fields))
    means = dict(zip(PPOStats._fields, taken.mean(0).tolist(), strict=True))
    ratios = taken[:, PPOStats._fields.index("ratio")]
    means["ratio_var"] = ratios.var().item() if len(ratios) > 1 else 0.0
    means["ratio_max"] = taken[:, PPOStats._fields.index("ratio_max")].max().item()
    means["grad_norm"] = sum(norms) / len(norms) if norms else 0.0
    means["steps"] = float(len(steps))
    means["stopped_early"] = float(stopped_early)
    return means


def _loss(
    new: Evaluation,
    batch: MicroBatch,
    old: tuple[Tensor, ...],
    clip_range: float,
    value_clip_range: float,
    vf_coef: float,
    normalizer: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics (`PPOStats`' fields) of what the evaluated network is responsible for; the rest is 0."""
    logprobs, values, advantages, returns = (x[batch.tokens] for x in old)
    loss, stats = ops.ppo_loss(
        logprobs if new.logprobs is None else new.logprobs,
        logprobs,
        torch.zeros_like(advantages) if new.logprobs is None else advantages,
        torch.ones_like(batch.tokens, dtype=torch.bool),
        new_values=new.values,
        values=values if new.values is not None else None,
        returns=returns if new.values is not None else None,
        entropy=new.entropy,
        clip_range=clip_range,
        value_clip_range=value_clip_range,
        vf_coef=vf_coef,
        normalizer=normalizer,
    )
    if new.logprobs is None:  # a ratio of the old policy to itself is no news
        stats.ratio.zero_()
        stats.ratio_max.zero_()
    return loss, stats.tensor


def _accumulate(total: Tensor, new: Tensor) -> Tensor:
    """Add up all fields of `PPOStats` but the last, `ratio_max`, whose maximum is kept."""
    return torch.cat([total[:-1] + new[:-1], torch.maximum(total[-1:], new[-1:])])


def _over_ranks(stats: Tensor) -> Tensor:
    if not _distributed():
        return stats
    summed, largest = stats.clone(), stats[-1:].clone()
    torch.distributed.all_reduce(summed)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return torch.cat([summed[:-1], largest])


def _sum_over_ranks(x: Tensor) -> Tensor:
    if _distributed():
        torch.distributed.all_reduce(x)
    return x


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
