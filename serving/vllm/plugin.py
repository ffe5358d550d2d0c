"""What runs inside vLLM: each request has its own weights of one bank of experts, and all of them share a batch.

vLLM loads it from the entry points ``vllm.general_plugins``. It does nothing unless ``BAYES_DISPATCH_VLLM`` names the
folder of a bank (``export``). Then vLLM serves

- the model ``bank``: one adapter in one slot, of which a request gets the blend that ``blend_weights`` of its
  ``vllm_xargs`` tells. What a token's experts have computed between their two factors is multiplied by its request's
  weights;
- models such as ``blend:de=0.4,fr=0.6``, one adapter and one slot each, where vLLM may load adapters while it runs
  (``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``).

Before a server answers anybody, it must say of the bank's probes what the bank says they say. vLLM has no interface
for most of this: methods of its classes are replaced, as they are in release 0.32.
"""

import asyncio
import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayes_dispatch.serving.vllm.format import BANK, FIELD, PREFIX, Index, gap, weights_of

__all__ = ["VARIABLE", "Bank", "register"]

VARIABLE = "BAYES_DISPATCH_VLLM"
MOST_BLENDS = 1000  # that are kept as adapters of their own

logger = logging.getLogger("vllm.bayes_dispatch")  # below vLLM's own, so that its settings hold


class Bank:
    """An exported bank.

    Args:
        directory: of ``export_bank``.

    Raises:
        ValueError: see ``Index.read``.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / BANK
        self.index = Index.read(directory.resolve())
        self._ranks = list(self.index.ranks.values())
        self.seen = lru_cache(4096)(self.columns)  # for texts that have been checked: each step of the model asks again

    def columns(self, text: object) -> np.ndarray:
        """The factor of each of the bank's columns, (rank,), under these weights.

        Raises:
            ValueError: see ``weights_of``.
        """
        return np.repeat(weights_of(text, self.index.components)[:-1], self._ranks).astype(np.float32)

    def write_blend(self, text: str, directory: Path) -> None:
        """One blend as an adapter of PEFT's: the columns that have some weight; one of zeros where none has.

        Raises:
            ValueError: see ``weights_of``.
        """
        from safetensors.torch import load_file, save_file

        factors = torch.from_numpy(self.columns(text))
        kept = factors.nonzero()[:, 0] if bool(factors.any()) else torch.tensor([0])
        tensors = {}
        for name, tensor in load_file(self.path / "adapter_model.safetensors").items():
            up = ".lora_B." in name
            tensors[name] = (tensor * factors.to(tensor))[:, kept].contiguous() if up else tensor[kept].contiguous()
        config = json.loads((self.path / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"r": len(kept), "lora_alpha": len(kept)}
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def register() -> None:
    """Called by vLLM in each of its processes.

    Raises:
        ValueError: the variable names no bank.
    """
    directory = os.environ.get(VARIABLE)
    if not directory:
        return
    bank = Bank(Path(directory))
    _weight_tokens(bank)
    _check_requests(bank)
    _serve_when_right(bank)
    _resolve_blends(bank)


def _replace(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Put what ``make`` makes of a method in its place, once: vLLM may load a plugin again."""
    inner = getattr(owner, name)
    if not hasattr(inner, "bayes_dispatch"):
        outer = make(inner)
        outer.bayes_dispatch = True
        setattr(owner, name, outer)


