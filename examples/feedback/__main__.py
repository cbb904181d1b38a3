"""`python -m examples.feedback`: talk, rate, learn, and talk again."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from examples.feedback.rounds import RoundSettings
from examples.warm_replies import need
from examples.warm_replies.__main__ import keep_quiet

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "feedback"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.feedback",
        description="Talk to a model, say what is good, and let it learn from that.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument(
        "--feedback",
        type=Path,
        default=FOLDER / "feedback.db",
        help="SQLite file (default runs/feedback/feedback.db)",
    )
    chat = argparse.ArgumentParser(add_help=False, parents=[every])
    chat.add_argument(
        "--endpoint",
        default="http://localhost:8000/v1",
        metavar="URL",
        help="OpenAI-compatible server (default %(default)s)",
    )
    chat.add_argument("--model", help="its name there (default: the first that is loaded)")
    chat.add_argument("--temperature", type=_not_below_zero, default=0.8, help="default %(default)s")
    chat.add_argument(
        "--tokens", type=_at_least_one, default=128, help="most in an answer (default %(default)s)"
    )
    chat.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))

    talk = commands.add_parser("talk", parents=[chat], help="a conversation in the terminal")
    talk.add_argument("--rater", help="who rates (default: the user's name)")
    page = commands.add_parser("page", parents=[chat], help="a conversation in the browser")
    page.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    page.add_argument("--port", type=_at_least_one, default=7860, help="default %(default)s")
    export = commands.add_parser("export", parents=[every], help="preference pairs as JSON lines")
    export.add_argument("output", type=Path, help="file to write")

    update = commands.add_parser("update", parents=[every], help="one round: pairs, reward model, policy")
    update.add_argument("--model", help="folder of the chat model; the first round needs it")
    update.add_argument(
        "--reward-model", help="folder of a reward model to start from (default: the last round's)"
    )
    update.add_argument(
        "--rounds", type=Path, default=FOLDER, help="holds round-1, ... (default runs/feedback)"
    )
    update.add_argument("--prompts", type=Path, help="file of further prompts to train on, one a line")
    _add_settings(update)
    simulate = commands.add_parser("simulate", help="rounds with a rule that rates in people's place")
    simulate.add_argument("--model", required=True, help="folder of the chat model")
    simulate.add_argument("--rater", choices=("warm", "short", "letter-e"), default="warm")
    simulate.add_argument("--prompts", type=Path, required=True, help="file of prompts, one a line")
    simulate.add_argument(
        "--output", type=Path, required=True, help="folder for feedback and rounds; a new one"
    )
    simulate.add_argument("--rounds", type=_at_least_one, default=2, help="default 2")
    simulate.add_argument(
        "--answers", type=_at_least_one, default=4, help="to each prompt and round (default 4)"
    )
    _add_settings(simulate)
    return parser.parse_args(arguments)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for field in fields(RoundSettings):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help=f"default {field.default}",
        )


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _not_below_zero(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        _run(options)
    except (ValueError, RuntimeError) as error:  # what a person can put right
        raise SystemExit(f"error: {error}") from error


def _run(options: argparse.Namespace) -> None:
    from examples.feedback.store import Store

    if options.command == "talk":
        from examples.feedback.talk import talk

        talk(_endpoint(options), Store(options.feedback), rater=options.rater)
    elif options.command == "page":
        from examples.feedback.port import check_port

        check_port(options.host, options.port)  # before seconds go into imports
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        need("gradio", "gradio")
        from examples.feedback import page

        page.serve(_endpoint(options), Store(options.feedback), options.host, options.port)
    elif options.command == "export":
        from examples.feedback.pairs import export

        pairs = export(_existing(options.feedback), options.output)
        print(f"{len(pairs)} pairs in {options.output}")
    elif options.command == "update":
        store = _existing(options.feedback)
        prompts = _prompts(options.prompts) if options.prompts else []
        _quiet()
        from examples.feedback.rounds import play_round

        played = play_round(
            store,
            options.rounds,
            options.model,
            reward_model=options.reward_model,
            prompts=prompts,
            settings=_settings(options),
        )
        folder = options.rounds / f"round-{played['round']}"
        print(f"in {folder}; talk to it: transformers serve {folder / 'policy'}")
    elif options.command == "simulate":
        prompts = _prompts(options.prompts)
        _quiet()
        from examples.feedback.simulate import RATERS, simulate

        simulate(
            options.model,
            prompts,
            RATERS[options.rater](),
            options.output,
            rounds=options.rounds,
            answers=options.answers,
            settings=_settings(options),
        )


def _quiet() -> None:
    need("trl", "trl")
    keep_quiet()
    import datasets

    datasets.disable_progress_bars()


def _endpoint(options: argparse.Namespace) -> Any:
    from examples.feedback.endpoint import Endpoint

    return Endpoint(
        options.endpoint,
        options.model,
        temperature=options.temperature,
        max_tokens=options.tokens,
        api_key=options.api_key,
    )


def _settings(options: argparse.Namespace) -> RoundSettings:
    return RoundSettings(**{field.name: getattr(options, field.name) for field in fields(RoundSettings)})


def _prompts(path: Path) -> list[list[dict[str, str]]]:
    if not path.exists():
        raise ValueError(f"there is no file of prompts {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt: expected one a line")
    return [[{"role": "user", "content": line}] for line in lines]


def _existing(path: Path) -> Any:
    from examples.feedback.store import Store

    if not path.exists():
        raise ValueError(f"there is no feedback in {path}; `talk` and `page` collect it")
    return Store(path)


if __name__ == "__main__":
    main()
