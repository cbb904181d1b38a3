"""PPOTrainer: it learns, logs TRL's metrics, saves and resumes everything, and refuses what makes no sense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import backends
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, TrainerCallback

from fastppo import PPOConfig, PPOTrainer, models, score
from fastppo.checkpoint import load_actor_critic

WORDS = tiny.TEXT.split()
TEXTS = [{"prompt": " ".join(WORDS[i : i + 1 + i % 5]), "number": i} for i in range(24)]

TRL_METRICS = {
    "eps", "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
    "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
    "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode", "epoch",
}  # fmt: skip


def vowels(
    prompts: Any, completions: list[str], completion_ids: list[list[int]], **columns: Any
) -> list[float]:
    """Share of a response's tokens above 150: half at random, easy to raise."""
    return [sum(i > 150 for i in ids) / len(ids) for ids in completion_ids]


def trainer(tmp_path: Path, **changes: Any) -> PPOTrainer:
    parts = {
        "model": "llama",
        "ref_model": None,
        "reward_model": vowels,
        "train_dataset": TEXTS,
        "processing_class": tiny.tokenizer(),
        "value_model": None,
    }
    for name in [
        *parts,
        "eval_dataset",
        "peft_config",
        "callbacks",
        "data_collator",
        "reward_processing_classes",
        "optimizers",
        "ptx_dataset",
        "logits_processor",
        "value_peft_config",
    ]:
        if name in changes:
            parts[name] = changes.pop(name)
    if isinstance(parts["model"], str):
        parts["model"] = tiny.policy(parts["model"])  # type: ignore[assignment]
    settings = {"output_dir": str(tmp_path / "run"), **tiny.SETTINGS, "total_episodes": 16 * 3}
    return PPOTrainer(PPOConfig(**{**settings, **changes}), **parts)  # type: ignore[arg-type]


def last(run: PPOTrainer) -> dict[str, Any]:
    return next(h for h in reversed(run.state.log_history) if "objective/scores" in h)


