"""Scores: every kind of reward, and no mistake of a reward goes unnoticed or unnamed."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import tiny
import torch
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification

from fastppo.score import Episodes, make_rewards, score

EPISODES = Episodes(
    prompts=["how are you", "what do you like"],
    completions=["fine", "books"],
    completion_ids=[[20, 21, 22], [23]],
    prompt_ids=[[5, 6], [7, 8, 9, 10]],
    columns={"weight": [1, 10]},
)
CPU = torch.device("cpu")


def scores(reward: Any, episodes: Episodes = EPISODES, **settings: Any) -> list[float]:
    weights = settings.pop("weights", None)
    return score(make_rewards(reward, weights, **settings), episodes, CPU)[0].tolist()


def length(prompts: Any, completions: list[str], completion_ids: Any, **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


async def slow_weight(completions: list[str], weight: list[int], **columns: Any) -> list[int]:
    await asyncio.sleep(0.01)
    return weight


def test_callables_sync_async_and_weighted() -> None:
    assert scores(length) == [4.0, 5.0]
    assert scores(slow_weight) == [1.0, 10.0]
    assert scores([length, slow_weight], weights=[1.0, 0.5]) == [4.5, 10.0]
    total, each = score(make_rewards([length, length]), EPISODES, CPU)
    assert list(each) == ["length", "length_1"] and total.tolist() == [8.0, 10.0]


def test_async_reward_under_a_running_loop() -> None:
    async def main() -> list[float]:
        return scores(slow_weight)

    assert asyncio.run(main()) == [1.0, 10.0]


def test_tensors_are_numbers_too() -> None:
    assert scores(lambda **_: torch.tensor([[1.0], [2.0]])) == [1.0, 2.0]


def test_decoder_classifier_is_read_at_the_last_token_whatever_its_padding_id() -> None:
    model = tiny.classifier()
    model.config.pad_token_id = (
        22  # the last token of a response: comparing with it would read the wrong place
    )
    expected = []
    for prompt, completion in zip(EPISODES.prompt_ids, EPISODES.completion_ids, strict=True):
        hidden = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0, -1]
        expected.append(model.score(hidden).item())
    assert scores(model) == pytest.approx(expected, abs=1e-6)


def test_encoder_classifier_with_its_own_tokenizer() -> None:
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    texts = [p + c for p, c in zip(EPISODES.prompts, EPISODES.completions, strict=True)]
    expected = [model(**tokenizer(t, return_tensors="pt")).logits.item() for t in texts]
    assert scores(model, processing_classes=tokenizer) == pytest.approx(expected, abs=1e-5)


def test_chat_reaches_a_classifier_through_its_own_template() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.classifier()
    chat = Episodes(
        prompts=[[{"role": "user", "content": "how are you"}]],
        completions=[[{"role": "assistant", "content": "fine"}]],
        completion_ids=[[1]],
        prompt_ids=[[1]],
    )
    ids = tokenizer("<|user|>how are you<|end|><|assistant|>fine<|end|>")["input_ids"]
    plain = Episodes(["x"], ["y"], [ids[3:]], [ids[:3]])
    assert scores(model, chat, processing_classes=tokenizer) == pytest.approx(scores(model, plain))


def test_a_chat_has_one_beginning_where_template_and_tokenizer_both_write_it() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.classifier()
    tokenizer.bos_token = "<|user|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|user|> $A", special_tokens=[("<|user|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("fine")["input_ids"][0] == tokenizer.bos_token_id
    begins = [{"role": "user", "content": "how are you"}]  # the template's text begins with <|user|>
    chat = Episodes([begins], [[{"role": "assistant", "content": "fine"}]], [[1]], [[1]])
    ids = tokenizer("<|user|>how are you<|end|><|assistant|>fine<|end|>", add_special_tokens=False)[
        "input_ids"
    ]
    plain = Episodes(["x"], ["y"], [ids[3:]], [ids[:3]])
    assert scores(model, chat, processing_classes=tokenizer) == pytest.approx(scores(model, plain))
    words = Episodes(["how are"], [" you"], [[1]], [[1]])  # no template: the tokenizer's own stays
    ids = tokenizer("how are you")["input_ids"]
    plain = Episodes(["x"], ["y"], [ids[2:]], [ids[:2]])
    assert scores(model, words, processing_classes=tokenizer) == pytest.approx(scores(model, plain))


def test_an_interrupted_wait_for_a_reward_is_no_error_of_the_reward() -> None:
    over = threading.Event()

    def interrupted(completions: list[str], **columns: Any) -> list[float]:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        over.wait(60)
        return [0.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        scores(interrupted)
    over.set()


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = (
                {"scores": [float(len(c)) for c in body["completions"]]} if self.path == "/ok" else {"no": 1}
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


def test_reward_server(server: str) -> None:
    assert scores(server + "/ok") == [4.0, 5.0]
    with pytest.raises(RuntimeError, match="the server must answer"):
        scores(server + "/other")


def raises_on_books(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    if "books" in completions:
        raise KeyError("no such topic")
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (
            raises_on_books,
            RuntimeError,
            "raises_on_books raised KeyError.*episode 1: prompt 'what do you like'",
        ),
        (lambda **_: [1.0], ValueError, r"must return one number per episode \(2\), got 1"),
        (lambda **_: None, ValueError, "must return a list of 2 numbers, got NoneType"),
        (lambda **_: "good", ValueError, "must return a list of 2 numbers, got str"),
        (
            lambda **_: [1.0, None],
            ValueError,
            "must return finite numbers, got None for episode 1: prompt 'what do",
        ),
        (lambda **_: [float("nan"), 1.0], ValueError, "got nan for episode 0: prompt 'how are you'"),
        (lambda **_: [1.0, float("inf")], ValueError, "got inf for episode 1"),
        (lambda **_: ["a", 1.0], ValueError, "got 'a' for episode 0"),
    ],
)
def test_a_reward_that_errs_is_named_with_the_prompt(reward: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        scores(reward)


def test_a_reward_that_hangs_is_named() -> None:
    def hangs(**_: Any) -> list[float]:
        time.sleep(30)
        return [0.0, 0.0]

    with pytest.raises(
        RuntimeError, match=r"hangs gave no answer within reward_timeout = 0.1 s.*how are you"
    ):
        scores(hangs, timeout=0.1)


@pytest.mark.parametrize(
    ("reward", "settings", "error", "message"),
    [
        (3, {}, TypeError, "expected a callable, a sequence classifier, an http.* got int"),
        ([], {}, ValueError, "at least one reward"),
        ([length], {"weights": [1.0, 2.0]}, ValueError, r"one number per reward \(1\), got 2"),
        ([length], {"processing_classes": [None, None]}, ValueError, r"one entry per reward \(1\), got 2"),
    ],
)
def test_what_is_no_reward(reward: Any, settings: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        scores(reward, **settings)


def test_an_offloaded_classifier_visits_the_device_for_its_scores() -> None:
    # "meta" stands for a device of its own, which computes nothing; so the classifier tells where it was called.
    classifier = tiny.classifier()
    expected = scores(classifier)
    (reward,) = make_rewards(classifier)
    seen: list[str] = []
    classifier.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(
            f"{inputs['input_ids'].device} {next(module.parameters()).device}"
        ),
        with_kwargs=True,
    )
    reward.function.place(torch.device("meta"), offload=True)  # type: ignore[attr-defined]
    assert next(classifier.parameters()).device.type == "cpu"
    with pytest.raises(RuntimeError, match="meta tensor"):  # the scores of a meta tensor cannot be read
        reward.function(EPISODES)
    assert seen == ["meta meta"] and next(classifier.parameters()).device.type == "cpu"
    reward.function.place(CPU, offload=True)  # type: ignore[attr-defined]
    assert score([reward], EPISODES, CPU)[0].tolist() == expected


def test_classifier_with_two_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels=1"):
        make_rewards(tiny.classifier(num_labels=2))
