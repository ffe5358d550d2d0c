"""What clients may send: every field of OpenAI's that there is, and ours.

A field is understood, or it must be at the value that means "off" (``Off``), or it is refused by its name. ``null`` is
as if the field were absent.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from bayes_dispatch.arguments import shown
from bayes_dispatch.serving.web.refusals import of_fields

__all__ = [
    "Asked",
    "ChatAsked",
    "CompletionAsked",
    "DispatchAsked",
    "FeedbackAsked",
    "MessageAsked",
    "StreamOptions",
    "read_fields",
]


class _Off:
    """Nothing, or one of the values that ask for nothing."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __call__(self, value: Any, info: Any) -> Any:
        same = (value == each and isinstance(value, bool) == isinstance(each, bool) for each in self._values)
        if value is None or any(same):
            return None
        allowed = " or ".join(json.dumps(each) for each in (None, *self._values))
        raise ValueError(
            f"expected {info.field_name} to be {allowed}: this server has no such thing, got {shown(value)}"
        )


def _texts(value: Any, info: Any) -> list[str]:
    """A text, or several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected {info.field_name} to be a text or a list of texts, got {shown(value)}")
    return texts


def _stops(value: Any, info: Any) -> list[str]:
    """None, one, or up to four."""
    stops = [] if value is None or value == [] else _texts(value, info)
    if len(stops) > 4 or not all(stops):
        raise ValueError(f"expected stop to be up to 4 texts that are not empty, got {shown(value)}")
    return stops


def _content(value: Any) -> str:
    """A text, or its parts."""
    if isinstance(value, str):
        return value
    parts: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in parts):
        raise ValueError(
            f'expected content to be a text, or a list of {{"type": "text", "text": …}}, got {shown(value)}'
        )
    if not all(part["type"] == "text" and isinstance(part["text"], str) for part in parts):
        raise ValueError(f"expected content of texts alone, got {shown(value)}")
    return "".join(part["text"] for part in parts)


def _weights(value: Any) -> Any:
    """By name or in order."""
    numbers = list(value.values()) if isinstance(value, dict) else value
    if value is not None and not (
        isinstance(numbers, list) and all(isinstance(w, int | float) and not isinstance(w, bool) for w in numbers)
    ):
        raise ValueError(f"expected weights to be a number for each expert, by name or in order, got {shown(value)}")
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Kind = TypeVar("Kind", bound=_Fields)


class StreamOptions(_Fields):
    """What a stream has besides."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, AfterValidator(_Off(False))] = None


class MessageAsked(_Fields):
    """A message. What OpenAI's answers have and ours lack may come back at the value that they have in ours."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, AfterValidator(_content)]
    name: Annotated[Any, AfterValidator(_Off())] = None
    refusal: Annotated[Any, AfterValidator(_Off())] = None
    audio: Annotated[Any, AfterValidator(_Off())] = None
    annotations: Annotated[Any, AfterValidator(_Off([]))] = None
    function_call: Annotated[Any, AfterValidator(_Off())] = None
    tool_calls: Annotated[Any, AfterValidator(_Off([]))] = None
    tool_call_id: Annotated[Any, AfterValidator(_Off())] = None


# The first wrong one is enough: of a body of many, all errors would hold up everybody for seconds.
MessagesAsked = Annotated[list[MessageAsked], Field(min_length=1, max_length=4096, fail_fast=True)]


def _input_kind(value: Any) -> str:
    return "(messages)" if isinstance(value, list) else "(text)"


class DispatchAsked(_Fields):
    """Of ``/v1/dispatch``: a text or messages to dispatch, with nothing written."""

    input: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[MessagesAsked, Tag("(messages)")],
        Discriminator(_input_kind),
    ]
    model: str = "bundle"
    seed: int | None = None
    user: str | None = None
    false_alarm_rate: float | None = None


class FeedbackAsked(_Fields):
    """Of ``/v1/feedback``: a label for an answer's prompt, or a reward for one of its choices."""

    id: Annotated[str, Field(max_length=80)]
    choice: Annotated[int, Field(ge=0)] | None = None
    label: Annotated[str, Field(max_length=200)] | None = None
    reward: Annotated[float, Field(ge=0, le=1)] | None = None
    expert: Annotated[str, Field(max_length=200)] | None = None


class Asked(_Fields):
    """What both ways to write have. The last five fields are ours."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Annotated[Any, AfterValidator(_stops)] = []
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Annotated[Any, AfterValidator(_Off(0))] = None
    presence_penalty: Annotated[Any, AfterValidator(_Off(0))] = None
    logit_bias: Annotated[Any, AfterValidator(_Off({}))] = None

    blend: Annotated[str, Field(max_length=120)] | None = None
    draws: int | None = None
    weights: Annotated[Any, AfterValidator(_weights)] = None
    false_alarm_rate: float | None = None
    abstain: bool | None = None


class CompletionAsked(Asked):
    """Of ``/v1/completions``. ``logprobs`` is null or 0: those of the tokens that were chosen."""

    prompt: Annotated[Any, AfterValidator(_texts)]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    best_of: Annotated[Any, AfterValidator(_Off(1))] = None
    echo: Annotated[Any, AfterValidator(_Off(False))] = None
    suffix: Annotated[Any, AfterValidator(_Off())] = None


class ChatAsked(Asked):
    """Of ``/v1/chat/completions``. ``safety_identifier`` is what ``user`` is called now."""

    messages: MessagesAsked
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Any, AfterValidator(_Off(0))] = None
    safety_identifier: str | None = None
    audio: Annotated[Any, AfterValidator(_Off())] = None
    function_call: Annotated[Any, AfterValidator(_Off("none"))] = None
    functions: Annotated[Any, AfterValidator(_Off([]))] = None
    metadata: Annotated[Any, AfterValidator(_Off({}))] = None
    modalities: Annotated[Any, AfterValidator(_Off(["text"]))] = None
    moderation: Annotated[Any, AfterValidator(_Off())] = None
    parallel_tool_calls: Annotated[Any, AfterValidator(_Off())] = None
    prediction: Annotated[Any, AfterValidator(_Off())] = None
    prompt_cache_key: Annotated[Any, AfterValidator(_Off())] = None
    prompt_cache_options: Annotated[Any, AfterValidator(_Off())] = None
    prompt_cache_retention: Annotated[Any, AfterValidator(_Off())] = None
    reasoning_effort: Annotated[Any, AfterValidator(_Off("none"))] = None
    response_format: Annotated[Any, AfterValidator(_Off({"type": "text"}))] = None
    service_tier: Annotated[Any, AfterValidator(_Off("auto", "default"))] = None
    store: Annotated[Any, AfterValidator(_Off(False))] = None
    tool_choice: Annotated[Any, AfterValidator(_Off("none", "auto"))] = None
    tools: Annotated[Any, AfterValidator(_Off([]))] = None
    verbosity: Annotated[Any, AfterValidator(_Off())] = None
    web_search_options: Annotated[Any, AfterValidator(_Off())] = None


def read_fields(kind: type[Kind], body: bytes) -> Kind:
    """The fields of a body.

    Raises:
        RefusedError: 400, naming the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise of_fields(error) from None
