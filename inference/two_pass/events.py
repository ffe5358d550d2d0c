"""What generation tells whoever listens: records of the standard library's ``logging``, with their facts as a mapping.

A record has ``event``, the kind of what happened, and ``facts``, a mapping of JSON values. Nothing is computed for it
unless somebody listens, and nothing is printed.
"""

import json
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["JsonLines", "of_error", "tell"]


def tell(logger: logging.Logger, level: int, event: str, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Log an event; ``facts`` is called where the level is listened to."""
    if logger.isEnabledFor(level):
        found = dict(facts())
        logger.log(level, "%s %s", event, json.dumps(found, allow_nan=False), extra={"event": event, "facts": found})


def of_error(error: BaseException) -> dict[str, Any]:
    """Its class and where it was raised, without its message, which may have words of a prompt."""
    places = [f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_tb(error.__traceback__)]
    return {"class": type(error).__name__, "places": places}


class JsonLines(logging.Formatter):
    """Each record as one line of JSON: time in seconds since 1970, level, logger, event, the facts, and of an exception
    its class and places."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 6), "level": record.levelname.lower(), "logger": record.name}
        facts = getattr(record, "facts", {"message": record.getMessage()})
        if record.exc_info and record.exc_info[1] is not None:
            facts |= of_error(record.exc_info[1])
        return json.dumps(line | {"event": getattr(record, "event", "message")} | dict(facts), allow_nan=False)
