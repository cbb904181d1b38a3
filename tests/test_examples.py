"""A script written for TRL 1.12's PPO runs with only its import line changed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "trl_script.py"


def test_only_the_import_names_us():
    tree = ast.parse(SCRIPT.read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "fastppo"
    ]
    assert [[name.name for name in node.names] for node in imports] == [["PPOConfig", "PPOTrainer"]]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "fastppo" not in names


def test_trl_script_trains_saves_and_shows_completions(tmp_path):
    model, classifier, out = (str(tmp_path / name) for name in ("model", "classifier", "out"))
    tokenizer = tiny.tokenizer()
    policy = tiny.policy("llama")
    policy.save_pretrained(model)
    tokenizer.save_pretrained(model)
    tiny.classifier().save_pretrained(classifier)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"how are you today ? i am fox {i}" for i in range(24)))

    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--prompts", str(prompts), "--output_dir", out),
            *("--sft_model_path", model, "--reward_model_path", classifier, "--learning_rate", "1e-3"),
            *(
                "--per_device_train_batch_size",
                "2",
                "--gradient_accumulation_steps",
                "4",
                "--num_mini_batches",
                "2",
            ),
            *(
                "--total_episodes",
                "16",
                "--response_length",
                "6",
                "--stop_token",
                "eos",
                "--missing_eos_penalty",
                "1.0",
            ),
            *("--kl_coef", "0.05", "--num_ppo_epochs", "2", "--report_to", "none", "--bf16", "False"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Completions after 2 updates" in done.stdout

    trained = AutoModelForCausalLM.from_pretrained(out)
    moved = max((a - b).abs().max() for a, b in zip(trained.parameters(), policy.parameters(), strict=True))
    assert moved > 1e-4
    assert AutoTokenizer.from_pretrained(out).pad_token == tokenizer.pad_token
    assert any(name.startswith("score") for name in load_file(f"{out}/critic/model.safetensors"))
