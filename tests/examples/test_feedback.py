"""The feedback loop's promises: nothing said is lost, pairs are right, and the page does what a person sees it do."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not part of the installed package

import chat_server
import tiny

from examples.feedback import rounds as rounds_module
from examples.feedback import store as store_module
from examples.feedback.__main__ import main
from examples.feedback.endpoint import Endpoint, EndpointError
from examples.feedback.pairs import export, preference_pairs
from examples.feedback.rounds import RoundSettings, hold_out, play_round
from examples.feedback.simulate import RATERS, simulate
from examples.feedback.store import DISLIKE, LIKE, VERSION, WITHDRAWN, Store, canonical
from examples.feedback.talk import talk

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "hello"}]
OTHER = [{"role": "user", "content": "how are you?"}]
ANA = {"rater": "ana", "model": "m"}
BEN = {"rater": "ben", "model": "m"}
EVA = {"rater": "eva", "model": "m"}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "feedback.db")


# The store


@pytest.mark.parametrize("rating", [2, -2, 0.5, True, None, "1"])
def test_a_rating_out_of_range_is_refused(store, rating):
    with pytest.raises(
        ValueError, match=re.escape(f"1 (like), -1 (dislike) or 0 (neither any more), got {rating!r}")
    ):
        store.rate(HELLO, "hi", rating, **ANA)
    assert store.entries() == []


def test_the_file_itself_refuses_a_rating_out_of_range(store):
    with sqlite3.connect(store.path) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute(
            "INSERT INTO feedback (at, rater, model, prompt, answer, rating) VALUES ('', '', '', '', '', 3)"
        )


def test_what_says_nothing_is_refused(store):
    with pytest.raises(ValueError, match="at least one word, got an empty one"):
        store.rewrite(HELLO, "hi", "  ", **ANA)
    with pytest.raises(ValueError, match="differ from the answer it replaces, got the same text"):
        store.rewrite(HELLO, "hi", " hi ", **ANA)
    with pytest.raises(ValueError, match=r"end with the user's, got roles \['user', 'assistant'\]"):
        store.rate([*HELLO, {"role": "assistant", "content": "hi"}], "hi", LIKE, **ANA)
    with pytest.raises(ValueError, match=r"got roles \[\]"):
        store.rate([], "hi", LIKE, **ANA)
    assert store.entries() == []


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 99)
    with pytest.raises(ValueError, match="is not a SQLite file"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "foreign.db") as db:
        db.execute("CREATE TABLE people (name)")
    with pytest.raises(ValueError, match="a database of another program: expected application_id"):
        Store(tmp_path / "foreign.db")
    with sqlite3.connect(Store(tmp_path / "newer.db").path) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(
        ValueError, match=f"has schema version {VERSION + 1}, and this program reads version {VERSION}"
    ):
        Store(tmp_path / "newer.db")
    with pytest.raises(ValueError, match="expected a file, got the folder"):
        Store(tmp_path)


def test_a_writer_that_cannot_write_says_so(store, monkeypatch):
    monkeypatch.setattr(store_module, "WAIT_SECONDS", 0.05)
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RuntimeError, match=r"feedback\.db cannot be used: database is locked"):
            store.rate(HELLO, "hi", LIKE, **ANA)
        other.execute("ROLLBACK")
    store.rate(HELLO, "hi", LIKE, **ANA)
    assert len(store.entries()) == 1


WRITER = """
import sys
from examples.feedback.store import Store
store = Store(sys.argv[1])
for i in range(int(sys.argv[3])):
    number = store.rate([{"role": "user", "content": f"question {i}"}], "hi", 1, rater=sys.argv[2], model="m")
    print(number, flush=True)
