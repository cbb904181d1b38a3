"""More training utterances out of the few there are: synonyms, random deletion and swap, back-translation.

An augmentation makes another utterance of one, with draws from the `random.Random` that it is given. Words are what
spaces separate; in a text without spaces (Chinese) they are its characters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from examples.dialogue.intents import minilm

Augmentation = Callable[[str, random.Random], str]


def _words(text: str) -> tuple[list[str], str]:
    """The words, and what joins them."""
    return (text.split(), " ") if " " in text or text.isascii() else (list(text), "")


def _share(name: str, share: float) -> float:
    if not 0 < share < 1:
        raise ValueError(f"{name}: the share of words must be between 0 and 1, got {share}")
    return share


def deletion(share: float = 0.15) -> Augmentation:
    """Leaves out each word with this probability, but never all."""
    _share("deletion", share)

    def augment(text: str, draw: random.Random) -> str:
        words, joint = _words(text)
        kept = [word for word in words if draw.random() >= share]
        return joint.join(kept or [draw.choice(words)])

    return augment


def swap(share: float = 0.15) -> Augmentation:
    """Exchanges two words, as often as makes this share of the words, and at least once."""
    _share("swap", share)

    def augment(text: str, draw: random.Random) -> str:
        words, joint = _words(text)
        if len(words) > 1:
            for _ in range(max(1, round(share * len(words) / 2))):
                i, j = draw.sample(range(len(words)), 2)
                words[i], words[j] = words[j], words[i]
        return joint.join(words)

    return augment


def synonyms(table: Mapping[str, Sequence[str]], share: float = 0.3) -> Augmentation:
    """Replaces each word of the table with this probability, the word before any punctuation that ends it."""
    _share("synonyms", share)

    def augment(text: str, draw: random.Random) -> str:
        words, joint = _words(text)
        for i, word in enumerate(words):
            bare = word.rstrip(".,!?;:")
            others = table.get(bare.lower())
            if others and draw.random() < share:
                words[i] = draw.choice(list(others)) + word[len(bare) :]
        return joint.join(words)

    return augment


def nearest_words(
    words: Sequence[str], *, most: int = 3, least_cosine: float = 0.5
) -> dict[str, tuple[str, ...]]:
    """Synonyms of a kind: of each word that MiniLM's vocabulary has whole, the nearest others by its embeddings.

    Near words are used alike; that is not always the same meaning ("hot" and "cold" are neighbours).
    """
    import torch

    model, tokenizer = minilm()
    vocabulary = tokenizer.get_vocab()
    whole = {w: i for w, i in vocabulary.items() if w.isalpha() and w.isascii() and len(w) > 2}
    names, rows = list(whole), torch.tensor(list(whole.values()))
    with torch.no_grad():
        table = torch.nn.functional.normalize(model.get_input_embeddings().weight[rows], dim=-1)
        wanted = sorted({w.lower() for w in words} & set(names))
        places = torch.tensor([names.index(w) for w in wanted])
        cosines, found = (table[places] @ table.T).topk(most + 1)
    return {
        word: others
        for word, row, near in zip(wanted, found.tolist(), cosines.tolist(), strict=True)
        if (others := tuple(names[i] for i, c in zip(row, near, strict=True) if names[i] != word and c >= least_cosine))
    }  # fmt: skip


class Translator(Protocol):
    """Any machine translation: a model behind transformers, a server, a dictionary."""

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        """Each text in the other language; languages are two-letter codes."""


def back_translation(translator: Translator, language: str = "en", pivot: str = "de") -> Augmentation:
    """There and back again: what a translator makes of its own translation."""

    def augment(text: str, draw: random.Random) -> str:
        there = translator.translate([text], language, pivot)
        back = translator.translate(there, pivot, language)
        if len(there) != 1 or len(back) != 1:
            raise ValueError(
                f"{type(translator).__name__}.translate must give one text per text, got {len(there)} and {len(back)}"
            )
        return back[0]

    return augment


class Dictionary:
    """A translator word by word; words that it does not know stay.

    It stands where a translation model would: no package of this project holds one. Where several words share a
    translation, the way back gives another of them, which is all the paraphrase that it has.

    Args:
        words: (word of the first language, word of the second), in any number.
        languages: the two codes.
    """

    def __init__(self, words: Sequence[tuple[str, str]], languages: tuple[str, str] = ("en", "de")) -> None:
        self.languages = languages
        first, second = languages
        self.tables: dict[tuple[str, str], dict[str, str]] = {(first, second): {}, (second, first): {}}
        for a, b in words:
            self.tables[first, second].setdefault(a, b)
            self.tables[second, first][b] = a  # the last one listed

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str]:
        """Word by word."""
        if (source, target) not in self.tables:
            raise ValueError(
                f"this dictionary is between {' and '.join(self.languages)}, got {source!r} to {target!r}"
            )
        table = self.tables[source, target]
        return [
            " ".join(table.get(word, table.get(word.lower(), word)) for word in text.split())
            for text in texts
        ]


# English words that share a German one.
ENGLISH_GERMAN = tuple(
    (english, german)
    for german, several in {
        "sprechen": ("talk", "speak"), "mögen": ("like", "enjoy"), "klug": ("smart", "intelligent", "clever"),
        "Rechner": ("computer", "machine"), "Film": ("movie", "film"), "glücklich": ("happy", "glad"),
        "traurig": ("sad", "unhappy"), "wütend": ("mad", "angry"), "Geld": ("money", "cash"), "groß": ("big", "large"),
        "schnell": ("fast", "quick"), "sagen": ("tell", "say"), "machen": ("make", "do"),
        "bekommen": ("get", "receive"),
        "dumm": ("stupid", "dumb"), "Fußball": ("soccer", "football"), "Buch": ("book", "novel"),
        "schreiben": ("write", "compose"), "lieben": ("love", "adore"), "denken": ("think", "believe"),
        "erklären": ("explain", "describe"), "hallo": ("hello", "hi"), "wollen": ("want", "wish"),
        "arbeiten": ("work", "labor"), "fühlen": ("feel", "sense"), "Freund": ("friend", "pal"),
        "benutzen": ("use", "employ"), "Land": ("country", "land"), "Name": ("name", "title"),
        "erste": ("first", "initial"),
    }.items()
    for english in several
)  # fmt: skip


def augmented(
    texts: Sequence[str],
    topics: Sequence[str],
    augmentations: Sequence[Augmentation],
    seed: int,
    copies: int = 2,
) -> tuple[list[str], list[str]]:
    """The utterances, and of each up to `copies` others with its topic, each by one of the augmentations.

    What an augmentation leaves as it was is not repeated.
    """
    if not augmentations:
        raise ValueError("augmented: expected at least one augmentation, got none")
    draw = random.Random(seed)
    more: dict[str, str] = {}
    for text, topic in zip(texts, topics, strict=True):
        for _ in range(copies):
            other = draw.choice(list(augmentations))(text, draw)
            if other != text:
                more.setdefault(other, topic)
    known = set(texts)
    new = [(text, topic) for text, topic in more.items() if text not in known]
    return [*texts, *(t for t, _ in new)], [*topics, *(t for _, t in new)]
