"""The clipped PPO loss and its metrics in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from .kl import _wide, kl_penalty


class PPOStats:
    """Metrics of one :func:`fastppo.ops.ppo_loss` call: detached, 0-d, float32.

    All but ``ratio_max`` are sums over counted tokens divided by the normalizer, so they add up over
    micro-batches.

    Reads as a named tuple does: by name, by place, in a loop, with ``_fields`` and ``_asdict()``. Inside it is one
    tensor, of which a field becomes a view when it is asked for: nine of them at every call took longer than the
    loss of a small batch. ``torch.stack`` of them all is ``stats.tensor``.

    Args:
        tensor: (9,), in the order of ``_fields``.
    """

    __slots__ = ("tensor",)
    _fields = (
        "policy_loss",
        "value_loss",
        "entropy",
        "kl",
        "approx_kl",
        "clip_fraction",
        "value_clip_fraction",
        "ratio",
        "ratio_max",
    )

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def policy_loss(self) -> Tensor:
        """Mean of the clipped policy term."""
        return self.tensor[0]

    @property
    def value_loss(self) -> Tensor:
        """Mean of the clipped value term; 0 without a critic."""
        return self.tensor[1]

    @property
    def entropy(self) -> Tensor:
        """Mean entropy in nats; 0 where it was not given."""
        return self.tensor[2]

    @property
    def kl(self) -> Tensor:
        """Mean estimate of KL(policy || reference) in nats; 0 without a reference."""
        return self.tensor[3]

    @property
    def approx_kl(self) -> Tensor:
        """Mean of (log ratio)^2 / 2, an estimate of how far the policy has moved, in nats."""
        return self.tensor[4]

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens whose policy term is the clipped one."""
        return self.tensor[5]

    @property
    def value_clip_fraction(self) -> Tensor:
        """Share of tokens whose value term is the clipped one."""
        return self.tensor[6]

    @property
    def ratio(self) -> Tensor:
        """Mean ratio."""
        return self.tensor[7]

    @property
    def ratio_max(self) -> Tensor:
        """Largest ratio of a token that counts."""
        return self.tensor[8]

    def __len__(self) -> int:
        return len(self._fields)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor.unbind())

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, place: int | slice) -> Tensor | tuple[Tensor, ...]:
        return self.tensor.unbind()[place]

    def _asdict(self) -> dict[str, Tensor]:
        return dict(zip(self._fields, self, strict=True))

    def __repr__(self) -> str:
        return f"PPOStats({', '.join(f'{name}={x!r}' for name, x in self._asdict().items())})"


def ppo_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    new_values: Tensor | None = None,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_range: float = 0.2,
    vf_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """Twin of :func:`fastppo.ops.ppo_loss`."""
    mask = response_mask
    # Masked places are emptied before any arithmetic: a NaN that never enters has no gradient either.
    new_logprobs, logprobs, advantages = (_select(x, mask) for x in (new_logprobs, logprobs, advantages))
    divisor = mask.sum().clamp(min=1) if normalizer is None else normalizer

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / divisor

    log_ratio = new_logprobs - logprobs
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    token_loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        capped = torch.minimum(token_loss, -dual_clip * advantages)
        token_loss = torch.where(advantages < 0, capped, token_loss)
    policy_loss = mean(token_loss)
    zero = torch.zeros_like(policy_loss)

    value_loss = value_clip_fraction = zero
    if new_values is not None:
        assert values is not None and returns is not None
        new_values, values, returns = (_select(x, mask) for x in (new_values, values, returns))
        # Not torch.clamp: with tensors as bounds it halves the gradient of a value that lies on one.
        lowest, highest = values - value_clip_range, values + value_clip_range
        clipped_values = torch.where(new_values < lowest, lowest, new_values)
        clipped_values = torch.where(new_values > highest, highest, clipped_values)
        error, clipped_error = (new_values - returns) ** 2, (clipped_values - returns) ** 2
        value_loss = 0.5 * mean(torch.maximum(error, clipped_error))
        value_clip_fraction = mean((clipped_error > error).to(error.dtype))

    entropy_mean = zero if entropy is None else mean(_select(entropy, mask))
    kl = zero
    if ref_logprobs is not None:
        kl = mean(kl_penalty(new_logprobs, _select(ref_logprobs, mask), estimator=kl_estimator))

    loss = policy_loss + vf_coef * value_loss - entropy_coef * entropy_mean + kl_coef * kl
    counted_ratio = torch.where(mask, ratio, 0.0)
    stats = (
        policy_loss,
        value_loss,
        entropy_mean,
        kl,
        mean(0.5 * log_ratio**2),
        mean((clipped > unclipped).to(ratio.dtype)),
        value_clip_fraction,
        mean(ratio),
        counted_ratio.max() if counted_ratio.numel() else zero,
    )
    return loss, PPOStats(torch.stack(stats).detach())


def _select(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, _wide(x), 0.0)
