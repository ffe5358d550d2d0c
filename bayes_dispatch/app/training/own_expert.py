"""Experts from a user's own texts, in a bundle whose dispatcher is fitted again to know them.

The dispatcher is fitted on evidence of all experts. What the project makes itself is made again; of experts from a
user's earlier texts, which are not kept, the bundle holds the evidence.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.app.training.build import kept_at
from bayes_dispatch.arguments import set_whole
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.pipeline import TrainingSet
from bayes_dispatch.errors import ConfigError, RewardError, TensorError, UnknownNameError
from bayes_dispatch.experts.bank import ExpertBank
from bayes_dispatch.experts.domains import BASE_TEXTS, EXPERT_DOMAINS, Checked, Domain
from bayes_dispatch.experts.domains.mixtures import shortest_and_longest
from bayes_dispatch.experts.domains.own import OwnPrompts, Reward, Rewarded
from bayes_dispatch.experts.domains.own_files import read_jsonl, read_prompts, read_text
from bayes_dispatch.experts.lora import LoraExpert
from bayes_dispatch.experts.objectives import Likelihood, Objective, Reinforce
from bayes_dispatch.experts.training import EarlyStopping, ExpertSettings, train_expert
from bayes_dispatch.experts.vectors import ExpertVector, check_expert_name
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence, base_evidence, mixed_evidence, pure_evidence
from bayes_dispatch.inference.two_pass.first_pass import first_pass

__all__ = [
    "RefitSettings",
    "add_experts",
    "check_every_expert",
    "check_texts",
    "check_trainable",
    "import_reward",
    "kept_expert",
    "objective_by_name",
    "own_settings",
    "read_domain",
    "train_own_expert",
    "with_dispatcher",
]


@dataclass(frozen=True, kw_only=True)
class RefitSettings:
    """How much evidence the dispatcher is fitted on again: as in a ``TrainingPlan``.

    Attributes:
        pure_prompts: of each expert. mixed_prompts: of known mixture. prompt_lengths: shortest and longest, in bytes.
        seed: of the prompts and of the fit.

    Raises:
        ConfigError: a number that is not whole, or outside its bounds.
    """

    pure_prompts: int = 150
    mixed_prompts: int = 500
    prompt_lengths: tuple[int, int] = (16, 1024)
    seed: int = 0

    def __post_init__(self) -> None:
        set_whole(self, pure_prompts=1, mixed_prompts=1)
        object.__setattr__(self, "prompt_lengths", shortest_and_longest("prompt_lengths", self.prompt_lengths))


def objective_by_name(name: str, *, kl: float, answer_bytes: int) -> Objective:
    """The objective that the command line calls by a name, with the settings that it reads.

    Raises:
        UnknownNameError: a name that is none of these. ConfigError: settings outside their ranges.
    """
    makers: dict[str, Callable[[], Objective]] = {
        "likelihood": Likelihood,
        "reinforce": lambda: Reinforce(kl=kl, answer_bytes=answer_bytes),
    }
    if name not in makers:
        raise UnknownNameError(f"expected an objective of {', '.join(makers)}, got {name!r}")
    return makers[name]()


def own_settings(objective: Objective, steps: int | None, seed: int) -> ExpertSettings:
    """The recipe for a user's text: at most ``steps``, 160 by default, fewer where its end is no longer learnt."""
    stopping = EarlyStopping(every=10, patience=5, documents=48, split="held_out")
    return ExpertSettings(steps=160 if steps is None else steps, seed=seed, objective=objective, stopping=stopping)


def read_domain(name: str, text: Path | None, jsonl: Path | None, reward: Reward | None, longest: int) -> Checked:
    """The domain of a user's file.

    Args:
        name: of the expert. text, jsonl: one of them is a file. reward: judges answers, to prompts of the file.
        longest: most bytes of a prompt with its answer.

    Raises:
        ConfigError: not one file, one that cannot be used, or prompts without answers and reward.
    """
    if (text is None) == (jsonl is None):
        raise ConfigError(f"expected either a text or a jsonl file, got {'none' if text is None else 'both'}")
    if jsonl is not None:
        domain: Checked = read_jsonl(name, jsonl, longest)
    else:
        assert text is not None
        domain = read_text(name, text) if reward is None else read_prompts(name, text, longest)
    if reward is not None:
        return Rewarded(domain, reward)
    if isinstance(domain, OwnPrompts):
        raise ConfigError(f'expected an "answer" in each line of {jsonl}, or a reward function, got neither')
    return domain


