"""Four ways to fine-tune a model on chats, in one table; and a loss of two parts, generation + λ · action."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.dialogue.manager import ACTIONS
from examples.dialogue.policy import as_chat
from examples.warm_replies import need

METHODS = ("full", "lora", "prefix", "prompt")
# Of each method about the rate that its authors use: few weights move far.
RATES = {"full": 5e-5, "lora": 5e-4, "prefix": 1e-2, "prompt": 1e-1}


@dataclass
class Tuned:
    """What a method took and gave; `megabytes` is what the optimizer and gradients add, `peak` the process' peak."""

    method: str
    trainable: int
    share: float
    megabytes: float
    peak: float
    seconds: float
    perplexity: float


def peft_config(method: str, rank: int = 8, virtual_tokens: int = 16) -> Any:
    """The adapter of a method; None for "full".

    Raises:
        ValueError: `method` is none of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "full":
        return None
    peft = need("peft", "peft")
    if method == "lora":
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
    if method == "prefix":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)


def tune(
    method: str,
    model: Any,
    tokenizer: Any,
    train: Sequence[Sequence[str]],
    held_out: Sequence[Sequence[str]],
    output: Path,
    *,
    steps: int,
    batch: int = 4,
    max_length: int = 64,
    **settings: Any,
) -> Tuned:
    """Fine-tune with TRL's `SFTTrainer`; the same chats in the same order whatever the method.

    Args:
        method: one of `METHODS`.
        model: is trained in place (or under an adapter).
        tokenizer: with a chat template.
        train: conversations.
        held_out: conversations whose perplexity is measured.
        output: folder for the trainer.
        steps: optimizer steps.
        batch: conversations per step.
        max_length: tokens of a conversation that are kept.
        settings: further ones of `trl.SFTConfig`.
    """
    datasets, trl = need("datasets", "datasets"), need("trl", "trl")
    from peft import get_peft_model
    from transformers import PrinterCallback

    adapter = peft_config(method)
    rows = datasets.Dataset.from_list([{"messages": as_chat(chat)} for chat in train[: steps * batch]])
    if adapter is not None:
        torch.manual_seed(0)
        model = get_peft_model(model, adapter)
    config = trl.SFTConfig(
        **{
            "output_dir": str(output),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "max_length": max_length,
            "learning_rate": RATES[method],
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": steps,
            "seed": 0,
            **settings,
        }
    )
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # the table is what one wants to see
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    # A gradient and AdamW's two moments, each in float32.
    return Tuned(
        method=method,
        trainable=trainable,
        share=trainable / every,
        megabytes=3 * 4 * trainable / 1e6,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        seconds=seconds,
        perplexity=perplexity(model, tokenizer, held_out, max_length=max_length),
    )


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, chats: Sequence[Sequence[str]], *, max_length: int = 64) -> float:
    """Of the chats' tokens, but for what all begin with: a template's system prompt says nothing of a method."""
    model.eval()
    total, count = 0.0, 0
    rows = [tokenizer.apply_chat_template(as_chat(chat), return_dict=False)[:max_length] for chat in chats]
    columns = list(zip(*rows, strict=False))
    goes_on = any(len(row) > len(columns) for row in rows)  # where they differ in nothing but their ends
    alike = len(columns) if goes_on else 1
    first = next((i for i, column in enumerate(columns) if i > 0 and len(set(column)) > 1), alike)
    for ids in rows:
        input_ids = torch.tensor([ids], device=model.device)
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
        own = logits[0, -len(ids) :]  # virtual tokens come before
        losses = nn.functional.cross_entropy(own[:-1].float(), input_ids[0, 1:], reduction="none")
        total += losses[first - 1 :].sum().item()
        count += len(ids) - first
    return math.exp(total / count)


# --- generation + λ · action -----------------------------------------------------------------------------------------


def actions(chat: Sequence[str]) -> list[tuple[list[str], str]]:
    """Histories that end with a reply, and what that was: a question ("ask"), an "answer", or the last word ("end")."""
    found = []
    for i in range(1, len(chat), 2):
        last = i >= len(chat) - 2
        found.append((list(chat[: i + 1]), "end" if last else "ask" if "?" in chat[i] else "answer"))
    return found


class JointModel(nn.Module):
    """A causal language model with a head that chooses the next action, on the state before the reply's first token.

    ::

        loss = mean cross-entropy of the reply's tokens + weight * cross-entropy of the action

    Args:
        model: any causal language model; its trunk serves both.
        tokenizer: with a chat template.
        weight: λ.
    """

    def __init__(self, model: Any, tokenizer: Any, weight: float) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        self.model, self.tokenizer, self.weight = model, tokenizer, weight
        self.head = nn.Linear(model.config.hidden_size, len(ACTIONS))

    def forward(
        self, turns: Sequence[str], action: str, max_length: int = 96
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Joint loss, generation loss and the actions' logits, of a history whose last turn is the reply."""
        before, ids = self._ids(turns, max_length)
        out = self.model(input_ids=ids, output_hidden_states=True)
        generation = nn.functional.cross_entropy(out.logits[0, before - 1 : -1], ids[0, before:])
        logits = self.head(out.hidden_states[-1][0, before - 1])
        wanted = torch.tensor(ACTIONS.index(action))
        return generation + self.weight * nn.functional.cross_entropy(logits, wanted), generation, logits

    @torch.no_grad()
    def act(self, messages: list[dict[str, str]], state: Any = None) -> str:
        """The likeliest action, as a `DialogueManager` asks for it."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        states = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return ACTIONS[int(self.head(states[0, -1]).argmax())]

    def _ids(self, turns: Sequence[str], max_length: int) -> tuple[int, Tensor]:
        messages = as_chat(turns)
        prompt = self.tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        whole = self.tokenizer.apply_chat_template(messages, return_dict=False)
        cut = max(0, min(len(whole) - max_length, len(prompt) - 1))
        return len(prompt) - cut, torch.tensor([whole[cut:]])


def train_jointly(
    joint: JointModel, chats: Sequence[Sequence[str]], *, steps: int, batch: int = 8, rate: float = 1e-3
) -> None:
    """AdamW on the joint loss, over the chats' histories in order."""
    histories = [pair for chat in chats for pair in actions(chat)]
    optimizer = torch.optim.AdamW(joint.parameters(), lr=rate)
    joint.train()
    for step in range(steps):
        for k in range(batch):
            turns, action = histories[(step * batch + k) % len(histories)]
            (joint(turns, action)[0] / batch).backward()
        nn.utils.clip_grad_norm_(joint.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure_jointly(joint: JointModel, chats: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Held-out perplexity of replies (mean over replies of their loss), and accuracy of the action."""
    joint.eval()
    losses, hits = [], []
    for chat in chats:
        for turns, action in actions(chat):
            _, generation, logits = joint(turns, action)
            losses.append(generation.item())
            hits.append(ACTIONS[int(logits.argmax())] == action)
    return math.exp(sum(losses) / len(losses)), sum(hits) / len(hits)
