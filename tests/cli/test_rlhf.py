"""`fastppo rlhf` from end to end on random models: whole, killed in each step, rerun, and asked for what it refuses."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo.cli import UsageError
from fastppo.cli.__main__ import main
from fastppo.cli.rlhf import STEPS, check_output, parser, plan

KILLED = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def settings(files, tmp_path_factory) -> str:
    """The tiny preset on files of ours."""
    path = tmp_path_factory.mktemp("settings") / "ours.yaml"
    held_out = {"split": "train"}
    path.write_text(
        json.dumps(  # JSON is YAML
            {
                "sft": {"dataset": files["dialogues"], "eval_dataset": files["dialogues"], "eval_rows": 8},
                "reward": {"dataset": files["preferences"], "eval_dataset": files["preferences"]},
                "judge": {"dataset": files["ratings"], "eval_dataset": files["ratings"]},
                "ppo": {"dataset": files["prompts"], "ptx_dataset": files["dialogues"]},
                "eval": {"dataset": files["prompts"], "texts": files["dialogues"], **held_out},
            }
        )
    )
    return str(path)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPPO_CACHE", str(tmp_path_factory.getbasetemp() / "fastppo-cache"))
        assert main(["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(out)]) == 0
    return out


def test_a_run_killed_in_each_step_ends_with_what_an_uninterrupted_one_has(whole, settings, tmp_path):
    arguments = ["--preset", "tiny", "--config", settings, "--output_dir", "out"]
    environment = {
        **os.environ,
        "FASTPPO_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",  # threads do not survive a fork
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(KILLED), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *kills, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["killed in"] for k in kills] == list(STEPS)
    for i, kill in enumerate(kills):
        assert kill["by"] == 9
        assert kill["complete"] == kill["whole"] == list(STEPS[:i])  # never half a step under its name
    assert last == {"status": 0}, (tmp_path / "output.txt").read_text()[-3000:] + done.stderr[-3000:]

    said = (tmp_path / "output.txt").read_text()
    for step in ("sft", "reward", "judge", "ppo"):
        assert re.search(rf"{step}: goes on from where it stopped", said)
        assert re.search(rf"going on from out/{step}\.tmp/checkpoint-\d", said)
    assert "[2/7] sft: complete, its settings are unchanged: kept" in said
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == sorted(STEPS)
    for step in ("sft", "reward", "judge", "ppo", "ppo/ema"):
        expected = load_file(whole / step / "model.safetensors")
        for name, weights in load_file(out / step / "model.safetensors").items():
            torch.testing.assert_close(weights, expected[name], msg=lambda m, s=step: f"{s}: {m}")


def test_each_step_records_settings_command_figures_and_time(whole):
    for step in STEPS:
        record = json.loads((whole / step / "step.json").read_text())
        assert (
            record["step"] == step
            and record["seconds"] > 0
            and record["command"].startswith(("fastppo", "Auto"))
        )
        assert ".tmp" not in json.dumps(record)
        assert not (whole / step / "started.json").exists()
    assert "--reward_weights 0.5 1.0" in json.loads((whole / "ppo" / "step.json").read_text())["command"]
    assert json.loads((whole / "eval" / "step.json").read_text())["figures"]["judge"] == "judge"


class Page(HTMLParser):
    """Everything that a page would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_report_is_one_page_that_shows_every_step(whole):
    text = (whole / "report" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and not re.search(r"https?://|@import|url\(", text)
    # curves of the four trainings, and the spread of scores
    assert len(page.fetched) == 5 and all(f.startswith("data:image/png;base64,") for f in page.fetched)
    plain = html.unescape(re.sub(r"<[^>]+>", "", text))
    evaluation = json.loads((whole / "eval" / "eval.json").read_text())
    gain, rate = evaluation["gain"]["total"], evaluation["win_rate"]
    assert f"gain {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in plain
    assert f"{100 * rate['value']:.0f} %" in plain
    sample = json.loads((whole / "eval" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"][0]["content"] in plain
    for step in STEPS[:-1]:
        assert json.loads((whole / step / "step.json").read_text())["command"] in plain


def test_words_of_others_are_never_markup(whole, tmp_path):
    from fastppo.cli.report import write_report

    steps = {step: tmp_path / step for step in STEPS if step != "report"}
    for step in steps:
        shutil.copytree(whole / step, tmp_path / step)
    path = tmp_path / "eval" / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    bad = '<script>alert("x")</script>'
    samples[0]["prompt"] = samples[0]["model"]["reply"] = bad
    path.write_text("".join(json.dumps(s) + "\n" for s in samples))
    text = write_report(steps, tmp_path).read_text()
    assert "script" not in Page(text).tags and text.count("&lt;script&gt;") == 2


def test_a_rerun_keeps_everything_and_a_machine_can_read_it(whole, settings, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    flags = ["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(whole), "--json"]
    assert main(flags) == 0
    heard = capsys.readouterr()
    report = json.loads(heard.out)
    assert list(report["steps"]) == list(STEPS) and report["report"].endswith("report/report.html")
    assert heard.err.count("complete, its settings are unchanged: kept") == len(STEPS)
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}


def test_changed_settings_are_refused_by_name(whole, settings, capsys):
    flags = ["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(whole)]
    assert main([*flags, "--ppo.kl-coef", "0.5"]) == 2
    error = capsys.readouterr().err
    assert f"{whole}/ppo was made with other settings: kl_coef was None, is 0.5" in error
    assert "`--restart_from ppo` makes it and the later steps anew" in error
    assert main([*flags, "--reward_weight", "2"]) == 2
    assert "reward_weights was [0.5, 1.0], is [2.0, 1.0]" in capsys.readouterr().err
    assert main([*flags, "--base_model", "other"]) == 2
    assert "base was made with other settings: model was 'random-tiny', is 'other'" in capsys.readouterr().err


def test_restart_from_throws_away_that_step_and_the_later_ones(whole, settings, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    flags = ["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(out)]
    assert main([*flags, "--restart_from", "eval", "--eval.rows", "4", "--json"]) == 0
    heard = capsys.readouterr()
    assert json.loads(heard.out)["steps"]["eval"]["figures"]["prompts"] == 4
    assert "[5/7] ppo: complete, its settings are unchanged: kept" in heard.err
    assert "[6/7] eval\n" in heard.err


def test_broken_output_stops_the_next_step(whole, settings, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "report")
    weights = load_file(out / "ppo" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, out / "ppo" / "model.safetensors")
    flags = ["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(out)]
    assert main(flags) == 2
    assert "step ppo: expected finite weights, got NaN or inf in model.norm.weight" in capsys.readouterr().err
    (out / "ppo" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UsageError, match=r"step ppo: .*cannot be read: .*`--restart_from ppo` makes it anew"):
        check_output("ppo", out / "ppo")
    (out / "ppo" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"step ppo: expected model\.safetensors in .*, found none"):
        check_output("ppo", out / "ppo")
    assert not (out / "report").exists()


def test_two_runs_do_not_work_in_one_folder(whole, settings, capsys):
    import fcntl

    with open(whole / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(whole)]) == 2
    assert "another `fastppo rlhf` is at work in this folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "smal"], r"--preset smal: no such preset, did you mean 'small'\? \(small, tiny\)"),
        (["--restart_from", "pppo"], r"--restart_from pppo: no such step, did you mean 'ppo'\?"),
        (["--pppo.kl_coef", "1"], r"--pppo\.kl_coef: no such step, did you mean 'ppo'\?"),
        (["--ppo.kl_coeff", "1"], r"fastppo ppo: unknown argument '--kl_coeff', did you mean '--kl_coef'\?"),
        (["--ppo.kl_coef", "-1"], r"fastppo ppo: .*kl_coef must be a number of at least 0, got -1\.0"),
        (["--ppo.model", "x"], r"ppo\.model is decided by `fastppo rlhf` itself"),
        (["--sft.max_steps", "few"], r"fastppo sft: argument --max_steps.*: invalid int value: 'few'"),
        (["--rewardweight", "1"], r"unknown argument '--rewardweight', did you mean '--reward_weight'\?"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(tmp_path, flags, message):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        _, given, of_steps = parser().parse(["--preset", "tiny", "--output_dir", str(out), *flags])
        plan(out, given, of_steps)
    assert not out.exists()


def test_data_of_all_steps_are_judged_before_the_first_one_runs(settings, files, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["rlhf", "--preset", "tiny", "--config", settings, "--output_dir", str(out)]
    assert main([*flags, "--eval.dataset", files["ratings"]]) == 2
    assert f"{files['ratings']}: expected the column `prompt`" in capsys.readouterr().err
    assert main([*flags, "--judge.rating_max", "2"]) == 2
    assert "column `rating`, row 6: expected a number of at most 2, got 3.0" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppoo: {}\n", r"unknown setting 'ppoo', did you mean 'ppo'\?"),
        ("ppo: 3\n", r"ppo: expected a mapping `setting: value`, got 3"),
        ("ppo: {kl_coeff: 1}\n", r"ppo: unknown setting 'kl_coeff', did you mean 'kl_coef'\?"),
        ("eval: {judge: x}\n", r"eval\.judge is decided by `fastppo rlhf` itself"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    flags = ["--preset", "tiny", "--config", str(path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UsageError, match=message):
        script, given, of_steps = parser().parse(flags)
        plan(Path(script.output_dir), given, of_steps)


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_presets_are_plans(preset, tmp_path):
    _, given, of_steps = parser().parse(["--preset", preset, "--output_dir", str(tmp_path / "out")])
    assert [step.name for step in plan(tmp_path / "out", given, of_steps)] == list(STEPS)
