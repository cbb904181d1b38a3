"""Every op in plain torch: the definition, the tests' expectation and the benchmarks' baseline.

Same names and signatures as :mod:`fastppo.ops`, where the docstrings are. Differentiable by autograd, on any
device; float64 inputs are computed in float64, everything else in float32.
"""

from .adamw import adamw_step_, join_master, split_master
from .decode_attention import decode_attention
from .distribution_kl import distribution_kl
from .gae import RewardsAndAdvantages, gae, rewards_and_advantages, scale_to_unit_std, whiten
from .kl import KL_ESTIMATORS, kl_penalty
from .linear_logprobs import linear_logprobs
from .logprobs import logprobs
from .ppo_loss import PPOStats, ppo_loss
from .ppo_loss_from_logits import ppo_loss_from_logits
from .sample import Sample, sample
from .varlen_attention import varlen_attention

__all__ = [
    "KL_ESTIMATORS",
    "PPOStats",
    "RewardsAndAdvantages",
    "Sample",
    "adamw_step_",
    "decode_attention",
    "distribution_kl",
    "gae",
    "join_master",
    "kl_penalty",
    "linear_logprobs",
    "logprobs",
    "ppo_loss",
    "ppo_loss_from_logits",
    "rewards_and_advantages",
    "sample",
    "scale_to_unit_std",
    "split_master",
    "varlen_attention",
    "whiten",
]
