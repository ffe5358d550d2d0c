"""How near a dispatcher's posterior is to NUTS: the shipped one's with the globals fixed, and jointly with them.

    python benchmarks/agreement.py                  # ten minutes on one core, nearly all of them NUTS's
    python benchmarks/agreement.py --prompts 6 --only fixed

``fixed``: the shipped dispatcher, with its globals at their medians. ``joint``: a dispatcher that is fitted to tens of
documents of four domains, those of a single domain labelled, beside NUTS for the globals and the weights of all of
them. Serving assumes less than was fitted of the prior (its shares, and a range of its precision); the last row assumes
what was fitted, as NUTS does.

Kolmogorov–Smirnov distances are means over prompts and components. The floor is that of two runs of NUTS of the same
length. The guide was trained for the globals' whole posterior and on real prompts too, so its distance is not all its
own error; resampling is done under the fixed globals. Below a thousandth weights are not told apart by the guide: the
last column counts them as ties.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import ks_2samp

import bayes_dispatch as bd
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.guides import GuideSettings
from bayes_dispatch.importance import ImportanceSampler, draw_resampled
from bayes_dispatch.inference.evidence_sets import mixed_evidence, pure_evidence
from bayes_dispatch.keys import prompt_keys
from bayes_dispatch.posterior import DispatchPosterior
from bayes_dispatch.reference import joint_posterior
from bayes_dispatch.tables import Table

RESOLUTION = 1e-3
LENGTHS = (16, 256)  # bytes
JOINT = EXPERT_DOMAINS[:4]  # NUTS over all globals of more experts takes hours
LABELLED = 8  # documents of each of these
CHAINS = 4


def fixed(bundle: bd.Bundle, prompts: int, draws: int, seed: int) -> Table:
    """Distances to NUTS of the guide alone, of its resampled draws, and of NUTS itself, globals fixed."""
    dispatcher, state = bundle.dispatcher, bundle.dispatcher.state
    mixed = mixed_evidence(bundle.model, EXPERT_DOMAINS, 2 * prompts // 3, LENGTHS, "held_out", seed)
    pure = pure_evidence(bundle.model, EXPERT_DOMAINS, 1, (64, 64), "held_out", seed)
    rest = prompts - len(mixed.evidence)
    evidence = bd.Evidence.concatenate([mixed.evidence, pure.evidence.select(np.arange(rest) % len(EXPERT_DOMAINS))])
    center = {**state.globals.center(), "pi": torch.tensor(dispatcher.prior.mean)}
    sites = {name: value for name, value in center.items() if name != "kappa"}
    nuts, floor = (
        bd.reference_posterior(dispatcher, evidence, draws, CHAINS, draws, seed + run, sites=sites) for run in range(2)
    )
    count, names = CHAINS * draws, nuts.experts
    seen = state.prompts(evidence)
    answer = state.answer(seen, dispatcher.prior.mean)
    keys = prompt_keys(seed, len(evidence))
    sampler = ImportanceSampler(state.model, [center], state.temper, dispatcher.guide.kappa)
    weighted = sampler(answer, seen, dispatcher.prior.mean, 8 * count, keys)
    found = {
        "NUTS again": floor,
        "guide alone": DispatchPosterior(answer.draw(count, keys), names),
        "resampled": DispatchPosterior(draw_resampled(weighted, count, prompt_keys(seed + 1, len(evidence))), names),
    }
    note = f"{prompts} prompts; NUTS: r-hat at most {np.nanmax(nuts.r_hat):.3f}, {nuts.divergences.sum()} divergences."
    return _table("Distance to NUTS, globals fixed", found, nuts, note)


def joint(bundle: bd.Bundle, prompts: int, draws: int, seed: int) -> Table:
    """Distances to NUTS over globals and weights, of mixed documents beside labelled ones of four domains."""
    names = tuple(domain.name for domain in JOINT)
    mixed = mixed_evidence(bundle.model, JOINT, prompts, LENGTHS, "held_out", seed)
    pure = pure_evidence(bundle.model, JOINT, LABELLED, LENGTHS, "train", seed)
    evidence = bd.Evidence.concatenate([mixed.evidence, pure.evidence])
    labels = np.concatenate([np.full(prompts, -1), pure.labels])
    guide = GuideSettings(tempers=(1.0, 1.0), real_share=0.0)
    dispatcher = bd.Dispatcher(names, seed, program=bundle.dispatcher.program, guide=guide)
    state = dispatcher.fit(evidence, labels).state
    seen = replace(state.prompts(evidence), labels=torch.from_numpy(labels))
    nuts, again = (
        joint_posterior(state.model, seen, names, draws, CHAINS, draws, seed + run, state.temper) for run in range(2)
    )
    judged = mixed.evidence
    count, keys = CHAINS * draws, prompt_keys(seed, prompts)
    found: dict[str, DispatchPosterior] = {
        "guide alone": dispatcher.posterior(judged, count, seed),
        "resampled": dispatcher.posterior(judged, count, seed, resample=True, proposals=8 * count),
    }
    precisions = np.quantile([float(each["kappa"]) for each in state.draws], [0.05, 0.95])
    sampler = ImportanceSampler(state.model, state.draws, state.temper, (float(precisions[0]), float(precisions[1])))
    shares, of_judged = state.globals.center()["pi"].double().numpy(), state.prompts(judged)
    weighted = sampler(state.answer(of_judged, shares), of_judged, shares, 8 * count, keys)
    drawn = draw_resampled(weighted, count, prompt_keys(seed + 1, prompts))
    found["resampled, prior as fitted"] = DispatchPosterior(drawn, nuts.experts)
    near, rest = (DispatchPosterior(run.weights[:, :prompts], run.experts) for run in (nuts, again))
    note = (
        f"{prompts} mixed documents, beside {len(pure.evidence)} labelled ones; NUTS: r-hat at most "
        f"{np.nanmax(nuts.r_hat[:prompts]):.3f}, {nuts.divergences[0]} divergences."
    )
    return _table("Distance to NUTS, joint with the globals", {"NUTS again": rest, **found}, near, note)


def _table(title: str, found: Mapping[str, DispatchPosterior], nuts: DispatchPosterior, note: str) -> Table:
    rows = []
    for name, posterior in found.items():
        near = bd.agreement(posterior, nuts)
        resolved = _distance(posterior.weights, nuts.weights)
        rows.append([name, f"{near.ks.mean():.3f}", f"{near.total_variation.mean():.3f}", f"{resolved:.3f}"])
    columns = ["posterior", "KS to NUTS", "total variation", "KS, small weights tied"]
    return Table(title, columns, rows, note)


def _distance(draws: np.ndarray, others: np.ndarray) -> float:
    """Mean Kolmogorov–Smirnov distance over prompts and components, weights below the resolution tied."""
    a, b = (np.clip(weights, RESOLUTION, 1 - RESOLUTION) for weights in (draws, others))
    pairs = ((n, k) for n in range(a.shape[1]) for k in range(a.shape[2]))
    return float(np.mean([ks_2samp(a[:, n, k], b[:, n, k], method="asymp").statistic for n, k in pairs]))


def main(
    prompts: Annotated[int, typer.Option(help="Two thirds of known mixture, the others of one domain.", min=3)] = 15,
    draws: Annotated[int, typer.Option(help="Of each chain, after as many of warm-up.")] = 300,
    seed: Annotated[int, typer.Option(help="Of prompts and draws.")] = 1,
    only: Annotated[str | None, typer.Option(help="fixed or joint; both by default")] = None,
) -> None:
    """Print distances to NUTS as Markdown tables."""
    torch.set_num_threads(1)
    works = {"fixed": fixed, "joint": joint}
    if only not in (None, *works):
        raise typer.BadParameter(f"expected fixed or joint, got {only!r}")
    bundle = bd.load_bundle()
    for name in [only] if only else works:
        print(f"{works[name](bundle, prompts, draws, seed).to_markdown()}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
