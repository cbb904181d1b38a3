"""One iteration of TRL 1.12's own PPOTrainer, on its own rollouts, against ours in float32.

What agrees is asserted to agree; each difference has a row in docs/differences-from-trl.md and a test here that shows
it. TRL comes by pip: without a network, and not fetched before, these tests fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import trl_recorder as recorder
from torch import Tensor

from bench.peers import PPO, ROOT, fetch_trl
from fastppo import PPOConfig, PPOTrainer, metrics, ops
from fastppo.batch import Rollout
from fastppo.prompts import read_prompts

WHOLE = ("plain", "k3", "discounted", "hot", "mini_batches")  # every response has all tokens
ENDED = ("stop", "missing_eos_penalty")  # some end earlier


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL computed, by case."""
    out = tmp_path_factory.mktemp("trl") / "recorded.pt"
    environment = {name: x for name, x in os.environ.items() if name != "ACCELERATE_MIXED_PRECISION"} | {
        "PYTHONPATH": os.pathsep.join(map(str, (fetch_trl(PPO), ROOT / "tests", ROOT))),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "trl_recorder.py"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"TRL {PPO} did not run:\n{done.stderr[-4000:]}"
    recorded: dict[str, Any] = torch.load(out, weights_only=False)
    return recorded


class Replay(NamedTuple):
    """Our side, up to the scores, on TRL's prompts and responses."""

    trainer: PPOTrainer
    weights: list[Tensor]
    episodes: Rollout
    tokens: Any
    scores: Tensor


def replay(case: str, theirs: dict[str, Any], folder: Path) -> Replay:
    parts, tokenizer = recorder.models(), recorder.tokenizer(case)
    weights = [*parts["model"].parameters(), *parts["value_model"].parameters()]
    optimizer = recorder.optimizer(weights)
    # TRL does not read max_grad_norm.
    settings = {"max_grad_norm": 0, **recorder.settings(case)}
    trainer = PPOTrainer(
        PPOConfig(output_dir=str(folder), **settings),
        tokenizer,
        train_dataset=[{"input_ids": ids} for ids in recorder.prompts(case)],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        **parts,
    )
    responses, stop = theirs["responses"], trainer.args.stop_token_id
    if trainer.args.stop_token == "eos":
        stop = tokenizer.eos_token_id
    lengths = [row.index(stop) + 1 if stop in row else len(row) for row in responses.tolist()]
    mask = torch.arange(responses.shape[1]) < torch.tensor(lengths)[:, None]
    prompts = []
    for row in theirs["queries"].tolist():
        while row[0] == tokenizer.pad_token_id:
            row = row[1:]
        prompts.append(row)
    nothing = torch.zeros(responses.shape)
    episodes = Rollout(
        prompt_ids=prompts,
        response_ids=responses,
        response_mask=mask,
        response_lengths=torch.tensor(lengths),
        truncated=torch.tensor([stop not in row for row in responses.tolist()]),
        logprobs=nothing,
        sampling_logprobs=nothing,
        entropy=nothing,
    )
    batch = read_prompts([{"input_ids": ids} for ids in prompts], tokenizer)
    scores, _ = trainer._score(batch, episodes)
    return Replay(trainer, weights, episodes, trainer._evaluate_tokens(episodes), scores)


def close(ours: Tensor | float, theirs: Tensor | float, atol: float = 2e-5) -> None:
    ours, theirs = (torch.as_tensor(x, dtype=torch.float32) for x in (ours, theirs))
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=atol)


def without_bessel(x: Tensor, mask: Tensor) -> Tensor:
    """What TRL whitened (or scaled), with the variance divided by n instead of n - 1."""
    n = mask.sum()
    mean = x[mask].mean()
    return ((x - mean) * (n / (n - 1)).sqrt() + mean).masked_fill(~mask, 0.0)


# --- what agrees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*WHOLE, *ENDED, "whiten_rewards"])
def test_log_probs_values_scores_and_kl_are_trls(trl: dict[str, Any], tmp_path: Path, case: str) -> None:
    theirs = trl[case]
    ours = replay(case, theirs, tmp_path)
    mask = ours.episodes.response_mask
    assert torch.equal(mask, ~theirs["padding_mask"])
    assert mask.all() != (case in ENDED) and (theirs["responses"][mask] != 0).all()
    result, _ = ours.trainer._advantages(ours.episodes, ours.tokens, ours.scores)
    close(ours.tokens.logprobs[mask], theirs["logprobs"][mask])
    close(ours.tokens.ref_logprobs[mask], theirs["ref_logprobs"][mask])
    close(ours.tokens.values[mask], theirs["values"][mask])
    close(ours.scores, theirs["scores"])
    close(result.kl[mask], theirs["kl"][mask])
    assert theirs["kl"].abs().max() > 0.01
    report = metrics.episode_metrics(
        ours.episodes, ours.scores, {}, ours.tokens.logprobs, result, ours.tokens.values,
        ours.trainer.args.kl_coef,
    )  # fmt: skip
    for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores"):
        close(report[f"objective/{name}"], theirs["metrics"][f"objective/{name}"])


