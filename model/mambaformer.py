"""The MambaFormer (arXiv 2402.04248): a Mamba block, then pairs of attention and Mamba blocks, as a language model."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.backbone import CausalLMOutput
from bayes_dispatch.model.blocks import Block, MambaFormer
from bayes_dispatch.model.cache import Cache
from bayes_dispatch.model.config import LanguageModelConfig
from bayes_dispatch.model.padding import check_padding
from bayes_dispatch.model.pretrained import Pretrained
from bayes_dispatch.model.sampling import Sampling, row_generators
from bayes_dispatch.model.token_model import TokenModel, check_ids

__all__ = ["Block", "MambaFormer", "MambaFormerForCausalLM"]


class MambaFormerForCausalLM(TokenModel, Pretrained):
    """Next-token prediction with explicit cache and adaptation.

    Example:
        >>> config = LanguageModelConfig(backbone=MambaFormerConfig.tiny(), vocab_size=258)
        >>> MambaFormerForCausalLM(config)(torch.tensor([[256, 104, 105]])).logits.shape
        torch.Size([1, 3, 258])
    """

    config_class = LanguageModelConfig

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config.backbone, config.vocab_size)
        self.config = config
        self.head = None if config.tie_embeddings else nn.Linear(config.backbone.d_model, config.vocab_size, bias=False)

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
            TensorError: ids or mask of the wrong shape, dtype or range, or a mask with holes.
            CacheFullError: the cache has no room. StaleCacheError: the cache is another model's or adaptation's.
        """
        hidden, _ = self.read(input_ids, attention_mask, cache, adaptation)
        return CausalLMOutput(self.logits(hidden), hidden, cache)

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The next-token head."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
    ) -> Int[Tensor, "B T_new"]:
        """Continue each row, greedily or by sampling.

        Args:
            input_ids, attention_mask: prompts, padded on either side.
            max_new_tokens: tokens to add. do_sample, temperature, top_k, top_p: see ``Sampling``.
            eos_token_id: a row that yields it is finished and is filled with it from there on.
            use_cache: ``False`` recomputes the whole sequence for each token; the result is the same.
            adaptation: shared or per-row scales.
            seed: each row draws from a stream of its own, made of the seed and its prompt; ``None`` for a fresh one.

        Returns:
            The new tokens only, (B, up to max_new_tokens).

        Raises:
            TensorError, ConfigError: see ``forward`` and ``Sampling``.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p)
        if max_new_tokens < 1:
            raise ConfigError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        check_ids(input_ids, self.vocab_size)
        input_ids = input_ids.long()
        padding = check_padding(attention_mask, (input_ids.shape[0], input_ids.shape[1]), at_least=1)
        ids = padding.to_right(input_ids)
        batch, length = ids.shape
        lengths = torch.full((batch,), length) if padding.tokens is None else padding.tokens
        rows = [ids[b, :n].cpu().numpy().tobytes() for b, n in enumerate(lengths.tolist())]
        generators = row_generators(seed, rows)
        cache = self.init_cache(batch, length + max_new_tokens) if use_cache else None
        sequence = torch.cat([ids, ids.new_zeros(batch, max_new_tokens)], dim=1)
        each = torch.arange(batch)
        finished = torch.zeros(batch, dtype=torch.bool)
        new: list[Tensor] = []
        for _ in range(max_new_tokens):
            if cache is not None and new:
                logits = self(new[-1][:, None], cache=cache, adaptation=adaptation).logits[:, 0]
            else:
                width = int(lengths.max())
                mask = (torch.arange(width) < lengths[:, None]).long()
                out = self(sequence[:, :width], attention_mask=mask, cache=cache, adaptation=adaptation)
                logits = out.logits[each, lengths - 1]
            token = sampling.choose(logits, generators)
            if eos_token_id is not None:
                token = torch.where(finished, eos_token_id, token)
                finished |= token == eos_token_id
            new.append(token)
            sequence[each, lengths] = token
            lengths = lengths + 1
            if bool(finished.all()):
                break
        return torch.stack(new, dim=1)
