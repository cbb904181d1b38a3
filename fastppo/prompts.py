"""Prompts from dataset rows: token ids, the prompt as the dataset had it, and the other columns for the rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass
class Prompts:
    """Some prompts.

    Attributes:
        ids: lists of token ids without padding.
        given: text or chat messages as in the dataset; decoded text where the dataset holds `input_ids`.
        columns: the dataset's other columns.
    """

    ids: list[list[int]]
    given: list[Any]
    columns: dict[str, list[Any]]


_OWN_COLUMNS = {
    "input_ids",
    "attention_mask",
    "prompt",
    "completion",
    "completions",
    "completion_ids",
    "prompts",
}


def check_dataset(dataset: Any, name: str) -> None:
    """Raise a ValueError unless the dataset has rows with a column that prompts can be read from."""
    columns = _columns(dataset, name)
    if not {"input_ids", "prompt"} & columns:
        raise ValueError(
            f"{name}: expected a column `prompt` (text or chat messages) or `input_ids`, got columns {sorted(columns)}"
        )


def check_texts(dataset: Any, name: str) -> None:
    """Raise a ValueError unless the dataset has rows with a column that whole texts can be read from."""
    columns = _columns(dataset, name)
    if not {"input_ids", "text", "messages"} & columns:
        raise ValueError(
            f"{name}: expected a column `text`, `messages` (a chat) or `input_ids`, got columns {sorted(columns)}"
        )


def _columns(dataset: Any, name: str) -> set[str]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} must have a length and rows by number (datasets.Dataset, a list), got {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} must have at least one row, got none")
    row = dataset[0]
    if not isinstance(row, Mapping):
        raise TypeError(f"{name}: expected rows that are mappings, got {type(row).__name__}")
    return set(row)


def is_chat(prompt: Any) -> bool:
    """Is this a list of messages with role and content?"""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt)
    )


def read_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_collator: Callable[[Any], Any] | None = None,
    max_length: int | None = None,
) -> Prompts:
    """Tokenise the prompts of some dataset rows.

    `input_ids` are taken as they are; a chat goes through the tokenizer's chat template with a generation prompt;
    text is tokenised. A `data_collator` (as TRL scripts pass) sees only `input_ids` and `attention_mask`; the padding
    it adds is taken off by its attention mask.

    Raises:
        ValueError, TypeError: a row has no usable prompt; the message names the row.
    """
    if data_collator is not None and "input_ids" in rows[0]:
        keep = [{k: r[k] for k in ("input_ids", "attention_mask") if k in r} for r in rows]
        batch = data_collator(keep)
        if "attention_mask" not in batch:
            raise ValueError(f"data_collator must return input_ids and attention_mask, got {sorted(batch)}")
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    else:
        ids = [_token_ids(row, i, tokenizer) for i, row in enumerate(rows)]
    if max_length is not None:
        ids = [x[-max_length:] for x in ids]
    given = [
        row["prompt"] if "prompt" in row else tokenizer.decode(x, skip_special_tokens=True)
        for row, x in zip(rows, ids, strict=True)
    ]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in _OWN_COLUMNS}
    return Prompts(ids, given, columns)


def _token_ids(row: Mapping[str, Any], i: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: Any
    if "input_ids" in row:
        ids = torch.as_tensor(row["input_ids"])
        if "attention_mask" in row:
            ids = ids[torch.as_tensor(row["attention_mask"]).bool()]
        ids = ids.tolist()
    elif isinstance(row["prompt"], str):
        ids = tokenizer(row["prompt"])["input_ids"]
    elif is_chat(row["prompt"]):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"prompt {i} is a chat, but the tokenizer {type(tokenizer).__name__} has no chat_template"
            )
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    else:
        raise TypeError(
            f"prompt {i} must be text or a list of chat messages with role and content, got {row['prompt']!r}"
        )
    if not ids:
        raise ValueError(f"prompt {i} must have at least one token, got none from {dict(row)!r}")
    return [int(x) for x in ids]


def read_texts(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Token ids of whole texts, the first `max_length` of each.

    `input_ids` are taken as they are; `messages` go through the tokenizer's chat template; `text` is tokenised.

    Raises:
        ValueError, TypeError: a row has no text of two tokens, one to be learnt from the other.
    """
    texts: list[list[int]] = []
    for row in rows:
        column = next(name for name in ("input_ids", "messages", "text") if name in row)
        ids: Any = row[column]
        if column == "messages":
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(
                    f"ptx_dataset has a chat, but the tokenizer {type(tokenizer).__name__} has no chat_template"
                )
            ids = tokenizer.apply_chat_template(ids, return_dict=False)
        elif column == "text":
            ids = tokenizer(ids)["input_ids"]
        texts.append([int(i) for i in ids][:max_length])
        if len(texts[-1]) < 2:
            raise ValueError(f"ptx_dataset: a text must have at least two tokens, got {dict(row)!r}")
    return texts


class PromptOrder(torch.utils.data.Sampler[int]):
    """Row numbers without end: each epoch in an order of its own, drawn from (seed, epoch).

    Position k of the stream depends on nothing but the seed, so a resumed run starts at any position. Ranks take
    alternating blocks of `block` prompts.
    """

    def __init__(
        self, length: int, seed: int, *, start: int = 0, block: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:
        self.length, self.seed, self.start, self.block = length, seed, start, block
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        position = self.start
        while True:
            if (position // self.block) % self.ranks == self.rank:
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(
                        self.length, generator=torch.Generator().manual_seed(self.seed + epoch)
                    )
                yield int(order[position % self.length])
            position += 1
