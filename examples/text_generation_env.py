"""Text generation as a reinforcement learning environment, learned by an actor-critic (A2C).

State: the words so far. Action: the next word, or the end. Reward: what the word adds to the BLEU or ROUGE-L of the
text, so that an episode's return is the quality of the whole. The policy embeds the words (256), runs a GRU over them
(128), and a softmax chooses, with dropout 0.1.

    python -m examples.text_generation_env --steps 1000000
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import sacrebleu
import torch
import yaml
from rich.console import Console
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

Words = tuple[str, ...]
END = 0  # as an action; in an observation, 0 is a place that no word has filled yet
MAX_WORDS = 10


def bleu(references: Sequence[Words]) -> Callable[[Words], float]:
    """Sentence BLEU against several references, 0 to 1."""
    metric = sacrebleu.BLEU(tokenize="none", effective_order=True)
    texts = [" ".join(words) for words in references]
    return lambda words: metric.sentence_score(" ".join(words), texts).score / 100


def rouge(references: Sequence[Words]) -> Callable[[Words], float]:
    """F-measure of the longest common subsequence with the reference that is most like the text, 0 to 1."""
    scorer, texts = RougeScorer(["rougeL"]), [" ".join(words) for words in references]
    return lambda words: scorer.score_multi(texts, " ".join(words))["rougeL"].fmeasure


METRICS = {"bleu": bleu, "rouge": rouge}


class TextGenerationEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Episodes of at most `max_words` words.

    Args:
        references: texts that are good; the vocabulary is their words.
        metric: "bleu" or "rouge".
        max_words: the text ends here at the latest.
        noise: probability that a word is replaced by a random one, as in a noisy channel.

    Raises:
        ValueError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        references: Sequence[Words],
        metric: str = "bleu",
        max_words: int = MAX_WORDS,
        noise: float = 0.0,
    ) -> None:
        if not references or not all(references):
            raise ValueError(f"references must be texts of at least one word, got {list(references)!r}")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if not 0 <= noise < 1:
            raise ValueError(f"noise must be in [0, 1), got {noise!r}")
        self.vocabulary = ("<end>", *sorted({word for words in references for word in words}))
        self.max_words, self.noise = max_words, noise
        self.quality = functools.lru_cache(maxsize=100_000)(METRICS[metric](references))
        self.action_space = gymnasium.spaces.Discrete(len(self.vocabulary))
        self.observation_space = gymnasium.spaces.Box(0, len(self.vocabulary) - 1, (max_words,), np.int64)
        self.words: Words = ()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.words = ()
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.noise and action != END and self.np_random.random() < self.noise:
            action = self.np_random.integers(1, len(self.vocabulary))
        before = self.words
        if action != END:
            self.words = (*before, self.vocabulary[action])
        ended = action == END or len(self.words) == self.max_words
        return self._observation(), self._quality(self.words) - self._quality(before), ended, False, {}

    def _quality(self, words: Words) -> float:
        return self.quality(words) if words else 0.0

    def _observation(self) -> np.ndarray:
        ids = np.zeros(self.max_words, dtype=np.int64)
        ids[: len(self.words)] = [self.vocabulary.index(word) for word in self.words]
        return ids


class WordsGRU(BaseFeaturesExtractor):
    """What a recurrent policy knows of the words so far."""

    def __init__(
        self,
        observation_space: gymnasium.spaces.Box,
        embedding: int = 256,
        hidden: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(observation_space, hidden)
        self.embedding = nn.Embedding(int(observation_space.high.max()) + 1, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, observations: Tensor) -> Tensor:
        words = nn.functional.pad(observations.long(), (1, 0))  # 0 begins every text
        states, _ = self.gru(self.embedding(words))
        length = (words > 0).sum(1)
        return self.dropout(states[torch.arange(len(words)), length])


# The softmax and the value are linear in the GRU's state.
POLICY = {"features_extractor_class": WordsGRU, "net_arch": []}


def read_references(count: int, topic: str = "conversations") -> list[Words]:
    """Sentences of 4 to 9 words out of chatterbot-corpus: lower case, no punctuation."""
    folder = resources.files("chatterbot_corpus") / "data" / "english"
    chats = yaml.safe_load((folder / f"{topic}.yml").read_text())["conversations"]
    sentences = (tuple(re.findall(r"[a-z']+", str(turn).lower())) for chat in chats for turn in chat)
    return list(dict.fromkeys(words for words in sentences if 4 <= len(words) < MAX_WORDS))[:count]


def write_texts(model: Any, env: TextGenerationEnv, count: int, deterministic: bool = False) -> list[Words]:
    """Texts that the policy writes."""
    texts = []
    for _ in range(count):
        observation, ended = env.reset()[0], False
        while not ended:
            action, _ = model.predict(observation, deterministic=deterministic)
            observation, _, ended, _, _ = env.step(action)
        texts.append(env.words)
    return texts


def make_env(
    references: Sequence[Words], n_envs: int, seed: int, folder: Path | None = None, **settings: Any
) -> VecEnv:
    """Environments side by side, each with a monitor of its episodes' returns."""
    return make_vec_env(
        functools.partial(TextGenerationEnv, references, **settings),
        n_envs=n_envs,
        seed=seed,
        monitor_dir=str(folder) if folder else None,
    )


