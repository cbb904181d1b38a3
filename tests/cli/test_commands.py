"""Each command on a random model of 60,000 parameters: what it writes, what it reports, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastppo.cli.__main__ import main
from fastppo.cli.reward import conversations, scores
from fastppo.cli.rewards import sentiment
from fastppo.score import ClassifierReward, Episodes

SFT = [
    "--model",
    "random-tiny",
    "--max_length",
    "64",
    "--per_device_train_batch_size",
    "4",
    "--max_steps",
    "4",
]
SFT += ["--learning_rate", "1e-2", "--gradient_checkpointing", "false", "--logging_steps", "1"]
REWARD = [
    "--model",
    "random-tiny",
    "--max_steps",
    "4",
    "--gradient_checkpointing",
    "false",
    "--logging_steps",
    "1",
]
PPO = ["--total_episodes", "16", "--response_length", "6", "--per_device_train_batch_size", "8"]
PPO += ["--gradient_checkpointing", "false", "--learning_rate", "1e-3"]


def run(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    heard = capsys.readouterr().out
    assert heard.count("\n") == 1  # one JSON object and nothing else
    return json.loads(heard)


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """An SFT model and a reward model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPPO_CACHE", str(folder / "cache"))
        data = ["--dataset", files["dialogues"], "--eval_dataset", files["dialogues"]]
        assert main(["sft", *SFT, *data, "--output_dir", str(folder / "sft")]) == 0
        data = ["--dataset", files["preferences"], "--eval_dataset", files["preferences"]]
        assert main(["reward", *REWARD, *data, "--output_dir", str(folder / "reward")]) == 0
    return folder


