"""stable-baselines3's PPO on fastppo's ops: import PPO from here in place of there.

The same arguments, policies, callbacks, log names and saved files, and, from the same seed, the same weights up to
rounding. What runs differently: GAE of a rollout is `ops.gae`, the objective with its gradients and metrics is one call
of `ops.ppo_loss`, metrics are read once per update rather than after every mini-batch, and Adam takes its step fused.

Needs stable-baselines3: pip install 'fastppo[sb3]'.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops import PPOStats, gae, ppo_loss

try:
    import stable_baselines3
    from gymnasium import spaces
    from stable_baselines3.common import buffers
    from stable_baselines3.common.utils import explained_variance
except ImportError as error:
    raise ImportError("fastppo.sb3 needs stable-baselines3: pip install 'fastppo[sb3]'") from error

__all__ = ["PPO", "DictRolloutBuffer", "RolloutBuffer", "gae_of_rollout"]


def gae_of_rollout(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_ends: np.ndarray,
    last_values: np.ndarray,
    *,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """Advantages in environments whose episodes follow one another.

    Every run of steps up to an end is a row of `ops.gae`. Rows whose lengths are within a factor of four go together,
    so that one long episode among many short ones does not pad them all.

    Args:
        rewards: (T, E) float32; step t of environment e.
        values: (T, E) float32, the critic's estimates of the states that were acted in.
        episode_ends: (T, E) bool, True where the episode ended with this step.
        last_values: (E,) float32, estimates of the states after step T - 1; of no effect where that was an end.
        gamma: discount per step, from 0 to 1.
        lam: decay of the estimator, from 0 to 1.

    Returns:
        (T, E) float32.
    """
    cuts = episode_ends.T.copy()  # environment by environment: the rows lie behind one another
    cuts[:, -1] = True
    last = np.flatnonzero(cuts)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    bootstrap = np.zeros(len(last), np.float32)  # only a row that the rollout cut short goes on after its end
    bootstrap[cuts.sum(1).cumsum() - 1] = np.where(episode_ends[-1], 0, last_values)

    nowhere = rewards.size  # one place behind the last, which padding reads and writes
    rows_rewards, rows_values = (np.append(x.T, np.float32(0)) for x in (rewards, values))
    advantages = np.empty_like(rows_rewards)
    sizes = np.frexp(lengths)[1] // 2
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        column = np.arange(lengths[rows].max())
        mask = column < lengths[rows, None]
        places = np.where(mask, first[rows, None] + column, nowhere)
        inputs = rows_rewards[places], rows_values[places], mask, bootstrap[rows]
        *tensors, bootstrap_values = (torch.from_numpy(x) for x in inputs)
        advantages[places] = gae(*tensors, gamma=gamma, lam=lam, bootstrap_values=bootstrap_values)[0].numpy()
    return advantages[:nowhere].reshape(rewards.shape[::-1]).T


class _WithGae:
    """What makes a rollout buffer of stable-baselines3 compute its advantages with `gae_of_rollout`."""

    def compute_returns_and_advantage(self: Any, last_values: Tensor, dones: np.ndarray) -> None:
        episode_ends = np.concatenate([self.episode_starts[1:], dones[None]]).astype(bool)
        self.advantages = gae_of_rollout(
            self.rewards,
            self.values,
            episode_ends,
            last_values.detach().flatten().float().cpu().numpy(),
            gamma=self.gamma,
            lam=self.gae_lambda,
        )
        self.returns = self.advantages + self.values


class RolloutBuffer(_WithGae, buffers.RolloutBuffer):
    """stable-baselines3's rollout buffer with advantages of `ops.gae`."""


class DictRolloutBuffer(_WithGae, buffers.DictRolloutBuffer):
    """The same for observations that are dictionaries."""


_OURS = {buffers.RolloutBuffer: RolloutBuffer, buffers.DictRolloutBuffer: DictRolloutBuffer}


class _Step(NamedTuple):
    """What a mini-batch leaves for the log; tensors, so that nothing waits for a device."""

    stats: PPOStats
    approx_kl: Tensor
    clip_fraction: Tensor


