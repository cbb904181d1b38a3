from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

TEXT = "how are you today i am fine thank you lovely what do like to read good books and walk in the park"
WORDS = TEXT.split()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Data files of every kind that the commands read."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    return {
        "dialogues": write(
            folder / "dialogues.jsonl", [{"messages": chat(text(5), text(6))} for _ in range(24)]
        ),
        "prompts": write(folder / "prompts.jsonl", [{"prompt": chat(text(5))} for _ in range(16)]),
        "preferences": write(
            folder / "preferences.jsonl",
            [
                {"chosen": chat(text(4), text(7)), "rejected": chat(text(4), text(3)), "starter": text(1)}
                for _ in range(24)
            ],
        ),
        "ratings": write(
            folder / "ratings.jsonl", [{"text": text(2 + i % 7), "rating": i % 7 - 3.0} for i in range(28)]
        ),
    }


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """Nothing of these tests goes into the user's cache."""
    monkeypatch.setenv("FASTPPO_CACHE", str(tmp_path_factory.getbasetemp() / "fastppo-cache"))