@pytest.mark.parametrize("bf16", [False, True])
def test_learns_and_logs_trls_metrics(tmp_path: Path, bf16: bool) -> None:
    run = trainer(
        tmp_path, bf16=bf16, total_episodes=64 * 15, per_device_train_batch_size=32, learning_rate=5e-3, kl_coef=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    history = run.state.log_history
    assert len(history) == 15
    assert set(history[0]) >= TRL_METRICS
    assert history[0]["objective/kl"] == 0.0
    assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 0.15
    assert history[-1]["episode"] == 960 and history[-1]["step"] == 15


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_trains(tmp_path: Path, architecture: str) -> None:
    run = trainer(tmp_path, model=architecture, total_episodes=16, bf16=True, gradient_checkpointing=True)
    before = {n: p.detach().clone() for n, p in run.actor_critic.named_parameters()}
    run.train()
    moved = [n for n, p in run.actor_critic.named_parameters() if not torch.equal(p, before[n])]
    assert any("layers.0" in n or "h.0." in n for n in moved) and any("value_head" in n for n in moved)
    assert last(run)["sampling/sampling_logp_difference/mean"] < 0.02


def test_separate_models_as_a_trl_script_passes_them(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": tokenizer(r["prompt"])["input_ids"]} for r in TEXTS]
    run = trainer(
        tmp_path,
        processing_class=tokenizer,
        ref_model=tiny.policy(),
        reward_model=tiny.classifier(2),
        value_model=tiny.classifier(3),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        missing_eos_penalty=1.0,
        stop_token="eos",
    )
    run.train()
    assert set(last(run)) >= TRL_METRICS
    run.save_model(str(tmp_path / "saved"))
    again = load_actor_critic(tmp_path / "saved")
    assert again.value_model is not None
    for a, b in zip(again.parameters(), run.actor_critic.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_offloaded_models_visit_for_scoring_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def start(**changes: Any) -> PPOTrainer:
        run = trainer(
            tmp_path, ref_model=tiny.policy(seed=5), reward_model=[tiny.classifier(2), vowels], total_episodes=32,
            sync_ref_model=True, ref_model_sync_steps=1, **changes,
        )  # fmt: skip
        run.train()
        return run

    expected = start()
    assert events == []
    plain = models.visiting

    @contextmanager
    def visiting(model: Any, device: Any) -> Iterator[Any]:
        name = type(model).__name__.removeprefix("LlamaFor")
        events.append(f"{name} comes")
        with plain(model, device):
            yield model
        events.append(f"{name} goes")

    for module in (models, score):
        monkeypatch.setattr(module, "visiting", visiting)
    update = PPOTrainer._update
    monkeypatch.setattr(PPOTrainer, "_update", lambda *args: events.append("update") or update(*args))
    run = start(offload_ref_model=True, offload_reward_model=True)
    one_update = [
        "CausalLM comes", "CausalLM goes", "SequenceClassification comes", "SequenceClassification goes", "update",
    ]  # fmt: skip
    assert events == 2 * one_update
    for a, b in zip(expected.actor_critic.parameters(), run.actor_critic.parameters(), strict=True):
        assert torch.equal(a, b)


def test_chat_prompts_and_columns_reach_the_reward(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, number: Any) -> list[float]:
        seen.append({"prompts": prompts, "completions": completions, "number": number})
        return [0.5] * len(prompts)

    chats = [{"prompt": [{"role": "user", "content": r["prompt"]}], "number": r["number"]} for r in TEXTS]
    run = trainer(tmp_path, train_dataset=chats, reward_model=reward, total_episodes=16, num_generations=2)
    run.train()
    assert len(seen[0]["prompts"]) == 16
    assert seen[0]["prompts"][0] is seen[0]["prompts"][1]
    assert seen[0]["completions"][0][0]["role"] == "assistant"
    for prompt, number in zip(seen[0]["prompts"], seen[0]["number"], strict=True):
        assert prompt[0]["content"] == TEXTS[number]["prompt"]


def test_missing_eos_penalty_falls_on_truncated_responses(tmp_path: Path) -> None:
    run = trainer(tmp_path, reward_model=lambda completions, **_: [1.0] * len(completions), total_episodes=16,
                  missing_eos_penalty=3.0, stop_token_id=299)  # fmt: skip
    run.train()
    report = last(run)
    assert report["objective/scores"] == pytest.approx(1.0 - 3.0 * report["completions/clipped_ratio"])
    assert report["val/num_eos_tokens"] == round(16 * (1 - report["completions/clipped_ratio"]))


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_no_pad_token_or_pad_that_is_eos(tmp_path: Path, pad: str | None) -> None:
    padded, other = (
        trainer(tmp_path, processing_class=tiny.tokenizer(p), total_episodes=32) for p in ("<|pad|>", pad)
    )
    padded.train()
    other.train()
    for a, b in zip(padded.actor_critic.parameters(), other.actor_critic.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_lora_trains_only_the_adapter_against_the_bare_model(tmp_path: Path) -> None:
    import peft

    base = tiny.policy()
    frozen = {n: p.detach().clone() for n, p in base.named_parameters()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    run = trainer(tmp_path, model=base, peft_config=config, learning_rate=1e-2, gradient_checkpointing=True)
    assert run.ref_model is None
    run.train()
    assert run.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(last(run)["objective/kl"]) > 1e-4
    for name, p in run.actor_critic.policy.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(p.cpu(), frozen[name.replace(".base_layer", "")].cpu())
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved/adapter_model.safetensors").exists()


def test_lora_on_a_bfloat16_base(tmp_path: Path) -> None:
    import peft

    run = trainer(
        tmp_path, bf16=True, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4), total_episodes=16
    )
    dtypes = {n: p.dtype for n, p in run.actor_critic.named_parameters()}
    assert {d for n, d in dtypes.items() if "lora" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "base_layer" in n} == {torch.bfloat16}
    run.train()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_is_the_run_itself(tmp_path: Path, separate: bool, bf16: bool) -> None:
    def start(folder: str) -> PPOTrainer:
        return trainer(
            tmp_path / folder, bf16=bf16, total_episodes=16 * 4, save_strategy="steps", save_steps=2,
            value_model=tiny.classifier(3) if separate else None, ref_model=tiny.policy(),
        )  # fmt: skip

    straight = start("a")
    straight.train()
    resumed = start("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/run/checkpoint-2"))
    assert resumed.state.global_step == 4
    for a, b in zip(straight.actor_critic.parameters(), resumed.actor_critic.parameters(), strict=True):
        assert torch.equal(a, b)
    same = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "lr", "episode")
    assert {k: last(straight)[k] for k in same} == {k: last(resumed)[k] for k in same}


def test_checkpoints_rotate_and_leave_no_temporary_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    run.train()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    names = {p.name for p in (tmp_path / "run/checkpoint-3").iterdir()}
    assert names >= {
        "model.safetensors",
        "critic",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "tokenizer.json",
    }


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.save_model(str(tmp_path / "saved"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "saved").rglob("*")}
    monkeypatch.setattr(
        run.processing_class, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        run.save_model(str(tmp_path / "saved"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "saved").rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_saved_policy_and_value_head_load(tmp_path: Path) -> None:
    run = trainer(tmp_path, total_episodes=16)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    again = load_actor_critic(tmp_path / "saved")
    assert again.value_head is not None and run.actor_critic.value_head is not None
    assert torch.equal(again.value_head.weight, run.actor_critic.value_head.weight.cpu())
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(policy.lm_head.weight, run.actor_critic.policy.lm_head.weight.cpu())
    assert policy.config.use_cache is True


def test_evaluates_during_training_and_keeps_the_best(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_dataset=TEXTS[:6], eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_objective/scores", greater_is_better=True,
    )  # fmt: skip
    run.train()
    found = [h["eval_objective/scores"] for h in run.state.log_history if "eval_objective/scores" in h]
    assert len(found) == 3
    assert run.state.best_metric == max(found)
    assert run.evaluate()["eval_objective/scores"] == pytest.approx(max(found))
    assert run.evaluate({"x": TEXTS[:2]}).keys() >= {"eval_x_objective/kl"}


def test_completions_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, eval_dataset=TEXTS[:6], num_sample_generations=3)
    run.train()
    assert "Completions after 1 updates" in capsys.readouterr().out
    lines = (tmp_path / "run/completions/completions_00001.jsonl").read_text().splitlines()
    assert json.loads(lines[0]).keys() == {"query", "model response", "score", "kl", "length", "truncated"}
    rows = run.generate_completions()
    assert [r["query"] for r in rows] == [r["prompt"] for r in TEXTS[:6]]
    assert run.generate_completions() == rows


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tmp_path, report_to=["tensorboard"], total_episodes=32)
    import os

    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    run.train()
    (events,) = {p.parent for p in (tmp_path / "run").rglob("events.out.tfevents*")}
    log = EventAccumulator(str(events)).Reload()
    tags = log.Tags()["scalars"]
    assert any(t.endswith("objective/kl") for t in tags) and any(
        t.endswith("policy/clipfrac_avg") for t in tags
    )
    tag = next(t for t in tags if t.endswith("objective/scores"))
    assert [e.step for e in log.Scalars(tag)] == [1, 2]


def test_callbacks_can_stop_the_run(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    run = trainer(tmp_path, callbacks=[Stop()], total_episodes=16 * 5)
    run.train()
    assert run.state.global_step == 2


def test_two_runs_with_one_seed_are_one_run(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, seed=seed) for seed in (5, 5, 6)]
    for run in runs:
        run.train()
    weights = [run.actor_critic.policy.lm_head.weight for run in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_dataset": None}, ValueError, "train_dataset is required"),
        ({"train_dataset": []}, ValueError, "train_dataset must have at least one row"),
        (
            {"train_dataset": [{"text": "a"}]},
            ValueError,
            r"expected a column `prompt` .* got columns \['text'\]",
        ),
        ({"reward_model": None}, ValueError, "reward_model is required"),
        ({"reward_model": 3}, TypeError, "reward_model: expected a callable"),
        ({"processing_class": "gpt2"}, TypeError, "processing_class must be a tokenizer"),
        ({"value_model": "policy"}, TypeError, "expected a model with a `score` layer"),
        ({"num_mini_batches": 3}, ValueError, "must be a multiple of num_mini_batches"),
        ({"peft_config": {"r": 4}}, TypeError, "peft_config must be a peft.PeftConfig"),
        ({"eval_strategy": "steps"}, ValueError, "eval_dataset"),
        (
            {"offload_ref_model": True, "peft_config": "lora"},
            ValueError,
            "offload_ref_model needs a ref_model",
        ),
    ],
)
def test_bad_parts_are_named(tmp_path: Path, changes: dict[str, Any], error: Any, message: str) -> None:
    if changes.get("value_model") == "policy":
        changes = {"value_model": tiny.policy()}
    if changes.get("peft_config") == "lora":
        import peft

        changes = changes | {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=4)}
    with pytest.raises(error, match=message):
        trainer(tmp_path, **changes)


