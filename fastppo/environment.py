"""Dialogues: policy and environment take turns, and a response holds the tokens of both.

::

    prompt      | turn      | observation    | turn      | observation | turn
    response_mask  1 1 1 1    0 0 0 0 0 0 0    1 1 1       0 0 0 0       1 1 1 1
    turn_rewards   0 0 0 r    0 0 0 0 0 0 0    0 0 r       0 0 0 0       0 0 0 r

Tokens of the environment have no log-prob, KL, advantage or loss: they are not in the mask. The advantage estimator
steps from a turn's last token to the next turn's first, and neither gamma nor lambda decays in between.

Whoever decides that a dialogue is over, it is trained on the very tokens that were sampled: a reply is never decoded
and tokenised again. Each turn prefills the dialogue so far anew; keys and values are not kept from turn to turn.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batch import Rollout
from .prompts import is_chat
from .score import excerpt, in_thread

Message = Mapping[str, Any]
_Place = tuple[str, str]  # for an error: what of the environment, and where in the run
_NO_DRAW = (0.0, 0.0, 0.0)


class Step(NamedTuple):
    """What an environment answers to a turn.

    Attributes:
        observation: what the policy sees next: text (in a chat, a message of the user), or chat messages. It is dropped
            where the dialogue ends here, and may then be None.
        reward: of the turn, on its last token; a finite number.
        done: is the dialogue over?
    """

    observation: str | Sequence[Message] | None
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """What `PPOTrainer(environment_factory=...)` makes: one instance per dialogue of a batch, reset for the next.

    Both methods may be `async`: those of a batch are then awaited together.
    """

    def reset(self, **row: Any) -> str | Sequence[Message] | None:
        """Begin a dialogue with a row of the dataset, all its columns. A method that takes `seed` (or any keyword) also
        gets an integer that is the dialogue's own: what is drawn from it is the same when a run is resumed.

        Returns:
            What is put after the prompt. Text: on the last message, where that is the user's (as in TRL), else as a
            message of the user; on a prompt that is text, as it is. Chat messages: as they are. None: nothing.
        """

    def step(self, reply: str) -> Step | tuple[Any, float, bool]:
        """Answer the policy's turn: a `Step`, a tuple like it, or any object with its fields."""


@dataclass
class Dialogues(Rollout):
    """B dialogues; `response_mask` is True at the policy's tokens, `response_lengths` counts those of both sides.

    `truncated`: cut by a limit: the last turn by its length, or the dialogue by `max_turns` or `max_length`.

    Attributes:
        turn_rewards: (B, T) float32, at the last token of each turn what the environment gave for it, 0 elsewhere.
        turns: (B,) int64, turns of the policy.
        messages: B lists of chat messages, what both sides said after the prompt.
    """

    turn_rewards: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    turns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    messages: list[list[Message]] = field(default_factory=list)


def check_environment(environment: Any) -> None:
    """Raise a TypeError unless this has the methods of an `Environment`."""
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise TypeError(
                f"environment_factory: expected an environment with a method `{method}`, got "
                f"{type(environment).__name__} without one"
            )


def opened(
    rows: Sequence[Mapping[str, Any]],
    environments: Sequence[Any],
    seeds: Sequence[int],
    timeout: float | None = None,
) -> list[dict[str, Any]]:
    """Reset an environment for each row: the rows, with what the environments say first after their prompts.

    Raises:
        RuntimeError: an environment raised, or they took more than `timeout` seconds; the message names it and the row.
        TypeError: it gave something that cannot stand after the prompt.
    """
    calls, places = [], []
    for i, (row, environment, seed) in enumerate(zip(rows, environments, seeds, strict=True)):
        own = {"seed": seed} if _takes(environment.reset, "seed") and "seed" not in row else {}
        calls.append(partial(environment.reset, **row, **own))
        places.append((f"{type(environment).__name__}.reset", f"row {i}: {excerpt(dict(row))}"))
    observations = _together(calls, places, timeout)
    return [_with_opening(*found) for found in zip(rows, observations, places, strict=True)]


