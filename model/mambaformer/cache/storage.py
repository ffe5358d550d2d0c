"""States on disk: one safetensors file, with their kinds as JSON in its header."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayes_dispatch.errors import BundleError
from bayes_dispatch.model.mambaformer.cache.states import AttentionState, CrossAttentionState, MambaState, State
from bayes_dispatch.storage import read_tensors, write_tensors

__all__ = ["read_states", "write_states"]

FORMAT = "bayes-dispatch cache 1"
KINDS: dict[str, type[State]] = {
    kind.__name__: kind for kind in (State, MambaState, AttentionState, CrossAttentionState)
}
# Of tensors by name; keys, values and their scales have 4.
DIMENSIONS = {"conv": (3,), "ssm": (3, 4), "visible": (2,), "source": (2,)}
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def write_states(path: Path, states: Sequence[State], lengths: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write states, tensors of one number per row, and what else there is to say about them."""
    tensors = {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.tensors().items()}
    kinds = [{"kind": type(state).__name__} | _settings(state) for state in states]
    write_tensors(path, tensors | lengths, {"format": FORMAT, "states": json.dumps(kinds), "about": json.dumps(about)})


def read_states(path: Path, lengths: Sequence[str]) -> tuple[list[State], dict[str, Tensor], dict[str, Any]]:
    """Inverse of ``write_states``; ``lengths`` are the names of the tensors of one number per row.

    Raises:
        BundleError: the file is missing, damaged, or was not written by ``write_states``.
    """
    tensors, header = read_tensors(path)
    try:
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r}")
        about, kinds = json.loads(header["about"]), json.loads(header["states"])
        numbers = {name: tensors.pop(name) for name in lengths}
        batch = about["batch_size"]
        if any(n.shape != (batch,) or n.dtype != torch.int64 or int(n.min()) < 0 for n in numbers.values()):
            raise ValueError("lengths of another shape or below 0")
        states = [_read_state(kind, i, tensors, batch) for i, kind in enumerate(kinds)]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BundleError(f"expected a cache ({FORMAT}) in {path}, got: {error}") from None
    if tensors:
        raise BundleError(f"expected no other tensors in the cache {path}, got {', '.join(sorted(tensors)[:4])}")
    return states, numbers, about


def _read_state(description: dict[str, Any], index: int, tensors: dict[str, Tensor], batch: int) -> State:
    kind = KINDS[description["kind"]]
    names = [name for name in tensors if name.startswith(f"{index}.")]
    own = {name.split(".", 1)[1]: tensors.pop(name) for name in names}
    for name, tensor in own.items():
        if tensor.shape[:1] != (batch,) or tensor.ndim not in DIMENSIONS.get(name, (4,)):
            raise ValueError(f"{name} of block {index} of shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS | {torch.int8, torch.uint8, torch.bool}:
            raise ValueError(f"{name} of block {index} of {tensor.dtype}")
    settings: dict[str, Any] = {}
    if kind is AttentionState:
        settings["window"] = window = description["window"]
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(f"a window of {window!r:.80} in block {index}")
    elif kind is CrossAttentionState:
        settings["dtype"] = {str(dtype): dtype for dtype in FLOATS | {torch.int8}}[description["dtype"]]
    return kind(**own, **settings)


def _settings(state: State) -> dict[str, Any]:
    if isinstance(state, AttentionState):
        return {"window": state.window}
    return {"dtype": str(state.dtype)} if isinstance(state, CrossAttentionState) else {}
