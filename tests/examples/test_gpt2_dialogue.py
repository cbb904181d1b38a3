from __future__ import annotations

import pytest
import tiny
from transformers import AutoTokenizer, GPT2LMHeadModel

from examples import gpt2_dialogue
from examples.gpt2_dialogue import END, MAX_LENGTH, OUTPUT, Exchange, joined, read_exchanges, small_gpt2


def test_perplexity_falls_epoch_by_epoch(tmp_path, capsys):
    result = gpt2_dialogue.main(
        [
            *("--exchanges", "400", "--epochs", "3", "--hidden", "32", "--layers", "1"),
            *("--learning-rate", "5e-3", "--output", str(tmp_path)),
        ]
    )
    losses = [loss for _, loss, _ in result["epochs"]]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert result["after"] < 0.4 * result["before"]
    printed = capsys.readouterr().out
    assert (
        "Exchanges: 50 test, 50 development, 400 training" in printed and "Perplexity on the test" in printed
    )
    assert isinstance(GPT2LMHeadModel.from_pretrained(tmp_path / "model"), GPT2LMHeadModel)
    assert OUTPUT in AutoTokenizer.from_pretrained(tmp_path / "model").all_special_tokens


def test_input_and_output_are_joined_and_cut():
    exchanges = [Exchange("How are you?", "Fine."), Exchange("word " * 300, "too far")]
    _, tokenizer = small_gpt2(exchanges, hidden=32, layers=1)
    short, long = joined(exchanges, tokenizer)["input_ids"]
    assert tokenizer.decode(short) == f"how are you?{OUTPUT}fine.{END}"
    assert len(long) == MAX_LENGTH


def test_chats_are_split_not_exchanges():
    exchanges = read_exchanges()
    assert len(exchanges["training"]) > 6 * len(exchanges["test"]) > 6 * 1000
    outputs = {name: {e.output for e in of if len(e.output.split()) > 12} for name, of in exchanges.items()}
    shared = outputs["training"] & outputs["test"]
    assert len(shared) < 0.01 * len(outputs["test"])


def test_a_pretrained_model_gets_the_marks(tmp_path):
    tiny.policy("gpt2").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, tokenizer = gpt2_dialogue.pretrained(str(tmp_path))
    assert (
        model.get_input_embeddings().num_embeddings
        == len(tokenizer)
        > tokenizer.convert_tokens_to_ids(OUTPUT)
    )


def test_help_says_what_is_used(capsys):
    with pytest.raises(SystemExit, match="0"):
        gpt2_dialogue.main(["--help"])
    assert "No GPT-2 weights install from PyPI" in capsys.readouterr().out
