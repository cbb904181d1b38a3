"""A language model small enough to be trained on the spot, and PPO of it (or of any other) against a user."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.dialogue.simulators import Corpus, CorpusUser, TurnReward
from fastppo import PPOConfig, PPOTrainer

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def as_chat(turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns as messages, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def small_tokenizer(texts: Sequence[str], size: int = 1024) -> Any:
    """A lower-case byte-pair tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[1], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def small_model(
    conversations: Sequence[Sequence[str]], *, steps: int, width: int = 96, turns: int = 4, seed: int = 0
) -> tuple[Any, Any]:
    """A Llama of a third of a million parameters, trained for `steps` batches of 32 pieces of conversations.

    Returns:
        (model, tokenizer)
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = small_tokenizer([turn for chat in conversations[:2000] for turn in chat])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps + 1)
    for _ in range(steps):
        pieces = []
        for chat in draw.choices(conversations, k=32):
            start = draw.randrange(max(1, len(chat) - turns + 1))
            pieces.append(as_chat(chat[start : start + turns]))
        inputs = tokenizer.apply_chat_template(
            pieces, padding=True, padding_side="right", truncation=True, max_length=64, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        ids = inputs["input_ids"]
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def ppo(
    model: Any,
    tokenizer: Any,
    corpora: dict[str, Corpus],
    reward: TurnReward,
    output: Path,
    *,
    updates: int,
    dialogues: int = 32,
    turns: int = 3,
    reply_tokens: int = 12,
    held_out: int = 128,
    **settings: Any,
) -> PPOTrainer:
    """A trainer whose policy talks with people of `corpora["train"]`; `evaluate()` with all, by the corpora's names."""
    config = {
        "output_dir": str(output),
        "per_device_train_batch_size": dialogues,
        "total_episodes": updates * dialogues,
        "response_length": reply_tokens,
        "max_turns": turns,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "learning_rate": 5e-4,
        "kl_coef": 0.1,
        "lam": 0.95,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
    }

    # The user opens, so the prompt is empty; which row it is matters to nobody but the user.
    def rows(split: str, count: int) -> list[dict[str, Any]]:
        return [{"prompt": [], "split": split} for _ in range(count)]

    return PPOTrainer(
        PPOConfig(**{**config, **settings}),
        tokenizer,
        model,
        train_dataset=rows("train", dialogues),
        eval_dataset={name: rows(name, held_out) for name in corpora},
        environment_factory=lambda: CorpusUser(corpora, reward, turns),
    )
