"""The loss of an optimizer step, term by term: gradients worked out by hand on a model that is a table of numbers."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from test_update import experience, fresh, run
from torch import Tensor, nn
from torch.nn import functional as F

from fastppo.advantages import importance_weights, rewards_and_advantages
from fastppo.batch import MicroBatch, Rollout
from fastppo.models import ActorCritic, Evaluation
from fastppo.objective import Objective
from fastppo.update import update


class Table(nn.Module):
    """A log-prob, an entropy and a value of each token, all free parameters: their gradients are the loss's slopes."""

    def __init__(self, logprobs: Tensor, values: Tensor, networks: tuple[str, ...] = ("both",)) -> None:
        super().__init__()
        self.networks = networks
        self.logprobs = nn.Parameter(logprobs.flatten().clone())
        self.values = nn.Parameter(values.flatten().clone())
        self.entropy = nn.Parameter(torch.full_like(self.logprobs, 2.0))

    def running(self, network: str, packing: object) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, batch: MicroBatch, temperature: float, network: str) -> Evaluation:
        i = batch.tokens
        if network == "critic":
            return Evaluation(None, None, self.values[i])
        values = None if network == "actor" else self.values[i]
        return Evaluation(self.logprobs[i], self.entropy[i], values)


def episodes_of(lengths: list[int], truncated: list[bool] | None = None) -> Rollout:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(mask.shape)
    return Rollout(
        prompt_ids=[[1]] * len(lengths),
        response_ids=torch.full(mask.shape, 7),
        response_mask=mask,
        response_lengths=torch.tensor(lengths),
        truncated=torch.tensor(truncated or [False] * len(lengths)),
        logprobs=zeros,
        sampling_logprobs=zeros,
        entropy=zeros,
    )


def slopes(
    episodes: Rollout,
    ratios: list[list[float]],
    advantages: list[list[float]],
    *,
    errors: float = 0.0,
    ref: list[list[float]] | None = None,
    rows: int | None = None,
    critic_only: bool = False,
    networks: tuple[str, ...] = ("both",),
    **objective: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """d loss / d parameter from one step of plain gradient descent at rate 1, and what `update` reports.

    `ratios` of new to old probabilities, `ref` log-ratios of new to reference; values that are `errors` too large.
    """
    old = torch.full(episodes.response_mask.shape, -1.0)
    new = old + torch.tensor(ratios).log()
    values = torch.zeros_like(old)
    table = Table(new, values + errors, networks)
    before = {name: p.detach().clone() for name, p in table.named_parameters()}
    means = update(
        table,
        torch.optim.SGD(table.parameters(), lr=1.0),
        episodes,
        logprobs=old,
        values=values + errors,
        advantages=torch.tensor(advantages),
        returns=values,
        ref_logprobs=None if ref is None else new - torch.tensor(ref),
        objective=Objective(**objective),
        temperature=1.0,
        epochs=1,
        mini_batches=1,
        micro_batch_rows=rows,
        micro_batch_tokens=None,
        max_grad_norm=None,
        pad_token_id=0,
        seed=0,
        accelerator=Accelerator(cpu=True),
        critic_only=critic_only,
    )
    shape = episodes.response_mask.shape
    return {n: (before[n] - p.detach()).view(shape) for n, p in table.named_parameters()}, means


def close(x: Tensor, expected: Any) -> None:
    torch.testing.assert_close(x, torch.tensor(expected), atol=2e-6, rtol=1e-5)


# --- clipping and entropy ------------------------------------------------------------------------------------------

RATIOS, SIGNS = [[1.25, 1.35, 0.75, 4.0]], [[1.0, 1.0, -1.0, -1.0]]


@pytest.mark.parametrize(
    ("objective", "expected", "loss"),
    [
        # The first two are cut at 1.2, the third at 0.8; the fourth has no bound: slope -A r / 4.
        ({}, [0.0, 0.0, 0.0, 1.0], -1.2 - 1.2 + 0.8 + 4.0),
        # Clip-higher: 1.25 is within 1.28.
        ({"clip_range_high": 0.28}, [-1.25 / 4, 0.0, 0.0, 1.0], -1.25 - 1.28 + 0.8 + 4.0),
        # Dual clip: the loss of the fourth is at most 3.
        ({"dual_clip": 3.0}, [0.0, 0.0, 0.0, 0.0], -1.2 - 1.2 + 0.8 + 3.0),
    ],
)
def test_clip_higher_and_dual_clip(objective: dict[str, Any], expected: list[float], loss: float) -> None:
    grads, means = slopes(episodes_of([4]), RATIOS, SIGNS, **objective)
    close(grads["logprobs"], [expected])
    assert means["policy_loss"] == pytest.approx(loss / 4, rel=1e-5)


def test_entropy_bonus() -> None:
    grads, means = slopes(episodes_of([2, 1]), [[1.0, 1.0]] * 2, [[0.0, 0.0]] * 2, entropy_coef=0.3)
    close(grads["entropy"], [[-0.1, -0.1], [-0.1, 0.0]])  # -0.3 over 3 tokens
    assert means["entropy"] == pytest.approx(2.0)


# --- KL in the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "slope", "kl"),
    [
        ("k2", math.log(2), math.log(2) ** 2 / 2),  # d²/2
        ("k3", 1 - 0.5, 0.5 - 1 + math.log(2)),  # exp(-d) - 1 + d
    ],
)
def test_kl_in_the_loss(estimator: str, slope: float, kl: float) -> None:
    log2 = math.log(2)
    grads, means = slopes(
        episodes_of([1, 1]), [[1.0], [1.0]], [[0.0], [0.0]], ref=[[log2], [0.0]], kl_coef=0.1, kl_estimator=estimator
    )  # fmt: skip
    close(grads["logprobs"], [[0.1 * slope / 2], [0.0]])
    assert means["kl"] == pytest.approx(kl / 2, rel=1e-5)


