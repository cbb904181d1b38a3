"""PPOConfig: TRL's names and defaults, and an error for every value that makes no sense."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from fastppo import PPOConfig
from fastppo.objective import Objective

# TRL 1.12.0, trl.experimental.ppo.PPOConfig (checked against its source).
TRL_DEFAULTS = {
    "learning_rate": 3e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
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


def test_bfloat16_is_the_default_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastppo.config.multiplies_bfloat16", lambda use_cpu: True)
    assert config().bf16 is True
    monkeypatch.setattr("fastppo.config.multiplies_bfloat16", lambda use_cpu: False)
    assert config().bf16 is False
    with pytest.warns(UserWarning, match="bf16=True on a device that has no instructions"):
        assert config(bf16=True).bf16 is True


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
        ({"kl_estimator": "k9"}, "kl_estimator must be one of k1, abs, k2, k3, full, got 'k9'"),
        ({"stop_token": "dot"}, "stop_token must be None or 'eos', got 'dot'"),
        ({"stop_token": "eos", "stop_token_id": 3}, "set stop_token or stop_token_id, not both"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"environment_timeout": 0}, "environment_timeout must be None or a number above 0, got 0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be None or a number above 0, got -1.0"),
        ({"response_length": 0}, "response_length must be an integer of at least 1, got 0"),
        (
            {"min_new_tokens": 9, "response_length": 8},
            r"min_new_tokens must be <= response_length \(8\), got 9",
        ),
        ({"stop_strings": ["ok", ""]}, "stop_strings must be None or a list of non-empty strings"),
        ({"fp16": True}, "fp16 is not supported"),
        ({"epsilon_high": 0.0}, "epsilon_high must be None or a number above 0, got 0.0"),
        ({"delta": 1.2}, r"delta must be None or a number above 1 \+ the clip range \(1.2\), got 1.2"),
        ({"delta": 1.3, "epsilon_high": 0.5}, r"delta must be None or a number above 1 .* \(1.5\), got 1.3"),
        ({"entropy_coef": -0.1}, "entropy_coef must be a number of at least 0, got -0.1"),
        ({"entropy_target": float("inf")}, "entropy_target must be a number of at least 0, got inf"),
        ({"entropy_coef_delta": -1}, "entropy_coef_delta must be a number of at least 0, got -1"),
        ({"entropy_coef_max": True}, "entropy_coef_max must be a number of at least 0, got True"),
        ({"entropy_coef_min": 2.0}, r"entropy_coef_min must be <= entropy_coef_max \(1.0\), got 2.0"),
        (
            {"use_adaptive_entropy": True, "entropy_coef": 0.5, "entropy_coef_max": 0.1},
            r"entropy_coef must be in \[entropy_coef_min, entropy_coef_max\] = \[0.0, 0.1\], got 0.5",
        ),
        ({"beta": -0.1}, "beta must be a number of at least 0, got -0.1"),
        ({"kl_loss_estimator": "k1"}, "kl_loss_estimator must be one of k2, k3, got 'k1'"),
        ({"target": 0}, "target must be a number above 0, got 0"),
        ({"horizon": -5}, "horizon must be a number above 0, got -5"),
        ({"adap_kl_ctrl": True, "kl_coef": 0.0}, "adap_kl_ctrl multiplies kl_coef, which must be above 0"),
        ({"use_score_norm": True}, "use_score_norm needs use_score_scaling=True"),
        ({"lam_critic": 1.5}, r"lam_critic must be None or in \[0, 1\], got 1.5"),
        ({"critic_warmup_updates": -1}, "critic_warmup_updates must be an integer of at least 0, got -1"),
        ({"importance_sampling_cap": 0.0}, "importance_sampling_cap must be a number above 0, got 0.0"),
        ({"ratio_threshold": 1.0}, "ratio_threshold must be None or a number above 1, .* got 1.0"),
        ({"ptx_coef": -1.0}, "ptx_coef must be a number of at least 0, got -1.0"),
        ({"ptx_batch_size": 0}, "ptx_batch_size must be None or an integer >= 1, got 0"),
        ({"ptx_max_length": 1}, "ptx_max_length must be an integer of at least 2, got 1"),
        ({"ema_decay": 1.0}, r"ema_decay must be None or in \(0, 1\), got 1.0"),
        ({"ref_model_mixup_alpha": 1.1}, r"ref_model_mixup_alpha must be in \[0, 1\], got 1.1"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be an integer of at least 1, got 0"),
        (
            {"loss_aggregation": "grpo"},
            "loss_aggregation must be one of token, sequence, constant, got 'grpo'",
        ),
        ({"old_logprobs": "sampled"}, "old_logprobs must be one of recompute, rollout, got 'sampled'"),
        (
            {"old_logprobs": "rollout", "repetition_penalty": 1.1},
            "old_logprobs='rollout' needs repetition_penalty=1, got 1.1: it changes the logits that are sampled from",
        ),
        (
            {"old_logprobs": "rollout", "min_new_tokens": 2},
            "old_logprobs='rollout' needs min_new_tokens=0, got 2",
        ),
        (
            {"reuse_scoring_forward": True, "num_mini_batches": 2},
            "reuse_scoring_forward needs num_mini_batches=1, got 2: the second step of an epoch finds other weights",
        ),
        ({"cuda_graphs": True}, "cuda_graphs needs a CUDA device, got use_cpu=True"),
        ({"reuse_scoring_forward": 1}, "reuse_scoring_forward must be True or False, got 1"),
        (
            {"old_logprobs": "rollout", "importance_sampling_correction": True},
            "importance_sampling_correction weighs recomputed log-probs against the rollout's",
        ),
        ({"sync_ref_model": "no"}, "sync_ref_model must be True or False, got 'no'"),
    ],
)
def test_bad_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_the_options_are_off_by_default() -> None:
    assert config().objective() == Objective(
        clip_range=0.2, value_clip_range=0.2, vf_coef=0.1, aggregation="token", response_length=53
    )


def test_the_objective_has_the_settings() -> None:
    got = config(
        cliprange=0.1, epsilon_high=0.28, delta=4.0, cliprange_value=0.3, vf_coef=0.5, entropy_coef=0.01, beta=0.02,
        kl_loss_estimator="k2", loss_aggregation="constant", response_length=9, ptx_coef=0.7, target_kl=0.6,
        ratio_threshold=10.0,
    ).objective()  # fmt: skip
    assert got == Objective(0.1, 0.28, 4.0, 0.3, 0.5, 0.01, 0.02, "k2", "constant", 9, 0.7, 0.6, 10.0)


def test_every_option_is_explained() -> None:
    own = [f for f in fields(PPOConfig) if "help" in f.metadata and f.name in PPOConfig.__annotations__]
    assert all(f.metadata["help"].endswith((".", "never")) or ";" in f.metadata["help"] for f in own)
    names = [f.name for f in own]
    variants = names[names.index("epsilon_high") :]
    page = (Path(__file__).resolve().parents[1] / "docs" / "algorithm-options.md").read_text()
    for name in variants:
        assert f"`{name}`" in page, f"docs/algorithm-options.md does not say what {name} does"
    for name in re.findall(r"^\| `([a-z_]+)`", page, re.MULTILINE):
        assert name in names, f"docs/algorithm-options.md explains {name}, which PPOConfig does not have"


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
