from __future__ import annotations

import numpy as np
import pytest

from examples import q_learning
from examples.q_learning import DialogueEnv, exact_q


def test_exact_values_by_hand():
    # Answering for ever is worth 1 / (1 - 0.9) = 10; asking first -1 + 0.9 * 10.
    np.testing.assert_allclose(exact_q(0.9), [[8, 7.2], [10, 8], [7.2, 10]], atol=1e-9)


def test_dialogue_goes_round_and_is_cut():
    env = DialogueEnv(turns=4)
    assert env.reset()[0] == 0
    turns = [env.step(action) for action in (0, 0, 1, 0)]
    assert [int(state) for state, *_ in turns] == [1, 2, 2, 0]
    assert [reward for _, reward, *_ in turns] == [-1, 1, 1, 0]
    assert [truncated for *_, truncated, _ in turns] == [False, False, False, True]


def test_both_learn_to_ask_once_and_answer(capsys):
    result = q_learning.main(["--ppo-steps", "3072"])
    np.testing.assert_allclose(result["q"].max(1), result["exact"].max(1), atol=0.3)
    assert result["Q-learning"] == result["PPO"] == 8
    printed = capsys.readouterr().out
    assert "The first dialogue, turn by turn" in printed
    assert printed.count("start → ask → answer → answer …; return 8") == 2


def test_a_smaller_alpha_has_not_arrived_yet():
    fast, first = q_learning.q_learning(DialogueEnv(), 1000, 0.01, 0.9, 0.2)
    slow, _ = q_learning.q_learning(DialogueEnv(), 1000, 0.001, 0.9, 0.2)
    assert slow.max() < 0.8 * fast.max()
    assert len(first) == 10 and first[0].before == 0


def test_help_says_what_it_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        q_learning.main(["--help"])
    assert "tabular Q-learning" in capsys.readouterr().out