# --- aggregation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("networks", [("both",), ("actor", "critic")])
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize(
    ("aggregation", "per_token"),
    [
        ("token", (1 / 4, 1 / 4)),  # 4 tokens
        ("sequence", (1 / (1 * 2), 1 / (3 * 2))),  # 2 episodes, of 1 and of 3 tokens
        ("constant", (1 / (2 * 5), 1 / (2 * 5))),  # 2 episodes of at most 5 tokens
    ],
)
def test_aggregation(
    aggregation: str, per_token: tuple[float, float], rows: int | None, networks: tuple[str, ...]
) -> None:
    short, long = per_token
    grads, means = slopes(
        episodes_of([1, 3]),
        [[1.1, 1.0, 1.0], [1.0, 1.0, 0.9]],
        [[1.0, 0.0, 0.0], [1.0, 2.0, -1.0]],
        errors=0.5,
        ref=[[math.log(2)] * 3] * 2,
        rows=rows,
        networks=networks,
        aggregation=aggregation,
        response_length=5,
        vf_coef=0.1,
        entropy_coef=0.3,
        kl_coef=0.2,
    )
    kl = 0.2 * (1 - 0.5)  # k3
    close(
        grads["logprobs"],
        [[short * (kl - 1.1), 0.0, 0.0], [long * (kl - 1.0), long * (kl - 2.0), long * (kl + 0.9)]],
    )
    value, entropy = 0.1 * 0.5, -0.3
    close(grads["values"], [[short * value, 0.0, 0.0], [long * value] * 3])
    close(grads["entropy"], [[short * entropy, 0.0, 0.0], [long * entropy] * 3])
    assert means["policy_loss"] == pytest.approx(short * -1.1 + long * (-1.0 - 2.0 + 0.9), rel=1e-5)
    assert means["value_loss"] == pytest.approx((short + 3 * long) * 0.5 * 0.5**2, rel=1e-5)
    assert means["kl"] == pytest.approx((short + 3 * long) * (0.5 - 1 + math.log(2)), rel=1e-5)
    # Other metrics are means over tokens under every aggregation.
    assert means["ratio"] == pytest.approx((1.1 + 1.0 + 1.0 + 0.9) / 4)
    assert means["ratio_max"] == pytest.approx(1.1)
    assert means["entropy"] == pytest.approx(2.0)


def test_target_kl_means_the_same_under_every_aggregation() -> None:
    # log-ratios 0.2 and 0: approx_kl = (0.02 + 0 + 0 + 0) / 4 = 0.005 over tokens, 0.01 over episodes.
    for aggregation in ("token", "sequence", "constant"):
        given = (episodes_of([1, 3]), [[math.exp(0.2), 1.0, 1.0], [1.0] * 3], [[1.0] * 3] * 2)
        _, means = slopes(*given, aggregation=aggregation, target_kl=0.0051)
        assert means["stopped_early"] == 0.0
        _, means = slopes(*given, aggregation=aggregation, target_kl=0.0049)
        assert means["stopped_early"] == 1.0


