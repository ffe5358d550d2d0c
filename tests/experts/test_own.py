"""Domains from a user's files: no text is in both splits, rewards are agreement, documents are as in the file.
Whatever is wrong with a file is said in a line."""

import json
import re
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from bayes_dispatch.errors import ConfigError, RewardError
from bayes_dispatch.experts.domains import Checked
from bayes_dispatch.experts.domains.own import Own, OwnExamples, OwnPairs, OwnPrompts, OwnText, Rewarded
from bayes_dispatch.experts.domains.own_files import read_jsonl, read_prompts, read_text
from bayes_dispatch.experts.questions import ask

LINES = "".join(f"line {number} of the text, grün\n" for number in range(100))
PAIRS = tuple((f"{number}ü?", f"<{number}>") for number in range(30))


def written(directory: Path, content: str | bytes) -> Path:
    path = directory / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*entries: object) -> str:
    return "\n".join(map(json.dumps, entries)) + "\n"


class TestText:
    def test_passages_begin_at_lines_and_keep_to_their_split(self) -> None:
        domain = OwnText("mine", LINES)
        assert isinstance(domain, Checked)
        seen = {"train": "", "held_out": ""}
        for seed in range(60):
            for split in ("train", "held_out"):
                document = domain.document(np.random.default_rng(seed), 20, 90, split)  # type: ignore[arg-type]
                assert document.text.startswith("line ") or split == "held_out"  # the cut may divide a line
                assert document.text in LINES
                assert (len(document.text), document.prompt_bytes) == (90, 20)
                seen[split] += document.text
        assert "line 0 of" in seen["train"]
        assert "line 9 of" not in seen["held_out"]
        assert "line 95 of" in seen["held_out"]
        assert "line 95 of" not in seen["train"]

    def test_a_text_of_one_line_is_read_everywhere(self) -> None:
        domain = OwnText("mine", "".join(f"{number} " for number in range(1000)))
        texts = {domain.document(np.random.default_rng(seed), 0, 50, "train").text for seed in range(20)}
        assert len(texts) == 20

    def test_answers_are_rewarded_by_agreement(self) -> None:
        assert OwnText("mine", LINES).reward("", "grün", "grau") == 0.4  # of 5 bytes

    def test_as_it_is_in_the_file(self, tmp_path: Path) -> None:
        path = written(tmp_path, b"\xef\xbb\xbf" + LINES.encode())
        assert read_text("mine", path).text == LINES


class TestPairs:
    def test_documents(self) -> None:
        domain = OwnPairs("mine", PAIRS)
        train = domain.document(np.random.default_rng(0), 40, 100, "train")
        items = train.text.splitlines()
        assert all(tuple(item.split("?")) in {(p.rstrip("?"), a) for p, a in PAIRS[:27]} for item in items)
        assert train.data[:40] in train.data[: train.prompt_bytes]
        assert train.prompt.endswith("\n")
        answers = [train.data[start:stop].decode() for start, stop in train.ranges]
        assert answers == [item.split("?")[1] for item in items[-len(answers) :]]
        held_out = domain.document(np.random.default_rng(0), 0, 300, "held_out").text.splitlines()
        assert set(held_out) <= {p + a for p, a in PAIRS[27:]}

    def test_questions_are_prompts(self) -> None:
        domain = OwnPairs("mine", PAIRS)
        for seed in range(10):
            rng = np.random.default_rng(seed)
            question = ask(domain.document(rng, 0, 100, "train").cut(100), rng, 16)
            assert (question.text, question.expected) in PAIRS
            assert domain.reward(question.text, question.expected, question.expected) == 1
            assert domain.reward(question.text, question.expected, "<") == 0

    def test_of_a_file(self, tmp_path: Path) -> None:
        path = written(tmp_path, jsonl(*({"prompt": p, "answer": a} for p, a in PAIRS)) + "\n")
        assert read_jsonl("mine", path, 100) == OwnPairs("mine", PAIRS)


