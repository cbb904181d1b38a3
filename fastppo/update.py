"""PPO epochs over one batch of episodes."""

from __future__ import annotations

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
        logprobs, values, advantages, returns: (B, T) float32, of the policy and critic that made the rollout.
        micro_batch_rows, micro_batch_tokens: most episodes and tokens (with padding) in a forward and backward.
        max_grad_norm: the gradient is scaled down to this norm; None or 0: not.
        target_kl: stop, before the step is taken, once a step's approx_kl = mean(½ (log ratio)²) exceeds this.
        seed: of the order of the episodes.
        accelerator: `accelerate.Accelerator`, for backward, clipping and gradient synchronisation.

    Returns:
        Means over the steps taken of `PPOStats`' fields, plus `grad_norm`, `ratio_var` (of the steps' mean ratios),
        `ratio_max` (over all), `steps`, and `stopped_early` (0 or 1).

    Raises:
        FloatingPointError: the gradient holds NaN or inf; the model is left as it was before the step.
    """
    device = rollout.response_ids.device
    flat = [x.flatten() for x in (logprobs, values, advantages, returns)]
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps: list[Tensor] = []
    norms: list[float] = []
    stopped_early = False

    for _ in range(epochs):
        order = torch.randperm(len(rollout), generator=generator)
        for rows in order.tensor_split(mini_batches):
            count = rollout.response_mask[rows.to(device)].sum()
            normalizer = _sum_over_ranks(count.float()).clamp_min(1)
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
            for i, piece in enumerate(pieces):
                last = i + 1 == len(pieces)
                with nullcontext() if last else accelerator.no_sync(model):
                    loss, stats = _loss(
                        model(piece, temperature), piece, flat, clip_range, value_clip_range, vf_coef, normalizer
                    )
                    # DDP averages over ranks what the normalizer has already divided by all ranks' tokens.
                    accelerator.backward(loss * accelerator.num_processes)
                step_stats = _accumulate(step_stats, stats)
            step_stats = _reduce(step_stats)
            approx_kl = step_stats[PPOStats._fields.index("approx_kl")].item()
            if target_kl is not None and approx_kl > target_kl:
                stopped_early = True
                optimizer.zero_grad(set_to_none=True)
                break
            norm = accelerator.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm else float("inf"))
            norms.append(float(norm))
            if not torch.isfinite(torch.tensor(norms[-1])):
                optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(
                    f"update: gradient norm is {norms[-1]} (policy_loss {step_stats[0].item():.4g}, value_loss "
                    f"{step_stats[1].item():.4g}); the step was not taken. Lower the learning rate or check the rewards"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
    old: list[Tensor],
    clip_range: float,
    value_clip_range: float,
    vf_coef: float,
    normalizer: Tensor,
) -> tuple[Tensor, PPOStats]:
    logprobs, values, advantages, returns = (x[batch.tokens] for x in old)
    return ops.ppo_loss(
        new.logprobs,
        logprobs,
        advantages,
        torch.ones_like(batch.tokens, dtype=torch.bool),
        new_values=new.values,
        values=values,
        returns=returns,
        entropy=new.entropy,
        clip_range=clip_range,
        value_clip_range=value_clip_range,
        vf_coef=vf_coef,
        normalizer=normalizer,
    )


def _accumulate(total: Tensor, stats: PPOStats) -> Tensor:
    """Add up all fields but the last, `ratio_max`, whose maximum is kept."""
    new = torch.stack(list(stats))
    return torch.cat([total[:-1] + new[:-1], torch.maximum(total[-1:], new[-1:])])


def _reduce(stats: Tensor) -> Tensor:
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
