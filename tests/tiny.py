"""Tiny random models and a tokenizer trained on a page of text: every architecture in a second, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = """the quick brown fox jumps over the lazy dog . how are you today ? i am fine , thank you .
what do you like to do ? i like to read books and walk in the park . that sounds lovely !"""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

VOCABULARY = 307  # a prime: no multiple of any tile


# For a PPOConfig: an update is 16 episodes.
SETTINGS: dict[str, Any] = {
    "report_to": [],
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "response_length": 6,
    "learning_rate": 1e-3,
    "temperature": 1.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_sample_generations": 0,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def tokenizer(pad: str | None = "<|pad|>") -> PreTrainedTokenizerFast:
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator(
        TEXT.splitlines(),
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token=pad)
    fast.chat_template = CHAT_TEMPLATE
    return fast


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def policy(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model with logits far enough apart to tell right from wrong."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, "initializer_range": 0.2, **changes}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if architecture == "llama-tied":
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8)).eval()
    if architecture == "gemma3":
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8, final_logit_softcapping=30.0)
        ).eval()
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                eos_token_id=1,
                bos_token_id=1,
                initializer_range=sizes["initializer_range"],
            )
        ).eval()
    raise ValueError(architecture)


ARCHITECTURES = ("llama", "llama-tied", "gpt2", "qwen2", "qwen3", "gemma3")


def classifier(seed: int = 1, num_labels: int = 1, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**{**_SIZES, **changes}, num_labels=num_labels)).eval()
