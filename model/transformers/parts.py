"""A transformers model in parts: some of its blocks, and its head, over the same weights.

A part is a shallow copy of the model whose list of blocks has others in places. What a part reads and leaves goes
through a context variable, so that threads share parts.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from inspect import signature
from typing import Any
from weakref import finalize, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from bayes_dispatch.arguments import in_a_line
from bayes_dispatch.errors import CacheFullError, ConfigError
from bayes_dispatch.model.adaptation import Delta
from bayes_dispatch.model.between import tell
from bayes_dispatch.model.mambaformer.products import times

__all__ = ["ModelParts"]

_entering: ContextVar[Tensor] = ContextVar("entering")
_adding: ContextVar[tuple[object, Mapping[str, Delta]]] = ContextVar("adding")


class ModelParts:
    """Blocks and head of a causal language model of the transformers library.

    Args:
        model: with one list of ``num_hidden_layers`` blocks.

    Attributes:
        depth: how many blocks it has. blocks: where they are in the inner model. vocab_size: rows of the embedding.
        positions: whether it is told where tokens are. continues: whether it reads several tokens at once from a state
            that it kept; whoever finds that it does not sets it.
        matrices, shapes: modules that multiply by a matrix, by name, and (out, in) of each.

    Raises:
        ConfigError: there is no such list, or the model does not run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._inner: nn.Module = model.base_model
        self.depth = int(model.config.get_text_config().num_hidden_layers)
        lists = [
            name
            for name, module in self._inner.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.depth
        ]
        if self._inner is model or not lists or not self.depth:
            raise ConfigError(
                f"expected a model with a list of its {self.depth} blocks, got {type(model).__name__}, which has none"
            )
        self.blocks = lists[0]
        self._layers = list(self._inner.get_submodule(self.blocks).children())
        self._returned = self._returned_by_blocks()
        self._parts: dict[tuple[int, int], nn.Module] = {}
        for place, layer in enumerate(self._layers):
            finalize(self, layer.register_forward_hook(_telling(ref(self), place + 1)).remove)
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"expected a model with an embedding, got {type(model).__name__}, which has none")
        self.vocab_size = embedding.num_embeddings
        self._embedding = embedding
        self.continues = True
        self.positions = "position_ids" in signature(self._inner.forward).parameters
        found = {name: (module, _shape(module)) for name, module in model.named_modules()}
        self.matrices = {name: module for name, (module, shape) in found.items() if shape}
        self.shapes = {name: shape for name, (_, shape) in found.items() if shape}
        for name, module in self.matrices.items():
            finalize(self, module.register_forward_hook(_added_by(ref(self), name)).remove)
        self._head = _with_child(model, _name_of(model, self._inner), _Given(self._inner, None))

    def run(self, blocks: range, ids: Tensor, x: Tensor | None, **arguments: Any) -> Tensor:
        """Hidden states (B, T, D) that come out of some blocks; of the last one, after the model's normalisation.

        Args:
            ids: (B, T). x: (B, T, D), what comes into the first of these blocks, unless that is the model's first.
            arguments: what the model's own ``forward`` takes beside them.
        """
        inner = self._part(blocks)
        if blocks.start:
            assert x is not None
            with _value(x):
                if blocks.stop == self.depth:
                    return inner(inputs_embeds=x, **arguments).last_hidden_state
                return _left(inner, inputs_embeds=x, **arguments)
        if blocks.stop == self.depth:
            return inner(input_ids=ids, **arguments).last_hidden_state
        return _left(inner, input_ids=ids, **arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D), normalised, to (B, T, V), with all that the model does to its logits."""
        hidden = hidden.contiguous()  # of a slice, torch multiplies each row by a copy of the matrix
        with _value(hidden):
            return self._head(inputs_embeds=hidden, use_cache=False).logits

    @property
    def config(self) -> Any:
        """The model's."""
        return self._model.config

    @property
    def longest(self) -> int | None:
        """Tokens that it was made for; ``None`` where there is no bound."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def check_length(self, tokens: int) -> None:
        """Raise ``CacheFullError`` for more tokens of a row than it was made for: some fail there, others read on."""
        if self.longest is not None and tokens > self.longest:
            raise CacheFullError(f"expected at most {self.longest} tokens, as the model can read, got {tokens}")

    @property
    def device(self) -> torch.device:
        """Of the embedding, where tokens go."""
        return self._embedding.weight.device

    @contextmanager
    def adding(self, deltas: Mapping[str, Delta]) -> Iterator[None]:
        """Add deltas to the matrices of whatever this thread runs of the model; multiply few rows by ``times``."""
        token = _adding.set((self, deltas))
        try:
            with _Times() if self.device.type == "cpu" and not torch.is_grad_enabled() else nullcontext():
                yield
        finally:
            _adding.reset(token)

    def adding_as_now(self) -> AbstractContextManager[None]:
        """``adding`` of what this thread adds now, for whatever thread runs the model again."""
        return self.adding(_adding.get()[1])

    def _returned_by_blocks(self) -> int | None:
        """How many values a block returns, of which the hidden states are the first; ``None`` for these alone."""
        found: list[object] = []
        hook = self._layers[0].register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            with torch.inference_mode():
                ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
                self._inner(input_ids=ids, use_cache=False)
        except Exception as error:  # such as kernels that there are not of this dtype
            where = f"{self._model.dtype} on {self._model.device}"
            got = f"{type(self._model).__name__}: {in_a_line(error)}"
            raise ConfigError(f"expected a model that runs in {where}, got {got}") from error
        finally:
            hook.remove()
        return len(found[0]) if isinstance(found[0], tuple) else None

    def _part(self, blocks: range) -> nn.Module:
        if blocks == range(self.depth):
            return self._inner
        key = blocks.start, blocks.stop
        if key not in self._parts:
            layers: list[nn.Module] = [_Elsewhere(layer, self._returned) for layer in self._layers]
            layers[blocks.start : blocks.stop] = self._layers[blocks.start : blocks.stop]
            if blocks.start:
                layers[0] = _Enter(self._layers[0], self._returned)
            if blocks.stop < self.depth:
                layers[blocks.stop] = _Leave(self._layers[blocks.stop], self._returned)
            parent, _, name = self.blocks.rpartition(".")
            self._parts[key] = _with_child(self._inner, f"{parent}.{name}" if parent else name, nn.ModuleList(layers))
        return self._parts[key]


class _Times(TorchFunctionMode):
    """Linear layers multiply by ``times``, which reads a matrix faster for the few rows of a decoded token."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and args[0].dtype == args[1].dtype and not torch.is_autocast_enabled("cpu"):
            return times(*args)
        return func(*args, **(kwargs or {}))


