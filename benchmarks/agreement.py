"""How near a dispatcher's posterior is to NUTS: with the globals fixed, and jointly with them.

    python benchmarks/agreement.py                              # an hour on one core, nearly all of it NUTS's
    python benchmarks/agreement.py --only fixed --on shipped --prompts 6
    python benchmarks/agreement.py --quick                      # a smoke test; the numbers mean nothing

``fixed``: the shipped dispatcher on documents, or one fitted to prompts of a known program, with its globals at their
medians. ``joint``: a dispatcher that is recalibrated to tens of prompts of three experts, those of a single expert
labelled, beside NUTS for the globals and the weights of all of them. Serving assumes less of the prior than was fitted
(its shares, and a range of its precision); the last rows assume all that was fitted, as NUTS does, with globals of SVI
and of NUTS itself.
Kolmogorov–Smirnov distances are means over prompts and components. The floor is that of two runs of NUTS of the same
length; prompts on which either has not converged (r-hat ≤ 1.01, bulk ESS ≥ 400) do not count. The guide was trained for
the globals' whole posterior and on real prompts too, so its distance is not all its own error; resampling is done under
the fixed globals. Below a thousandth weights are not told apart by the guide: the last column counts them as ties.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import ks_2samp
from torch.distributions import constraints

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.reference import ReferencePosterior, joint_posterior
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import SUPPORTS, isolated
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import prompt_generators
from bayes_dispatch.dispatcher.guide.guides import GuideSettings
from bayes_dispatch.dispatcher.guide.importance import ImportanceSampler
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence, mixed_evidence, pure_evidence
from dispatching.data import Sizes, simulated

__all__ = ["Data", "Works", "main"]

RESOLUTION = 1e-3
LENGTHS = (16, 256)  # bytes
LENGTH = 64  # bytes of held-out prompts of one expert
JOINT = 3  # experts; NUTS over all globals of four, with twelve dimensions, had not converged (r-hat 3) after 500 draws
DIMENSIONS = 4  # of the hidden view then
LABELLED = 8  # prompts of each of these
PROJECTED = 60  # others of each, that the projections are of
PROPOSALS = 400  # under each draw of the globals
CHAINS = 4


class Data(StrEnum):
    """Where the evidence comes from."""

    SHIPPED = "shipped"
    SIMULATED = "simulated"


class Works(StrEnum):
    """Which posterior is compared."""

    FIXED = "fixed"
    JOINT = "joint"


def of_mixtures_and_experts(mixed: KnownEvidence, pure: KnownEvidence, prompts: int) -> bd.Evidence:
    """The mixtures, and prompts of one expert each up to ``prompts`` in all."""
    rest = np.linspace(0, len(pure.evidence), prompts - len(mixed.evidence), endpoint=False).astype(int)
    return bd.Evidence.concatenate([mixed.evidence, pure.evidence.select(rest)])


def to_serve(data: Data, bundle: bd.Bundle, prompts: int, seed: int, quick: bool) -> tuple[bd.Dispatcher, bd.Evidence]:
    """A fitted dispatcher and held-out evidence, two thirds of it mixtures."""
    count = 2 * prompts // 3
    if data is Data.SHIPPED:
        mixed = mixed_evidence(bundle.model, EXPERT_DOMAINS, count, LENGTHS, "held_out", seed)
        pure = pure_evidence(bundle.model, EXPERT_DOMAINS, 1, (LENGTH, LENGTH), "held_out", seed)
        return bundle.dispatcher, of_mixtures_and_experts(mixed, pure, prompts)
    problem = simulated(seed, Sizes(10, 20, 1, count) if quick else Sizes(mixtures=count))
    dispatcher = bd.Dispatcher(problem.experts, seed, program=problem.program, guide=_guide(quick))
    dispatcher.fit(problem.train.evidence, problem.train.labels, problem.train.mixtures)
    return dispatcher, of_mixtures_and_experts(problem.mixed, problem.pure[LENGTH], prompts)


def to_fit(
    data: Data, bundle: bd.Bundle, prompts: int, seed: int, quick: bool
) -> tuple[bd.Dispatcher, bd.Evidence, np.ndarray]:
    """A dispatcher whose projections are of other prompts, evidence of mixtures and then of labelled prompts, and
    labels, −1 for mixtures.

    A projection looks sharper on the prompts that it was fitted on, where SVI takes out-of-fold features instead; here
    SVI and NUTS are to see the same numbers.
    """
    if data is Data.SHIPPED:
        domains = EXPERT_DOMAINS[:JOINT]
        names: tuple[str, ...] = tuple(domain.name for domain in domains)
        mixed = mixed_evidence(bundle.model, domains, prompts, LENGTHS, "held_out", seed).evidence
        few = pure_evidence(bundle.model, domains, LABELLED, LENGTHS, "train", seed)
        many = pure_evidence(bundle.model, domains, PROJECTED, LENGTHS, "train", seed + 100)
        evidence, labels = few.evidence, few.labels
        others, of_others = many.evidence, many.labels
    else:
        problem = simulated(seed, Sizes(LABELLED + PROJECTED, 1, 1, prompts), JOINT)
        names, mixed = problem.experts, problem.mixed.evidence
        labelled = np.flatnonzero(problem.train.labels >= 0)
        turn = np.arange(len(labelled)) % (LABELLED + PROJECTED)  # among the prompts of an expert
        first, rest = labelled[turn < LABELLED], labelled[turn >= LABELLED]
        evidence, labels = problem.train.evidence.select(first), problem.train.labels[first]
        others, of_others = problem.train.evidence.select(rest), problem.train.labels[rest]
    guide = replace(_guide(quick), tempers=(1.0, 1.0), real_share=0.0)
    features = FeatureSettings(dimensions=DIMENSIONS)
    dispatcher = bd.Dispatcher(names, seed, program=bundle.dispatcher.program, guide=guide, features=features)
    dispatcher.fit(others, of_others)
    return (
        dispatcher,
        bd.Evidence.concatenate([mixed, evidence]),
        np.concatenate([np.full(prompts, -1), labels]),
    )


def fixed(data: Data, bundle: bd.Bundle, prompts: int, draws: int, seed: int, quick: bool) -> Table:
    """Distances to NUTS of the guide alone, of its resampled draws, and of NUTS itself, globals fixed."""
    dispatcher, evidence = to_serve(data, bundle, prompts, seed, quick)
    state = dispatcher.state
    center = {**state.globals.center(), "pi": torch.tensor(dispatcher.prior.mean)}
    sites = {name: value for name, value in center.items() if name != "kappa"}
    nuts, floor = (
        bd.reference_posterior(dispatcher, evidence, draws, CHAINS, draws // 2, seed + run, sites=sites)
        for run in range(2)
    )
    count, names = CHAINS * draws, nuts.experts
    seen = state.prompts(evidence)
    answer = state.answer(seen, dispatcher.prior.mean)
    sampler = ImportanceSampler(state.model, [center], state.temper, dispatcher.guide.kappa)
    weighted = sampler(answer, seen, dispatcher.prior.mean, 8 * count, prompt_generators(seed, len(evidence)))
    found = {
        "NUTS again": floor,
        "guide alone": DispatchPosterior(answer.draw(count, prompt_generators(seed, len(evidence))), names),
        "resampled": DispatchPosterior(weighted.draw(count, prompt_generators(seed + 1, len(evidence)))[0], names),
    }
    note = f"{nuts.divergences.sum()} divergences."
    return _table(f"Distance to NUTS, globals fixed, {data} evidence, seed {seed}", found, nuts, floor, note)


def joint(data: Data, bundle: bd.Bundle, prompts: int, draws: int, seed: int, quick: bool) -> Table:
    """Distances to NUTS over globals and weights, of mixtures beside labelled prompts."""
    before, evidence, labels = to_fit(data, bundle, prompts, seed, quick)
    dispatcher = before.recalibrate(evidence, labels)
    state = dispatcher.state
    seen = replace(state.prompts(evidence), labels=torch.from_numpy(labels))
    nuts, again = (
        joint_posterior(state.model, seen, dispatcher.experts, draws, CHAINS, draws // 2, seed + run, state.temper)
        for run in range(2)
    )
    judged = evidence.select(np.arange(prompts))
    count = CHAINS * draws
    fitted = state.globals.to(torch.float64)
    with isolated(seed, torch.float64):
        alone = [fitted.draw() for _ in range(count)]
    theirs = [{name: torch.as_tensor(nuts.globals[name][row]) for name in alone[0]} for row in range(count)]
    near, rest = (run.select(np.arange(prompts)) for run in (nuts, again))
    found: dict[str, DispatchPosterior] = {
        "NUTS again": rest,
        "guide alone, as served": dispatcher.posterior(judged, count, seed),
        "resampled, as served": dispatcher.posterior(judged, count, seed, resample=True, proposals=8 * count),
    }
    for name, drawn in (("SVI", alone), ("NUTS", theirs)):
        found[f"resampled, all globals by {name}"] = given_globals(state, judged, near.experts, drawn, seed)
    note = (
        f"Mixtures, beside {len(evidence) - prompts} labelled prompts. {nuts.divergences[0]} divergences. Globals "
        f"against NUTS (sds between means, ratio of sds), by SVI: {_apart(alone, nuts.globals)}."
    )
    return _table(f"Distance to NUTS, joint with the globals, {data} evidence, seed {seed}", found, near, rest, note)


def given_globals(
    state: FittedDispatcher,
    evidence: bd.Evidence,
    experts: tuple[str, ...],
    drawn: Sequence[Mapping[str, torch.Tensor]],
    seed: int,
) -> DispatchPosterior:
    """One draw of the weights of each prompt under each draw of the globals, its own shares and precision included."""
    prompts, count = state.prompts(evidence), len(evidence)
    weights = []
    for row, sites in enumerate(drawn):
        kappa, shares = float(sites["kappa"]), sites["pi"].double().numpy()
        sampler = ImportanceSampler(state.model, [sites], state.temper, (kappa, kappa))
        own = prompt_generators(seed + row, count)
        weighted = sampler(state.answer(prompts, shares), prompts, shares, PROPOSALS, own)
        weights.append(weighted.draw(1, own)[0])
    return DispatchPosterior(np.concatenate(weights), experts)


def _apart(drawn: Sequence[Mapping[str, torch.Tensor]], nuts: Mapping[str, np.ndarray]) -> str:
    """By site the mean distance from NUTS's means, in its sds, and mean ratio of sds; logs of what is positive."""
    parts = []
    for name in drawn[0]:
        ours, theirs = np.stack([each[name].double().numpy() for each in drawn]), nuts[name]
        if SUPPORTS.get(name.rpartition("_")[2]) is not constraints.real:
            ours, theirs = np.log(ours + 1e-9), np.log(theirs + 1e-9)
        spread = theirs.std(0)
        off, width = np.abs(ours.mean(0) - theirs.mean(0)) / spread, ours.std(0) / spread
        parts.append(f"{name} {off.mean():.2f}, {width.mean():.2f}")
    return "; ".join(parts)


