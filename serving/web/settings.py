"""What the HTTP layer allows."""

from dataclasses import dataclass

from bayes_dispatch.arguments import real, whole
from bayes_dispatch.inference.two_pass.blends import DEFAULT_BLEND, Blend
from bayes_dispatch.inference.two_pass.prompts import MAX_NEW_TOKENS

__all__ = ["WebSettings"]


@dataclass(frozen=True)
class WebSettings:
    """Bounds of requests, checked before an engine sees them.

    Attributes:
        body_bytes, header_bytes: of a request. prompt_bytes: of all its prompts, or of its messages.
        body_seconds: in which a request's head has to arrive, and then its body; a connection whose client reads
            nothing for so long is cut off, before twice as long has passed.
        max_new_tokens: that a choice may ask for, at most 65,536; a chat that asks for no number gets so many.
        choices: prompts times ``n``. tokens: that these may ask for in all; with their prompts that is no more than a
            key has room for in the line. connections: at once; more are closed as they come.
        patience: seconds after which a request is given up, wherever it is; ``None`` for never.
        drain: seconds that requests have to end in, once the server is told to stop.
        log_prompts: whether prompts are written to the log.
        blend: of requests that name none.

    Raises:
        ConfigError: a bound out of range.
    """

    body_bytes: int = 2**20
    header_bytes: int = 2**14
    prompt_bytes: int = 2**16
    body_seconds: float = 30.0
    max_new_tokens: int = 1024
    choices: int = 32
    tokens: int = 2**19
    connections: int = 1024
    patience: float | None = 300.0
    drain: float = 30.0
    log_prompts: bool = False
    blend: Blend = DEFAULT_BLEND

    def __post_init__(self) -> None:
        for name in ("body_bytes", "header_bytes", "prompt_bytes", "choices", "tokens", "connections"):
            whole(name, getattr(self, name), 1)
        whole("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        real("body_seconds", self.body_seconds, 0, above=True)
        if self.patience is not None:
            real("patience", self.patience, 0, above=True)
        real("drain", self.drain, 0)
