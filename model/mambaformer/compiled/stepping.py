"""One more token of few rows on a CPU: each block is one compiled function, matrix products included."""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation, Delta, MatrixScales, Scales
from bayes_dispatch.model.mambaformer.block import Block
from bayes_dispatch.model.mambaformer.cache import AttentionState, Cache, CrossAttentionState, MambaState, State
from bayes_dispatch.model.mambaformer.compiled.switch import Array, array, can_compile, kernels
from bayes_dispatch.model.mambaformer.compiled.threads import sharing
from bayes_dispatch.model.mambaformer.mixers import (
    CrossAttention,
    FeedForward,
    Mamba1Mixer,
    Mamba2Mixer,
    Memory,
    SelfAttention,
    Span,
)
from bayes_dispatch.model.mambaformer.normalisation import RMSNorm
from bayes_dispatch.model.mambaformer.products import MOST_ROWS
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear, parts_of

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.compiled.loops import Matrix

__all__ = ["Stepper", "Steppers", "can_step"]

MOST_KEPT = 16  # steppers of adaptations that are still in use, each with matrices of its own where these were built

Places = tuple[Array, Array, Array]  # what ``Span.places`` gives
Step = Callable[[Array, int, Places, State], bool]  # for so many threads; whether it knew what to do with the state


def can_step(x: Float[Tensor, "B T D"]) -> bool:
    """Whether a ``Stepper`` takes these inputs."""
    return x.shape[1] == 1 and x.shape[0] <= MOST_ROWS and can_compile(x)


class Stepper:
    """Steps of blocks with their present weights and these scales; modules are not called, nor are their hooks.

    Args:
        blocks: to run, one after the other. norm: after the last. scales: of each block.
    """

    def __init__(self, blocks: Sequence[Block], norm: RMSNorm | None, scales: Sequence[Mapping[str, Scales]]) -> None:
        self._blocks = [(block, z, _step(block, z)) for block, z in zip(blocks, scales, strict=True)]
        self._norm = None if norm is None else _arguments(norm)

    def __call__(
        self, x: Float[Tensor, "B 1 D"], span: Span, cache: Cache, memory: Memory | None
    ) -> Float[Tensor, "B 1 D"]:
        """The hidden states, normalised where that was asked for; states change, but the cache is not advanced."""
        rows = x[:, 0].numpy().copy()
        places = span.places(len(rows))
        with sharing() as threads:
            for (block, z, step), state in zip(self._blocks, cache.states, strict=True):
                # no step: a first one of cross-attention, states of other precision
                if step is None or not step(rows, threads, places, state):
                    rows[:] = block(torch.from_numpy(rows)[:, None], span, z, state, memory)[:, 0].numpy()
        if self._norm is not None:
            kernels().normalise(rows, *self._norm, rows)
        return torch.from_numpy(rows)[:, None]


