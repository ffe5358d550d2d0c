"""Residual blocks in sequence: the part that all models share."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bayes_dispatch.arguments import whole
from bayes_dispatch.errors import ConfigError, StaleCacheError, TensorError
from bayes_dispatch.model.adaptation import Adaptation, Scales
from bayes_dispatch.model.between import asked, tell
from bayes_dispatch.model.mambaformer.block import Block, build_mixer
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.compiled.stepping import Stepper, Steppers, can_step
from bayes_dispatch.model.mambaformer.config import BlockKind, MambaFormerConfig
from bayes_dispatch.model.mambaformer.fingerprint import Fingerprint
from bayes_dispatch.model.mambaformer.mixers import Memory, Span
from bayes_dispatch.model.mambaformer.normalisation import RMSNorm
from bayes_dispatch.model.mambaformer.padding import Padding, check_padding
from bayes_dispatch.model.mambaformer.svd.embedding import EMBEDDING, SVDEmbedding
from bayes_dispatch.model.mambaformer.svd.linear import SVDLinear

__all__ = ["BlockStack", "MambaFormer", "Stretch", "check_adaptation"]

PIECE = 512  # tokens of a row that are read at once


class Stretch:
    """Blocks that run one after the other, with or without the normalisation at the end, and their latest stepper.

    Attributes:
        blocks: their indices. normalised: whether the normalisation follows them.
    """

    def __init__(self, blocks: range, normalised: bool) -> None:
        self.blocks = blocks
        self.normalised = normalised
        self.steppers = Steppers()


class Checked(WeakKeyDictionary[Adaptation, tuple[int, torch.dtype]]):
    """For how many rows, and in which dtype, an adaptation was found to fit a model."""

    def __reduce__(self) -> tuple[type["Checked"], tuple[()]]:
        return Checked, ()  # of another model

    def __deepcopy__(self, memo: dict[int, object]) -> "Checked":
        return Checked()


class BlockStack(nn.Module):
    """Blocks, and a normalisation after the last; before them an embedding, where a vocabulary is given.

    Attributes:
        backbone: sizes of the blocks.
        gradient_checkpointing: in training, keep only what goes into each block, and run it again in the backward pass.
    """

    def __init__(
        self,
        backbone: MambaFormerConfig,
        build: Callable[[BlockKind, MambaFormerConfig], nn.Module] = build_mixer,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.gradient_checkpointing = False
        if vocab_size is not None:  # before the blocks: the order of the weights is that of their fingerprint
            self.embedding = SVDEmbedding(vocab_size, backbone.d_model, backbone.embedding_multiplier)
        self.blocks = nn.ModuleList(Block(build(kind, backbone), backbone) for kind in backbone.block_kinds)
        self.norm = RMSNorm(backbone.d_model, backbone.norm_eps)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(
                "out_proj.weight"
            ):  # residual branches start small, so that depth does not blow up the stream
                parameter.data.mul_(backbone.n_blocks**-0.5)
        self._fingerprint = Fingerprint(backbone.deciding())
        self._stretches: dict[range, Stretch] = {}
        self._checked: Checked = Checked()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of hidden states, logits and, by default, cached states."""
        return self.norm.weight.dtype

    def advance(
        self,
        x: Float[Tensor, "B T D"],
        tokens: Tensor | None,
        cache: Cache | None,
        adaptation: Adaptation,
        memory: Memory | None = None,
        *,
        weights: object,
        stretch: Stretch | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Blocks and the normalisation over right-padded hidden states, with nothing checked but the scales.

        With a cache, many tokens are read piece by piece, so that no block's activations are of all of them.

        Args:
            tokens: real ones of each row (B,), by which ``cache`` is advanced; ``None`` where all T are.
            weights: the fingerprint's ``key``, of this model or of a larger one, since which no weight has changed.
            stretch: the blocks to run, those of ``cache``; ``None`` for all, and the normalisation.
        """
        stretch = stretch or self._stretch(range(len(self.blocks)))
        if cache is None:
            return self._through(stretch, x, Span(tokens), None, adaptation, memory, weights)
        cache.begin([adaptation.digest(index) for index in stretch.blocks])
        read: list[Tensor] = []
        for start in range(0, x.shape[1], PIECE):
            piece = x[:, start : start + PIECE]
            own = None if tokens is None else (tokens - start).clamp(0, piece.shape[1])
            span = Span(own, cache.read, cache.dropped)
            read.append(self._through(stretch, piece, span, cache, adaptation, memory, weights))
            cache.count(piece.shape[1] if own is None else own)
        cache.end()
        return read[0] if len(read) == 1 else torch.cat(read, 1)

    def _through(
        self,
        stretch: Stretch,
        x: Tensor,
        span: Span,
        cache: Cache | None,
        adaptation: Adaptation,
        memory: Memory | None,
        weights: object,
    ) -> Tensor:
        """``advance`` of one piece; the cache's states change, and nothing else in it."""
        if cache is not None and can_step(x) and not asked(self):  # which steps of several blocks could not tell
            build = partial(self._stepper, stretch, adaptation, weights)
            return stretch.steppers.of(weights, adaptation, build)(x, span, cache, memory)
        scales = self._scales(adaptation, None if cache is None else weights)
        saving = self.gradient_checkpointing and self.training and cache is None
        for place, index in enumerate(stretch.blocks):
            block, state = self.blocks[index], None if cache is None else cache.states[place]
            if saving:
                x = cast(Tensor, checkpoint(block, x, span, scales[index], None, memory, use_reentrant=False))
            else:
                x = block(x, span, scales[index], state, memory)
            tell(self, index + 1, x)
        return cast(Tensor, self.norm(x)) if stretch.normalised else x

    def _stretch(self, blocks: range) -> Stretch:
        """These blocks, and the normalisation if the last is among them."""
        known = self._stretches.get(blocks)
        if known is None:
            self._check_range(blocks)
            known = self._stretches.setdefault(blocks, Stretch(blocks, blocks.stop == len(self.blocks)))
        return known

    def _check_range(self, blocks: range) -> None:
        if not blocks or blocks.start < 0 or blocks.stop > len(self.blocks) or blocks.step != 1:
            raise ConfigError(f"expected blocks of 0 … {len(self.blocks) - 1}, got {_named(blocks)}")

    def _stepper(self, stretch: Stretch, adaptation: Adaptation, weights: object) -> Stepper:
        scales = self._scales(adaptation, weights)
        blocks = [cast(Block, self.blocks[index]) for index in stretch.blocks]
        own = [scales[index] for index in stretch.blocks]
        return Stepper(blocks, self.norm if stretch.normalised else None, own)

    def _scales(self, adaptation: Adaptation, weights: object) -> list[dict[str, Scales]]:
        """The scales of each block, by the names that its mixer knows."""
        scales: list[dict[str, Scales]] = [{} for _ in self.blocks]
        for name, z in adaptation.matrices(weights).items():
            if name != EMBEDDING:
                _, block, _, matrix = name.split(".", 3)
                scales[int(block)][matrix] = z
        return scales

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        grow: bool = False,
        blocks: range | None = None,
    ) -> Cache:
        """An empty cache.

        Args:
            batch_size: its rows. max_length: tokens that each row has room for; ``None`` where state-space blocks and
                sliding windows bound the memory of a stream without end.
            dtype: of the states; ``None`` for the model's own. kv_dtype: of keys and values, ``torch.int8`` among
                others; ``None`` for ``dtype``.
            grow: make room when ``max_length`` is reached, instead of raising ``CacheFullError``.
            blocks: those that it is for, one after the other; all by default.

        Raises:
            ConfigError: a size below 1, blocks that there are not, no bound for attention without a window, or a dtype
                that cannot hold states.
        """
        batch_size = whole("batch_size", batch_size, 1)
        max_length = None if max_length is None else whole("max_length", max_length, 1)
        blocks = range(len(self.blocks)) if blocks is None else blocks
        self._check_range(blocks)
        kinds = [self.backbone.block_kinds[index] for index in blocks]
        if max_length is None and self.backbone.attention_window is None and "attention" in kinds:
            raise ConfigError("expected max_length for attention without a window, got None")
        dtype = dtype or self.dtype
        kv_dtype = kv_dtype or dtype
        known = isinstance(dtype, torch.dtype) and isinstance(kv_dtype, torch.dtype)
        if not known or not dtype.is_floating_point or not (kv_dtype.is_floating_point or kv_dtype == torch.int8):
            raise ConfigError(
                f"expected a float dtype, and a float one or int8 for kv_dtype, got {dtype} and {kv_dtype}"
            )
        own = (cast(Block, self.blocks[index]) for index in blocks)
        states = [block.init_state(batch_size, max_length, dtype, kv_dtype) for block in own]
        maker = self._fingerprint.maker(self, self.dtype)
        return Cache(states, batch_size, max_length, maker, grow, blocks.start)

    def adaptable(self) -> dict[str, int]:
        """Name and rank of each matrix that experts adapt unless told otherwise: those of the blocks, in order."""
        return {name: module.rank for name, module in self.named_modules() if isinstance(module, SVDLinear)}

    def adaptable_on_request(self) -> dict[str, int]:
        """Name and rank of what can be adapted, too, where it is named: the embedding, and with it a tied head."""
        return {name: module.rank for name, module in self.named_children() if isinstance(module, SVDEmbedding)}

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix that can be adapted."""
        found: dict[str, tuple[int, int]] = {}
        for name in self.adaptable() | self.adaptable_on_request():
            out, width = self.get_submodule(name).weight.shape  # type: ignore[misc]
            found[name] = int(out), int(width)
        return found

    def fingerprint(self) -> str:
        """A hash of the weights in float32, which is the same for a float64 copy of the model."""
        return self._fingerprint.of(self)

    def _run(
        self,
        x: Float[Tensor, "B T D"],
        padding: Padding,
        cache: Cache | None,
        adaptation: Adaptation,
        memory: Memory | None = None,
        stretch: Stretch | None = None,
    ) -> Float[Tensor, "B T D"]:
        """``advance``, but ``cache`` is checked."""
        stretch = stretch or self._stretch(range(len(self.blocks)))
        if cache is not None:
            fresh = isinstance(cache.read, int) and cache.read == 0  # ``init_cache`` has looked at all weights
            cache.check_model(self._fingerprint.maker(self, self.dtype, glance=fresh or x.shape[1] == 1))
            if cache.blocks != stretch.blocks:
                raise StaleCacheError(
                    f"expected a cache of {_named(stretch.blocks)}, got one of {_named(cache.blocks)}"
                )
            cache.check_room(x.shape[0], x.shape[1] if padding.tokens is None else padding.tokens)
        return self.advance(
            x, padding.tokens, cache, adaptation, memory, weights=self._fingerprint.key, stretch=stretch
        )

    def _check_adaptation(self, adaptation: Adaptation, batch: int) -> None:
        if not adaptation.scales and not adaptation.deltas:
            return
        asked = batch, self.dtype
        if self._checked.get(adaptation) != asked:
            check_adaptation(adaptation, self.linears(), self.dtype, batch)
            self._checked[adaptation] = asked  # it cannot change, and every cached step asks

    def check_states(self, x: Tensor) -> None:
        """Raise ``TensorError`` unless blocks can read this: (B, T, D), at least one, in the model's dtype."""
        width = self.backbone.d_model
        if x.ndim != 3 or x.shape[0] < 1 or x.shape[1] < 1 or x.shape[2] != width:
            raise TensorError(f"expected hidden states of shape (B, T, {width}) with B, T >= 1, got {tuple(x.shape)}")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TensorError(f"expected hidden states of {self.dtype}, as the model's, got {x.dtype}")


