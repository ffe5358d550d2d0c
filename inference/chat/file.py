"""A conversation in one safetensors file: arrays, and settings as JSON in its header, bound by a digest.

It names the weights of the model, the experts and the dispatcher that it belongs to. Caches are not in it: they are
made again from the transcript.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayes_dispatch.errors import BayesDispatchError, BundleError, ConfigError
from bayes_dispatch.inference.chat.state import ChatSettings, ChatState, Transcript
from bayes_dispatch.inference.two_pass.blends import BLENDS, Blend, FixedWeights
from bayes_dispatch.inference.two_pass.filtering import FilterState
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from bayes_dispatch.inference.two_pass.system import System

__all__ = ["read_chat", "write_chat"]

FORMAT = "bayes-dispatch chat 2"
BYTES = "bayes-dispatch chat 1"  # what it was: tokens are the bytes of the transcript
BY_CLASS: dict[str, type] = {kind.__name__: kind for kind in (*BLENDS.values(), FixedWeights)}


def write_chat(
    path: Path, system: "System", settings: ChatSettings, state: ChatState, over: Sequence[ChatState] = ()
) -> None:
    """Write a conversation with ``system``, whole or not at all.

    Args:
        path: the file. system, settings, state: what is written.
        over: what it may replace; without it whatever is there.

    Raises:
        ConfigError: a blend that is none of ``BY_CLASS``. BundleError: ``path`` is a directory, or holds anything else
            than ``over``: another process has gone on with the chat. OSError: the disk is full, or refuses.
    """
    blend = settings.blend
    if BY_CLASS.get(type(blend).__name__) is not type(blend):
        raise ConfigError(
            f"expected a blend of {', '.join(BY_CLASS)} in a chat with a file, got {type(blend).__name__}"
        )
    said = state.transcript
    tensors = {
        "transcript": torch.tensor(np.frombuffer(said.data, dtype=np.uint8)),
        "ids": torch.tensor(said.ids),
        "own": torch.tensor(said.own),
        "user": torch.tensor(said.user),
        "spans": torch.tensor(said.spans),
        "rows": torch.from_numpy(np.ascontiguousarray(state.rows)),
        "joint": state.filtered.joint[0],
        "target": state.filtered.target[0],
        "rates": state.filtered.rates[0],
        "blends": torch.from_numpy(np.ascontiguousarray(state.filtered.blends[0])),
    }
    chosen = {**vars(settings), "blend": {"kind": type(blend).__name__, "settings": vars(blend)}}
    header = {
        "format": FORMAT,
        "system": json.dumps(_owner(system)),
        "settings": json.dumps(chosen, default=lambda values: values.tolist()),  # of NumPy
        "turns": json.dumps(state.turns),
    }
    write_tensors(path, tensors, header, (lambda: _check_held(path, over)) if over else None)


def read_chat(path: Path, system: "System") -> tuple[ChatSettings, ChatState]:
    """What ``write_chat`` wrote, for the same system.

    Raises:
        BundleError: the file is missing, truncated, edited, no chat, or one with another model, other experts or
            another dispatcher.
    """
    tensors, header = read_tensors(path)
    bytewise = isinstance(system.tokenizer, ByteTokenizer)
    if header.get("format") not in (FORMAT, *[BYTES] * bytewise):
        raise BundleError(f"expected a file of format {FORMAT!r} in {path}, got {header.get('format')!r}")
    try:
        for name, value in _owner(system).items():
            if json.loads(header["system"])[name] != value:
                raise BundleError(f"expected a chat with this bundle's {name} in {path}, got one with another bundle's")
        settings = _settings(json.loads(header["settings"]))
        transcript = _transcript(tensors, system.tokenizer.vocab_size, header["format"] == BYTES)
        return settings, _state(transcript, tensors, int(json.loads(header["turns"])), len(system.experts.components))
    except BundleError:
        raise
    except (BayesDispatchError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise BundleError(f"expected a chat in {path}, got {reason}") from None


def _check_held(path: Path, expected: Sequence[ChatState]) -> None:
    if path.exists():
        tensors, header = read_tensors(path)
        held = header.get("turns"), tensors["transcript"].numpy().tobytes() if "transcript" in tensors else None
        if held not in [(json.dumps(state.turns), state.transcript.data) for state in expected]:
            turns = expected[0].turns
            raise BundleError(
                f"expected the chat in {path} as it was after turn {turns}, got one that went on elsewhere: resume it"
            )


def _settings(chosen: dict[str, Any]) -> ChatSettings:
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in chosen["blend"]["settings"].items()}
    blend: Blend = BY_CLASS[chosen["blend"]["kind"]](**given)
    return ChatSettings(**{**chosen, "blend": blend})


def _transcript(tensors: Mapping[str, Tensor], vocab_size: int, bytewise: bool) -> Transcript:
    text, own = tensors["transcript"].numpy(), tensors["own"].numpy()
    if bytewise:
        places = np.arange(len(text))
        found = Transcript(text.astype(np.int64), own, ~own, np.stack([places, places + 1], 1), text.tobytes())
    else:
        ids, user, spans = (tensors[name].numpy() for name in ("ids", "user", "spans"))
        found = Transcript(ids, own, user, spans, text.tobytes())
    count, (starts, stops) = len(found), found.spans.T
    shapes = [found.ids.shape, own.shape, found.user.shape, starts.shape]
    if shapes != [(count,)] * 4 or own.dtype != bool or found.user.dtype != bool or (own & found.user).any():
        raise ValueError(f"a transcript of arrays that do not fit together: {shapes}")
    if ((found.ids < 0) | (found.ids >= vocab_size)).any():
        raise ValueError(f"tokens that are none of {vocab_size}")
    if ((starts < 0) | (stops < starts) | (stops > len(text))).any():
        raise ValueError(f"tokens outside a text of {len(text)} bytes")
    return found


def _state(transcript: Transcript, tensors: Mapping[str, Tensor], turns: int, components: int) -> ChatState:
    rows, blends = tensors["rows"].double().numpy(), tensors["blends"].double().numpy()
    joint, target, rates = (tensors[name].double() for name in ("joint", "target", "rates"))
    shape = (len(rows), components)
    if rows.shape != shape or blends.shape != shape:
        raise ValueError(f"arrays that do not fit together: {rows.shape}, {blends.shape}")
    if joint.shape != (len(rates), len(rows)) or target.shape != (len(rows),):
        raise ValueError(f"a filter that does not fit {len(rows)} particles: {tuple(joint.shape)}")
    masses = [joint.exp().sum(), target.exp().sum(), *rows.sum(1), *blends.sum(1)]
    if turns < 0 or (turns == 0) != (len(rows) == 0) or (turns > 0 and not np.allclose(masses, 1, atol=1e-6)):
        raise ValueError("weights that do not sum to 1")
    filtered = FilterState(joint[None], target[None], rates[None], blends[None])
    return ChatState(transcript, turns, rows, filtered)


def _owner(system: "System") -> dict[str, Any]:
    """What a chat belongs to; a dispatcher may have been fitted again since the last turn."""
    return {
        "model": system.experts.base,
        "experts": list(system.experts.names),
        "scales": system.experts.digest,
        "dispatcher": system.dispatcher.fingerprint,
    }