class PPO(stable_baselines3.PPO):
    """stable-baselines3's PPO on fastppo's ops. Arguments, attributes and methods are those of
    [its documentation](https://stable-baselines3.readthedocs.io/en/master/modules/ppo.html); all of them work.

    `rollout_buffer_class` may be any rollout buffer; the two of stable-baselines3 are replaced by ours.

    Raises:
        ValueError: `gamma` or `gae_lambda` is outside [0, 1], a clip range or `target_kl` is not above 0, or
            `rollout_buffer_class` is no rollout buffer; the message names it.

    Example:
        >>> from fastppo.sb3 import PPO
        >>> PPO("MlpPolicy", "CartPole-v1", seed=0).learn(50_000)
    """

    def _setup_model(self) -> None:
        self._check()
        if self.rollout_buffer_class is None:
            dictionary = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = DictRolloutBuffer if dictionary else RolloutBuffer
        self.rollout_buffer_class = _OURS.get(self.rollout_buffer_class, self.rollout_buffer_class)
        super()._setup_model()
        if type(self.policy.optimizer) is torch.optim.Adam:
            for group in self.policy.optimizer.param_groups:
                if group["fused"] is None and group["foreach"] is None:
                    group["fused"] = True

    def _check(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"PPO: {name} must be from 0 to 1, got {getattr(self, name)!r}")
        for name in ("clip_range", "clip_range_vf", "target_kl"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"PPO: {name} must be above 0, got {value!r}")
        buffer = self.rollout_buffer_class
        if buffer is not None and not (
            isinstance(buffer, type) and issubclass(buffer, buffers.RolloutBuffer)
        ):
            raise ValueError(
                "PPO: rollout_buffer_class must be a subclass of stable_baselines3's RolloutBuffer, "
                f"got {buffer!r}"
            )

    def train(self) -> None:
        """Epochs of mini-batches over the rollout."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]

        steps: list[_Step] = []
        first_of_epoch, loss, too_far = 0, torch.tensor(math.nan), False
        for epoch in range(self.n_epochs):
            first_of_epoch = len(steps)
            for batch in self.rollout_buffer.get(self.batch_size):
                loss, step = self._loss(batch, clip_range, clip_range_vf)
                steps.append(step)
                too_far = self.target_kl is not None and step.approx_kl.item() > 1.5 * self.target_kl
                if too_far:
                    if self.verbose >= 1:
                        print(f"Epoch {epoch} ends early: approx_kl {step.approx_kl.item():.3g} is too far")
                    break
                self.policy.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
            self._n_updates += 1
            if too_far:
                break
        self._log(steps, first_of_epoch, loss, clip_range, clip_range_vf)

    def _loss(self, batch: Any, clip_range: float, clip_range_vf: float | None) -> tuple[Tensor, _Step]:
        actions = batch.actions
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        values, logprobs, entropy = self.policy.evaluate_actions(batch.observations, actions)
        values = values.flatten()
        if clip_range_vf is not None:
            # stable-baselines3 lets a value learn only within the range; `ops.ppo_loss`'s own clipping takes the larger
            # of both errors.
            values = batch.old_values + (values - batch.old_values).clamp(-clip_range_vf, clip_range_vf)
        advantages = batch.advantages
        if self.normalize_advantage and len(advantages) > 1:
            std, mean = torch.std_mean(advantages)
            advantages = (advantages - mean) / (std + 1e-8)
        loss, stats = ppo_loss(
            logprobs,
            batch.old_log_prob,
            advantages,
            torch.ones_like(logprobs, dtype=torch.bool),
            new_values=values,
            values=batch.old_values,
            returns=batch.returns,
            entropy=-logprobs if entropy is None else entropy,
            clip_range=clip_range,
            value_clip_range=math.inf,
            vf_coef=2 * self.vf_coef,  # its value loss is not halved
            entropy_coef=self.ent_coef,
        )
        with torch.no_grad():
            log_ratio = logprobs - batch.old_log_prob
            moved = torch.expm1(log_ratio)
            clip_fraction = (moved.abs() > clip_range).float().mean()
            return loss, _Step(stats, (moved - log_ratio).mean(), clip_fraction)

    def _log(
        self,
        steps: list[_Step],
        first_of_epoch: int,
        loss: Tensor,
        clip_range: float,
        clip_range_vf: float | None,
    ) -> None:
        means = PPOStats(torch.stack([step.stats.tensor for step in steps]).mean(0).cpu())
        record = self.logger.record
        record("train/entropy_loss", -means.entropy.item())
        record("train/policy_gradient_loss", means.policy_loss.item())
        record("train/value_loss", 2 * means.value_loss.item())
        record(
            "train/approx_kl", torch.stack([step.approx_kl for step in steps[first_of_epoch:]]).mean().item()
        )
        record("train/clip_fraction", torch.stack([step.clip_fraction for step in steps]).mean().item())
        record("train/loss", loss.item())
        buffer = self.rollout_buffer
        record(
            "train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        )
        if hasattr(self.policy, "log_std"):
            record("train/std", self.policy.log_std.exp().mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            record("train/clip_range_vf", clip_range_vf)
