"""Checks on prompts, where they enter."""

from collections.abc import Sequence

from bayes_dispatch.errors import PromptError
from bayes_dispatch.model.tokenizer import utf8

__all__ = ["MAX_PROMPT_BYTES", "check_prompts"]

MAX_PROMPT_BYTES = 4096


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
