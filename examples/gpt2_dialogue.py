"""Fine-tuning of a GPT-2 on dialogues: input and output joined, at most 128 tokens, loss per epoch, perplexity.

The dialogues are people's (chitchat-dataset): each turn is an input, the answer to it the output. Chats are split into
training, development and test. No GPT-2 weights install from PyPI: by default a small GPT-2 begins from scratch, with
a byte-level BPE of its own, at a learning rate of 1e-3; with --model FOLDER a pretrained one is tuned at 2e-5.

    python -m examples.gpt2_dialogue --epochs 5
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import chitchat_dataset
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

MAX_LENGTH = 128
PAD, END, OUTPUT = "<|pad|>", "<|endoftext|>", "<|output|>"


class Exchange(NamedTuple):
    """What somebody said, and what was answered."""

    input: str
    output: str


def read_exchanges(most: int | None = None) -> dict[str, list[Exchange]]:
    """Exchanges of training, development and test: 80, 10 and 10 % of the chats; of training, `most` at most."""
    chats = [
        [" ".join(" ".join(message["text"] for message in turn).split()) for turn in chat["messages"]]
        for chat in chitchat_dataset.Dataset().values()
    ]
    random.Random(0).shuffle(chats)
    tenth = len(chats) // 10
    parts = {"test": chats[:tenth], "development": chats[tenth : 2 * tenth], "training": chats[2 * tenth :]}
    exchanges = {
        name: [Exchange(*pair) for chat in part for pair in pairwise(chat) if all(pair)]
        for name, part in parts.items()
    }
    fewer = None if most is None else max(1, most // 8)
    return {name: of[: most if name == "training" else fewer] for name, of in exchanges.items()}


def small_gpt2(
    exchanges: Sequence[Exchange], hidden: int, layers: int
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A GPT-2 from scratch and a BPE learned from the training dialogues."""
    bpe = ByteLevelBPETokenizer(lowercase=True)
    texts = (text for exchange in exchanges for text in exchange)
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=[PAD, END, OUTPUT], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[OUTPUT]
    )
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_LENGTH,
        n_embd=hidden,
        n_layer=layers,
        n_head=max(1, hidden // 32),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config), tokenizer


def pretrained(folder: str) -> tuple[Any, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": PAD, "additional_special_tokens": [OUTPUT]})
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def joined(exchanges: Sequence[Exchange], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Input, mark, output, end, as token ids."""
    texts = [f"{exchange.input}{OUTPUT}{exchange.output}{tokenizer.eos_token}" for exchange in exchanges]
    return Dataset.from_dict(
        {"input_ids": tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]}
    )


def reply(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text + OUTPUT, truncation=True, max_length=MAX_LENGTH // 2, return_tensors="pt")[
        "input_ids"
    ]
    torch.manual_seed(0)
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=True, top_p=0.9
    )
    (text,) = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a pretrained GPT-2 (default: a small one from scratch)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the small one")
    parser.add_argument("--layers", type=int, default=4, help="layers of the small one")
    parser.add_argument("--exchanges", type=int, help="of training at most (default: all, 109,000)")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="of AdamW (default: 2e-5, from scratch 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/gpt2_dialogue"))
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    exchanges = read_exchanges(options.exchanges)
    if options.model:
        model, tokenizer = pretrained(options.model)
    else:
        model, tokenizer = small_gpt2(exchanges["training"], options.hidden, options.layers)
    data = {name: joined(of, tokenizer) for name, of in exchanges.items()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(options.output),
            learning_rate=options.learning_rate or (2e-5 if options.model else 1e-3),
            weight_decay=0.01,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=data["training"],
        eval_dataset=data["development"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = trainer.evaluate(data["test"])["eval_loss"]
    trainer.train()
    after = trainer.evaluate(data["test"])["eval_loss"]
    trainer.save_model(str(options.output / "model"))

    log = trainer.state.log_history
    epochs = [
        (row["epoch"], row["loss"], other["eval_loss"])
        for row, other in zip(
            (row for row in log if "loss" in row),
            (row for row in log if "eval_loss" in row and row["epoch"]),
            strict=False,
        )
    ]
    sizes = ", ".join(f"{len(of)} {name}" for name, of in exchanges.items())
    table = Table(
        "epoch", "loss", "loss, development", "perplexity, development", title=f"Exchanges: {sizes}"
    )
    for epoch, loss, development in epochs:
        table.add_row(f"{epoch:.0f}", f"{loss:.3f}", f"{development:.3f}", f"{math.exp(development):.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"Perplexity on the test: {math.exp(before):.1f} before, [bold]{math.exp(after):.1f}[/] after"
    )
    for exchange in exchanges["test"][:3]:
        console.print(f"  {exchange.input} → [bold]{reply(model, tokenizer, exchange.input)}[/]")
    return {"epochs": epochs, "before": math.exp(before), "after": math.exp(after)}


if __name__ == "__main__":
    main()
