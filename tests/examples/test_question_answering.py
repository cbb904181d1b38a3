from __future__ import annotations

import random

import gymnasium.utils.env_checker
import pytest

from examples import question_answering
from examples.question_answering import QuestionAnsweringEnv, ask, exact_match, f1, make_tokenizer, retrieve


def test_correctness_by_hand():
    assert exact_match("red ball", "red ball") == 1 and exact_match("ball red", "red ball") == 0
    assert f1("red hat", "red ball") == pytest.approx(0.5)
    assert f1("the red ball", "red ball") == pytest.approx(0.8)
    assert f1("ball ball", "ball") == pytest.approx(2 / 3)  # a word counts as often as it is expected
    assert f1("", "ball") == 0


def test_retrieval_finds_the_facts_about_who_is_asked_for():
    facts = [
        "ada is in the attic .",
        "ben is in the cellar .",
        "ben has the red ball .",
        "ada has the blue cup .",
    ]
    assert retrieve("what does ben have ?", facts, 2) == ["ben is in the cellar .", "ben has the red ball ."]


def test_every_answer_stands_in_its_prompt_and_is_known_to_the_tokenizer():
    draw, tokenizer = random.Random(0), make_tokenizer()
    for question in (ask(draw) for _ in range(200)):
        assert question.answer in question.prompt
        assert tokenizer.pad_token_id not in tokenizer(question.prompt)["input_ids"]


def test_environment_grades_one_answer():
    env = QuestionAnsweringEnv("f1")
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)
    prompt, _ = env.reset(seed=1)
    assert env.reset(seed=1)[0] == prompt
    assert env.step(env.question.answer)[1:4] == (1.0, True, False)
    with pytest.raises(ValueError, match="correctness must be one of exact-match, f1, got 'bleu'"):
        QuestionAnsweringEnv("bleu")


def test_ppo_lifts_correctness_on_held_out_questions(tmp_path, capsys):
    results = question_answering.main(
        ["--sft-steps", "400", "--episodes", "1280", "--output", str(tmp_path / "run")]
    )
    for measure in ("exact-match", "f1"):
        assert results["after PPO"][measure] > results["supervised"][measure] + 0.05
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert "500 held-out questions" in capsys.readouterr().out
