"""PPO epochs over one batch of episodes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .batch import MicroBatch, Rollout, micro_batches, text_batches
from .models import Evaluation, Scored
from .objective import Objective
from .ops import PPOStats

# Parts of the loss, reported as they stand in it, and a maximum; other fields of `PPOStats` are means over tokens.
_AS_IT_STANDS = ("policy_loss", "value_loss", "kl", "ratio_max")


def update(
    model: nn.Module,
    optimizer: Any,
    rollout: Rollout,
    *,
    logprobs: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    ref_logprobs: Tensor | None = None,
    objective: Objective,
    temperature: float,
    epochs: int,
    mini_batches: int,
    micro_batch_rows: int | None,
    micro_batch_tokens: int | None,
    max_grad_norm: float | None,
    pad_token_id: int,
    seed: int,
    accelerator: Any,
    critic_only: bool = False,
    texts: Iterator[Sequence[Sequence[int]]] | None = None,
    padding_free: bool = False,
    scored: Sequence[Scored] | None = None,
) -> dict[str, float]:
    """Train `model` (an `ActorCritic`, wrapped or not) on a rollout.

    Each epoch visits the episodes in a fresh order, in `mini_batches` optimizer steps. A loss is the sum over its
    tokens divided by what the whole step holds on all ranks (tokens, or as `objective.aggregation` says), so neither
    the cut into micro-batches nor the number of ranks changes the gradient. A step in which no token counts is not
    taken.

    Args:
        model: an `ActorCritic`, wrapped by Accelerate or not.
        optimizer: of the model's trainable parameters.
        rollout: B episodes.
        logprobs: (B, T) float32, of the policy that made the rollout, in nats.
        values: (B, T) float32, of the critic before this update.
        advantages: (B, T) float32.
        returns: (B, T) float32, what the values should have been.
        ref_logprobs: (B, T) float32, of the reference; needed where `objective.kl_coef` is not 0.
        objective: the loss, and when a step is refused.
        temperature: divides the logits, as it did in the rollout.
        epochs: passes over the episodes.
        mini_batches: optimizer steps per epoch.
        micro_batch_rows: most episodes in one forward and backward (see `micro_batches`); None: no limit.
        micro_batch_tokens: most tokens (with padding) in one forward and backward; None: no limit.
        max_grad_norm: the gradient of each network is scaled down to this norm; None or 0: not.
        pad_token_id: filler of micro-batches.
        seed: of the order of the episodes.
        accelerator: `accelerate.Accelerator`, for backward, clipping and gradient synchronisation.
        critic_only: leave the policy as it is. On a shared trunk only the value head learns.
        texts: token ids of the supervised texts of each optimizer step; needed where `objective.ptx_coef` is not 0.
        padding_free: pack micro-batches instead of padding them; every trunk must be able to (`why_not_padding_free`).
        scored: the whole rollout in micro-batches, run forward by the weights as they are. The first step goes backward
            through these graphs, which it uses up, instead of running forward itself. Only for `mini_batches` = 1,
            and not under DDP, whose gradient exchange is armed by its own forward.

    Returns:
        Means over the steps taken of `PPOStats`' fields, `first_ratio`, `first_ratio_max` and `first_approx_kl` of the
        first of them, plus `ptx_loss`, `grad_norm`, `ratio_var` (of the steps' mean
        ratios), `ratio_max` (over all), `steps`, `skipped_steps` and `stopped_early` (0 or 1).

    Raises:
        FloatingPointError: the gradient holds NaN or inf; the model is left as it was before the step.
    """
    device = rollout.response_ids.device
    old = {"logprobs": logprobs, "values": values, "advantages": advantages, "returns": returns}
    if objective.kl_coef:
        assert ref_logprobs is not None
        old["ref_logprobs"] = ref_logprobs
    old = {name: x.flatten() for name, x in old.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Separate networks share no gradient: one after the other, the activations and gradients of one suffice.
    actor_critic = accelerator.unwrap_model(model)
    networks = ("critic",) if critic_only else actor_critic.networks
    cut: dict[str, Any] = {
        "pad_token_id": pad_token_id,
        "max_rows": micro_batch_rows,
        "max_tokens": micro_batch_tokens,
        "padding_free": padding_free,
    }
    steps: list[Tensor] = []
    text_losses: list[Tensor] = []
    norms: list[float] = []
    skipped, stopped_early = 0, False

    for number, rows in enumerate(_mini_batches(len(rollout), epochs, mini_batches, seed)):
        mask = rollout.response_mask[rows.to(device)]
        # Tokens that count and episodes with any, on all ranks.
        size = _sum_over_ranks(torch.stack([mask.sum(), mask.any(1).sum()]).float())
        if not size[0]:
            continue
        reused = scored if number == 0 else None
        pieces = [x.batch for x in reused] if reused else list(micro_batches(rollout, rows.tolist(), **cut))
        step_stats = torch.zeros(len(PPOStats._fields), device=device)
        for network in networks:
            if objective.ptx_coef and network != "critic":
                assert texts is not None
                text_pieces = list(text_batches(next(texts), device=device, **cut))
                text_losses.append(_learn_texts(model, text_pieces, objective.ptx_coef, accelerator))
            stats = torch.zeros_like(step_stats)
            for i, piece in enumerate(pieces):
                unsynced = nullcontext() if i + 1 == len(pieces) else accelerator.no_sync(model)
                with unsynced, actor_critic.running(network, piece.packing):
                    new = reused[i].by_network.pop(network) if reused else model(piece, temperature, network)
                    loss, part = _loss(new, piece, old, objective, size)
                    # DDP averages over ranks what the normalizer has already divided by all ranks' tokens.
                    accelerator.backward(loss * accelerator.num_processes)
                stats = _accumulate(stats, part)
            stats = _over_ranks(stats)
            step_stats = _accumulate(step_stats, stats)
            named = dict(zip(PPOStats._fields, stats.tolist(), strict=True))
            stopped_early = objective.target_kl is not None and named["approx_kl"] > objective.target_kl
            too_far = objective.ratio_threshold is not None and named["ratio"] > objective.ratio_threshold
            if stopped_early or too_far:
                optimizer.zero_grad(set_to_none=True)
                break
            norm = float(
                accelerator.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm else float("inf"))
            )
            if not math.isfinite(norm):
                optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(
                    f"update: the gradient norm is {norm}, so this step was not taken; policy_loss "
                    f"{named['policy_loss']:.4g}, value_loss {named['value_loss']:.4g}, ratio_max "
                    f"{named['ratio_max']:.4g}. Lower the learning rate, or check the rewards"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            norms.append(norm)
        else:
            steps.append(step_stats)
            continue
        if stopped_early:
            break
        skipped += 1
        warnings.warn(
            f"update: skipped an optimizer step whose mean ratio {named['ratio']:.4g} exceeds ratio_threshold = "
            f"{objective.ratio_threshold}: the policy has moved too far from the one that made the rollout",
            stacklevel=2,
        )

    taken = torch.stack(steps) if steps else torch.zeros(1, len(PPOStats._fields))
    means = dict(zip(PPOStats._fields, taken.mean(0).tolist(), strict=True))
    ratios = taken[:, PPOStats._fields.index("ratio")]
    # Before the first step, policy and rollout have the same weights: what is not 1 there is between their two paths.
    for name in ("ratio", "ratio_max", "approx_kl"):
        means[f"first_{name}"] = taken[0, PPOStats._fields.index(name)].item()
    means["ratio_var"] = ratios.var().item() if len(ratios) > 1 else 0.0
    means["ratio_max"] = taken[:, PPOStats._fields.index("ratio_max")].max().item()
    means["ptx_loss"] = torch.stack(text_losses).mean().item() if text_losses else 0.0
    means["grad_norm"] = sum(norms) / len(norms) if norms else 0.0
    means["steps"] = float(len(steps))
    means["skipped_steps"] = float(skipped)
    means["stopped_early"] = float(stopped_early)
    return means


def _mini_batches(episodes: int, epochs: int, mini_batches: int, seed: int) -> Iterator[Tensor]:
    """Episode numbers of each optimizer step; every epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(episodes, generator=generator).tensor_split(mini_batches)


