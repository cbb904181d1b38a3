"""From a trained folder to one that is served: adapters merged, safetensors, int8, measured, a model card.

    python -m examples.production runs/feedback/round-2/policy --output runs/production

makes `full/` (merged weights), `int8-weight-only/` and `int8-dynamic/` (torchao), each with tokenizer and README.md and
each loaded again by a fresh process before it counts, and `production.json` with what was measured. Any of them is what
`transformers serve FOLDER` and vLLM take.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.warm_replies import need
from examples.warm_replies.__main__ import keep_quiet
from examples.warm_replies.warmth import interval

VARIANTS = ("full", "int8-weight-only", "int8-dynamic")
Chat = list[dict[str, str]]  # ends with the answer
Reward = Callable[[list[Chat], list[str]], list[float]]

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([json.loads(sys.argv[1])])
for folder in sys.argv[2:]:
    try:
        AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        print(float(logprobs.gather(1, ids[0, 1:, None]).sum()))
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""

CARD = """---
{{ card_data }}
---

# {{ name }}

{{ variant }} weights of a chat model trained with PPO ([fastppo](https://pypi.org/project/fastppo)).

## Training

{{ training }}

## Measured

{{ chats }} held-out chats; greedy answers of at most {{ tokens }} tokens; {{ machine }}.

{{ table }}

Perplexity is over the answers; KL is that of the full model to this one, per token of the answers. The reward is
{{ reward }}, with a 95 % interval over chats.

## Use

```bash
transformers serve {{ folder }} --port 8000
```

## Limits

A reward is a stand-in for what people want, and PPO finds its gaps: read answers before relying on them. The model
knows nothing beyond what its base model knew.
"""


@dataclass(frozen=True)
class Measured:
    """One variant: size on disk, speed with one conversation at a time, and quality on held-out chats."""

    bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    perplexity: float
    kl: float
    reward: float
    reward_interval: float


def produce(
    model: str | Path,
    output: str | Path,
    chats: list[Chat],
    reward: Reward,
    *,
    reward_name: str,
    run: str | Path | None = None,
    name: str = "chat model",
    tokens: int = 32,
    report: Callable[[str], None] = print,
) -> dict[str, Measured]:
    """Make and measure every variant of `model` in `output`, which appears when all of it is right.

    Args:
        model: folder of a causal language model or of a PEFT adapter to one, with tokenizer.
        output: a folder that is not there yet.
        chats: held-out chats, each ending with an answer.
        reward: (prompts, answers) → one number each.
        reward_name: what the card calls it.
        run: JSON of the training run: `round.json` or `trainer_state.json`. None: one of these in or beside `model`.
        name: title of the card.
        tokens: most in an answer.
        report: told what happens.

    Raises:
        ValueError: a folder or the chats do not fit; the message says which and why.
        RuntimeError: a variant that was written does not load, or not as the same model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastppo.checkpoint import written_then_renamed

    model, output = Path(model), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already: name a folder that does not")
    if not chats or any(len(c) < 2 or c[-1]["role"] != "assistant" for c in chats):
        raise ValueError("chats must be at least one, each with a prompt and ending with an answer")
    training = training_figures(model, run)
    full, gap = merged(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if gap is not None:
        report(f"adapter merged: its log-probs moved by at most {gap:.1e}")
    measured: dict[str, Measured] = {}
    with written_then_renamed(output) as folder:
        versions = {"full": full}
        full.save_pretrained(folder / "full")
        for variant in VARIANTS[1:]:
            versions[variant] = AutoModelForCausalLM.from_pretrained(
                folder / "full", quantization_config=_int8(variant), dtype=torch.float32
            ).eval()
            versions[variant].save_pretrained(folder / variant)
        for variant in VARIANTS:
            tokenizer.save_pretrained(folder / variant)
        check_reload(
            {folder / name: version for name, version in versions.items()}, _ids(tokenizer, chats[0])
        )
        for variant, version in versions.items():
            size = sum(file.stat().st_size for file in (folder / variant).glob("*.safetensors"))
            measured[variant] = measure(version, full, tokenizer, chats, reward, tokens, size)
            report(_row(variant, measured[variant]))
        for variant in VARIANTS:
            card(variant, measured, training, output, name, len(chats), tokens, reward_name).save(
                folder / variant / "README.md"
            )
        figures = {"model": str(model), "training": training, "reward": reward_name}
        figures["variants"] = {variant: asdict(m) for variant, m in measured.items()}
        (folder / "production.json").write_text(json.dumps(figures, indent=2) + "\n")
    return measured


def merged(folder: Path) -> tuple[Any, float | None]:
    """(the model with its adapter merged into float32 weights, how far that moved its log-probs; None: no adapter)."""
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        if not (folder / "config.json").exists():
            raise ValueError(f"there is no model in {folder}: expected config.json or adapter_config.json")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), None
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(1, 33)[None] % adapted.config.vocab_size
    with torch.no_grad():
        apart = adapted(ids).logits.log_softmax(-1)
        model = adapted.merge_and_unload()
        gap = float((model(ids).logits.log_softmax(-1) - apart).abs().max())
    if not gap < 1e-2:
        raise RuntimeError(
            f"merging the adapter in {folder} moved log-probs by {gap:.2g}: it cannot be merged"
        )
    return model, gap


def _int8(variant: str) -> Any:
    need("torchao", "torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kinds = {"int8-weight-only": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
    return TorchAoConfig(kinds[variant](version=2))  # the version that safetensors can hold


def check_reload(versions: dict[Path, Any], ids: list[int]) -> None:
    """Raises RuntimeError unless a fresh process, with transformers alone, finds in each folder the model beside it."""
    import torch

    command = [sys.executable, "-c", RELOAD, json.dumps(ids), *map(str, versions)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = done.stdout.splitlines()
    if done.returncode or len(found) != len(versions):
        raise RuntimeError(f"a fresh process cannot load models: {done.stderr.strip()[-500:]}")
    wrong = []
    for (folder, version), said in zip(versions.items(), found, strict=True):
        with torch.no_grad():
            rows = torch.tensor([ids])
            logprobs = version(rows).logits[0, :-1].float().log_softmax(-1)
            expected = float(logprobs.gather(1, rows[0, 1:, None]).sum())
        try:
            same = math.isclose(float(said), expected, rel_tol=1e-3, abs_tol=1e-3)
        except ValueError:
            wrong.append(f"{folder.name} does not load in a fresh process: {said}")
            continue
        if not same:
            wrong.append(
                f"{folder.name} is another model once loaded: log-prob {said} of a text that had {expected}"
            )
    if wrong:
        raise RuntimeError("; ".join(wrong))


def measure(
    version: Any, full: Any, tokenizer: Any, chats: list[Chat], reward: Reward, tokens: int, size: int
) -> Measured:
    """What `Measured` holds, of `version`."""
    import torch

    nats, kl, count = 0.0, 0.0, 0
    with torch.no_grad():
        for chat in chats:
            ids = torch.tensor([_ids(tokenizer, chat)])
            start = len(_prompt_ids(tokenizer, chat)) - 1  # the state that predicts the answer's first token
            logprobs = version(ids).logits[0, start:-1].float().log_softmax(-1)
            exact = full(ids).logits[0, start:-1].float().log_softmax(-1)
            nats -= float(logprobs.gather(1, ids[0, start + 1 :, None]).sum())
            kl += float((exact.exp() * (exact - logprobs)).sum())
            count += logprobs.shape[0]
        prompts = [_prompt_ids(tokenizer, chat) for chat in chats]
        answers = [_answer(version, tokenizer, ids, tokens) for ids in prompts]
    scores = reward([chat[:-1] for chat in chats], answers)
    prefill, decode = speed(version, max(prompts, key=len), tokens)
    return Measured(
        size, prefill, decode, math.exp(nats / count), kl / count, statistics.fmean(scores), interval(scores)
    )


def speed(version: Any, prompt: list[int], tokens: int) -> tuple[float, float]:
    """(prompt tokens, answer tokens) per second of one conversation; the middle one of three tries."""
    import torch

    ids = torch.tensor([(prompt * 128)[:128]])
    # The processor time of a single thread is what the clock would show on an idle machine, and other programs may run.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(new: int) -> float:
        tries = []
        for _ in range(3):
            started = clock()
            version.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            tries.append(clock() - started)
        return statistics.median(tries)

    with torch.no_grad():
        version.generate(ids, max_new_tokens=2, do_sample=False)  # the first call sets things up
        first = seconds(1)
        return ids.shape[1] / first, tokens / max(seconds(tokens + 1) - first, 1e-9)


def _answer(version: Any, tokenizer: Any, prompt: list[int], tokens: int) -> str:
    import torch

    ids = torch.tensor([prompt])
    said = version.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)).strip()


def _ids(tokenizer: Any, chat: Chat) -> list[int]:
    return list(tokenizer.apply_chat_template(chat, return_dict=False))


def _prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    return list(tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False))


def training_figures(model: Path, run: str | Path | None = None) -> dict[str, Any]:
    """What the card says of the run: from `round.json` (examples.feedback) or Trainer's `trainer_state.json`."""
    if run is None:
        places = [p / n for p in (model, model.parent) for n in ("round.json", "trainer_state.json")]
        run = next((place for place in places if place.exists()), None)
        if run is None:
            return {}
    path = Path(run)
    if not path.exists():
        raise ValueError(f"there is no run in {path}: expected round.json or trainer_state.json")
    read = json.loads(path.read_text())
    if "log_history" in read:
        log = [entry for entry in read["log_history"] if "objective/scores" in entry]
        if not log:
            raise ValueError(f"{path} logs no update of PPO: expected entries with objective/scores")
        figures = {"updates": len(log), "KL to the reference": log[-1]["objective/kl"]}
        return {
            **figures,
            "score, first update": log[0]["objective/scores"],
            "score, last update": log[-1]["objective/scores"],
        }
    if "ppo" in read:
        return {
            "started from": Path(read["base"]).name,
            "rounds of feedback": read["round"],
            "likes": read["feedback"]["likes"],
            "dislikes": read["feedback"]["dislikes"],
            "rewrites": read["feedback"]["rewrites"],
            "preference pairs": read["reward"]["pairs"] + read["reward"]["held_out_pairs"],
            "updates": read["ppo"]["updates"],
            "score, first update": read["ppo"]["score_first"],
            "score, last update": read["ppo"]["score_last"],
            "KL to the reference": read["ppo"]["kl"],
            **read["settings"],
        }
    raise ValueError(f"{path} is no run: expected round.json or trainer_state.json")


def card(
    variant: str,
    measured: dict[str, Measured],
    training: dict[str, Any],
    output: Path,
    name: str,
    chats: int,
    tokens: int,
    reward_name: str,
) -> Any:
    """The model card of one variant."""
    from huggingface_hub import ModelCard, ModelCardData

    kinds = {
        "full": "Full (float32)",
        "int8-weight-only": "Int8 (torchao, weight only)",
        "int8-dynamic": "Int8 (torchao, weights and activations)",
    }
    listed = "\n".join(f"- {key.replace('_', ' ')}: {_shown(value)}" for key, value in training.items())
    titles = ["", "MB", "prompt tokens/s", "answer tokens/s", "perplexity", "KL, nats", "reward"]
    head = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["fastppo", "ppo"]),
        template_str=CARD,
        name=name,
        variant=kinds[variant],
        training=listed or "No figures of the run were kept.",
        table=head + "\n".join(_row(v, m) for v, m in measured.items()),
        folder=output / variant,
        chats=chats,
        tokens=tokens,
        machine=_machine(),
        reward=reward_name,
    )