class TestPrompts:
    def test_one_is_asked_and_nothing_is_expected(self) -> None:
        domain = OwnPrompts("mine", tuple(p for p, _ in PAIRS))
        rng = np.random.default_rng(0)
        question = ask(domain.document(rng, 0, 64, "train").cut(64), rng, 8)
        assert question.text in domain.prompts[:27]
        assert question.context == question.text.encode()
        assert (question.expected, question.is_line, question.limit) == ("", True, 9)

    def test_of_files(self, tmp_path: Path) -> None:
        expected = OwnPrompts("mine", tuple(p for p, _ in PAIRS))
        assert read_prompts("mine", written(tmp_path, "\n\n".join(expected.prompts)), 100) == expected
        assert read_jsonl("mine", written(tmp_path, jsonl(*({"prompt": p} for p in expected.prompts))), 100) == expected

    def test_it_needs_a_function(self) -> None:
        domain = OwnPrompts("mine", tuple(p for p, _ in PAIRS))
        with pytest.raises(RewardError, match=r"expected a reward function for mine, .* got none"):
            domain.reward("1?", "", "a")
        assert Rewarded(domain, lambda prompt, answer: len(prompt) + len(answer)).reward("1?", "", "abc") == 5


@pytest.mark.parametrize(
    "domain",
    [
        OwnText("mine", "".join(f"<{n}> {'ü' * (n % 40)}\n" for n in range(400))),
        OwnText("mine", "".join(f"<{n}>" for n in range(20_000))),
        OwnPairs("mine", tuple((f"<{n}>", "ü" * (1 + n % 9)) for n in range(400))),
        OwnPrompts("mine", tuple(f"<{n}>{'ü' * n}" for n in range(300))),
        OwnExamples("mine", tuple(f"<{n}>{'ü' * n}" for n in range(300))),
    ],
    ids=["text", "one line", "pairs", "prompts", "examples"],
)
def test_no_part_of_a_file_is_in_two_texts(domain: Own) -> None:
    """All texts but the last are as long as asked, or a whole prompt or example."""
    texts = list(domain.once(repeat(61), "held_out"))
    assert len(texts) > 5
    assert max(len(text.encode()) for text in texts) in (60, 61)
    told = [name for text in texts for name in re.findall(r"<\d+>", text)]
    assert len(told) == len(set(told)) >= len(texts)
    assert not {*told} & {*re.findall(r"<\d+>", "".join(domain.once(repeat(61), "train")))}
    if isinstance(domain, OwnText | OwnPairs):
        assert {len(text.encode()) for text in texts[:-1]} <= {60, 61}


def test_a_short_file_is_one_text() -> None:
    assert list(OwnText("mine", LINES).once(repeat(10_000), "held_out")) == [LINES[-len(LINES) // 10 :]]


class TestRewarded:
    def test_documents_are_the_domains(self) -> None:
        domain = OwnPairs("mine", PAIRS)
        rewarded = Rewarded(domain, lambda prompt, answer: 1)
        ours, theirs = (each.document(np.random.default_rng(0), 0, 60, "train") for each in (rewarded, domain))
        assert (rewarded.name, ours) == ("mine", theirs)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "much"])
    def test_no_number(self, value: object) -> None:
        rewarded = Rewarded(OwnPairs("mine", PAIRS), lambda prompt, answer: value)  # type: ignore[arg-type, return-value]
        with pytest.raises(RewardError, match=r"expected a (finite )?number from the reward function for '1\?', got "):
            rewarded.reward("1?", "", "a")

    def test_a_failure(self) -> None:
        def failing(prompt: str, answer: str) -> float:
            raise KeyError(prompt)

        with pytest.raises(RewardError, match=r"expected a number .* got KeyError: '1'"):
            Rewarded(OwnPairs("mine", PAIRS), failing).reward("1", "", "a")


