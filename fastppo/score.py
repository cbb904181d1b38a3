"""Scores of responses (one number each), and what the models say of their tokens.

Rewards come from Python callables, Hugging Face sequence classifiers, HTTP servers, or a weighted list of these. A
reward that raises, hangs, or returns the wrong count, None, NaN or inf is an error that names the reward and the
prompt: nothing is silently zero.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .attention import why_not_packed
from .batch import MicroBatch, Rollout, groups_by_length
from .models import classifier_trunk, hidden_states, score_layer, unwrap_peft, visiting
from .packing import groups_to_pack, pack

RewardFunction = Callable[..., Any]


@dataclass
class Episodes:
    """What a reward sees of B episodes.

    Attributes:
        prompts: B prompts as the dataset had them: text, or a list of chat messages.
        completions: B responses: text, or `[{"role": "assistant", "content": text}]` where the prompt is a chat.
        completion_ids: B lists of response token ids.
        prompt_ids: B lists of prompt token ids.
        columns: the dataset's other columns, B values each.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> Episodes:
        """Some of the episodes, by number."""
        return Episodes(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            [self.completion_ids[i] for i in rows],
            [self.prompt_ids[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
        )


@dataclass
class Reward:
    """One weighted source of scores: `function(episodes)` gives B numbers."""

    name: str
    weight: float
    function: Callable[[Episodes], Any]


def make_rewards(
    reward_model: Any,
    weights: Sequence[float] | None = None,
    processing_classes: Any = None,
    *,
    timeout: float | None = None,
    max_rows: int = 64,
    padding_free: bool = True,
) -> list[Reward]:
    """Turn `PPOTrainer`'s `reward_model` into weighted rewards.

    Args:
        reward_model: a callable `fn(prompts, completions, completion_ids, **columns) -> list[float]`, sync or async
            (TRL's GRPO signature); a sequence classifier; the URL of a reward server; or a list of these.
        weights: one per reward, default 1 each.
        processing_classes: tokenizers of the classifiers (one, or a list like `reward_model` with None where there is
            none). None: the classifier shares the policy's tokenizer and is fed token ids.
        timeout: seconds a callable or server may take for one batch.
        max_rows: most episodes in one forward pass of a classifier; packed, as many tokens as that many of the longest.
        padding_free: pack what a decoder reads, where its attention can (`attention.why_not_packed`).

    Raises:
        TypeError, ValueError: not one of these, or the counts differ.
    """
    sources = list(reward_model) if isinstance(reward_model, (list, tuple)) else [reward_model]
    if not sources:
        raise ValueError("reward_model: expected at least one reward, got an empty list")
    if not isinstance(processing_classes, (list, tuple)):
        processing_classes = [processing_classes] * len(sources)
    if len(processing_classes) != len(sources):
        raise ValueError(
            f"reward_processing_classes must have one entry per reward ({len(sources)}), got {len(processing_classes)}"
        )
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources):
        raise ValueError(
            f"reward_weights must have one number per reward ({len(sources)}), got {len(weights)}"
        )
    rewards: list[Reward] = []
    for source, weight, tokenizer in zip(sources, weights, processing_classes, strict=True):
        function: Callable[[Episodes], Any]
        if isinstance(source, nn.Module):
            name, function = (
                type(unwrap_peft(source)).__name__,
                ClassifierReward(source, tokenizer, max_rows, padding_free),
            )
        elif isinstance(source, str) and source.startswith(("http://", "https://")):
            name, function = source, _Called(source, HttpReward(source, timeout), timeout)
        elif callable(source):
            name = getattr(source, "__name__", type(source).__name__)
            function = _Called(name, source, timeout)
        else:
            raise TypeError(
                "reward_model: expected a callable, a sequence classifier, an http(s) URL, or a list of these, "
                f"got {type(source).__name__}"
            )
        taken = [r.name for r in rewards]
        rewards.append(
            Reward(name if name not in taken else f"{name}_{len(rewards)}", float(weight), function)
        )
    return rewards


def score(
    rewards: Sequence[Reward], episodes: Episodes, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the rewards, and each of them: (B,) float32 tensors.

    Raises:
        RuntimeError: a reward raised or took too long.
        ValueError: a reward gave the wrong count, or something that is not a finite number.
    """
    each: dict[str, Tensor] = {}
    for reward in rewards:
        values = _numbers(reward.name, reward.function(episodes), episodes)
        each[reward.name] = torch.tensor(values, dtype=torch.float32, device=device)
    total = torch.zeros(len(episodes), dtype=torch.float32, device=device)
    for reward in rewards:
        total += reward.weight * each[reward.name]
    return total, each


def token_scores(
    evaluate: Callable[[MicroBatch], Sequence[Tensor | None]],
    batches: Iterator[MicroBatch],
    rollout: Rollout,
) -> list[Tensor | None]:
    """Spread what `evaluate` says of packed tokens over (B, T) float32 tensors, 0 where no token counts. What it leaves
    out (None) stays None.
    """
    spread: list[Tensor | None] = []
    for batch in batches:
        results = evaluate(batch)
        if not spread:
            size, device = rollout.response_ids.numel(), batch.tokens.device
            spread = [None if x is None else torch.zeros(size, device=device) for x in results]
        for whole, part in zip(spread, results, strict=True):
            if whole is not None and part is not None:
                whole[batch.tokens] = part.detach().float()
    return [None if x is None else x.view_as(rollout.response_ids) for x in spread]


def classifier_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], completions: Sequence[Any]
) -> list[str]:
    """What a classifier with a tokenizer of its own reads of each episode.

    Texts are joined; a chat goes through the tokenizer's chat template, or, where it has none, is one turn a line.
    """
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            texts.append(prompt + completion)
        elif getattr(tokenizer, "chat_template", None):
            texts.append(str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)))
        else:
            texts.append("\n".join(str(m["content"]) for m in [*prompt, *completion]))
    return texts


def classifier_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None
) -> list[list[int]]:
    """Token ids of the texts, at most `max_length` of each, with the tokenizer's special tokens.

    A chat template writes the beginning-of-sequence token into its text; a tokenizer that adds its own would make two.
    """
    ids = tokenizer(list(texts), truncation=max_length is not None, max_length=max_length)["input_ids"]
    bos = tokenizer.bos_token_id
    return [x[1:] if bos is not None and x[:2] == [bos, bos] else x for x in ids]


class ClassifierReward:
    """Scores from a sequence classifier with one output.

    A decoder is read at the last token of prompt + response, found by length rather than by comparing with a padding
    id. An encoder is called as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        max_rows: int,
        padding_free: bool = True,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.padding_free = padding_free
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.device: torch.device | None = None
        self.is_decoder = hasattr(unwrap_peft(model), "score")
        if self.is_decoder:
            score_layer(model)
        else:
            labels = getattr(unwrap_peft(model).config, "num_labels", None)
            if labels != 1:
                raise ValueError(
                    f"reward_model: {type(model).__name__} must give 1 number per text (num_labels=1), got {labels}"
                )

    def place(self, device: torch.device, *, offload: bool) -> None:
        """Put the classifier on `device`, or into host memory, from where it visits `device` for each call."""
        self.device = device
        self.model.to("cpu" if offload else device)

    def token_ids(self, episodes: Episodes) -> list[list[int]]:
        """What the classifier reads: the policy's ids, or the texts in its own tokenizer's."""
        if self.tokenizer is None:
            return [p + c for p, c in zip(episodes.prompt_ids, episodes.completion_ids, strict=True)]
        texts = classifier_texts(self.tokenizer, episodes.prompts, episodes.completions)
        limit = getattr(unwrap_peft(self.model).config, "max_position_embeddings", None)
        return classifier_ids(self.tokenizer, texts, limit)

    @torch.no_grad()
    def __call__(self, episodes: Episodes) -> list[float]:
        device = self.device or next(self.model.parameters()).device
        with visiting(self.model, device):
            return self._scores(self.token_ids(episodes), device)

    def _scores(self, sequences: list[list[int]], device: torch.device) -> list[float]:
        trunk = classifier_trunk(self.model) if self.is_decoder else None
        packed = trunk is not None and self.padding_free and why_not_packed(trunk) is None
        lengths = [len(s) for s in sequences]
        groups = (
            groups_to_pack(sequences, self.max_rows * max(lengths))
            if packed
            else groups_by_length(lengths, max_rows=self.max_rows)
        )
        scores = [0.0] * len(sequences)
        for group in groups:
            members = [sequences[i] for i in group]
            if trunk is None:
                out = self._encoded(members, device)
            else:
                layer = score_layer(self.model)
                last = self._last_states(trunk, members, packed, device)
                out = layer(last.to(layer.weight.dtype)).squeeze(-1)
            for i, value in zip(group, out.float().tolist(), strict=True):
                scores[i] = value
        return scores

    def _last_states(
        self, trunk: nn.Module, sequences: list[list[int]], packed: bool, device: torch.device
    ) -> Tensor:
        if packed:
            packing = pack(sequences).to(device)
            last = torch.stack([places[-1] for places in packing.places])
            return hidden_states(trunk, packing.input_ids, packing)[0, last.to(device)]
        ids, lengths = self._padded(sequences, device)
        rows = torch.arange(len(sequences), device=device)
        return hidden_states(trunk, ids)[rows, lengths - 1]

    def _encoded(self, sequences: list[list[int]], device: torch.device) -> Tensor:
        ids, lengths = self._padded(sequences, device)
        attention = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        return self.model(input_ids=ids, attention_mask=attention).logits.squeeze(-1)

    def _padded(self, sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids, longest sequence first, and lengths."""
        longest = len(sequences[0])
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences], device=device)
        return ids, torch.tensor([len(s) for s in sequences], device=device)


class HttpReward:
    """Scores from a server: POST {"prompts", "completions", "completion_ids", columns...} → {"scores": [...]}."""

    def __init__(self, url: str, timeout: float | None) -> None:
        self.url = url
        self.timeout = timeout

    def __call__(self, environments: Any = None, **columns: Any) -> Any:  # those stay here
        request = urllib.request.Request(
            self.url, data=json.dumps(columns).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict) or "scores" not in answer:
            raise ValueError('the server must answer {"scores": [...]}, got ' + repr(answer)[:200])
        return answer["scores"]


class _Called:
    """A Python reward: called with TRL's GRPO signature, awaited if it is async, under a time limit."""

    def __init__(self, name: str, function: RewardFunction, timeout: float | None) -> None:
        self.name = name
        self.function = function
        self.timeout = timeout

    def _call(self, episodes: Episodes) -> Any:
        result = self.function(
            prompts=episodes.prompts,
            completions=episodes.completions,
            completion_ids=episodes.completion_ids,
            **episodes.columns,
        )
        return asyncio.run(_resolve(result)) if inspect.isawaitable(result) else result

    def __call__(self, episodes: Episodes) -> Any:
        answer = in_thread(lambda: self._call(episodes))
        try:
            error = answer.exception(self.timeout)
        except futures.TimeoutError:
            raise RuntimeError(
                f"reward {self.name} gave no answer within reward_timeout = {self.timeout} s for {len(episodes)} "
                f"episodes; the first prompt: {excerpt(episodes.prompts[0])}"
            ) from None
        if error is not None:
            raise RuntimeError(
                f"reward {self.name} raised {type(error).__name__}: {error}; {self._blame(episodes)}"
            ) from error
        return answer.result()

    def _blame(self, episodes: Episodes) -> str:
        """Which episode is it? Training is over anyway, so ask one at a time."""
        if len(episodes) > 1 and not isinstance(self.function, HttpReward):
            for i in range(len(episodes)):
                try:
                    self._call(episodes.take([i]))
                except Exception:
                    return _episode(episodes, i)
            return f"only for the whole batch of {len(episodes)}, not for any episode alone"
        return _episode(episodes, 0)


async def _resolve(awaitable: Any) -> Any:
    return await awaitable


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """What `call` will give, from a thread of its own: an event loop may already run here (notebooks), and what hangs
    can be left behind.
    """
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _numbers(name: str, values: Any, episodes: Episodes) -> list[float]:
    if isinstance(values, Tensor):
        values = values.detach().flatten().tolist()
    if values is None or isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise ValueError(
            f"reward {name} must return a list of {len(episodes)} numbers, got {type(values).__name__}; "
            f"the first prompt: {excerpt(episodes.prompts[0])}"
        )
    values = list(values)
    if len(values) != len(episodes):
        raise ValueError(
            f"reward {name} must return one number per episode ({len(episodes)}), got {len(values)}"
        )
    for i, value in enumerate(values):
        try:
            values[i] = float(value)
        except (TypeError, ValueError):
            values[i] = math.nan
        if not math.isfinite(values[i]):
            raise ValueError(
                f"reward {name} must return finite numbers, got {value!r} for {_episode(episodes, i)}"
            )
    return values


def _episode(episodes: Episodes, i: int) -> str:
    return (
        f"episode {i}: prompt {excerpt(episodes.prompts[i])}, completion {excerpt(episodes.completions[i])}"
    )


def excerpt(value: Any, most: int = 200) -> str:
    """What an error message says of a value that may be long."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"
