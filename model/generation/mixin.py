"""``generate``, ``stream`` and ``generate_with_log_probabilities`` for every model that continues sequences."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Unpack

from jaxtyping import Bool, Int
from torch import Tensor

from bayes_dispatch import arguments
from bayes_dispatch.errors import ConfigError
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation.beams import beam_search
from bayes_dispatch.model.generation.continuation import Beginning
from bayes_dispatch.model.generation.decoding import Generated, Step, decode, decode_scored, steps
from bayes_dispatch.model.generation.settings import GenerationOptions, GenerationSettings
from bayes_dispatch.model.subwords import SubwordTokenizer
from bayes_dispatch.model.tokenizer import ByteTokenizer

__all__ = ["GenerationMixin"]


class GenerationMixin(ABC):
    """Generation from ``begin``, which a model defines."""

    vocab_size: int
    tokenizer: ByteTokenizer | SubwordTokenizer

    @abstractmethod
    def begin(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None,
        *,
        max_new_tokens: int,
        use_cache: bool,
        adaptation: Adaptation | None,
    ) -> Beginning:
        """Check the prompts and make their continuation, with a cache or without; no block runs yet.

        Raises:
            TensorError: ids, mask or scales that do not fit.
        """

    def generate(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Int[Tensor, "B T_new"]:
        """Continue each row: greedily, by sampling, or by beam search.

        A row gives what it gives alone. Rows that end early leave the batch, and cost nothing more.

        Args:
            input_ids, attention_mask: prompts, padded on either side.
            use_cache: ``False`` recomputes the whole sequence for each token; the result is the same.
            adaptation: shared or per-row scales.
            seed: each row draws from a stream of its own, made of the seed and its prompt; ``None`` for a fresh one.
            options: ``max_new_tokens``, and any of ``min_new_tokens``, ``do_sample``, ``temperature``, ``top_k``,
                ``top_p``, ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``, ``eos_token_id`` and
                ``stop_sequences``: see ``GenerationSettings`` and ``Sampling``.

        Returns:
            The new tokens only, (B, up to max_new_tokens): as many as the longest row has.

        Raises:
            TensorError: ids, mask or scales that do not fit the model or each other; logits that are NaN.
            ConfigError: a setting outside its range, tokens outside the vocabulary, or beams that are sampled.
        """
        prompts, settings, seed = self._begin(input_ids, attention_mask, use_cache, adaptation, seed, options)
        return beam_search(prompts, settings).ids if settings.num_beams > 1 else decode(prompts, settings, seed)

    def generate_with_log_probabilities(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generated:
        """``generate``, with the log-probability of each new token and the length of each row.

        They are the model's own: of its distribution at temperature 1, whatever the sampling and its penalties.
        Arguments and errors: see ``generate``.
        """
        prompts, settings, seed = self._begin(input_ids, attention_mask, use_cache, adaptation, seed, options)
        return beam_search(prompts, settings) if settings.num_beams > 1 else decode_scored(prompts, settings, seed)

    def stream(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Step]:
        """The tokens of ``generate``, one step at a time, as they come; arguments and errors are its own, but no beams.

        Errors are raised here, at once; the prompts are read at the first step. The model must stay as it is until
        the last one.

        Yields:
            A ``Step`` for each new token, until all rows have ended.
        """
        if options.get("num_beams", 1) != 1:
            raise ConfigError(f"expected no num_beams for a stream, got {options['num_beams']}")
        return steps(*self._begin(input_ids, attention_mask, use_cache, adaptation, seed, options))

    def _begin(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool,
        adaptation: Adaptation | None,
        seed: int | None,
        options: GenerationOptions,
    ) -> tuple[Beginning, GenerationSettings, int | None]:
        """Everything checked."""
        if options.get("eos_token_id") is None:
            options = {**options, "eos_token_id": sorted(self.tokenizer.ends)}
        settings = GenerationSettings(**options)
        settings.check_vocabulary(self.vocab_size)
        seed = None if seed is None else arguments.seed(seed)
        length = settings.max_new_tokens
        prompts = self.begin(
            input_ids, attention_mask, max_new_tokens=length, use_cache=use_cache, adaptation=adaptation
        )
        return prompts, settings, seed