def test_a_model_that_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    class Quantizer:
        quantization_config = type("Config", (), {"quant_method": "gguf"})

        def is_serializable(self) -> bool:
            return False

    policy = tiny.policy()
    policy.hf_quantizer = Quantizer()
    with pytest.raises(
        ValueError, match="LlamaForCausalLM was loaded in a quantised format that cannot be saved"
    ):
        trainer(tmp_path, model=policy)


def test_same_model_and_reference_is_refused(tmp_path: Path) -> None:
    policy = tiny.policy()
    with pytest.raises(ValueError, match="must not be the same object"):
        trainer(tmp_path, model=policy, ref_model=policy)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": ""}], "prompt 0 must have at least one token"),
        ([{"input_ids": []}], "prompt 0 must have at least one token"),
        ([{"prompt": 7}], "prompt 0 must be text or a list of chat messages"),
        (
            [{"prompt": "the " * 80}],
            r"exceeds the model's context of 64; shorten it \(PPOConfig.max_prompt_length\)",
        ),
        ([{"input_ids": [400]}], "token id 400, outside the vocabulary of 307"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, train_dataset=rows).train()


def test_long_prompts_can_be_cut(tmp_path: Path) -> None:
    trainer(
        tmp_path, train_dataset=[{"prompt": "the quick " * 80}], max_prompt_length=20, total_episodes=16
    ).train()