def import_reward(path: str) -> Reward:
    """The function ``package:function``: this imports, and so runs, code that the user names. Nothing else here does.

    Raises:
        RewardError: there is no such module or function.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise RewardError(f"expected a reward as package:function, got {path!r}")
    try:
        found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:
        raise RewardError(f"expected an importable reward {path}, got {type(error).__name__}: {error}") from error
    if not callable(found):
        raise RewardError(f"expected a function {path}, got a {type(found).__name__}")
    return found


def train_own_expert(
    bundle: Bundle, domain: Domain, settings: ExpertSettings, progress: bool = False
) -> ExpertVector | LoraExpert:
    """An expert for the bundle's base model: scales of what the bundle's experts scale, or LoRA where none does.

    Args:
        bundle: whose model it is for. domain: named as the expert. settings: the recipe, whatever its kind.
        progress: show a progress bar.

    Raises:
        ConfigError: the domain cannot serve the objective, or no expert can have its name.
        RewardError: the user's function fails.
    """
    check_trainable(domain, settings.objective)
    scaled = bundle.experts.matrices
    settings = replace(settings, kind="svf" if scaled else "lora")
    return train_expert(bundle.model, domain, settings, progress, scaled or None)


def kept_expert(
    bundle: Bundle, domain: Domain, settings: ExpertSettings, out: Path, progress: bool = False
) -> ExpertVector | LoraExpert:
    """``train_own_expert``, whose expert is kept in ``OUT.work``, where a run that was stopped goes on.

    Args:
        bundle, settings, progress: as there. domain: of a user's file. out: directory of the new bundle.
    """
    own: dict[str, Any] = {"domain": asdict(cast(Any, domain)), "experts": asdict(settings)}
    inputs = {**own, "model": bundle.model.fingerprint(), "matrices": dict(bundle.experts.matrices)}
    directory = kept_at(out, inputs, "experts", domain.name)
    if not directory.exists():
        ExpertBank([train_own_expert(bundle, domain, settings, progress)]).save(directory)
    return ExpertBank.load(directory)[domain.name]


def check_trainable(domain: Domain, objective: Objective) -> None:
    """Raise ``ConfigError`` where the domain cannot serve the objective, or no expert can have its name."""
    check_expert_name(domain.name)
    if isinstance(domain, Rewarded) and not isinstance(objective, Reinforce):
        raise ConfigError(f"expected the objective reinforce for a reward, got {type(objective).__name__.lower()}")


def add_experts(
    bundle: Bundle,
    new: Mapping[str, tuple[ExpertVector | LoraExpert, Domain]],
    keep: Collection[str],
    settings: RefitSettings,
    progress: bool = False,
    announce: Callable[[str], object] = lambda text: None,
) -> Bundle:
    """A bundle with new experts, or others of the same names; its dispatcher is fitted to all of them, once.

    Args:
        bundle: what there is. new: name → expert and its text. keep: experts of the bundle that stay.
        settings: evidence to fit on. progress: show progress bars. announce: called with a line of text where evidence
            is lacking.

    Raises:
        ConfigError: there is neither text nor evidence of one of the experts.
    """
    check_texts(bundle, [name for name in keep if name not in new])
    model, lengths, seed = bundle.model, settings.prompt_lengths, settings.seed
    bank = bundle.experts
    for expert, _ in new.values():
        bank = bank.with_expert(expert)
    for name in [name for name in bundle.experts.names if name not in new and name not in keep]:
        bank = bank.without(name)
    kept = {name: evidence for name, evidence in bundle.evidence.items() if name in keep and name not in new}
    builtin = {known.name: known for known in EXPERT_DOMAINS}
    texts: dict[str, Domain] = {
        name: new[name][1] if name in new else builtin[bank.metadata[name]["domain"]]
        for name in bank.names
        if name not in kept
    }
    if kept:
        announce(
            f"without mixed prompts of {', '.join(kept)}: the bundle has evidence of single prompts, not their text"
        )
    cut = model.cut(bank.adapts)
    count, domains, places = len(bank.names), list(texts.values()), [bank.names.index(name) for name in texts]
    pure = pure_evidence(model, domains, settings.pure_prompts, lengths, "train", seed, progress, cut)
    parts = [pure.among(places, count)]
    if len(domains) > 1:
        mixed = mixed_evidence(model, domains, settings.mixed_prompts, lengths, "train", seed, progress, cut)
        parts.append(mixed.among(places, count))
    parts.append(base_evidence(model, BASE_TEXTS, count, settings.pure_prompts, lengths, "train", seed, cut))
    parts += [_labelled(evidence, bank.names.index(name), count) for name, evidence in kept.items()]
    own = {name: pure.evidence.select(pure.labels == list(texts).index(name)) for name in new}
    known = KnownEvidence.concatenate(parts)
    dispatcher = _fitted(bundle.dispatcher, bank.names, known.evidence, known.labels, known.mixtures, seed, progress)
    return Bundle(model, bank, dispatcher, evidence=kept | own, default_dtype=bundle.default_dtype)


def with_dispatcher(
    bundle: Bundle,
    evidence: Evidence,
    labels: np.ndarray | None,
    mixtures: np.ndarray | None,
    seed: int,
    progress: bool = False,
) -> Bundle:
    """The bundle with a dispatcher that is fitted to other evidence; without its gate, which knew the old one.

    Raises:
        TensorError: evidence that the bundle's first pass does not give. ConfigError: none of one of the experts.
    """
    seen = first_pass(bundle.model, bundle.tokenizer, ["a"], cut=bundle.cut).evidence
    for name, view in evidence.views.items():
        if name not in seen.views or view.shape[1] != seen.views[name].shape[1]:
            widths = ", ".join(f"{name} (N, {view.shape[1]})" for name, view in seen.views.items())
            raise TensorError(
                f"expected evidence as this bundle's first pass gives it, {widths}; got {name} {view.shape}"
            )
    names = bundle.experts.names
    weights = TrainingSet.of(evidence, labels, mixtures, names).targets[:, :-1]
    check_every_expert(dict(zip(names, (weights > 0).sum(0).tolist(), strict=True)))
    dispatcher = _fitted(bundle.dispatcher, names, evidence, labels, mixtures, seed, progress)
    return replace(bundle, dispatcher=dispatcher, gate=None, report={})


def check_every_expert(prompts: Mapping[str, int]) -> None:
    """Refuse to fit on prompts of some experts alone: those of the others would go to these, without a doubt.

    Args:
        prompts: how many are known to be of each expert.

    Raises:
        ConfigError: none of one of them.
    """
    if not all(prompts.values()):
        counts = ", ".join(f"{count} of {name}" for name, count in prompts.items())
        raise ConfigError(f"expected prompts of every expert, got {counts}")


def check_texts(bundle: Bundle, kept: Collection[str]) -> None:
    """Refuse experts of which there is neither text nor evidence to fit a dispatcher on."""
    builtin = {known.name for known in EXPERT_DOMAINS}
    for name in kept:
        if name not in bundle.evidence and bundle.experts.metadata[name].get("domain") not in builtin:
            raise ConfigError(f"expected text or evidence of every expert to fit the dispatcher, got none of {name}")


def _fitted(
    old: Dispatcher,
    names: Sequence[str],
    evidence: Evidence,
    labels: np.ndarray | None,
    mixtures: np.ndarray | None,
    seed: int,
    progress: bool,
) -> Dispatcher:
    """A dispatcher with the settings of another."""
    new = Dispatcher(names, seed, old.svi, old.features, old.program)
    return new.fit(evidence, labels, mixtures, progress=progress)


def _labelled(evidence: Evidence, label: int, experts: int) -> KnownEvidence:
    """Evidence of one expert's prompts."""
    count = len(evidence)
    return KnownEvidence(evidence, np.full(count, label), np.full((count, experts + 1), np.nan))
