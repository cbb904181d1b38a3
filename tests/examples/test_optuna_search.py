from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from examples import optuna_search
from examples.optuna_search import ReportReward


def test_searches_and_goes_on_where_it_was(tmp_path, capsys):
    arguments = ["--episodes", "256", "--sft-steps", "60", "--output", str(tmp_path)]
    first = optuna_search.main(["--trials", "2", *arguments]).trials
    assert [trial.state for trial in first] == [TrialState.COMPLETE] * 2
    assert all(sorted(trial.intermediate_values) == [1, 2] for trial in first)
    supervised = (tmp_path / "supervised" / "model.safetensors").stat().st_mtime_ns

    again = optuna_search.main(["--trials", "3", *arguments])
    assert len(again.trials) == 3
    assert [trial.params for trial in again.trials[:2]] == [trial.params for trial in first]
    assert len({trial.params["learning_rate"] for trial in again.trials}) == 3
    assert (tmp_path / "supervised" / "model.safetensors").stat().st_mtime_ns == supervised
    assert f"Best: trial {again.best_trial.number}" in capsys.readouterr().out
    # Learning rates from 1e-5 to 1e-2 make a difference that the search sees.
    values = [trial.value for trial in again.trials if trial.value is not None]
    assert max(values) == again.best_value


def test_a_trial_that_falls_behind_is_pruned():
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    )

    def objective(trial: optuna.Trial) -> float:
        callback = ReportReward(trial)
        for step in range(3):
            state = type("State", (), {"global_step": step})
            callback.on_log(None, state, None, {"objective/scores": 1.0 - trial.number})
            callback.on_log(None, state, None, {"eval_loss": 0.0})  # no reward, no report
        return 1.0 - trial.number

    study.optimize(objective, n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert study.trials[1].intermediate_values == {0: 0.0}


def test_help_says_what_is_searched(capsys):
    with pytest.raises(SystemExit, match="0"):
        optuna_search.main(["--help"])
    assert "learning rate, KL coefficient, epochs and clip range" in capsys.readouterr().out
