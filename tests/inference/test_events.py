"""Who listens hears what happened, as facts and as lines of JSON; who does not pays nothing. What failed is told as
no generation."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.generator import TwoPassGenerator
from bayes_dispatch.inference.two_pass.blends import PosteriorMean, PosteriorPredictive
from bayes_dispatch.inference.two_pass.events import JsonLines, tell

if TYPE_CHECKING:
    from bayes_dispatch.app.bundle import Bundle

LOGGER = "bayes_dispatch.inference.two_pass.second_pass"


@pytest.mark.usefixtures("unchecked")
def test_events_of_a_generation(bundle: "Bundle", caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    given: dict[str, Any] = {"blend": PosteriorPredictive(6), "max_new_tokens": 3, "seed": 0}
    with caplog.at_level(logging.DEBUG, LOGGER):
        result = TwoPassGenerator(bundle).generate(["ab>ba\n", "1+1=", "ab>ba\n"], **given)
    events = {record.event: record.facts for record in caplog.records}  # type: ignore[attr-defined]
    assert list(events) == ["prefix read", "dispatched", "prompts read", "ended", "generated"]
    assert events["ended"] == {"prompts": [1, 0, 2], "going": 0}
    assert events["prefix read"] == {"prompts": 3, "distinct": 2, "below_block": 0, "cache_bytes": 0}
    assert events["dispatched"]["mean"][0]["reverse"] == pytest.approx(result.posterior.mean[1, 0], abs=1e-4)
    assert events["prompts read"]["rows"] <= events["prompts read"]["of"] == 18
    assert events["generated"]["decode"] == result.cost.decode
    assert events["generated"]["ended"] is True
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert lines[-1]["level"] == "info"
    assert lines[-1]["prompt_tokens"] == 19
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("unchecked")
def test_events_of_a_chat(bundle: "Bundle", caplog: pytest.LogCaptureFixture, capfd: Any, tmp_path: Path) -> None:
    chat = TwoPassGenerator(bundle).chat(blend=PosteriorPredictive(6), file=tmp_path / "chat.json")
    with caplog.at_level(logging.DEBUG, "bayes_dispatch.inference.chat.chat"):
        turns = [chat.say(text, 3, stop=None) for text in ("ab>ba\n", "1+1=2\n")]
    events = [(record.event, record.facts) for record in caplog.records]  # type: ignore[attr-defined]
    assert [event for event, _ in events] == 2 * ["turn dispatched", "turn read", "replied"]
    assert [facts["turn"] for _, facts in events] == [1, 1, 1, 2, 2, 2]
    assert [facts["adapted"] for event, facts in events if event == "turn read"] == [turn.adapted for turn in turns]
    first, second = (facts for event, facts in events if event == "turn dispatched")
    assert first["divergence"] is None
    assert second["divergence"] == pytest.approx(turns[1].divergence, abs=1e-6)
    assert sum(second["mean"].values()) == pytest.approx(1, abs=1e-3)
    assert events[-1][1]["decode"] == turns[1].cost.decode
    assert events[-1][1]["saved"] is True
    assert [json.loads(JsonLines().format(record))["event"] for record in caplog.records][-1] == "replied"
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("unchecked")
def test_what_failed_was_not_generated(bundle: "Bundle", caplog: pytest.LogCaptureFixture) -> None:
    """And a stream that is closed tells what it read: one of two prompts."""
    generator, given = TwoPassGenerator(bundle), {"max_new_tokens": 3, "seed": 0}
    with caplog.at_level(logging.INFO, LOGGER):
        with pytest.raises(ConfigError, match="expected a posterior of at least"):
            generator.generate(["a"], blend=PosteriorPredictive(100), **given)
        assert caplog.records == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bayes_dispatch.inference.two_pass.second_pass.ROWS_AT_ONCE", 1)
            stream = generator.stream(["abc", "ab"], blend=PosteriorMean(), **given)
            next(stream)
            stream.close()
    (record,) = caplog.records
    assert record.facts["ended"] is False  # type: ignore[attr-defined]
    assert (record.facts["prompts"], record.facts["prompt_tokens"]) == (2, 3)  # type: ignore[attr-defined]


def test_a_chat_that_never_adapts_again_tells_json(bundle: "Bundle", caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "bayes_dispatch.inference.chat.chat"):
        TwoPassGenerator(bundle).chat(blend=PosteriorMean(), threshold=float("inf")).say("ab>", 1)
    assert json.loads(JsonLines().format(caplog.records[0]))["threshold"] is None


def test_nothing_is_computed_where_nobody_listens() -> None:
    logger = logging.getLogger("bayes_dispatch.tests")
    logger.setLevel(logging.INFO)
    tell(logger, logging.DEBUG, "never", lambda: pytest.fail("computed"))


def test_other_records_are_lines_too() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "so %s", ("what",), None)
    assert json.loads(JsonLines().format(record))["message"] == "so what"


def test_of_an_exception_class_and_places_are_told() -> None:
    """And not its message, which may have words of a prompt."""
    try:
        raise ValueError("words of a prompt")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    line = JsonLines().format(record)
    told = json.loads(line)
    assert (told["message"], told["class"]) == ("failed", "ValueError")
    assert told["places"][-1].endswith("test_of_an_exception_class_and_places_are_told")
    assert "words" not in line
