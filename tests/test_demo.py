"""The demo's promises: an honest split, figures that are computed right, and a report safe to open anywhere.

No training here; `make demo` is the test of that.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/ is not part of the installed package

from examples.warm_replies import need, openings, progress, report, warmth
from examples.warm_replies.__main__ import parse

BAD = '<script>alert("x")</script> & </td><img src=x onerror=alert(1)>'


# The split


def test_openings_are_the_2398_distinct_ones_of_4_to_15_words():
    texts = openings.read_openings()
    assert len(texts) == len(set(texts)) == 2398
    assert all(4 <= len(text.split()) <= 15 for text in texts)


def test_split_shares_no_words_between_the_sides():
    train, held_out = openings.split(openings.read_openings(), 128)
    assert len(held_out) == 128
    assert not {openings.bare_words(t) for t in train} & {openings.bare_words(t) for t in held_out}
    assert len({openings.bare_words(t) for t in held_out}) == 128


def test_split_puts_spellings_of_one_opening_on_one_side():
    texts = ["Hi there, you!", "hi there you", "What is new today?", "Do you like dogs?", "I do like cats"]
    for held_out in (1, 2, 3):
        train, held = openings.split(texts, held_out)
        assert len(held) == held_out
        assert ("Hi there, you!" in train) == ("hi there you" in train)


def test_split_does_not_depend_on_order_and_smaller_is_inside_larger():
    texts = openings.read_openings()
    _, few = openings.split(texts, 32)
    _, many = openings.split(texts[::-1], 128)
    assert {openings.bare_words(t) for t in few} <= {openings.bare_words(t) for t in many}


@pytest.mark.parametrize("held_out", [0, -1, 3, 100])
def test_split_refuses_an_impossible_size(held_out):
    with pytest.raises(
        ValueError, match=rf"held_out must lie in 1\.\.2 \(distinct openings\), got {held_out}"
    ):
        openings.split(["one two three four", "five six seven eight", "nine ten eleven twelve"], held_out)


# The reward and the figures


def test_reward_takes_text_and_chat_completions_alike():
    reward = warmth.warmth()
    text = ["I love this!", "I hate this.", ""]
    chat = [[{"role": "assistant", "content": t}] for t in text]
    scores = reward(prompts=["p"] * 3, completions=text, completion_ids=[[1]] * 3)
    assert scores == reward(prompts=["p"] * 3, completions=chat, completion_ids=[[1]] * 3)
    assert scores[0] > 0.5 and scores[1] < -0.5 and scores[2] == 0.0


def measured(rewards: list[float], replies: list[str] | None = None, kl: float = 0.0) -> warmth.Measured:
    n = len(rewards)
    return warmth.Measured(
        replies or ["a b c"] * n, rewards, [kl] * n, [10 + i for i in range(n)], [True] * n
    )


def test_figures_by_hand():
    m = measured([0.0, 1.0, 1.0, 0.0], ["a b c", "a b", "", "A b d"])
    assert m.reward == 0.5
    assert m.reward_interval == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)  # sample variance 1/3, four replies
    assert m.distinct_2 == 3 / 5  # (a b) three times, (b c), (b d)
    assert warmth.interval([1.0]) == float("inf")


# The report


@pytest.fixture
def run() -> report.Run:
    records = [
        {
            "objective/scores": 0.4 + 0.1 * i,
            "objective/kl": 0.5 * i,
            "tokens_per_second": 100.0,
            "time/rollout": 2.0,
            "time/score": 1.0,
            "time/update": 6.0,
        }
        for i in range(4)
    ]
    return report.Run(
        openings=["How are you?", BAD, "Third"],
        before=measured([0.10, 0.20, 0.30], ["fine", BAD, "no"]),
        after=measured([0.60, 0.80, 0.25], ["wonderful", BAD, "no"], kl=5.432),
        records=records,
        seconds={"loading": 3.0, "training": 40.0, "saving": 1.0},
        settings={"response_length": 24, "learning_rate": 5e-5, "note": BAD},
        talk_command="python -m examples.warm_replies.talk runs/model",
        machine={"processor": "a CPU, 2 threads", "software": "x"},
    )


class Links(HTMLParser):
    """Tags of a page, and everything it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.fetched.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


def test_report_shows_other_peoples_words_as_text(run, tmp_path):
    page = report.write_report(run, tmp_path).read_text()
    links = Links(page)
    assert "script" not in links.tags and not links.handlers
    assert page.count("&lt;script&gt;") == 4  # opening, before, after, settings
    assert "<script" not in page and "<img src=x" not in page


def test_report_needs_no_network(run, tmp_path):
    page = report.write_report(run, tmp_path).read_text()
    links = Links(page)
    assert len(links.fetched) == 2 and all(f.startswith("data:image/png;base64,") for f in links.fetched)
    assert not re.search(r"https?://|@import|url\(", page)


def test_report_shows_the_figures(run, tmp_path):
    page = report.write_report(run, tmp_path).read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "+0.20 → +0.55" in text  # means
    assert "2 of 3" in text  # warmer
    assert "5.4 nats" in text
    assert "rollout\n8.0 s (20 %)" in text and "other\n4.0 s (10 %)" in text
    assert "4 updates took 40.0 s" in text
    assert run.talk_command in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_terminal_summary_shows_markup_as_text(run, capsys):

    run.openings[0] = "[bold red]not markup[/bold red]"
    report.print_summary(run, Console(width=160, force_terminal=False))
    out = capsys.readouterr().out
    assert "[bold red]not markup[/bold red]" in out
    assert "+0.200" in out and "+0.550" in out and "+0.350 ±" in out and "2 of 3" in out


# The clock


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"minutes": 1.0}, "another one of 45 s would not end within --minutes 1"),
        ({"most_kl": 3.0}, "replies are 3.5 nats from the start, --most-kl 3"),
        ({"minutes": 2.0, "most_kl": 4.0}, ""),
    ],
)
def test_a_run_that_stops_early_says_why(limits, why, monkeypatch, capsys):
    now = iter([0.0, *[45.0] * 9])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    bar = progress.LiveProgress(Console(width=120, force_terminal=False), 12, **limits)
    control = SimpleNamespace(should_training_stop=False)
    bar.on_train_begin(None, None, control)
    bar.on_log(
        None, None, control, logs={"objective/scores": 0.5, "objective/kl": 3.5, "tokens_per_second": 40.0}
    )
    assert bar.why_stopped == why and control.should_training_stop == bool(why)
    assert "update 1/12" in capsys.readouterr().out


def test_the_last_update_is_no_early_stop():
    bar = progress.LiveProgress(Console(force_terminal=False), 1, minutes=1e-9, most_kl=1.0)
    control = SimpleNamespace(should_training_stop=False)
    bar.on_train_begin(None, None, control)
    bar.on_log(
        None, None, control, logs={"objective/scores": 0.5, "objective/kl": 3.5, "tokens_per_second": 40.0}
    )
    assert not bar.why_stopped


# What a person gets wrong


def test_a_missing_package_names_the_command_that_installs_it():
    with pytest.raises(SystemExit, match=r"needs the package some-package.*make setup"):
        need("module_that_is_not_there", "some-package")


@pytest.mark.parametrize(
    "arguments", [["--updates", "0"], ["--held-out", "-3"], ["--updates", "many"], ["--minutes", "0"]]
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert arguments[0] in capsys.readouterr().err
