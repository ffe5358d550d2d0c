"""Two-pass generation: read the prompt, dispatch, and generate under the blended experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayes_dispatch.dispatcher import Dispatcher
from bayes_dispatch.errors import ConfigError, TensorError
from bayes_dispatch.evidence import Evidence
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.inference.blends import Blend, Particles
from bayes_dispatch.inference.filtering import CachedReader, ParticleFilter, Reader, UncachedReader, predictive
from bayes_dispatch.inference.first_pass import first_pass
from bayes_dispatch.inference.prompts import check_prompts
from bayes_dispatch.model.backbone import Backbone
from bayes_dispatch.model.sampling import Sampling, row_generators, row_seeds
from bayes_dispatch.model.tokenizer import ByteTokenizer
from bayes_dispatch.posterior import DispatchPosterior

__all__ = ["Dispatched", "Generation", "Strategy", "System", "TwoPassGenerator", "dispatch"]

POSTERIOR_DRAWS = 64
ROWS_AT_ONCE = 64  # rows (prompts times particles) of one batch
PREFILL_CHUNK = 256  # tokens that are read at once, which bounds the memory of their logits


@runtime_checkable
class System(Protocol):
    """The parts that work together; a ``Bundle`` has them."""

    @property
    def model(self) -> Backbone: ...
    @property
    def tokenizer(self) -> ByteTokenizer: ...
    @property
    def experts(self) -> ExpertBank: ...
    @property
    def dispatcher(self) -> Dispatcher: ...


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for N prompts, and how sure it is.

    Attributes:
        prompts, texts: prompts as bytes, and their continuations.
        token_ids: (N, max_new_tokens). log_probabilities: (N, max_new_tokens), of each token under the predictive at
            temperature 1, in nats.
        posterior: the dispatcher's posterior. blend: the blend's name.
        weights: (N, K + 1), mean blend weights when the prompt had been read: filtered by its tokens where the blend
            is.
        predictive_entropy, mutual_information: (N, max_new_tokens) in nats, of the next token, and between it and the
            particle: the epistemic part.
    """

    prompts: tuple[bytes, ...]
    texts: tuple[str, ...]
    token_ids: np.ndarray
    log_probabilities: np.ndarray
    posterior: DispatchPosterior
    blend: str
    weights: np.ndarray
    predictive_entropy: np.ndarray
    mutual_information: np.ndarray


def dispatch(system: System, prompts: Sequence[str | bytes], seed: int | None) -> tuple[DispatchPosterior, Evidence]:
    """First pass and posterior; a prompt's draws depend on the seed and the prompt alone.

    Raises:
        PromptError: see ``first_pass``.
    """
    passed = first_pass(system.model, system.tokenizer, prompts)
    seeds = row_seeds(seed, passed.prompts)
    return system.dispatcher.posterior(passed.evidence, draws=POSTERIOR_DRAWS, seed=seeds), passed.evidence


@runtime_checkable
class Strategy(Protocol):
    """A way from prompts to a posterior over the weights of K experts and base."""

    @property
    def name(self) -> str: ...

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        """Draws for each prompt.

        Raises:
            PromptError: see ``check_prompts``.
        """
        ...


@dataclass(frozen=True)
class Dispatched:
    """The system's own dispatcher."""

    name = "dispatcher"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        return dispatch(system, prompts, seed)[0]


