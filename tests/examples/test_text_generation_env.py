from __future__ import annotations

import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch

from examples import text_generation_env
from examples.text_generation_env import MAX_WORDS, TextGenerationEnv, WordsGRU, read_references

SENTENCES = [("how", "are", "you", "today"), ("i", "am", "doing", "well")]


def write(env, *words):
    """Observation, rewards and whether the text ended."""
    env.reset(seed=0)
    steps = [env.step(np.int64(env.vocabulary.index(word))) for word in words]
    return steps[-1][0], [reward for _, reward, *_ in steps], steps[-1][2]


@pytest.mark.parametrize("metric", ["bleu", "rouge"])
def test_return_is_the_quality_of_the_text(metric):
    env = TextGenerationEnv(SENTENCES, metric)
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)
    _, rewards, ended = write(env, "how", "are", "you", "today", "<end>")
    assert sum(rewards) == pytest.approx(1) and ended
    _, rewards, ended = write(env, "how", "well", "you")
    assert sum(rewards) == pytest.approx(env.quality(("how", "well", "you"))) and not ended
    assert 0 < sum(rewards) < 1
    assert write(env, "<end>")[1:] == ([0.0], True)


def test_rouge_by_hand():
    # Longest common subsequence "how you": precision 2/3, recall 2/4.
    assert TextGenerationEnv(SENTENCES, "rouge").quality(("how", "well", "you")) == pytest.approx(4 / 7)


def test_text_ends_after_ten_words_and_noise_changes_them():
    env = TextGenerationEnv(SENTENCES)
    observation, _, ended = write(env, *["you"] * MAX_WORDS)
    assert ended and len(set(observation)) == 1 and len(observation) == MAX_WORDS
    noisy, _, _ = write(TextGenerationEnv(SENTENCES, noise=0.5), *["you"] * MAX_WORDS)
    assert len(set(noisy)) > 1 and (noisy > 0).all()


def test_policy_sees_the_words_so_far_and_nothing_behind_them():
    env = TextGenerationEnv(SENTENCES)
    torch.manual_seed(0)
    gru = WordsGRU(env.observation_space).eval()
    with torch.no_grad():
        empty, one, two = (gru(torch.tensor([[*ids, *[0] * (10 - len(ids))]])) for ids in ([], [3], [3, 5]))
        by_hand, _ = gru.gru(gru.embedding(torch.tensor([[0, 3, 5]])))
    assert gru.embedding.embedding_dim == 256 and one.shape == (1, 128) and gru.dropout.p == 0.1
    for i, state in enumerate((empty, one, two)):
        torch.testing.assert_close(state, by_hand[:, i])


def test_learns_the_target_sentence(tmp_path, capsys):
    result = text_generation_env.main(
        [
            *("--steps", "9000", "--references", "1", "--envs", "8", "--learning-rate", "2e-3"),
            *("--output", str(tmp_path)),
        ]
    )
    assert result["first"] < 0.4 and result["sampled"] > result["first"] + 0.2
    assert result["greedy"] > 0.7
    assert len(list(tmp_path.glob("a2c_*_steps.zip"))) == 10
    assert len(list(tmp_path.glob("*.monitor.csv"))) == 8
    assert "The likeliest text:" in capsys.readouterr().out


def test_references_are_short_sentences_of_the_corpus():
    references = read_references(50)
    assert len(set(references)) == 50 and all(4 <= len(words) < MAX_WORDS for words in references)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"references": []}, "references must be texts of at least one word, got"),
        ({"references": [()]}, "references must be texts of at least one word, got"),
        ({"metric": "meteor"}, "metric must be one of bleu, rouge, got 'meteor'"),
        ({"noise": 1.0}, r"noise must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TextGenerationEnv(**{"references": SENTENCES, **settings})
