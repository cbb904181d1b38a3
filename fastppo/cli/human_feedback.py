"""What people wrote and how people rated it: the data of the human-feedback pipeline, out of PyPI packages.

chitchat-dataset    7,168 chats of two strangers who were given one of 34 starter questions (MIT licence). 5,988 carry
                    witty / upbeat / interesting ratings, 1 to 10; 2,920 of them are the form's default, three fives.
vaderSentiment      the sdist, not the wheel: 10,605 sentences of movie reviews, each with the mean of the sentiment
                    ratings of 15 to 29 people, -4 to 4 (Hutto & Gilbert, ICWSM 2014; MIT licence).

Every set has the splits train (70 %), validation (10 %) and test (20 %). Sides are taken from a hash, so they are the
same on every machine, and rows come in the order of a hash, so the first n are a fair sample. All chats that open with
the same words lie on one side, the same in every set that is made of chats; so does a sentence of a review. (Which
review a sentence came from is not published.)
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import UsageError, need

SPLITS = ("train", "validation", "test")
MIN_WORDS, MAX_WORDS = 4, 15  # of an opening
SCALES = ("interesting", "upbeat", "witty")
DEFAULT_RATING = 5  # what the form holds before anybody touches it


@dataclass(frozen=True)
class Chat:
    """A chat, as turns of two speakers who alternate.

    Attributes:
        turns: what each said; the messages that one speaker sent in a row are one turn.
        starter: the question both were shown; "" where there was none.
        rating: mean of the three ratings, 1 to 10; None where nobody rated, or left all at the default.
    """

    name: str
    turns: tuple[str, ...]
    starter: str
    rating: float | None

    @property
    def side(self) -> str:
        """The split this chat belongs to: by its opening, and where that is but a greeting, by the answer too."""
        greeted = len(self.turns[0].split()) < MIN_WORDS
        return side_of(bare_words(" ".join(self.turns[: 2 if greeted else 1])))


# --- the sets ----------------------------------------------------------------------------------------------------


def sft_dialogues(split: str) -> Any:
    """Whole chats in which both spoke, for supervised fine-tuning.

    Args:
        split: "train", "validation" or "test".

    Returns:
        A `datasets.Dataset` with the column `messages`: the first speaker is the user, the second the assistant, who
        has the last word.

    Raises:
        UsageError: there is no such split, or a package is missing.
    """
    return _dataset(
        {"messages": as_messages(chat.turns[: len(chat.turns) // 2 * 2])}
        for chat in _chats_of(split)
        if len(chat.turns) > 1
    )


def openings(split: str) -> Any:
    """First turns of 4 to 15 words, no two alike but for case and punctuation, as prompts for PPO.

    Returns:
        A `datasets.Dataset` with the column `prompt`, a chat of one message.
    """
    distinct = {bare_words(text): text for text in _openings(reversed(_chats_of(split)))}
    return _dataset({"prompt": as_messages([text])} for text in reversed(distinct.values()))


def chat_preferences(
    split: str,
    *,
    margin: float = 3.0,
    length_band: float = 0.25,
    chat_band: float | None = None,
    excerpts: int = 4,
    partners: int = 2,
    max_words: int = 80,
) -> Any:
    """Pairs of excerpts of two chats on the same starter question, one of which people rated higher.

    An excerpt is what PPO will ask the reward model about: a turn and the answer to it, or two of each. People rated
    the whole chat, so each excerpt inherits its rating. Long chats are rated higher: without bands on the length a
    word count would win most pairs.

    Args:
        split: "train", "validation" or "test".
        margin: least difference of the chats' mean ratings (1 to 10).
        length_band: most difference in words between the two excerpts, as a share of the longer one; they have equally
            many turns.
        chat_band: the same for the number of turns of the whole chats; None: no such band.
        excerpts: most excerpts per chat, half of them of two turns and half of four.
        partners: most pairs in which one excerpt is the chosen one.
        max_words: longest excerpt.

    Returns:
        A `datasets.Dataset` with `chosen` and `rejected` (chats), `starter`, `chosen_rating`, `rejected_rating`,
        `chosen_turns` and `rejected_turns` (of the whole chats).

    Raises:
        UsageError: as in `sft_dialogues`; or no pair is left.
    """
    if not margin > 0:
        raise UsageError(f"margin must be above 0 (chats rated alike teach nothing), got {margin}")
    kinds: dict[tuple[str, int], list[_Excerpt]] = defaultdict(list)
    for chat in _chats_of(split):
        if chat.rating is not None and chat.starter:
            for excerpt in _excerpts(chat, excerpts, max_words):
                kinds[chat.starter, len(excerpt.turns)].append(excerpt)
    pairs = []
    for kind in kinds.values():
        kind.sort(key=lambda excerpt: (excerpt.words, excerpt.name))
        lengths = [excerpt.words for excerpt in kind]
        for chosen in kind:
            first = bisect.bisect_left(lengths, math.ceil(chosen.words * (1 - length_band) - 1e-9))
            last = bisect.bisect_right(lengths, math.floor(chosen.words / (1 - length_band) + 1e-9))
            fitting = [
                other
                for other in kind[first:last]
                if chosen.rating - other.rating >= margin and _in_band(chosen.of, other.of, chat_band)
            ]
            drawn = random.Random(chosen.name).sample(fitting, min(partners, len(fitting)))
            pairs += [(chosen, rejected) for rejected in drawn]
    if not pairs:
        raise UsageError(
            f"chat_preferences: no pair of the {split} chats has a margin of {margin} within these bands"
        )
    pairs.sort(key=lambda pair: _digest(pair[0].name + pair[1].name))
    return _dataset(
        {
            "chosen": as_messages(chosen.turns),
            "rejected": as_messages(rejected.turns),
            "starter": chosen.starter,
            "chosen_rating": chosen.rating,
            "rejected_rating": rejected.rating,
            "chosen_turns": chosen.of,
            "rejected_turns": rejected.of,
        }
        for chosen, rejected in pairs
    )


def rated_snippets(split: str) -> Any:
    """Sentences of movie reviews and how positive people found them.

    Args:
        split: "train", "validation" or "test".

    Returns:
        A `datasets.Dataset` with `text` and `rating`, -4 to 4.

    Raises:
        UsageError: there is no such split, the data are not in the cache and pip cannot fetch them, or a line of them
            is not an id, a rating and a text.
    """
    _check_split(split)
    archive = fetch_ratings()
    rows = read_snippets(_member(archive, "movieReviewSnippets_GroundTruth.txt"), archive.name)
    rows.sort(key=lambda row: _digest(row["text"]))
    return _dataset(row for row in rows if side_of(bare_words(row["text"])) == split)


# --- chats -------------------------------------------------------------------------------------------------------


@cache
def read_chats() -> tuple[Chat, ...]:
    """All chats, in the order of the package.

    Raises:
        UsageError: the package is missing, or a rating is none of 1 to 10.
    """
    raw = need("chitchat_dataset", "chitchat-dataset").Dataset()
    return tuple(chat for chat in (_chat(name, entry) for name, entry in raw.items()) if chat.turns)


def _chat(name: str, entry: dict[str, Any]) -> Chat:
    turns: list[str] = []
    speaker = None
    for messages in entry["messages"]:
        for message in messages:
            text = " ".join(message["text"].split())
            if not text:
                continue
            if message["sender"] == speaker:
                turns[-1] += " " + text
            else:
                turns.append(text)
            speaker = message["sender"]
    rating = _rating(name, entry["ratings"]) if entry.get("ratings") else None
    return Chat(name, tuple(turns), entry.get("prompt") or "", rating)


def _rating(name: str, ratings: dict[str, Any]) -> float | None:
    values = []
    for scale in SCALES:
        value = ratings.get(scale)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10:
            raise UsageError(
                f"chat {name}: rating {scale} must be a whole number from 1 to 10, got {value!r}"
            )
        values.append(value)
    return None if set(values) == {DEFAULT_RATING} else sum(values) / len(values)


def read_openings() -> list[str]:
    """Distinct first turns of 4 to 15 words, in the order of the package: 2,398 of them."""
    return list(dict.fromkeys(_openings(read_chats())))


def _openings(chats: Iterable[Chat]) -> list[str]:
    return [c.turns[0] for c in chats if MIN_WORDS <= len(c.turns[0].split()) <= MAX_WORDS]


def as_messages(turns: Iterable[str]) -> list[dict[str, str]]:
    """A chat in the form of Hugging Face's templates; the user begins."""
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(turns)]


