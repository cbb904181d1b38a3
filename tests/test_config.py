"""PPOConfig: TRL's names and defaults, and an error for every value that makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import HfArgumentParser

from fastppo import PPOConfig

# TRL 1.12.0, trl.experimental.ppo.PPOConfig (checked against its source).
TRL_DEFAULTS = {
    "learning_rate": 3e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": True,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token": None,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "dataset_num_proc": None,
    "push_to_hub": False,
    "sft_model_path": "EleutherAI/pythia-160m",
    "reward_model_path": "EleutherAI/pythia-160m",
}


def config(**settings: Any) -> PPOConfig:
    return PPOConfig(**{"output_dir": "unused", "report_to": [], **settings})


def test_defaults_are_those_of_trl() -> None:
    got = config()
    assert {name: getattr(got, name) for name in TRL_DEFAULTS} == TRL_DEFAULTS


def test_no_autocast_with_bfloat16_weights() -> None:
    assert config().mixed_precision == "no"
    assert config(bf16=False).bf16 is False


def test_parses_from_the_command_line() -> None:
    words = ["--output_dir", "unused", "--top_p", "0.9", "--kl_estimator", "k3", "--stop_strings", "a", "b"]
    (got,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    assert (got.top_p, got.kl_estimator, got.stop_strings) == (0.9, "k3", ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"min_p": 2.0}, r"min_p must be None or in \[0, 1\], got 2.0"),
        ({"kl_estimator": "k9"}, "kl_estimator must be one of k1, abs, k2, k3, got 'k9'"),
        ({"stop_token": "dot"}, "stop_token must be None or 'eos', got 'dot'"),
        ({"stop_token": "eos", "stop_token_id": 3}, "set stop_token or stop_token_id, not both"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be None or a number above 0, got -1.0"),
        ({"response_length": 0}, "response_length must be an integer of at least 1, got 0"),
        (
            {"min_new_tokens": 9, "response_length": 8},
            r"min_new_tokens must be <= response_length \(8\), got 9",
        ),
        ({"stop_strings": ["ok", ""]}, "stop_strings must be None or a list of non-empty strings"),
        ({"fp16": True}, "fp16 is not supported"),
    ],
)
def test_bad_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_batch_sizes() -> None:
    got = config(
        per_device_train_batch_size=4, gradient_accumulation_steps=6, num_mini_batches=3, num_train_epochs=2
    )
    got.set_batch_sizes(100)
    assert (got.local_batch_size, got.batch_size, got.mini_batch_size, got.local_mini_batch_size) == (
        24,
        24,
        8,
        8,
    )
    assert (got.micro_batch_size, got.total_episodes, got.num_total_batches) == (4, 200, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mini_batches": 3}, r"\(8\) must be a multiple of num_mini_batches \(3\)"),
        ({"num_generations": 3}, r"\(8\) must be a multiple of num_generations \(3\)"),
    ],
)
def test_batches_that_do_not_divide(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(per_device_train_batch_size=8, **settings).set_batch_sizes(100)
