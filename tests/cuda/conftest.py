"""Where the tests that look at compiled kernels run.

Wherever the library was built with CUDA. Where it was not, they fail if FASTPPO_CUDA=1 is set, as .ci/run sets it, and
else are skipped: a machine without a toolkit has nothing to judge.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def cuda_library() -> Path:
    from fastppo import _C, ops  # noqa: F401  ops load what _C is linked to

    facts = _C.build_facts()["cuda"]
    if not facts.startswith("on: "):
        if os.environ.get("FASTPPO_CUDA") == "1":
            pytest.fail(f"FASTPPO_CUDA=1 demands the CUDA kernels, but the library has none ({facts})")
        pytest.skip(f"the library was built without CUDA ({facts}); FASTPPO_CUDA=1 makes this a failure")
    return Path(_C.__file__)