def _loss(
    new: Evaluation, batch: MicroBatch, old: dict[str, Tensor], objective: Objective, size: Tensor
) -> tuple[Tensor, Tensor]:
    """A micro-batch's share in the loss, and its metrics, of what the evaluated network is responsible for.

    `size`: tokens and episodes of the whole step. The op divides a sum over tokens by one normalizer, so where episodes
    weigh the same, it is called for one at a time.
    """
    tokens, episodes = size
    parts = [len(batch.tokens)]
    if objective.aggregation == "sequence":
        parts = [n for n in batch.counts if n] or parts
    # split, not slices: the gradient of a slice is as long as what it was cut from, once for every episode.
    old_parts = {name: x[batch.tokens].split(parts) for name, x in old.items()}
    new_parts = [None if x is None else x.split(parts) for x in new]
    losses, stats = [], torch.zeros(len(PPOStats._fields), device=tokens.device)
    for i, n in enumerate(parts):
        normalizer = {
            "token": tokens,
            "sequence": max(n, 1) * episodes,
            "constant": objective.response_length * episodes,
        }[objective.aggregation]
        loss, part = _ppo_loss(
            Evaluation(*(None if x is None else x[i] for x in new_parts)),
            {name: x[i] for name, x in old_parts.items()},
            objective,
            normalizer,
        )
        if objective.aggregation != "token":
            as_it_stands = torch.tensor(
                [name in _AS_IT_STANDS for name in PPOStats._fields], device=part.device
            )
            part = torch.where(as_it_stands, part, part * (normalizer / tokens))
        losses.append(loss)
        stats = _accumulate(stats, part)
    return torch.stack(losses).sum(), stats