@pytest.mark.parametrize("case", WHOLE)
def test_rewards_advantages_and_returns_are_trls(trl: dict[str, Any], tmp_path: Path, case: str) -> None:
    theirs = trl[case]
    ours = replay(case, theirs, tmp_path)
    result, _ = ours.trainer._advantages(ours.episodes, ours.tokens, ours.scores)
    close(result.rewards, theirs["rewards"])
    close(result.returns, theirs["returns"])
    # Difference: TRL divides the variance by n - 1.
    close(result.advantages, without_bessel(theirs["advantages"], ours.episodes.response_mask), 1e-4)
    assert (result.advantages - theirs["advantages"]).abs().max() > 1e-3


def test_whitened_rewards_are_trls_but_for_n_less_1(trl: dict[str, Any], tmp_path: Path) -> None:
    theirs = trl["whiten_rewards"]
    ours = replay("whiten_rewards", theirs, tmp_path)
    mask = ours.episodes.response_mask
    result, _ = ours.trainer._advantages(ours.episodes, ours.tokens, ours.scores)
    close(result.rewards, without_bessel(theirs["rewards"], mask), 1e-4)
    advantages, returns = ops.gae(theirs["rewards"], theirs["values"], mask, gamma=1.0, lam=0.95)
    close(returns, theirs["returns"])
    close(ops.whiten(advantages, mask), without_bessel(theirs["advantages"], mask), 1e-4)


@pytest.mark.parametrize("case", ["plain", "k3", "discounted", "hot"])
def test_losses_metrics_and_weights_after_two_epochs_are_trls(
    trl: dict[str, Any], tmp_path: Path, case: str
) -> None:
    theirs = trl[case]
    ours = replay(case, theirs, tmp_path)
    before = [p.detach().clone() for p in ours.weights]
    tokens = ours.tokens._replace(**{name: theirs[name] for name in ("logprobs", "ref_logprobs", "values")})
    result, _ = ours.trainer._advantages(ours.episodes, tokens, ours.scores)
    result = result._replace(advantages=theirs["advantages"], returns=theirs["returns"])
    means = ours.trainer._update(ours.episodes, tokens, result)
    report = metrics.update_metrics(means, ours.trainer.objective)
    for name in (
        *("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg"),
        *("policy/entropy_avg", "val/clipfrac_avg", "val/ratio"),
    ):
        close(report[name], theirs["metrics"][name])
    # It is a test of clipping, too.
    assert report["policy/clipfrac_avg"] > 0.01 and report["val/clipfrac_avg"] > 0.01
    assert means["steps"] == len(theirs["grad_norms"]) == 2
    for p, old, their in zip(ours.weights, before, theirs["weights"], strict=True):
        assert (p - old).norm() > 100 * (p - their).norm()


# --- what differs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENDED)
def test_trl_puts_the_score_one_past_the_end(trl: dict[str, Any], tmp_path: Path, case: str) -> None:
    theirs = trl[case]
    ours = replay(case, theirs, tmp_path)
    mask = ours.episodes.response_mask
    # Its tables are ours of a response that has one more token, without KL.
    one_more = ~theirs["padding_mask_p1"]
    assert (one_more.sum(1) - mask.sum(1)).tolist() == (~ours.episodes.truncated & (mask.sum(1) < 8)).tolist()
    settings: dict[str, Any] = {"kl_coef": ours.trainer.args.kl_coef, "gamma": 1.0, "lam": 0.95}
    rewards, _, advantages, returns = ops.rewards_and_advantages(
        *(theirs[name] for name in ("scores", "logprobs", "ref_logprobs", "values")),
        one_more,
        whiten_advantages=False,
        **settings,
    )
    close(rewards, theirs["rewards"])
    close(returns, theirs["returns"])
    close(ops.whiten(advantages, mask), without_bessel(theirs["advantages"], mask), 1e-4)
    # Ours is on the last token, whose advantage then holds all of it, at once.
    result, _ = ours.trainer._advantages(ours.episodes, ours.tokens, ours.scores)
    last = mask.sum(1, keepdim=True) - 1
    score = result.rewards + ours.trainer.args.kl_coef * result.kl
    close(score.gather(1, last)[:, 0], ours.scores)
    close(result.returns.gather(1, last), result.rewards.gather(1, last))
    # In TRL's it holds the critic's guess V at the score beyond the end, and lambda times what the guess is off.
    ended = one_more.sum(1) > mask.sum(1)
    assert ended.sum() >= 2
    last, guess = last[ended], theirs["values"][ended].gather(1, last[ended] + 1)
    gap = (theirs["returns"] - result.returns)[ended].gather(1, last)
    close(gap, 0.05 * (guess - ours.scores[ended, None]))


