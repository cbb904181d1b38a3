"""`python -m examples.dialogue intents|augment|ppo|tune|joint`: each prints one table."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.dialogue import augment, corpora, intents, policy, simulators, tuning


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.dialogue", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_intents = commands.add_parser("intents", help="accuracy of both classifiers on held-out utterances")
    of_augment = commands.add_parser("augment", help="what each data augmentation adds to that accuracy")
    for command in (of_intents, of_augment):
        command.add_argument("--splits", type=int, default=10, help="random splits (default 10)")
    of_augment.add_argument("--only", nargs="+", help="some of them, by name")
    of_ppo = commands.add_parser("ppo", help="PPO over several turns with users made of real replies")
    of_ppo.add_argument("--updates", type=int, default=30, help="PPO updates (default 30)")
    of_ppo.add_argument(
        "--steps", type=int, default=200, help="steps that make the small model (default 200)"
    )
    of_ppo.add_argument("--model", help="folder of a chat model, instead of the small one")
    of_ppo.add_argument("--topic", type=float, default=0.2, help="weight of the intent reward (default 0.2)")
    of_ppo.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    of_ppo.add_argument(
        "--output", type=Path, default=Path("runs/dialogue"), help="folder of the trained model"
    )
    of_tune = commands.add_parser(
        "tune", help="full fine-tuning, LoRA, prefix- and prompt-tuning; the joint loss"
    )
    of_tune.add_argument("--model", help="folder of a chat model (default SmolLM2-135M-Instruct)")
    of_tune.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    of_tune.add_argument("--batch", type=int, default=4, help="conversations per step (default 4)")
    of_tune.add_argument("--held-out", type=int, default=20, help="conversations to measure on (default 20)")
    of_tune.add_argument("--methods", nargs="+", default=list(tuning.METHODS), choices=tuning.METHODS)
    of_joint = commands.add_parser("joint", help="generation loss + λ · action loss, on the small model")
    of_joint.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 replies (default 100)")
    of_joint.add_argument(
        "--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="λ (default 0 0.1 1)"
    )
    return parser.parse_args(arguments)


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table, as it stands in the docs."""
    print(f"\n{title}\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(str(x) for x in row) + " |", flush=True)


def measure_intents(splits: int) -> list[list[Any]]:
    rows = []
    for language in corpora.LANGUAGES:
        texts, topics = corpora.intents(language)
        size = [language, len(texts), len(set(topics))]
        for features in (None, "characters", *(("sentences",) if language == "english" else ())):
            found = intents.accuracy(texts, topics, features, splits=splits)
            rows.append([*size, features or "majority", found])
    show("Topic of held-out utterances", ["language", "utterances", "topics", "features", "accuracy"], rows)
    return rows


def measure_augmentation(splits: int, only: Sequence[str] | None = None) -> list[list[Any]]:
    texts, topics = corpora.intents("english")
    near = augment.nearest_words([word.strip(".,!?") for text in texts for word in text.split()])
    each = {
        "synonyms": augment.synonyms(near),
        "deletion": augment.deletion(),
        "swap": augment.swap(),
        "back-translation": augment.back_translation(augment.Dictionary(augment.ENGLISH_GERMAN)),
    }
    rows: list[list[Any]] = []
    plain = {f: intents.accuracy(texts, topics, f, splits=splits) for f in intents.FEATURES}
    rows.append(["none", *(cell for f in intents.FEATURES for cell in (plain[f], ""))])
    sets = {name: [augmentation] for name, augmentation in each.items()} | {"all": list(each.values())}
    unknown = sorted(set(only or ()) - set(sets))
    if unknown:
        raise SystemExit(f"--only must name some of {', '.join(sets)}, got {', '.join(unknown)}")
    for name in only or sets:

        def more(x: list[str], y: list[str], seed: int, some: Any = sets[name]) -> Any:
            return augment.augmented(x, y, some, seed)

        row: list[Any] = [name]
        for features in intents.FEATURES:
            found = intents.accuracy(texts, topics, features, splits=splits, augment=more)
            row += [
                found,
                f"{(found - plain[features]).mean:+.3f} ± {(found - plain[features]).interval:.3f}",
            ]
        rows.append(row)
        print(f"{name}: {', '.join(map(str, row[1:]))}", flush=True)
    header = ["augmentation", *(x for f in intents.FEATURES for x in (f, "change"))]
    show("Accuracy on held-out English utterances", header, rows)
    example = "What do you like to talk about with a smart computer?"
    for name, augmentation in each.items():
        print(f"  {name:30} {augmentation(example, random.Random(1))}")
    return rows


def train_policy(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out reward per dialogue before and after PPO, with what the dialogues are like."""
    train, held = corpora.held_out(corpora.chats())
    if options.model is None:
        model, tokenizer = policy.small_model(train, steps=options.steps, seed=options.seed)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    users = {"train": simulators.Corpus(train), "others": simulators.Corpus(held)}
    reward = simulators.weighted(
        {simulators.pleased(): 1.0, simulators.on_topic(intents.of_language("english")): options.topic}
    )
    trainer = policy.ppo(
        model, tokenizer, users, reward, options.output, updates=options.updates, seed=options.seed
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(str(options.output / "model"))
    size = len(trainer.eval_dataset["train"])
    rows = []
    for name, people in (("train", "those it trained with"), ("others", "people it never met")):
        row = [people]
        for found in (before, after):
            score, spread = (found[f"eval_{name}_objective/{x}"] for x in ("scores", "scores_std"))
            row.append(f"{score:.3f} ± {1.96 * spread / size**0.5:.3f}")
        rows.append([*row, f"{after[f'eval_{name}_objective/kl']:.2f}"])
    header = ["users", "reward before", "reward after", "KL, nats per dialogue"]
    show(f"Reward of {size} new dialogues each", header, rows)
    for talk in trainer.generate_completions(sampling=True)[:3]:
        print(f"\nuser: {talk['query']}\n{talk['model response']}")
    return {"before": before, "after": after, "history": trainer.state.log_history}


def compare_tuning(options: argparse.Namespace) -> list[list[Any]]:
    """Each method on the same conversations, from the same model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.warm_replies.policy import model_folder

    folder = options.model or model_folder()
    train, held = corpora.held_out(corpora.chats())
    held = held[: options.held_out]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    rows: list[list[Any]] = [["none", 0, "0 %", 0, "", f"{tuning.perplexity(fresh(), tokenizer, held):.2f}"]]
    print(*rows[0], flush=True)
    for method in options.methods:
        got = tuning.tune(
            method, fresh(), tokenizer, train, held, Path("runs/dialogue/tune"),
            steps=options.steps, batch=options.batch,
        )  # fmt: skip
        rows.append(
            [method, f"{got.trainable:,}", f"{got.share:.2%}", f"{got.megabytes:,.1f}", f"{got.seconds:.0f}",
             f"{got.perplexity:.2f}"]
        )  # fmt: skip
        print(*rows[-1], flush=True)
    header = [
        "method",
        "trainable",
        "share",
        "gradients and AdamW, MB",
        "processor seconds",
        "held-out perplexity",
    ]
    show(f"{options.steps} steps of {options.batch} conversations, {len(held)} held out", header, rows)
    return rows


def compare_joint(options: argparse.Namespace) -> list[list[Any]]:
    """Perplexity of replies and accuracy of the action, by λ."""
    train, held = corpora.held_out(corpora.chats())
    held = held[:60]
    labels = [action for chat in held for _, action in tuning.actions(chat)]
    majority = max(labels.count(action) for action in set(labels)) / len(labels)
    rows: list[list[Any]] = [["majority", "", f"{majority:.3f}"]]
    model, tokenizer = policy.small_model(train, steps=100)
    for weight in options.weights:
        joint = tuning.JointModel(copy.deepcopy(model), tokenizer, weight)
        tuning.train_jointly(joint, train, steps=options.steps)
        perplexity, share = tuning.measure_jointly(joint, held)
        rows.append([f"λ = {weight:g}", f"{perplexity:.1f}", f"{share:.3f}"])
        print(*rows[-1], flush=True)
    show(f"{len(labels)} held-out replies", ["", "perplexity of the reply", "accuracy of the action"], rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "intents":
        measure_intents(options.splits)
    elif options.command == "augment":
        measure_augmentation(options.splits, options.only)
    elif options.command == "ppo":
        train_policy(options)
    elif options.command == "tune":
        compare_tuning(options)
    else:
        compare_joint(options)


if __name__ == "__main__":
    main()
