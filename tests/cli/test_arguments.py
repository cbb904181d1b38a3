"""Flags and YAML: one parser, flags win, and a wrong name is answered with the right one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from fastppo.cli import UsageError
from fastppo.cli.__main__ import COMMANDS, main, overview
from fastppo.cli.arguments import Command, Parser


@dataclass
class Settings:
    name: str = field(metadata={"help": "A name, 100 % needed."})
    rate: float = field(default=1e-3, metadata={"help": "A rate."})
    many: list[int] | None = field(default=None, metadata={"help": "Numbers."})
    flag: bool = field(default=True, metadata={"help": "A switch."})
    rarely: int = field(default=7, metadata={"help": "Hardly ever changed."})

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")


COMMAND = Command(
    "try", "Try it.", "fastppo try --name x", "nothing", "nothing", (Settings,), ("name", "rate")
)


def parse(*arguments: str) -> Settings:
    (settings,) = Parser(COMMAND).parse(arguments)
    return settings


def yaml(tmp_path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_gives_and_flags_win(tmp_path):
    path = yaml(tmp_path, "name: from yaml\nrate: 1e-4\nmany: [1, 2]\nflag: false\n")
    assert parse("--config", path) == Settings("from yaml", 1e-4, [1, 2], False)
    assert parse("--config", path, "--rate", "0.5", "--many", "3") == Settings("from yaml", 0.5, [3], False)


def test_yaml_null_is_none(tmp_path):
    assert parse("--config", yaml(tmp_path, "name: x\nmany: null\n")).many is None


def test_a_yaml_value_may_begin_with_a_dash(tmp_path):
    assert parse("--config", yaml(tmp_path, 'name: "--rate"\n')).name == "--rate"


def test_hyphens_do_as_well_as_underscores():
    parser = Parser(Command("try", "", "", "", "", (Snake,), ()))
    assert parser.parse(["--two-words", "3"])[0].two_words == 3


@dataclass
class Snake:
    two_words: int = 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrat: 1\n", r"settings\.yaml: unknown setting 'rat', did you mean 'rate'\?"),
        ("name: x\nrate: fast\n", r"settings\.yaml: .*argument --rate: invalid float value: 'fast'"),
        ("name: [x, y]\n", r"settings\.yaml: name takes one value, got a list: \['x', 'y'\]"),
        ("name: x\nmany: []\n", r"settings\.yaml: many takes at least one value, got an empty list"),
        ("- name\n", r"settings\.yaml: expected a mapping `name: value`, got list"),
        ("name: {\n", r"settings\.yaml is not YAML"),
        ("name: x\nrate: -1\n", r"fastppo try: rate must be above 0, got -1\.0"),
    ],
)
def test_bad_yaml_is_refused_with_where_and_what(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        parse("--config", yaml(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "x", "--rte", "1"], r"unknown argument '--rte', did you mean '--rate'\?"),
        (
            ["--name", "x", "--rat", "1"],
            r"unknown argument '--rat'",
        ),  # no abbreviations: they may change meaning
        (["--name", "x", "word"], r"unknown argument 'word'"),
        (["--rate", "1"], r"--name is required\. A name"),
        (["--name", "x", "--rate", "fast"], r"argument --rate: invalid float value: 'fast'"),
        (["--config", "nowhere.yaml"], r"--config nowhere\.yaml: .*No such file"),
    ],
)
def test_bad_flags_are_refused_with_what_was_meant(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(*arguments)


def test_help_teaches_the_usual_and_help_all_the_rest(capsys):
    for flag, rarely in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit):
            parse(flag)
        text = capsys.readouterr().out
        assert text.startswith("usage: fastppo try")
        assert "Try it." in text and "fastppo try --name x" in text and "reads   nothing" in text
        assert "A name, 100 % needed." in text and "A rate. Default: 0.001." in text
        assert ("--rarely" in text) is rarely
        assert ("--help-all" in text and "3 more settings" in text) is not rarely


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"info"}))
def test_each_command_helps(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: fastppo {name}" in text and "reads   " in text and "writes  " in text
    assert f"  fastppo {name} --" in text  # an example
    assert "--output_dir" in text


def test_commands_are_listed_and_a_wrong_one_is_answered(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == overview() + "\n"
    assert main(["pop"]) == 2
    assert "unknown command 'pop', did you mean 'ppo'?" in capsys.readouterr().err


def test_info_is_a_command(capsys):
    assert main(["info", "--json"]) == 0
    assert "fastppo" in json.loads(capsys.readouterr().out)


def test_errors_are_json_too_where_a_machine_listens(capsys):
    assert main(["ppo", "--learning_rte", "1", "--json"]) == 2
    heard = capsys.readouterr()
    assert "did you mean '--learning_rate'?" in json.loads(heard.out)["error"]
    assert heard.err.strip() == json.loads(heard.out)["error"]


def test_importing_fastppo_imports_neither_the_command_line_nor_an_extra():
    code = """import sys, fastppo
print([m for m in sys.modules if m.startswith(("fastppo.cli", "trl", "rich", "datasets"))])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_missing_extra_names_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)  # import raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "fastppo.cli.sft", raising=False)
    assert main(["sft", "--json"]) == 2
    assert "pip install 'fastppo[rlhf]'" in capsys.readouterr().err
