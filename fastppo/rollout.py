"""Responses from the policy: prompts in, `Rollout` out.

Generation runs in process: prompts in groups of similar length, a key-value cache, the LM head on the last position
alone, one fused sampling op per step. Rows leave the batch when they finish. Every draw comes from (seed, episode,
position), so the responses do not depend on how episodes are grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from . import ops
from .batch import Rollout, groups_by_length
from .models import accepts, context_length, text_config

# An episode's draws are numbered episode * 2^24 + position: longer responses than any context length.
_DRAWS_PER_EPISODE = 1 << 24
# Where the host has to wait for the device, look for finished rows this often.
_CHECK_EVERY = 16
# Drop finished rows from the batch once they are this share of it: dropping copies the cache.
_DROP_SHARE = 0.25


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn. Settings are as in `PPOConfig`; `stop_token_ids` end a response and count in it."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@torch.no_grad()
def rollout(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    pad_token_id: int,
    seed: int,
    first_episode: int = 0,
    num_generations: int = 1,
    max_rows: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
) -> Rollout:
    """Sample `num_generations` responses to each prompt.

    Args:
        policy: causal language model (PEFT or not), in eval mode.
        prompts: lists of token ids, each at least one long.
        sampling: how to draw.
        pad_token_id: fills the places past a response's end. It may be a stop token: lengths are explicit.
        seed: of all draws; the draws of episode i depend on (seed, first_episode + i) and nothing else.
        first_episode: number of the first episode of this call within the run.
        num_generations: responses per prompt; episodes i*num_generations ... belong to prompt i.
        max_rows: most episodes in one forward pass.
        tokenizer: needed for stop strings.
        logits_processor: further `transformers.LogitsProcessor`s, applied to the raw logits before temperature and
            truncation. Log-probs are those of the processed logits; PPO's own come from the training path.

    Returns:
        Rollout of len(prompts) * num_generations episodes.

    Raises:
        ValueError: a prompt is empty, or with the longest response exceeds the model's context; no prompts; the
            policy's logits hold NaN or +inf, or are -inf everywhere.
    """
    _check_prompts(policy, prompts, sampling)
    device = next(policy.parameters()).device
    stop_strings = None
    if sampling.stop_strings:
        if tokenizer is None:
            raise ValueError("rollout: stop_strings need a tokenizer")
        stop_strings = StopStringCriteria(tokenizer, list(sampling.stop_strings))

    episodes = len(prompts) * num_generations
    response_ids = torch.full(
        (episodes, sampling.max_new_tokens), pad_token_id, dtype=torch.int64, device=device
    )
    shape, f32 = response_ids.shape, torch.float32
    draws = _Draws(*(torch.zeros(shape, dtype=f32, device=device) for _ in range(3)))
    lengths = torch.full((episodes,), sampling.max_new_tokens, dtype=torch.int64, device=device)
    stopped = torch.zeros(episodes, dtype=torch.bool, device=device)

    for group in groups_by_length([len(p) for p in prompts], max_rows=max(1, max_rows // num_generations)):
        _generate_group(
            policy,
            [prompts[i] for i in group],
            torch.tensor(
                [i * num_generations + g for i in group for g in range(num_generations)], device=device
            ),
            sampling,
            num_generations=num_generations,
            seed=seed,
            first_episode=first_episode,
            pad_token_id=pad_token_id,
            stop_strings=stop_strings,
            logits_processor=logits_processor,
            out=(response_ids, draws, lengths, stopped),
        )

    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    return Rollout(
        prompt_ids=[list(p) for p in prompts for _ in range(num_generations)],
        response_ids=response_ids[:, :longest].masked_fill(~mask, pad_token_id),
        response_mask=mask,
        response_lengths=lengths,
        truncated=~stopped,
        logprobs=draws.logprobs[:, :longest].masked_fill(~mask, 0.0),
        sampling_logprobs=draws.sampling_logprobs[:, :longest].masked_fill(~mask, 0.0),
        entropy=draws.entropy[:, :longest].masked_fill(~mask, 0.0),
    )


@dataclass
class _Draws:
    logprobs: Tensor
    sampling_logprobs: Tensor
    entropy: Tensor


def _generate_group(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    episodes: Tensor,
    sampling: Sampling,
    *,
    num_generations: int,
    seed: int,
    first_episode: int,
    pad_token_id: int,
    stop_strings: StopStringCriteria | None,
    logits_processor: Sequence[LogitsProcessor],
    out: tuple[Tensor, _Draws, Tensor, Tensor],
) -> None:
    """Generate for prompts of similar length together; `episodes` are their rows in `out`."""
    response_ids, draws, lengths, stopped = out
    device = episodes.device
    width = max(len(p) for p in prompts)
    padding = [width - len(p) for p in prompts]
    padded = any(padding)
    # Left padding: every row's next token then stands in the same column of the cache.
    input_ids = torch.tensor(
        [[pad_token_id] * n + list(p) for n, p in zip(padding, prompts, strict=True)], device=device
    )
    columns = torch.arange(width, device=device)
    attention = columns >= torch.tensor(padding, device=device)[:, None]
    positions = (columns - torch.tensor(padding, device=device)[:, None]).clamp_min(0)
    stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
    processors = LogitsProcessorList(logits_processor)
    if sampling.min_new_tokens and sampling.stop_token_ids:
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                width, sampling.min_new_tokens, list(sampling.stop_token_ids), device=str(device)
            )
        )
    penalty = (
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        if sampling.repetition_penalty != 1
        else None
    )

    cache = DynamicCache(config=text_config(policy))
    use_positions = accepts(policy, "position_ids")

    def forward(ids: Tensor, position_ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"attention_mask": attention.long()} if padded else {}
        if use_positions:
            inputs["position_ids"] = position_ids
        # Every policy of this function keeps a cache and takes logits_to_keep; both are checked by the trainer.
        output = policy(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        return output.logits[:, -1]

    logits = forward(input_ids, positions)
    if num_generations > 1:  # one prefill serves all responses to a prompt
        cache.batch_repeat_interleave(num_generations)
        input_ids, attention, positions, logits = (
            x.repeat_interleave(num_generations, dim=0) for x in (input_ids, attention, positions, logits)
        )
    next_positions = positions[:, -1:] + 1
    history = input_ids
    # A repetition penalty counts what a row holds; its own first token stands in for the padding.
    first_token = input_ids.gather(1, attention.int().argmax(1, keepdim=True))
    penalised = torch.where(attention, input_ids, first_token)
    active = torch.arange(len(episodes), device=device)  # rows of this group that are still in the batch
    done = torch.zeros(len(episodes), dtype=torch.bool, device=device)  # per row still in the batch
    check_every = 1 if device.type == "cpu" else _CHECK_EVERY

    for t in range(sampling.max_new_tokens):
        if penalty is not None:
            logits = penalty(penalised, logits)
        if processors:
            logits = processors(history, logits)  # type: ignore[arg-type]
        rows = episodes[active]
        draw = ops.sample(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            counters=(first_episode + rows) * _DRAWS_PER_EPISODE + t,
        )
        # On CUDA an id of -1, with a log-prob of NaN, says that a row's logits are no distribution. The host hears of
        # it when it next waits for the device; until then the model needs an id.
        ids = draw.token_ids.clamp_min(0)
        response_ids[rows, t] = ids
        draws.logprobs[rows, t] = draw.logprobs
        draws.sampling_logprobs[rows, t] = draw.sampling_logprobs
        draws.entropy[rows, t] = draw.entropy
        if stop_strings is not None or processors:
            history = torch.cat([history, ids[:, None]], dim=1)
        if penalty is not None:
            penalised = torch.cat([penalised, ids[:, None]], dim=1)
        stops = torch.isin(ids, stop_ids)
        if stop_strings is not None and t + 1 >= sampling.min_new_tokens:
            stops |= stop_strings(history, None)
        stops &= ~done
        lengths[rows] = torch.where(stops, t + 1, lengths[rows])
        stopped[rows] |= stops
        done |= stops
        if t + 1 == sampling.max_new_tokens:
            break
        if (t + 1) % check_every == 0:
            _check_drawn(draws.logprobs, rows, t + 1 - check_every, t + 1, first_episode)
            left = int((~done).sum())
            if left == 0:
                break
            if len(done) - left >= _DROP_SHARE * len(done):
                keep = (~done).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                active, ids, attention, next_positions, history, penalised, done = (
                    x[keep] for x in (active, ids, attention, next_positions, history, penalised, done)
                )
        if padded:
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
        logits = forward(ids[:, None], next_positions)
        next_positions = next_positions + 1
    _check_drawn(draws.logprobs, episodes, 0, sampling.max_new_tokens, first_episode)


def _check_drawn(logprobs: Tensor, rows: Tensor, begin: int, end: int, first_episode: int) -> None:
    """Raise where `ops.sample` had no distribution to draw from and could not raise itself. Waits for the device."""
    bad = logprobs[rows, begin:end].isnan().nonzero().tolist()
    if bad:
        row, position = bad[0]
        raise ValueError(
            f"sample: the logits of episode {first_episode + int(rows[row])} at response position {begin + position} "
            "hold NaN or +inf, or are -inf everywhere"
        )


def _check_prompts(policy: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    if len(prompts) == 0:
        raise ValueError("rollout: expected at least one prompt, got none")
    limit, vocabulary = context_length(policy), text_config(policy).vocab_size
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"rollout: prompt {i} must have at least one token, got none")
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"rollout: prompt {i} has {len(prompt)} tokens; with response_length {sampling.max_new_tokens} that "
                f"exceeds the model's context of {limit}; shorten it (PPOConfig.max_prompt_length) or the response"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            bad = next(x for x in prompt if x < 0 or x >= vocabulary)
            raise ValueError(
                f"rollout: prompt {i} has token id {bad}, outside the vocabulary of {vocabulary}"
            )
