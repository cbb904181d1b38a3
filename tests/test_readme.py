"""The README's example runs as printed, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import tiny

README = Path(__file__).resolve().parents[1] / "README.md"


def test_example_runs_as_printed(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny.policy("llama").save_pretrained("my-model")
    tiny.tokenizer().save_pretrained("my-model")
    assert "total_episodes=4096" in code and "response_length=64" in code
    smaller = code.replace("total_episodes=4096", "total_episodes=16").replace(
        "response_length=64", "response_length=4"
    )
    exec(compile(smaller, str(README), "exec"), {})
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert (tmp_path / "out" / "model" / "critic").is_dir()


def test_fits_one_screen_and_names_real_targets():
    text = README.read_text()
    assert len(text.splitlines()) <= 80
    makefile = README.with_name("Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE), (
            f"no make target {target}"
        )
