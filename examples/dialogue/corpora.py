"""What people say: topics of `chatterbot-corpus`, whole conversations of `chitchat-dataset`."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

from examples.warm_replies import need

LANGUAGES = ("english", "chinese")


def _tidy(text: object) -> str:
    return " ".join(str(text).split())


@cache
def intents(language: str, least: int = 8) -> tuple[list[str], list[str]]:
    """Utterances, each once, and the topic of each: what the user says in the conversations of a language.

    A corpus file is a topic. Topics with fewer than `least` different utterances are left out, for nothing could be
    held out of them; so are utterances that stand under two topics.

    Raises:
        ValueError: there is no such language, or no topic of that size.
    """
    import yaml

    package = Path(str(need("chatterbot_corpus", "chatterbot-corpus").__file__)).parent
    folder = package / "data" / language
    if not folder.is_dir():
        known = sorted(path.name for path in (package / "data").iterdir() if path.is_dir())
        raise ValueError(f"chatterbot-corpus has no language {language!r}, only {', '.join(known)}")
    topics: dict[str, set[str]] = {}
    spelled: dict[str, str] = {}
    for path in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            for text in map(_tidy, conversation[::2]):  # every other turn is the machine's
                if text:
                    spelled.setdefault(text.lower(), text)
                    topics.setdefault(text.lower(), set()).add(path.stem)
    labelled = [(spelled[key], *found) for key, found in topics.items() if len(found) == 1]
    sizes = Counter(topic for _, topic in labelled)
    kept = [(text, topic) for text, topic in labelled if sizes[topic] >= least]
    if not kept:
        raise ValueError(f"chatterbot-corpus, {language}: no topic has {least} utterances or more")
    texts, labels = zip(*kept, strict=True)
    return list(texts), list(labels)


@cache
def chats(most_words: int = 25) -> list[list[str]]:
    """Conversations of two people, turn by turn; a turn of more than `most_words` words ends what is kept of one."""
    conversations: list[list[str]] = []
    for chat in need("chitchat_dataset", "chitchat-dataset").Dataset().values():
        turns: list[str] = []
        for messages in chat["messages"]:
            text = _tidy(" ".join(m["text"] for m in messages))
            if not 0 < len(text.split()) <= most_words:
                break
            turns.append(text)
        if len(turns) >= 2:
            conversations.append(turns)
    return conversations


def held_out(conversations: list[list[str]], every: int = 10) -> tuple[list[list[str]], list[list[str]]]:
    """Conversations to learn from, and every tenth, kept for measuring."""
    return (
        [chat for i, chat in enumerate(conversations) if i % every],
        conversations[::every],
    )
