"""A user's files as domains: texts, pairs, prompts and examples. Nothing of a file is executed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bayes_dispatch.errors import ConfigError, PromptError, UnknownNameError
from bayes_dispatch.experts.document_files import check_keys
from bayes_dispatch.experts.domains.own import OwnPairs, OwnPrompts, OwnText
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["Example", "check_examples", "read_examples", "read_jsonl", "read_prompts", "read_text", "read_utf8"]


class Example(NamedTuple):
    """A line of a file of examples. line: its number, from 1. expert: ``None`` where it names none."""

    line: int
    expert: str | None
    text: str


def read_examples(path: Path) -> list[Example]:
    """The lines ``{"expert": …, "text": …}`` of a file, in their order.

    Raises:
        ConfigError: the file is missing, no UTF-8, empty, or a line is no such object.
    """
    found: list[Example] = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        expected = f'expected {{"expert": …, "text": …}} in line {number} of {path}'
        try:
            entry = json.loads(line)
            utf8(str(entry.get("text"))) if isinstance(entry, dict) else None
        except (ValueError, RecursionError, PromptError):
            raise ConfigError(f"{expected}, got {line[:60]!r}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("expert"), str | None):
            raise ConfigError(f"{expected}, got {line[:60]!r}")
        check_keys(entry, {"expert", "text"}, f"line {number} of {path}")
        text = entry.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{expected}, got a text that is {'empty' if isinstance(text, str) else 'none'}")
        found.append(Example(number, entry.get("expert"), text))
    if not found:
        raise ConfigError(f"expected at least one example in {path}, got none")
    return found


def check_examples(examples: Iterable[Example], names: Sequence[str], path: Path) -> None:
    """Raise ``UnknownNameError`` for a line of the file that is of none of these."""
    for each in examples:
        if each.expert not in (None, *names):
            expected = f"expected a prompt of {', '.join(names)} in line {each.line} of {path}"
            raise UnknownNameError(f"{expected}, got one of {each.expert}")


def read_text(name: str, path: Path) -> OwnText:
    """A text file as a domain.

    Raises:
        ConfigError: it is missing, no UTF-8, or too short.
    """
    return OwnText(name, read_utf8(path))


def read_prompts(name: str, path: Path, longest: int) -> OwnPrompts:
    """A text file as prompts of at most ``longest`` bytes, one on each line that is not empty.

    Raises:
        ConfigError: it is missing, no UTF-8, or has too few, or one too long.
    """
    lines = read_utf8(path).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        _check_length(path, number, line, longest)
    return OwnPrompts(name, tuple(line for line in lines if line.strip()))


def read_jsonl(name: str, path: Path, longest: int) -> OwnPairs | OwnPrompts:
    """A file of ``{"prompt": …, "answer": …}`` on each line as a domain; prompts alone, where no line has an answer.

    Args:
        name: of the domain. path: the file. longest: most bytes of a pair.

    Raises:
        ConfigError: it is missing or no UTF-8; a line is malformed, lacks a key, has another or is too long; there are
            too few.
    """
    prompts: list[str] = []
    answers: list[str] = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        prompt, answer = _pair(path, number, line)
        if (answer is None) != (len(answers) < len(prompts)) and prompts:
            wanted = "an answer, as lines before" if answer is None else "no answer, as lines before"
            raise ConfigError(f"expected {wanted} in line {number} of {path}, got the keys of {line!r:.60}")
        _check_length(path, number, prompt + (answer or ""), longest)
        prompts.append(prompt)
        if answer is not None:
            answers.append(answer)
    if answers:
        return OwnPairs(name, tuple(zip(prompts, answers, strict=True)))
    return OwnPrompts(name, tuple(prompts))


def _pair(path: Path, number: int, line: str) -> tuple[str, str | None]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected JSON in line {number} of {path}, got: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str) or not found["prompt"]:
        raise ConfigError(f'expected an object with a text "prompt" in line {number} of {path}, got {line!r:.60}')
    check_keys(found, {"prompt", "answer"}, f"line {number} of {path}")
    answer = found.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer or "\n" in answer):
        raise ConfigError(
            f'expected an "answer" that is one line of text in line {number} of {path}, got {answer!r:.60}'
        )
    for text in (found["prompt"], answer or ""):
        try:
            utf8(text)
        except PromptError as error:
            raise ConfigError(f"line {number} of {path}: {error}") from None
    return found["prompt"], answer


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        ConfigError: it is missing, no UTF-8, or empty.
    """
    try:
        data = path.read_bytes()
        text = utf8(data).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"expected a readable file {path}, got: {error.strerror}") from None
    except PromptError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not text.strip():
        raise ConfigError(f"expected text in {path}, got {len(data)} bytes without any")
    return text


def _check_length(path: Path, number: int, text: str, longest: int) -> None:
    if (size := len(text.encode())) > longest:
        raise ConfigError(f"expected at most {longest} bytes in line {number} of {path}, got {size}")
