"""PPO for Hugging Face language models, with the hot path in C++/CUDA.

``fastppo.PPOTrainer`` trains; ``fastppo.ops`` are plain functions on tensors for anyone's own trainer;
``fastppo.reference`` holds the same functions in plain torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from . import reference as reference
    from .checkpoint import load_actor_critic as load_actor_critic
    from .config import PPOConfig as PPOConfig
    from .trainer import PPOTrainer as PPOTrainer

__version__ = "0.1.0"
__all__ = ["PPOConfig", "PPOTrainer", "__version__", "load_actor_critic", "ops", "reference"]

# Everything below is imported on first use: `import fastppo` must not pay for the trainer, which pulls in
# transformers.Trainer and accelerate (seconds).
_SUBMODULES = {"ops", "reference"}
_NAMES = {"PPOConfig": "config", "PPOTrainer": "trainer", "load_actor_critic": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
