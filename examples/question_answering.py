"""A question-answering environment, and a small language model that PPO makes answer correctly.

The environment holds a knowledge base: who is where, and who has what. It asks a question and retrieves the facts that
share most words with it, one of which holds the answer. The reward is the answer's correctness: exact match, or F1 of
its words. The policy, a language model of 88,000 parameters, learns the language from texts in which four answers
of ten are beside the point (supervised), then, from the reward alone, to answer what was asked (fastppo.PPOTrainer). It
is tested on knowledge bases it has not seen.

    python -m examples.question_answering --episodes 6400
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import PPOConfig, PPOTrainer

PEOPLE = ("ada", "ben", "cleo", "dan", "eva", "finn", "gita", "hugo")
PLACES = ("attic", "bakery", "cellar", "garden", "harbour", "kitchen", "library", "station")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
THINGS = ("ball", "book", "cup", "hat", "key", "lamp", "pen", "ring")
FRAME = ("<pad>", "<end>", "the", "is", "in", "has", "where", "what", "does", "have", "?", ".", ":")
FACTS_READ = 2


class Question(NamedTuple):
    """What is asked, with the facts that were retrieved for it."""

    prompt: str
    answer: str
    decoy: str  # what the other fact says


def exact_match(answer: str, expected: str) -> float:
    return float(answer.split() == expected.split())


def f1(answer: str, expected: str) -> float:
    """Harmonic mean of the shares of the answer's words that are right, and of the right words that are in it."""
    given, right = answer.split(), expected.split()
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if given or right else 1.0


CORRECTNESS = {"exact-match": exact_match, "f1": f1}


def retrieve(question: str, facts: Sequence[str], count: int) -> list[str]:
    """The facts that share most words with a question, in the order of the knowledge base."""
    words = set(question.split())
    best = sorted(facts, key=lambda fact: len(words & set(fact.split())), reverse=True)[:count]
    return [fact for fact in facts if fact in best]


class QuestionAnsweringEnv(gymnasium.Env[str, str]):
    """An episode is one question; the action is the whole answer; the reward is its correctness.

    Args:
        correctness: "exact-match" or "f1".

    Raises:
        ValueError: `correctness` is neither; the message names it.
    """

    def __init__(self, correctness: str = "f1") -> None:
        if correctness not in CORRECTNESS:
            raise ValueError(f"correctness must be one of {', '.join(CORRECTNESS)}, got {correctness!r}")
        self.grade = CORRECTNESS[correctness]
        characters = frozenset(" abcdefghijklmnopqrstuvwxyz.?:<>")
        self.observation_space = gymnasium.spaces.Text(200, charset=characters)
        self.action_space = gymnasium.spaces.Text(50, min_length=0, charset=characters)
        self.question = Question("", "", "")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.question = ask(random.Random(int(self.np_random.integers(2**62))))
        return self.question.prompt, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self.question.prompt, self.grade(action, self.question.answer), True, False, {}