def test_a_reward_that_raises_stops_the_run_with_the_prompt(tmp_path: Path) -> None:
    def reward(prompts: list[str], **_: Any) -> list[float]:
        raise OSError("judge is down")

    with pytest.raises(RuntimeError, match="reward raised OSError: judge is down; episode 0: prompt"):
        trainer(tmp_path, reward_model=reward).train()


def test_resume_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint=True: no checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("bf16", "iterations", "tolerance"),
    [
        (False, 2, 1e-3),
        (True, 1, 0.1),
    ],  # in bfloat16 a last bit decides a token, and the second goes its own way
)
def test_the_cuda_kernels_train_as_the_cpus_do(
    tmp_path: Path, bf16: bool, iterations: int, tolerance: float
) -> None:
    # Emulated, under the very same ops: the trainer never asks what its tensors lie on.
    def metrics(name: str) -> list[dict[str, Any]]:
        run = trainer(
            tmp_path / name,
            use_cpu=True,
            bf16=bf16,
            total_episodes=16 * iterations,
            temperature=0.7,
            kl_coef=0.1,
        )
        run.train()
        return [entry for entry in run.state.log_history if "objective/scores" in entry]

    on_cpu = metrics("cpu")
    with backends.emulated() as machine:
        machine.counts()
        on_cuda = metrics("cuda")
        assert machine.counts().launches > 50
    assert len(on_cpu) == len(on_cuda) == iterations
    for one, other in zip(on_cpu, on_cuda, strict=True):
        for name in TRL_METRICS - {"eps"}:  # episodes per second
            assert other[name] == pytest.approx(one[name], rel=tolerance, abs=1e-4), name
