"""The ops: plain functions on tensors, compiled. Same names and signatures in :mod:`fastppo.reference`.

All take float32, bfloat16 or float16 with any row stride, accumulate in float32 or wider, give the same bits
on every run and thread count, have fakes for ``torch.compile(fullgraph=True)``, and never read masked places
into a sum.
"""

from .distribution_kl import distribution_kl
from .gae import RewardsAndAdvantages, gae, rewards_and_advantages, scale_to_unit_std, whiten
from .linear_logprobs import linear_logprobs
from .logprobs import logprobs
from .sample import Sample, sample

__all__ = [
    "RewardsAndAdvantages",
    "Sample",
    "distribution_kl",
    "gae",
    "linear_logprobs",
    "logprobs",
    "rewards_and_advantages",
    "sample",
    "scale_to_unit_std",
    "whiten",
]
