"""Opening messages of the Chit Chat Challenge (7,168 human-human chats, MIT licence), split once and for all.

An opening is everything the first speaker wrote before the other answered. The split hashes the message's
bare words: "Hi there!" and "hi there" fall on the same side, and the held-out side is the same on every
machine and with every seed.
"""

from __future__ import annotations

import hashlib

from examples.warm_replies import need
from fastppo.cli import human_feedback
from fastppo.cli.human_feedback import bare_words


def read_openings() -> list[str]:
    """Distinct openings of 4 to 15 words, in the order of the data set: 2,398 of them."""
    need("chitchat_dataset", "chitchat-dataset")
    return human_feedback.read_openings()


def split(openings: list[str], held_out: int) -> tuple[list[str], list[str]]:
    """(train, held_out): no two of the `held_out` openings are alike, and none is like a training opening."""
    groups: dict[str, list[str]] = {}
    for opening in openings:
        groups.setdefault(bare_words(opening), []).append(opening)
    if not 0 < held_out < len(groups):
        raise ValueError(f"held_out must lie in 1..{len(groups) - 1} (distinct openings), got {held_out}")
    shuffled = sorted(groups, key=lambda words: hashlib.sha256(words.encode()).digest())
    return (
        [opening for words in shuffled[held_out:] for opening in groups[words]],
        [groups[words][0] for words in shuffled[:held_out]],
    )
