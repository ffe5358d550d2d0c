"""Evidence functions: named views of prompts that need no first pass.

An evidence function turns prompts into one array. Its ``kind`` says what its numbers are, and so which likelihood the
generative model gives them; they enter as they are, nothing is normalised by hand. A row of NaN says that the function
is undefined for that prompt, whose view is then missing.

>>> functions = [KeywordCounts({"code": ["def", "return"], "maths": ["prove", "square root"]})]
>>> evidence = read(functions, ["Prove that a square root is positive.", "def f(): return 1"])
>>> evidence.views["keywords"].tolist(), kinds(functions)
([[0.0, 3.0, 4.0], [2.0, 0.0, 2.0]], {'keywords': 'counts'})
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from bayes_dispatch.arguments import shown
from bayes_dispatch.dispatcher.evidence.reading import (
    COUNTS,
    PROBABILITIES,
    VECTORS,
    EvidenceFunction,
    checked_prompts,
    kinds,
    read,
    table,
)
from bayes_dispatch.errors import ConfigError, EvidenceError

__all__ = [
    "ClassifierProbabilities",
    "Embedding",
    "EmbeddingSimilarity",
    "EvidenceFunction",
    "KeywordCounts",
    "LogLikelihoods",
    "kinds",
    "read",
]

WORD = re.compile(r"\w+(?:['’]\w+)*")  # letters, digits and underscores, with apostrophes inside


@dataclass(frozen=True, eq=False)
class KeywordCounts:
    """How many words of a prompt belong to each set of keywords, then how many to none.

    Words are compared whole and without regard to case. A keyword of several words is those words in a row, whatever
    stands between them; all of them count. Where several keywords begin at the same word, the longest one counts; a
    keyword in several sets counts for the first of them. Thus each word counts once, and a row sums to the number of
    words. A prompt without words is a row of zeros.

    Args:
        keywords: the keywords of each set, by its name.
        name: of the view.

    Raises:
        ConfigError: no sets, a set without keywords, or a keyword without words.
    """

    keywords: Mapping[str, Sequence[str]]
    name: str = "keywords"
    kind = COUNTS
    _column_of: dict[tuple[str, ...], int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_sets("keywords", self.keywords)
        for column, (owner, keywords) in enumerate(self.keywords.items()):
            for keyword in keywords:
                if not isinstance(keyword, str) or not (words := _words(keyword)):
                    raise ConfigError(f"expected keywords of at least one word in {owner!r}, got {keyword!r}")
                self._column_of.setdefault(words, column)

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt width"]:
        """``(N, sets + 1)`` counts of words.

        Raises:
            PromptError: no prompts, or prompts that are no text.
        """
        texts = checked_prompts(prompts)
        counts = np.zeros((len(texts), len(self.keywords) + 1))
        longest = max(map(len, self._column_of))
        for row, text in zip(counts, texts, strict=True):
            words, start = _words(text), 0
            while start < len(words):
                candidates = (words[start : start + length] for length in range(longest, 0, -1))
                hit = next((words for words in candidates if words in self._column_of), None)
                length = 1 if hit is None else len(hit)
                row[-1 if hit is None else self._column_of[hit]] += length
                start += length
        return counts


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors from any callable, such as a sentence encoder that lies on this machine.

    >>> encoder = SentenceTransformer("path/to/model")  # doctest: +SKIP
    >>> Embedding(encoder.encode)  # doctest: +SKIP

    Args:
        embed: a list of N texts to finite numbers ``(N, width)``.
        name: of the view.
    """

    embed: Callable[[list[str]], Any]
    name: str = "embedding"
    kind = VECTORS

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt width"]:
        """``(N, width)`` what the callable returns.

        Raises:
            PromptError: no prompts, or prompts that are no text.
            EvidenceError: another shape, or numbers that are not finite.
        """
        return _embedded(self.name, self.embed, checked_prompts(prompts))