def test_trl_averages_losses_within_micro_batches(trl: dict[str, Any], tmp_path: Path) -> None:
    theirs = trl["stop"]
    ours = replay("stop", theirs, tmp_path)
    mask, one_more = ours.episodes.response_mask, ~theirs["padding_mask_p1"]
    order = torch.as_tensor(theirs["b_inds"]).split(recorder.MICRO_BATCH)
    policy_losses, value_losses = [], []
    for rows in order:
        losses = [
            ops.ppo_loss(
                theirs["logprobs"][rows], theirs["logprobs"][rows], theirs["advantages"][rows], which[rows],
                new_values=theirs["values"][rows], values=theirs["values"][rows], returns=theirs["returns"][rows],
            )[1]
            for which in (mask, one_more)
        ]  # fmt: skip
        policy_losses.append(losses[0].policy_loss)
        value_losses.append(losses[1].value_loss)  # over the place past the end, too
    close(torch.stack(policy_losses), theirs["pg_loss_stats"].flatten())
    close(torch.stack(value_losses), theirs["vf_loss_stats"].flatten())
    # So a token weighs more, the fewer there are beside it in its micro-batch.
    counts = [mask[rows].sum().item() for rows in order]
    assert max(counts) > 1.1 * min(counts)
    over_tokens = -(theirs["advantages"][mask]).mean()
    assert abs(over_tokens - theirs["pg_loss_stats"].mean()) > 1e-3


def test_trl_counts_padding_in_its_metrics(trl: dict[str, Any], tmp_path: Path) -> None:
    theirs = trl["one_micro_batch"]
    ours = replay("one_micro_batch", theirs, tmp_path)
    tokens = ours.tokens._replace(logprobs=theirs["logprobs"])
    result, _ = ours.trainer._advantages(ours.episodes, tokens, ours.scores)
    means = ours.trainer._update(ours.episodes, tokens, result._replace(advantages=theirs["advantages"]))
    share = ours.episodes.response_mask.float().mean()
    assert share < 0.9 and abs(means["ratio"] - 1) > 0.01
    # Before and after every step, padding has a ratio of 1.
    close(theirs["metrics"]["val/ratio"], share * means["ratio"] + (1 - share))
    close(theirs["metrics"]["policy/approxkl_avg"], share * means["approx_kl"])
    assert abs(theirs["metrics"]["policy/entropy_avg"] - means["entropy"]) > 0.01
    # What is learnt from does not hold any.
    close(theirs["metrics"]["loss/policy_avg"], means["policy_loss"])


