"""What is adapted from update to update: each rule worked out by hand, and a state that goes on exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastppo.controllers import (
    EntropyCoefficient,
    KLCoefficient,
    ScoreScale,
    WeightAverage,
    check_mixable,
    mix_into,
)

EVERY = torch.ones(2, dtype=torch.bool)


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def test_kl_coefficient_follows_ziegler() -> None:
    coefficient = KLCoefficient(0.1, adaptive=True, target=6.0, horizon=100)
    coefficient.observe(9.0, 10)  # half too much, cut to 0.2: 1 + 0.2 * 10 / 100
    assert coefficient.value == pytest.approx(0.1 * 1.02)
    coefficient.observe(5.4, 50)  # a tenth too little: 1 - 0.1 * 50 / 100
    assert coefficient.value == pytest.approx(0.1 * 1.02 * 0.95)
    coefficient.observe(-20.0, 100)  # cut to -0.2
    assert coefficient.value == pytest.approx(0.1 * 1.02 * 0.95 * 0.8)


def test_a_fixed_kl_coefficient_stays_even_over_a_checkpoint_of_another() -> None:
    coefficient = KLCoefficient(0.1, adaptive=False, target=6.0, horizon=100)
    coefficient.observe(100.0, 100)
    coefficient.load_state_dict({"value": 7.0})
    assert coefficient.value == 0.1


def entropy_coefficient(adaptive: bool = True) -> EntropyCoefficient:
    return EntropyCoefficient(0.01, adaptive=adaptive, target=0.5, least=0.0, most=0.02, step=0.006)


def test_entropy_coefficient_moves_by_steps_within_bounds_and_rests_above_the_target() -> None:
    coefficient = entropy_coefficient()
    assert coefficient.value == 0.01  # nothing seen yet
    coefficient.observe(0.5)  # at the target counts as too low
    assert coefficient.value == pytest.approx(0.016)
    coefficient.observe(0.1)
    assert coefficient.value == 0.02  # 0.022, bounded
    coefficient.observe(0.9)
    assert (coefficient.value, coefficient.coef) == (0.0, pytest.approx(0.014))
    coefficient.observe(0.9)
    coefficient.observe(0.9)
    coefficient.observe(0.9)
    assert coefficient.coef == 0.0
    fixed = entropy_coefficient(adaptive=False)
    fixed.observe(0.1)
    assert fixed.value == 0.01


def test_scores_over_running_moments() -> None:
    scale = ScoreScale(scale=True, center=True)
    # mean 2, squared distances 1 + 1 over n - 1 = 1
    torch.testing.assert_close(
        scale(torch.tensor([1.0, 3.0]), EVERY), torch.tensor([-1.0, 1.0]) / math.sqrt(2)
    )
    # of 1, 3, 5, 7: mean 4, squared distances 9 + 1 + 1 + 9 = 20 over 3
    torch.testing.assert_close(
        scale(torch.tensor([5.0, 7.0]), EVERY), torch.tensor([1.0, 3.0]) / math.sqrt(20 / 3)
    )
    # of 1, 3, 5, 7, 9: mean 5, squared distances 40 over 4; the second score is scaled but not taken in
    torch.testing.assert_close(
        scale(torch.tensor([9.0, 100.0]), torch.tensor([True, False])),
        torch.tensor([4.0, 95.0]) / math.sqrt(10),
    )
    assert (scale.count, scale.mean) == (5, 5.0)


def test_scores_scaled_without_a_shift_or_not_at_all() -> None:
    scores = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(ScoreScale(scale=True, center=False)(scores, EVERY), scores / math.sqrt(2))
    assert ScoreScale(scale=False, center=False)(scores, EVERY) is scores


def test_equal_scores_are_not_divided_by_zero() -> None:
    scale = ScoreScale(scale=True, center=False)
    assert scale(torch.tensor([3.0, 3.0]), EVERY).tolist() == [3.0, 3.0]
    assert scale(torch.tensor([3.0, 3.0]), ~EVERY).tolist() == [3.0, 3.0]


def test_states_go_on_exactly() -> None:
    first: list[Any] = [
        KLCoefficient(0.1, adaptive=True, target=6.0, horizon=100),
        entropy_coefficient(),
        ScoreScale(scale=True, center=True),
    ]
    first[0].observe(7.0, 10)
    first[1].observe(0.3)
    first[2](torch.tensor([0.1, 0.7]), EVERY)
    again: list[Any] = [
        KLCoefficient(0.1, adaptive=True, target=6.0, horizon=100),
        entropy_coefficient(),
        ScoreScale(scale=True, center=True),
    ]
    for one, other in zip(first, again, strict=True):
        other.load_state_dict(through_json(one.state_dict()))
        assert vars(one) == vars(other)


def linear(*weights: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False, dtype=dtype)
    layer.weight.data[:] = torch.tensor(weights)
    return layer


def test_average_of_weights() -> None:
    model = linear(1.0, -2.0)
    average = WeightAverage(model, 0.9)
    model.weight.data[:] = torch.tensor([3.0, 8.0])
    average.update(model)
    expected = torch.tensor([[0.9 * 1 + 0.1 * 3, 0.9 * -2 + 0.1 * 8]])
    torch.testing.assert_close(average.weights["weight"], expected)
    with average.in_place_of(model):
        torch.testing.assert_close(model.weight.data, expected)
    assert model.weight.tolist() == [[3.0, 8.0]]
    with pytest.raises(RuntimeError, match="stop"), average.in_place_of(model):
        raise RuntimeError("stop")
    assert model.weight.tolist() == [[3.0, 8.0]]


def test_average_of_bfloat16_weights_keeps_what_bfloat16_would_round_away() -> None:
    model = linear(1.0, dtype=torch.bfloat16)
    average = WeightAverage(model, 0.999)
    model.weight.data[:] = 1.0078125  # the next bfloat16
    for _ in range(693):  # half-way there: 0.999^693 = 0.49996
        average.update(model)
    assert average.weights["weight"].dtype is torch.float32
    assert average.weights["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**693), abs=1e-5)


def test_average_leaves_frozen_weights_alone_and_refuses_another_shape() -> None:
    model = nn.Sequential(linear(1.0), linear(2.0))
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.5)
    assert list(average.weights) == ["1.weight"]
    with pytest.raises(ValueError, match="does not fit the policy's trainable weights"):
        average.load_state_dict({"1.weight": torch.zeros(1, 2)})


def test_reference_moves_towards_the_policy() -> None:
    reference, policy = linear(1.0, 2.0), linear(11.0, -8.0)
    mix_into(reference, policy, 0.6)  # 0.6 of the policy
    torch.testing.assert_close(reference.weight.data, torch.tensor([[0.4 + 6.6, 0.8 - 4.8]]))
    assert policy.weight.tolist() == [[11.0, -8.0]]
    with pytest.raises(ValueError, match="ref_model must have the weights of model"):
        check_mixable(linear(1.0), policy)