def _table(
    title: str,
    found: Mapping[str, DispatchPosterior],
    nuts: ReferencePosterior,
    again: ReferencePosterior,
    note: str,
) -> Table:
    """Distances on the prompts on which both runs of NUTS converged."""
    kept = np.flatnonzero(nuts.converged & again.converged)
    rows = []
    for name, posterior in found.items():
        pair = posterior.weights[:, kept], nuts.weights[:, kept]
        near, resolved = (f"{_distance(*pair, least):.3f}" if len(kept) else "–" for least in (0.0, RESOLUTION))
        rows.append([name, near, resolved])
    columns = ["posterior", "KS to NUTS", "KS, small weights tied"]
    left = f"{len(nuts) - len(kept)} of {len(nuts)} prompts had not converged under NUTS and do not count."
    return Table(title, columns, rows, f"{left} {note}")


def _distance(draws: np.ndarray, others: np.ndarray, resolution: float) -> float:
    """Mean Kolmogorov–Smirnov distance over prompts and components, weights below the resolution tied."""
    a, b = (np.clip(weights, resolution, 1 - resolution) for weights in (draws, others))
    pairs = ((n, k) for n in range(a.shape[1]) for k in range(a.shape[2]))
    return float(np.mean([ks_2samp(a[:, n, k], b[:, n, k], method="asymp").statistic for n, k in pairs]))


def _guide(quick: bool) -> GuideSettings:
    return GuideSettings(simulations=500, steps=20) if quick else GuideSettings()


def main(
    prompts: Annotated[int, typer.Option(help="two thirds mixtures; jointly, the mixtures alone", min=3)] = 15,
    draws: Annotated[int, typer.Option(help="of each chain, after half as many of warm-up", min=4)] = 1000,
    seeds: Annotated[int, typer.Option(help="how many seeds", min=1)] = 1,
    first_seed: Annotated[int, typer.Option(help="the first of them", min=0)] = 1,
    only: Annotated[Works | None, typer.Option(help="one of the two; both by default")] = None,
    on: Annotated[Data | None, typer.Option(help="one kind of evidence; both by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test")] = False,
) -> None:
    """Print distances to NUTS as Markdown tables."""
    torch.set_num_threads(1)
    work = {Works.FIXED: fixed, Works.JOINT: joint}
    if quick:
        prompts, draws = 3, 4
    bundle = bd.load_bundle()
    for name in [only] if only else Works:
        for data in [on] if on else Data:
            for seed in range(first_seed, first_seed + seeds):
                print(f"{work[name](data, bundle, prompts, draws, seed, quick).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
