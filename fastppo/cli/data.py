"""Datasets of the commands: a file, a folder or a named set, checked before any model is loaded.

A message names file, column, row, what was expected and what came. Rows are counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..prompts import is_chat
from . import UsageError, need
from .arguments import closest

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Name → function(split) of `human_feedback`.
NAMED = {
    "chat-dialogues": "sft_dialogues",
    "chat-openings": "openings",
    "chat-preferences": "chat_preferences",
    "rated-snippets": "rated_snippets",
}


def load_data(name_or_path: str, split: str = "train", *, most: int | None = None) -> Any:
    """A `datasets.Dataset`.

    Args:
        name_or_path: JSON, JSON lines, CSV or Parquet file; a folder that `datasets` can read; or one of the named
            sets of human feedback ("chat-dialogues", "chat-openings", "chat-preferences", "rated-snippets").
        split: of a folder or a named set; a single file has but one.
        most: keep the first rows only.

    Raises:
        UsageError: there is no such data, or they cannot be read, or they are empty.
    """
    datasets = need("datasets")
    path = Path(name_or_path)
    if name_or_path in NAMED:
        from . import human_feedback

        rows = getattr(human_feedback, NAMED[name_or_path])(split)
    elif path.is_file():
        rows = _read_file(datasets, path)
    elif path.is_dir():
        rows = _read_folder(datasets, path, split)
    else:
        raise UsageError(
            f"{name_or_path}: no such file or folder, and no named set{closest(name_or_path, NAMED)} "
            f"(named sets: {', '.join(NAMED)})"
        )
    if len(rows) == 0:
        raise UsageError(f"{name_or_path}: expected at least one row, got none")
    return rows if most is None else rows.select(range(min(most, len(rows))))


def _read_file(datasets: Any, path: Path) -> Any:
    if path.suffix not in READERS:
        raise UsageError(f"{path}: expected one of {', '.join(READERS)}, got {path.suffix or 'no ending'!r}")
    if not path.read_bytes().strip():
        raise UsageError(f"{path}: expected at least one row, got an empty file")
    try:
        return datasets.load_dataset(
            READERS[path.suffix], data_files=str(path), split="train", keep_in_memory=True
        )
    except Exception as error:  # each reader has errors of its own
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):
            raise UsageError(f"{path}: expected at least one row, got none") from error
        raise UsageError(f"{path}: cannot be read as {READERS[path.suffix]}: {cause}") from error


def _read_folder(datasets: Any, path: Path, split: str) -> Any:
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:
        raise UsageError(f"{path}: cannot be read as a dataset: {error}") from error
    if isinstance(found, Mapping):
        if split not in found:
            raise UsageError(f"{path}: no split {split!r}{closest(split, found)}, got {', '.join(found)}")
        return found[split]
    return found


# --- what the columns must hold ----------------------------------------------------------------------------------


def check_columns(rows: Any, name: str, *choices: tuple[str, ...]) -> tuple[str, ...]:
    """The first of the `choices` all of whose columns are there.

    Raises:
        UsageError: none is.
    """
    there = set(rows.column_names)
    for columns in choices:
        if set(columns) <= there:
            return columns
    expected = ", or ".join(" and ".join(f"`{c}`" for c in columns) for columns in choices)
    missing = [c for c in choices[0] if c not in there]
    raise UsageError(
        f"{name}: expected the column{'s' if len(choices[0]) > 1 or len(choices) > 1 else ''} {expected}, "
        f"got {sorted(there)}{closest(missing[0], there)}"
    )


def check_dialogues(rows: Any, name: str) -> str:
    """Texts to learn from: the column that holds them, `messages` or `text` or `prompt` (with `completion`)."""
    column = check_columns(rows, name, ("messages",), ("text",), ("prompt", "completion"))[0]
    if column == "messages":
        _each(rows, name, column, lambda x: is_chat(x) and len(x) > 1, "a chat of at least two messages")
    elif column == "text":
        _each(rows, name, column, _is_text, "a text")
    else:
        for part in ("prompt", "completion"):
            _each(rows, name, part, _is_text_or_chat, "a text or a chat")
    return column


def check_prompts(rows: Any, name: str) -> None:
    """Prompts to answer: `prompt`, a text or a chat."""
    check_columns(rows, name, ("prompt",))
    _each(rows, name, "prompt", _is_text_or_chat, "a text or a list of messages with role and content")


def check_prompt_lengths(
    rows: Any, name: str, tokenizer: Any, context: int | None, response_length: int
) -> int:
    """Tokens of the longest prompt, which must leave room for a response in the model's context."""
    from ..prompts import read_prompts

    longest = 0
    for i, ids in enumerate(read_prompts(list(rows), tokenizer).ids):
        longest = max(longest, len(ids))
        if context is not None and len(ids) + response_length > context:
            raise UsageError(
                f"{name}, column `prompt`, row {i}: expected at most {context - response_length} tokens (the model's "
                f"context {context} less response_length {response_length}), got {len(ids)}; shorten it, or set "
                "max_prompt_length to keep its last tokens"
            )
    return longest