def test_trl_takes_one_optimizer_step_per_epoch_whatever_num_mini_batches_says(
    trl: dict[str, Any], tmp_path: Path
) -> None:
    theirs = trl["mini_batches"]
    assert len(theirs["grad_norms"]) == 1
    # Half of its table of losses stays empty, and its averages are over all of the table.
    assert (theirs["ratio_stats"] == 0).sum() == 2
    assert theirs["metrics"]["val/ratio"] == pytest.approx(0.5, abs=1e-4)
    ours = replay("mini_batches", theirs, tmp_path)
    for i, rows in enumerate(torch.as_tensor(theirs["b_inds"]).split(recorder.BATCH // 2)):
        every = torch.ones_like(theirs["logprobs"][rows], dtype=torch.bool)
        _, stats = ops.ppo_loss(
            ours.tokens.logprobs[rows], theirs["logprobs"][rows], theirs["advantages"][rows], every,
            new_values=ours.tokens.values[rows], values=theirs["values"][rows], returns=theirs["returns"][rows],
        )  # fmt: skip
        close(stats.policy_loss, theirs["pg_loss_stats"][0, i, 0])
        close(stats.value_loss, theirs["vf_loss_stats"][0, i, 0])
    result, _ = ours.trainer._advantages(ours.episodes, ours.tokens, ours.scores)
    assert ours.trainer._update(ours.episodes, ours.tokens, result)["steps"] == 2


def test_trl_steps_after_every_micro_batch_of_the_last_batch_of_an_epoch(trl: dict[str, Any]) -> None:
    plain, last = trl["plain"], trl["last_batch"]
    assert len(plain["grad_norms"]) == 2  # one step per epoch of PPO
    assert len(last["grad_norms"]) == 2 * recorder.BATCH // recorder.MICRO_BATCH


def test_trl_never_clips_gradients(trl: dict[str, Any], tmp_path: Path) -> None:
    theirs = trl["max_grad_norm"]
    assert max(theirs["grad_norms"]) > 100 * recorder.settings("max_grad_norm")["max_grad_norm"]
    ours = replay("max_grad_norm", theirs, tmp_path)
    before = [p.detach().clone() for p in ours.weights]
    result, _ = ours.trainer._advantages(ours.episodes, ours.tokens, ours.scores)
    ours.trainer._update(ours.episodes, ours.tokens, result)
    moved = torch.stack([(p - old).norm() for p, old in zip(ours.weights, before, strict=True)]).norm()
    # Two steps of SGD at 0.05, for the policy and for the critic.
    assert 0 < moved <= 1.01 * 2 * 0.05 * 1e-3 * 2**0.5


def test_trl_ignores_bf16(trl: dict[str, Any], tmp_path: Path) -> None:
    assert trl["bf16"]["mixed_precision"] == "no" and trl["bf16"]["head_dtypes"] == {torch.float32}
    parts = recorder.models()
    PPOTrainer(
        PPOConfig(output_dir=str(tmp_path), **recorder.settings("bf16")),
        recorder.tokenizer("bf16"),
        train_dataset=[{"input_ids": ids} for ids in recorder.prompts("bf16")],
        **parts,
    )
    assert parts["model"].lm_head.weight.dtype is torch.bfloat16


def test_trl_would_wait_for_ever_for_a_batch_of_fewer_prompts(trl: dict[str, Any], tmp_path: Path) -> None:
    assert trl["few_prompts"]["batches"] == 0
    trainer = PPOTrainer(
        PPOConfig(output_dir=str(tmp_path), **recorder.settings("few_prompts")),
        recorder.tokenizer("few_prompts"),
        train_dataset=[{"input_ids": ids} for ids in recorder.prompts("few_prompts")],
        **recorder.models(),
    )
    trainer.train()
    assert trainer.state.episode == recorder.BATCH


def test_without_a_stop_token_trl_goes_on_after_the_end(trl: dict[str, Any], tmp_path: Path) -> None:
    theirs = trl["plain"]
    assert (theirs["responses"][:, :-1] == 1).any() and not theirs["padding_mask"].any()
    assert replay("plain", theirs, tmp_path).trainer.sampling.stop_token_ids == (1,)


def test_trl_looks_for_the_eos_where_another_token_stops(trl: dict[str, Any], tmp_path: Path) -> None:
    theirs = trl["other_stop_token"]
    ours = replay("other_stop_token", theirs, tmp_path)
    stopped = ~ours.episodes.truncated
    assert stopped.any() and not stopped.all()
    has_eos = ((theirs["responses"] == 1) & ours.episodes.response_mask).any(1)
    by_our_rule, by_theirs = (1.5 * (~ok).float() for ok in (stopped, has_eos))
    close(ours.scores + by_our_rule, theirs["scores"] + by_theirs)
    assert (by_our_rule != by_theirs).any()


def test_where_padding_is_the_eos_trl_trains_no_eos_and_hides_those_of_the_prompt(
    trl: dict[str, Any], tmp_path: Path
) -> None:
    theirs = trl["pad_is_eos"]
    ours = replay("pad_is_eos", theirs, tmp_path)
    mask, ended = ours.episodes.response_mask, ~ours.episodes.truncated
    assert ended.any()
    assert ((~theirs["padding_mask"]).sum(1) == mask.sum(1) - ended.long()).all()
    both = mask & ~theirs["padding_mask"]
    assert (ours.tokens.logprobs - theirs["logprobs"])[both].abs().mean() > 0.1
    without_eos = {**theirs, "queries": theirs["queries"].clone()}
    prompts = [[i for i in row if i != 1] for row in theirs["queries"].tolist()]
    longest = max(map(len, prompts))
    without_eos["queries"] = torch.tensor([[1] * (longest - len(row)) + row for row in prompts])
    blind = replay("pad_is_eos", without_eos, tmp_path)
    close(blind.tokens.logprobs[both], theirs["logprobs"][both])
