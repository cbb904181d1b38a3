"""The dialogue manager: history inside the context window, the intent's state, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from examples.dialogue.intents import Intents

ACTIONS = ("answer", "ask", "end")
_GOODBYE = re.compile(
    r"\b(good ?bye|bye|see (you|ya)|good night|talk to you later|ttyl)\b|再见|拜拜", re.IGNORECASE
)


@dataclass
class State:
    """Where a dialogue stands.

    Attributes:
        intent: the likeliest topic of what the user said last; None: nothing yet, or no classifier.
        certainty: its probability.
        intents: the topics so far, each time one changed.
        turns: of the user.
        ended: has the user said goodbye?
    """

    intent: str | None = None
    certainty: float = 0.0
    intents: list[str] = field(default_factory=list)
    turns: int = 0
    ended: bool = False


class DialogueManager:
    """Keeps both sides' turns, and gives a model as many of the newest as its context takes.

    Args:
        tokenizer: has a chat template.
        max_tokens: of the model's context.
        reply_tokens: kept free for the next reply.
        system: a system prompt, which is never dropped.
        intents: tracks what the user is about.
        unsure: below this certainty the action is to ask.
        act: chooses the action instead, `(messages, state) -> action`; a model trained for it (`tuning.JointModel`).

    Raises:
        ValueError: the numbers leave no room.

    Example:
        >>> manager = DialogueManager(tokenizer, max_tokens=2048, reply_tokens=64)
        >>> manager.hear("hi there")
        >>> manager.say(model_reply_to(manager.prompt()))
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int,
        reply_tokens: int,
        system: str | None = None,
        intents: Intents | None = None,
        unsure: float = 0.2,
        act: Callable[[list[dict[str, str]], State], str] | None = None,
    ) -> None:
        if not 0 < reply_tokens < max_tokens:
            raise ValueError(
                f"reply_tokens must be above 0 and below max_tokens ({max_tokens}), got {reply_tokens}"
            )
        self.tokenizer, self.intents, self.unsure, self.act = tokenizer, intents, unsure, act
        self.room = max_tokens - reply_tokens
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.history: list[dict[str, str]] = []
        self.state = State()

    def hear(self, text: str) -> State:
        """The user's turn."""
        state = self.state
        state.turns += 1
        if self.intents is not None:
            state.intent, state.certainty = self.intents(text)
            if state.certainty >= self.unsure and state.intents[-1:] != [state.intent]:
                state.intents.append(state.intent)
        state.ended = bool(_GOODBYE.search(text))
        self.history.append({"role": "user", "content": text})
        return state

    def say(self, text: str) -> None:
        """The reply."""
        self.history.append({"role": "assistant", "content": text})

    def messages(self) -> list[dict[str, str]]:
        """The system prompt and the newest turns that fit; what is kept begins with a turn of the user.

        Raises:
            ValueError: not even the newest turn fits.
        """
        starts = [i for i, message in enumerate(self.history) if message["role"] == "user"]
        for start in starts:
            kept = [*self.system, *self.history[start:]]
            if len(self._ids(kept)) <= self.room:
                return kept
        if not starts:
            return list(self.system)
        size = len(self._ids([*self.system, *self.history[starts[-1] :]]))
        raise ValueError(
            f"the user's last turn takes {size} tokens with the system prompt; the context has {self.room} beside a "
            "reply"
        )

    def prompt(self) -> list[int]:
        """Token ids of `messages`, with the beginning of a reply."""
        return self._ids(self.messages())

    def action(self) -> str:
        """What to do next: "answer", "ask" what is meant, or "end"."""
        if self.act is not None:
            chosen = self.act(self.messages(), self.state)
            if chosen not in ACTIONS:
                raise ValueError(f"act must give one of {', '.join(ACTIONS)}, got {chosen!r}")
            return chosen
        if self.state.ended:
            return "end"
        unsure = self.intents is not None and self.state.certainty < self.unsure
        return "ask" if unsure else "answer"

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