class TwoPassGenerator:
    """Generates for prompts of any lengths, each under its own blend of experts.

    Args:
        bundle: model, tokenizer, experts and dispatcher.

    Raises:
        ForeignExpertError: the experts were made for another model.
        ConfigError: the dispatcher was fitted for other experts.
    """

    def __init__(self, bundle: System) -> None:
        bundle.experts.check_base(bundle.model)
        if tuple(bundle.dispatcher.experts) != bundle.experts.names:
            raise ConfigError(
                f"expected a dispatcher over {bundle.experts.names}, got one over {bundle.dispatcher.experts}"
            )
        self.bundle = bundle

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str | bytes],
        *,
        blend: Blend,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        strategy: Strategy | None = None,
        use_cache: bool = True,
        progress: bool = False,
    ) -> Generation:
        """Continue each prompt under its blended experts.

        Args:
            prompts: 1 to 4,096 bytes of UTF-8 each. blend: how the posterior becomes particles.
            max_new_tokens: bytes to generate. do_sample, temperature: see ``Sampling``; greedy by default.
            seed: of posterior draws and sampling; ``None`` for a fresh one. A prompt's result does not depend on the
                prompts beside it, except that copies of a prompt draw differently.
            strategy: gives the posterior; the system's dispatcher by default.
            use_cache: ``False`` recomputes everything for each token: the slow reference.
            progress: show a progress bar over tokens.

        Raises:
            PromptError: see ``check_prompts``. ConfigError: a setting out of range.
        """
        sampling = Sampling(do_sample=do_sample, temperature=temperature)
        if max_new_tokens < 1:
            raise ConfigError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        check_prompts(prompts)
        posterior = (strategy or Dispatched()).posterior(self.bundle, prompts, seed)
        particles = blend.particles(posterior)
        data = [prompt.encode() if isinstance(prompt, str) else prompt for prompt in prompts]
        generators = row_generators(seed + 1, data)
        at_once = max(1, ROWS_AT_ONCE // particles.mass.shape[1])
        parts = []
        with tqdm(total=-(-len(data) // at_once) * max_new_tokens, desc=blend.name, disable=not progress) as bar:
            for start in range(0, len(data), at_once):
                chosen = slice(start, start + at_once)
                part = particles.select(chosen)
                parts.append(
                    self._decode(
                        data[chosen], part, sampling, generators[chosen], max_new_tokens, use_cache, bar.update
                    )
                )
        ids, log_probabilities, entropy, information, weights = (np.concatenate(v) for v in zip(*parts, strict=True))
        texts = tuple(self.bundle.tokenizer.decode(row) for row in ids.tolist())
        return Generation(
            tuple(data), texts, ids, log_probabilities, posterior, blend.name, weights, entropy, information
        )

    def _decode(
        self,
        prompts: list[bytes],
        particles: Particles,
        sampling: Sampling,
        generators: list[np.random.Generator],
        max_new_tokens: int,
        use_cache: bool,
        advanced: Callable[[], object],
    ) -> tuple[np.ndarray, ...]:
        model, tokenizer, bank = self.bundle.model, self.bundle.tokenizer, self.bundle.experts
        ids, mask = tokenizer.pad([[tokenizer.bos_token_id, *prompt] for prompt in prompts])
        lengths = mask.sum(1)
        reader: Reader
        if use_cache:
            reader = CachedReader(model, bank, particles, capacity=ids.shape[1] + max_new_tokens)
        else:
            reader = UncachedReader(model, bank, particles)
        weights = ParticleFilter(particles)
        following = read_prompt(reader, weights, ids, lengths)
        blended = weights.mean(particles)
        one = torch.ones(len(prompts), dtype=torch.long)
        rows: list[tuple[Tensor, ...]] = []
        for step in range(max_new_tokens):
            mixed = predictive(weights.log_weights, following)
            # only bytes continue a text; the special tokens never occur after its beginning
            token = sampling.choose(mixed.log_probabilities[:, :256], generators)
            chosen = mixed.log_probabilities.gather(1, token[:, None])[:, 0]
            rows.append((token, chosen, mixed.entropy, mixed.mutual_information))
            # own tokens count as in the joint predictive: later ones continue what the likely particles began
            weights.update(following.gather(2, token[:, None, None].expand(-1, following.shape[1], 1))[..., 0])
            if step + 1 < max_new_tokens:
                following = reader.read(token[:, None], one)[:, :, 0]
            advanced()
        columns = [torch.stack(column, 1).cpu().numpy() for column in zip(*rows, strict=True)]
        if not np.isfinite(columns[1]).all():
            raise TensorError("expected finite log-probabilities from the model, got NaN or infinite ones")
        return (*columns, blended)


def read_prompt(reader: Reader, weights: ParticleFilter, ids: Tensor, lengths: Tensor) -> Tensor:
    """Read right-padded prompts (N, T), filter the particles by every byte, and return log p(next) (N, S, V)."""
    following: Tensor | None = None
    for start in range(0, ids.shape[1], PREFILL_CHUNK):
        part = ids[:, start : start + PREFILL_CHUNK]
        tokens = (lengths - start).clamp(0, part.shape[1])
        after = reader.read(part, tokens)  # (N, S, T, V)
        for t in range(part.shape[1]):
            read = t < tokens
            if following is None:  # the beginning token is no evidence
                following = after[:, :, 0]
                continue
            weights.update(following.gather(2, part[:, t, None, None].expand(-1, after.shape[1], 1))[..., 0], read)
            following = torch.where(read[:, None, None], after[:, :, t], following)
    assert following is not None
    return following