@dataclass(frozen=True, eq=False)
class EmbeddingSimilarity:
    """Cosine similarity of a prompt's embedding with the mean embedding of each expert's examples.

    Args:
        embed: a list of N texts to finite numbers ``(N, width)``.
        examples: prompts of each expert, by its name; they are embedded at once.
        name: of the view.

    Raises:
        ConfigError: no experts, or one without examples.
        EvidenceError: embeddings of another shape or not finite, or examples whose mean is zero.
    """

    embed: Callable[[list[str]], Any]
    examples: Mapping[str, Sequence[str]]
    name: str = "similarity"
    kind = VECTORS
    _directions: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_sets("examples", self.examples)
        means = []
        for expert, texts in self.examples.items():
            means.append(_embedded(self.name, self.embed, checked_prompts(texts)).mean(axis=0))
            if not means[-1].any():
                raise EvidenceError(f"expected examples of {expert!r} whose mean embedding has a direction, got zeros")
        object.__setattr__(self, "_directions", np.stack(means) / np.linalg.norm(means, axis=1, keepdims=True))

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt width"]:
        """``(N, experts)`` cosines; a row of NaN where the embedding is all zeros, and has no direction.

        Raises:
            PromptError: no prompts, or prompts that are no text.
            EvidenceError: embeddings of another shape, or not finite.
        """
        vectors = _embedded(self.name, self.embed, checked_prompts(prompts))
        if vectors.shape[1] != self._directions.shape[1]:
            raise EvidenceError(f"expected embeddings of width {self._directions.shape[1]}, got {vectors.shape[1]}")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(norms > 0, norms, np.nan)) @ self._directions.T


@dataclass(frozen=True, eq=False)
class ClassifierProbabilities:
    """Class probabilities of a fitted scikit-learn classifier, or pipeline, that takes texts.

    Of the prompts that it was trained on it is too sure. Give ``Dispatcher.fit`` other prompts, or the probabilities
    that ``cross_val_predict`` gives of these.

    Args:
        classifier: fitted, with ``predict_proba``.
        name: of the view.

    Raises:
        ConfigError: the classifier gives no probabilities.
    """

    classifier: Any
    name: str = "classifier"
    kind = PROBABILITIES

    def __post_init__(self) -> None:
        if not hasattr(self.classifier, "predict_proba"):
            raise ConfigError(f"expected a classifier with predict_proba, got {type(self.classifier).__name__}")

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt width"]:
        """``(N, classes)`` probabilities in the order of the classifier's ``classes_``.

        Raises:
            PromptError: no prompts, or prompts that are no text.
            EvidenceError: another shape, or numbers that are not finite.
        """
        return _embedded(self.name, self.classifier.predict_proba, checked_prompts(prompts))


@dataclass(frozen=True, eq=False)
class LogLikelihoods:
    """Log-likelihoods of a prompt under each expert and base, minus their mean: only differences speak.

    Args:
        score: a list of N texts to log-likelihoods per token ``(N, K+1)``, such as ``ExpertLogLikelihoods``; a row of
            NaN where there is none, as for an empty prompt.
        name: of the view.
    """

    score: Callable[[list[str]], Any]
    name: str = "log_likelihoods"
    kind = VECTORS

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt width"]:
        """``(N, K+1)``, rows that sum to zero, or are NaN.

        Raises:
            PromptError: no prompts, or prompts that are no text.
            EvidenceError: another shape, or numbers that are not finite in a row that is not all NaN.
        """
        scores = _embedded(self.name, self.score, checked_prompts(prompts), undefined=True)
        return scores - scores.mean(axis=1, keepdims=True)


def _words(text: str) -> tuple[str, ...]:
    """The words of a text, without case; composed letters equal decomposed ones."""
    return tuple(WORD.findall(unicodedata.normalize("NFC", text).casefold()))


def _check_sets(what: str, sets: Mapping[str, Sequence[str]]) -> None:
    if not isinstance(sets, Mapping):
        raise ConfigError(f"expected {what} by name, got {shown(sets)}")
    if not sets:
        raise ConfigError(f"expected {what} of at least one name, got none")
    for owner, members in sets.items():
        if isinstance(members, str) or not members:
            got = "a single text" if isinstance(members, str) and members else "none"
            raise ConfigError(f"expected a list of {what} for {owner!r}, got {got}")


def _embedded(name: str, embed: Callable[[list[str]], Any], texts: list[str], undefined: bool = False) -> np.ndarray:
    """What the callable returns for the texts: finite, but for rows that are all NaN where they may be undefined."""
    values = table(name, embed(texts), len(texts))
    wrong = ~np.isfinite(values) & ~(undefined & np.isnan(values).all(axis=1, keepdims=True))
    if wrong.any():
        raise EvidenceError(f"expected finite numbers in {name!r}, got {values[wrong][0]}")
    return values
