"""Loads the compiled library, which registers the ops under ``torch.ops.fastppo``."""

from __future__ import annotations

import torch  # before the library, which is linked against libtorch  # noqa: F401

try:
    from .. import _C as library  # noqa: N811
except ImportError as error:
    if "FASTPPO_CPU_CAPABILITY" in str(error):
        raise
    raise ImportError(
        "fastppo: the compiled library fastppo/_C is missing or does not load "
        f"({error}). Build it with `pip install --no-build-isolation -e .`; "
        "fastppo.reference works without it."
    ) from error

__all__ = ["library"]
