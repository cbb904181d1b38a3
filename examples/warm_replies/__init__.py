"""PPO teaches a 135M chat model to answer strangers more warmly: `make demo`.

openings.py   real people's opening messages, split into training and held-out
policy.py     SmolLM2-135M-Instruct out of its PyPI package, as an ordinary model folder
warmth.py     the reward, and what is measured on held-out openings
progress.py   the live bar and the record of every update
report.py     terminal table, curves and report.html
talk.py       chat with what came out
"""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, package: str) -> ModuleType:
    """Import one of the demo's packages, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"The demo needs the package {package}, which is not installed here ({error}); "
            "`make setup` installs all it needs."
        ) from error