# --- truncated responses -------------------------------------------------------------------------------------------


def test_truncated_responses_teach_neither_policy_nor_critic() -> None:
    episodes = episodes_of([2, 3, 1], truncated=[False, True, False]).without_truncated()
    grads, means = slopes(
        episodes, [[1.0] * 3] * 3, [[1.0] * 3] * 3, errors=0.5, rows=1, entropy_coef=0.3, vf_coef=0.1
    )
    close(grads["logprobs"], [[-1 / 3, -1 / 3, 0.0], [0.0] * 3, [-1 / 3, 0.0, 0.0]])  # 3 tokens count
    close(grads["values"], [[0.05 / 3, 0.05 / 3, 0.0], [0.0] * 3, [0.05 / 3, 0.0, 0.0]])
    assert means["ratio"] == pytest.approx(1.0)


def test_truncated_responses_do_not_enter_the_statistics() -> None:
    episodes = episodes_of([1, 2, 1], truncated=[False, True, False]).without_truncated()
    zeros = torch.zeros(3, 2)
    result = rewards_and_advantages(
        torch.tensor([1.0, 1000.0, 3.0]), zeros, zeros, zeros, episodes.response_mask, kl_coef=0.0, estimator="k1",
        reward_clip=None, whiten_rewards=False, whiten_advantages=True, gamma=1.0, lam=1.0,
    )  # fmt: skip
    close(result.advantages, [[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # 1 and 3: mean 2, deviation 1


def test_a_step_of_truncated_responses_alone_is_not_taken() -> None:
    episodes = episodes_of([2, 3], truncated=[True, True]).without_truncated()
    grads, means = slopes(episodes, [[1.0] * 3] * 2, [[1.0] * 3] * 2, errors=0.5)
    assert all(not g.any() for g in grads.values())
    assert means["steps"] == 0.0


# --- critic --------------------------------------------------------------------------------------------------------


def test_the_critic_has_a_lambda_of_its_own() -> None:
    values = torch.tensor([[0.5, 0.2, 0.6]])
    zeros, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)

    def results(**lambdas: Any) -> Any:
        return rewards_and_advantages(
            torch.tensor([1.0]), zeros, zeros, values, mask, kl_coef=0.0, estimator="k1", reward_clip=None,
            whiten_rewards=False, whiten_advantages=False, gamma=1.0, **lambdas,
        )  # fmt: skip

    for lambdas in ({"lam": 0.0, "lam_critic": 1.0}, {"lam": 0.0, "lam_critic": None}):
        close(results(**lambdas).advantages, [[0.2 - 0.5, 0.6 - 0.2, 1.0 - 0.6]])  # one step
    close(results(lam=0.0, lam_critic=None).returns, [[0.2, 0.6, 1.0]])
    close(results(lam=0.0, lam_critic=1.0).returns, [[1.0, 1.0, 1.0]])  # Monte Carlo


@pytest.mark.parametrize("separate", [False, True])
def test_critic_only_leaves_the_policy_as_it_is(separate: bool) -> None:
    model = fresh(separate)
    if model.value_head is not None:  # a head of 0, as it starts, would pass no gradient on to the trunk
        nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    episodes, data = experience(model)
    means = run(model, episodes, data, lr=0.5, critic_only=True, vf_coef=1.0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if separate:
        assert moved and all(n.startswith("value_model.") for n in moved)
        assert "value_model.model.layers.0.mlp.up_proj.weight" in moved
    else:
        assert moved == {"value_head.weight", "value_head.bias"}
        # d loss / d bias = mean (value - return)
        bias = 0.5 * (data["returns"] - data["values"])[episodes.response_mask].mean()
        torch.testing.assert_close(model.value_head.bias.data, bias[None])  # type: ignore[union-attr]
    assert (means["policy_loss"], means["entropy"], means["ratio"]) == (0.0, 0.0, 0.0)
    assert means["steps"] == 1.0 and means["value_loss"] > 0


def test_critic_only_of_a_table() -> None:
    grads, _ = slopes(
        episodes_of([1, 1]), [[1.5], [1.0]], [[1.0], [1.0]], errors=0.5, critic_only=True, vf_coef=0.1,
        entropy_coef=0.3, kl_coef=0.2, ref=[[1.0], [1.0]],
    )  # fmt: skip
    close(grads["values"], [[0.1 * 0.5 / 2], [0.1 * 0.5 / 2]])
    assert not grads["logprobs"].any() and not grads["entropy"].any()


# --- importance sampling and the ratio guard -----------------------------------------------------------------------


def test_importance_weights_are_truncated() -> None:
    logprobs = torch.tensor([0.5, 0.5, 0.5, 0.9]).log()
    sampled = torch.tensor([0.5, 0.25, 0.05, 1.0]).log()
    close(importance_weights(logprobs, sampled, cap=3.0), [1.0, 2.0, 3.0, 0.9])


def test_weights_on_advantages_weigh_the_policy_loss_and_nothing_else() -> None:
    weights = [[2.0, 3.0, 0.5, 2.0]]
    weighted = [[w * a for w, a in zip(weights[0], SIGNS[0], strict=True)]]
    settings: dict[str, Any] = {
        "errors": 0.5, "entropy_coef": 0.3, "kl_coef": 0.2, "ref": [[math.log(2)] * 4], "clip_range_high": 0.28,
        "dual_clip": 5.0,
    }  # fmt: skip
    grads, means = slopes(episodes_of([4]), RATIOS, weighted, **settings)
    kl = 0.2 * (1 - 0.5) / 4
    # As in the table above: -A r w / 4 within the clip range; the fourth is below the dual clip of 5 and feels w too.
    close(grads["logprobs"], [[kl - 2.0 * 1.25 / 4, kl, kl, kl + 2.0 * 4.0 / 4]])
    assert means["policy_loss"] == pytest.approx(
        (2.0 * -1.25 + 3.0 * -1.28 + 0.5 * 0.8 + 2.0 * 4.0) / 4, rel=1e-5
    )
    _, capped = slopes(episodes_of([4]), RATIOS, weighted, **settings | {"dual_clip": 3.0})
    assert capped["policy_loss"] == pytest.approx(
        (2.0 * -1.25 + 3.0 * -1.28 + 0.5 * 0.8 + 2.0 * 3.0) / 4, rel=1e-5
    )
    close(grads["values"], [[0.1 * 0.5 / 4] * 4])
    close(grads["entropy"], [[-0.3 / 4] * 4])


def test_a_step_with_too_large_a_mean_ratio_is_skipped_loudly() -> None:
    given = (episodes_of([2]), [[1.0, 4.0]], [[1.0, -1.0]])  # mean ratio 2.5
    with pytest.warns(UserWarning, match=r"mean ratio 2.5 exceeds ratio_threshold = 2.4"):
        grads, means = slopes(*given, errors=0.5, ratio_threshold=2.4)
    assert all(not g.any() for g in grads.values())
    assert (means["steps"], means["skipped_steps"], means["stopped_early"]) == (0.0, 1.0, 0.0)
    grads, means = slopes(*given, ratio_threshold=2.6)
    assert grads["logprobs"].any()
    assert (means["steps"], means["skipped_steps"]) == (1.0, 0.0)


# --- supervised texts ----------------------------------------------------------------------------------------------

TEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("rows", [None, 1])
def test_supervised_texts_add_their_cross_entropy(rows: int | None, separate: bool) -> None:
    plain = tiny.policy()
    loss = torch.zeros(())
    for text in TEXTS:
        logits = plain(input_ids=torch.tensor([text])).logits[0, :-1]
        loss = loss + F.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum")
    loss = loss / (4 + 1 + 2)
    loss.backward()

    model = ActorCritic(tiny.policy(), tiny.classifier() if separate else None)
    before = {n: p.detach().clone() for n, p in model.policy.named_parameters()}
    episodes, data = experience(model)
    data["advantages"] = torch.zeros_like(data["advantages"])
    means = run(
        model, episodes, data, lr=1.0, vf_coef=0.0, ptx_coef=0.25, texts=iter([TEXTS]), micro_batch_rows=rows
    )
    assert means["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.policy.named_parameters():
        expected = before[name] - 0.25 * dict(plain.named_parameters())[name].grad  # type: ignore[operator]
        torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-4, msg=name)
