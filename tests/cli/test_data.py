"""Bad data are refused before a model is loaded, with file, column, row, what was expected and what came."""

from __future__ import annotations

import json

import pytest
import tiny
from datasets import Dataset, DatasetDict

from fastppo.cli import UsageError
from fastppo.cli.__main__ import main
from fastppo.cli.data import (
    check_columns,
    check_dialogues,
    check_preferences,
    check_prompt_lengths,
    check_prompts,
    check_ratings,
    load_data,
    whole_texts,
)


def rows(**columns):
    return Dataset.from_dict(columns)


def user(text):
    return [{"role": "user", "content": text}]


def test_files_of_each_kind_and_folders_are_read(tmp_path):
    data = rows(prompt=["a", "b", "c"])
    data.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": p} for p in "abc"]))
    data.to_csv(tmp_path / "a.csv")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "splits"):
        assert load_data(str(tmp_path / name))["prompt"][:] == ["a", "b", "c"], name
    assert load_data(str(tmp_path / "splits"), "test")["prompt"][:] == ["c"]
    assert load_data(str(tmp_path / "a.csv"), most=2)["prompt"][:] == ["a", "b"]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.json").write_text('{"prompt": ')
    (tmp_path / "notes.txt").write_text("hello")
    DatasetDict(train=rows(prompt=["a"])).save_to_disk(tmp_path / "splits")
    for name, message in (
        ("empty.jsonl", r"empty\.jsonl: expected at least one row, got an empty file"),
        ("broken.json", r"broken\.json: cannot be read as json"),
        ("notes.txt", r"notes\.txt: expected one of \.json, \.jsonl, \.csv, \.parquet, got '\.txt'"),
        ("nowhere.csv", r"nowhere\.csv: no such file or folder"),
    ):
        with pytest.raises(UsageError, match=message):
            load_data(str(tmp_path / name))
    with pytest.raises(UsageError, match=r"no split 'tran', did you mean 'train'\?"):
        load_data(str(tmp_path / "splits"), "tran")
    with pytest.raises(UsageError, match=r"did you mean 'chat-openings'\?"):
        load_data("chat-opening")
    (tmp_path / "header.csv").write_text("prompt\n")
    with pytest.raises(UsageError, match=r"header\.csv: expected at least one row, got none"):
        load_data(str(tmp_path / "header.csv"))


def test_missing_columns():
    message = r"x\.csv: expected the columns `chosen` and `rejected`, or `text` and `rating`, got "
    with pytest.raises(UsageError, match=message + r"\['choosen', 'rejected'\], did you mean 'choosen'"):
        check_columns(
            rows(choosen=["a"], rejected=["b"]), "x.csv", ("chosen", "rejected"), ("text", "rating")
        )
    with pytest.raises(UsageError, match=r"x\.csv: expected the column `prompt`, got \['question'\]"):
        check_prompts(rows(question=["a"]), "x.csv")


@pytest.mark.parametrize(
    ("check", "data", "message"),
    [
        (
            check_prompts,
            {"prompt": ["hi", " "]},
            r"d, column `prompt`, row 1: expected a text or a list of messages",
        ),
        (check_prompts, {"prompt": ["hi", None]}, r"row 1: expected .*, got None"),
        (check_dialogues, {"text": ["hi", ""]}, r"column `text`, row 1: expected a text, got ''"),
        (check_dialogues, {"messages": [user("hi")]}, r"row 0: expected a chat of at least two messages"),
        (check_preferences, {"chosen": ["a", ""], "rejected": ["b", "c"]}, r"column `chosen`, row 1"),
        (
            check_preferences,
            {"chosen": ["a", "b"], "rejected": ["a", "b"]},
            r"preferences of one class: expected rows whose `chosen` and `rejected` differ, got 2 rows",
        ),
    ],
)
def test_bad_cells(check, data, message):
    with pytest.raises(UsageError, match=message):
        check(rows(**data), "d")


def test_ties_are_left_out():
    kept = check_preferences(rows(chosen=["a", "b", "c"], rejected=["a", "x", "y"]), "d")
    assert kept["chosen"][:] == ["b", "c"]


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ([1.0, 4.5], r"d, column `rating`, row 1: expected a number between -4 and 4, got 4\.5"),
        ([1.0, None], r"row 1: expected a number between -4 and 4, got None"),
        ([1.0, float("nan")], r"row 1: expected a number between -4 and 4, got nan"),
        ([2.0, 2.0], r"preferences of one class: expected different values in column `rating`, got 2\.0"),
    ],
)
def test_ratings_out_of_range_or_all_alike(ratings, message):
    with pytest.raises(UsageError, match=message):
        check_ratings(rows(text=["a", "b"], rating=ratings), "d", -4, 4)


def test_ratings_without_a_range_must_be_finite():
    with pytest.raises(UsageError, match="row 0: expected a finite number, got inf"):
        check_ratings(rows(text=["a", "b"], rating=[float("inf"), 1.0]), "d", None, None)
    with pytest.raises(UsageError, match="row 0: expected a number of at least 0, got -1"):
        check_ratings(rows(text=["a", "b"], rating=[-1.0, 1.0]), "d", 0, None)


def test_prompts_longer_than_the_context():
    tokenizer = tiny.tokenizer()
    data = rows(prompt=["how are you ?", "how are you ? " * 20])
    assert check_prompt_lengths(data.select([0]), "d", tokenizer, 64, 8) > 0
    with pytest.raises(
        UsageError,
        match=r"d, column `prompt`, row 1: expected at most 56 tokens .* got \d+; shorten it, or set max_p",
    ):
        check_prompt_lengths(data, "d", tokenizer, 64, 8)


def test_whole_texts_join_prompt_and_completion():
    assert whole_texts(rows(prompt=["a "], completion=["b"])) == ["a b"]
    assert whole_texts(rows(text=["t"], other=["o"])) == ["t"]


def test_data_are_judged_before_a_model_is_loaded(tmp_path, files, capsys):
    """Each command is given a model that does not exist: the data's error must come first."""
    out = str(tmp_path / "out")
    for command, data, expected in (
        ("sft", files["prompts"], "`messages`, or `text`"),
        ("reward", files["prompts"], "`chosen` and `rejected`"),
        ("ppo", files["ratings"], "`prompt`"),
        ("eval", files["ratings"], "`prompt`"),
    ):
        arguments = ["--model", "/no/such/model", "--dataset", data, "--output_dir", out]
        if command in ("ppo", "eval"):
            arguments += ["--reward", "vader"]
        if command == "eval":
            arguments += ["--ref_model", "/no/such/model"]
        assert main([command, *arguments]) == 2
        error = capsys.readouterr().err
        assert data in error and expected in error, error


def test_a_model_that_is_none_is_named(tmp_path, files, capsys):
    assert main(["sft", "--model", str(tmp_path), "--dataset", files["dialogues"], "--output_dir", "x"]) == 2
    assert f"model: expected a folder with config.json, got {tmp_path}" in capsys.readouterr().err
