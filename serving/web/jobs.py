"""From what a client sent to what an engine is asked: one piece of work for each choice."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bayes_dispatch.arguments import MOST, in_order, shown, whole
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.chat.form import Form
from bayes_dispatch.inference.two_pass.blends import Blend, FixedWeights, as_blend
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.inference.two_pass.system import System, check_gate
from bayes_dispatch.serving.web.fields import Asked, ChatAsked, CompletionAsked, DispatchAsked, MessageAsked
from bayes_dispatch.serving.web.refusals import RefusedError, naming
from bayes_dispatch.serving.web.settings import WebSettings
from bayes_dispatch.serving.work import Message, Work

__all__ = ["BUNDLE", "Job", "Jobs"]

BUNDLE = "bundle"  # the model that blends its experts; bundle:NAME is one of its components
COMPLETION_TOKENS = 16  # of a completion that asks for no number, as OpenAI's
SEEDS = 2**31  # that are drawn where none was given: every client's numbers hold them
ROLES = {"developer": "system"}  # what OpenAI calls the same

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Job:
    """What is asked of an engine for one request.

    Attributes:
        model: its id, as it was asked for. works: one for each choice: prompt by prompt, and ``n`` for each.
        prompts: how many. stream, usage, logprobs: what the answer has.
        prompt_param, blend_param: fields that are at fault where the engine refuses a prompt, or else a setting.
    """

    model: str
    works: tuple[Work, ...]
    prompts: int
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    prompt_param: str | None = None
    blend_param: str | None = None


@dataclass(frozen=True)
class Jobs:
    """What requests mean to a system.

    Attributes:
        system: whose experts are named. settings: what requests may ask for.
        reply_stop: with which a reply ends unless told otherwise; ``None`` where a token does.
    """

    system: System
    settings: WebSettings
    reply_stop: str | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reply_stop", Form.of(self.system.tokenizer).stop)

    @property
    def models(self) -> tuple[str, ...]:
        """The ids of all models: the blend, then each component alone."""
        return (BUNDLE, *(f"{BUNDLE}:{name}" for name in self._components))

    @property
    def _components(self) -> tuple[str, ...]:
        return self.system.experts.components

    def of_completion(self, asked: CompletionAsked, owner: str) -> Job:
        """Of texts to go on with.

        Raises:
            RefusedError: 400, naming the field; 404 for a model that there is not.
        """
        some = min(COMPLETION_TOKENS, self.settings.max_new_tokens)
        most = some if asked.max_tokens is None else asked.max_tokens
        return self._written(asked, tuple(asked.prompt), "prompt", "max_tokens", most, asked.stop, owner)

    def of_chat(self, asked: ChatAsked, owner: str) -> Job:
        """Of a conversation to reply to. A model without a chat template ends its reply with a line, as in ``chat``.

        Raises:
            RefusedError: as :meth:`of_completion`.
        """
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            message = "expected max_tokens or max_completion_tokens, which means the same, got both"
            raise RefusedError(400, message, param="max_tokens")
        given, param = asked.max_completion_tokens, "max_completion_tokens"
        if given is None:
            given, param = asked.max_tokens, "max_tokens"
        most = self.settings.max_new_tokens if given is None else given
        stops = asked.stop or ([] if self.reply_stop is None else [self.reply_stop])
        job = self._written(asked, (_messages(asked.messages, "messages"),), "messages", param, most, stops, owner)
        return (
            job if given is not None else replace(job, works=tuple(replace(each, shorter=True) for each in job.works))
        )

    def of_dispatch(self, asked: DispatchAsked, owner: str) -> Job:
        """Of a text to dispatch.

        Raises:
            RefusedError: as :meth:`of_completion`.
        """
        if asked.model != BUNDLE:
            self._fixed(asked.model)
            raise RefusedError(400, f"expected the model {BUNDLE!r} to dispatch, got {asked.model!r}", param="model")
        prompt = asked.input if isinstance(asked.input, str) else _messages(asked.input, "input")
        self._check_prompts((prompt,), "input")
        self._check_rate(asked.false_alarm_rate)
        work = Work(prompt, self.settings.blend, None, _seed(asked.seed, 1), asked.false_alarm_rate, owner=owner)
        return Job(asked.model, (replace(work, patience=self.settings.patience),), 1, prompt_param="input")

    def _written(
        self,
        asked: CompletionAsked | ChatAsked,
        prompts: tuple[Prompt, ...],
        param: str,
        most_param: str,
        most: int,
        stops: Sequence[str],
        owner: str,
    ) -> Job:
        blend, each = self._blend(asked), asked.n or 1
        self._check_prompts(prompts, param)
        if len(prompts) * each > self.settings.choices:
            message = f"expected at most {self.settings.choices} choices, got {len(prompts)} prompts of {each}"
            raise RefusedError(400, message, param="n")
        if asked.stream_options is not None and not asked.stream:
            raise RefusedError(400, "expected stream_options with stream, got it without", param="stream_options")
        if asked.abstain and asked.false_alarm_rate is None:
            raise RefusedError(400, "expected abstain with a false_alarm_rate, got it without", param="abstain")
        self._check_rate(asked.false_alarm_rate)
        with naming(most_param):
            whole(most_param, most, 1, self.settings.max_new_tokens)
        if (tokens := len(prompts) * each * most) > self.settings.tokens:  # an idle server had no room for them either
            message = f"expected at most {self.settings.tokens} tokens of all choices, got {tokens}"
            raise RefusedError(400, message, param=most_param)
        heat = 1.0 if asked.temperature is None else asked.temperature
        with naming("stop"):
            writing = Writing.of(most, heat > 0, heat or 1.0, stops, None if asked.top_p == 1 else asked.top_p)
        seed = _seed(asked.seed, len(prompts) * each)  # copies of a prompt go on with it
        works = tuple(
            Work(
                prompt,
                blend,
                writing,
                seed + i,
                asked.false_alarm_rate,
                bool(asked.abstain),
                owner,
                self.settings.patience,
            )
            for n, prompt in enumerate(prompts)
            for i in range(prompts[:n].count(prompt) * each, (prompts[:n].count(prompt) + 1) * each)
        )
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        told = bool(asked.logprobs) if isinstance(asked, ChatAsked) else asked.logprobs is not None
        given = next((name for name in ("draws", "blend", "weights") if getattr(asked, name) is not None), None)
        return Job(asked.model, works, len(prompts), bool(asked.stream), usage, told, param, given)

    def _check_prompts(self, prompts: tuple[Prompt, ...], param: str) -> None:
        texts = [
            text for each in prompts for text in ([each] if isinstance(each, str) else [turn.content for turn in each])
        ]
        size = sum(len(text.encode()) for text in texts)
        if size > self.settings.prompt_bytes:
            message = f"expected at most {self.settings.prompt_bytes} bytes of prompts, got {size}"
            raise RefusedError(400, message, param=param, code="context_length_exceeded")

    def _check_rate(self, rate: float | None) -> None:
        if rate is not None:
            with naming("false_alarm_rate"):
                check_gate(self.system, rate)

    def _fixed(self, model: str) -> FixedWeights:
        """All weight on the component that a model's id names.

        Raises:
            RefusedError: 404.
        """
        if model not in self.models:
            message = f"expected a model of {', '.join(self.models)}, got {model!r:.80}"
            raise RefusedError(404, message, param="model", code="model_not_found")
        return FixedWeights.vertex(self._components, model.removeprefix(f"{BUNDLE}:"))

    def _blend(self, asked: Asked) -> Blend:
        """From the model, or from one of our fields; what contradicts is refused."""
        given = [name for name in ("blend", "draws", "weights") if getattr(asked, name) is not None]
        if asked.model != BUNDLE:
            fixed = self._fixed(asked.model)
            if given:
                message = f"expected {given[0]} with the model {BUNDLE!r}, got it with {asked.model!r}, which has none"
                raise RefusedError(400, message, param=given[0])
            return fixed
        if asked.weights is not None:
            if len(given) > 1:
                raise RefusedError(400, f"expected weights alone, got them with {given[0]}", param=given[0])
            with naming("weights"):
                try:
                    return FixedWeights(self._weights(asked.weights))
                except OverflowError:
                    raise ConfigError("expected weights from 0 to 1, got one that is no such number") from None
        blend = self.settings.blend
        if asked.blend is not None:
            with naming("blend"):
                blend = as_blend(asked.blend, self._components)
        if asked.draws is not None:
            with naming("draws"):
                blend = _with_draws(blend, asked.draws)
        return blend

    def _weights(self, given: Any) -> tuple[float, ...]:
        """In the order of the components; who is not named has none."""
        found = given if isinstance(given, list) else in_order("weights", given, self._components)
        if len(found) != len(self._components):
            raise ConfigError(f"expected {len(self._components)} weights, got {len(found)}")
        return tuple(map(float, found))


def _with_draws(blend: Blend, draws: int) -> Blend:
    settings: Any = blend  # a dataclass
    if "draws" not in {each.name for each in fields(settings)} or settings.draws is not None:
        raise ConfigError(f"expected draws with a blend that takes them and says none, got it with {blend.name}")
    return replace(settings, draws=draws)


def _messages(turns: Sequence[MessageAsked], param: str) -> tuple[Message, ...]:
    roles = [ROLES.get(turn.role, turn.role) for turn in turns]
    said = roles[1:] if roles[0] == "system" else roles
    if len(said) % 2 == 0 or said != (["user", "assistant"] * len(said))[: len(said)]:
        wanted = "messages of user and assistant in turn, the user's first and last, after at most one of the system"
        raise RefusedError(400, f"expected {wanted}, got {shown(roles)}", param=param)
    return tuple(Message(role, turn.content) for role, turn in zip(roles, turns, strict=True))


def _seed(given: int | None, choices: int) -> int:
    """The first of so many seeds in a row."""
    if given is None:
        return secrets.randbelow(SEEDS)
    with naming("seed"):
        return whole("seed", given, 0, MOST - choices)  # generators of sampling go one further