def converse(
    generate: Callable[[list[list[int]], list[int], list[int]], Rollout],
    prompts: Sequence[Sequence[int]],
    given: Sequence[Any],
    environments: Sequence[Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    pad_token_id: int,
    turn_length: int,
    max_turns: int,
    max_length: int | None = None,
    timeout: float | None = None,
) -> Dialogues:
    """Let policy and environments talk until each dialogue is over.

    Args:
        generate: the policy's turn, `(contexts, numbers, positions) -> Rollout` with a row per context: its tokens,
            its number among the B, and how many tokens its response has so far.
        prompts: B lists of token ids.
        given: the B prompts as text or chat messages; in a chat, observations go through the chat template.
        environments: one for each prompt, reset.
        tokenizer: the policy's.
        pad_token_id: fills the places past a dialogue's end.
        turn_length: most tokens of a turn.
        max_turns: most turns of the policy.
        max_length: most tokens of a dialogue, prompt included: one whose next turn might not fit ends before it. None:
            no limit.
        timeout: seconds that the environments may take for their answers to one turn of all dialogues. None: no limit.

    Returns:
        B dialogues, on the device that `generate` uses.

    Raises:
        RuntimeError: an environment raised, or hangs; the message names it, turn, prompt and reply.
        TypeError, ValueError: what it gave is no `Step`; a prompt leaves no room for the first turn.
    """
    for i, prompt in enumerate(prompts):
        if max_length is not None and len(prompt) + turn_length > max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with a first turn of response_length {turn_length} that exceeds "
                f"max_length {max_length}: {excerpt(given[i])}"
            )
    observed = _Observations(tokenizer)
    dialogues = [_Dialogue(i, *x) for i, x in enumerate(zip(prompts, given, environments, strict=True))]
    going, device = dialogues, torch.device("cpu")
    while going:
        said = generate(
            [[*d.prompt, *d.ids] for d in going], [d.number for d in going], [len(d.ids) for d in going]
        )
        device = said.response_ids.device
        replies = tokenizer.batch_decode(said.completions(), skip_special_tokens=True)
        draws = torch.stack([said.logprobs, said.sampling_logprobs, said.entropy], dim=-1).tolist()
        for d, ids, drawn, reply in zip(going, said.completions(), draws, replies, strict=True):
            d.says(reply, ids, drawn[: len(ids)])
        answers = _together(
            [partial(d.environment.step, reply) for d, reply in zip(going, replies, strict=True)],
            [d.place for d in going],
            timeout,
        )
        still_going = []
        for d, answer, cut in zip(going, answers, said.truncated.tolist(), strict=True):
            step = _as_step(answer, d.place)
            d.rewards[-1] = step.reward
            d.truncated = cut
            if step.done:
                continue
            ids = observed(step.observation, d, cut)
            length = len(d.prompt) + len(d.ids) + len(ids) + turn_length
            d.truncated = d.turns == max_turns or (max_length is not None and length > max_length)
            if not d.truncated:
                d.hears(_as_messages(step.observation), ids)
                still_going.append(d)
        going = still_going
    return _stacked(dialogues, pad_token_id, device)


