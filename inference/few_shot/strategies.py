"""Strategies: ways to decide how the experts are blended for prompts, all answering with a posterior over the weights.

The dispatcher's own posterior comes first. The others are what it is compared with: Transformer²'s three ways to adapt
(arXiv 2501.06252: the prompt itself is asked for its category, a classification expert is asked, or few-shot weights),
any classifier of the evidence, and given weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from bayes_dispatch.arguments import in_order, simplex
from bayes_dispatch.dispatcher.arrays import as_numbers
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.errors import ConfigError, ForeignExpertError, TensorError
from bayes_dispatch.experts.vectors import ExpertVector
from bayes_dispatch.inference.few_shot.answers import AnswerLikelihood, check_pairs
from bayes_dispatch.inference.few_shot.categories import category_text, name_probabilities
from bayes_dispatch.inference.few_shot.methods import SequentialMonteCarlo
from bayes_dispatch.inference.few_shot.program import FewShotMethod, FewShotProgram
from bayes_dispatch.inference.two_pass.first_pass import first_pass
from bayes_dispatch.inference.two_pass.prompts import check_prompts
from bayes_dispatch.inference.two_pass.system import POSTERIOR_DRAWS, Dispatched, Strategy, System, cut_of
from bayes_dispatch.model.adaptation import Adaptation
from bayes_dispatch.model.generation.sampling import prompt_seeds

__all__ = [
    "AskedExpert",
    "AskedModel",
    "ByPrompt",
    "Classified",
    "Dispatched",
    "FewShot",
    "Given",
    "Strategy",
    "one_hot_draws",
]


@dataclass(frozen=True)
class AskedModel:
    """The language model itself is asked: how likely is each category's name after the prompt and a question?

    Attributes:
        names: expert → the name of its category; experts that are not here, and base, are called as they are.
    """

    names: Mapping[str, str] | None = None
    name = "asked model"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        return _asked(system, prompts, seed, self.names, None)


@dataclass(frozen=True, eq=False)
class AskedExpert:
    """As :class:`AskedModel`, but an expert that was trained to answer is asked (``categories.CategoryDomain``).

    Attributes:
        expert: trained for the system's model. names: as it was trained with.
    """

    expert: ExpertVector
    names: Mapping[str, str] | None = None
    name = "classification expert"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        if self.expert.base != system.experts.base:
            expected = f"expected an expert made for base model {system.experts.base}"
            raise ForeignExpertError(f"{expected}, got one for {self.expert.base}")
        return _asked(system, prompts, seed, self.names, self.expert.adaptation())


@dataclass(frozen=True)
class Classified:
    """A classifier of the first pass's evidence; its probabilities become draws of single experts.

    Attributes:
        classify: evidence of N prompts → (N, K + 1) probabilities. name: of the classifier.
    """

    classify: Callable[[Evidence], np.ndarray]
    name: str = "classifier"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        evidence = first_pass(system.model, system.tokenizer, prompts, cut=cut_of(system)).evidence
        shares = as_numbers(self.classify(evidence), "probabilities")
        return one_hot_draws(shares, system.experts.components, prompt_seeds(seed, check_prompts(prompts)))


@dataclass(frozen=True)
class FewShot:
    """The posterior given questions with their answers, inferred once for all prompts.

    Attributes:
        pairs: (prompt, answer) texts. method: of inference.
        prior: concentrations of the weights, as in :class:`FewShotProgram`.

    Raises:
        PromptError: see ``check_pairs``. ConfigError: a method that is none.
    """

    pairs: Sequence[tuple[str | bytes, str | bytes]]
    method: FewShotMethod = field(default_factory=SequentialMonteCarlo)
    prior: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_pairs(self.pairs)
        if isinstance(self.method, type) or not isinstance(self.method, FewShotMethod):
            raise ConfigError(f"expected a method such as SequentialMonteCarlo(), got {self.method!r:.60}")

    @property
    def name(self) -> str:
        return f"few-shot, {self.method.name}"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        count, (own, *_) = len(check_prompts(prompts)), prompt_seeds(seed, [b""])
        likelihood = AnswerLikelihood(system.model, system.experts, self.pairs)
        found = self.method.infer(FewShotProgram(likelihood, self.prior), own % 2**63).posterior
        return DispatchPosterior(np.repeat(found.weights, count, 1), system.experts.components)


@dataclass(frozen=True)
class ByPrompt:
    """A strategy of its own for each prompt, such as ``FewShot`` with pairs that belong to it.

    Attributes:
        strategy: prompt → strategy; all give as many draws. name: of them together.
    """

    strategy: Callable[[str | bytes], Strategy]
    name: str = "by prompt"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        seeds = [own % 2**63 for own in prompt_seeds(seed, check_prompts(prompts))]
        found = [self.strategy(p).posterior(system, [p], own) for p, own in zip(prompts, seeds, strict=True)]
        return DispatchPosterior.concatenate(found)


@dataclass(frozen=True, eq=False)
class Given:
    """Weights that are known: an oracle's, uniform ones, or base alone.

    Attributes:
        weights: (K + 1,) for all prompts, or (N, K + 1); or by name, such as ``{"de": 0.7, "fr": 0.3}``, for all
            prompts: who is not named has none.
    """

    weights: np.ndarray | Mapping[str, float]
    name: str = "given"

    def posterior(self, system: System, prompts: Sequence[str | bytes], seed: int | None) -> DispatchPosterior:
        components = system.experts.components
        shape = len(check_prompts(prompts)), len(components)
        given = in_order("weights", self.weights, components) if isinstance(self.weights, Mapping) else self.weights
        weights = as_numbers(given, f"weights of {', '.join(components)}")
        if weights.shape not in (shape, shape[1:]):
            raise TensorError(f"expected weights of shape {shape[1:]} or {shape}, got {weights.shape}")
        return DispatchPosterior(np.broadcast_to(weights, shape)[None], components)


def one_hot_draws(
    probabilities: Float[np.ndarray, "prompt component"],
    components: Sequence[str],
    seeds: Sequence[int],
) -> DispatchPosterior:
    """Draws of single components, as many of each as its probability says (systematic sampling), in random order.

    The probabilities are taken to be read off the prompts, under a prior to which all components are alike.

    Args:
        probabilities: (N, K + 1). components: their names. seeds: of each prompt's order.

    Raises:
        TensorError: another shape. ConfigError: they are no probabilities.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != len(components):
        raise TensorError(f"expected probabilities of shape (prompt, {len(components)}), got {probabilities.shape}")
    shares = simplex("probabilities", probabilities)
    points = (np.arange(POSTERIOR_DRAWS) + 0.5) / POSTERIOR_DRAWS
    edges = (shares / shares.sum(1, keepdims=True)).cumsum(1)[:, :-1]  # (N, K)
    chosen = (points[:, None, None] > edges).sum(-1)  # (S, N)
    orders = np.stack([np.random.default_rng(seed).permutation(POSTERIOR_DRAWS) for seed in seeds], 1)
    drawn = np.take_along_axis(chosen, orders, 0)
    return DispatchPosterior(
        np.eye(len(components))[drawn],
        tuple(components),
        prior=np.full(shares.shape, 1 / len(components)),
        log_ratios=-np.log(np.take_along_axis(shares, drawn.T, 1)).T,
    )


def _asked(
    system: System,
    prompts: Sequence[str | bytes],
    seed: int | None,
    names: Mapping[str, str] | None,
    adaptation: Adaptation | None,
) -> DispatchPosterior:
    components = system.experts.components
    if unknown := set(names or {}) - set(components):
        raise ConfigError(f"expected names for components of {', '.join(components)}, got {sorted(unknown)[0]!r}")
    called = [category_text((names or {}).get(component, component)) for component in components]
    if len(set(called)) < len(called):
        raise ConfigError(f"expected different names of categories, got {called}")
    probabilities = name_probabilities(system.model, system.tokenizer, prompts, called, adaptation)
    return one_hot_draws(probabilities, components, prompt_seeds(seed, check_prompts(prompts)))
