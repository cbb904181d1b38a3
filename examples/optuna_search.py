"""Hyper-parameter search over PPO runs with Optuna: learning rate, KL coefficient, epochs and clip range.

Each trial trains the question answerer of examples/question_answering.py from one supervised model; it is worth its F1
on held-out questions. A callback reports the reward of every update; a trial whose reward falls behind the median of
those before it is pruned. Everything is kept in a SQLite file: started again, the search goes on where it was, and
several processes may search at once.

    python -m examples.optuna_search --trials 20
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from examples.question_answering import (
    Question,
    QuestionAnsweringEnv,
    ask,
    fine_tune,
    make_policy,
    make_tokenizer,
    make_trainer,
    measure,
)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class ReportReward(TrainerCallback):
    """Tells Optuna the mean reward of each update, and ends a run that it prunes."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "objective/scores" in logs:
            self.trial.report(logs["objective/scores"], state.global_step)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """The space that is searched."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "kl_coef": trial.suggest_float("kl_coef", 1e-3, 0.3, log=True),
        "num_ppo_epochs": trial.suggest_int("num_ppo_epochs", 1, 6),
        "cliprange": trial.suggest_float("cliprange", 0.1, 0.4),
    }


def supervised_model(folder: Path, tokenizer: PreTrainedTokenizerFast, steps: int) -> Path:
    """What every trial starts from; trained once."""
    if not (folder / "model.safetensors").exists():
        draw = random.Random(0)
        fine_tune(
            make_policy(tokenizer), tokenizer, [ask(draw) for _ in range(2000)], steps, 0.6
        ).save_pretrained(folder)
    return folder


def search(
    study: optuna.Study,
    trials: int,
    start: Path,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[Question],
    held_out: Sequence[Question],
) -> None:
    """Trials until `trials` have finished, those of earlier searches included."""

    def objective(trial: optuna.Trial) -> float:
        model = LlamaForCausalLM.from_pretrained(start)
        trainer = make_trainer(
            model,
            tokenizer,
            train,
            QuestionAnsweringEnv("f1"),
            str(start.parent / "trial"),
            callbacks=[ReportReward(trial)],
            total_episodes=len(train),
            **suggest(trial),
        )
        trainer.train()
        return measure(model, tokenizer, held_out)["f1"]

    finished = len(study.get_trials(deepcopy=False, states=FINISHED))
    study.optimize(objective, n_trials=max(0, trials - finished))


def main(arguments: list[str] | None = None) -> optuna.Study:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, help="finished trials in all")
    parser.add_argument("--episodes", type=int, default=1280, help="answers of a trial")
    parser.add_argument("--sft-steps", type=int, default=500, help="supervised steps before all trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/optuna_search"), help="holds study.db")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    draw = random.Random(1)
    train, held_out = ([ask(draw) for _ in range(n)] for n in (options.episodes, 500))
    tokenizer = make_tokenizer()
    start = supervised_model(options.output / "supervised", tokenizer, options.sft_steps)
    study = optuna.create_study(
        study_name="question-answering",
        storage=f"sqlite:///{options.output / 'study.db'}",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2),
    )
    # A seed of its own for every start: the same one would suggest again what it suggested before.
    study.sampler = optuna.samplers.TPESampler(seed=options.seed + len(study.trials), n_startup_trials=5)
    search(study, options.trials, start, tokenizer, train, held_out)

    table = Table("trial", "state", "updates", "F1, held out", *study.best_params)
    for trial in study.trials:
        value = f"{trial.value:.3f}" if trial.state == TrialState.COMPLETE else "–"
        settings = (
            f"{trial.params[name]:.3g}" if name in trial.params else "–" for name in study.best_params
        )
        row = str(trial.number), trial.state.name.lower(), str(len(trial.intermediate_values)), value
        table.add_row(*row, *settings, style="bold" if trial.number == study.best_trial.number else None)
    console = Console()
    console.print(table)
    console.print(
        f"Best: trial {study.best_trial.number}, F1 {study.best_value:.3f} with {study.best_params}"
    )
    return study


if __name__ == "__main__":
    main()