@dataclass
class _Dialogue:
    """A dialogue so far; the lists have an entry per response token."""

    number: int
    prompt: Sequence[int]
    given: Any
    environment: Any
    ids: list[int] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)
    draws: list[Sequence[float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    truncated: bool = False

    def says(self, reply: str, ids: list[int], draws: list[Sequence[float]]) -> None:
        """The policy's turn; of each token log-prob, sampling log-prob and entropy."""
        self._append(ids, True, draws)
        self.messages.append({"role": "assistant", "content": reply})
        self.turns += 1

    def hears(self, messages: Sequence[Message], ids: list[int]) -> None:
        """The environment's."""
        self._append(ids, False, [_NO_DRAW] * len(ids))
        self.messages += messages

    def _append(self, ids: list[int], counts: bool, draws: list[Sequence[float]]) -> None:
        self.ids += ids
        self.counts += [counts] * len(ids)
        self.draws += draws
        self.rewards += [0.0] * len(ids)

    @property
    def place(self) -> _Place:
        """What an error says of the turn that was just answered."""
        reply = excerpt(self.messages[-1]["content"])
        place = f"turn {self.turns} of prompt {excerpt(self.given)}, reply {reply}"
        return f"{type(self.environment).__name__}.step", place


def _stacked(dialogues: Sequence[_Dialogue], pad_token_id: int, device: torch.device) -> Dialogues:
    lengths = [len(d.ids) for d in dialogues]
    longest = max(lengths, default=0)

    def table(lists: Sequence[Sequence[Any]], filler: Any, dtype: torch.dtype) -> Tensor:
        rows = [[*row, *[filler] * (longest - len(row))] for row in lists]
        return torch.tensor(rows, dtype=dtype, device=device)

    draws = table([d.draws for d in dialogues], _NO_DRAW, torch.float32)
    logprobs, sampling_logprobs, entropy = draws.unbind(-1)
    return Dialogues(
        prompt_ids=[list(d.prompt) for d in dialogues],
        response_ids=table([d.ids for d in dialogues], pad_token_id, torch.int64),
        response_mask=table([d.counts for d in dialogues], False, torch.bool),
        response_lengths=torch.tensor(lengths, device=device),
        truncated=torch.tensor([d.truncated for d in dialogues], device=device),
        logprobs=logprobs.contiguous(),
        sampling_logprobs=sampling_logprobs.contiguous(),
        entropy=entropy.contiguous(),
        turn_rewards=table([d.rewards for d in dialogues], 0.0, torch.float32),
        turns=torch.tensor([d.turns for d in dialogues], device=device),
        messages=[d.messages for d in dialogues],
    )


class _Observations:
    """Token ids between the end of one turn of the policy and the beginning of the next.

    In a chat they are what the template puts there: the end of the policy's message where the policy has not sampled it
    itself, the environment's messages, the beginning of the policy's next one. Only these are tokenised, with a message
    of ours in place of what came before.
    """

    _REPLY = "fastppo-reply"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, observation: str | Sequence[Message] | None, after: _Dialogue, cut: bool) -> list[int]:
        name, place = after.place
        if not is_chat(after.given):
            if not isinstance(observation, str):
                raise ValueError(
                    f"environment {name} must observe text where the prompt is text, got {excerpt(observation)}; "
                    f"{place}"
                )
            return self._ids(observation)
        before: list[Any] = [{"role": "user", "content": "…"}, {"role": "assistant", "content": self._REPLY}]
        try:
            text = self.tokenizer.apply_chat_template(
                [*before, *_as_messages(observation)], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise ValueError(
                f"environment {name}: the chat template does not take the observation {excerpt(observation)} after a "
                f"message of the assistant: {type(error).__name__}: {error}; {place}"
            ) from error
        _, found, rest = str(text).partition(self._REPLY)
        if not found:
            raise ValueError(
                f"the chat template of {type(self.tokenizer).__name__} leaves out what the assistant said before, so "
                "no turn can follow another"
            )
        ids = self._ids(rest)
        # The token that ends a message is in the template's text, and the policy has sampled it already.
        return ids[1:] if ids and not cut and ids[0] == after.ids[-1] else ids

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _as_messages(observation: Any) -> Sequence[Message]:
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    return observation or []


def _with_opening(row: Mapping[str, Any], observation: Any, place: _Place) -> dict[str, Any]:
    if observation is None:
        return dict(row)
    prompt: Any = row.get("prompt")
    if isinstance(prompt, str) and isinstance(observation, str):
        return {**row, "prompt": prompt + observation}
    is_messages = isinstance(prompt, Sequence) and not isinstance(prompt, str)  # perhaps none yet
    if is_messages and isinstance(observation, str):
        if prompt and prompt[-1].get("role") == "user":
            last = {**prompt[-1], "content": prompt[-1]["content"] + observation}
            return {**row, "prompt": [*prompt[:-1], last]}
        return {**row, "prompt": [*prompt, *_as_messages(observation)]}
    if is_messages and is_chat(observation):
        return {**row, "prompt": [*prompt, *_as_messages(observation)]}
    raise TypeError(
        f"environment {place[0]} must return None, text or (where the prompt is a chat) chat messages, to stand after "
        f"the row's `prompt`; got {excerpt(observation)} for {place[1]}"
    )


def _as_step(result: Any, place: _Place) -> Step:
    def refuse(expected: str, got: Any) -> ValueError:
        return ValueError(f"environment {place[0]} must give {expected}, got {excerpt(got)}; {place[1]}")

    if isinstance(result, tuple) and len(result) != 3:
        raise refuse("observation, reward and done", result)
    if not isinstance(result, tuple):
        if not all(hasattr(result, name) for name in Step._fields):
            raise refuse("observation, reward and done", result)
        result = (result.observation, result.reward, result.done)
    observation, reward, done = result
    try:
        reward = float(reward)
    except (TypeError, ValueError):
        raise refuse("a number as reward", reward) from None
    if not math.isfinite(reward):
        raise refuse("a finite number as reward", reward)
    if done not in (True, False):
        raise refuse("True or False as done", done)
    if not done and not isinstance(observation, str) and not is_chat(observation):
        raise refuse("text or chat messages as observation of a dialogue that goes on", observation)
    return Step(observation, reward, bool(done))


def _takes(method: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _together(
    calls: Sequence[Callable[[], Any]], places: Sequence[_Place], timeout: float | None
) -> list[Any]:
    """What the calls give, awaited together where they are of async methods."""
    results: dict[int, Any] = {}

    async def one(i: int) -> None:
        try:
            result = calls[i]()
            results[i] = await result if inspect.isawaitable(result) else result
        except Exception as error:
            raise _raised(error, places[i]) from error

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, range(len(calls))))

    def one_by_one() -> None:
        for i, call in enumerate(calls):
            try:
                results[i] = call()
            except Exception as error:
                raise _raised(error, places[i]) from error

    is_async = any(inspect.iscoroutinefunction(call) for call in calls)
    if timeout is None and not is_async:
        one_by_one()  # in this thread, to which the environment's things may belong
    else:
        try:
            in_thread((lambda: asyncio.run(all_of_them())) if is_async else one_by_one).result(timeout)
        except futures.TimeoutError:
            missing = [i for i in range(len(calls)) if i not in results]
            name, place = places[missing[0]]
            raise RuntimeError(
                f"environment {name} gave no answer within environment_timeout = {timeout} s ({len(missing)} of "
                f"{len(calls)} dialogues wait); {place}"
            ) from None
    return [results[i] for i in range(len(calls))]


def _raised(error: Exception, place: _Place) -> RuntimeError:
    return RuntimeError(f"environment {place[0]} raised {type(error).__name__}: {error}; {place[1]}")
