"""``bayes-dispatch chat``: replies to lines, a state that goes on, and one line with exit code 2 on bad input."""

import gc
import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.commands import main as cli
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import PosteriorPredictive

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Talk:
    """Exit code, stdout and stderr of a chat that is told some bytes."""
    monkeypatch.chdir(tmp_path)

    def run(told: bytes, *arguments: str, terminal: bool = False) -> tuple[int, str, str]:
        stdin = SimpleNamespace(buffer=io.BytesIO(told), isatty=lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stdin)
        draws = () if "--blend" in arguments else ("--draws", "6")
        with pytest.raises(SystemExit) as exit_:
            cli.main(["chat", "--bundle", str(saved), *draws, "--max-new-tokens", "5", *arguments])
        return (int(exit_.value.code or 0), *capfd.readouterr())

    return run


def test_a_chat_as_json(talk: Talk, bundle: Bundle) -> None:
    """It says what Python does; a line without its newline is a turn, and an empty one is none."""
    code, out, err = talk(b"ab>ba\\nbc>\n\n\r\n1+2=", "--json", "--escapes", "--seed", "3")
    assert (code, err) == (0, "")
    chat = TwoPassGenerator(bundle).chat(blend=PosteriorPredictive(6), seed=3)
    documents = [json.loads(line) for line in out.splitlines()]
    assert [document["user"] for document in documents] == ["ab>ba\nbc>", "1+2="]
    for n, document in enumerate(documents):
        turn = chat.say(document["user"], 5)
        assert (document["turn"], document["text"], document["adapted"]) == (n + 1, turn.text, turn.adapted)
        assert document["experts"] == ["reverse", "sort", "add", "base"]
        np.testing.assert_allclose(document["weights"], turn.weights, atol=1e-6)
        np.testing.assert_allclose(document["log_probabilities"], turn.log_probabilities, atol=1e-5)
    assert documents[0]["divergence"] is None
    assert documents[1]["divergence"] == pytest.approx(turn.divergence, abs=1e-6)


@pytest.mark.parametrize("name", ["base", "sort"])
def test_a_chat_under_one_expert_or_base(talk: Talk, bundle: Bundle, name: str) -> None:
    asked = ("--json", "--blend", name, "--state", "chat")
    for _ in range(2):  # begun, and gone on with
        code, out, err = talk(b"ab>ba\n", *asked)
        assert (code, err) == (0, "")
        assert json.loads(out)["weights"] == [float(each == name) for each in bundle.experts.components]


def test_a_state_goes_on(talk: Talk) -> None:
    """Stopped after a line and started again, with the settings it began with; others are refused."""
    lines = [b"ab>ba\n", b"bc>\n", b"1+2=\n"]
    whole = talk(b"".join(lines), "--json", "--sample", "--seed", "2")[1].splitlines()
    given = ("--json", "--sample", "--state", "state/chat")
    parts = [talk(lines[0], *given, "--seed", "2"), talk(lines[1], *given, "--seed", "2"), talk(lines[2], *given)]
    for part, expected in zip(parts, map(json.loads, whole), strict=True):
        found = json.loads(part[1])
        assert (found["turn"], found["text"]) == (expected["turn"], expected["text"])
        np.testing.assert_allclose(found["weights"], expected["weights"], atol=1e-4)
    code, out, err = talk(b"ab>\n", *given, "--seed", "9")
    assert (code, out) == (2, "")
    assert "expected --seed 2, with which the chat in state/chat began, got 9" in err
    assert talk(b"", *given, "--blend", "posterior_predictive")[0] == 0  # with the draws that it began with
    for other, message in (
        (("--draws", "9"), "expected --draws 6, with which the chat in state/chat began, got 9"),
        (("--blend", "refined_mean"), "expected --blend posterior_predictive, with which"),
        (("--blend", "posterior_predictive(7)"), "expected --blend posterior_predictive(6), with which"),
    ):
        code, out, err = talk(b"ab>\n", *given, *other)
        assert (code, out) == (2, "")
        assert message in err
    talk(lines[0], "--blend", "posterior_predictive", "--state", "state/default")
    err = talk(b"", "--draws", "9", "--state", "state/default")[2]
    assert "expected no --draws, with which the chat in state/default began, got 9" in err


def test_settings_that_are_refused_begin_no_state(talk: Talk, tmp_path: Path) -> None:
    code, _, err = talk(b"ab>\n", "--state", "talk", "--max-context", "5")
    assert (code, "expected max_new_tokens of less than max_context" in err) == (2, True)
    assert not (tmp_path / "talk").exists()
    assert talk(b"ab>\n", "--state", "talk")[0] == 0


def test_a_reply_that_nobody_hears_is_not_said(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads what is printed goes away amid it."""
    given = ("--blend", "posterior_mean", "--stop", "zzz", "--state", "talk")
    assert talk(b"ab>\n", *given)[0] == 0
    before = (tmp_path / "talk").read_bytes()
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert talk(b"bc>\n", *given)[0] == 1
    gc.collect()  # which closes what is left open
    assert (tmp_path / "talk").read_bytes() == before


def test_a_bad_line_at_a_terminal_is_refused_and_the_chat_goes_on(talk: Talk) -> None:
    given = ("--json", "--seed", "3", "--max-context", "64")
    expected = talk(b"ab>\nbc>\n", *given)[1]
    code, out, err = talk(b"ab>\nab\xff>\n" + b"a" * 60 + b"\nbc>\n", *given, terminal=True)
    assert (code, out) == (0, expected)
    assert err.splitlines() == [
        "> > bayes-dispatch: error: expected UTF-8 text, got byte 0xff at position 2",
        "> bayes-dispatch: error: expected a turn of 1 to 59 tokens, which leaves room for the reply, got 60",
        "> > ",
    ]


def test_what_is_shown(talk: Talk) -> None:
    code, out, err = talk(b"ab>ba\nbc>\n", "--show-experts", "--stop", "zzz")
    assert (code, err) == (0, "")
    assert "first posterior, adapted]" in out
    assert "posterior moved by" in out
    assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.parametrize(
    ("told", "arguments", "message"),
    [
        (b"ab\xff>\n", (), "expected UTF-8 text, got byte 0xff at position 2"),
        (b"a" * 60 + b"\n", ("--max-context", "64"), "expected a turn of 1 to 59 tokens"),
        (b"", ("--stop", ""), "expected stop to be a text of at least one byte"),
        (b"", ("--threshold", "-1"), "expected threshold to be a finite number ≥ 0, got -1.0"),
        (b"", ("--max-context", "5"), "expected max_new_tokens of less than max_context, 5 tokens, got 5"),
        (b"", ("--blend", "none"), "expected a blend of best_expert"),
        (b"", ("--sample", "--temperature", "0"), "expected temperature to be a finite number > 0, got 0.0"),
        (b"", ("--state", "."), "expected a readable file ., got: Is a directory"),
        (b"", ("--bundle", "none"), "expected a bundle directory or smollm2, got none"),
    ],
)
def test_bad_input(talk: Talk, told: bytes, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = talk(told, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"bayes-dispatch: error: {message}")