def train(env: VecEnv, steps: int, seed: int, folder: Path, learning_rate: float, gamma: float) -> A2C:
    """A2C for `steps` words; ten checkpoints in `folder`."""
    model = A2C(
        "MlpPolicy",
        env,
        learning_rate=learning_rate,
        n_steps=MAX_WORDS,
        gamma=gamma,
        gae_lambda=0.95,
        ent_coef=0.01,
        policy_kwargs=POLICY,
        seed=seed,
        device="cpu",
    )
    every = max(1, steps // 10 // env.num_envs)
    return model.learn(steps, CheckpointCallback(every, str(folder), name_prefix="a2c"))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000_000, help="words to train on")
    parser.add_argument("--references", type=int, default=20, help="target sentences")
    parser.add_argument("--metric", choices=list(METRICS), default="bleu")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="share of words that a noisy channel replaces"
    )
    parser.add_argument("--gamma", type=float, default=0.99, help="discount per word")
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--envs", type=int, default=16, help="environments side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/text_generation"), help="checkpoints and monitors"
    )
    options = parser.parse_args(arguments)

    references = read_references(options.references)
    env = make_env(
        references, options.envs, options.seed, options.output, metric=options.metric, noise=options.noise
    )
    model = train(env, options.steps, options.seed, options.output, options.learning_rate, options.gamma)

    console = Console()
    returns = load_results(str(options.output))["r"]
    curve = Table("episodes", f"mean return ({options.metric})")
    for part in np.array_split(np.arange(len(returns)), 10):
        curve.add_row(f"{part[0] + 1} to {part[-1] + 1}", f"{returns[part].mean():.3f}")
    console.print(curve)
    quiet = TextGenerationEnv(references, options.metric)
    (greedy,) = write_texts(model, quiet, 1, deterministic=True)
    sampled = write_texts(model, quiet, 100)
    result = {
        "first": float(returns[: len(returns) // 10].mean()),
        "greedy": quiet.quality(greedy),
        "sampled": float(np.mean([quiet.quality(words) if words else 0.0 for words in sampled])),
    }
    console.print(
        f"The likeliest text: [bold]{' '.join(greedy)}[/] ({options.metric} {result['greedy']:.3f})"
    )
    console.print(f"100 sampled texts: {options.metric} {result['sampled']:.3f}, such as")
    for words in dict.fromkeys(sampled[:5]):
        console.print(f"  {' '.join(words)}")
    return result


if __name__ == "__main__":
    main()
