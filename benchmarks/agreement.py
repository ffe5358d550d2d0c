"""How near a dispatcher's posterior is to NUTS: with the globals fixed, and jointly with them.

    python benchmarks/agreement.py                              # an hour on one core, nearly all of it NUTS's
    python benchmarks/agreement.py --only fixed --on shipped --prompts 6
    python benchmarks/agreement.py --quick                      # a smoke test; the numbers mean nothing

``fixed``: the shipped dispatcher on documents, or one fitted to prompts of a known program. NUTS draws from the program
as it is served, with the globals at their medians. The quadrature under the same globals differs by its cells alone;
what is served sums the globals up over their posterior as well.

``joint``: globals that are fitted to tens of prompts of three experts, those of a single expert labelled, beside NUTS
for the globals and the weights of all of them, under the prior that is fitted. All rows are of the served prior: the
reference is the mean of the quadrature's posteriors under some draws of NUTS's globals. That under draws of SVI's
globals shows what SVI gets wrong of them; what is served, how much it matters besides that their means and variances
stand for them.

Kolmogorov–Smirnov distances are means over prompts and components. The floor is that of two runs of NUTS of the same
length; prompts on which either has not converged (r-hat ≤ 1.01, bulk ESS ≥ 400) do not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import ks_2samp
from torch.distributions import constraints

import bayes_dispatch as bd
from bayes_dispatch.app.tables import Table
from bayes_dispatch.checks.reference import joint_posterior
from bayes_dispatch.dispatcher.evidence.projection import FeatureSettings
from bayes_dispatch.dispatcher.exact.cells import prompt_generators
from bayes_dispatch.dispatcher.exact.densities import ViewDensity
from bayes_dispatch.dispatcher.fitting.svi import SUPPORTS, fit_globals, isolated
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.inference.scoring.evidence_sets import KnownEvidence, mixed_evidence, pure_evidence
from dispatching.data import Sizes, simulated

__all__ = ["Data", "Works", "main", "summed_out"]

LENGTHS = (16, 256)  # bytes
LENGTH = 64  # bytes of held-out prompts of one expert
JOINT = 3  # experts; NUTS over all globals of four, with twelve dimensions, had not converged (r-hat 3) after 500 draws
DIMENSIONS = 4  # of the hidden view then
LABELLED = 8  # prompts of each of these
PROJECTED = 60  # others of each, that the projections are of
GLOBALS = 40  # draws of them that posteriors are averaged over
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


def to_serve(data: Data, prompts: int, seed: int, quick: bool) -> tuple[bd.Dispatcher, bd.Evidence]:
    """A fitted dispatcher and held-out evidence, two thirds of it mixtures."""
    count = 2 * prompts // 3
    if data is Data.SHIPPED:
        bundle = bd.load_bundle()
        mixed = mixed_evidence(bundle.model, EXPERT_DOMAINS, count, LENGTHS, "held_out", seed)
        pure = pure_evidence(bundle.model, EXPERT_DOMAINS, 1, (LENGTH, LENGTH), "held_out", seed)
        return bundle.dispatcher, of_mixtures_and_experts(mixed, pure, prompts)
    problem = simulated(seed, Sizes(10, 20, 1, count) if quick else Sizes(mixtures=count))
    dispatcher = bd.Dispatcher(problem.experts, seed, program=problem.program)
    dispatcher.fit(problem.train.evidence, problem.train.labels, problem.train.mixtures)
    return dispatcher, of_mixtures_and_experts(problem.mixed, problem.pure[LENGTH], prompts)


def to_fit(data: Data, prompts: int, seed: int) -> tuple[bd.Dispatcher, bd.Evidence, np.ndarray]:
    """A dispatcher whose projections are of other prompts, evidence of mixtures and then of labelled prompts, and
    labels, −1 for mixtures.

    A projection looks sharper on the prompts that it was fitted on, where SVI takes out-of-fold features instead; here
    SVI and NUTS are to see the same numbers.
    """
    if data is Data.SHIPPED:
        bundle = bd.load_bundle()
        program, domains = bundle.dispatcher.program, EXPERT_DOMAINS[:JOINT]
        names: tuple[str, ...] = tuple(domain.name for domain in domains)
        mixed = mixed_evidence(bundle.model, domains, prompts, LENGTHS, "held_out", seed).evidence
        few = pure_evidence(bundle.model, domains, LABELLED, LENGTHS, "train", seed)
        many = pure_evidence(bundle.model, domains, PROJECTED, LENGTHS, "train", seed + 100)
        evidence, labels = few.evidence, few.labels
        others, of_others = many.evidence, many.labels
    else:
        problem = simulated(seed, Sizes(LABELLED + PROJECTED, 1, 1, prompts), JOINT)
        program, names, mixed = problem.program, problem.experts, problem.mixed.evidence
        labelled = np.flatnonzero(problem.train.labels >= 0)
        turn = np.arange(len(labelled)) % (LABELLED + PROJECTED)  # among the prompts of an expert
        first, rest = labelled[turn < LABELLED], labelled[turn >= LABELLED]
        evidence, labels = problem.train.evidence.select(first), problem.train.labels[first]
        others, of_others = problem.train.evidence.select(rest), problem.train.labels[rest]
    features = FeatureSettings(dimensions=DIMENSIONS)
    dispatcher = bd.Dispatcher(names, seed, program=replace(program, temper=1.0), features=features)
    dispatcher.fit(others, of_others)
    return (
        dispatcher,
        bd.Evidence.concatenate([mixed, evidence]),
        np.concatenate([np.full(prompts, -1), labels]),
    )


def fixed(data: Data, prompts: int, draws: int, seed: int, quick: bool) -> Table:
    """Distances to NUTS of the quadrature, of what is served, and of NUTS itself, globals fixed."""
    dispatcher, evidence = to_serve(data, prompts, seed, quick)
    nuts, again = (
        bd.reference_posterior(dispatcher, evidence, draws, CHAINS, draws // 2, seed + run) for run in range(2)
    )
    count = CHAINS * draws
    found = {
        "NUTS again": again,
        "quadrature, the same globals": summed_out(
            dispatcher, evidence, [dispatcher.state.globals.center()], count, seed
        ),
        "served": dispatcher.posterior(evidence, count, seed),
    }
    note = f"{nuts.divergences.sum()} divergences."
    title = f"Distance to NUTS, globals fixed, {data} evidence, seed {seed}"
    return _table(title, found, nuts, nuts.converged & again.converged, note)


def joint(data: Data, prompts: int, draws: int, seed: int) -> Table:
    """Distances to the served posterior under NUTS's globals, of mixtures beside labelled prompts."""
    dispatcher, evidence, labels = to_fit(data, prompts, seed)
    state, known = dispatcher.state, torch.from_numpy(labels)
    seen = replace(state.prompts(evidence), labels=known)
    given = replace(seen.to(dispatcher.svi.dtype), labels=known)
    state = replace(state, globals=fit_globals(state.model, given, dispatcher.svi, seed)[0])
    nuts, again = (
        joint_posterior(state.model, seen, dispatcher.experts, draws, CHAINS, draws // 2, seed + run, state.temper)
        for run in range(2)
    )
    judged, count = evidence.select(np.arange(prompts)), CHAINS * draws
    fitted = state.globals.to(torch.float64)
    with isolated(seed, torch.float64):
        alone = [fitted.draw() for _ in range(count)]
    rows = np.linspace(0, count - 1, min(GLOBALS, count)).astype(int)
    first, second = (
        [{name: torch.tensor(values[row]) for name, values in run.globals.items()} for row in rows]
        for run in (nuts, again)
    )
    under = {
        "NUTS": first,
        "globals of NUTS again": second,
        "globals of SVI": [alone[row] for row in rows],
    }
    found = {name: summed_out(dispatcher, judged, drawn, count, seed) for name, drawn in under.items()}
    reference = found.pop("NUTS")
    served = state.answer(state.prompts(judged), state.labels(dispatcher.prior.mean))
    weights = served.draw(count, prompt_generators(seed, prompts))[0]
    found["served"] = DispatchPosterior(weights, (*dispatcher.experts, "base"))
    note = (
        f"Mixtures, beside {len(evidence) - prompts} labelled prompts. {nuts.divergences[0]} divergences. Globals "
        f"against NUTS (sds between means, ratio of sds), by SVI: {_apart(alone, nuts.globals)}."
    )
    title = f"Distance to the posterior under NUTS's globals, {data} evidence, seed {seed}"
    return _table(title, found, reference, (nuts.converged & again.converged)[:prompts], note)


def summed_out(
    dispatcher: bd.Dispatcher,
    evidence: bd.Evidence,
    globals_: Sequence[Mapping[str, torch.Tensor]],
    count: int,
    seed: int,
) -> DispatchPosterior:
    """``count`` draws from the mean of the quadrature's posteriors under each of some globals."""
    state = dispatcher.state
    prompts, shares = state.prompts(evidence), state.labels(dispatcher.prior.mean)
    weights = []
    for row, (sites, turn) in enumerate(zip(globals_, np.array_split(np.arange(count), len(globals_)), strict=True)):
        densities = ViewDensity.of_views(state.model.views, [sites], state.temper)
        cells = replace(state.quadrature, densities=densities)(prompts, shares)
        weights.append(cells.draw(len(turn), prompt_generators(seed + row, len(evidence)))[0])
    return DispatchPosterior(np.concatenate(weights), (*dispatcher.experts, "base"))


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
    title: str, found: Mapping[str, DispatchPosterior], reference: DispatchPosterior, converged: np.ndarray, note: str
) -> Table:
    """Distances to a reference on the prompts on which both runs of NUTS converged."""
    kept, rows = np.flatnonzero(converged), []
    for name, posterior in found.items():
        pair = posterior.weights[:, kept], reference.weights[:, kept]
        if len(kept):
            far, apart = ks_2samp(*pair, axis=0, method="asymp").statistic, np.abs(pair[0].mean(0) - pair[1].mean(0))
            rows.append([name, *(f"{each:.3f}" for each in (far.mean(), far.max(), apart.mean()))])
        else:
            rows.append([name, "–", "–", "–"])
    columns = ["posterior", "KS", "largest KS", "means apart"]
    left = f"{len(converged) - len(kept)} of {len(converged)} prompts had not converged under NUTS and do not count."
    return Table(title, columns, rows, f"{left} {note}")


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
    work = {Works.FIXED: partial(fixed, quick=quick), Works.JOINT: joint}
    if quick:
        prompts, draws = 3, 4
    for name in [only] if only else Works:
        for data in [on] if on else Data:
            for seed in range(first_seed, first_seed + seeds):
                print(f"{work[name](data, prompts, draws, seed).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
