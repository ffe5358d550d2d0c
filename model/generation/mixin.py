"""``generate``, ``stream`` and ``generate_with_log_probabilities`` for every model that continues sequences."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from jaxtyping import Bool, Int
from torch import Tensor

from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation.beams import beam_search
from bayes_dispatch.model.generation.continuation import Prompts
from bayes_dispatch.model.generation.decoding import Generated, Step, decode, decode_scored, steps
from bayes_dispatch.model.generation.sampling import Sampling
from bayes_dispatch.model.generation.settings import GenerationSettings, read_stop_sequences

__all__ = ["GenerationMixin"]


class GenerationMixin(ABC):
    """Generation from ``begin``, which a model defines."""

    vocab_size: int

    @abstractmethod
    def begin(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None,
        *,
        max_new_tokens: int,
        use_cache: bool,
        adaptation: Adaptation | None,
    ) -> Prompts:
        """Check the prompts and make their continuation, with a cache or without; no block runs yet.

        Raises:
            TensorError: ids, mask or scales that do not fit.
        """

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
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        eos_token_id: int | None = None,
        stop_sequences: Sequence[Sequence[int]] | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
    ) -> Int[Tensor, "B T_new"]:
        """Continue each row: greedily, by sampling, or by beam search.

        A row gives what it gives alone. Rows that end early leave the batch, and cost nothing more.

        Args:
            input_ids, attention_mask: prompts, padded on either side.
            max_new_tokens: tokens to add at most.
            do_sample, temperature, top_k, top_p, min_p: see ``Sampling``.
            repetition_penalty: applied before all of those, and in beam search; see ``penalise_repetition``.
            num_beams: above 1, beam search, which is deterministic. length_penalty: see ``GenerationSettings``.
            eos_token_id: a row that yields it has ended, and is filled with it from there on.
            stop_sequences: a row has ended when its new tokens end with one of these, which stays in the output; the
                prompt's last tokens do not count. Without ``eos_token_id``, −1 follows, which is no token.
            use_cache: ``False`` recomputes the whole sequence for each token; the result is the same.
            adaptation: shared or per-row scales.
            seed: each row draws from a stream of its own, made of the seed and its prompt; ``None`` for a fresh one.

        Returns:
            The new tokens only, (B, up to max_new_tokens): as many as the longest row has.

        Raises:
            TensorError: ids, mask or scales that do not fit the model or each other.
            ConfigError: a setting outside its range, tokens outside the vocabulary, or beams that are sampled.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        settings = _settings(
            self.vocab_size,
            max_new_tokens,
            sampling,
            repetition_penalty,
            eos_token_id,
            stop_sequences,
            num_beams,
            length_penalty,
        )
        prompts = self.begin(
            input_ids, attention_mask, max_new_tokens=max_new_tokens, use_cache=use_cache, adaptation=adaptation
        )
        if num_beams > 1:
            return beam_search(prompts, settings).ids
        return decode(prompts, settings, seed)

    def generate_with_log_probabilities(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        eos_token_id: int | None = None,
        stop_sequences: Sequence[Sequence[int]] | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
    ) -> Generated:
        """``generate``, with the log-probability of each new token and the length of each row.

        They are the model's own: of its distribution at temperature 1, whatever the sampling and its penalties.
        Arguments and errors: see ``generate``.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        settings = _settings(
            self.vocab_size,
            max_new_tokens,
            sampling,
            repetition_penalty,
            eos_token_id,
            stop_sequences,
            num_beams,
            length_penalty,
        )
        prompts = self.begin(
            input_ids, attention_mask, max_new_tokens=max_new_tokens, use_cache=use_cache, adaptation=adaptation
        )
        return beam_search(prompts, settings) if num_beams > 1 else decode_scored(prompts, settings, seed)

    def stream(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | None = None,
        stop_sequences: Sequence[Sequence[int]] | None = None,
        use_cache: bool = True,
        adaptation: Adaptation | None = None,
        seed: int | None = None,
    ) -> Iterator[Step]:
        """The tokens of ``generate``, one step at a time, as they come; arguments and errors are its own.

        Errors are raised here, at once; the prompts are read at the first step. The model must stay as it is until
        the last one.

        Yields:
            A ``Step`` for each new token, until all rows have ended.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        settings = _settings(
            self.vocab_size, max_new_tokens, sampling, repetition_penalty, eos_token_id, stop_sequences
        )
        prompts = self.begin(
            input_ids, attention_mask, max_new_tokens=max_new_tokens, use_cache=use_cache, adaptation=adaptation
        )
        return steps(prompts, settings, seed)


def _settings(
    vocab_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    repetition_penalty: float | None,
    eos_token_id: int | None,
    stop_sequences: Sequence[Sequence[int]] | None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> GenerationSettings:
    """Checked settings of a model of this vocabulary."""
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        num_beams=num_beams,
        length_penalty=length_penalty,
        eos_token_id=eos_token_id,
        stop_sequences=read_stop_sequences(stop_sequences),
    )
    settings.check_vocabulary(vocab_size)
    return settings
