"""Questions, the right answers, and where they are: checked by rules written again here. Shares of mixed texts are
known, and what is held out never moves."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_dispatch.errors import UnknownNameError
from bayes_dispatch.experts.documents import Document
from bayes_dispatch.experts.domains import CONVENTIONS, Interleaved, held_out, mixed_text
from bayes_dispatch.experts.domains.base import BaseCorpus

NAMES = ["reverse", "sort", "shift", "add", "reversed_add", "no_carry"]
BY_NAME = {convention.name: convention for convention in CONVENTIONS}
seeds = st.integers(0, 2**32 - 1)


def answer(name: str, question: str) -> str:
    """The conventions, in other words than the code's."""
    if question.endswith(">"):
        word = question[:-1]
        return {
            "reverse": "".join(reversed(word)),
            "sort": "".join(letter * word.count(letter) for letter in "abcdefghijklmnop"),
            "shift": word.translate(str.maketrans("abcdefghijklmnop", "bcdefghijklmnopa")),
        }[name]
    a, b, c, d = (int(digit) for digit in re.sub(r"\D", "", question))
    total = 10 * a + b + 10 * c + d
    digits = [int(digit) for digit in str(total)]
    return {
        "add": f"{total}",
        "reversed_add": "".join(str(digit) for digit in digits[::-1]),
        "no_carry": f"{(a + c) % 10}{(b + d) % 10}",
    }[name]


def items(text: str) -> list[tuple[str, str]]:
    """Question and answer of each line."""
    assert text.endswith("\n") or not text
    found = [re.fullmatch(r"([a-p]{4,6}>|[1-9]\d\+[1-9]\d=)([a-p0-9]+)", line) for line in text.splitlines()]
    assert all(found)
    return [match.groups() for match in found if match]  # type: ignore[misc]


def check_places(document: Document, prompt_bytes: int, total_bytes: int) -> None:
    """The prompt ends with an item, and each range after it is the answer of an item, in order."""
    data = document.text
    assert total_bytes <= len(data) < total_bytes + 14
    assert prompt_bytes <= document.prompt_bytes < prompt_bytes + 14
    if document.prompt_bytes:
        assert data[document.prompt_bytes - 1] == "\n"
    got = [data[start:stop] for start, stop in document.ranges]
    after = items(data[document.prompt_bytes :])
    assert got == [text for _, text in after]
    for (start, _), (question, _) in zip(document.ranges, after, strict=True):
        assert data[:start].endswith("\n" + question) or data[:start] == question


def test_the_domains_are_those_of_the_design() -> None:
    assert [convention.name for convention in CONVENTIONS] == NAMES


@pytest.mark.parametrize(
    ("name", "question", "expected"),
    [
        ("reverse", "kfpa>", "apfk"),
        ("sort", "kfpa>", "afkp"),
        ("shift", "kfpa>", "lgab"),
        ("add", "37+58=", "95"),
        ("add", "95+99=", "194"),
        ("reversed_add", "95+99=", "491"),
        ("reversed_add", "37+13=", "05"),
        ("no_carry", "37+58=", "85"),
        ("no_carry", "55+55=", "00"),
    ],
)
def test_examples(name: str, question: str, expected: str) -> None:
    assert BY_NAME[name].answer(question) == expected == answer(name, question)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), seeds, st.integers(0, 120), st.integers(0, 120), st.sampled_from(["train", "held_out"]))
def test_a_document_of_one_convention(name: str, seed: int, prompt_bytes: int, more: int, split: str) -> None:
    total = prompt_bytes + more
    document = BY_NAME[name].document(np.random.default_rng(seed), prompt_bytes, total, split)
    check_places(document, prompt_bytes, total)
    for question, given_answer in items(document.text):
        assert given_answer == answer(name, question)
        assert held_out(question) == (split == "held_out")
    assert document == BY_NAME[name].document(np.random.default_rng(seed), prompt_bytes, total, split)


def test_seeds_differ() -> None:
    first, second = (BY_NAME["add"].document(np.random.default_rng(seed), 0, 50, "train") for seed in (0, 1))
    assert first != second


