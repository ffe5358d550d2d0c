"""The MambaFormer (arXiv 2402.04248): a Mamba block, then pairs of attention and Mamba blocks, as a language model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.model.adaptation import Adaptation, block_of
from bayes_dispatch.model.backbone import CausalLMOutput, check_tokens
from bayes_dispatch.model.generation import Beginning, CachedContinuation, GenerationMixin, UncachedContinuation
from bayes_dispatch.model.mambaformer.block import Block
from bayes_dispatch.model.mambaformer.blocks import MambaFormer
from bayes_dispatch.model.mambaformer.cache import Cache
from bayes_dispatch.model.mambaformer.config import LanguageModelConfig
from bayes_dispatch.model.mambaformer.padding import check_padding
from bayes_dispatch.model.mambaformer.pretrained import Pretrained
from bayes_dispatch.model.mambaformer.products import Head
from bayes_dispatch.model.mambaformer.session import MambaFormerSession, said_after
from bayes_dispatch.model.mambaformer.svd.embedding import EMBEDDING
from bayes_dispatch.model.mambaformer.token_model import TokenModel, check_ids
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["Block", "MambaFormer", "MambaFormerForCausalLM"]


class MambaFormerForCausalLM(TokenModel, GenerationMixin, Pretrained):
    """Next-token prediction with explicit cache and adaptation.

    Args:
        config: its sizes. tokenizer: what its ids are of; ``None`` for bytes.

    Raises:
        ConfigError: a tokenizer with more tokens.

    Example:
        >>> config = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
        >>> MambaFormerForCausalLM(config)(torch.tensor([[256, 104, 105]])).logits.shape
        torch.Size([1, 3, 258])
    """

    config_class = LanguageModelConfig
    cuts = continues = True

    def __init__(self, config: LanguageModelConfig, tokenizer: SubwordTokenizer | None = None) -> None:
        super().__init__(config.backbone, config.vocab_size)
        self.config = config
        if tokenizer is not None:  # as it will be read again, with all ids of the embedding
            self.tokenizer = SubwordTokenizer.from_json(tokenizer.to_json(), config.vocab_size, tokenizer.settings)
        self.depth = len(self.blocks)
        self.head = None if config.tie_embeddings else Head(config.backbone.d_model, config.vocab_size)

    @classmethod
    def from_transformers(
        cls,
        source: str | Path | nn.Module,
        *,
        dtype: torch.dtype | None = None,
        tokenizer: SubwordTokenizer | ByteTokenizer | None = None,
    ) -> "MambaFormerForCausalLM":
        """A model of the transformers library: Bamba, Granite, GraniteMoeHybrid without experts, Llama, Mamba, Mamba2.

        Files are memory-mapped, and read tensor by tensor; nothing is unpickled or executed.

        Args:
            source: a directory of config.json and safetensors, or a model itself, whose weights are copied.
            dtype: of the weights; ``None`` for that of the checkpoint's embedding. Where it is less precise than
                float32 only the matrices are kept in it: vectors, states and hidden states are in float32.
            tokenizer: of its ids; ``None`` for the tokenizer.json of the directory.

        Raises:
            ConfigError: another kind of model, or a setting that changes results and is not covered, by name.
            BundleError: a file is missing or damaged, or its tensors contradict its configuration.
        """
        from bayes_dispatch.model.mambaformer.conversion.checkpoint import read_checkpoint

        return read_checkpoint(cls, source, dtype, tokenizer)

    def export_to_transformers(self, directory: str | Path, *, model_type: str | None = None) -> None:
        """Write a checkpoint that ``AutoModelForCausalLM.from_pretrained`` and ``from_transformers`` read.

        Config.json, model.safetensors of the same numbers in one file, and the tokenizer where it is one of subwords.

        Args:
            directory: new, empty, or of an earlier save, whose place it takes.
            model_type: ``"bamba"``, ``"granite"``, ``"granitemoehybrid"``, ``"llama"``, ``"mamba"`` or ``"mamba2"``;
                ``None`` for one that has all settings of this model.

        Raises:
            ConfigError: no such kind has all of them; one that it lacks is named.
            BundleError: the directory is a link, or holds anything else.
        """
        from bayes_dispatch.model.mambaformer.conversion.checkpoint import write_checkpoint

        write_checkpoint(self, Path(directory), model_type)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
    ) -> CausalLMOutput:
        """Logits for the token after each given one.

        Args:
            input_ids: tokens that follow those in ``cache``.
            attention_mask: 1 for tokens, 0 for padding, on the left or on the right of a row; outputs at padding have
                no meaning, and padding enters no state.
            cache: states to continue from, filled in place; a row may then have no new tokens at all.
            adaptation: scales for some matrices; the stored weights where ``None``.

        Raises:
            TensorError: ids or mask of the wrong shape, dtype, range or device, or a mask with holes.
            CacheFullError: the cache has no room. StaleCacheError: the cache is another model's or adaptation's.
        """
        hidden, _ = self.read(input_ids, attention_mask, cache, adaptation)
        return CausalLMOutput(self.logits(hidden, adaptation), hidden, cache)

    def upper(
        self,
        block: int,
        x: Int[Tensor, "B T"] | Float[Tensor, "B T D"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        adaptation: Adaptation | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The last hidden states, normalised, from those that come into ``block``.

        Args:
            x: what ``below`` gave; for block 0 tokens will do, too, and where the embedding is adapted only they will.
            cache: one of ``init_cache(…, blocks=range(block, …))``, up to the last block.

        Raises:
            TensorError: hidden states, ids, a mask or scales of the wrong shape, or scales of what is below.
            CacheFullError, StaleCacheError: see ``forward``.
        """
        adaptation = adaptation or Adaptation.identity()
        stretch = self._stretch(range(block, len(self.blocks)))
        from_tokens = block == 0 and not x.is_floating_point()
        if not from_tokens:
            self.check_states(x)
        self._check_adaptation(adaptation, x.shape[0])
        _check_above(adaptation, block)
        if from_tokens:
            x, padding = self._embed(x, attention_mask, cache, adaptation)
        else:
            if adaptation.of(EMBEDDING) is not None:
                raise TensorError(f"expected tokens, whose embedding is adapted, got {x.dtype} of {tuple(x.shape)}")
            padding = check_padding(attention_mask, x, at_least=1 if cache is None else 0)
            x = padding.to_right(x)
        return padding.restore(self._run(x, padding, cache, adaptation, stretch=stretch))

    @property
    def longest(self) -> int:
        """Tokens that it was made for."""
        return self.config.longest

    @property
    def weights_dtype(self) -> torch.dtype:
        """See ``model.backbone.Backbone``."""
        return self.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.norm.weight.device

    def open(
        self, rows: int, capacity: int, adaptation: Adaptation | None = None, blocks: range | None = None
    ) -> MambaFormerSession:
        """See ``model.backbone.Backbone``."""
        chosen, adaptation = range(self.depth) if blocks is None else blocks, adaptation or Adaptation.identity()
        cache = self.init_cache(rows, capacity, blocks=chosen)
        if chosen.start and chosen.stop < self.depth:
            raise ConfigError(f"expected the first or the last of {self.depth} blocks, got {chosen}")
        self._check_adaptation(adaptation, rows)
        _check_above(adaptation, chosen.start if chosen.stop == self.depth else chosen.stop)
        return MambaFormerSession(self, cache, adaptation.to(self.device), chosen, self.depth)

    def score(
        self, ids: Int[Tensor, "R T"], tokens: Int[Tensor, " R"] | None = None, adaptation: Adaptation | None = None
    ) -> Float[Tensor, "R T"]:
        """See ``model.backbone.Backbone``."""
        check_tokens(ids, tokens, len(ids))
        ids = ids.to(self.device, torch.long)
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = None if tokens is None else (places < tokens.to(ids.device)[:, None]).long()
        hidden, _ = self.read(ids, mask, None, adaptation)
        if torch.is_grad_enabled():  # of all tokens at once: a gradient needs all of these anyway
            logits, following = self.logits(hidden, adaptation)[:, :-1], ids[:, 1:]
            said = -F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)
        else:
            said = said_after(hidden, ids, self.vocab_size, lambda part: self.logits(part, adaptation).log_softmax(-1))
        return torch.cat([said.new_full((len(ids), 1), torch.nan), said], 1)

    def cut(self, matrices: Iterable[str]) -> int:
        """How many blocks can run once for all adaptations of these matrices."""
        return min(map(block_of, matrices), default=0)

    def logits(self, hidden: Float[Tensor, "B T D"], adaptation: Adaptation | None = None) -> Float[Tensor, "B T V"]:
        """The next-token head, with nothing checked; scales of the embedding are those of a tied head.

        A head of its own is not adapted: then scales of the embedding change what is read alone.
        """
        if self.head is not None:
            logits = self.head(hidden)
        else:
            logits = self.embedding.product(hidden, None if adaptation is None else adaptation.of(EMBEDDING))
        return logits if self.config.logits_scaling == 1 else logits / self.config.logits_scaling

    def begin(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None,
        *,
        max_new_tokens: int,
        use_cache: bool,
        adaptation: Adaptation | None,
    ) -> Beginning:
        """What ``generate`` begins with: see ``GenerationMixin``."""
        adaptation = adaptation or Adaptation.identity()
        check_ids(input_ids, self.vocab_size)
        self._check_adaptation(adaptation, input_ids.shape[0])
        padding = check_padding(attention_mask, input_ids, at_least=1)
        ids = padding.to_right(input_ids.long())
        if padding.tokens is not None:
            ids = ids[:, : int(padding.tokens.max())]
        lengths = [ids.shape[1]] * ids.shape[0] if padding.tokens is None else padding.tokens.tolist()
        content = [row[:n].numpy().tobytes() for row, n in zip(ids.cpu(), lengths, strict=True)]
        own = self, ids, padding.tokens, adaptation.to(self.device)
        continuation = CachedContinuation(*own, max_new_tokens - 1) if use_cache else UncachedContinuation(*own)
        return Beginning(continuation, content, ids, padding.tokens)


def _check_above(adaptation: Adaptation, block: int) -> None:
    """Raise ``TensorError`` where something below ``block`` is adapted: that is read without it."""
    if adaptation.lowest_block < block:
        raise TensorError(f"expected scales of block {block} and above alone, got some of {adaptation.lowest_block}")
