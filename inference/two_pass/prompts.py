"""Checks on prompts, where they enter."""

from collections.abc import Sequence

from bayes_dispatch.errors import ConfigError, PromptError
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["MAX_PROMPT_BYTES", "check_ending", "check_prompts", "check_turn"]

MAX_PROMPT_BYTES = 4096
MAX_NEW_TOKENS = 65_536  # memory is set aside for them


def check_prompts(prompts: Sequence[str | bytes]) -> list[bytes]:
    """The prompts' bytes.

    Raises:
        PromptError: no prompts, or one that is empty, longer than ``MAX_PROMPT_BYTES``, or no UTF-8.
    """
    if isinstance(prompts, str | bytes):
        raise PromptError(f"expected a list of prompts, got a single {type(prompts).__name__}")
    if not prompts:
        raise PromptError("expected at least one prompt, got none")
    checked = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | bytes):
            raise PromptError(f"expected prompt {index} to be text, got {type(prompt).__name__}")
        try:
            data = utf8(prompt)
        except PromptError as error:
            raise PromptError(f"prompt {index}: {error}") from None
        if not 1 <= len(data) <= MAX_PROMPT_BYTES:
            raise PromptError(f"expected prompt {index} to have 1 to {MAX_PROMPT_BYTES} bytes, got {len(data)}")
        checked.append(data)
    return checked


def check_turn(text: str | bytes, most: int) -> bytes:
    """The bytes of a user's turn.

    Raises:
        PromptError: it is empty, longer than ``most``, or no UTF-8.
    """
    if not isinstance(text, str | bytes):
        raise PromptError(f"expected a turn to be text, got {type(text).__name__}")
    data = utf8(text)
    if not 1 <= len(data) <= most:
        raise PromptError(f"expected a turn of 1 to {most} bytes, which leaves room for the reply, got {len(data)}")
    return data


def check_ending(max_new_tokens: int, stop: str | bytes | None) -> bytes | None:
    """The bytes that end a text.

    Raises:
        ConfigError: no room for a token, or too much, or a stop without bytes.
    """
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise ConfigError(f"expected max_new_tokens of at least 1 and at most {MAX_NEW_TOKENS}, got {max_new_tokens}")
    if stop is not None and not stop:
        raise ConfigError("expected stop to have at least one byte, got none")
    return None if stop is None else utf8(stop)
