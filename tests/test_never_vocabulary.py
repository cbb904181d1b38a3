"""The promise that no [B, T, V] or [N, V] exists: every tensor and every allocation of an iteration is smaller.

Two watches, for each sees what the other cannot. `TorchDispatchMode` sees the shape of what every op returns, backward
and our own ops included; the profiler sees the size of every allocation of torch's allocator, also those that an op
makes inside C++ and never returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_trainer import trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo import PPOTrainer, models

# N = 12 * 48 counted tokens in the one micro-batch, responses at full length, and a prime vocabulary: N * V elements
# of two bytes are 19 MB. Below half of that are the weights [V, 32], a decode step's logits [12, V], the rows of logits
# that the exact KL holds at a time ([128, V] float32, 8.4 MB), and the tile of `linear_logprobs` (8 MiB at any size).
VOCABULARY, EPISODES, TOKENS = 16411, 12, 48
LIMIT = EPISODES * TOKENS * VOCABULARY


class Watch(TorchDispatchMode):
    """The largest tensor that any op returned, in elements, and who returned it."""

    largest, by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _elements(x) > self.largest:
                self.largest, self.by = _elements(x), str(func)
        return out


def _elements(x: Tensor) -> int:
    """Of its storage: what a view or expand shows is not there. One packed by oneDNN has none that can be asked."""
    return x.numel() if x.is_mkldnn else x.untyped_storage().nbytes() // x.element_size()


@dataclass
class Seen:
    """What an iteration held at most: elements of a tensor and who returned it, bytes of an allocation, ops seen."""

    elements: int
    by: str
    allocation: int
    ops: set[str] = field(default_factory=set)


def watch(run: PPOTrainer) -> Seen:
    """One iteration (rollout, score, two epochs of update) and an evaluation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, Watch() as tensors:
        run.train()
        run.evaluate()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocations = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert len(allocations) > 1000
    return Seen(tensors.largest, tensors.by, max(allocations), {event.name() for event in events})


def iteration(folder: Path, *, separate: bool = False, **changes: Any) -> PPOTrainer:
    run = trainer(
        folder, model=tiny.policy(vocab_size=VOCABULARY), ref_model=tiny.policy(vocab_size=VOCABULARY, seed=5),
        value_model=tiny.classifier(vocab_size=VOCABULARY) if separate else None,
        train_dataset=[{"input_ids": [5]}], eval_dataset=[{"input_ids": [6]}] * EPISODES,
        total_episodes=EPISODES, per_device_train_batch_size=EPISODES, gradient_accumulation_steps=1,
        response_length=TOKENS, num_ppo_epochs=2, top_p=0.9, **changes,
    )  # fmt: skip
    run.sampling = replace(run.sampling, stop_token_ids=())
    return run


@pytest.mark.parametrize("kl_estimator", ["k1", "full"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"bf16": True, "gradient_checkpointing": True, "entropy_coef": 0.01}]
)
def test_an_iteration_holds_nothing_of_tokens_times_vocabulary(
    tmp_path: Path, separate: bool, kl_estimator: str, settings: dict[str, Any]
) -> None:
    seen = watch(iteration(tmp_path, separate=separate, kl_estimator=kl_estimator, **settings))
    assert {"fastppo::sample", "fastppo::linear_logprobs", "fastppo::ppo_loss"} <= seen.ops
    assert ("fastppo::distribution_kl" in seen.ops) == (kl_estimator == "full")
    assert seen.elements < LIMIT / 2, seen.by
    assert seen.allocation < 2 * LIMIT / 2  # two bytes an element: the least that logits take


def _full_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.T).float().log_softmax(-1)
    return logprobs.gather(-1, ids[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


class _FullLogitsInBackward(torch.autograd.Function):
    """The log-probs of our op; their gradient through full logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
        ctx.save_for_backward(hidden, weight, ids)
        return models.ops.linear_logprobs(hidden, weight, ids)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, weight, ids = ctx.saved_tensors
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            outputs = _full_logits(*inputs, ids)
        return *torch.autograd.grad(outputs, inputs, gradients), None


@pytest.mark.parametrize("plant", [_full_logits, _FullLogitsInBackward.apply])
def test_a_head_with_full_logits_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., Any]
) -> None:
    def head_logprobs(model: Any, hidden: Tensor, ids: Tensor, temperature: float) -> Any:
        return plant(hidden, models.lm_head(model).weight, ids)

    run = iteration(tmp_path)
    monkeypatch.setattr(models, "head_logprobs", head_logprobs)
    seen = watch(run)
    assert seen.elements >= LIMIT and seen.allocation >= 4 * LIMIT


def test_a_rollout_with_the_logits_of_all_tokens_is_caught(tmp_path: Path) -> None:
    run = iteration(tmp_path)
    plain, length = run.actor_critic.policy.forward, 0

    def forward(input_ids: Tensor, **inputs: Any) -> Any:
        nonlocal length
        length += input_ids.shape[1]
        if length == TOKENS:  # as a model would that keeps no cache, at its last token
            run.actor_critic.policy.lm_head(torch.zeros(EPISODES, TOKENS, 32))
        return plain(input_ids=input_ids, **inputs)

    run.actor_critic.policy.forward = forward  # type: ignore[method-assign]
    seen = watch(run)
    assert seen.elements >= LIMIT and seen.allocation >= 4 * LIMIT


def test_an_allocation_that_no_op_returns_is_caught(tmp_path: Path) -> None:
    # Convolution unfolds its input inside: [1, 9, 64 * 64] that no op hands out.
    kernel = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, Watch() as tensors:
        torch.nn.functional.conv2d(image, kernel)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest > 4 * 8 * tensors.largest
