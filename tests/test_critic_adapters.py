"""LoRA for the critic: on a critic of its own, or a second adapter on the policy's base weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from test_trainer import last, trainer
from torch import Tensor

from fastppo import PPOTrainer, models
from fastppo.batch import MicroBatch
from fastppo.checkpoint import load_actor_critic

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
BATCH = MicroBatch(IDS, torch.arange(5), IDS[0, 1:], torch.arange(5), (5,))


def lora(task_type: str = "CAUSAL_LM", **changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": task_type, "r": 4, "init_lora_weights": False, **changes})


def on_disk(model: Any, folder: Path) -> Any:
    """The model as read from a folder, so that adapters on it know where their base lies."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def one_base(tmp_path: Path, folder: str = "a", **changes: Any) -> PPOTrainer:
    """Policy, reference and critic on one set of base weights; adapters start random, so that all three differ."""
    settings = {
        "learning_rate": 1e-2,
        "total_episodes": 64,
        "peft_config": lora(),
        "value_peft_config": lora(),
    }
    torch.manual_seed(0)
    changes.setdefault("model", on_disk(tiny.policy(), tmp_path / "base"))
    return trainer(tmp_path / folder, **{**settings, **changes})


def critic_on_its_own(
    tmp_path: Path, folder: str = "a", *, wrapped: bool = False, **changes: Any
) -> PPOTrainer:
    """A critic that trains an adapter: wrapped by the caller, or by the trainer."""
    torch.manual_seed(0)
    critic: Any = on_disk(tiny.classifier(3), tmp_path / "critic base")
    if wrapped:
        critic = peft.get_peft_model(critic, lora("SEQ_CLS"))
    else:
        changes["value_peft_config"] = lora("SEQ_CLS")
    settings = {"learning_rate": 1e-2, "total_episodes": 64, "value_model": critic}
    return trainer(tmp_path / folder, **{**settings, **changes})


def trainable(run: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.actor_critic.named_parameters() if p.requires_grad}


KINDS = {
    "one base": one_base,
    "wrapped critic": lambda *args, **changes: critic_on_its_own(*args, wrapped=True, **changes),
    "critic with config": critic_on_its_own,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_only_adapters_and_heads_learn_and_a_resumed_run_is_the_run_itself(
    tmp_path: Path, kind: str, bf16: bool
) -> None:
    settings = {"bf16": bf16, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2}
    run = KINDS[kind](tmp_path, **settings)
    critic = [n for n in trainable(run) if n.startswith("value_") or ".critic." in n]
    assert any("lora_B" in n for n in critic) and any("score" in n or "value_head" in n for n in critic)
    before = {n: p.detach().clone() for n, p in run.actor_critic.named_parameters()}
    run.train()
    after = dict(run.actor_critic.named_parameters())
    still = {n for n in before if torch.equal(before[n], after[n])}
    moved = set(before) - still
    assert {n for n in moved if ".critic." in n or n.startswith("value_")} == set(critic)
    assert all(after[n].requires_grad for n in moved)
    assert all(after[n].dtype is torch.float32 for n in critic)
    assert last(run)["loss/value_avg"] > 0

    resumed = KINDS[kind](tmp_path, "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/run/checkpoint-2"))
    for name, p in resumed.actor_critic.named_parameters():
        assert torch.equal(p, after[name]), name
    for name in ("objective/kl", "loss/policy_avg", "loss/value_avg", "val/explained_variance"):
        assert last(resumed)[name] == last(run)[name]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_load(tmp_path: Path, kind: str) -> None:
    run = KINDS[kind](tmp_path, total_episodes=16)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    again = load_actor_critic(tmp_path / "saved")
    expected, got = run.actor_critic.eval()(BATCH, 1.0), again.eval()(BATCH, 1.0)
    assert torch.equal(got.logprobs, expected.logprobs) and torch.equal(got.values, expected.values)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == set(trainable(run))


