"""The ops: plain functions on tensors, compiled. Same names and signatures in :mod:`fastppo.reference`.

All take float32, bfloat16 or float16 with any row stride, accumulate in float32 or wider, give the same bits
on every run and thread count, have fakes for ``torch.compile(fullgraph=True)``, and never read masked places
into a sum.
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
