"""The options of the algorithm in whole runs: each reaches the training, the log and the checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from test_trainer import TEXTS, last, trainer, vowels
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fastppo import PPOConfig, PPOTrainer, models
from fastppo.batch import micro_batches
from fastppo.cache import why_no_slots

SUPERVISED = [{"text": line} for line in tiny.TEXT.splitlines()]
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]

# Everything that adapts or has a state, at once. kl_coef and the target are such that every controller moves.
EVERYTHING: dict[str, Any] = {
    "epsilon_high": 0.28, "delta": 3.0, "entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 9.0,
    "beta": 0.05, "kl_estimator": "full", "adap_kl_ctrl": True, "target": 0.5, "horizon": 100.0,
    "use_score_scaling": True, "use_score_norm": True, "reward_clip": 2.0, "mask_truncated_completions": True,
    "lam_critic": 1.0, "critic_warmup_updates": 1, "importance_sampling_correction": True, "ratio_threshold": 50.0,
    "ptx_coef": 0.1, "ptx_dataset": SUPERVISED, "ptx_batch_size": 1, "ema_decay": 0.9, "sync_ref_model": True,
    "ref_model_sync_steps": 1, "loss_aggregation": "sequence", "num_ppo_epochs": 2,
}  # fmt: skip

METRICS = {
    "objective/kl_coef", "policy/entropy_coef", "loss/kl_avg", "loss/ptx_avg", "policy/skipped_steps",
    "objective/scores_running_mean", "objective/scores_running_std", "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/max",
}  # fmt: skip


def everything(folder: Path, **changes: Any) -> PPOTrainer:
    run = trainer(folder, ref_model=tiny.policy(), **EVERYTHING, **changes)
    # So many stop tokens that about half of the responses end by themselves.
    run.sampling = replace(run.sampling, stop_token_ids=tuple(range(0, tiny.VOCABULARY, 10)))
    return run


def weights(run: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.actor_critic.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(("separate", "bf16"), [(False, False), (True, True)])
def test_a_run_with_everything_logs_it_and_resumes_exactly(
    tmp_path: Path, separate: bool, bf16: bool
) -> None:
    def start(folder: str) -> PPOTrainer:
        return everything(
            tmp_path / folder, total_episodes=16 * 4, save_strategy="steps", save_steps=2, bf16=bf16,
            value_model=tiny.classifier(3) if separate else None,
        )  # fmt: skip

    straight = start("a")
    policy = weights(straight)["policy.lm_head.weight"]
    straight.train()
    log = straight.state.log_history
    assert set(last(straight)) >= METRICS
    assert (
        log[0]["loss/policy_avg"] == 0.0 and log[1]["loss/policy_avg"] != 0.0
    )  # the first only warmed the critic up
    assert not torch.equal(policy, weights(straight)["policy.lm_head.weight"])
    state = json.loads((tmp_path / "a/run/checkpoint-4/controllers.json").read_text())
    assert state["kl_coef"]["value"] != 0.05 and state["score_scale"]["count"] > 0
    assert state["entropy_coef"]["coef"] == pytest.approx(
        0.01 + 3 * 0.005
    )  # three updates of a policy below 9 nats

    resumed = start("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/run/checkpoint-2"))
    assert same(weights(straight), weights(resumed))
    assert json.loads((tmp_path / "b/run/checkpoint-4/controllers.json").read_text()) == state
    assert straight.ema is not None and resumed.ema is not None
    assert same(straight.ema.weights, resumed.ema.weights)
    assert same(dict(straight.ref_model.named_parameters()), dict(resumed.ref_model.named_parameters()))
    timed = ("time/", "eps", "tokens_per_second", "total_flos", "train_runtime")
    ends = [{k: v for k, v in last(r).items() if not k.startswith(timed)} for r in (straight, resumed)]
    assert ends[0] == ends[1]


# --- KL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # gemma3 caps its logits
def test_full_kl_is_that_of_the_whole_distributions(tmp_path: Path, architecture: str) -> None:
    run = trainer(
        tmp_path, model=architecture, ref_model=tiny.policy(architecture, seed=5), kl_estimator="full", temperature=1.3
    )  # fmt: skip
    episodes = run._rollout(next(run._prompt_batches()))
    got = run._evaluate_tokens(episodes).kl
    assert got is not None and run.ref_model is not None
    for row, (prompt, response) in enumerate(zip(episodes.prompt_ids, episodes.completions(), strict=True)):
        ids = torch.tensor([prompt + response])
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        with torch.no_grad():
            p, q = (
                (m(input_ids=ids).logits[0, places] / 1.3).log_softmax(-1)
                for m in (run._policy(), run.ref_model)
            )
        expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(got[row, : len(response)], expected, atol=1e-4, rtol=1e-4)
        assert not got[row, len(response) :].any()


def test_full_kl_by_hand() -> None:
    head = models.LMHead(torch.eye(2), None, None, 1.0)
    odds = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    kl = models.full_kl(head, odds, head, odds[[1, 1]], 1.0)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(kl, torch.stack([expected, torch.tensor(0.0)]))


def test_kl_coef_follows_the_logged_kl(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, ref_model=tiny.policy(seed=5), adap_kl_ctrl=True, kl_coef=0.1, target=1e-3, horizon=160,
        total_episodes=16 * 3,
    )  # fmt: skip
    run.train()
    log = run.state.log_history
    assert all(
        h["objective/kl"] > 2e-3 for h in log
    )  # so the error is cut to 0.2, and 16 of 160 episodes: + 2 %
    assert [h["objective/kl_coef"] for h in log] == pytest.approx([0.1, 0.1 * 1.02, 0.1 * 1.02**2])
    assert log[1]["objective/non_score_reward"] == pytest.approx(-0.102 * log[1]["objective/kl"])


def test_kl_in_the_loss_alone_holds_the_policy_back(tmp_path: Path) -> None:
    kl = []
    for beta in (0.0, 10.0):
        run = trainer(tmp_path, kl_coef=0.0, beta=beta, total_episodes=16 * 4, ref_model=tiny.policy())
        run.train()
        assert ("loss/kl_avg" in last(run)) == (beta > 0)
        kl.append(abs(last(run)["objective/kl"]))
    assert kl[1] < kl[0] / 3


# --- advantages and entropy ----------------------------------------------------------------------------------------


def test_importance_weights_and_the_critics_lambda_reach_the_advantages(tmp_path: Path) -> None:
    plain = trainer(tmp_path, num_generations=2)
    run = trainer(
        tmp_path,
        num_generations=2,
        importance_sampling_correction=True,
        importance_sampling_cap=1.5,
        lam_critic=1.0,
    )
    episodes = run._rollout(next(run._prompt_batches()))
    mask = episodes.response_mask
    tokens = run._evaluate_tokens(episodes)
    tokens = tokens._replace(values=torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)))
    scores = torch.arange(16.0)
    # The generating path says half as likely: 2, capped to 1.5; for odd episodes twice as likely: 0.5.
    factor = torch.tensor([0.5, 2.0] * 8)[:, None]
    episodes.logprobs = tokens.logprobs + factor.log()
    expected, none = plain._advantages(episodes, tokens, scores)
    got, weights = run._advantages(episodes, tokens, scores)
    assert none is None and weights is not None
    wanted = torch.tensor([1.5, 0.5] * 8)[:, None]
    torch.testing.assert_close(got.advantages, expected.advantages * wanted)
    torch.testing.assert_close(weights[mask], wanted.expand_as(mask)[mask])
    # Undiscounted Monte Carlo returns: what is still to come.
    to_come = got.rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(got.returns, to_come.masked_fill(~mask, 0.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected.returns, got.returns, atol=1e-2)


def test_the_adapted_entropy_coefficient_reaches_the_loss(tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path, use_adaptive_entropy=adaptive, entropy_target=9.0) for adaptive in (False, True)
    ]
    for run in runs:
        run.train()
    fixed, adaptive = (run.state.log_history for run in runs)
    assert [h["policy/entropy_coef"] for h in adaptive] == pytest.approx([0.0, 0.005, 0.01])
    assert (
        adaptive[0]["grad_norm"] == fixed[0]["grad_norm"]
        and adaptive[1]["grad_norm"] != fixed[1]["grad_norm"]
    )


# --- old log-probs of the rollout --------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kl_estimator", ["k1", "full"])
def test_the_rollouts_logprobs_train_as_recomputed_ones(
    tmp_path: Path, separate: bool, kl_estimator: str
) -> None:
    runs = [
        trainer(
            tmp_path, old_logprobs=source, temperature=0.7, top_p=0.9, top_k=50, ref_model=tiny.policy(seed=5),
            kl_estimator=kl_estimator, value_model=tiny.classifier(3) if separate else None, total_episodes=32,
        )
        for source in ("recompute", "rollout")
    ]  # fmt: skip
    for run in runs:
        run.train()
    one, other = (run.state.log_history[:2] for run in runs)
    for i in range(2):
        gap = {k: v for k, v in one[i].items() if k.startswith("sampling/")}
        assert 0 < gap["sampling/sampling_logp_difference/max"] < 1e-4
        first = {k: v for k, v in other[i].items() if k.startswith("sampling/")}
        assert first.keys() == {f"sampling/first_step/{x}" for x in ("ratio", "ratio_max", "approx_kl")}
        assert first["sampling/first_step/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert first["sampling/first_step/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert first["sampling/first_step/approx_kl"] < 1e-9
        for name in ("objective/kl", "objective/entropy", "loss/policy_avg", "loss/value_avg", "val/ratio"):
            assert other[i][name] == pytest.approx(one[i][name], rel=1e-3, abs=1e-4), name
    for name, p in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], p, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("separate", "kl_estimator", "trunk", "head"),
    [(True, "k1", 0, 0), (False, "k1", 1, 0), (True, "full", 1, 0)],
)
def test_the_rollouts_logprobs_save_the_policys_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate: bool, kl_estimator: str, trunk: int, head: int
) -> None:
    seen: list[str] = []
    plain = models.predicting_states, models.head_logprobs

    def predicting_states(model: Any, *args: Any) -> Any:
        seen.append("trunk" if model is run._policy() else "reference")
        return plain[0](model, *args)

    def head_logprobs(model: Any, *args: Any) -> Any:
        seen.append("head" if model is run._policy() else "reference")
        return plain[1](model, *args)

    run = trainer(
        tmp_path, old_logprobs="rollout", kl_estimator=kl_estimator, ref_model=tiny.policy(seed=5),
        value_model=tiny.classifier(3) if separate else None,
    )  # fmt: skip
    episodes = run._rollout(next(run._prompt_batches()))
    monkeypatch.setattr(models, "predicting_states", predicting_states)
    monkeypatch.setattr(models, "head_logprobs", head_logprobs)
    tokens = run._evaluate_tokens(episodes, "rollout")
    assert (seen.count("trunk"), seen.count("head")) == (trunk, head) and seen.count("reference") == 2
    assert torch.equal(tokens.logprobs, episodes.logprobs)


def test_the_first_ratio_shows_a_gap_between_sampling_and_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, old_logprobs="rollout", total_episodes=16)
    plain = run._rollout

    def another_engine(batch: Any) -> Any:
        episodes = plain(batch)
        episodes.logprobs -= 0.1 * episodes.response_mask
        return episodes

    run._rollout = another_engine  # type: ignore[method-assign]
    run.train()
    assert last(run)["sampling/first_step/ratio"] == pytest.approx(1.1052, abs=1e-3)  # e^0.1
    assert last(run)["sampling/first_step/approx_kl"] == pytest.approx(0.005, rel=1e-2)  # 0.1² / 2


def test_rollout_logprobs_of_processed_logits_are_refused(tmp_path: Path) -> None:
    from transformers import TemperatureLogitsWarper

    with pytest.raises(ValueError, match="old_logprobs='rollout' needs a rollout without logits_processor"):
        trainer(tmp_path, old_logprobs="rollout", logits_processor=[TemperatureLogitsWarper(2.0)])


# --- the scoring's forward as the first step's -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_free": False},
        {"gradient_checkpointing": True, "mask_truncated_completions": True, "missing_eos_penalty": 0.5},
        {"kl_estimator": "full", "loss_aggregation": "sequence", "entropy_coef": 0.1, "beta": 0.1},
        {"old_logprobs": "rollout", "critic_warmup_updates": 1},
        {"ptx_coef": 0.1, "ptx_dataset": SUPERVISED, "micro_batch_tokens": 40},
        {"bf16": True, "target_kl": 1e-4},
    ],
    ids=lambda changes: ", ".join(changes),
)
@pytest.mark.parametrize("critic", ["head", "model", "adapters"])
def test_the_scorings_forward_trains_as_one_of_its_own(
    tmp_path: Path, critic: str, changes: dict[str, Any]
) -> None:
    logs, trained = [], []
    for reuse in (False, True):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "head": {"ref_model": tiny.policy(seed=5)},
            "model": {"ref_model": tiny.policy(seed=5), "value_model": tiny.classifier(3)},
            "adapters": {"peft_config": LORA, "value_peft_config": LORA},
        }[critic]
        run = trainer(
            tmp_path / str(reuse), reuse_scoring_forward=reuse, num_ppo_epochs=2, total_episodes=32, **parts, **changes
        )  # fmt: skip
        # Some responses end by themselves, so that lengths differ.
        run.sampling = replace(run.sampling, stop_token_ids=tuple(range(0, tiny.VOCABULARY, 10)))
        run.train()
        logs.append(run.state.log_history[:2])
        trained.append(weights(run))
    rough = 2e-2 if changes.get("bf16") else 1e-3
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=rough, abs=rough / 10), name
        assert other["policy/optimizer_steps"] == one["policy/optimizer_steps"]
    for name, p in trained[0].items():
        torch.testing.assert_close(
            trained[1][name], p, atol=2e-3 if rough > 1e-3 else 2e-4, rtol=rough, msg=name
        )


@pytest.mark.parametrize("separate", [False, True])
def test_the_scorings_forward_saves_one_of_policy_and_critic(tmp_path: Path, separate: bool) -> None:
    run = trainer(
        tmp_path, reuse_scoring_forward=True, num_ppo_epochs=3, total_episodes=16, ref_model=tiny.policy(seed=5),
        value_model=tiny.classifier(3) if separate else None,
    )  # fmt: skip
    assert why_no_slots(run._policy()) is None  # it tries the policy once
    calls: list[int] = []
    for number, trunk in enumerate(run.actor_critic.trunks):
        trunk.register_forward_pre_hook(
            lambda *x, n=number: calls.append(n) if not x[2]["use_cache"] else None, with_kwargs=True
        )
    update, seen = run._update, []

    def watched(episodes: Any, tokens: Any, result: Any, scored: Any) -> Any:
        assert sum(len(x.batch.tokens) for x in scored) == int(episodes.response_mask.sum())
        seen.append([len(x.by_network) for x in scored])
        report = update(episodes, tokens, result, scored)
        assert not any(x.by_network for x in scored)  # the graphs are gone
        assert not run.actor_critic.training
        return report

    run._update = watched  # type: ignore[method-assign]
    run.train()
    assert seen == [[1 + separate] * 2]  # two micro-batches of eight episodes
    assert [calls.count(n) for n in range(1 + separate)] == [3 * 2] * (1 + separate)


def test_the_first_ratio_of_a_reused_forward_is_1(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, reuse_scoring_forward=True, num_ppo_epochs=1, total_episodes=16, padding_free=False
    )
    run.train()
    assert last(run)["val/ratio"] == 1.0 and last(run)["policy/approxkl_avg"] == 0.0


def test_reuse_under_ddp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="reuse_scoring_forward needs one process, got 2"):
        trainer(tmp_path, reuse_scoring_forward=True)


# --- scores --------------------------------------------------------------------------------------------------------


def test_normalised_scores_know_neither_scale_nor_shift(tmp_path: Path) -> None:
    def larger(**columns: Any) -> list[float]:
        return [64 * x + 32 for x in vowels(**columns)]

    found = []
    for reward in (vowels, larger):
        run = trainer(
            tmp_path, reward_model=reward, kl_coef=0.0, use_score_scaling=True, use_score_norm=True, optim="sgd",
            learning_rate=0.1,
        )  # fmt: skip
        run.train()
        found.append(run)
    one, other = (weights(run) for run in found)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3, msg=name)
    assert last(found[1])["objective/scores"] == pytest.approx(
        64 * last(found[0])["objective/scores"] + 32, rel=1e-3
    )


def test_a_run_of_truncated_responses_alone_learns_nothing_when_they_are_masked(tmp_path: Path) -> None:
    run = trainer(tmp_path, mask_truncated_completions=True, total_episodes=32)
    run.sampling = replace(run.sampling, stop_token_ids=())
    before = weights(run)
    run.train()
    assert same(before, weights(run))
    report = last(run)
    assert (report["completions/clipped_ratio"], report["policy/optimizer_steps"]) == (1.0, 0.0)
    assert report["completions/mean_length"] == 6.0


# --- supervised texts, averages, references ------------------------------------------------------------------------


def test_supervised_texts_are_learnt(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, ptx_coef=1.0, ptx_dataset=SUPERVISED, total_episodes=16 * 6, lr_scheduler_type="constant"
    )
    run.train()
    log = [h["loss/ptx_avg"] for h in run.state.log_history]
    assert log[-1] < log[0] - 1.0


def test_supervised_rows_may_be_chats_or_ids_and_are_cut(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    run = trainer(tmp_path, ptx_coef=1.0, ptx_dataset=CHATS, ptx_batch_size=1, ptx_max_length=5)
    chat = tokenizer.apply_chat_template(CHATS[0]["messages"], return_dict=False)
    assert next(run._texts()) == [chat[:5]]
    run = trainer(tmp_path, ptx_coef=1.0, ptx_dataset=[{"input_ids": [3, 4, 5]}], ptx_batch_size=2)
    assert list(run._texts()) == [[[3, 4, 5]] * 2] * 4


def test_supervised_texts_go_on_where_the_update_stands(tmp_path: Path) -> None:
    rows = [{"input_ids": [i, i + 1]} for i in range(10)]
    run = trainer(
        tmp_path, ptx_coef=1.0, ptx_dataset=rows, ptx_batch_size=2, num_ppo_epochs=2, num_mini_batches=2
    )
    first = [text[0] for step in run._texts() for text in step]
    run.state.global_step = 1
    second = [text[0] for step in run._texts() for text in step]
    assert len(first) == len(second) == 8
    assert sorted(first + second[:2]) == list(range(10))  # each row once per pass


def test_average_is_saved_beside_the_policy_and_evaluated_on_demand(tmp_path: Path) -> None:
    run = trainer(tmp_path, ema_decay=0.5, eval_dataset=TEXTS[:4], learning_rate=1e-2, total_episodes=32)
    start = weights(run)["policy.lm_head.weight"]
    run.train(), run.save_model(str(tmp_path / "saved")), run.save_model(str(tmp_path / "average"), ema=True)
    assert run.ema is not None
    average = run.ema.weights["lm_head.weight"]
    assert not torch.equal(average, start)
    for folder in ("saved/ema", "average"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded.lm_head.weight, average)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").lm_head.weight
    assert torch.equal(saved, run.actor_critic.policy.lm_head.weight) and not torch.equal(saved, average)
    assert not (tmp_path / "average/ema").exists()

    plain, smooth = run.evaluate(), run.evaluate(ema=True)
    with run.ema_weights():
        assert run.evaluate() == smooth
    assert run.evaluate() == plain != smooth


def test_a_reference_synced_whole_is_the_policy(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        sync_ref_model=True,
        ref_model_mixup_alpha=1.0,
        ref_model_sync_steps=2,
        total_episodes=16 * 4,
    )
    run.train()
    kl = [h["objective/kl"] for h in run.state.log_history]
    assert kl[0] == kl[2] == 0.0 and abs(kl[1]) > 1e-4 and abs(kl[3]) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ptx_coef": 0.1}, "ptx_coef and ptx_dataset need each other, got ptx_coef=0.1 and no ptx_dataset"),
        ({"ptx_dataset": SUPERVISED}, "need each other, got ptx_coef=0.0 and a ptx_dataset"),
        ({"ptx_coef": 0.1, "ptx_dataset": TEXTS}, r"ptx_dataset: expected a column `text`, .* got columns"),
        ({"ptx_coef": 0.1, "ptx_dataset": []}, "ptx_dataset must have at least one row"),
        ({"sync_ref_model": True, "peft_config": "lora"}, "sync_ref_model needs a ref_model"),
        ({"sync_ref_model": True, "ref_model": "other"}, "ref_model must have the weights of model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if "peft_config" in changes:
        import peft

        changes = changes | {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=4)}
    if "ref_model" in changes:
        changes = changes | {"ref_model": tiny.policy(intermediate_size=32)}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_a_text_without_a_next_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a text must have at least two tokens, got \{'input_ids': \[3\]\}"):
        trainer(tmp_path, ptx_coef=1.0, ptx_dataset=[{"input_ids": [3]}]).train()


def test_no_average_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no average of the policy: set PPOConfig.ema_decay"):
        trainer(tmp_path, eval_dataset=TEXTS[:2]).evaluate(ema=True)


def test_lora_with_full_kl_and_an_average_of_the_adapter(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    run = trainer(
        tmp_path,
        peft_config=config,
        learning_rate=1e-2,
        kl_estimator="full",
        ema_decay=0.5,
        total_episodes=48,
    )
    run.train()
    kl = [h["objective/kl"] for h in run.state.log_history]
    assert kl[0] == pytest.approx(0.0, abs=1e-5) and kl[2] > 1e-4
    assert run.ema is not None and all("lora" in name for name in run.ema.weights)
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved/ema/adapter_model.safetensors").exists()


def test_micro_batches_leave_out_episodes_that_do_not_count(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    episodes = run._rollout(next(run._prompt_batches()))
    episodes.truncated = torch.arange(16) % 2 == 0
    masked = episodes.without_truncated()
    (batch,) = micro_batches(masked, range(16), pad_token_id=0)
    assert len(batch.input_ids) == 8 and sum(batch.counts) == int(masked.response_mask.sum())
    (batch,) = micro_batches(masked, [0, 2], pad_token_id=0)
    assert len(batch.input_ids) == 1 and len(batch.tokens) == 0


# --- two ranks -----------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = os.environ["FASTPPO_TEST_PORT"]
    torch.set_num_threads(1)
    for separate in (False, True):
        run = everything(
            Path(folder) / f"{rank}", gradient_checkpointing=True, gradient_accumulation_steps=1,
            value_model=tiny.classifier(3) if separate else None,
        )  # fmt: skip
        assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
        run.train()
        states = {name: x.state_dict() for name, x in run._adapted().items()}
        torch.save(
            {"weights": weights(run), "states": states, "log": last(run)}, f"{folder}/{rank}{separate}.pt"
        )
    torch.distributed.destroy_process_group()


def test_two_ranks_of_a_run_with_everything_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FASTPPO_TEST_PORT", str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    for separate in (False, True):
        one, other = (torch.load(tmp_path / f"{rank}{separate}.pt") for rank in range(2))
        assert same(one["weights"], other["weights"])
        assert one["states"] == other["states"]
        assert one["states"]["score_scale"]["count"] > 0
        assert one["log"]["policy/optimizer_steps"] == 2.0 and set(one["log"]) >= METRICS