class _Elsewhere(nn.Module):
    """Stands for a block that does not run in this part; looks like it."""

    def __init__(self, block: nn.Module, returned: int | None) -> None:
        super().__init__()
        self.__dict__.update(block=block, returned=returned)  # no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor | None, ...]:
        return self._as_block(hidden_states)

    def _as_block(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        returned = self.__dict__["returned"]
        return hidden if returned is None else (hidden, *[None] * (returned - 1))


class _Enter(_Elsewhere):
    """Stands for the first block: gives what comes into the part."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor | None, ...]:
        return self._as_block(_entering.get())


class _Left(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Leave(_Elsewhere):
    """Stands for the first block after the part: nothing of the model runs from there on."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Left(hidden_states)


class _Output(BaseModelOutput):
    """Hidden states alone, whatever else a head may pass on."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(_Elsewhere):
    """Stands for all that is below the head."""

    def forward(self, *_: Any, **__: Any) -> _Output:  # type: ignore[override]
        return _Output(last_hidden_state=_entering.get())


def _telling(parts: "ref[ModelParts]", depth: int) -> Any:
    def told(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tell(parts(), depth, output[0] if isinstance(output, tuple) else output)

    return told


def _added_by(owner: "ref[ModelParts]", name: str) -> Any:
    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        by, deltas = _adding.get((None, {}))
        delta = deltas.get(name) if by is owner() else None
        if delta is None:
            return None
        return output + (delta(inputs[0]) * getattr(module, "embed_scale", 1)).to(output.dtype)  # Gemma's embedding

    return add


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if hasattr(module, "in_features") and hasattr(module, "out_features"):  # quantised ones, too
        return int(getattr(module, "out_features")), int(getattr(module, "in_features"))  # noqa: B009
    return None


def _left(inner: nn.Module, **arguments: Any) -> Tensor:
    try:
        inner(**arguments)
    except _Left as left:
        return left.hidden
    raise ConfigError(f"expected {type(inner).__name__} to run its blocks one after the other, got one that does not")


@contextmanager
def _value(x: Tensor) -> Iterator[None]:
    token = _entering.set(x)
    try:
        yield
    finally:
        _entering.reset(token)


def _name_of(model: nn.Module, child: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is child)


def _with_child(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """A shallow copy of ``module`` with another submodule at ``path``."""
    twin = copy(module)
    twin._modules = dict(module._modules)
    name, _, rest = path.partition(".")
    own = twin._modules[name]
    assert own is not None
    twin._modules[name] = _with_child(own, rest, child) if rest else child
    return twin
