"""The checks of a server fail where it does what it must not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import load
import server_stress


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}".encode()


TEXT = event(choices=[{"text": "ab", "finish_reason": None}], usage=None)
LENGTH, STOP = (event(choices=[{"text": "", "finish_reason": reason}]) for reason in ("length", "stop"))
DONE = b"data: [DONE]"


def usage(count: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": count})


@pytest.mark.parametrize(
    "lines", [[TEXT, LENGTH, usage(3), DONE], [TEXT, b"", STOP, usage(1), DONE], [STOP, usage(3), DONE]]
)
def test_a_whole_stream_is_read(lines: list[bytes]) -> None:
    assert list(load.pieces(lines, 3, True)) == ["ab"] * (TEXT in lines)
    assert list(load.pieces(lines[:-1], 3, False)) == ["ab"] * (TEXT in lines)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "breaks off"),
        ([TEXT, LENGTH, usage(3)], "breaks off"),
        ([TEXT, DONE], "breaks off"),
        ([TEXT, LENGTH, DONE], "breaks off"),
        ([TEXT, LENGTH, usage(2), DONE], "expected 3 tokens before the end length, got 2"),
        ([TEXT, STOP, usage(4), DONE], "expected 3 tokens before the end stop, got 4"),
        ([TEXT, event(error={"message": "gone"})], "gone"),
        ([TEXT, b"data: {"], "Expecting"),
    ],
)
def test_a_stream_that_is_not_whole_counts_as_failed(lines: list[bytes], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        list(load.pieces(lines, 3, True))


@pytest.mark.parametrize(
    ("program", "why"),
    [("import time; time.sleep(60)", "got no answer in 0.1 s of"), ("raise SystemExit(3)", "got exit code 3 of")],
)
def test_a_server_that_never_answers_is_told(program: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sleep" in program:
        monkeypatch.setattr(load, "STARTING", 0.1)
    command = [sys.executable, "-c", program]
    with pytest.raises(SystemExit, match=why), load.serving(command, load.free_port()):
        raise AssertionError("it was taken for a server")


FINE = {"held": {"rows": "0.0"}, "growth": 0.05, "equal to generate": (3, 3), "exit status": 0, "errors logged": 0}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"held": {"rows": "2.0"}}, "expected nothing that is held, got {'rows': '2.0'}"),
        ({"growth": 0.06}, "expected growth of at most 0.05, got 0.06"),
        ({"equal to generate": (2, 3)}, "expected the answers of generate, got 1 others of 3"),
        ({"exit status": -9}, "expected the exit status 0, got -9"),
        ({"errors logged": 1}, "expected no error that is logged, got 1"),
    ],
)
def test_each_fault_of_a_stressed_server_is_an_error(wrong: dict[str, Any], why: str) -> None:
    assert server_stress.faults(FINE) == []
    assert server_stress.faults(FINE | wrong) == [why]
