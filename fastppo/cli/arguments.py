"""Settings of a command from flags and YAML: one Hugging Face style parser over the libraries' own dataclasses.

A YAML file holds the same names as the flags, and flags win. YAML is turned into flags first, so both go through the
same conversion and the same checks.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UsageError, need


@dataclass(frozen=True)
class Command:
    """What one command is, for a person (`--help`) and for the parser.

    Attributes:
        name: as typed after `fastppo`.
        purpose: one line.
        example: a whole command line.
        reads: what it reads.
        writes: what it writes.
        settings: dataclasses, one instance of each of which the parser returns.
        usual: the names that `--help` shows; the others show under `--help-all`.
    """

    name: str
    purpose: str
    example: str
    reads: str
    writes: str
    settings: tuple[type, ...]
    usual: tuple[str, ...]


class Parser:
    """Flags and YAML of one command.

    Args:
        command: which.
        defaults: other defaults than those of the dataclasses, by name.
        required: settings that must be given although their dataclass has a default.
    """

    def __init__(
        self, command: Command, defaults: Mapping[str, Any] | None = None, required: Sequence[str] = ()
    ) -> None:
        from transformers import HfArgumentParser

        self.command = command
        self.parser = HfArgumentParser(
            command.settings,  # type: ignore[arg-type]
            prog=f"fastppo {command.name}",
            description=_description(command),
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self.parser.error = self._error  # type: ignore[method-assign, assignment]
        general = self.parser.add_argument_group("help, files, machines")
        general.add_argument("--config", help="YAML file with these settings; flags win.")
        general.add_argument(
            "--json", action="store_true", help="Print one JSON object on stdout, nothing else."
        )
        general.add_argument("--help", "-h", action="store_true", help="Show the usual settings.")
        general.add_argument("--help-all", action="store_true", help="Show every setting.")
        self.parser.set_defaults(**dict(defaults or {}))
        self.required = [a.dest for a in self.parser._actions if a.required or a.dest in required]
        for action in self.parser._actions:
            action.required = False  # by flag: YAML may give it
        self._explain_defaults()

    @property
    def names(self) -> list[str]:
        """Every setting that YAML may hold."""
        own = {"config", "json", "help", "help_all"}
        return sorted({a.dest for a in self.parser._actions} - own)

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """One instance of each dataclass of the command.

        Raises:
            UsageError: an unknown or wrong setting; the message says where it stands.
            SystemExit: help was asked for.
        """
        read, unknown = self.parser.parse_known_args(list(arguments))
        self.help_if_asked(read)
        self.reject_unknown([u for u in unknown if u.startswith("-")] or unknown)
        given = [] if read.config is None else self.flags(read_yaml(read.config), read.config)
        return self.build([*given, *arguments])

    def help_if_asked(self, read: argparse.Namespace) -> None:
        """Print help and leave, where `read` says so."""
        if read.help or read.help_all:
            print(self.help(everything=read.help_all))
            raise SystemExit(0)

    def build(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses from flags alone."""
        values = vars(self.parser.parse_known_args([*arguments])[0])
        for name in self.required:
            if values[name] is None:
                (action,) = (a for a in self.parser._actions if a.dest == name)
                raise UsageError(f"fastppo {self.command.name}: --{name} is required. {action.help}")
        try:
            parsed = self.parser.parse_args_into_dataclasses(
                [*arguments], return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, TypeError, ImportError) as error:  # a dataclass checks its fields
            raise UsageError(f"fastppo {self.command.name}: {error}") from error
        return tuple(parsed[: len(self.command.settings)])

    def flags(self, settings: Mapping[str, Any], origin: str) -> list[str]:
        """The settings of a YAML mapping as flags.

        Raises:
            UsageError: a name is unknown (the closest known one is offered), or a value has no flag.
        """
        flags: list[str] = []
        for name, value in settings.items():
            if name not in self.names:
                raise UsageError(f"{origin}: unknown setting {name!r}{closest(str(name), self.names)}")
            takes_several = any(a.dest == name and a.nargs in ("+", "*") for a in self.parser._actions)
            if value is None:
                self.parser.set_defaults(**{name: None})
                continue
            if isinstance(value, (list, tuple)):
                if not takes_several:
                    raise UsageError(f"{origin}: {name} takes one value, got a list: {value!r}")
                if not value:
                    raise UsageError(f"{origin}: {name} takes at least one value, got an empty list")
                flags += [f"--{name}", *map(_as_text, value)]
            elif takes_several:
                flags += [f"--{name}", _as_text(value)]
            else:
                flags.append(f"--{name}={_as_text(value)}")
        try:
            self.parser.parse_known_args(flags)
        except UsageError as error:
            raise UsageError(f"{origin}: {error}") from error
        return flags

    def reject_unknown(self, unknown: Sequence[str]) -> None:
        """Raise a UsageError for the first argument that no setting takes."""
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            known = [o for a in self.parser._actions for o in a.option_strings if o.startswith("--")]
            raise UsageError(
                f"fastppo {self.command.name}: unknown argument {flag!r}{closest(flag, known)}"
                f" (fastppo {self.command.name} --help-all lists them)"
            )

    def help(self, *, everything: bool = False) -> str:
        """The help text with the usual settings, or with every one."""
        hidden = []
        for action in self.parser._actions:
            general = action.dest in ("config", "json", "help", "help_all")
            negation = any(o.startswith("--no_") for o in action.option_strings)
            if not general and not everything and (negation or action.dest not in self.command.usual):
                hidden.append((action, action.help))
                action.help = argparse.SUPPRESS
        self.parser.usage = f"{self.parser.prog} [--config FILE.yaml] [--setting value ...] [--json]"
        if hidden:
            more = len({action.dest for action, _ in hidden} - set(self.command.usual))
            self.parser.epilog = f"{more} more settings: {self.parser.prog} --help-all"
        text = self.parser.format_help()
        for action, words in hidden:
            action.help = words
        return text

    def _explain_defaults(self) -> None:
        for action in self.parser._actions:
            words = (action.help or "").replace("%", "%%")
            if (
                action.option_strings
                and action.default not in (None, argparse.SUPPRESS)
                and action.dest
                not in (
                    "json",
                    "help",
                    "help_all",
                )
            ):
                words += f" Default: {str(action.default).replace('%', '%%')}."
            action.help = words

    def _error(self, message: str) -> None:
        raise UsageError(f"fastppo {self.command.name}: {message}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag; `--with-hyphens` works as well."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [o for o in action.option_strings if "_" in o or "-" not in o.lstrip("-")]
        value = "" if action.nargs == 0 else " X ..." if action.nargs == "+" else " X"
        return ", ".join(flags or action.option_strings[:1]) + value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    yaml = need("yaml", "pyyaml")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a mapping `name: value`, got {type(found).__name__}")
    return found


def closest(name: str, known: Iterable[str]) -> str:
    """A question with the nearest known name, where one is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def number(value: float | None, unit: str = "") -> str:
    """For a table: four significant digits at most."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.4g}{unit}"


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _description(command: Command) -> str:
    return f"{command.purpose}\n\n  {command.example}\n\nreads   {command.reads}\nwrites  {command.writes}"
