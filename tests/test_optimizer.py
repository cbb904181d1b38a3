"""AdamW: bfloat16 weights learn what float32 weights learn, and a saved state is the whole state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_trainer import trainer
from transformers.training_args import OptimizerNames

from fastppo import PPOTrainer
from fastppo.optimizer import AdamW, check_optim
from fastppo.reference.adamw import join_master


def train(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        p.grad = (
            torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16).to(p.dtype)
        )
        optimizer.step()


def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
    start = torch.randn(37, 53, generator=torch.Generator().manual_seed(99)).to(torch.bfloat16)
    return torch.nn.Parameter(start.to(dtype))


def test_small_steps_add_up_in_bfloat16() -> None:
    half, full, rounded = parameter(torch.bfloat16), parameter(torch.float32), parameter(torch.bfloat16)
    start = full.detach().clone()
    ours = AdamW([half], lr=1e-5, weight_decay=0.01)
    train(ours, half, 100)
    train(torch.optim.AdamW([full], lr=1e-5, weight_decay=0.01), full, 100)
    train(torch.optim.AdamW([rounded], lr=1e-5, weight_decay=0.01), rounded, 100)
    master = join_master(half.detach(), ours.state[half]["residual"])
    moved = (full.detach() - start).norm()
    # exp_avg in bfloat16 rounds each step's direction by up to 2**-9; gradients of pure noise make that show most.
    assert (master - full.detach()).norm() < 0.03 * moved
    assert torch.equal(master.to(torch.bfloat16), half.detach())
    # Without a master nearly all of the movement is rounded away.
    assert (rounded.detach().float() - full.detach()).norm() > 0.5 * moved


def test_float32_parameters_get_torchs_own_adamw() -> None:
    ours_p, theirs_p = parameter(torch.float32), parameter(torch.float32)
    ours, theirs = (
        AdamW([ours_p], lr=1e-3),
        torch.optim.AdamW([theirs_p], lr=1e-3, weight_decay=0.0, fused=True),
    )
    train(ours, ours_p, 5)
    train(theirs, theirs_p, 5)
    assert torch.equal(ours_p, theirs_p)


def test_state_dict_brings_back_every_bit() -> None:
    straight, stopped = parameter(torch.bfloat16), parameter(torch.bfloat16)
    a, b = AdamW([straight], lr=1e-4), AdamW([stopped], lr=1e-4)
    train(a, straight, 10)
    train(b, stopped, 5)
    resumed = torch.nn.Parameter(stopped.detach().clone())
    c = AdamW([resumed], lr=1.0)
    c.load_state_dict(b.state_dict())
    train(c, resumed, 5, start=5)
    assert torch.equal(straight, resumed)
    for name in ("residual", "exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[straight][name], c.state[resumed][name])
        assert a.state[straight][name].dtype == c.state[resumed][name].dtype


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_masters_begin_at_the_float32_weights(tmp_path: Path, own_optimizer: bool) -> None:
    policy, critic = tiny.policy(), tiny.classifier()
    for p in (*policy.parameters(), *critic.parameters()):
        # Anywhere between two bfloat16 numbers, half-way too.
        bits = p.data.to(torch.bfloat16).float().view(torch.int32)
        p.data = (bits + 0x1000 * torch.randint(0, 16, p.shape, dtype=torch.int32)).view(torch.float32)
    given = [p.detach().clone() for p in (*policy.parameters(), *critic.parameters())]
    optimizer = AdamW([*policy.parameters(), *critic.parameters()], lr=1e-6) if own_optimizer else None
    run = trainer(
        tmp_path,
        model=policy,
        value_model=critic,
        bf16=True,
        learning_rate=1e-6,
        optimizers=(optimizer, None),
    )
    weights = [*policy.parameters(), *critic.parameters()]
    assert (
        sum(p.dtype is torch.bfloat16 for p in weights) == len(weights) - 1
    )  # the critic's head stays float32

    def masters() -> list[torch.Tensor]:
        state = run.optimizer.state
        return [
            join_master(p.detach(), state[p]["residual"]) if p.dtype is torch.bfloat16 else p.detach()
            for p in weights
        ]

    for master, start in zip(masters(), given, strict=True):
        assert torch.equal(master.view(torch.int32), start.view(torch.int32))
    # So the first step is that of float32 weights, to the last rounding of the moments' square root and quotient.
    plain = [torch.nn.Parameter(start.clone()) for start in given]
    for p, q in zip(weights, plain, strict=True):
        p.grad = torch.randn(p.shape).to(p.dtype)
        q.grad = p.grad.float()
    run.optimizer.step()
    torch.optim.AdamW(plain, lr=1e-6, weight_decay=0.0).step()
    for master, q, start in zip(masters(), plain, given, strict=True):
        assert ((q.detach() - start).abs() > 0).any()
        torch.testing.assert_close(master, q.detach(), rtol=2**-23, atol=1e-10)


# --- other optimizers, by the name that transformers has for them -----------------------------------------------------

REFUSED = {
    "lomo": "inside the backward pass", "adalomo": "inside the backward pass",
    "galore_adamw_layerwise": "inside the backward pass", "galore_adamw_8bit_layerwise": "inside the backward pass",
    "galore_adafactor_layerwise": "inside the backward pass", "apollo_adamw_layerwise": "inside the backward pass",
    "schedule_free_radam": "other weights", "schedule_free_adamw": "other weights",
    "schedule_free_sgd": "other weights",
}  # fmt: skip


@pytest.mark.parametrize("optim", [x.value for x in OptimizerNames])
def test_every_name_is_allowed_or_refused_with_a_reason(optim: str) -> None:
    if optim in REFUSED:
        with pytest.raises(ValueError, match=f"optim='{optim}' .*{REFUSED[optim]}"):
            check_optim(optim, None, bfloat16=False)
        return
    check_optim(optim, None, bfloat16=False)
    if optim in ("adamw_torch", "adamw_torch_fused"):
        check_optim(optim, None, bfloat16=True)
        return
    with pytest.raises(
        ValueError, match=f"optim='{optim}' updates bfloat16 weights without a float32 master"
    ):
        check_optim(optim, None, bfloat16=True)


def test_rounding_by_chance_loses_nothing_on_average() -> None:
    for optim in ("adamw_torch_8bit", "adamw_torch_4bit"):
        check_optim(optim, "block_size=128, bf16_stochastic_round=True", bfloat16=True)
        with pytest.raises(ValueError, match="without a float32 master"):
            check_optim(optim, "bf16_stochastic_round=False", bfloat16=True)


def test_the_trainer_asks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim='sgd' updates bfloat16 weights"):
        trainer(tmp_path, optim="sgd", bf16=True)
    trainer(tmp_path, optim="sgd", bf16=False)
    import peft

    trainer(tmp_path, optim="sgd", bf16=True, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    policy = tiny.policy()
    with pytest.warns(UserWarning, match="unless this optimizer keeps a float32 master"):
        trainer(tmp_path, model=policy, bf16=True, optimizers=(torch.optim.SGD(policy.parameters()), None))


def _trained_and_resumed(tmp_path: Path, **settings: Any) -> PPOTrainer:
    """Four updates; checks that a run resumed after the second is the same."""

    def start(folder: str) -> PPOTrainer:
        return trainer(
            tmp_path / folder, model=tiny.policy(intermediate_size=256), total_episodes=64, save_strategy="steps",
            save_steps=2, learning_rate=1e-2, **settings,
        )  # fmt: skip

    run, resumed = start("a"), start("b")
    before = [p.detach().clone() for p in run.actor_critic.parameters()]
    run.train()
    assert not any(torch.equal(p, old) for p, old in zip(run.actor_critic.parameters(), before, strict=True))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/run/checkpoint-2"))
    for a, b in zip(run.actor_critic.parameters(), resumed.actor_critic.parameters(), strict=True):
        assert torch.equal(a, b)
    return run


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adagrad", "rmsprop"])
def test_torchs_and_transformers_own_train_and_resume(tmp_path: Path, optim: str) -> None:
    _trained_and_resumed(tmp_path, optim=optim)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_bitsandbytes_trains_and_resumes(tmp_path: Path, optim: str) -> None:
    run = _trained_and_resumed(tmp_path, optim=optim)
    # Weights of 4096 elements and more: the six of the MLPs, and the head. Embeddings and small ones stay in 32 bits.
    states = [s for s in run.optimizer.state.values() if s["state1"].dtype is torch.uint8]
    assert len(states) == 7


def test_torchao_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It compiles its step for each shape: minutes, and nothing that is ours.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run = _trained_and_resumed(
        tmp_path, optim="adamw_torch_8bit", optim_args="bf16_stochastic_round=True", bf16=True
    )
    assert any(type(s["exp_avg"]).__name__ == "OptimState8bit" for s in run.optimizer.state.values())
