"""A vLLM server, as an engine speaks to it: token by token, in tokens of the model."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import httpx2

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.inference.two_pass.events import tell as log
from bayes_dispatch.inference.two_pass.prompts import Writing
from bayes_dispatch.serving.vllm.format import BANK, FIELD, Probe, gap
from bayes_dispatch.serving.work import BusyError, UpstreamError

__all__ = ["Upstream", "UpstreamToken"]

logger = logging.getLogger(__name__)

CONNECTING = 10.0  # seconds
STARTING = 60.0  # seconds in which each question must be answered before requests are taken
LONGEST_WAIT = 60  # seconds that a client is told to wait, at most
UNMASKED = -100.0  # what is added to the logits of tokens that may not be chosen, the least that vLLM takes


class UpstreamToken(NamedTuple):
    """One token that a server wrote. log_probability: under the blend, at temperature 1."""

    token_id: int
    log_probability: float


class Upstream:
    """One server. All of it runs on one event loop.

    Args:
        url: such as ``http://127.0.0.1:8001``. key: of ``vllm serve --api-key``, if it has one.

    Raises:
        ConfigError: one that is none, or has a name or a password, which would be written where the URL is.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        if "@" in url:
            raise ConfigError("expected a URL of vLLM without a name and password, got one with an @")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.url = url.rstrip("/").removesuffix("/v1")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("expected a key of vLLM's server in ASCII, got another")
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)  # an engine bounds what runs
        try:
            self._client = httpx2.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=httpx2.Timeout(None, connect=CONNECTING),  # a busy server may be silent; patience ends that
                limits=limits,
                trust_env=False,  # a proxy of the environment is not asked for what is beside us
            )
        except httpx2.InvalidURL as error:
            raise ConfigError(f"expected a URL such as http://127.0.0.1:8001, got {url!r:.80}: {error}") from None

    async def close(self) -> None:
        """Hang up."""
        await self._client.aclose()

    async def longest(self) -> int | None:
        """Tokens that the server takes, with those that it writes; ``None`` where it does not tell.

        Raises:
            UpstreamError: it is not there, or silent. ConfigError: it has no bank.
        """
        try:
            async with self._answering():
                answer = await self._client.get("/v1/models")
            answer.raise_for_status()
            models = {each["id"]: each for each in answer.json()["data"]}
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UpstreamError(f"expected a vLLM server at {self.url}, got {type(error).__name__}: {error}") from None
        if BANK not in models:
            names = ", ".join(models)
            raise ConfigError(
                f"expected a vLLM server with the model {BANK} of export-vllm at {self.url}, got {names:.200}"
            )
        told = [each["max_model_len"] for each in models.values() if each.get("max_model_len")]
        return min(told, default=None)

    async def check(self, tokens: Sequence[int], probes: Sequence[Probe]) -> float:
        """By how much it is off the probes: see ``gap``.

        Raises:
            ConfigError: by too much: another model, or other experts. UpstreamError: it fails, or is silent.
        """
        asked = list(dict.fromkeys(tokens))
        found = []
        for probe in probes:
            body = self._body(tokens, probe.weights) | {
                "max_tokens": 1,
                "temperature": 0,
                "logprob_token_ids": asked,
                "return_tokens_as_token_ids": True,
            }
            try:
                async with self._answering():
                    answer = await self._client.post("/v1/completions", json=body)
                await _check_status(answer)
                said = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
                found.append([float(said[f"token_id:{token}"]) for token in asked])
            except ConfigError as error:  # of ours, and told to whoever runs the server
                raise ConfigError(f"{error}: {error.__cause__}") from None
            except (httpx2.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
                raise UpstreamError(f"expected log-probabilities of {self.url}, got {error!r:.200}") from None
        try:
            return gap(found, probes)
        except ValueError as error:
            raise ConfigError(f"{error}: {self.url}") from None

    async def write(
        self, ids: Sequence[int], weights: str, writing: Writing, seed: int, ends: Sequence[int], never: Sequence[int]
    ) -> AsyncGenerator[UpstreamToken]:
        """The tokens that follow, as they come. Who hears no more closes this, and the server stops.

        Args:
            weights: see ``format``. writing: how it is continued; its stops are for the hearer. ends: ids that end it.
            never: ids that may not be chosen.

        Raises:
            BusyError: the server has no room. ConfigError: it refuses what is asked. UpstreamError: it fails.
        """
        sampling = writing.sampling
        body = self._body(ids, weights) | {
            "max_tokens": writing.max_new_tokens,
            "temperature": sampling.temperature if sampling.do_sample else 0,
            "top_p": 1 if sampling.top_p is None else sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": sampling.min_p or 0,
            "repetition_penalty": 1,  # this and what is above would else be the model's own defaults
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": seed % 2**63,
            "ignore_eos": True,
            "stop_token_ids": list(ends),
            "logit_bias": {str(each): UNMASKED for each in never},
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                await _check_status(answer)
                async with aclosing(_events(answer)) as events:
                    async for event in events:
                        for said in _said(event):
                            yield said
        except httpx2.HTTPError as error:
            raise UpstreamError(f"expected an answer of {self.url}, got {type(error).__name__}: {error}") from None

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(STARTING):
                yield
        except TimeoutError:
            message = f"expected an answer of the vLLM server at {self.url} in {STARTING:g} seconds, got none"
            raise UpstreamError(message) from None

    @staticmethod
    def _body(ids: Sequence[int], weights: str) -> dict[str, Any]:
        return {
            "model": BANK,
            "prompt": list(ids),
            "add_special_tokens": False,
            "logprobs": 0,
            "vllm_xargs": {FIELD: weights},
        }


async def _check_status(answer: httpx2.Response) -> None:
    if answer.status_code == 200:
        return
    if answer.status_code in (429, 503):
        told = answer.headers.get("retry-after", "")
        wait = min(max(1, int(told)), LONGEST_WAIT) if told.isascii() and told.isdecimal() else 1
        raise BusyError("expected a vLLM server with room, got one that is busy", wait)
    await answer.aread()
    _refuse(answer.status_code, answer.content)


def _refuse(status: int, content: bytes) -> None:
    """Raise what an error of the server means.

    Raises:
        ConfigError: the request cannot be. UpstreamError: else.
    """
    try:
        told = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        told = ""
    if status == 400:
        why = UpstreamError(f"{' '.join(told.split()):.300}")  # not for clients: it may tell of what is inside
        log(logger, logging.WARNING, "vllm refused", lambda: {"message": str(why)})
        raise ConfigError("expected a request that vLLM takes, got one that it refuses") from why
    raise UpstreamError(f"expected an answer of vLLM, got status {status}: {told:.300}")


async def _events(answer: httpx2.Response) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream, until its end is told.

    Raises:
        UpstreamError: it breaks off, or tells a failure. ConfigError: the failure is of the request.
    """
    ended = False
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            if ended:
                return
            break
        try:
            event = json.loads(data)
            choices = event.get("choices", [])
        except (ValueError, AttributeError):
            raise UpstreamError(f"expected an event of vLLM, got {data:.100}") from None
        if "error" in event:
            code = event["error"].get("code") if isinstance(event["error"], dict) else None
            _refuse(code if isinstance(code, int) else 500, data.encode())
        ended = ended or any(choice.get("finish_reason") in ("stop", "length") for choice in choices)
        yield event
    raise UpstreamError("expected a stream that ends with stop or length, got one that broke off")


def _said(event: dict[str, Any]) -> list[UpstreamToken]:
    """The tokens of an event.

    Raises:
        UpstreamError: they or their log-probabilities are not told.
    """
    found = []
    try:
        for choice in event["choices"]:
            ids = choice["token_ids"] or []
            told = choice["logprobs"]["token_logprobs"] if ids else []
            found += [UpstreamToken(int(id_), float(log_p)) for id_, log_p in zip(ids, told, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UpstreamError(f"expected token ids and log-probabilities of vLLM, got {error!r:.100}") from None
    return found