def test_sft_lowers_the_perplexity_and_says_so(files, tmp_path, capsys):
    data = ["--dataset", files["dialogues"], "--eval_dataset", files["dialogues"], "--eval_rows", "8"]
    report = run(capsys, "sft", *SFT, *data, "--output_dir", str(tmp_path / "sft"))
    assert report["steps"] == 4 and report["tokens"] > 100 and report["held_out_texts"] == 8
    before, after = report["perplexity_before"], report["perplexity_after"]
    assert after["value"] < before["value"] and before["low"] < before["value"] < before["high"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template
    assert not list((tmp_path / "sft").glob("checkpoint-*"))
    log = [json.loads(line) for line in (tmp_path / "sft" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_that_stopped_goes_on_from_its_newest_checkpoint(files, tmp_path, capsys):
    out = str(tmp_path / "sft")
    flags = ["sft", *SFT, "--dataset", files["dialogues"], "--output_dir", out, "--keep_checkpoints"]
    flags += ["--save_steps", "2"]
    first = run(capsys, *flags)
    assert first["resumed_from"] is None
    whole = load_file(tmp_path / "sft" / "model.safetensors")
    (tmp_path / "sft" / "model.safetensors").unlink()
    (tmp_path / "sft" / "checkpoint-4" / "trainer_state.json").write_text(
        '{"global'
    )  # killed while it was written
    second = run(capsys, *flags, "--resume_from_checkpoint", "auto")
    assert second["resumed_from"].endswith("checkpoint-2") and second["steps"] == 4
    for name, weights in load_file(tmp_path / "sft" / "model.safetensors").items():
        torch.testing.assert_close(weights, whole[name])
    assert main([*flags, "--resume_from_checkpoint", str(tmp_path)]) == 2
    assert "expected 'auto' or a checkpoint folder" in capsys.readouterr().err


def test_reward_from_preferences(files, tmp_path, capsys):
    data = ["--dataset", files["preferences"], "--eval_dataset", files["preferences"]]
    report = run(
        capsys, "reward", *REWARD, *data, "--output_dir", str(tmp_path / "r"), "--group_column", "starter"
    )
    assert report["kind"] == "preferences" and report["measured_rows"] == 24
    assert {"accuracy", "accuracy of length", "gain over sentiment"} <= set(report["measured"])
    assert report["measured"]["accuracy of length"]["value"] == 1.0  # the chosen ones are longer
    assert_standardized(tmp_path / "r", files["preferences"])


def assert_standardized(folder: Path, data: str) -> None:
    """The saved model gives held-out texts the standard deviation 1; a decoder's layer has no bias to shift."""
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.truncation_side == "left"  # the end of a long chat is kept
    texts = conversations(
        tokenizer, [None] * 2 * len(rows), [r[k] for k in ("chosen", "rejected") for r in rows]
    )
    given = torch.tensor(scores(model, tokenizer, texts))
    assert given.std().item() == pytest.approx(1.0, abs=1e-3)


def test_reward_from_ratings(files, tmp_path, capsys):
    flags = ["reward", *REWARD, "--dataset", files["ratings"], "--output_dir", str(tmp_path / "r")]
    report = run(capsys, *flags, "--rating_min", "-3", "--rating_max", "3", "--frozen_layers", "1")
    assert report["kind"] == "ratings" and report["measured_on"] == "training rows"
    assert {"pearson", "spearman", "gain over length"} <= set(report["measured"])
    assert main([*flags, "--rating_max", "2"]) == 2
    assert "row 6: expected a number of at most 2, got 3.0" in capsys.readouterr().err
    assert main([*flags, "--frozen_layers", "9"]) == 2
    assert "frozen_layers must lie in 0..2, got 9" in capsys.readouterr().err


def test_the_reward_model_reads_in_training_what_it_reads_in_ppo(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(trained / "reward")
    prompt, reply = [{"role": "user", "content": "how are you"}], [{"role": "assistant", "content": "fine"}]
    in_ppo = ClassifierReward(model, tokenizer, 4).token_ids(Episodes([prompt], [reply], [[1]], [[1]]))
    for given in ((None, prompt + reply), (prompt, reply), (prompt, "fine"), ("how are you", reply)):
        assert tokenizer(conversations(tokenizer, *zip(given, strict=True)))["input_ids"] == in_ppo, given
    assert conversations(tokenizer, ["how ", None], ["are", "you"]) == ["how are", "you"]


def test_ppo_trains_against_a_weighted_sum_and_keeps_its_average(trained, files, tmp_path, capsys):
    report = run(
        capsys,
        *("ppo", "--model", str(trained / "sft"), "--dataset", files["prompts"], *PPO),
        *("--reward", str(trained / "reward"), "vader", "--reward_weights", "0.5", "2"),
        *(
            "--ptx_dataset",
            files["dialogues"],
            "--ptx_coef",
            "0.1",
            "--ptx_batch_size",
            "2",
            "--ema_decay",
            "0.9",
        ),
        *("--output_dir", str(tmp_path / "ppo"), "--save_steps", "1"),
    )
    assert report["updates"] == 2 and report["episodes"] == 16
    log = [json.loads(line) for line in (tmp_path / "ppo" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2]
    parts = [log[0][f"rewards/{name}/mean"] for name in report["reward_metrics"].values()]
    assert log[0]["objective/scores"] == pytest.approx(0.5 * parts[0] + 2 * parts[1], abs=1e-5)
    assert list(report["reward_metrics"]) == ["reward", "vader"]
    for folder in (tmp_path / "ppo", tmp_path / "ppo" / "ema"):
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    assert not list((tmp_path / "ppo").glob("checkpoint-*"))

    evaluation = run(
        capsys,
        *("eval", "--model", str(tmp_path / "ppo"), "--ref_model", str(trained / "sft"), "--split", "train"),
        *("--dataset", files["prompts"], "--reward", str(trained / "reward"), "vader", "--judge", "vader"),
        *("--texts", files["dialogues"], "--text_rows", "4", "--response_length", "6"),
        *("--output_dir", str(tmp_path / "eval"), "--ema"),
    )
    assert evaluation["prompts"] == 16 and evaluation["judge"] == "vader_2"
    assert evaluation["ref_model"]["kl"]["value"] == 0.0 < evaluation["model"]["kl"]["value"]
    gain = (
        evaluation["model"]["scores"]["total"]["value"] - evaluation["ref_model"]["scores"]["total"]["value"]
    )
    assert evaluation["gain"]["total"]["value"] == pytest.approx(gain, abs=1e-6)
    assert set(evaluation["perplexity"]) == {"ref_model", "model"}
    samples = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and set(samples[0]["model"]["scores"]) == {
        "reward",
        "vader",
        "vader_2",
        "total",
    }
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["gain"] == evaluation["gain"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--reward", "json:nothing"],
            "--reward json:nothing: expected module:function that can be imported",
        ),
        (["--reward", "math:pi"], "--reward math:pi: expected a function, got float"),
        (["--reward", "./nowhere"], "reward: expected a folder with config.json, got ./nowhere"),
        (["--reward", "vader", "--response_length", "600"], "expected at most -88 tokens"),
        (
            ["--reward", "vader", "--max_prompt_length", "510"],
            "max_prompt_length + response_length must be at most",
        ),
        (
            ["--reward", "vader", "--reward_weights", "1", "2"],
            "reward_weights must have one number per reward (1)",
        ),
        (["--reward", "vader", "--ptx_coef", "0.1"], "ptx_coef and ptx_dataset need each other"),
        (["--reward", "vader", "--kl_coef", "-1"], "kl_coef must be a number of at least 0"),
    ],
)
def test_what_ppo_refuses(trained, files, tmp_path, capsys, flags, message):
    given = [
        "--model",
        str(trained / "sft"),
        "--dataset",
        files["prompts"],
        "--output_dir",
        str(tmp_path / "x"),
    ]
    assert main(["ppo", *given, *PPO, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x" / "model.safetensors").exists()


def test_a_function_is_a_reward(trained, files, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions, **_): return [1.5] * len(prompts)\n"
    )
    given = [
        "--model",
        str(trained / "sft"),
        "--dataset",
        files["prompts"],
        "--output_dir",
        str(tmp_path / "x"),
    ]
    report = run(capsys, "ppo", *given, *PPO, "--reward", "my_rewards:short")
    assert report["reward_first"] == report["reward_last"] == 1.5


def test_sentiment_reads_text_and_chats():
    text = ["I love this!", "I hate this.", ""]
    chat = [[{"role": "assistant", "content": t}] for t in text]
    given = sentiment()(prompts=["p"] * 3, completions=text)
    assert given == sentiment()(prompts=["p"] * 3, completions=chat)
    assert given[0] > 0.5 and given[1] < -0.5 and given[2] == 0.0
