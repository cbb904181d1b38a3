"""A language model of 1.1 million parameters, trained on the spot on turns of the Chit Chat Challenge.

It chats badly, but PPO on it takes seconds where SmolLM2-135M takes an hour, so that a comparison of learning can have
many seeds on any machine. Training takes ten minutes on one core of an EPYC without AVX-512 and happens once.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.peers import ROOT
from examples.warm_replies import need

FOLDER = ROOT / ".cache" / "small-chat-lm"
STEPS, BATCH, LEARNING_RATE = 1500, 32, 3e-3
MAX_WORDS = 15
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_folder() -> str:
    """Folder with model and tokenizer, as `from_pretrained` likes them; trained if it is not there."""
    if not FOLDER.exists():
        FOLDER.parent.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=FOLDER.parent))
        try:
            _train(unfinished)
            os.replace(unfinished, FOLDER)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return str(FOLDER)


def read_exchanges() -> list[tuple[str, str]]:
    """(turn, answer) of at most 15 words each."""
    exchanges: list[tuple[str, str]] = []
    for chat in need("chitchat_dataset", "chitchat-dataset").Dataset().values():
        turns = [" ".join(" ".join(m["text"] for m in turn).split()) for turn in chat["messages"]]
        exchanges += pairwise(turns)
    return [pair for pair in exchanges if all(0 < len(turn.split()) <= MAX_WORDS for turn in pair)]


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _train(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    exchanges = read_exchanges()
    tokenizer = _tokenizer([turn for pair in exchanges[:20000] for turn in pair])
    pad, end, user, assistant = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    order = random.Random(0).choices(exchanges, k=STEPS * BATCH)
    encoded = tokenizer([turn for pair in order for turn in pair])["input_ids"]
    rows = [[user, *encoded[2 * i], end, assistant, *encoded[2 * i + 1], end] for i in range(STEPS * BATCH)]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=pad,
            eos_token_id=end,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(STEPS):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in batch])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == pad, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"small language model: step {step + 1} of {STEPS}, loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(model_folder())
