"""`fastppo COMMAND`, `python -m fastppo.cli COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from . import UsageError
from .arguments import closest

# Name → its one line. The module of a command, and all that it imports, is loaded when the command runs.
COMMANDS = {
    "rlhf": "all steps in order: SFT, two reward models, PPO, evaluation, report; goes on after an interruption",
    "sft": "supervised fine-tuning of a language model on texts or dialogues (TRL's SFTTrainer)",
    "reward": "a reward model from preferences (TRL's RewardTrainer) or from ratings",
    "ppo": "train a language model against rewards by PPO (fastppo.PPOTrainer)",
    "eval": "compare a trained model with its reference on held-out prompts",
    "info": "what this installation is made of and will use",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 where a run failed, 2 where the person can put it right."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, rest = given[0], given[1:]
    if name == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"fastppo: unknown command {name!r}{closest(name, COMMANDS)}\n\n{overview()}", file=sys.stderr)
        return 2
    if name == "info":
        from ..info import main as info

        return info(rest)
    from .console import Screen, quiet

    as_json = "--json" in rest
    try:
        quiet()
        module = importlib.import_module(f"fastppo.cli.{name}")
        screen = Screen(as_json)
        with screen.only_json():
            settings = module.parser().parse(rest)
            report = module.run(settings, screen)
            module.summary(report, screen)
    except UsageError as error:
        return _failed(str(error), as_json)
    except KeyboardInterrupt:
        more = "; the same command goes on from the last checkpoint" if name == "rlhf" else ""
        print(f"fastppo {name}: interrupted{more}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        return _failed(f"fastppo {name} needs the package {error.name}: pip install 'fastppo[rlhf]'", as_json)
    screen.result(report)
    return 0


# What the commands import at the top of their modules and `pip install fastppo` alone does not bring.
_EXTRA = ("trl", "datasets", "rich", "yaml", "jinja2", "matplotlib")


def _failed(message: str, as_json: bool) -> int:
    print(message, file=sys.stderr)
    if as_json:
        import json

        print(json.dumps({"error": message}))
    return 2


def overview() -> str:
    """What `fastppo --help` shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastppo COMMAND [--config FILE.yaml] [--setting value ...] [--json]",
            "",
            "Language models trained from human feedback, step by step or in one go.",
            "",
            *lines,
            "",
            "  fastppo COMMAND --help    what it does, an example, what it reads and writes",
            "  fastppo rlhf --preset small --output_dir runs/small    the whole story on 2 CPU cores",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