def _row(variant: str, m: Measured) -> str:
    cells = [variant, f"{m.bytes / 1e6:.1f}", f"{m.prefill_tokens_per_second:.0f}"]
    cells += [f"{m.decode_tokens_per_second:.1f}", f"{m.perplexity:.2f}", f"{m.kl:.5f}"]
    return "| " + " | ".join([*cells, f"{m.reward:+.3f} ± {m.reward_interval:.3f}"]) + " |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _machine() -> str:
    import torch

    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{threads} thread{'s' * (threads > 1)}, {instructions}, torch {torch.__version__}"


def read_chats(path: Path) -> list[Chat]:
    """Chats of JSON lines: `messages`, or `prompt` and `chosen` as preference pairs have them."""
    if not path.exists():
        raise ValueError(f"there is no file of chats {path}")
    chats = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if "messages" in row:
            chats.append(row["messages"])
        elif "prompt" in row and "chosen" in row:
            chats.append([*row["prompt"], *row["chosen"]])
        else:
            raise ValueError(
                f"{path}, line {number}: expected messages, or prompt and chosen, got {sorted(row)}"
            )
    return chats


def held_out_chats(count: int) -> list[Chat]:
    """First exchanges of the Chit Chat Challenge whose opening the demo holds out."""
    from examples.warm_replies.openings import bare_words, read_openings, split

    held_out = {bare_words(text) for text in split(read_openings(), 2 * count)[1]}  # some have no answer
    chats: list[Chat] = []
    for chat in need("chitchat_dataset", "chitchat-dataset").Dataset().values():
        turns = [" ".join(" ".join(m["text"] for m in turn).split()) for turn in chat["messages"][:2]]
        if len(turns) == 2 and all(turns) and bare_words(turns[0]) in held_out:
            held_out.discard(bare_words(turns[0]))
            roles = ("user", "assistant")
            chats.append([{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)])
    return chats[:count]


