"""Dialogues: whose tokens count, where rewards stand, and that one turn is what it was before."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fastppo import PPOConfig, PPOTrainer, ops
from fastppo.advantages import rewards_and_advantages
from fastppo.batch import Rollout, micro_batches
from fastppo.environment import Step, converse, opened
from fastppo.models import causal_trunk, packed_attention, token_logprobs
from fastppo.rollout import DRAWS_PER_EPISODE, Sampling, rollout

WORDS = tiny.TEXT.split()
CHATS = [
    {
        "prompt": [{"role": "user", "content": " ".join(WORDS[i : i + 1 + i % 5])}],
        "number": i,
    }
    for i in range(24)
]
END = 1  # the tiny tokenizer's <|end|>


def vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / max(1, len(text))


class Echo:
    """Says something else each time, and rewards vowels; over after `last` turns."""

    last = 3

    def reset(self, **row: Any) -> None:
        self.turn = 0

    def step(self, reply: str) -> Step:
        self.turn += 1
        return Step(WORDS[self.turn], vowels(reply), self.turn == self.last)


class Once(Echo):
    last = 1


def trainer(tmp_path: Path, environment: Any, reward: Any = None, **changes: Any) -> PPOTrainer:
    settings = {"output_dir": str(tmp_path / "run"), **tiny.SETTINGS, "total_episodes": 16 * 2}
    return PPOTrainer(
        PPOConfig(**{**settings, **changes.pop("settings", {})}),
        tiny.tokenizer(),
        changes.pop("model", None) or tiny.policy(max_position_embeddings=128),
        None,
        reward,
        changes.pop("rows", CHATS),
        environment_factory=environment,
        **changes,
    )


def weights(run: PPOTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.actor_critic.parameters()]


def last(run: PPOTrainer) -> dict[str, Any]:
    return next(h for h in reversed(run.state.log_history) if "objective/scores" in h)


# --- whose tokens count ----------------------------------------------------------------------------------------------


def says(*turns: list[list[int]]) -> Any:
    """A policy that says given ids, `turns[k][i]` in its turn k to context i; a turn without END was cut."""
    heard: list[list[list[int]]] = []

    def generate(contexts: list[list[int]], numbers: list[int], positions: list[int]) -> Rollout:
        said = turns[len(heard)]
        heard.append(contexts)
        assert len(said) == len(contexts) == len(numbers) == len(positions)
        lengths = torch.tensor([len(x) for x in said])
        width = int(lengths.max())
        ids = torch.tensor([x + [0] * (width - len(x)) for x in said])
        mask = torch.arange(width) < lengths[:, None]
        return Rollout(
            contexts, ids, mask, lengths, torch.tensor([x[-1] != END for x in said]), -ids / 10, -ids / 5, ids / 1.0
        )  # fmt: skip

    generate.heard = heard  # type: ignore[attr-defined]
    return generate


def talk(generate: Any, environments: Any, given: Any = None, **settings: Any) -> Any:
    given = given or [row["prompt"] for row in CHATS[: len(environments)]]
    tokenizer = tiny.tokenizer()
    ids = [
        tokenizer(x)["input_ids"]
        if isinstance(x, str)
        else tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False)
        for x in given
    ]
    opened([{"prompt": x} for x in given], environments, [0] * len(given))
    defaults = {"tokenizer": tokenizer, "pad_token_id": 0, "turn_length": 6, "max_turns": 8}
    return converse(generate, ids, given, environments, **{**defaults, **settings})


class Scripted(Echo):
    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)

    def step(self, reply: str) -> Any:
        self.turn += 1
        return self.steps[self.turn - 1]


def test_a_dialogue_token_by_token() -> None:
    tokenizer = tiny.tokenizer()
    # The policy ended its first turn itself, so the environment's part begins after the <|end|>.
    observation = tokenizer("<|user|>fine<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    generate = says([[40, 41, END]], [[42, END]])
    got = talk(
        generate, [Scripted(("fine", 0.5, False), SimpleNamespace(observation=None, reward=2, done=True))]
    )
    n = len(observation)
    assert got.response_ids.tolist() == [[40, 41, END, *observation, 42, END]]
    assert got.response_mask.tolist() == [[True] * 3 + [False] * n + [True] * 2]
    assert got.turn_rewards.tolist() == [[0, 0, 0.5, *[0] * n, 0, 2]]
    torch.testing.assert_close(got.logprobs, torch.tensor([[-4, -4.1, -0.1, *[0.0] * n, -4.2, -0.1]]))
    torch.testing.assert_close(got.sampling_logprobs, 2 * got.logprobs)
    torch.testing.assert_close(got.entropy, -10 * got.logprobs)
    assert got.turns.tolist() == [2] and got.truncated.tolist() == [False]
    assert got.response_lengths.tolist() == [5 + n]
    assert [m["role"] for m in got.messages[0]] == ["assistant", "user", "assistant"]
    assert got.messages[0][1]["content"] == "fine"
    # What the policy saw before its second turn is what a chat template would show it.
    chat = [
        *CHATS[0]["prompt"],
        {"role": "assistant", "content": tokenizer.decode([40, 41])},
        got.messages[0][1],
    ]  # type: ignore[misc]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(generate.heard[1][0]) == tokenizer.decode(whole)


def test_a_turn_that_was_cut_is_ended_for_the_policy() -> None:
    got = talk(says([[40, 41]], [[42, END]]), [Scripted(("fine", 0, False), (None, 0, True))])
    observation = tiny.tokenizer()("<|end|><|user|>fine<|end|><|assistant|>")["input_ids"]
    assert got.completions() == [[40, 41, *observation, 42, END]]
    assert got.response_mask.tolist() == [[True] * 2 + [False] * len(observation) + [True] * 2]
    assert not got.truncated[0]


def test_text_goes_on_as_text() -> None:
    generate = says([[40, END]], [[42]])
    got = talk(generate, [Scripted((" and then ?", 0, False), (None, 0, True))], ["the quick"])
    observation = tiny.tokenizer()(" and then ?")["input_ids"]
    assert got.completions() == [[40, END, *observation, 42]]
    assert got.truncated.tolist() == [True]  # the environment ended it, after a turn that its length had cut


def test_finished_dialogues_leave_and_limits_are_marked() -> None:
    go_on, stop = ("dog", 0, False), (None, 1, True)
    generate = says([[40, END], [41, END], [42, END]], [[43, END], [44, END]], [[45, END]])
    environments = [Scripted(stop), Scripted(go_on, stop), Scripted(go_on, go_on, go_on)]
    got = talk(generate, environments, max_turns=3)
    assert [len(x) for x in generate.heard] == [3, 2, 1]
    assert got.turns.tolist() == [1, 2, 3]
    assert got.truncated.tolist() == [False, False, True]
    assert not got.response_mask[0, 2:].any()
    assert (
        got.response_ids[2, int(got.response_lengths[2]) - 1] == END
    )  # no observation without a turn after it

    room = len(generate.heard[1][1]) + 6  # for a second turn of dialogue 2
    generate = says([[42, END]], [[44, END]])
    got = talk(generate, [Scripted(go_on, go_on)], [CHATS[2]["prompt"]], max_length=room)
    assert got.turns.tolist() == [2] and got.truncated.tolist() == [True]
    got = talk(says([[42, END]]), [Scripted(go_on, go_on)], [CHATS[2]["prompt"]], max_length=room - 1)
    assert got.turns.tolist() == [1] and got.truncated.tolist() == [True]


def test_draws_do_not_depend_on_who_else_still_talks() -> None:
    policy, tokenizer = tiny.policy(max_position_embeddings=128), tiny.tokenizer()
    sampling = Sampling(max_new_tokens=6, temperature=1.5, stop_token_ids=tuple(range(60)))
    settings: dict[str, Any] = {"pad_token_id": 0, "seed": 3}

    def dialogues(rows: list[int]) -> Any:
        def generate(contexts: Any, numbers: list[int], positions: list[int]) -> Rollout:
            pairs = zip(numbers, positions, strict=True)
            draws = [rows[n] * DRAWS_PER_EPISODE + p for n, p in pairs]
            return rollout(policy, contexts, sampling, first_draws=draws, **settings)

        return talk(generate, [Echo() for _ in rows], [CHATS[i]["prompt"] for i in rows])

    together = dialogues([0, 1, 2, 3])
    assert together.turns.tolist() == [3] * 4
    assert dialogues([2]).completions()[0] == together.completions()[2]
    # The turns of one dialogue draw from numbers of their own.
    plain = rollout(policy, together.prompt_ids, sampling, tokenizer=tokenizer, **settings)
    assert [
        c[: len(p)] for c, p in zip(together.completions(), plain.completions(), strict=True)
    ] == plain.completions()
    # The training path says of the counted tokens what was noted when they were sampled.
    for padding_free in (False, True):
        batches = micro_batches(together, range(4), pad_token_id=0, padding_free=padding_free)
        for batch in batches:
            with packed_attention(causal_trunk(policy), batch.packing):
                logprobs, _ = token_logprobs(policy, batch, 1.5)
            torch.testing.assert_close(together.logprobs.flatten()[batch.tokens], logprobs, atol=2e-4, rtol=0)
            assert together.response_mask.flatten()[batch.tokens].all()


# --- rewards and advantages ------------------------------------------------------------------------------------------

SETTINGS: Any = {
    "kl_coef": 0.0, "estimator": "k1", "reward_clip": None, "whiten_rewards": False, "whiten_advantages": False,
    "gamma": 0.5, "lam": 0.5,
}  # fmt: skip


def test_advantages_are_carried_from_turn_to_turn() -> None:
    nan = torch.nan
    mask = torch.tensor([[True, True, False, False, True, False]])
    logprobs = torch.tensor([[-1.0, -1.0, nan, nan, -1.0, nan]])
    values = torch.tensor([[0.5, 1.0, nan, nan, 2.0, nan]])
    turns = torch.tensor([[0.0, 1.0, nan, nan, 2.0, nan]])
    got = rewards_and_advantages(
        torch.tensor([3.0]), logprobs, logprobs, values, mask, **SETTINGS, turn_rewards=turns
    )
    # The last turn: 2 + 3 - 2. The turn before: 1 + 0.5 * 2 - 1 and 0.25 of what follows, nothing lost in between.
    torch.testing.assert_close(got.rewards, torch.tensor([[0.0, 1, 0, 0, 5, 0]]))
    torch.testing.assert_close(got.advantages, torch.tensor([[0.4375, 1.75, 0, 0, 3, 0]]))
    torch.testing.assert_close(got.returns, torch.tensor([[0.9375, 2.75, 0, 0, 5, 0]]))
    clipped = rewards_and_advantages(
        torch.tensor([3.0]), logprobs, logprobs, values, mask,
        **{**SETTINGS, "reward_clip": 1.5}, turn_rewards=turns,
    )  # fmt: skip
    torch.testing.assert_close(clipped.rewards, torch.tensor([[0.0, 1, 0, 0, 3, 0]]))


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("whiten_advantages", [False, True])
def test_turn_rewards_of_nothing_change_nothing(whiten_rewards: bool, whiten_advantages: bool) -> None:
    torch.manual_seed(0)
    mask = torch.rand(5, 9) > 0.3
    inputs = (torch.randn(5), *torch.randn(3, 5, 9), mask)
    settings: Any = {**SETTINGS, "kl_coef": 0.1, "gamma": 0.97, "lam": 0.9}
    settings |= {"whiten_rewards": whiten_rewards, "whiten_advantages": whiten_advantages}
    expected = ops.rewards_and_advantages(*inputs, **settings)  # type: ignore[misc]
    for lam_critic in (None, 1.0):
        got = rewards_and_advantages(
            *inputs, **settings, lam_critic=lam_critic, turn_rewards=torch.zeros(5, 9)  # type: ignore[misc]
        )  # fmt: skip
        if lam_critic is not None:
            settings_1 = {"gamma": 0.97, "lam": lam_critic}
            _, returns = ops.gae(expected.rewards, inputs[3], mask, **settings_1)
            expected = expected._replace(returns=returns)
        for name, a, b in zip(got._fields, got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_one_turn_trains_as_without_an_environment(tmp_path: Path) -> None:
    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        return [vowels(c[0]["content"]) for c in completions]

    settings: Any = {
        "num_generations": 2,
        "use_score_scaling": True,
        "missing_eos_penalty": 0.1,
    }
    alone = trainer(tmp_path, None, reward, settings=settings)
    talking = trainer(tmp_path, Once, settings=settings)
    for run in (alone, talking):
        run.train()
    for name in (
        "objective/scores",
        "objective/kl",
        "loss/policy_avg",
        "val/num_eos_tokens",
        "completions/mean_length",
    ):
        assert last(talking)[name] == pytest.approx(last(alone)[name], rel=1e-4), name
    for a, b in zip(weights(talking), weights(alone), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert last(talking)["dialogues/turns"] == 1


def test_padded_and_padding_free_dialogues_train_alike(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, Echo, settings={"padding_free": x, "kl_coef": 0.2}) for x in (False, True)]
    for run in runs:
        run.train()
    for a, b in zip(*map(weights, runs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    report = last(runs[1])
    assert report["dialogues/turns"] == 3
    assert report["completions/mean_length"] > report["dialogues/policy_tokens"] > 3
    assert report["sampling/sampling_logp_difference/max"] < 1e-3


def test_learns_from_every_turn(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, Echo,
        settings={"total_episodes": 48 * 14, "per_device_train_batch_size": 24, "learning_rate": 5e-3, "kl_coef": 0.0,
                  "lr_scheduler_type": "constant"},
    )  # fmt: skip
    run.train()
    history = [h["objective/scores"] for h in run.state.log_history]
    assert history[-1] > history[0] + 0.4


# --- the trainer's side ----------------------------------------------------------------------------------------------


def test_rewards_see_messages_and_environments(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, environments: Any, number: Any, **columns: Any) -> list[float]:
        seen.append((prompts, completions, environments, number))
        return [float(e.turn) for e in environments]

    run = trainer(
        tmp_path, Echo, reward, settings={"total_episodes": 16, "num_generations": 2}, eval_dataset=CHATS[:4]
    )
    run.train()
    _, completions, environments, number = seen[0]
    assert len(environments) == 16 == len({id(e) for e in environments})
    assert number[0] == number[1] and [m["role"] for m in completions[0]] == ["assistant", "user"] * 2 + [
        "assistant"
    ]
    report = last(run)
    assert report["rewards/reward/mean"] == 3
    assert report["objective/scores"] == pytest.approx(3 + report["rewards/environment/mean"], rel=1e-4)
    held_out = run.evaluate()
    assert 3 < held_out["eval_objective/scores"] < 6
    assert len(run.environments) == 16  # the same as before
    rows = run.generate_completions()
    assert len(rows) == 4 and WORDS[1] in rows[0]["model response"] and rows[3]["score"] > 3


def test_resumed_dialogues_are_those_of_the_whole_run(tmp_path: Path) -> None:
    seeds: list[int] = []

    class Seeded(Echo):
        def reset(self, seed: int, **row: Any) -> str:
            super().reset()
            seeds.append(seed)
            return " " + WORDS[seed % len(WORDS)]

    whole = trainer(tmp_path / "a", Seeded)
    whole.train()
    of_the_whole = seeds.copy()
    assert len(seeds) == len(set(seeds)) == 32
    half = trainer(tmp_path / "b", Seeded, settings={"save_strategy": "steps", "save_steps": 1})
    half.train()
    seeds.clear()
    resumed = trainer(tmp_path / "b", Seeded)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-1"))
    assert seeds == of_the_whole[16:]
    for a, b in zip(weights(resumed), weights(whole), strict=True):
        torch.testing.assert_close(a, b)


SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("prompt", "observation", "expected"),
    [
        ([SYSTEM], "hello", [SYSTEM, USER]),
        ([], "hello", [USER]),
        ([SYSTEM, USER], " dog", [SYSTEM, {"role": "user", "content": "hello dog"}]),  # as in TRL
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([USER], None, [USER]),
        ("the quick", " brown", "the quick brown"),
    ],
)
def test_what_an_environment_says_first(prompt: Any, observation: Any, expected: Any) -> None:
    class Opens(Echo):
        def reset(self, prompt: Any, number: int) -> Any:
            assert number == 7
            return observation

    (row,) = opened([{"prompt": prompt, "number": 7}], [Opens()], [0])
    assert row == {"prompt": expected, "number": 7}


def test_async_environments_of_a_batch_wait_together() -> None:
    here = 0

    class Waits(Echo):
        async def step(self, reply: str) -> Step:  # type: ignore[override]
            nonlocal here
            here += 1
            while here < 3:  # until the others are there
                await asyncio.sleep(0)
            return Step(None, 1.0, True)

    async def in_a_notebook() -> Any:
        return talk(says([[40, END]] * 3), [Waits() for _ in range(3)])

    assert talk(says([[40, END]] * 3), [Waits() for _ in range(3)]).turn_rewards.sum() == 3
    here = 0
    assert asyncio.run(in_a_notebook()).turn_rewards.sum() == 3


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_an_environment_that_raises_is_named_with_its_prompt(is_async: bool) -> None:
    class Broken(Echo):
        def step(self, reply: str) -> Step:
            raise KeyError("mood")

    class AsyncBroken(Echo):
        async def step(self, reply: str) -> Step:  # type: ignore[override]
            raise KeyError("mood")

    broken = AsyncBroken if is_async else Broken
    message = rf"environment {broken.__name__}.step raised KeyError: 'mood'; turn 1 of prompt .*{WORDS[1]} {WORDS[2]}"
    with pytest.raises(RuntimeError, match=message):
        talk(says([[40, END]] * 2), [Scripted((None, 0, True)), broken()])

    class Closed(Echo):
        def reset(self, **row: Any) -> None:
            raise OSError("no such corpus")

    with pytest.raises(
        RuntimeError, match=r"environment Closed.reset raised OSError: no such corpus; row 0: .*hello"
    ):
        opened([{"prompt": [USER]}], [Closed()], [0])


@pytest.mark.parametrize("is_async", [False, True])
def test_an_environment_that_hangs_is_named_with_its_prompt(is_async: bool) -> None:
    over = threading.Event()

    class Hangs(Echo):
        def step(self, reply: str) -> Step:
            over.wait(60)
            return Step(None, 0.0, True)

    class AsyncHangs(Echo):
        async def step(self, reply: str) -> Step:  # type: ignore[override]
            while not over.is_set():
                await asyncio.sleep(0.01)
            return Step(None, 0.0, True)

    hangs = AsyncHangs if is_async else Hangs
    message = (
        rf"environment {hangs.__name__}.step gave no answer within environment_timeout = 0.1 s \(1 of 2 dialogues "
        rf"wait\); turn 1 of prompt .*{WORDS[1]} {WORDS[2]}"
    )
    with pytest.raises(RuntimeError, match=message):
        talk(says([[40, END]] * 2), [Scripted((None, 0, True)), hangs()], timeout=0.1)
    over.set()
    slow = talk(says([[40, END]] * 2), [Scripted((None, 0, True)), hangs()], timeout=60)
    assert slow.turns.tolist() == [1, 1]


def test_the_time_limit_is_a_setting_of_the_trainer(tmp_path: Path) -> None:
    over = threading.Event()

    class Opens(Once):
        def reset(self, **row: Any) -> None:
            over.wait(60)

    run = trainer(tmp_path, Opens, settings={"environment_timeout": 0.1})
    with pytest.raises(
        RuntimeError, match=r"Opens.reset gave no answer within environment_timeout = 0.1 s.*row 0"
    ):
        run.train()
    over.set()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (None, "must give observation, reward and done, got None; turn 1 of prompt"),
        (("hello", 1.0), "must give observation, reward and done"),
        (("hello", 1.0, False, False, {}), "must give observation, reward and done"),
        (("hello", "good", False), "must give a number as reward, got 'good'"),
        (("hello", float("nan"), False), "must give a finite number as reward, got nan"),
        (("hello", 1.0, "no"), "must give True or False as done, got 'no'"),
        (
            (None, 1.0, False),
            "must give text or chat messages as observation of a dialogue that goes on, got None",
        ),
        (([{"text": "hello"}], 1.0, False), "must give text or chat messages"),
    ],
)
def test_what_is_no_step(step: Any, message: str) -> None:
    with pytest.raises(ValueError, match="environment Scripted.step " + message):
        talk(says([[40, END]]), [Scripted(step)])


def test_observations_that_do_not_fit_the_prompt() -> None:
    with pytest.raises(
        ValueError, match=r"Scripted.step must observe text where the prompt is text, got \[{"
    ):
        talk(says([[40, END]]), [Scripted(([USER], 0, False))], ["the quick"])

    class Opens(Echo):
        def reset(self, **row: Any) -> Any:
            return [USER]

    with pytest.raises(
        TypeError, match=r"Opens.reset must return None, text or .* chat messages.* for row 0"
    ):
        opened([{"prompt": "the quick"}], [Opens()], [0])


def test_chat_templates_that_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    template = tiny.CHAT_TEMPLATE
    go_on = Scripted(("hello", 0, False))
    monkeypatch.setattr(tiny, "CHAT_TEMPLATE", template.replace("m.content", "m.content[:3]"))
    with pytest.raises(ValueError, match="leaves out what the assistant said before"):
        talk(says([[40, END]]), [go_on])
    monkeypatch.setattr(
        tiny, "CHAT_TEMPLATE", "{% if messages[1:] %}{{ raise_exception('one only') }}{% endif %}a"
    )
    with pytest.raises(
        ValueError, match=r"the chat template does not take the observation 'hello'.*one only"
    ):
        talk(says([[40, END]]), [go_on])


def test_a_prompt_without_room_for_a_turn(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"prompt 0 has \d+ tokens; with a first turn of response_length 6 that exceeds"
    ):
        talk(says(), [Echo()], max_length=7)
    run = trainer(tmp_path, Echo, settings={"max_length": 10})
    with pytest.raises(ValueError, match="exceeds max_length 10"):
        run.train()
    with pytest.raises(ValueError, match=r"max_length \(200\) exceeds the model's context of 128"):
        trainer(tmp_path, Echo, settings={"max_length": 200})


def test_what_is_no_environment(tmp_path: Path) -> None:
    class Mute:
        def reset(self, **row: Any) -> None: ...

    with pytest.raises(TypeError, match="expected an environment with a method `step`, got Mute without one"):
        trainer(tmp_path, Mute)
    with pytest.raises(ValueError, match=r"reward_model is required: .* or an environment_factory"):
        trainer(tmp_path, None)
    with pytest.raises(ValueError, match="max_turns must be an integer of at least 1, got 0"):
        PPOConfig(str(tmp_path), max_turns=0)