def _weight_tokens(bank: Bank) -> None:
    """In the process of the model: scale what lies between the factors of adapters, token by token."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    def loading(inner: Any) -> Any:
        def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
            if vllm_config.use_v2_model_runner:
                raise ValueError(
                    "expected vLLM's model runner V1 for bayes-dispatch, got V2: VLLM_USE_V2_MODEL_RUNNER=0"
                )
            loaded = inner(self, model, vllm_config, device)
            tokens, rank = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.lora_config.max_lora_rank
            self.bayes_dispatch_scales = torch.ones(tokens, rank, device=device)
            for wrapper in self.lora_manager._adapter_manager.punica_wrapper_mapping.values():
                wrapper.add_expand = _scaled(wrapper.add_expand, self.bayes_dispatch_scales)
            return loaded

        return load_lora_model

    def activating(inner: Any) -> Any:
        def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
            requests = [self.requests[each] for each in input_batch.req_ids[: len(num_scheduled_tokens)]]
            width = self.bayes_dispatch_scales.shape[1]
            rows = np.stack([_row(bank, request, width) for request in requests]).repeat(num_scheduled_tokens, axis=0)
            self.bayes_dispatch_scales[: len(rows)].copy_(torch.from_numpy(rows))
            return inner(self, input_batch, num_scheduled_tokens, *args, **kwargs)

        return set_active_loras

    _replace(LoRAModelRunnerMixin, "load_lora_model", loading)
    _replace(LoRAModelRunnerMixin, "set_active_loras", activating)


def _row(bank: Bank, request: Any, width: int) -> np.ndarray:
    """What a request's tokens are multiplied by: its weights, ones for other adapters, and zeros for none.

    The zeros matter on a CPU, where vLLM 0.32 gives a request without an adapter that of the last slot.
    """
    if request.lora_request is None:
        return np.zeros(width, dtype=np.float32)
    row = np.ones(width, dtype=np.float32)
    if request.lora_request.lora_name == BANK:
        columns = bank.seen(request.sampling_params.extra_args[FIELD])
        row[: len(columns)] = columns
    return row


def _scaled(add_expand: Any, scales: torch.Tensor) -> Any:
    def scaled_expand(y: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        for part in x:  # of each of the matrices that vLLM has joined, (tokens, rank)
            part.mul_(scales[: part.shape[0], : part.shape[1]])
        return add_expand(y, x, *args, **kwargs)

    return scaled_expand


def _check_requests(bank: Bank) -> None:
    """In the server's process: weights with the bank alone, and never without; caches of prompts are one blend's."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def processing(inner: Any) -> Any:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = inner(self, *args, **kwargs)
            params, lora = request.sampling_params, request.lora_request
            given = None if params is None else (params.extra_args or {}).get(FIELD)
            if (lora is not None and lora.lora_name == BANK) != (given is not None):
                raise VLLMValidationError(f"expected {FIELD} in vllm_xargs with the model {BANK}, and with no other")
            if given is not None:
                try:
                    columns = bank.columns(given)
                except ValueError as error:
                    raise VLLMValidationError(str(error)) from None
                request.cache_salt = f"{request.cache_salt or ''}|{columns.tobytes().hex()}"
            return request

        return process_inputs

    _replace(InputProcessor, "process_inputs", processing)


def _serve_when_right(bank: Bank) -> None:
    """Load the bank when a server starts, and refuse to go on unless it says what it must."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.request import LoRARequest

    def starting(inner: Any) -> Any:
        async def init_static_loras(self: Any) -> None:
            await inner(self)
            if BANK in self.lora_requests:
                raise ValueError(f"expected no adapter called {BANK} beside the bank's, got one of --lora-modules")
            lora = LoRARequest(BANK, self.lora_id_counter.inc(1), str(bank.path))
            await self.engine_client.add_lora(lora)
            off = await _probed(bank, self.engine_client, lora)
            self.lora_requests[BANK] = lora
            logger.info("bayes-dispatch: %d probes of %s at most %.2g nats off", len(bank.index.probes), bank.path, off)

        return init_static_loras

    _replace(OpenAIServingModels, "init_static_loras", starting)


async def _probed(bank: Bank, engine: Any, lora: Any) -> float:
    """See ``gap``. All probes are asked at once, so that they share batches.

    Raises:
        ValueError: one that is too far off.
    """
    from vllm.sampling_params import SamplingParams

    tokens, asked = list(bank.index.tokens), list(bank.index.asked)

    async def ask(n: int, weights: str) -> list[float]:
        params = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=asked, extra_args={FIELD: weights})
        told = engine.generate({"prompt_token_ids": tokens}, params, f"probe-{n}", lora_request=lora)
        (output,) = [each async for each in told if each.finished]
        said = output.outputs[0].logprobs[0]
        return [said[token].logprob for token in asked]

    probes = bank.index.probes
    return gap(await asyncio.gather(*(ask(n, probe.weights) for n, probe in enumerate(probes))), probes)


def _resolve_blends(bank: Bank) -> None:
    """Models of one blend each, where vLLM asks resolvers for names that it does not know."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class BlendResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not there when this is checked
        """``blend:de=0.4,fr=0.6`` becomes an adapter in a folder that is removed when the process ends."""

        def __init__(self) -> None:
            self._made: dict[bytes, str] = {}
            self._root: str | None = None

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            if not lora_name.startswith(PREFIX):
                return None
            text = lora_name.removeprefix(PREFIX)
            try:
                columns = bank.columns(text).tobytes()
            except ValueError as error:
                logger.warning("bayes-dispatch: %s", error)
                return None  # vLLM answers that there is no such model
            if columns not in self._made:
                if len(self._made) >= MOST_BLENDS:
                    logger.warning("bayes-dispatch: expected at most %d blends as models, got one more", MOST_BLENDS)
                    return None
                self._made[columns] = await asyncio.to_thread(self._write, text)
            return LoRARequest(lora_name, 1, self._made[columns])  # vLLM gives it its number

        def _write(self, text: str) -> str:
            if self._root is None:
                self._root = tempfile.mkdtemp(prefix="bayes-dispatch-blends-")
                atexit.register(shutil.rmtree, self._root, ignore_errors=True)
            made = tempfile.mkdtemp(dir=self._root)
            bank.write_blend(text, Path(made))
            return made

    LoRAResolverRegistry.register_resolver("bayes_dispatch", BlendResolver())