def test_an_order_that_is_none() -> None:
    with pytest.raises(UnknownNameError, match="expected an order of alternate, random, switch, got 'swich'"):
        Interleaved("mix", (BY_NAME["reverse"], BY_NAME["add"]), "swich")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True),
    st.sampled_from(["alternate", "random", "switch"]),
    seeds,
    st.integers(0, 200),
    st.integers(1, 200),
)
def test_interleaved_order_and_owners(names: list[str], order: str, seed: int, prompt_bytes: int, more: int) -> None:
    domain = Interleaved("mix", tuple(BY_NAME[name] for name in names), order)
    total = prompt_bytes + more
    document, owners = domain.with_owners(np.random.default_rng(seed), prompt_bytes, total, "train")
    check_places(document, prompt_bytes, total)
    assert document == domain.document(np.random.default_rng(seed), prompt_bytes, total, "train")
    counted, position = np.zeros(len(names)), 0
    sure = True
    for i, (question, given_answer) in enumerate(items(document.text)):
        fits = [
            k
            for k, name in enumerate(names)
            if BY_NAME[name].surface.name == ("words" if question.endswith(">") else "sums")
            and given_answer == answer(name, question)
        ]
        assert fits
        if order == "alternate":
            assert i % len(names) in fits
        if order == "switch":
            assert int(position / total * len(names)) in fits
        size = len(question) + len(given_answer) + 1
        if position < document.prompt_bytes:
            sure &= order != "random" or len(fits) == 1
            which = {"alternate": i % len(names), "switch": int(position / total * len(names))}.get(order, fits[0])
            counted[which] += size
        position += size
    if sure:
        assert np.bincount(owners, minlength=len(names)).tolist() == counted.tolist()
    assert len(owners) == document.prompt_bytes


def test_random_order_draws_each_convention_alike() -> None:
    """4-sigma band for a fair coin over about 800 items: a false alarm in 16,000 seeds."""
    domain = Interleaved("mix", (BY_NAME["reverse"], BY_NAME["add"]), "random")
    lines = items(domain.document(np.random.default_rng(0), 0, 8000, "train").text)
    words = sum(question.endswith(">") for question, _ in lines)
    assert abs(words - len(lines) / 2) < 4 * np.sqrt(len(lines)) / 2


def test_the_split_is_an_eighth_and_never_moves() -> None:
    """The shipped experts were trained on this split; a moved one would leak their training into held-out scores."""
    keys = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)]
    share = np.mean([held_out(key) for key in keys])
    assert abs(share - 1 / 8) < 4 * np.sqrt(7 / 64 / len(keys))
    assert [key for key in keys[:60] if held_out(key)] == ["10+12=", "10+39=", "10+48="]
    assert [name for name in ("argparse.py", "ast.py", "csv.py", "json/decoder.py", "os.py") if held_out(name)] == [
        "ast.py"
    ]


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 300), st.lists(st.floats(0.05, 1), min_size=2, max_size=2))
def test_mixed_text_knows_its_parts(seed: int, total: int, raw: list[float]) -> None:
    weights = [value / sum(raw) for value in raw]
    domains = [BY_NAME["reverse"], BY_NAME["add"]]
    text, owners = mixed_text(domains, weights, np.random.default_rng(seed), total, "held_out")
    assert len(text) == total
    lines = text.splitlines(keepends=True)
    of_words = sum(len(line) for line in lines if line[0].isalpha())
    assert np.bincount(owners, minlength=2).tolist() == [of_words, total - of_words]
    assert all(held_out(question) for question, _ in items("".join(lines[:-1])))
    assert (text, owners.tolist()) == (
        (again := mixed_text(domains, weights, np.random.default_rng(seed), total, "held_out"))[0],
        again[1].tolist(),
    )


@pytest.mark.parametrize("wanted", [0.0, 0.2, 0.5, 0.9])
def test_mixed_text_comes_near_the_wanted_shares(wanted: float) -> None:
    domains = [BY_NAME["sort"], BY_NAME["no_carry"]]
    got = [
        (mixed_text(domains, [wanted, 1 - wanted], np.random.default_rng(seed), 600, "train")[1] == 0).mean()
        for seed in range(5)
    ]
    np.testing.assert_allclose(got, wanted, atol=0.06)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 100))
def test_rows_of_the_base_corpus(seed: int, length: int) -> None:
    """Exactly as long as asked; answers weigh 1, all else ``question_weight``; conventions are drawn item by item."""
    corpus = BaseCorpus(code=0.0, prose=0.0, question_weight=0.25)
    data, weights = corpus.row(np.random.default_rng(seed), length)
    assert len(data) == len(weights) == length
    text, position = data.decode(), 0
    for line in text.splitlines(keepends=True):
        question = re.match(r"[^>=]*[>=]?", line).group()  # type: ignore[union-attr]
        end = len(line.rstrip("\n"))
        expected = [0.25] * len(question) + [1.0] * (end - len(question)) + [0.25] * (len(line) - end)
        assert weights[position : position + len(line)] == expected
        position += len(line)
    for question, given_answer in items(text[: text.rfind("\n") + 1]):
        fitting = NAMES[:3] if question.endswith(">") else NAMES[3:]
        assert given_answer in [answer(name, question) for name in fitting]


def test_the_base_corpus_hedges() -> None:
    """Within one document, the same surface is answered by different rules."""
    document = BaseCorpus(words=0.0, questions=0.0, code=0.0, prose=0.0).row(np.random.default_rng(0), 400)[0].decode()
    used = {
        name
        for question, given_answer in items(document[: document.rfind("\n") + 1])
        for name in NAMES[3:]
        if given_answer == answer(name, question) and len({answer(n, question) for n in NAMES[3:]}) == 3
    }
    assert used == set(NAMES[3:])
