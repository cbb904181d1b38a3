"""Update: ratio 1 at the first step, a gradient that no split changes, and stops where it must."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from fastppo import models
from fastppo.advantages import rewards_and_advantages
from fastppo.batch import Rollout, micro_batches
from fastppo.controllers import ScoreScale
from fastppo.models import ActorCritic
from fastppo.objective import Objective
from fastppo.rollout import Sampling, rollout
from fastppo.score import token_scores
from fastppo.update import update

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [20, 21], [22, 23], [24], [25, 26, 27], [28, 29]]
TEMPERATURE = 1.3


def experience(
    model: ActorCritic, prompts: list[list[int]] = PROMPTS, first: int = 0
) -> tuple[Rollout, dict[str, Any]]:
    """A rollout of mixed lengths with random scores, and what `update` needs of it."""
    sampling = Sampling(max_new_tokens=6, temperature=TEMPERATURE, stop_token_ids=tuple(range(40)))
    episodes = rollout(model.policy, prompts, sampling, pad_token_id=0, seed=1, first_episode=first)
    with torch.no_grad():
        logprobs, values = token_scores(
            lambda b: (lambda e: (e.logprobs, e.values))(model(b, TEMPERATURE)),
            micro_batches(episodes, range(len(episodes)), pad_token_id=0),
            episodes,
        )
    scores = torch.tensor([float(sum(c) % 5) for c in episodes.completions()])
    result = rewards_and_advantages(
        scores, logprobs, logprobs, values, episodes.response_mask, kl_coef=0.0, estimator="k1", reward_clip=None,
        whiten_rewards=False, whiten_advantages=True, gamma=1.0, lam=0.95,
    )  # fmt: skip
    return episodes, {
        "logprobs": logprobs,
        "values": values,
        "advantages": result.advantages,
        "returns": result.returns,
    }


def run(
    model: ActorCritic, episodes: Rollout, data: dict[str, Any], lr: float = 1e-3, **settings: Any
) -> dict[str, float]:
    accelerator = settings.pop("accelerator", None) or Accelerator(cpu=True)
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=lr)
    objective = {name: settings.pop(name) for name in Objective.__dataclass_fields__ if name in settings}
    return update(
        settings.pop("wrapped", model),
        optimizer,
        episodes,
        **data,
        **{
            "temperature": TEMPERATURE,
            "epochs": 1,
            "mini_batches": 1,
            "micro_batch_rows": None,
            "micro_batch_tokens": None,
            "objective": Objective(**objective),
            "max_grad_norm": None,
            "pad_token_id": 0,
            "seed": 0,
            "accelerator": accelerator,
            **settings,
        },
    )


def fresh(separate: bool = False) -> ActorCritic:
    return ActorCritic(tiny.policy(), tiny.classifier() if separate else None)


def one_base() -> ActorCritic:
    """Policy and critic as two adapters on the same weights."""
    import peft

    configs = [peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False) for _ in range(2)]
    policy = peft.get_peft_model(tiny.policy(), configs[0])
    models.add_critic_adapter(policy, configs[1])
    return ActorCritic(policy)


@pytest.mark.parametrize("separate", [False, True])
def test_ratio_is_one_before_the_first_step(separate: bool) -> None:
    model = fresh(separate)
    means = run(model, *experience(model))
    assert means["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert means["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert means["approx_kl"] == pytest.approx(0.0, abs=1e-10)
    assert means["clip_fraction"] == 0.0


@pytest.mark.parametrize("separate", [False, True])
def test_no_cut_into_micro_batches_changes_the_step(separate: bool) -> None:
    results = []
    cuts: list[dict[str, Any]] = [
        {},
        {"micro_batch_rows": 1},
        {"micro_batch_rows": 3},
        {"micro_batch_tokens": 16},
        {"padding_free": True},
        {"padding_free": True, "micro_batch_tokens": 16},
    ]
    for cut in cuts:
        model = fresh(separate)
        run(model, *experience(model), lr=0.1, **cut)
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for other in results[1:]:
        for name, p in other.items():
            torch.testing.assert_close(p, results[0][name], atol=2e-6, rtol=1e-4, msg=name)


def test_the_step_raises_what_was_good() -> None:
    model = fresh()
    episodes, data = experience(model)
    run(model, episodes, data, lr=0.5)
    with torch.no_grad():
        (after,) = token_scores(
            lambda b: (model(b, TEMPERATURE).logprobs,),
            micro_batches(episodes, range(8), pad_token_id=0),
            episodes,
        )
    mask = episodes.response_mask
    gain = (after - data["logprobs"])[mask]
    assert torch.corrcoef(torch.stack([gain, data["advantages"][mask]]))[0, 1] > 0.3


def test_target_kl_stops_before_the_step_is_taken() -> None:
    model = fresh()
    episodes, data = experience(model)
    means = run(model, episodes, data, lr=5.0, epochs=4, target_kl=1e-3)
    assert means["stopped_early"] == 1.0
    assert means["steps"] == 1.0
    untouched = fresh()
    run(untouched, episodes, data, lr=5.0, epochs=1)
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_is_clipped_to_max_grad_norm() -> None:
    model = fresh()
    episodes, data = experience(model)
    before = copy.deepcopy(model)
    means = run(model, episodes, data, lr=1.0, max_grad_norm=0.01)
    assert means["grad_norm"] > 0.01
    moved = sum((a - b).square().sum() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert moved.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_of_nan_is_an_error_and_no_step() -> None:
    model = fresh()
    episodes, data = experience(model)
    before = copy.deepcopy(model)
    data["advantages"][0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the gradient norm is nan, so this step was not taken"):
        run(model, episodes, data)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_poison_in_padding_changes_nothing() -> None:
    clean, poisoned = fresh(), fresh()
    episodes, data = experience(clean)
    run(clean, episodes, data)
    padding = ~episodes.response_mask
    assert padding.any()
    for value, x in zip((torch.nan, torch.inf, -torch.inf, 100.0), data.values(), strict=True):
        x[padding] = value
    run(poisoned, episodes, data)
    for a, b in zip(clean.parameters(), poisoned.parameters(), strict=True):
        assert torch.equal(a, b)


TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16]]
# What the two ranks do, each on a model of its own.
STEPS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant", "response_length": 6},
    "texts": {"ptx_coef": 0.5},
    "value head": {"critic_only": True},
    "actor and critic": {"separate": True},
    "critic": {"separate": True, "critic_only": True},
    "actor and critic on one base": {"one_base": True},
}


def step(name: str, rank: int | None = None, accelerator: Accelerator | None = None) -> tuple[Any, Any]:
    """The model after one of `STEPS` and what `update` said, of one rank or alone."""
    settings = dict(STEPS[name])
    model = one_base() if settings.pop("one_base", False) else fresh(settings.pop("separate", False))
    mine = slice(0, 8) if rank is None else slice(rank * 4, rank * 4 + 4)
    if "ptx_coef" in settings:
        settings["texts"] = iter([TEXTS[mine.start // 2 : mine.stop // 2]])
    episodes, data = experience(model, PROMPTS[mine], first=mine.start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if accelerator is not None:
        settings |= {"accelerator": accelerator, "wrapped": accelerator.prepare(model), "micro_batch_rows": 3}
        assert type(settings["wrapped"]).__name__ == "DistributedDataParallel"
    return model, run(model, episodes, data, optimizer=optimizer, **settings)


def _rank(rank: int, folder: str) -> None:
    """One of two ranks: half the episodes each, whitening and normalisation over both."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = os.environ["FASTPPO_TEST_PORT"]
    torch.set_num_threads(1)
    for name in STEPS:
        # What a network of its own leaves out has no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters="critic" in name or "head" in name)
        model, means = step(name, rank, Accelerator(cpu=True, kwargs_handlers=[unused]))
        torch.save({"model": model.state_dict(), "means": means}, f"{folder}/{name} {rank}.pt")
    scale = ScoreScale(scale=True, center=True)
    seen = [scale(torch.tensor(x[rank]), torch.ones(len(x[rank]), dtype=torch.bool)) for x in SCORES]
    torch.save({"state": scale.state_dict(), "seen": seen}, f"{folder}/scores {rank}.pt")
    torch.distributed.destroy_process_group()


# Scores of two updates, of rank 0 and of rank 1.
SCORES = [([1.0, 3.0], [5.0, 7.0]), ([2.0], [9.0])]


def test_two_ranks_take_the_step_of_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FASTPPO_TEST_PORT", str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    for name in STEPS:
        alone, means = step(name)
        for rank in range(2):
            got = torch.load(tmp_path / f"{name} {rank}.pt")
            for weight, p in alone.state_dict().items():
                torch.testing.assert_close(got["model"][weight], p, atol=2e-6, rtol=1e-4, msg=(name, weight))
            for metric in ("policy_loss", "value_loss", "entropy", "ratio", "ptx_loss", "grad_norm"):
                assert got["means"][metric] == pytest.approx(means[metric], rel=1e-4, abs=1e-6), (
                    name,
                    metric,
                )
    scale = ScoreScale(scale=True, center=True)
    for i, (first, second) in enumerate(SCORES):
        expected = scale(torch.tensor(first + second), torch.ones(len(first + second), dtype=torch.bool))
        found = [torch.load(tmp_path / f"scores {rank}.pt") for rank in range(2)]
        torch.testing.assert_close(torch.cat([x["seen"][i] for x in found]), expected)
    assert found[0]["state"] == found[1]["state"]