def _named(blocks: range) -> str:
    every = "" if blocks.step == 1 else f", each {blocks.step}th"
    return f"blocks {blocks.start} … {blocks.stop - 1}{every}" if blocks else "no blocks"


def check_adaptation(
    adaptation: Adaptation, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, batch: int
) -> None:
    """Raise ``TensorError`` unless it fits matrices of these names and shapes, this dtype and this many rows."""
    for name in [*adaptation.scales, *adaptation.deltas]:
        if name not in shapes:
            raise TensorError(f"expected scales of an adaptable matrix ({next(iter(shapes))}, …), got {name!r}")
    for name, scales in adaptation.scales.items():
        if not 1 <= scales.shape[-1] <= (rank := min(shapes[name])):
            raise TensorError(f"expected 1 to {rank} scales for {name}, got {scales.shape[-1]}")
        if scales.dtype != dtype:
            raise TensorError(f"expected scales of {dtype} for {name}, got {scales.dtype}")
    for name, delta in adaptation.deltas.items():
        (out, width), rank = shapes[name], delta.c.shape[-1]
        if (got := (tuple(delta.up.shape), tuple(delta.down.shape))) != ((out, rank), (rank, width)):
            raise TensorError(f"expected factors {(out, rank)} and {(rank, width)} of the delta of {name}, got {got}")
        if not all(each.is_floating_point() for each in delta):
            raise TensorError(f"expected a delta of floats for {name}, got {[each.dtype for each in delta]}")
    if adaptation.rows not in (None, batch):
        raise TensorError(f"expected scales for {batch} rows, got {adaptation.rows}")


class MambaFormer(BlockStack):
    """The blocks alone, from hidden states to hidden states: for inputs that are no tokens.

    Example:
        >>> MambaFormer(MambaFormerConfig.tiny())(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The last hidden states, normalised; arguments and errors are those of ``MambaFormerForCausalLM``.

        Raises:
            TensorError: ``x`` is empty, or of another width or dtype.
        """
        self.check_states(x)
        adaptation = adaptation or Adaptation.identity()
        self._check_adaptation(adaptation, x.shape[0])
        padding = check_padding(attention_mask, x, at_least=1 if cache is None else 0)
        return padding.restore(self._run(padding.to_right(x), padding, cache, adaptation))
