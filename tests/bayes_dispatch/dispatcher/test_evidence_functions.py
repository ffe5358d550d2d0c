"""A view is a property of the prompt, by a function of any kind: words, similarities, classifiers and likelihoods say
what they are called. Nothing found is missing; errors pass through, and bad input is refused."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence import functions as evidence_functions
from bayes_dispatch.dispatcher.evidence.functions import (
    ClassifierProbabilities,
    Embedding,
    EmbeddingSimilarity,
    EvidenceFunction,
    KeywordCounts,
    LogLikelihoods,
    kinds,
    read,
)
from bayes_dispatch.errors import BayesDispatchError, ConfigError, EvidenceError, PromptError

KEYWORDS = {"code": ["def", "return", "for loop"], "maths": ["prove", "square root", "return"], "names": ["don't", "É"]}
PROMPTS = ["Prove that the square\nROOT of 2 isn't.", "def f(): return 1", "!?", "For loops? For Loop!", "Don't, é, e"]


def letters(texts: Sequence[str]) -> np.ndarray:
    """(N, 26) how often each letter stands in a text: zeros where none does."""
    return np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], dtype=float)


def scores(texts: Sequence[str]) -> np.ndarray:
    """(N, 3) numbers, NaN for texts without a letter."""
    counts = letters(texts)[:, :3] - 7.0
    return np.where(letters(texts).sum(1, keepdims=True) > 0, counts, np.nan)


@pytest.fixture(scope="module")
def classifier() -> Any:
    texts = ["def return", "return def f", "prove root", "prove it"]
    return make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, ["code", "code", "maths", "maths"])


@pytest.fixture(scope="module")
def functions(classifier: Any) -> list[Any]:
    examples = {"code": ["def f", "return"], "maths": ["prove", "square root"]}
    return [
        KeywordCounts(KEYWORDS),
        Embedding(letters),
        EmbeddingSimilarity(letters, examples),
        ClassifierProbabilities(classifier),
        LogLikelihoods(scores),
    ]


def of(values: Any) -> Callable[[list[str]], Any]:
    """A callable that returns the same whatever it is asked."""
    return lambda texts: values


def function(values: Any, name: str = "view", kind: str = "vectors") -> Any:
    class Constant:
        def __init__(self) -> None:
            self.name, self.kind = name, kind

        def __call__(self, prompts: Sequence[str]) -> np.ndarray:
            return np.asarray(values, dtype=float)

    return Constant()


def test_the_example_of_the_module() -> None:
    assert doctest.testmod(evidence_functions).failed == 0


def test_every_function_keeps_the_contract(functions: list[Any]) -> None:
    order = [3, 0, 4, 2, 1]
    for each in functions:
        assert isinstance(each, EvidenceFunction)
        together = each(PROMPTS)
        assert together.shape[0] == len(PROMPTS)
        np.testing.assert_allclose(each([PROMPTS[i] for i in order]), together[order], rtol=1e-12, atol=1e-12)
        for i, prompt in enumerate(PROMPTS):
            np.testing.assert_allclose(each([prompt])[0], together[i], rtol=1e-12, atol=1e-12)
        for prompts, message in [
            ([], "at least one prompt, got none"),
            ("text", "a list of prompts, got a single str"),
        ]:
            with pytest.raises(PromptError, match=message):
                each(prompts)


def test_all_together(functions: list[Any]) -> None:
    evidence = read(functions, PROMPTS, [9, 5, 0, 4, 3])
    assert {name: values.shape[1] for name, values in evidence.views.items()} == {
        "keywords": 4, "embedding": 26, "similarity": 2, "classifier": 2, "log_likelihoods": 3,
    }  # fmt: skip
    assert kinds(functions) == {
        "keywords": "counts", "embedding": "vectors", "similarity": "vectors", "classifier": "probabilities",
        "log_likelihoods": "vectors",
    }  # fmt: skip
    absent = {name for name in (*evidence.views, "lengths") if evidence.is_missing(name).any()}
    assert absent == {"keywords", "similarity", "log_likelihoods", "lengths"}
    for name in absent:
        assert np.flatnonzero(evidence.is_missing(name)).tolist() == [2]
    order = [4, 2, 0]
    shuffled = read(functions, [PROMPTS[i] for i in order])
    for name, values in evidence.select(order).views.items():
        np.testing.assert_allclose(shuffled.views[name], values, rtol=1e-12, atol=1e-12)
    assert shuffled.lengths is None


def test_every_word_counts_once() -> None:
    assert KeywordCounts(KEYWORDS)(PROMPTS).tolist() == [
        [0, 3, 0, 5],
        [2, 0, 0, 2],
        [0, 0, 0, 0],
        [2, 0, 0, 2],
        [0, 0, 2, 1],
    ]


@effort(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["def", "Square", "root", "return", "x", "don't", ", ", "\n", "-", "É"]), max_size=12))
def test_a_row_sums_to_the_number_of_words(parts: list[str]) -> None:
    text = " ".join(parts)
    row = KeywordCounts(KEYWORDS)([text])[0]
    assert row.sum() == len(re.findall(r"[\w']+", text))
    assert row.tolist() == KeywordCounts(KEYWORDS)([text.upper()])[0].tolist()


def test_the_longest_keyword_counts_then_the_first_set() -> None:
    sets = {"short": ["new", "york"], "long": ["New York", "york"], "longer": ["new york times", "New-York"]}
    rows = KeywordCounts(sets)(["new york times", "New York", "york new", "New, York!", "newyork"])
    assert rows.tolist() == [[0, 0, 3, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]


def test_a_composed_letter_is_a_decomposed_one() -> None:
    assert KeywordCounts({"a": ["caf\u00e9"]})(["CAFE\u0301"]).tolist() == [[1, 0]]


def test_similarity_is_the_cosine_with_the_mean_example() -> None:
    similarity = EmbeddingSimilarity(letters, {"one": ["aab", "b"], "two": ["c"]})
    mean = np.array([1.0, 1.0])  # a, b
    expected = [
        [np.dot(mean, [3, 1]) / np.sqrt(2 * 10), 0],
        [0, 1],
        [np.dot(mean, [1, 0]) / np.sqrt(2 * 2), np.sqrt(0.5)],
    ]
    np.testing.assert_allclose(similarity(["aaab", "cc", "ac"]), expected, rtol=0, atol=1e-12)


def test_the_scale_of_embeddings_is_theirs() -> None:
    np.testing.assert_array_equal(Embedding(lambda texts: 100 * letters(texts))(PROMPTS), 100 * letters(PROMPTS))


def test_probabilities_are_the_classifiers(classifier: Any) -> None:
    np.testing.assert_array_equal(ClassifierProbabilities(classifier)(PROMPTS), classifier.predict_proba(PROMPTS))


def test_only_differences_of_log_likelihoods_speak() -> None:
    base = LogLikelihoods(of([[-1.0, -2.0, -6.0], [-3.0, -3.0, -3.0]]))(["a", "b"])
    assert base.tolist() == [[2, 1, -3], [0, 0, 0]]
    shifted = LogLikelihoods(of([[-11.0, -12.0, -16.0], [0.0, 0.0, 0.0]]))(["a", "b"])
    np.testing.assert_allclose(shifted, base, rtol=0, atol=1e-12)


def test_a_dispatcher_is_fitted_on_views_of_the_names_that_it_reads(settings: Callable[..., dict[str, Any]]) -> None:
    examples = {"code": ["def f", "return"], "maths": ["prove", "square root"]}
    functions = [
        KeywordCounts(KEYWORDS, "counts"),
        EmbeddingSimilarity(letters, examples, "hidden"),
        Embedding(letters),
    ]
    texts = ["def f(): return", "prove the square root"] * 15 + ["!?"]
    dispatcher = Dispatcher(("code", "maths"), **settings())
    dispatcher.fit(read(functions, texts), [0, 1] * 15 + [-1])
    assert dispatcher.predict_proba(read(functions, texts)).shape == (31, 3)


def test_nothing_counted_or_a_row_of_nan_is_missing() -> None:
    counts, vectors = function([[0, 0], [1, 0]], "a", "counts"), function([[1, 2], [np.nan, np.nan]], "b")
    evidence = read([counts, vectors], ["x", "y"])
    assert evidence.is_missing("a").tolist() == [True, False]
    assert evidence.is_missing("b").tolist() == [False, True]
    assert evidence.views["b"].tolist() == [[1, 2], [0, 0]]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KeywordCounts({}), ConfigError, "keywords of at least one name, got none"),
        (lambda: KeywordCounts({"a": []}), ConfigError, "a list of keywords for 'a', got none"),
        (lambda: KeywordCounts({"a": "def"}), ConfigError, "a list of keywords for 'a', got a single text"),
        (lambda: KeywordCounts({"a": ["x", "+"]}), ConfigError, "keywords of at least one word in 'a', got '\\+'"),
        (lambda: KeywordCounts({"a": [5]}), ConfigError, "keywords of at least one word in 'a', got 5"),
        (lambda: KeywordCounts(["a"]), ConfigError, r"keywords by name, got \['a'\]"),  # type: ignore[arg-type]
        (lambda: EmbeddingSimilarity(letters, {"a": []}), ConfigError, "a list of examples for 'a', got none"),
        (
            lambda: EmbeddingSimilarity(letters, {"a": ["!"]}),
            EvidenceError,
            "mean embedding has a direction, got zeros",
        ),
        (lambda: ClassifierProbabilities(LinearSVC()), ConfigError, "with predict_proba, got LinearSVC"),
        (lambda: Embedding(of([1.0, 2.0]))(["a", "b"]), EvidenceError, r"shape \(2, width\), got shape \(2,\)"),
        (lambda: Embedding(of([[1.0]]))(["a", "b"]), EvidenceError, r"shape \(2, width\), got shape \(1, 1\)"),
        (lambda: Embedding(of(np.zeros((2, 0))))(["a", "b"]), EvidenceError, r"got shape \(2, 0\)"),
        (lambda: Embedding(of([["x"]]))(["a"]), EvidenceError, "expected numbers as 'embedding', got list"),
        (lambda: Embedding(of([[10**400]]))(["a"]), EvidenceError, "expected numbers as 'embedding', got list"),
        (lambda: Embedding(of([[np.nan]]))(["a"]), EvidenceError, "finite numbers in 'embedding', got nan"),
        (lambda: Embedding(letters)([3]), PromptError, "expected prompt 0 to be text, got int"),
        (lambda: LogLikelihoods(of([[np.nan, 1.0]]))(["a"]), EvidenceError, "in 'log_likelihoods', got nan"),
        (lambda: LogLikelihoods(of([[-np.inf, 1.0]]))(["a"]), EvidenceError, "in 'log_likelihoods', got -inf"),
        (lambda: read([letters], ["a"]), ConfigError, "that have a name and a kind, got <function letters"),
        (lambda: read([], ["a"]), ConfigError, "at least one evidence function, got none"),
        (lambda: read([Embedding(letters)] * 2, ["a"]), ConfigError, "different names, got \\['embedding', 'emb"),
        (lambda: read([Embedding(letters, "lengths")], ["a"]), ConfigError, "other than 'lengths', got 'lengths'"),
        (lambda: read([function([[1]], kind="text")], ["a"]), ConfigError, "of a kind of counts, .*, got 'text'"),
        (lambda: read([function([[1]])], ["a", "b"]), EvidenceError, r"shape \(2, width\), got shape \(1, 1\)"),
        (lambda: read([function([[1, np.nan]])], ["a"]), EvidenceError, r"in 'view', .*got nan at \(0, 1\)"),
        (lambda: read([function([[-1, 2]], kind="counts")], ["a"]), EvidenceError, "non-negative .* got -1"),
        (lambda: read([function([[-1, 2]], kind="probabilities")], ["a"]), EvidenceError, "non-negative .* got -1"),
        (lambda: read([function([[0.5, 0.4]], kind="probabilities")], ["a"]), EvidenceError, "sum to 1, .* of 0.9"),
        (lambda: read([Embedding(letters)], ["a"], [1, 2]), EvidenceError, "same number of prompts"),
        (lambda: read([Embedding(letters)], []), PromptError, "at least one prompt, got none"),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[BayesDispatchError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_another_width_than_the_examples() -> None:
    widths = iter([2, 3])
    similarity = EmbeddingSimilarity(lambda texts: np.ones((len(texts), next(widths))), {"a": ["x"]})
    with pytest.raises(EvidenceError, match="embeddings of width 2, got 3"):
        similarity(["x"])


def test_errors_of_a_function_pass_through() -> None:
    def fail(texts: list[str]) -> np.ndarray:
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        read([Embedding(letters), Embedding(fail, "other")], ["a"])
