"""The way to production: what is served is the model that was trained, and what the card says is what was measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not part of the installed package

import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import production

CHATS = [
    [{"role": "user", "content": f"how are you today {word} ?"}, {"role": "assistant", "content": answer}]
    for word, answer in (
        ("fox", "i am fine , thank you ."),
        ("dog", "that sounds lovely !"),
        ("", "i like books"),
    )
]
RUN = {"log_history": [{"objective/scores": s, "objective/kl": k} for s, k in ((0.25, 0.0), (0.75, 1.5))]}


def letters(prompts, answers):
    assert [p[-1]["role"] for p in prompts] == ["user"] * len(answers)
    return [float(len(answer)) for answer in answers]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Folder of a LoRA adapter that does something, beside the log of a run."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.policy("llama-tied", vocab_size=300).save_pretrained(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    model.save_pretrained(folder / "adapter")
    tiny.tokenizer().save_pretrained(folder / "adapter")
    (folder / "trainer_state.json").write_text(json.dumps(RUN))
    return folder / "adapter"


@pytest.fixture(scope="module")
def produced(adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("production") / "out"
    said: list[str] = []
    measured = production.produce(
        adapter, output, CHATS, letters, reward_name="letters", tokens=6, name="Tiny", report=said.append
    )
    return output, measured, said


def test_every_variant_is_the_trained_model(adapter, produced):
    from peft import AutoPeftModelForCausalLM

    output, measured, said = produced
    assert sorted(os.listdir(output)) == ["full", "int8-dynamic", "int8-weight-only", "production.json"]
    trained = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "full")
    ids = torch.tensor([tokenizer.apply_chat_template(CHATS[0], return_dict=False)])

    def logits(model):
        with torch.no_grad():
            return model(ids).logits

    expected = logits(trained)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output / "full")), expected)
    far = (logits(base) - expected).abs().mean()
    for variant in ("int8-weight-only", "int8-dynamic"):
        served = AutoModelForCausalLM.from_pretrained(output / variant).eval()
        near = (logits(served) - expected).abs().mean()
        assert 0 < near < far / 5
        assert (
            sum("Int8" in type(p).__name__ for p in served.parameters()) == 14
        )  # seven layers in each of two blocks
        assert (output / variant / "model.safetensors").stat().st_size == measured[variant].bytes
        assert measured[variant].bytes < 0.75 * measured["full"].bytes
    assert "adapter merged" in said[0]


def test_quality_by_hand(produced):
    output, measured, _ = produced
    tokenizer = AutoTokenizer.from_pretrained(output / "full")
    full = AutoModelForCausalLM.from_pretrained(output / "full").eval()
    int8 = AutoModelForCausalLM.from_pretrained(output / "int8-weight-only").eval()
    nats, kl = [], []
    for chat in CHATS:
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        start = len(tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False))
        with torch.no_grad():
            p, q = (torch.softmax(m(torch.tensor([ids])).logits[0].double(), -1) for m in (full, int8))
        for t in range(start, len(ids)):
            nats.append(-p[t - 1, ids[t]].log())
            kl.append((p[t - 1] * (p[t - 1] / q[t - 1]).log()).sum())
    assert measured["full"].perplexity == pytest.approx(float(torch.stack(nats).mean().exp()), rel=1e-4)
    assert measured["int8-weight-only"].kl == pytest.approx(float(torch.stack(kl).mean()), rel=1e-2)
    assert measured["full"].kl == pytest.approx(0.0, abs=1e-6)
    for m in measured.values():
        assert m.reward > 0 and m.reward_interval >= 0
        assert m.prefill_tokens_per_second > 0 and m.decode_tokens_per_second > 0


def test_the_card_says_what_was_measured(produced):
    from huggingface_hub import ModelCard

    output, measured, _ = produced
    figures = json.loads((output / "production.json").read_text())
    assert figures["variants"]["full"]["perplexity"] == measured["full"].perplexity
    for variant in production.VARIANTS:
        card = ModelCard.load(output / variant / "README.md")
        assert card.data.tags == ["fastppo", "ppo"] and card.data.pipeline_tag == "text-generation"
        assert f"| {variant} | {measured[variant].bytes / 1e6:.1f} |" in card.text
        assert f"transformers serve {output / variant} --port 8000" in card.text
        assert "score, first update: 0.25" in card.text and "KL to the reference: 1.5" in card.text
        assert "3 held-out chats" in card.text and "# Tiny" in card.text


def test_variants_that_do_not_load_or_not_as_themselves_are_refused(tmp_path):
    for name in ("same", "other", "broken"):
        tiny.policy("llama", seed=1, vocab_size=300).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    same, another = (tiny.policy("llama", seed=seed, vocab_size=300) for seed in (1, 2))
    versions = {tmp_path / "same": same, tmp_path / "other": another, tmp_path / "broken": same}
    expected = (
        r"^other is another model once loaded: log-prob .* of a text that had .*; broken does not load in "
    )
    with pytest.raises(RuntimeError, match=expected):
        production.check_reload(versions, [5, 6, 7])


def test_bad_input_is_named_and_nothing_is_written(adapter, tmp_path, monkeypatch):
    def produce(model=adapter, output=tmp_path / "out", chats=CHATS, **options):
        production.produce(model, output, chats, letters, reward_name="letters", **options)

    with pytest.raises(
        ValueError, match=r"there is no model in .*nowhere: expected config\.json or adapter_config"
    ):
        produce(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists already: name a folder that does not"):
        produce(output=tmp_path)
    with pytest.raises(ValueError, match="at least one, each with a prompt and ending with an answer"):
        produce(chats=[CHATS[0][:1]])
    with pytest.raises(ValueError, match=r"there is no run in .*none"):
        produce(run=tmp_path / "none")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json is no run: expected round\.json or trainer_state\.json"):
        produce(run=tmp_path / "run.json")
    (tmp_path / "chats.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(
        SystemExit, match=r"chats\.jsonl, line 1: expected messages, or prompt and chosen, got \['text'\]"
    ):
        production.main(
            [str(adapter), "--output", str(tmp_path / "out"), "--chats", str(tmp_path / "chats.jsonl")]
        )

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(production, "check_reload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        produce()
    assert sorted(os.listdir(tmp_path)) == ["chats.jsonl", "run.json"]


def test_chats_come_from_pairs_or_from_the_demos_held_out_side(tmp_path):
    pair = {"prompt": CHATS[0][:1], "chosen": CHATS[0][1:], "rejected": CHATS[1][1:]}
    rows = [pair, {"messages": CHATS[1]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert production.read_chats(tmp_path / "chats.jsonl") == CHATS[:2]
    chats = production.held_out_chats(16)
    assert len(chats) == 16 and all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
