"""Users to talk with: environments of `fastppo.PPOTrainer(environment_factory=...)`.

`CorpusUser` answers as a real person did, to the most similar turn of a real conversation. `ModelUser` is a second
language model. A reward says what a turn was worth from the reply and from what the user answered to it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from examples.dialogue.intents import Intents
from examples.dialogue.manager import DialogueManager
from examples.warm_replies import need
from fastppo.environment import Step
from fastppo.rollout import DRAWS_PER_EPISODE, Sampling, rollout

# (the user's turn, the reply, the user's answer to it) → what the reply was worth
TurnReward = Callable[[str, str, str], float]


def pleased() -> TurnReward:
    """How pleased the user's answer sounds: VADER's compound sentiment, -1 to 1."""
    vader = need("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()

    def reward(said: str, reply: str, answer: str) -> float:
        return vader.polarity_scores(answer)["compound"]

    return reward


def on_topic(intents: Intents) -> TurnReward:
    """How likely the reply is about what the user was about, 0 to 1."""

    def reward(said: str, reply: str, answer: str) -> float:
        return intents.probability([reply], intents(said)[0])[0]

    return reward


def weighted(rewards: Mapping[TurnReward, float]) -> TurnReward:
    """The sum of several, each times its weight."""

    def reward(said: str, reply: str, answer: str) -> float:
        return sum(weight * each(said, reply, answer) for each, weight in rewards.items())

    return reward


class Corpus:
    """What people answered to what, found by TF-IDF cosine.

    Args:
        conversations: turns of two people.
        most: turns that are kept.

    Raises:
        ValueError: no conversation has two turns.
    """

    def __init__(self, conversations: Sequence[Sequence[str]], most: int = 20000) -> None:
        need("sklearn", "scikit-learn")
        from sklearn.feature_extraction.text import TfidfVectorizer

        pairs = [pair for turns in conversations for pair in pairwise(turns)][:most]
        if not pairs:
            raise ValueError(
                f"expected conversations of two turns and more, got {len(conversations)} without any"
            )
        self.openings = [turns[0] for turns in conversations if len(turns) > 1]
        self.answers = [answer for _, answer in pairs]
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\b\w+\b")
        # Transposed once: a product with a few rows then walks only the turns that share a word with them.
        self.turns = self.vectorizer.fit_transform(turn for turn, _ in pairs).T.tocsr()

    def answer(self, reply: str, draw: random.Random, among: int = 10) -> str:
        """What somebody answered to one of the `among` turns most like this; to no known word, anything.

        Of few, a policy learns which single turn of the corpus was answered most warmly, and says that for ever.
        """
        cosines = (self.vectorizer.transform([reply]) @ self.turns).toarray()[0]
        nearest = np.argpartition(-cosines, min(among, len(cosines) - 1))[:among]
        nearest = nearest[cosines[nearest] > 0]
        return self.answers[
            int(draw.choice(sorted(nearest))) if len(nearest) else draw.randrange(len(self.answers))
        ]


class CorpusUser:
    """Opens as a real person did, and answers each reply as one did. Over after `turns` replies.

    Args:
        corpora: by the name that a row's column `split` gives.
        reward: of each reply.
        turns: replies until the user leaves.
    """

    def __init__(self, corpora: Mapping[str, Corpus], reward: TurnReward, turns: int = 3) -> None:
        self.corpora, self.reward, self.turns = corpora, reward, turns

    def reset(self, seed: int, split: str, **row: Any) -> str:
        """The first turn."""
        if split not in self.corpora:
            raise ValueError(f"split must be one of {', '.join(self.corpora)}, got {split!r}")
        self.corpus, self.draw = self.corpora[split], random.Random(seed)
        self.said = self.draw.choice(self.corpus.openings)
        self.left = self.turns
        return self.said

    def step(self, reply: str) -> Step:
        """A real person's answer."""
        answer = self.corpus.answer(reply, self.draw)
        reward = self.reward(self.said, reply, answer)
        self.said = answer
        self.left -= 1
        return Step(answer, reward, self.left == 0)


class Speaker:
    """A language model that answers for all users of a batch at once.

    Those who are awaited together get in line, and the first whose turn it is again generates for everyone.

    Args:
        model: any causal language model with a chat template in its tokenizer.
        tokenizer: the model's.
        reply_tokens: most tokens of an answer.
        temperature: of its draws.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, reply_tokens: int = 24, temperature: float = 1.0
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens = model.config.max_position_embeddings
        self.sampling = Sampling(
            reply_tokens, temperature=temperature, stop_token_ids=(tokenizer.eos_token_id,)
        )
        self.waiting: list[tuple[list[int], int, asyncio.Future[str]]] = []

    async def __call__(self, prompt: list[int], seed: int, turn: int) -> str:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, seed * DRAWS_PER_EPISODE + turn * self.sampling.max_new_tokens, answer))
        await asyncio.sleep(0)
        if self.waiting:
            prompts, draws, answers = zip(*self.waiting, strict=True)
            self.waiting = []
            pad = self.tokenizer.pad_token_id or 0
            said = rollout(self.model, prompts, self.sampling, pad_token_id=pad, seed=0, first_draws=draws)
            texts = self.tokenizer.batch_decode(said.completions(), skip_special_tokens=True)
            for one, text in zip(answers, texts, strict=True):
                one.set_result(text.strip())
        return await answer


class ModelUser:
    """A user who is a second language model: to it, the policy is the user.

    Args:
        speaker: shared by all users of a batch.
        reward: of each reply.
        system: what the model is told about its part.
        turns: replies until the user leaves.
    """

    def __init__(
        self, speaker: Speaker, reward: TurnReward, *, system: str | None = None, turns: int = 3
    ) -> None:
        self.speaker, self.reward, self.system, self.turns = speaker, reward, system, turns

    async def reset(self, seed: int, opening: str = "Hi!", **row: Any) -> str:
        """The first turn, from the row."""
        self.seed, self.left, self.said = seed % (1 << 30), self.turns, opening
        # Its own memory has a window too: the oldest turns go.
        self.manager = DialogueManager(
            self.speaker.tokenizer,
            max_tokens=self.speaker.max_tokens,
            reply_tokens=self.speaker.sampling.max_new_tokens,
            system=self.system,
        )
        self.manager.hear("Hello!")  # many chat templates want a user first
        self.manager.say(opening)
        return opening

    async def step(self, reply: str) -> Step:
        """The model's answer."""
        self.manager.hear(reply)
        answer = await self.speaker(self.manager.prompt(), self.seed, self.turns - self.left)
        self.manager.say(answer)
        reward = self.reward(self.said, reply, answer)
        self.said = answer
        self.left -= 1
        return Step(answer or "…", reward, self.left == 0)
