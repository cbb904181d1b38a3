"""Every op in plain torch: the definition, the tests' expectation and the benchmarks' baseline.

Same names and signatures as :mod:`fastppo.ops`, where the docstrings are. Differentiable by autograd, on any
device; float64 inputs are computed in float64, everything else in float32.
"""

from .adamw import adamw_step_, join_master, split_master
from .gae import RewardsAndAdvantages, gae, rewards_and_advantages, scale_to_unit_std, whiten
from .kl import KL_ESTIMATORS, kl_penalty
from .ppo_loss import PPOStats, ppo_loss

__all__ = [
    "KL_ESTIMATORS",
    "PPOStats",
    "RewardsAndAdvantages",
    "adamw_step_",
    "gae",
    "join_master",
    "kl_penalty",
    "ppo_loss",
    "rewards_and_advantages",
    "scale_to_unit_std",
    "split_master",
    "whiten",
]