@dataclass(frozen=True)
class _Excerpt:
    name: str
    turns: tuple[str, ...]
    words: int
    starter: str
    rating: float
    of: int  # turns in the whole chat


def _excerpts(chat: Chat, most: int, max_words: int) -> list[_Excerpt]:
    assert chat.rating is not None
    found: list[_Excerpt] = []
    draw = random.Random(chat.name)
    for size, share in ((2, most - most // 2), (4, most // 2)):
        places = list(range(len(chat.turns) - size + 1))
        draw.shuffle(places)
        fitting = []
        for place in places:
            turns = chat.turns[place : place + size]
            words = sum(len(turn.split()) for turn in turns)
            if words <= max_words:
                name = f"{chat.name}:{place}:{size}"
                fitting.append(_Excerpt(name, turns, words, chat.starter, chat.rating, len(chat.turns)))
        found += fitting[:share]
    return found


def _in_band(a: int, b: int, band: float | None) -> bool:
    return band is None or abs(a - b) <= band * max(a, b)


# --- splits ------------------------------------------------------------------------------------------------------


def bare_words(text: str) -> str:
    """The text without case and punctuation: what makes two texts the same for a split."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def side_of(key: str) -> str:
    """The split of a chat or a text: seven tenths train, one validation, two test."""
    tenth = int.from_bytes(_digest(key), "big") % 10
    return "train" if tenth < 7 else "validation" if tenth == 7 else "test"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _chats_of(split: str) -> list[Chat]:
    _check_split(split)
    return sorted((c for c in read_chats() if c.side == split), key=lambda chat: _digest(chat.name))


def _dataset(rows: Iterable[dict[str, Any]]) -> Any:
    return need("datasets").Dataset.from_list(list(rows))


# --- ratings of snippets -----------------------------------------------------------------------------------------

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def fetch_ratings() -> Path:
    """The sdist that holds the ratings, fetched with pip once and kept in the cache.

    Raises:
        UsageError: pip cannot fetch it, or what came is another file.
    """
    folder = cache_folder()
    kept = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if kept.exists():
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        source = ["--no-binary", ":all:", "--dest", scratch, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run([*command, *source], capture_output=True, text=True)
        came = Path(scratch) / kept.name
        if done.returncode or not came.exists():
            raise UsageError(
                f"rated snippets lie in the source package {PACKAGE} {VERSION}, which pip could not fetch: "
                f"{_last_line(done.stderr)}; where there is no network, put {kept.name} into {folder}"
            )
        _check_whole(came)
        came.replace(kept)  # whole or not at all, also when two processes fetch
    return kept


def _check_whole(archive: Path) -> None:
    came = hashlib.sha256(archive.read_bytes()).hexdigest()
    if came != SHA256:
        raise UsageError(f"{archive.name}: expected sha256 {SHA256}, got {came}")


def _member(sdist: Path, name: str) -> str:
    """A text file of the data archive inside the sdist."""
    try:
        with tarfile.open(sdist) as outer:
            path = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
            with tarfile.open(fileobj=outer.extractfile(path)) as inner:
                file = inner.extractfile(f"hutto_ICWSM_2014/{name}")
                assert file is not None
                return file.read().decode("utf-8")
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise UsageError(
            f"{sdist}: expected the source package {PACKAGE} {VERSION}, got a file that cannot be read as one "
            f"({type(error).__name__}); delete it, and it is fetched again"
        ) from error


def read_snippets(table: str, name: str) -> list[dict[str, Any]]:
    """Lines of id, mean rating and text, separated by tabs.

    Raises:
        UsageError: a line has another form, or a rating lies outside -4..4.
    """
    rows = []
    for number, line in enumerate(table.splitlines(), 1):
        cells = line.split("\t")
        if len(cells) != 3 or not cells[2].strip():
            raise UsageError(
                f"{name}, line {number}: expected id, rating and text between tabs, got {line[:80]!r}"
            )
        try:
            rating = float(cells[1])
        except ValueError:
            rating = math.nan
        if not -4 <= rating <= 4:
            raise UsageError(f"{name}, line {number}: rating must be a number from -4 to 4, got {cells[1]!r}")
        rows.append({"text": cells[2].strip(), "rating": rating})
    return rows


def cache_folder() -> Path:
    """`FASTPPO_CACHE`, or `fastppo` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTPPO_CACHE") or Path(home) / "fastppo")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
