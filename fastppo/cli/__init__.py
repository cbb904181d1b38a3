"""The command line `fastppo`: each command parses its settings and calls a library.

`import fastppo` does not import this package, and this package imports nothing heavy until a command runs.
"""

from __future__ import annotations

import importlib
from typing import Any


class UsageError(Exception):
    """What a person can put right: shown as one message, without a traceback."""


def need(module: str, package: str | None = None) -> Any:
    """Import a module of the `rlhf` extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this command needs the package {package or module}, which cannot be imported here ({error}): "
            "pip install 'fastppo[rlhf]'"
        ) from error
