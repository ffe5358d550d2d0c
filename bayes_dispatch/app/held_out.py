"""Held-out text of a bundle's experts: the project's own, and what a user gives of the experts from files of theirs."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from bayes_dispatch.app.bundle import Bundle
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.gate import FEWEST_PROMPTS, Gate
from bayes_dispatch.errors import ConfigError, UnknownNameError
from bayes_dispatch.experts.domains import EXPERT_DOMAINS, Domain, real_domains
from bayes_dispatch.experts.domains.mixtures import beginning_of
from bayes_dispatch.experts.domains.own import Own
from bayes_dispatch.experts.domains.own_files import read_jsonl, read_text
from bayes_dispatch.inference.scoring.evidence_sets import (
    KnownEvidence,
    calibration_evidence,
    evidence_of_texts,
    log_uniform,
)

__all__ = ["FEWEST_SEVERAL", "calibrated", "check_owners", "held_out_domains", "read_own", "settled"]

LONGEST = 4096  # bytes of a prompt with its answer, unless told otherwise
FEWEST_SEVERAL = 25  # held-out prompts of several experts: the gate ranks three in four, and a rate of .05 takes 19


def held_out_domains(bundle: Bundle, own: Mapping[str, Domain], packages: Path | None = None) -> dict[str, Domain]:
    """Where held-out prompts of each expert are from, in the order of the experts; others have none.

    Args:
        bundle: an expert of it that has kept evidence is from a user's file, whatever its name. own: text of such
            experts, by their names; it wins over the project's. packages: where pip put those of real documents, if
            experts of these are in the bundle: see ``experts.domains.real_domains``.

    Raises:
        UnknownNameError: text of an expert that the bundle does not have.
    """
    names = bundle.experts.names
    check_owners(own, names)
    builtin = {domain.name: domain for domain in EXPERT_DOMAINS}
    builtin |= {} if packages is None else real_domains(packages)
    found: dict[str, Domain] = {}
    for name in names:
        trained_on = bundle.experts.metadata[name].get("domain", "")
        if name in own:
            found[name] = own[name]
        elif name not in bundle.evidence and trained_on in builtin:
            found[name] = builtin[trained_on]
    return found


def check_owners(own: Iterable[str], names: Sequence[str]) -> None:
    """Raise ``UnknownNameError`` for text of an expert that is none of these."""
    if unknown := sorted(set(own) - set(names)):
        raise UnknownNameError(f"expected text of the experts {', '.join(names)}, got some of {', '.join(unknown)}")


def read_own(texts: Mapping[str, Path], jsonl: Mapping[str, Path], longest: int = LONGEST) -> dict[str, Domain]:
    """Domains of files, by their names; the last tenth of each is its held-out split.

    Args:
        texts: UTF-8 texts. jsonl: lines of ``{"prompt": …, "answer": …}``, or of prompts alone.
        longest: most bytes of a prompt with its answer.

    Raises:
        ConfigError: a text and lines of one name, or a file that cannot be used.
    """
    if twice := sorted(texts.keys() & jsonl.keys()):
        raise ConfigError(f"expected one file of each expert, got two of {twice[0]}")
    found: dict[str, Domain] = {name: read_text(name, path) for name, path in texts.items()}
    return found | {name: read_jsonl(name, path, longest) for name, path in jsonl.items()}


def calibrated(
    bundle: Bundle,
    own: Mapping[str, Domain],
    pure: int,
    mixed: int,
    lengths: tuple[int, int],
    seed: int,
    progress: bool = False,
    packages: Path | None = None,
) -> Bundle:
    """The bundle with gate, and guarantees of intervals and sets, by new held-out prompts.

    Args:
        bundle: what there is. own: text of experts from a user's files, by their names.
        pure: prompts of each expert's domain. mixed: prompts of several. Of both there are fewer where a user's file
            is short: no part of it is in two of one kind, and no expert has more prompts than another.
        lengths: shortest and longest, in bytes.
        seed: of the prompts and of their split. progress: show progress bars.
        packages: as in :func:`held_out_domains`.

    Raises:
        UnknownNameError: text of an expert that the bundle does not have.
        ConfigError: no text of one that it has: its prompts would be foreign to the gate. Or too little. Or a flat
            dispatcher.
    """
    if not bundle.dispatcher.views:
        raise ConfigError("expected a dispatcher that was fitted on examples, got a flat one: see fit --examples")
    domains = held_out_domains(bundle, own, packages)
    if missing := [name for name in bundle.experts.names if name not in domains]:
        raise ConfigError(f"expected held-out text of every expert, got none of {', '.join(missing)}")
    if any(isinstance(domain, Own) for domain in domains.values()):
        known = _each_once(bundle, domains, pure, mixed, lengths, seed, progress)
    else:
        texts = list(domains.values())
        known = calibration_evidence(bundle.model, texts, pure, mixed, lengths, seed, progress, bundle.cut)
    dispatcher, gate = settled(bundle.dispatcher, known, seed)
    return replace(bundle, dispatcher=dispatcher, gate=gate)


def _each_once(
    bundle: Bundle,
    domains: Mapping[str, Domain],
    pure: int,
    mixed: int,
    lengths: tuple[int, int],
    seed: int,
    progress: bool,
) -> KnownEvidence:
    """Prompts of which no two of one kind share a part of a user's file, as many of one expert as of another."""
    rng, texts = np.random.default_rng([seed, 1]), dict[str, list[str]]()
    sizes = iter(lambda: log_uniform(rng, lengths), None)
    for name, domain in domains.items():
        if isinstance(domain, Own):
            once = domain.once(sizes, "held_out")
        else:
            once = (beginning_of(domain.document(rng, 0, size, "held_out").text, size) for size in sizes)
        texts[name] = list(islice(once, max(pure, 3 * mixed // len(domains))))
    shortest = min(texts, key=lambda name: len(texts[name]))
    count = len(texts[shortest])
    own = [of_one[:count] for of_one in texts.values()]
    known = evidence_of_texts(bundle.model, own, pure, mixed, None, seed, progress, bundle.cut)
    found, several = len(known.labels), len(known.several.labels)
    if found < FEWEST_PROMPTS or several < FEWEST_SEVERAL:
        raise ConfigError(
            f"expected held-out text for {FEWEST_PROMPTS} prompts, {FEWEST_SEVERAL} of them of several experts, got "
            f"enough for {found} and {several}: the last tenth of {shortest}'s file gives {count}, and no expert has "
            "more; give a longer file, or a smaller --longest"
        )
    return known


def settled(dispatcher: Dispatcher, known: KnownEvidence, seed: int) -> tuple[Dispatcher, Gate]:
    """The dispatcher with the guarantees of held-out prompts, and a gate for it.

    Intervals are calibrated on prompts of several domains: of one, truth is held more easily.
    """
    several = known.several
    dispatcher = copy(dispatcher).calibrate(several.evidence, mixtures=several.mixtures, seed=seed)
    return dispatcher, Gate.calibrate(dispatcher, known.evidence, known.groups, seed=seed)