def check_preferences(rows: Any, name: str) -> Any:
    """Pairs without the ties, which teach nothing.

    Raises:
        UsageError: a cell is neither text nor chat, or every pair is a tie: preferences of one class.
    """
    check_columns(rows, name, ("chosen", "rejected"))
    for column in ("prompt", "chosen", "rejected"):
        if column in rows.column_names:
            _each(rows, name, column, _is_text_or_chat, "a text or a chat")
    different = [
        i
        for i, (a, b) in enumerate(zip(rows["chosen"], rows["rejected"], strict=True))
        if _plain(a) != _plain(b)
    ]
    if not different:
        raise UsageError(
            f"{name}: preferences of one class: expected rows whose `chosen` and `rejected` differ, got "
            f"{len(rows)} rows in all of which they are equal"
        )
    return rows if len(different) == len(rows) else rows.select(different)


def check_ratings(rows: Any, name: str, lowest: float | None, highest: float | None) -> None:
    """Texts with a `rating` each: finite, in range, and not all the same."""
    check_columns(rows, name, ("text", "rating"))
    _each(rows, name, "text", _is_text, "a text")
    low = -math.inf if lowest is None else lowest
    high = math.inf if highest is None else highest

    def is_rating(x: Any) -> bool:
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        return is_number and low <= x <= high

    if lowest is not None and highest is not None:
        between = f"a number between {lowest:g} and {highest:g}"
    elif lowest is not None or highest is not None:
        between = f"a number of at {'least' if highest is None else 'most'} {lowest if highest is None else highest:g}"
    else:
        between = "a finite number"
    _each(rows, name, "rating", is_rating, between)
    if len(set(rows["rating"])) == 1:
        raise UsageError(
            f"{name}: preferences of one class: expected different values in column `rating`, got {rows['rating'][0]} "
            f"in all {len(rows)} rows"
        )


def _each(rows: Any, name: str, column: str, ok: Callable[[Any], bool], expected: str) -> None:
    for i, value in enumerate(rows[column]):
        if not ok(value):
            came = repr(value)
            came = came if len(came) <= 80 else came[:77] + "..."
            raise UsageError(f"{name}, column `{column}`, row {i}: expected {expected}, got {came}")


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _is_text_or_chat(x: Any) -> bool:
    return _is_text(x) or (is_chat(x) and all(isinstance(m["content"], str) for m in x))


def _plain(x: Any) -> str:
    return x if isinstance(x, str) else "\n".join(str(m["content"]) for m in x)


def whole_texts(rows: Any) -> list[Any]:
    """Texts or chats of rows that `check_dialogues` has passed; prompt and completion joined."""
    for column in ("messages", "text"):
        if column in rows.column_names:
            return list(rows[column])
    return [p + c for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
