"""Responses from the policy: prompts in, `Rollout` out.

Generation runs in process, on a key-value cache of slots (`cache.py`): a row that finishes leaves, a prompt that waits
takes its slot, nothing is padded and nothing moves. One prefill serves all responses to a prompt, and what all prompts
begin with is prefilled once. The LM head sees the last position alone, one fused op samples. Every draw comes from
(seed, episode, position), so the responses depend neither on neighbours nor on slots.

Models that keep more than keys and values (state-space layers, attention sinks …) go in padded groups on their own
cache; `cache.why_no_slots` names the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
from .cache import SlotCache, cache_argument, decoding, why_no_slots, windows
from .graph import Graph
from .models import accepts, context_length, text_config
from .prepack import prepacked

# An episode's draws are numbered episode * 2^24 + position: longer responses than any context length.
DRAWS_PER_EPISODE = 1 << 24
# Where the host has to wait for the device, look for finished rows this often.
_CHECK_EVERY = 16
# Drop finished rows from a padded group once they are this share of it: dropping copies the cache.
_DROP_SHARE = 0.25
# Let prompts in once this share of the slots is free: a prefill stalls the rows that decode, and one of few prompts
# takes as long as one of several.
_ADMIT_SHARE = 0.25
# Tokens per slot to begin with, beyond the prompt: enough for most responses, and more is made in steps.
_FIRST_CAPACITY = 64
# What all prompts begin with is worth a pass of its own from this many tokens on.
_SHORTEST_PREFIX = 8
# Prompts are prefilled together with ones at most this much longer, or a third longer.
_SIMILAR = 16
# Laying out weights anew takes as long as it saves in so many tokens.
_PREPACK_FROM = 16


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
    first_draws: Sequence[int] | None = None,
    num_generations: int = 1,
    max_rows: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    prepack: bool | None = None,
    cuda_graphs: bool = False,
) -> Rollout:
    """Sample `num_generations` responses to each prompt.

    Args:
        policy: causal language model (PEFT or not), in eval mode.
        prompts: lists of token ids, each at least one long.
        sampling: how to draw.
        pad_token_id: fills the places past a response's end. It may be a stop token: lengths are explicit.
        seed: of all draws; the draws of episode i depend on (seed, first_episode + i) and nothing else.
        first_episode: number of the first episode of this call within the run.
        first_draws: number of each episode's first draw, where it is not the first of `first_episode + i`: a turn of
            episode e that begins at position t of its response draws from `e * DRAWS_PER_EPISODE + t` on.
        num_generations: responses per prompt; episodes i*num_generations ... belong to prompt i.
        max_rows: most episodes in one forward pass (the number of slots), but never less than `num_generations`.
        tokenizer: needed for stop strings.
        logits_processor: further `transformers.LogitsProcessor`s, applied to the raw logits before temperature and
            truncation. Log-probs are those of the processed logits; PPO's own come from the training path.
        prepack: on the CPU in bfloat16, decode on copies of the linear layers' weights in oneDNN's own layout, which
            are freed at the end. None: of weights that are trained, whose gradients take as much memory during the
            update, for responses of 16 tokens and more; True: of all; False: none.
        cuda_graphs: on CUDA, decode by replaying one graph instead of launching every kernel anew.

    Returns:
        Rollout of len(prompts) * num_generations episodes.

    Raises:
        ValueError: a prompt is empty, or with the longest response exceeds the model's context; no prompts; the
            policy's logits hold NaN or +inf, or are -inf everywhere; `cuda_graphs` cannot be had, and why.
    """
    _check_prompts(policy, prompts, sampling)
    device = next(policy.parameters()).device
    stop_strings = None
    if sampling.stop_strings:
        if tokenizer is None:
            raise ValueError("rollout: stop_strings need a tokenizer")
        stop_strings = StopStringCriteria(tokenizer, list(sampling.stop_strings))

    if cuda_graphs:
        check_can_be_captured(policy, sampling, logits_processor)
    episodes = len(prompts) * num_generations
    # One row more than episodes: what empty seats of a captured batch draw.
    response_ids = torch.full(
        (episodes + 1, sampling.max_new_tokens), pad_token_id, dtype=torch.int64, device=device
    )
    shape, f32 = response_ids.shape, torch.float32
    draws = _Draws(*(torch.zeros(shape, dtype=f32, device=device) for _ in range(3)))
    lengths = torch.full((episodes + 1,), sampling.max_new_tokens, dtype=torch.int64, device=device)
    stopped = torch.zeros(episodes + 1, dtype=torch.bool, device=device)
    if first_draws is None:
        first_draws = [(first_episode + i) * DRAWS_PER_EPISODE for i in range(episodes)]
    counters = torch.tensor([*first_draws, 0], dtype=torch.int64, device=device)

    out = (response_ids, draws, lengths, stopped)
    wanted = sampling.max_new_tokens >= _PREPACK_FROM if prepack is None else prepack
    rows = min(max_rows, episodes)
    with prepacked(policy, rows, frozen=prepack is True) if wanted else nullcontext():
        if why_no_slots(policy) is None:
            _Slots(
                policy,
                prompts,
                sampling,
                num_generations=num_generations,
                seed=seed,
                first_draws=counters,
                max_rows=max_rows,
                pad_token_id=pad_token_id,
                stop_strings=stop_strings,
                logits_processor=logits_processor,
                cuda_graphs=cuda_graphs,
                out=out,
            ).run()
        else:
            for group in groups_by_length(
                [len(p) for p in prompts], max_rows=max(1, max_rows // num_generations)
            ):
                _generate_group(
                    policy,
                    [prompts[i] for i in group],
                    torch.tensor(
                        [i * num_generations + g for i in group for g in range(num_generations)],
                        device=device,
                    ),
                    sampling,
                    num_generations=num_generations,
                    seed=seed,
                    first_draws=counters,
                    pad_token_id=pad_token_id,
                    stop_strings=stop_strings,
                    logits_processor=logits_processor,
                    out=out,
                )

    response_ids, lengths, stopped = response_ids[:-1], lengths[:-1], stopped[:-1]
    draws = _Draws(draws.logprobs[:-1], draws.sampling_logprobs[:-1], draws.entropy[:-1])
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


@dataclass
class _Rows:
    """What the device knows of the rows that decode, in the order of the batch: each (B,), int64 but for `done`.

    Attributes:
        episodes: whose response this is.
        slots: where its keys and values are.
        lengths: tokens in its slot.
        steps: tokens drawn.
        ids: the token drawn last, of the prompt at first; not in the slot yet.
        done: has a stop been drawn?
        taken: 1; or 0 for an empty seat, which stays as it is.
    """

    episodes: Tensor
    slots: Tensor
    lengths: Tensor
    steps: Tensor
    ids: Tensor
    done: Tensor
    taken: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def __getitem__(self, which: Any) -> _Rows:
        return _Rows(*(x[which] for x in self.tensors()))

    def and_then(self, others: _Rows) -> _Rows:
        return _Rows(*(torch.cat(pair) for pair in zip(self.tensors(), others.tensors(), strict=True)))


class _Slots:
    """Continuous batching: rows decode in slots of one cache, each at its own length.

    A prompt's last token is not prefilled but decoded, as every later one: its logits give the first draw. So a
    prefill needs no logits, and a new row joins the others at once.
    """

    def __init__(
        self,
        policy: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_generations: int,
        seed: int,
        first_draws: Tensor,
        max_rows: int,
        pad_token_id: int,
        stop_strings: StopStringCriteria | None,
        logits_processor: Sequence[LogitsProcessor],
        cuda_graphs: bool,
        out: tuple[Tensor, _Draws, Tensor, Tensor],
    ) -> None:
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        self.generations, self.seed, self.first_draws = num_generations, seed, first_draws
        self.pad_token_id, self.stop_strings = pad_token_id, stop_strings
        self.response_ids, self.draws, self.response_lengths, self.stopped = out
        self.device = self.response_ids.device
        self.processors = LogitsProcessorList(logits_processor)
        self.penalty = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            if sampling.repetition_penalty != 1
            else None
        )
        self.stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self.device)
        self.check_every = 1 if self.device.type == "cpu" else _CHECK_EVERY
        self.cache_argument = cache_argument(policy)

        # Longest first, so that prompts of similar length are prefilled together and the longest rows do not come last.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        slots = num_generations * max(1, min(max_rows // num_generations, len(prompts)))
        self.free = list(range(slots))
        self.slot_count = slots
        longest = max(len(p) for p in prompts)
        self.limit = longest + sampling.max_new_tokens - 1  # the last token drawn is never fed back
        capacity = min(self.limit, longest - 1 + _FIRST_CAPACITY)
        self.cache = SlotCache(slots, capacity, windows(text_config(policy)))
        self.prefix = self._prefill_prefix()

        # Of the rows that decode, in the order of the batch. On the host: what it can know without asking the device.
        self.host: list[_Row] = []
        self.rows = self._empty(0)
        # A graph works on the same memory every time: a seat for every slot, the first ones taken.
        self.seats = self._empty(slots) if cuda_graphs else None
        self.graph: Graph | None = None
        # What each slot holds, prompt and response: for processors, penalties and stop strings.
        self.keeps_tokens = bool(self.processors) or self.penalty is not None or stop_strings is not None
        self.tokens = torch.zeros(
            (slots, self.limit + 1) if self.keeps_tokens else (0, 0), dtype=torch.int64, device=self.device
        )

    def run(self) -> None:
        while self.waiting or self.host:
            self._admit()
            with decoding(self.policy, self.cache):
                while self.host and not self._has_room():
                    self._step()
                    self._release()

    def _has_room(self) -> bool:
        """Should prompts be let in now?"""
        enough = max(self.generations, _ADMIT_SHARE * self.slot_count)
        return bool(self.waiting) and (len(self.free) >= enough or not self.host)

    def _empty(self, count: int) -> _Rows:
        """Rows that are none. What they draw goes past the last episode."""
        zeros = torch.zeros(count, dtype=torch.int64, device=self.device)
        return _Rows(
            episodes=torch.full_like(zeros, len(self.response_ids) - 1),
            slots=zeros,
            lengths=zeros.clone(),
            steps=zeros.clone(),
            ids=zeros.clone(),
            done=torch.ones_like(zeros, dtype=torch.bool),
            taken=zeros.clone(),
        )

    def _seat(self, rows: _Rows) -> None:
        """Let these rows be the batch."""
        self.rows = rows
        if self.seats is None:
            return
        count = len(rows.slots)
        empty = self._empty(self.slot_count - count)
        # As every row, an empty seat writes the token that it reads: into a slot of its own, at the first place.
        empty.slots = torch.tensor(self.free, dtype=torch.int64, device=self.device)
        for seat, x in zip(self.seats.tensors(), rows.and_then(empty).tensors(), strict=True):
            seat.copy_(x)
        self.rows = self.seats[:count]

    # Letting prompts in

    def _prefill_prefix(self) -> tuple[int, DynamicCache | None]:
        """Length and cache of what all prompts begin with, last tokens aside; (0, None) where that is too little."""
        first, last = (
            min(map(list, self.prompts)),
            max(map(list, self.prompts)),
        )  # by token ids: all lie between
        most = min(len(p) for p in self.prompts) - 1
        shared = next((i for i in range(most) if first[i] != last[i]), most)
        if len(self.prompts) == 1 or shared < _SHORTEST_PREFIX:
            return 0, None
        cache = DynamicCache()
        self._prefill([list(self.prompts[0][:shared])], cache)
        return shared, cache

    def _prefill(self, bodies: list[list[int]], cache: DynamicCache) -> None:
        """Run the policy, with its own attention, over what comes after the cache's tokens.

        Padding is on the right, where causal attention needs no mask; what it leaves in the cache is past each
        row's length and written over before it is read. All layers keep everything: a layer with a window would
        forget what the short rows still need.
        """
        width = max(len(b) for b in bodies)
        input_ids = torch.tensor(
            [b + [self.pad_token_id] * (width - len(b)) for b in bodies], device=self.device
        )
        self.policy(input_ids=input_ids, use_cache=True, logits_to_keep=1, **{self.cache_argument: cache})

    def _admit(self) -> None:
        """Prefill as many waiting prompts as there are slots, and let their rows join the batch."""
        count = len(self.free) // self.generations
        admitted, self.waiting = self.waiting[:count], self.waiting[count:]
        while admitted:
            longest = len(self.prompts[admitted[0]])
            similar = [i for i in admitted if longest - len(self.prompts[i]) <= max(_SIMILAR, longest // 4)]
            self._admit_similar(similar)
            admitted = admitted[len(similar) :]  # sorted by length

    def _admit_similar(self, numbers: list[int]) -> None:
        shared, prefix = self.prefix
        bodies = [list(self.prompts[i][shared:-1]) for i in numbers]
        slots = [self.free.pop() for _ in range(len(numbers) * self.generations)]
        new = [
            _Row(i * self.generations + g, len(self.prompts[i]))
            for i in numbers
            for g in range(self.generations)
        ]
        slot_ids = torch.tensor(slots, device=self.device)
        if shared or len(bodies[0]) > 0:
            cache = DynamicCache()
            if prefix is not None:
                for number, (keys, values, _) in enumerate(prefix):
                    keys, values = (x.expand(len(bodies), -1, -1, -1) for x in (keys, values))
                    cache.update(keys, values, number)
            if len(bodies[0]) > 0:
                self._prefill(bodies, cache)
            rows = torch.arange(len(numbers), device=self.device).repeat_interleave(self.generations)
            self.cache.store(cache, slot_ids, rows)
        episodes = torch.tensor([row.episode for row in new], device=self.device)
        lengths = torch.tensor([row.prompt - 1 for row in new], device=self.device)
        last = torch.tensor(
            [self.prompts[i][-1] for i in numbers for _ in range(self.generations)], device=self.device
        )
        if self.keeps_tokens:
            width = len(self.prompts[numbers[0]])
            self.tokens[slot_ids, :width] = torch.tensor(
                [
                    list(self.prompts[i]) + [0] * (width - len(self.prompts[i]))
                    for i in numbers
                    for _ in range(self.generations)
                ],
                device=self.device,
            )
        self.host += new
        for row, slot in zip(new, slots, strict=True):
            row.slot = slot
        none = torch.zeros_like(lengths)
        joining = _Rows(episodes, slot_ids, lengths, none, last, none.bool(), none + 1)
        self._seat(self.rows.and_then(joining))

    # One token for every row

    def _step(self) -> None:
        if self.cache.reserve(self._longest(), self.limit):
            self.graph = None  # the cache has moved
        if self.seats is None:
            self._advance(self.rows)
        else:
            if self.graph is None:
                self.graph = Graph(partial(self._advance, self.seats), self.seats.tensors())
            self.graph.replay()
        for row in self.host:
            row.step += 1

    def _longest(self) -> int:
        """Tokens that a row has at most, prompt and response."""
        return max(row.prompt + row.step for row in self.host)

    def _advance(self, rows: _Rows) -> None:
        """Draw a token for each row; all on the device, and every tensor that is kept in its place."""
        self.cache.slots, self.cache.lengths = rows.slots, rows.lengths
        logits = self.policy(
            input_ids=rows.ids[:, None],
            position_ids=rows.lengths[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: self.cache},
        ).logits[:, -1]
        logits = self._processed(logits, rows)
        draw = _draw(logits, self.sampling, self.seed, self.first_draws[rows.episodes] + rows.steps)
        # On CUDA an id of -1, with a log-prob of NaN, says that a row's logits are no distribution. The host hears of
        # it when it next waits for the device; until then the model needs an id.
        rows.ids.copy_(draw.token_ids.clamp_min(0))
        self.response_ids[rows.episodes, rows.steps] = rows.ids
        self.draws.logprobs[rows.episodes, rows.steps] = draw.logprobs
        self.draws.sampling_logprobs[rows.episodes, rows.steps] = draw.sampling_logprobs
        self.draws.entropy[rows.episodes, rows.steps] = draw.entropy
        rows.lengths += rows.taken
        rows.steps += rows.taken
        stops = torch.isin(rows.ids, self.stop_ids)
        if self.keeps_tokens:
            self.tokens[rows.slots, rows.lengths] = rows.ids
        if self.stop_strings is not None:
            hits = self.stop_strings(self._history(rows, self._longest() + 1), None)
            stops |= hits & (rows.steps >= self.sampling.min_new_tokens)
        stops &= ~rows.done
        self.response_lengths[rows.episodes] = torch.where(
            stops, rows.steps, self.response_lengths[rows.episodes]
        )
        self.stopped[rows.episodes] |= stops
        rows.done |= stops

    def _processed(self, logits: Tensor, rows: _Rows) -> Tensor:
        if self.penalty is not None:
            # It counts what a row holds; its own first token stands in for the padding.
            logits = self.penalty(self._history(rows, self._longest(), first_token=True), logits)
        if self.processors:
            logits = self.processors(self._history(rows, self._longest()), logits)  # type: ignore[arg-type]
        least = self.sampling.min_new_tokens
        if not least or not len(self.stop_ids):
            return logits
        # A graph is the same in every step; else the copy is left out once no row is that short.
        if self.seats is not None or min(row.step for row in self.host) < least:
            early = (rows.steps < least)[:, None]
            logits = logits.index_copy(
                1, self.stop_ids, logits[:, self.stop_ids].masked_fill(early, -torch.inf)
            )
        return logits

    def _history(self, rows: _Rows, width: int, first_token: bool = False) -> Tensor:
        """(B, width) ids of prompt and response so far, left-padded as `generate` has them."""
        # Between the draw and the next step, and before the first, a row holds one token more than its cache.
        held = rows.lengths + 1
        places = torch.arange(width, device=self.device) - (width - held)[:, None]
        ids = self.tokens[rows.slots].gather(1, places.clamp_min(0))
        return ids if first_token else ids.masked_fill(places < 0, self.pad_token_id)

    # Letting rows out

    def _release(self) -> None:
        """Take finished rows out of the batch. Where the host has to wait for the device to know, only now and then."""
        limit = self.sampling.max_new_tokens
        full = any(row.step == limit for row in self.host)
        if not full and self.host[0].step % self.check_every:
            return
        _check_drawn(self.draws.logprobs, self.rows.episodes, self.first_draws)
        stopped = self.rows.done.tolist()
        kept = [i for i, row in enumerate(self.host) if not stopped[i] and row.step < limit]
        if len(kept) == len(self.host):
            return
        self.free += [row.slot for i, row in enumerate(self.host) if stopped[i] or row.step == limit]
        self.host = [self.host[i] for i in kept]
        self._seat(self.rows[torch.tensor(kept, dtype=torch.int64, device=self.device)])


@dataclass
class _Row:
    """What the host knows of a row: its episode, tokens of its prompt, slot, tokens drawn."""

    episode: int
    prompt: int
    slot: int = 0
    step: int = 0


def _generate_group(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    episodes: Tensor,
    sampling: Sampling,
    *,
    num_generations: int,
    seed: int,
    first_draws: Tensor,
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
    argument, use_positions = cache_argument(policy), accepts(policy, "position_ids")

    def forward(ids: Tensor, position_ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"attention_mask": attention.long()} if padded else {}
        if use_positions:
            inputs["position_ids"] = position_ids
        # Every policy of this function keeps a cache and takes logits_to_keep; both are checked by the trainer.
        inputs[argument] = cache
        output = policy(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs)
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
        draw = _draw(logits, sampling, seed, first_draws[rows] + t)
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
            _check_drawn(draws.logprobs, rows, first_draws)
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
    _check_drawn(draws.logprobs, episodes, first_draws)


def _draw(logits: Tensor, sampling: Sampling, seed: int, counters: Tensor) -> ops.Sample:
    """A token for each row, by the draw that belongs to its episode and response position."""
    return ops.sample(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=seed,
        counters=counters,
    )


def _check_drawn(logprobs: Tensor, rows: Tensor, first_draws: Tensor) -> None:
    """Raise where `ops.sample` had no distribution to draw from and could not raise itself. Waits for the device."""
    bad = logprobs[rows].isnan()
    if bad.any():
        row, position = bad.nonzero().tolist()[0]
        episode, position = divmod(int(first_draws[rows[row]]) + position, DRAWS_PER_EPISODE)
        raise ValueError(
            f"sample: the logits of episode {episode} at response position {position} "
            "hold NaN or +inf, or are -inf everywhere"
        )


def check_can_be_captured(
    policy: nn.Module, sampling: Sampling, logits_processor: Sequence[LogitsProcessor]
) -> None:
    """Raise a ValueError where a decode step of this policy cannot be a CUDA graph."""
    if sampling.repetition_penalty != 1 or sampling.stop_strings or logits_processor:
        raise ValueError(
            "rollout: cuda_graphs cannot hold a repetition_penalty, stop_strings or logits_processor, which look at "
            "all tokens so far, more at every step"
        )
    reason = why_no_slots(policy)
    if reason is not None:
        raise ValueError(f"rollout: cuda_graphs needs a policy that decodes on a cache of slots: {reason}")


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