def ask(draw: random.Random) -> Question:
    """A question about a knowledge base that is drawn for it."""
    people = draw.sample(PEOPLE, len(PEOPLE))
    places = dict(zip(people, draw.sample(PLACES, len(people)), strict=True))
    things = {who: f"{draw.choice(COLOURS)} {draw.choice(THINGS)}" for who in people}
    facts = [f"{who} is in the {places[who]} ." for who in people]
    facts += [f"{who} has the {things[who]} ." for who in people]
    draw.shuffle(facts)
    who = draw.choice(people)
    question, answer = draw.choice(
        [(f"where is {who} ?", places[who]), (f"what does {who} have ?", things[who])]
    )
    read = retrieve(question, facts, FACTS_READ)
    decoy = next(said for fact in read if (said := fact.split(" the ")[1].removesuffix(" .")) != answer)
    return Question(" ".join([*read, question, ":"]), answer, decoy)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = (*FRAME, *PEOPLE, *PLACES, *COLOURS, *THINGS)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    steps: int,
    to_the_point: float,
) -> LlamaForCausalLM:
    """Supervised: the language of facts, questions and answers, of which a share is `to_the_point`; batches of 32."""
    draw = random.Random(0)
    said = [q.answer if draw.random() < to_the_point else q.decoy for q in questions]
    texts = [f"{q.prompt} {answer} <end>" for q, answer in zip(questions, said, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = tokenizer(draw.choices(texts, k=32), padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def as_dataset(questions: Sequence[Question]) -> Dataset:
    return Dataset.from_list([question._asdict() for question in questions])


def make_trainer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    env: QuestionAnsweringEnv,
    output: str,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> PPOTrainer:
    """PPO whose reward is the environment's."""

    def correctness(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [env.grade(given, expected) for given, expected in zip(completions, answer, strict=True)]

    config: dict[str, Any] = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 128,
        "num_mini_batches": 2,
        "response_length": 4,
        "temperature": 1.0,
        "kl_coef": 0.02,
        "gradient_checkpointing": False,
        "bf16": False,
        "num_sample_generations": 0,
        "report_to": "none",
        "save_strategy": "no",
    }
    return PPOTrainer(
        args=PPOConfig(output_dir=output, **{**config, **settings}),
        processing_class=tokenizer,
        model=model,
        reward_model=correctness,
        train_dataset=as_dataset(questions),
        callbacks=list(callbacks),
    )


@torch.no_grad()
def answers(model: Any, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> list[str]:
    """The model's answer to each question, sampled as in training."""
    batch = tokenizer(
        [question.prompt for question in questions], padding=True, padding_side="left", return_tensors="pt"
    )
    torch.manual_seed(0)
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=4,
        do_sample=True,
        top_k=0,
    )
    return tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(
    model: Any, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> dict[str, float]:
    """Mean correctness on questions, by each measure."""
    given = answers(model, tokenizer, questions)
    pairs = [(answer, question.answer) for answer, question in zip(given, questions, strict=True)]
    return {name: sum(grade(*pair) for pair in pairs) / len(pairs) for name, grade in CORRECTNESS.items()}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--correctness", choices=list(CORRECTNESS), default="f1", help="the reward")
    parser.add_argument(
        "--sft-questions", type=int, default=2000, help="answered questions to learn the form from"
    )
    parser.add_argument("--sft-steps", type=int, default=500, help="supervised steps of 32 questions")
    parser.add_argument(
        "--to-the-point", type=float, default=0.6, help="share of such answers among the supervised"
    )
    parser.add_argument("--episodes", type=int, default=6400, help="answers of PPO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/question_answering"))
    options = parser.parse_args(arguments)

    draw = random.Random(options.seed)
    sft, train, held_out = (
        [ask(draw) for _ in range(n)] for n in (options.sft_questions, options.episodes, 500)
    )
    tokenizer = make_tokenizer()
    model = fine_tune(
        make_policy(tokenizer, options.seed), tokenizer, sft, options.sft_steps, options.to_the_point
    )
    results = {"supervised": measure(model, tokenizer, held_out)}
    trainer = make_trainer(
        model,
        tokenizer,
        train,
        QuestionAnsweringEnv(options.correctness),
        str(options.output),
        total_episodes=options.episodes,
        seed=options.seed,
    )
    trainer.train()
    trainer.save_model(str(options.output / "model"))
    results["after PPO"] = measure(model, tokenizer, held_out)

    table = Table("500 held-out questions", *CORRECTNESS)
    for name, scores in results.items():
        table.add_row(name, *(f"{scores[measure]:.3f}" for measure in CORRECTNESS))
    console = Console()
    console.print(table)
    for question, answer in zip(held_out[:3], answers(model, tokenizer, held_out[:3]), strict=True):
        console.print(f"{question.prompt} [bold]{answer}[/] (expected: {question.answer})")
    return results


if __name__ == "__main__":
    main()