GOOD = jsonl(*({"prompt": p, "answer": a} for p, a in PAIRS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected text in .*file, got 0 bytes without any"),
        (b" \n\n", "expected text in .*file, got 3 bytes without any"),
        (GOOD.encode() + b"\xff", "file: expected UTF-8 text, got byte 0xff at position"),
        (GOOD + "{", "expected JSON in line 31 of .*file, got: "),
        (GOOD + "[1]", 'expected an object with a text "prompt" in line 31 of .*file, got '),
        (GOOD + '{"answer": "a"}', 'expected an object with a text "prompt" in line 31'),
        (GOOD + '{"prompt": ""}', 'expected an object with a text "prompt" in line 31'),
        (GOOD + '{"prompt": 3, "answer": "a"}', 'expected an object with a text "prompt" in line 31'),
        (GOOD + '{"prompt": "a", "answr": "b"}', "expected the keys answer, prompt in line 31 of .*file, got 'answr'"),
        (GOOD + '{"prompt": "a"}', "expected an answer, as lines before in line 31 of .*file, got the keys of"),
        (jsonl({"prompt": "a"}) + GOOD, "expected no answer, as lines before in line 2 of"),
        (GOOD + '{"prompt": "a", "answer": ""}', "expected an \"answer\" that is one line.* in line 31 .* got ''"),
        (GOOD + '{"prompt": "a", "answer": "b\\nc"}', 'expected an "answer" that is one line.* in line 31'),
        (GOOD + '{"prompt": "a", "answer": 5}', 'expected an "answer" that is one line.* in line 31 .* got 5'),
        (GOOD + jsonl({"prompt": "a" * 90, "answer": "b" * 11}), "expected at most 100 bytes in line 31 .* got 101"),
        (GOOD + '{"prompt": "a\\ud800", "answer": "b"}', "line 31 of .*file: expected UTF-8 text, got the lone"),
        (jsonl({"prompt": "a", "answer": "b"}), "expected at least 10 pairs for mine, got 1"),
        (jsonl({"prompt": "a"}), "expected at least 10 prompts for mine, got 1"),
        ("[" * 100_000, "expected JSON in line 1 of"),
    ],
)
def test_bad_pairs(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_jsonl("mine", written(tmp_path, content), 100)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("unchecked")
def test_texts_that_no_file_holds() -> None:
    half, empty = (
        r"^mine: expected UTF-8 text, got the lone surrogate",
        "^expected texts of mine that are not empty, got ",
    )
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: OwnText("mine", LINES + "\ud800"), half),
        (lambda: OwnPairs("mine", (*PAIRS, ("a", "\ud800"))), half),
        (lambda: OwnPairs("mine", (*PAIRS, ("", "a"))), empty + "''"),
        (lambda: OwnPairs("mine", (*PAIRS, ("a", "b\nc"))), "^expected answers of mine of one line each, got "),
        (lambda: OwnPrompts("mine", ("a",) * 9 + ("\ud800",)), half),
        (lambda: OwnPrompts("mine", ("a",) * 9 + ("",)), empty + "''"),
        (lambda: OwnExamples("mine", ("a", "b", "\ud800")), half),
        (lambda: OwnExamples("mine", ("a", "b", "")), empty + "''"),
        (lambda: OwnExamples("mine", ("a", 3)), empty + "3"),  # type: ignore[arg-type]
    ]
    for make, message in wrong:
        with pytest.raises(ConfigError, match=message):
            make()


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a readable file .*nowhere, got: No such file"):
        read_text("mine", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"expected a readable file .*, got: Is a directory"):
        read_text("mine", tmp_path)
    with pytest.raises(ConfigError, match="expected a text of at least 1000 bytes for mine, got 999"):
        read_text("mine", written(tmp_path, "a" * 999))
    with pytest.raises(ConfigError, match=r"expected at most 5 bytes in line 2 of .*file, got 6"):
        read_prompts("mine", written(tmp_path, "abc\nabcdef\n"), 5)
