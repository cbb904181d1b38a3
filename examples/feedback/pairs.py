"""Preference pairs out of stored feedback, as JSON lines in TRL's format: `prompt`, `chosen`, `rejected`, each a list
of chat messages.

A rewrite is chosen against the answer it replaces. An answer that was liked is chosen against each answer to the same
prompt that was disliked; where raters disagree on an answer, the majority counts, and a draw says nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from examples.feedback.store import Store, canonical, current_ratings

Pair = dict[str, list[dict[str, str]]]


def preference_pairs(store: Store) -> list[Pair]:
    """All pairs that the feedback holds, in a fixed order.

    Raises:
        ValueError: there is none; the message says what is stored and what is missing.
    """
    entries = store.entries()
    votes: Counter[tuple[str, str]] = Counter()
    for prompt, answer, rating in current_ratings(entries):
        votes[prompt, answer] += rating
    liked: dict[str, list[str]] = defaultdict(list)
    disliked: dict[str, list[str]] = defaultdict(list)
    for (prompt, answer), balance in votes.items():
        if balance:
            (liked if balance > 0 else disliked)[prompt].append(answer)

    found: dict[tuple[str, str, str], None] = {}  # a set that keeps its order
    for entry in entries:
        if entry.rewrite is not None:
            found[canonical(entry.prompt), entry.rewrite, entry.answer] = None
    for prompt, answers in liked.items():
        for chosen in answers:
            for rejected in disliked.get(prompt, ()):
                found[prompt, chosen, rejected] = None
    if not found:
        said = store.counts()
        raise ValueError(
            f"{store.path} holds no preference pair: {said['likes']} likes, {said['dislikes']} dislikes and "
            f"{said['rewrites']} rewrites. A pair is a liked and a disliked answer to the same prompt (ask again for a "
            "second answer), or a rewrite"
        )
    return [_pair(*texts) for texts in found]


def export(store: Store, path: str | Path) -> list[Pair]:
    """Write the pairs to `path`, whole or not at all, and return them.

    Raises:
        ValueError: there is no pair; `path` is left as it is.
    """
    pairs = preference_pairs(store)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            for pair in pairs:
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return pairs


def _pair(prompt: str, chosen: str, rejected: str) -> Pair:
    def answer(text: str) -> Any:
        return [{"role": "assistant", "content": text}]

    return {"prompt": json.loads(prompt), "chosen": answer(chosen), "rejected": answer(rejected)}
