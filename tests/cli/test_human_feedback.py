"""The human-feedback data: real, split without leaks, and refused where they are wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastppo.cli import UsageError, human_feedback
from fastppo.cli.human_feedback import (
    SPLITS,
    Chat,
    bare_words,
    chat_preferences,
    openings,
    rated_snippets,
    read_chats,
    read_snippets,
    sft_dialogues,
    side_of,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """The ratings are fetched once, not once per run of the suite."""
    monkeypatch.setenv("FASTPPO_CACHE", str(Path(__file__).resolve().parents[2] / ".cache"))


def words(messages):
    return sum(len(message["content"].split()) for message in messages)


# The chats


def test_the_package_holds_7168_chats_of_which_3068_carry_a_rating_that_somebody_chose():
    chats = read_chats()
    assert len(chats) == 7168
    assert sum(chat.rating is not None for chat in chats) == 3068
    assert len({chat.starter for chat in chats} - {""}) == 34
    assert all(1 <= chat.rating <= 10 for chat in chats if chat.rating is not None)


def raw(*messages, **entry):
    return {"messages": [[{"sender": s, "text": t} for s, t in group] for group in messages], **entry}


def test_messages_in_a_row_are_one_turn_and_empty_ones_none():
    chat = human_feedback._chat(
        "x", raw([("a", "Hi"), ("a", " there\n you")], [("a", "?")], [("b", " ")], [("b", "yes")])
    )
    assert chat == Chat("x", ("Hi there you ?", "yes"), "", None)


def test_an_untouched_form_is_no_rating():
    def rating(*values):
        return human_feedback._rating("x", dict(zip(human_feedback.SCALES, values, strict=True)))

    assert rating(5, 5, 5) is None
    assert rating(5, 5, 8) == 6


@pytest.mark.parametrize("value", [0, 11, 7.5, "7", None, True, float("nan")])
def test_a_rating_that_is_none_of_1_to_10_is_an_error(value):
    with pytest.raises(UsageError, match=r"chat x: rating upbeat must be a whole number from 1 to 10, got"):
        human_feedback._rating("x", {"interesting": 5, "upbeat": value, "witty": 5})


def test_a_missing_scale_is_an_error():
    with pytest.raises(UsageError, match="rating witty must be a whole number from 1 to 10, got None"):
        human_feedback._rating("x", {"interesting": 5, "upbeat": 6})


# Splits


def test_sides_are_seven_one_and_two_tenths():
    sides = [side_of(str(i)) for i in range(10_000)]
    assert [round(sides.count(side) / 10_000, 1) for side in SPLITS] == [0.7, 0.1, 0.2]


def test_a_chat_lies_on_the_side_of_its_opening():
    texts = ("Do you like dogs?", "do you like DOGS")
    assert len({Chat("x", (text, str(i)), "", None).side for i in range(50) for text in texts}) == 1
    assert {Chat("x", ("hello", str(i)), "", None).side for i in range(50)} == set(SPLITS)


@pytest.mark.parametrize("function", [sft_dialogues, openings, chat_preferences, rated_snippets])
def test_no_other_split(function):
    with pytest.raises(UsageError, match="split must be one of train, validation, test, got 'dev'"):
        function("dev")


@pytest.mark.parametrize("function", [sft_dialogues, openings, rated_snippets])
def test_no_row_lies_on_two_sides_and_reruns_agree(function):
    def keys(split):
        rows = function(split)
        column = next(name for name in ("messages", "prompt", "text") if name in rows.column_names)
        return [
            bare_words(x if isinstance(x, str) else "\n".join(m["content"] for m in x)) for x in rows[column]
        ]

    train, validation, test = ([*map(str, keys(split))] for split in SPLITS)
    assert not set(train) & set(test) and not set(train) & set(validation) and not set(validation) & set(test)
    assert test == keys("test")


def test_no_opening_to_test_on_began_a_chat_that_was_trained_on():
    trained = {bare_words(messages[0]["content"]) for messages in sft_dialogues("train")["messages"]}
    assert not trained & {bare_words(prompt[0]["content"]) for prompt in openings("test")["prompt"]}


# What the sets hold


def test_dialogues_alternate_from_the_user_to_the_assistant():
    rows = sft_dialogues("test")
    assert len(rows) == 782
    for messages in rows["messages"]:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"].strip() for message in messages)


def test_openings_are_distinct_and_of_4_to_15_words():
    prompts = openings("test")["prompt"]
    assert len(prompts) == len({bare_words(prompt[0]["content"]) for prompt in prompts}) == 477
    assert all(len(prompt) == 1 and prompt[0]["role"] == "user" for prompt in prompts)
    assert all(4 <= words(prompt) <= 15 for prompt in prompts)


def test_preferences_keep_margin_starter_turns_and_length_band():
    rows = list(chat_preferences("test"))
    assert len(rows) == 1169
    assert len({row["starter"] for row in rows}) == 33
    for row in rows:
        assert row["chosen_rating"] - row["rejected_rating"] >= 3
        assert len(row["chosen"]) == len(row["rejected"]) in (2, 4)
        a, b = words(row["chosen"]), words(row["rejected"])
        assert abs(a - b) <= 0.25 * max(a, b) and max(a, b) <= 80
        assert row["chosen"][-1]["role"] == row["rejected"][-1]["role"] == "assistant"


def test_length_band_of_whole_chats():
    banded = chat_preferences("test", chat_band=0.35)
    assert 0 < len(banded) < 1169
    for row in banded:
        a, b = row["chosen_turns"], row["rejected_turns"]
        assert abs(a - b) <= 0.35 * max(a, b)


def test_preferences_that_cannot_be_are_errors():
    with pytest.raises(UsageError, match=r"margin must be above 0 .*, got 0"):
        chat_preferences("test", margin=0)
    with pytest.raises(
        UsageError, match=r"no pair of the test chats has a margin of 9\.5 within these bands"
    ):
        chat_preferences("test", margin=9.5)


def test_snippets_are_10605_sentences_rated_on_both_sides_of_0():
    sets = {split: rated_snippets(split) for split in SPLITS}
    assert sum(map(len, sets.values())) == 10_605
    first = sets["train"].select(range(500))[
        "rating"
    ]  # the first rows are a fair sample: the file begins with praise
    assert 0.35 < sum(rating > 0 for rating in first) / 500 < 0.65
    assert all(-4 <= rating <= 4 for rating in sets["test"]["rating"])


# Lines that are wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2\t1.5", "table, line 2: expected id, rating and text between tabs, got '2\\t1.5'"),
        ("2\t1.5\t ", "table, line 2: expected id, rating and text between tabs"),
        ("2\t4.5\tgood", "table, line 2: rating must be a number from -4 to 4, got '4.5'"),
        ("2\tnan\tgood", "table, line 2: rating must be a number from -4 to 4, got 'nan'"),
        ("2\tfine\tgood", "table, line 2: rating must be a number from -4 to 4, got 'fine'"),
    ],
)
def test_a_bad_line_is_named(line, message):
    with pytest.raises(UsageError) as error:
        read_snippets(f"1\t-2\tbad\r\n{line}\r\n", "table")
    assert message in str(error.value)


# Fetching


def test_without_network_the_message_says_where_the_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPPO_CACHE", str(tmp_path))
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retry\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UsageError) as error:
        rated_snippets("test")
    assert "ERROR: No matching distribution" in str(error.value)
    assert f"put vaderSentiment-3.3.2.tar.gz into {tmp_path}" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_known_one_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPPO_CACHE", str(tmp_path))

    def run(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/vaderSentiment-3.3.2.tar.gz", "wb") as file:
            file.write(b"something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UsageError, match=r"vaderSentiment-3\.3\.2\.tar\.gz: expected sha256 5d7c06e0.*, got"):
        rated_snippets("test")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPPO_CACHE", str(tmp_path))
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"half a file")
    with pytest.raises(UsageError, match=r"cannot be read as one .* delete it, and it is fetched again"):
        rated_snippets("test")
