"""A MambaFormer from sequence to sequence: an encoder that sees both ways, and a decoder that attends to it.

The decoder's self-attention and state-space blocks are those of the language model; its cross-attention (arXiv
1706.03762) computes keys and values of the encoder's output once and keeps them in the cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayes_dispatch.errors import TensorError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation import Beginning, CachedContinuation, GenerationMixin
from bayes_dispatch.model.mambaformer.blocks import BlockStack, check_adaptation
from bayes_dispatch.model.mambaformer.cache import Cache, CrossAttentionState
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig, Seq2SeqConfig
from bayes_dispatch.model.mambaformer.fingerprint import Fingerprint
from bayes_dispatch.model.mambaformer.mixers import Memory
from bayes_dispatch.model.mambaformer.padding import Padding, check_padding
from bayes_dispatch.model.mambaformer.pretrained import Pretrained
from bayes_dispatch.model.mambaformer.token_model import check_ids
from bayes_dispatch.model.seq2seq.conditioned import ConditionedDecoder, UncachedConditioned
from bayes_dispatch.model.seq2seq.encoder import BidirectionalStack, Input, check_source, makers, source_of

__all__ = ["MambaFormerForSeq2Seq", "Seq2SeqOutput"]


class Seq2SeqOutput(NamedTuple):
    """Logits (B, T, V), the decoder's last hidden states (B, T, D), normalised, what the encoder read, and the cache.

    ``memory`` is ``None`` where the cache had it already.
    """

    logits: Float[Tensor, "B T V"]
    hidden: Float[Tensor, "B T D"]
    memory: Memory | None
    cache: Cache | None


class MambaFormerForSeq2Seq(Pretrained, GenerationMixin):
    """Next-token prediction of an output, given an input.

    To train it, predict each target from those before it; the decoder reads the targets moved right by one:

        >>> config = Seq2SeqConfig.symmetric(MambaFormerConfig.tiny(), vocab_size=258, start_token_id=256)
        >>> model = MambaFormerForSeq2Seq(config)
        >>> input_ids, target_ids = torch.tensor([[104, 105, 33]]), torch.tensor([[33, 105]])
        >>> logits = model(input_ids, model.shift_right(target_ids)).logits
        >>> loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target_ids.flatten())

    Adapted matrices have the names ``encoder.blocks.i.mixer.…`` and ``decoder.blocks.i.mixer.…``.
    """

    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        width = config.decoder.d_model
        self.embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.encoder = BidirectionalStack(config.encoder)
        self.decoder = BlockStack(config.decoder)
        self.head = None if config.tie_embeddings else nn.Linear(width, config.vocab_size, bias=False)
        self._fingerprint = Fingerprint(config.encoder.deciding(), config.decoder.deciding())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of hidden states, logits and, by default, cached states."""
        return self.embedding.weight.dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """See ``BlockStack``; of both halves."""
        return self.encoder.gradient_checkpointing and self.decoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = value

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        decoder_input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B S"] | Bool[Tensor, "B S"] | None = None,
        decoder_attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
        adaptation: Adaptation | None = None,
    ) -> Seq2SeqOutput:
        """Logits for the token after each one that the decoder is given.

        Args:
            input_ids: what the encoder reads; ``None`` where ``memory`` or ``cache`` holds it. With a cache that has
                read it, it may be given again: it is compared, and not read again.
            decoder_input_ids: tokens that follow those in ``cache``; the first of all is ``start_token_id``.
            attention_mask, decoder_attention_mask: 1 for tokens, 0 for padding, on the left or on the right of a row.
            cache: states to continue from, filled in place; made by ``init_cache``.
            memory: what ``encode`` made of the input.
            adaptation: scales for some matrices of both halves; the stored weights where ``None``.

        Raises:
            TensorError: ids, masks or memory of the wrong shape, dtype or range, a mask with holes, another batch in
                the encoder than in the decoder, or nothing that the encoder has read.
            CacheFullError: the cache has no room.
            StaleCacheError: the cache, or the memory, is another model's, adaptation's or input's.
        """
        adaptation = adaptation or Adaptation.identity()
        check_ids(decoder_input_ids, self.vocab_size)
        rows, length = decoder_input_ids.shape
        self._check_adaptation(adaptation, rows)
        padding = check_padding(decoder_attention_mask, decoder_input_ids, at_least=1 if cache is None else 0)
        if cache is not None:
            cache.check_model(self._maker(glance=length == 1))
            cache.check_room(rows, length if padding.tokens is None else padding.tokens)
        memory = self._remember(input_ids, attention_mask, memory, cache, adaptation, rows)
        hidden = self._decode(decoder_input_ids, padding, cache, memory, adaptation.part("decoder"))
        return Seq2SeqOutput(self.logits(hidden), hidden, memory, cache)

    def encode(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Int[Tensor, "B S"] | Bool[Tensor, "B S"] | None = None,
        adaptation: Adaptation | None = None,
    ) -> Memory:
        """What the decoder attends to: the encoder's last hidden states, normalised, with zeros at padding.

        It remembers what it was made from, so that it is not taken for something else. Arguments and errors are those
        of ``forward``.
        """
        adaptation = adaptation or Adaptation.identity()
        given = self._check_input(input_ids, attention_mask, None)
        self._check_adaptation(adaptation, input_ids.shape[0])
        return self._encode(given, adaptation, source_of(self._makers(adaptation), given))

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        grow: bool = False,
    ) -> Cache:
        """An empty cache of the decoder; what it keeps of the encoder is as long as the first input.

        Arguments and errors: see ``MambaFormerForCausalLM``; ``max_length`` counts the decoder's tokens.
        """
        cache = self.decoder.init_cache(batch_size, max_length, dtype=dtype, kv_dtype=kv_dtype, grow=grow)
        cache.model = self._maker()
        return cache

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The next-token head."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def shift_right(
        self,
        target_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
    ) -> Int[Tensor, "B T"]:
        """What the decoder reads to predict ``target_ids``: ``start_token_id``, then all but the last target.

        Each row begins where its first real target stands, so that ``attention_mask``, which tells the real targets
        from padding on either side, fits the decoder's input, too.
        """
        check_ids(target_ids, self.vocab_size)
        padding = check_padding(attention_mask, target_ids, at_least=1)
        targets = padding.to_right(target_ids)
        start = torch.full_like(targets[:, :1], self.config.start_token_id)
        return padding.restore(torch.cat([start, targets[:, :-1]], dim=1))

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix that can be adapted, by name."""
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{half}.{name}": shape for half, stack in halves.items() for name, shape in stack.linears().items()}

    def adaptable(self) -> dict[str, int]:
        """Name and rank of each matrix that can be adapted, the encoder's first."""
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{half}.{name}": rank for half, stack in halves.items() for name, rank in stack.adaptable().items()}

    def fingerprint(self) -> str:
        """A hash of the weights in float32, which is the same for a float64 copy of the model."""
        return self._fingerprint.of(self)

    def begin(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Int[Tensor, "B S"] | Bool[Tensor, "B S"] | None,
        *,
        max_new_tokens: int,
        use_cache: bool,
        adaptation: Adaptation | None,
    ) -> Beginning:
        """What ``generate`` begins with: the start token, and an encoder that will read the prompts once."""
        adaptation = adaptation or Adaptation.identity()
        given = self._check_input(input_ids, attention_mask, None)
        batch = input_ids.shape[0]
        self._check_adaptation(adaptation, batch)
        adaptation = adaptation.to(self.embedding.weight.device)
        start = given.ids.new_full((batch, 1), self.config.start_token_id, dtype=torch.long)
        decoder = ConditionedDecoder(
            lambda: self._encode(given, adaptation, None), self._decode, self.logits, self.init_cache
        )
        own = decoder, start, None, adaptation.part("decoder")
        continuation = CachedContinuation(*own, max_new_tokens - 1) if use_cache else UncachedConditioned(*own)
        return Beginning(continuation, given.contents(), start)

    def _encode(self, given: Input, adaptation: Adaptation, source: Tensor | None) -> Memory:
        hidden, visible = self.encoder(
            self._embed(given.ids, self.config.encoder), given.padding, adaptation.part("encoder")
        )
        return Memory(hidden, visible, source)

    def _embed(self, ids: Tensor, half: MambaFormerConfig) -> Tensor:
        x: Tensor = self.embedding(ids)
        return x if half.embedding_multiplier == 1 else x * half.embedding_multiplier

    def _decode(
        self, ids: Tensor, padding: Padding, cache: Cache | None, memory: Memory | None, adaptation: Adaptation
    ) -> Tensor:
        """The decoder's last hidden states (B, T, D), with nothing checked, under its own scales ``blocks.i.…``."""
        x = self._embed(padding.to_right(ids), self.config.decoder)
        return padding.restore(
            self.decoder.advance(x, padding.tokens, cache, adaptation, memory, weights=self._fingerprint.key)
        )

    def _remember(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        memory: Memory | None,
        cache: Cache | None,
        adaptation: Adaptation,
        rows: int,
    ) -> Memory | None:
        """What cross-attention has to read; ``None`` where the cache holds it, and nothing else was given."""
        if (input_ids is None and attention_mask is not None) or (input_ids is not None and memory is not None):
            raise TensorError("expected input_ids, with an attention_mask or without, or memory; got parts of both")
        given = None if input_ids is None else self._check_input(input_ids, attention_mask, rows)
        if memory is not None:
            memory.check(rows, self.config.encoder.d_model, self.dtype)
            if memory.source is not None:
                check_source(memory.source, self._makers(adaptation, cache))
        state = None if cache is None else next(s for s in cache.states if isinstance(s, CrossAttentionState))
        if state is not None and state.filled:
            self._check_filled(state, given, memory, self._makers(adaptation, cache))
            return None
        if memory is None and given is None:
            raise TensorError("expected input_ids, memory, or a cache that has read them, got none")
        if given is None:
            return memory
        source = None if cache is None else source_of(self._makers(adaptation, cache), given)
        return self._encode(given, adaptation, source)

    def _check_input(self, input_ids: Tensor, attention_mask: Tensor | None, rows: int | None) -> Input:
        check_ids(input_ids, self.vocab_size)
        if rows not in (None, input_ids.shape[0]):
            raise TensorError(f"expected input_ids of {rows} rows, as in decoder_input_ids, got {input_ids.shape[0]}")
        return Input(input_ids, check_padding(attention_mask, input_ids, at_least=1))

    def _check_filled(
        self, state: CrossAttentionState, given: Input | None, memory: Memory | None, expected: Tensor
    ) -> None:
        """Raise unless ``state`` was filled by these ``makers``, and from what is given again, if anything is."""
        if given is not None or memory is not None:
            again = source_of(expected, given) if given is not None else None if memory is None else memory.source
            if state.source is None or again is None:
                raise TensorError(
                    "expected neither input_ids nor memory with a cache of unknown input, got one of them"
                )
            expected = again
        if state.source is not None:
            check_source(state.source, expected)

    def _check_adaptation(self, adaptation: Adaptation, batch: int) -> None:
        if adaptation.scales or adaptation.deltas:
            check_adaptation(adaptation, self.linears(), self.dtype, batch)

    def _maker(self, glance: bool = False) -> str:
        """What a cache remembers of the model that made it: both halves, since its keys are the encoder's, too."""
        return self._fingerprint.maker(self, self.dtype, glance)

    def _makers(self, adaptation: Adaptation, cache: Cache | None = None) -> Tensor:
        """``makers`` of this model, which ``cache`` is one of where it is given."""
        return makers(self._maker() if cache is None else cache.model, adaptation.part("encoder"))