def test_the_saved_policy_is_a_plain_adapter(tmp_path: Path) -> None:
    run = one_base(tmp_path, total_episodes=16, ema_decay=0.5)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert list(policy.peft_config) == ["default"]
    expected = run.actor_critic(BATCH, 1.0).logprobs
    assert torch.equal(models.token_logprobs(policy, BATCH, 1.0)[0], expected)
    # What vLLM and others read: one folder, one config, names without the adapter's.
    names = load_file(tmp_path / "saved/adapter_model.safetensors").keys()
    assert all(
        n.startswith("base_model.model.") and n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names
    )
    critic = {p.name for p in (tmp_path / "saved/critic").iterdir()}
    assert critic >= {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"}
    assert run.ema is not None and not any("critic" in name for name in run.ema.weights)
    assert (tmp_path / "saved/ema/adapter_model.safetensors").exists()
    assert not (tmp_path / "saved/ema/critic").exists()


def test_policy_and_critic_share_no_gradient(tmp_path: Path) -> None:
    model = one_base(tmp_path).actor_critic
    assert model.networks == ("actor", "critic")
    torch.nn.init.normal_(model.value_head.weight)  # at 0 it would hide a gradient
    for network, own in (("actor", ".default."), ("critic", ".critic.")):
        model.zero_grad(set_to_none=True)
        with model.running(network):
            out = model(BATCH, 1.0, network)
            (out.logprobs if network == "actor" else out.values).sum().backward()
        found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        expected = {n for n, p in model.named_parameters() if own in n}
        assert found == expected | (
            {"value_head.weight", "value_head.bias"} if network == "critic" else set()
        )
        assert model.policy.active_adapter == "default"


def test_policy_reference_and_critic_are_three_networks_on_one_base(tmp_path: Path) -> None:
    base = tiny.policy()
    run = one_base(tmp_path)
    assert run.ref_model is None and run.actor_critic.value_model is None
    expected = models.token_logprobs(base, BATCH, 1.0)[0]
    flags = {n: p.requires_grad for n, p in run.actor_critic.named_parameters()}
    with run.null_ref_context() as reference:
        assert torch.equal(models.token_logprobs(reference, BATCH, 1.0)[0], expected)
    assert {n: p.requires_grad for n, p in run.actor_critic.named_parameters()} == flags
    policy = run.actor_critic.policy
    assert not torch.allclose(models.token_logprobs(policy, BATCH, 1.0)[0], expected, atol=1e-2)
    states = models.predicting_states(policy, BATCH)
    with run.actor_critic.running("critic"):
        of_critic = models.predicting_states(policy, BATCH)
    assert not torch.allclose(states, of_critic, atol=1e-2)
    # The values are the head's of the critic's states.
    torch.nn.init.normal_(run.actor_critic.value_head.weight)
    values = run.actor_critic.value_head(of_critic).squeeze(-1)
    assert torch.equal(run.actor_critic(BATCH, 1.0, "critic").values, values)


def test_one_base_lies_in_memory(tmp_path: Path) -> None:
    run = one_base(tmp_path)
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in run.actor_critic.parameters()
    }
    base = sum(p.numel() * 4 for p in tiny.policy().parameters())
    adapters = sum(p.numel() * 4 for n, p in run.actor_critic.named_parameters() if p.requires_grad)
    assert sum(held.values()) == base + adapters and run.ref_model is None


def test_an_adapters_own_dropout_is_off(tmp_path: Path) -> None:
    # The ratio of the only step would not be 1.
    config = {"lora_dropout": 0.5}
    run = one_base(
        tmp_path, peft_config=lora(**config), value_peft_config=lora(**config), gradient_checkpointing=True,
        num_ppo_epochs=1, total_episodes=16,
    )  # fmt: skip
    run.train()
    assert last(run)["val/ratio"] == pytest.approx(1.0, abs=1e-5)


def test_another_name_than_default(tmp_path: Path) -> None:
    def start(folder: str) -> PPOTrainer:
        torch.manual_seed(0)
        policy: Any = peft.get_peft_model(
            on_disk(tiny.policy(), tmp_path / "base"), lora(), adapter_name="sft"
        )
        policy.add_adapter("first", lora())
        return one_base(
            tmp_path, folder, model_adapter_name="sft", ref_adapter_name="first", save_strategy="steps", save_steps=2,
            peft_config=None, model=policy,
        )  # fmt: skip

    run = start("a")
    reference = {n: p.detach().clone() for n, p in run.actor_critic.named_parameters() if ".first." in n}
    run.train()
    after = dict(run.actor_critic.named_parameters())
    assert reference and all(torch.equal(after[n], p) for n, p in reference.items())
    assert run.actor_critic.policy.active_adapter == "sft"
    resumed = start("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/run/checkpoint-2"))
    assert all(torch.equal(p, after[n]) for n, p in resumed.actor_critic.named_parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value_peft_config": {"r": 4}}, TypeError, "value_peft_config must be a peft.PeftConfig"),
        ({"peft_config": None}, ValueError, "value_peft_config needs a value_model, or a PEFT policy"),
        (
            {"value_model": tiny.classifier(3)},
            ValueError,
            "value_peft_config must have task_type='SEQ_CLS', .* got .*CAUSAL_LM",
        ),
        (
            {
                "value_model": peft.get_peft_model(tiny.classifier(3), lora("SEQ_CLS")),
                "value_peft_config": lora("SEQ_CLS"),
            },
            ValueError,
            "value_model is a PEFT model already: merge its adapter first, or pass it without value_peft_config",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        one_base(tmp_path, **changes)