"""


def writer(path: Path, rater: str, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), rater, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_many_write_at_once_from_the_first_moment_on(tmp_path):
    writers = [writer(tmp_path / "feedback.db", f"rater {n}", 25) for n in range(4)]
    numbers = [int(line) for w in writers for line in w.communicate()[0].split()]
    assert [w.returncode for w in writers] == [0] * 4
    entries = Store(tmp_path / "feedback.db").entries()
    assert sorted(numbers) == [e.id for e in entries] == list(range(1, 101))
    assert {e.rater for e in entries} == {f"rater {n}" for n in range(4)}


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path):
    killed = writer(tmp_path / "feedback.db", "ana", 100_000)
    assert killed.stdout is not None
    reported = [int(killed.stdout.readline()) for _ in range(20)]
    os.kill(killed.pid, signal.SIGKILL)
    reported += [int(line) for line in killed.communicate()[0].splitlines() if line]
    with sqlite3.connect(tmp_path / "feedback.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert set(reported) <= {e.id for e in Store(tmp_path / "feedback.db").entries()}


# Pairs


def pair(prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return {"prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected)}


def test_pairs_by_hand(store):
    store.rewrite(OTHER, "fine", "Fine, and you?", **ANA)
    store.rate(HELLO, "hi there", LIKE, **ANA)
    store.rate(HELLO, "go away", DISLIKE, **BEN)
    store.rate(HELLO, "what", DISLIKE, **ANA)
    store.rate(OTHER, "good", LIKE, **ANA)  # nothing to compare it with
    assert preference_pairs(store) == [
        pair(OTHER, "Fine, and you?", "fine"),
        pair(HELLO, "hi there", "go away"),
        pair(HELLO, "hi there", "what"),
    ]
    assert store.counts() == {"likes": 2, "dislikes": 2, "rewrites": 1}


def test_the_latest_word_of_a_rater_counts_and_the_majority_of_raters(store):
    store.rewrite(OTHER, "fine", "Fine, and you?", **ANA)  # so that there is always a pair
    store.rate(HELLO, "a", DISLIKE, **ANA)
    store.rate(HELLO, "a", LIKE, **ANA)  # changed her mind
    store.rate(HELLO, "b", LIKE, **ANA)
    store.rate(HELLO, "b", DISLIKE, **BEN)
    assert len(preference_pairs(store)) == 1  # on b it is one against one
    store.rate(HELLO, "b", DISLIKE, **EVA)
    assert preference_pairs(store)[1:] == [pair(HELLO, "a", "b")]
    store.rate(HELLO, "a", WITHDRAWN, **ANA)
    assert len(preference_pairs(store)) == 1
    assert store.counts() == {"likes": 1, "dislikes": 2, "rewrites": 1}


def test_export_is_what_trl_reads(store, tmp_path):
    from datasets import load_dataset

    store.rewrite(HELLO, "hi", 'Grüß dich! "\n</td>', **ANA)
    store.rewrite(OTHER, "fine", "Fine, and you?", **ANA)
    assert export(store, tmp_path / "out" / "pairs.jsonl") == preference_pairs(store)
    rows = load_dataset(
        "json", data_files=str(tmp_path / "out" / "pairs.jsonl"), cache_dir=str(tmp_path), split="train"
    )
    assert list(rows) == preference_pairs(store)
    assert os.listdir(tmp_path / "out") == ["pairs.jsonl"]


def test_feedback_of_one_class_is_refused_and_an_older_export_stays(store, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("older")
    for said in ("hi", "hello", "hey"):
        store.rate(HELLO, said, LIKE, **ANA)
    expected = r"holds no preference pair: 3 likes, 0 dislikes and 0 rewrites\. A pair is a liked and a disliked answer"
    with pytest.raises(ValueError, match=expected):
        export(store, tmp_path / "pairs.jsonl")
    with pytest.raises(SystemExit, match=expected):
        main(["export", "--feedback", str(store.path), str(tmp_path / "pairs.jsonl")])
    assert (tmp_path / "pairs.jsonl").read_text() == "older"


def test_export_needs_feedback(tmp_path):
    with pytest.raises(
        SystemExit, match=r"there is no feedback in .*nothing\.db; `talk` and `page` collect it"
    ):
        main(["export", "--feedback", str(tmp_path / "nothing.db"), str(tmp_path / "pairs.jsonl")])
    assert os.listdir(tmp_path) == []


# The endpoint, and the conversation in the terminal


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_dead_endpoint_is_named(tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(
        SystemExit, match=rf"no server answers at {url}; start one with `transformers serve FOLDER"
    ):
        main(["talk", "--endpoint", url, "--feedback", str(tmp_path / "feedback.db")])


def test_models_are_found_or_refused():
    with chat_server.chat_server() as server:
        assert Endpoint(server.url).model == "fake-chat"
        with pytest.raises(EndpointError, match="serves no model 'other'; it has fake-chat"):
            Endpoint(server.url, "other")
        server.models = []
        with pytest.raises(EndpointError, match="serves no model; `transformers serve FOLDER` serves one"):
            Endpoint(server.url)


def test_empty_and_refused_answers_are_errors():
    with chat_server.chat_server() as server:
        endpoint = Endpoint(server.url)
        server.say = lambda number, messages: "  "
        with pytest.raises(EndpointError, match="gave an empty answer; ask again"):
            endpoint.answer(HELLO)
        server.status = 413
        with pytest.raises(EndpointError, match=r"refused with status 413: .*context too long"):
            endpoint.answer(HELLO)


def test_talk_stores_each_word_at_once(store, monkeypatch, capsys):
    from rich.console import Console

    lines = iter(
        ["+", "hello", "+", "/again", "-", "= ", "= Hello [b]you[/b]!", "and now?", "+", "/new", "bye", ""]
    )
    monkeypatch.setattr(Console, "input", lambda self, prompt: next(lines))
    with chat_server.chat_server() as server:
        talk(Endpoint(server.url), store, Console(width=120, force_terminal=False), rater="ana")
        asked = [[m["content"] for m in r["messages"]] for r in server.requests]
    second = "answer 2 to <hello>"
    assert asked == [["hello"], ["hello"], ["hello", "Hello [b]you[/b]!", "and now?"], ["bye"]]
    assert [(e.answer, e.rating, e.rewrite) for e in store.entries()] == [
        ("answer 1 to <hello>", LIKE, None),
        (second, DISLIKE, None),
        (second, None, "Hello [b]you[/b]!"),
        ("answer 3 to <and now?>", LIKE, None),
    ]
    assert [m["content"] for m in store.entries()[3].prompt] == asked[2]
    out = capsys.readouterr().out
    assert "there is no answer yet to speak of" in out
    assert "not stored: a rewrite must hold at least one word" in out
    assert "2 likes, 1 dislikes, 1 rewrites" in out


def test_talk_survives_a_server_that_goes_and_comes(store, monkeypatch, capsys):
    from rich.console import Console

    with chat_server.chat_server() as server:
        endpoint, port = Endpoint(server.url), server.server_port
    stack = []

    def say(self, prompt):
        if not stack:
            stack.append("asked")
            return "hello"
        if len(stack) == 1:
            stack.append(chat_server.chat_server(port))
            stack[1].__enter__()
            return "/again"
        return ""

    monkeypatch.setattr(Console, "input", say)
    talk(endpoint, store, Console(width=120, force_terminal=False))
    stack[1].__exit__(None, None, None)
    out = capsys.readouterr().out
    assert "no server answers at" in out and "answer 1 to <hello>" in out


# The page


def test_a_busy_port_names_its_process_and_a_free_one(tmp_path):
    from examples.feedback.port import check_port

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = rf"port {port} of 127\.0\.0\.1 is taken by .* \(process {os.getpid()}\); port (\d+) is free: --port"
        with pytest.raises(SystemExit, match=expected) as error:
            main(["page", "--port", str(port), "--feedback", str(tmp_path / "feedback.db")])
        check_port("127.0.0.1", int(re.search(r"--port (\d+)", str(error.value)).group(1)))
        assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def browser():
    with chat_server.browser() as running:
        yield running


@contextmanager
def open_page(browser, endpoint, store):
    """The page in a fresh browser context, as a visitor sees it, and all that it asked of the network."""
    from examples.feedback import page as feedback_page

    application = feedback_page.serve(endpoint, store, port=free_port(), block=False)
    context = browser.new_context()
    visitor = context.new_page()
    visitor.set_default_timeout(300_000)
    visitor.asked = []
    visitor.on("request", lambda request: visitor.asked.append(request.url))
    try:
        visitor.goto(application.local_url)
        yield visitor
    finally:
        context.close()
        application.close(verbose=False)


def send(visitor, text):
    box = visitor.locator("textarea").last
    box.fill(text)
    box.press("Enter")


def bubble(visitor, text):
    return visitor.locator(".message").get_by_text(text, exact=True)


def test_the_page_talks_rates_and_rewrites(browser, store):
    with chat_server.chat_server() as server, open_page(browser, Endpoint(server.url), store) as visitor:
        send(visitor, "hello")
        bubble(visitor, "answer 1 to <hello>").wait_for()
        visitor.get_by_label("Like", exact=True).click()
        visitor.get_by_text("1 likes, 0 dislikes, 0 rewrites").wait_for()

        send(visitor, "and now?")
        bubble(visitor, "answer 2 to <and now?>").wait_for()
        visitor.get_by_label("Dislike", exact=True).last.click()
        visitor.get_by_text("1 likes, 1 dislikes, 0 rewrites").wait_for()

        visitor.get_by_label("Edit", exact=True).last.click()
        visitor.locator("textarea").first.fill("Now we *talk*, <b>you</b> & I.")
        visitor.get_by_label("Submit", exact=True).first.click()
        visitor.get_by_text("1 likes, 1 dislikes, 1 rewrites").wait_for()
        visitor.locator(".message em", has_text="talk").wait_for()

        # What goes on, goes on from the rewrite.
        send(visitor, "good")
        bubble(visitor, "answer 3 to <good>").wait_for()
        # A like that is taken back.
        visitor.get_by_label("Like", exact=True).last.click()
        visitor.get_by_text("2 likes, 1 dislikes, 1 rewrites").wait_for()
        visitor.get_by_label("Liked", exact=True).last.click()
        visitor.get_by_text("1 likes, 1 dislikes, 1 rewrites").wait_for()

        # Another answer to the same question.
        visitor.get_by_label("Retry", exact=True).last.click()
        bubble(visitor, "answer 4 to <good>").wait_for()
        asked = [[m["content"] for m in r["messages"]] for r in server.requests]
        fetched = [url for url in visitor.asked if not url.startswith((visitor.url, "data:", "blob:"))]

    first, second = "answer 1 to <hello>", "answer 2 to <and now?>"
    better = "Now we *talk*, <b>you</b> & I."
    assert asked[2] == asked[3] == ["hello", first, "and now?", better, "good"]
    assert [([m["content"] for m in e.prompt], e.answer, e.rating, e.rewrite) for e in store.entries()] == [
        (["hello"], first, LIKE, None),
        (["hello", first, "and now?"], second, DISLIKE, None),
        (["hello", first, "and now?"], second, None, better),
        (asked[2], "answer 3 to <good>", LIKE, None),
        (asked[2], "answer 3 to <good>", WITHDRAWN, None),
    ]
    assert {e.model for e in store.entries()} == {"fake-chat"} and len(
        {e.rater for e in store.entries()}
    ) == 1
    assert fetched == []  # no fonts, no telemetry


def test_the_page_says_what_went_wrong_and_loses_nothing(browser, store, monkeypatch):
    with chat_server.chat_server() as server:
        endpoint, port = Endpoint(server.url), server.server_port
    with open_page(browser, endpoint, store) as visitor:
        send(visitor, "hello")
        visitor.get_by_text("no server answers at").wait_for()
        with chat_server.chat_server(port) as server:
            send(visitor, "hello again")
            bubble(visitor, "answer 1 to <hello again>").wait_for()
            assert [m["content"] for m in server.requests[0]["messages"]] == [
                "hello again"
            ]  # turns alternate

        monkeypatch.setattr(store_module, "WAIT_SECONDS", 0.05)
        with sqlite3.connect(store.path, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            visitor.get_by_label("Like", exact=True).last.click()
            visitor.get_by_text("Not stored:").wait_for()
            other.execute("ROLLBACK")
        visitor.get_by_label("Dislike", exact=True).last.click()
        visitor.get_by_text("0 likes, 1 dislikes, 0 rewrites").wait_for()
    assert [(e.answer, e.rating) for e in store.entries()] == [("answer 1 to <hello again>", DISLIKE)]


# The real thing behind it


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """URL of `transformers serve` with a tiny random model."""
    folder = tmp_path_factory.mktemp("served")
    tiny.policy("llama", max_position_embeddings=512).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    port = free_port()
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert server.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1", str(folder)
    finally:
        server.terminate()
        server.wait()


def test_the_page_in_front_of_transformers_serve(browser, served, store):
    url, folder = served
    endpoint = Endpoint(url, max_tokens=8)
    assert endpoint.model == folder
    answers = [endpoint.answer(HELLO) for _ in range(3)]
    assert len(set(answers)) > 1  # drawn, not the likeliest each time
    with open_page(browser, endpoint, store) as visitor:
        send(visitor, "how are you today ?")
        visitor.get_by_label("Like", exact=True).click()
        visitor.get_by_text("1 likes, 0 dislikes, 0 rewrites").wait_for()
    (entry,) = store.entries()
    assert entry.model == folder and entry.rating == LIKE and entry.answer
    assert entry.prompt == [{"role": "user", "content": "how are you today ?"}]


# Rounds

SAYINGS = """hello how are you what is new the a dog rain train day we go
love great happy thanks bad hate sad ugly"""
WORDS = SAYINGS.split()
QUICK = RoundSettings(
    reward_epochs=6,
    reward_learning_rate=3e-3,
    reward_batch_size=16,
    learning_rate=2e-3,
    updates=8,
    batch_size=64,
    response_length=8,
    kl_coef=0.0,
)


@pytest.fixture(scope="module")
def small_talker(tmp_path_factory) -> str:
    """Folder of a random model of 27 words, some of which VADER finds warm and some cold."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<|pad|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("small_talker")
    tiny.policy("llama", vocab_size=len(special) + len(WORDS)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_two_rounds_raise_the_rating_of_a_simulated_rater(small_talker, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    draw = random.Random(0)
    prompts = [[{"role": "user", "content": " ".join(draw.choices(WORDS, k=3))}] for _ in range(24)]
    said = []
    before, after_one, after_two = simulate(
        small_talker, prompts, RATERS["warm"](), tmp_path / "rounds", settings=QUICK, report=said.append
    )
    assert after_one > before and after_two > before + 0.25, said

    first, second = (
        json.loads((tmp_path / "rounds" / f"round-{n}" / "round.json").read_text()) for n in (1, 2)
    )
    assert second["base"] == first["base"] == small_talker
    assert first["policy_from"] == first["reward_from"] == small_talker
    assert second["policy_from"] == str(tmp_path / "rounds" / "round-1" / "policy")
    assert second["reward_from"] == str(tmp_path / "rounds" / "round-1" / "reward")
    assert first["ppo"]["updates"] == second["ppo"]["updates"] == QUICK.updates
    assert second["feedback"]["likes"] > first["feedback"]["likes"] > 0
    assert second["reward"]["accuracy"] > 0.8
    for number in (1, 2):
        folder = tmp_path / "rounds" / f"round-{number}"
        assert sorted(os.listdir(folder)) == ["pairs.jsonl", "policy", "reward", "round.json"]
        AutoModelForCausalLM.from_pretrained(folder / "policy")
        AutoTokenizer.from_pretrained(folder / "policy").apply_chat_template(HELLO)
        assert AutoModelForSequenceClassification.from_pretrained(folder / "reward").num_labels == 1
    assert not [name for name in os.listdir(tmp_path / "rounds") if name.endswith(".tmp")]

    # The same feedback again would only be learnt by heart.
    store = Store(tmp_path / "rounds" / "feedback.db")
    with pytest.raises(ValueError, match=r"no new feedback in .* since round 2: its last entry is number"):
        play_round(store, tmp_path / "rounds")
    store.rate(HELLO, "love", LIKE, **ANA)
    with pytest.raises(
        ValueError, match=r"started from .*small_talker.*, got --model .*: use another folder"
    ):
        play_round(store, tmp_path / "rounds", str(tmp_path))
    with pytest.raises(ValueError, match="holds rounds already"):
        simulate(small_talker, prompts, RATERS["short"](), tmp_path / "rounds")


def test_a_round_needs_a_model_and_pairs_and_leaves_nothing_behind_without(store, small_talker, tmp_path):
    rounds = tmp_path / "rounds"
    store.rate(HELLO, "love", LIKE, **ANA)
    with pytest.raises(
        ValueError, match="holds no round yet: name the folder of the chat model to start from"
    ):
        play_round(store, rounds)
    with pytest.raises(
        ValueError, match=r"there is no model in .*nowhere: expected a folder with config\.json"
    ):
        play_round(store, rounds, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no preference pair: 1 likes, 0 dislikes"):
        play_round(store, rounds, small_talker)
    assert os.listdir(rounds) == []


def test_an_interrupted_round_leaves_no_half_of_itself(store, small_talker, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    store.rewrite(HELLO, "bad", "love", **ANA)
    monkeypatch.setattr(rounds_module, "train_policy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        play_round(store, tmp_path / "rounds", small_talker, settings=replace(QUICK, reward_epochs=1))
    assert os.listdir(tmp_path / "rounds") == []
    assert rounds_module.last_round(tmp_path / "rounds") is None


def test_pairs_are_held_out_by_prompt_and_stay_so():
    pairs = [
        pair([{"role": "user", "content": f"question {i // 2}"}], f"good {i}", "bad") for i in range(200)
    ]
    train, held_out = hold_out(pairs, 0.2)
    assert len(train) + len(held_out) == 200 and 20 <= len(held_out) <= 60
    assert not {canonical(p["prompt"]) for p in train} & {canonical(p["prompt"]) for p in held_out}
    fewer_train, fewer_held_out = hold_out(pairs[:150], 0.2)
    assert all(p in train for p in fewer_train) and all(p in held_out for p in fewer_held_out)
    assert hold_out(pairs[:10], 0.2) == (pairs[:10], [])  # too few to say anything


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "prompts").write_text("\n \n")
    for file, expected in (
        ("prompts", "holds no prompt: expected one a line"),
        ("none", "there is no file of prompts"),
    ):
        arguments = ["--model", "m", "--output", str(tmp_path / "out"), "--prompts", str(tmp_path / file)]
        with pytest.raises(SystemExit, match=expected):
            main(["simulate", *arguments])
    assert os.listdir(tmp_path) == ["prompts"]