def classifier(folder: str) -> Reward:
    """The scores of a reward model in `folder`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fastppo.score import ClassifierReward, Episodes

    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"there is no reward model in {folder}: expected a folder with config.json")
    scores = ClassifierReward(
        AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), 16
    )

    def reward(prompts: list[Chat], answers: list[str]) -> list[float]:
        said = [[{"role": "assistant", "content": answer}] for answer in answers]
        empty: list[list[int]] = [[] for _ in prompts]
        return scores(Episodes(prompts, said, empty, empty))

    return reward


def warmth_reward() -> Reward:
    """VADER's sentiment of the answer."""
    from examples.warm_replies.warmth import warmth

    warm = warmth()
    return lambda prompts, answers: [
        float(x) for x in warm(prompts=prompts, completions=answers, completion_ids=[[]] * len(answers))
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.production",
        description="Merge, quantise, measure and describe a trained model.",
    )
    parser.add_argument("model", type=Path, help="folder that a trainer saved: a model, or a PEFT adapter")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument(
        "--chats", type=Path, help="JSON lines to measure on (default: held-out Chit Chat Challenge)"
    )
    parser.add_argument("--count", type=int, default=32, help="chats to measure on (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="most in an answer (default %(default)s)")
    parser.add_argument("--reward-model", help="folder of a reward model (default: VADER's sentiment)")
    parser.add_argument(
        "--run", type=Path, help="round.json or trainer_state.json (default: found beside the model)"
    )
    parser.add_argument("--name", default="chat model", help="title of the card")
    options = parser.parse_args(arguments)
    keep_quiet()
    try:
        chats = read_chats(options.chats) if options.chats else held_out_chats(options.count)
        produce(
            options.model,
            options.output,
            chats[: options.count],
            classifier(options.reward_model) if options.reward_model else warmth_reward(),
            reward_name=f"that of {options.reward_model}" if options.reward_model else "VADER's sentiment",
            run=options.run,
            name=options.name,
            tokens=options.tokens,
        )
    except (ValueError, RuntimeError) as error:  # what a person can put right
        raise SystemExit(f"error: {error}") from error
    print(
        f"in {options.output}; serve one: transformers serve {options.output / 'int8-weight-only'} --port 8000"
    )


if __name__ == "__main__":
    main()