class Steppers:
    """The latest steppers of some blocks: generations may take turns, and each builds its matrices once."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Adaptation, tuple[object, Stepper]] = WeakKeyDictionary()
        self._plain = Adaptation.identity()  # stands for all that change nothing
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["Steppers"], tuple[()]]:
        return Steppers, ()  # of another model

    def of(self, weights: object, adaptation: Adaptation, build: Callable[[], Stepper]) -> Stepper:
        """The stepper under these scales, built anew where it is none of the latest.

        Args:
            weights: the same object for as long as the blocks' weights do not change.
        """
        adapted = adaptation if adaptation.scales or adaptation.deltas else self._plain
        kept = self._kept.get(adapted)
        if kept is None or kept[0] is not weights:
            kept = weights, build()
            with self._lock:
                self._kept.pop(adapted, None)
                for old in list(self._kept)[: 1 - MOST_KEPT]:  # any of them may go meanwhile, with its last user
                    self._kept.pop(old, None)
                self._kept[adapted] = kept
        return kept[1]


def _step(block: Block, given: Mapping[str, Scales]) -> Step | None:
    """The step of a block, where it is compiled: not where a matrix has a bias, is in float16, or does not fold.

    Threads share its large products.
    """
    mixer = block.mixer
    linears = {name: linear for name, linear in mixer.named_children() if isinstance(linear, SVDLinear)}
    adapted = {name: parts_of(own) for name, own in given.items()}
    if not all(_folds(linears[name], *own) for name, own in adapted.items() if name in linears):
        return None
    if any(linear.bias is not None for linear in linears.values()):
        return None
    norm = *_arguments(block.norm), block.residual

    dtype = block.norm.weight.dtype
    if any(linear.weight.dtype not in (dtype, torch.bfloat16) for linear in linears.values()):
        return None

    def matrices(*names: str) -> "list[Matrix]":
        return [_matrix(linears[name], dtype, *adapted.get(name, (None, None))) for name in names]

    if type(mixer) is Mamba1Mixer:
        products = matrices("in_proj", "x_proj", "dt_proj", "out_proj")
        return _mamba(kernels().step_mamba1, dtype, *norm, *products, *mixer.arrays())
    if type(mixer) is Mamba2Mixer:
        more = *mixer.arrays(), *mixer.arguments()
        return _mamba(kernels().step_mamba2, dtype, *norm, *matrices("in_proj", "out_proj"), *more)
    if type(mixer) is SelfAttention:
        return _attention(dtype, *norm, *matrices("qkv", "out_proj"), *mixer.arguments())
    if type(mixer) is CrossAttention:
        return _cross_attention(dtype, *norm, *matrices("q_proj", "out_proj"), mixer.scale)
    if type(mixer) is FeedForward:
        return _feed_forward(*norm, *matrices("in_proj", "out_proj"))
    return None


def _arguments(norm: RMSNorm) -> tuple[Array, float]:
    return array(norm.weight), norm.eps


def _mamba(step: Callable[..., None], dtype: torch.dtype, *arguments: object) -> Step:
    def run(x: Array, threads: int, places: Places, state: State) -> bool:
        state = cast(MambaState, state)
        if known := state.conv.dtype == state.ssm.dtype == dtype:
            step(x, threads, places[0], *state.arrays(), *arguments)
        return known

    return run


def _attention(dtype: torch.dtype, *arguments: object) -> Step:
    step = kernels().step_attention

    def run(x: Array, threads: int, places: Places, state: State) -> bool:
        kept = cast(AttentionState, state).arrays(dtype)
        if kept is not None:
            step(x, threads, *places, kept, *arguments)
        return kept is not None

    return run


def _cross_attention(dtype: torch.dtype, *arguments: object) -> Step:
    step = kernels().step_cross_attention

    def run(x: Array, threads: int, places: Places, state: State) -> bool:
        state = cast(CrossAttentionState, state)
        if (kept := state.arrays(dtype)) is not None:
            seen = np.empty((len(x), 0), np.bool_) if state.visible is None else array(state.visible)
            step(x, threads, kept, seen, *arguments)
        return kept is not None

    return run


def _feed_forward(*arguments: object) -> Step:
    step = kernels().step_feed_forward

    def run(x: Array, threads: int, places: Places, state: State) -> bool:
        step(x, threads, *arguments)
        return True

    return run


def _folds(linear: SVDLinear, scales: MatrixScales | None, delta: Delta | None) -> bool:
    """Whether what adapts a matrix makes one matrix, or other scales in each row of a whole decomposition.

    Not so deltas that differ by row, and scales by row of the largest singular values alone.
    """
    z = None if scales is None else scales.z
    if delta is not None:
        return delta.c.ndim == 1 and (z is None or z.ndim == 1)
    return z is None or z.ndim == 1 or z.shape[1] == linear.rank


def _matrix(linear: SVDLinear, dtype: torch.dtype, scales: MatrixScales | None, delta: Delta | None) -> "Matrix":
    """As ``product`` takes it: W alone, or U, s z and Vᵀ, and W for the rows whose scales are all 1."""
    make = kernels().Matrix
    nobody, nothing = np.empty(0, np.int64), array(linear.weight[:0].to(dtype))
    halves = linear.weight.dtype == torch.bfloat16
    bits = array(linear.weight[: None if halves else 0].bfloat16().view(torch.uint16))
    z = None if scales is None or scales.z is None or bool((scales.z == 1).all()) else scales.z
    if z is None and delta is None:
        return make(nothing if halves else array(linear.weight), nothing, nothing, nothing, nobody, bits)
    if z is None or z.shape[-1] < linear.rank or delta is not None:
        folded = array(linear.folded(None if z is None else z.reshape(-1), delta, dtype))
        return make(folded, nothing, nothing, nothing, nobody, bits[:0])
    U, s, Vt, _ = linear.factors(dtype=dtype)
    z = z.reshape(-1, linear.rank)
    stored, plain = nothing if halves else array(linear.weight), array((z == 1).all(dim=1).nonzero()[:, 0])
    return make(array(U), array(s * z), array(Vt), stored, plain, bits)