def _ppo_loss(
    new: Evaluation, old: dict[str, Tensor], objective: Objective, normalizer: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.ppo_loss` of N tokens that all count, its `PPOStats` as one tensor. Where the policy was not evaluated, its
    terms are 0.
    """
    trains_policy, trains_values = new.logprobs is not None, new.values is not None
    loss, stats = ops.ppo_loss(
        new.logprobs if new.logprobs is not None else old["logprobs"],
        old["logprobs"],
        old["advantages"] if trains_policy else torch.zeros_like(old["advantages"]),
        torch.ones_like(old["logprobs"], dtype=torch.bool),
        new_values=new.values,
        values=old["values"] if trains_values else None,
        returns=old["returns"] if trains_values else None,
        entropy=new.entropy,
        clip_range=objective.clip_range,
        clip_range_high=objective.clip_range_high,
        dual_clip=objective.dual_clip,
        value_clip_range=objective.value_clip_range,
        vf_coef=objective.vf_coef,
        entropy_coef=objective.entropy_coef if trains_policy else 0.0,
        kl_coef=objective.kl_coef if trains_policy else 0.0,
        ref_logprobs=old.get("ref_logprobs") if trains_policy else None,
        kl_estimator=objective.kl_estimator,
        normalizer=normalizer,
    )
    if not trains_policy:  # a ratio of the old policy to itself is no news
        stats.ratio.zero_()
        stats.ratio_max.zero_()
    return loss, stats.tensor


def _learn_texts(model: nn.Module, pieces: list[MicroBatch], coef: float, accelerator: Any) -> Tensor:
    """Add `coef` times the gradient of the mean next-token loss of the texts of all ranks; gives that mean.

    At temperature 1: the texts were not sampled. Gradients are exchanged with those of the PPO loss, which come after.
    """
    device = pieces[0].input_ids.device
    tokens = _sum_over_ranks(torch.tensor(float(sum(len(piece.tokens) for piece in pieces)), device=device))
    total = torch.zeros((), device=device)
    actor_critic = accelerator.unwrap_model(model)
    for piece in pieces:
        with accelerator.no_sync(model), actor_critic.running("actor", piece.packing):
            loss = -model(piece, 1.0, "actor").logprobs.sum() / tokens
            accelerator.backward(coef * loss * accelerator.num_processes)
        total += loss.detach()
    return _sum_over_ranks(total)


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
