"""bench.learning: what it counts, what it concludes, that it goes on where it was, and one run of our side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from bench import learning


def run(task: str, side: str, seed: int, reward: float) -> dict[str, Any]:
    steps = [
        {"episodes": 16 * i, "reward": reward * i / 4, "kl": 0.5 * i, "wall": 2.0 * i, "processor": 1.0 * i}
        for i in range(1, 5)
    ]
    held_out = {"reward": reward, "kl": 2.0, "openings": 8}
    named = {"model": "small", "task": task, "side": side, "seed": seed, "machine": {}}
    return {**named, "iterations": steps, "held_out": held_out, "settings": {"total_episodes": 64}}


def test_mean_and_standard_error() -> None:
    mean, error = learning.mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))  # sample variance over n
    assert math.isnan(learning.mean_and_error([1.0])[1])


def test_figures_are_of_the_last_iterations() -> None:
    found = learning.figures(run("warm", "trl", 0, 0.8))
    assert found["reward, last iterations"] == pytest.approx(0.8 * (2 + 3 + 4) / 3 / 4)
    assert found["KL, last iterations"] == pytest.approx(1.5)
    assert (found["reward, held out"], found["wall s"]) == (0.8, 8.0)


@pytest.mark.parametrize(
    ("ours", "said"),
    [([0.5, 0.6, 0.7], "not below"), ([0.38, 0.40, 0.42], "BELOW"), ([0.9, 0.9, 0.9], "not")],
)
def test_below_is_by_more_than_the_error_of_the_difference(ours: list[float], said: str) -> None:
    assert f": {said}" in learning.verdict(ours, [0.55, 0.6, 0.65])


def test_rewards_are_compared_at_equal_kl() -> None:
    found = learning.reward_by_kl([run("warm", "trl", 0, 0.4), run("warm", "trl", 1, 0.6)])
    assert list(found) == [0.5, 1.0, 1.5, 2.0]
    assert found[1.0] == pytest.approx((0.25, 0.05))


def test_one_seed_gives_no_verdict() -> None:
    assert "no error known" in learning.verdict([0.1], [0.9])


def test_a_finished_benchmark_trains_nothing_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small").mkdir()
    for task in learning.TASKS:
        for side, reward in (("trl", 0.5), ("fastppo", 0.7)):
            for seed in range(3):
                path = learning.path_of(tmp_path / "small", task, side, seed)
                learning.write(path, run(task, side, seed, reward + 0.01 * seed))
    assert not list(tmp_path.glob("**/*.unfinished"))
    monkeypatch.setattr(learning, "folder_of", lambda model: "")
    monkeypatch.setattr(learning, "fetch_trl", lambda version: tmp_path)
    started: list[str] = []
    monkeypatch.setattr(learning, "start_side", lambda options, side: started.append(side))
    monkeypatch.setattr("sys.argv", ["learning", "--output", str(tmp_path), "--seeds", "0", "1", "2"])
    learning.main()
    printed = capsys.readouterr().out
    assert not started
    assert (
        "0.710 ± 0.006" in printed
        and "fastppo against trl, reward, held out: +0.200 ± 0.008: not below" in printed
    )
    table = json.loads((tmp_path / "small" / "learning.json").read_text())["table"]
    assert [(row["task"], row["side"]) for row in table] == [
        (task, side) for task in learning.TASKS for side in ("trl", "fastppo")
    ]
    assert (tmp_path / "small" / "learning.png").stat().st_size > 10_000

    learning.path_of(tmp_path / "small", "warm", "trl", 1).unlink()
    with pytest.raises(FileNotFoundError):  # it was to be trained
        learning.main()
    assert started == ["trl"]


def test_short_words_are_a_share() -> None:
    reward = learning.reward_of("short")
    replies = ["I am fine, thank you", "", "42 !", [{"role": "assistant", "content": "wonderful day"}]]
    assert reward(prompts=None, completions=replies) == [0.8, 0.0, 0.0, 0.5]


def test_our_side_trains_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.policy(max_position_embeddings=256).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(learning, "folder_of", lambda model: str(tmp_path))
    monkeypatch.setitem(learning.RECIPES, "small", (2, 8, {"learning_rate": 1e-3}))
    monkeypatch.setattr(learning, "HELD_OUT", 4)
    found = learning.train("small", "short", "fastppo", 0)
    assert [it["episodes"] for it in found["iterations"]] == [16, 32]
    assert found["held_out"]["openings"] == 4 and found["held_out"]["kl"] > 0
    assert found["settings"]["gradient_accumulation_steps"] == 2
    json.dumps(found)
