"""How near the shipped dispatcher's posterior is to NUTS, with the globals fixed at their medians.

    python benchmarks/agreement.py            # six minutes on one core, nearly all of them NUTS's
    python benchmarks/agreement.py --prompts 6

Kolmogorov–Smirnov distances are means over prompts and components. The floor is that of two runs of NUTS of the same
length. The guide was trained for the globals' whole posterior and on real prompts too, so its distance is not all its
own error; resampling is done under the fixed globals. Below a thousandth weights are not told apart by the guide: the
last column counts them as ties.
"""

from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import ks_2samp

import bayes_dispatch as bd
from bayes_dispatch.experts.domains import EXPERT_DOMAINS
from bayes_dispatch.importance import ImportanceSampler, draw_resampled
from bayes_dispatch.inference.evidence_sets import mixed_evidence, pure_evidence
from bayes_dispatch.keys import prompt_keys
from bayes_dispatch.posterior import DispatchPosterior
from bayes_dispatch.tables import Table

RESOLUTION = 1e-3


def main(
    prompts: Annotated[int, typer.Option(help="Two thirds of known mixture, the others of one domain.", min=3)] = 15,
    draws: Annotated[int, typer.Option(help="Of each of four chains, after as many of warm-up.")] = 300,
    seed: Annotated[int, typer.Option(help="Of prompts and draws.")] = 1,
) -> None:
    """Print distances to NUTS of the guide alone, of its resampled draws, and of NUTS itself."""
    torch.set_num_threads(1)
    bundle = bd.load_bundle()
    dispatcher, state = bundle.dispatcher, bundle.dispatcher.state
    mixed = mixed_evidence(bundle.model, EXPERT_DOMAINS, 2 * prompts // 3, (16, 256), "held_out", seed)
    pure = pure_evidence(bundle.model, EXPERT_DOMAINS, 1, (64, 64), "held_out", seed)
    rest = prompts - len(mixed.evidence)
    evidence = bd.Evidence.concatenate([mixed.evidence, pure.evidence.select(np.arange(rest) % len(EXPERT_DOMAINS))])
    center = {**state.globals.center(), "pi": torch.tensor(dispatcher.prior.mean)}
    sites = {name: value for name, value in center.items() if name != "kappa"}
    nuts, floor = (
        bd.reference_posterior(dispatcher, evidence, draws, 4, draws, seed + run, sites=sites) for run in range(2)
    )
    count, names = 4 * draws, nuts.experts
    seen = state.prompts(evidence)
    answer = state.answer(seen, dispatcher.prior.mean)
    keys = prompt_keys(seed, len(evidence))
    fixed = ImportanceSampler(state.model, [center], state.temper, dispatcher.guide.kappa)
    weighted = fixed(answer, seen, dispatcher.prior.mean, 8 * count, keys)
    found = {
        "NUTS again": floor,
        "guide alone": DispatchPosterior(answer.draw(count, keys), names),
        "resampled": DispatchPosterior(draw_resampled(weighted, count, prompt_keys(seed + 1, len(evidence))), names),
    }
    rows = []
    for name, posterior in found.items():
        near = bd.agreement(posterior, nuts)
        resolved = _distance(posterior.weights, nuts.weights)
        rows.append([name, f"{near.ks.mean():.3f}", f"{near.total_variation.mean():.3f}", f"{resolved:.3f}"])
    note = f"{prompts} prompts; NUTS: r-hat at most {np.nanmax(nuts.r_hat):.3f}, {nuts.divergences.sum()} divergences."
    columns = ["posterior", "KS to NUTS", "total variation", "KS, small weights tied"]
    print(Table("Distance to NUTS, globals fixed", columns, rows, note).to_markdown())


def _distance(draws: np.ndarray, others: np.ndarray) -> float:
    """Mean Kolmogorov–Smirnov distance over prompts and components, weights below the resolution tied."""
    a, b = (np.clip(weights, RESOLUTION, 1 - RESOLUTION) for weights in (draws, others))
    pairs = ((n, k) for n in range(a.shape[1]) for k in range(a.shape[2]))
    return float(np.mean([ks_2samp(a[:, n, k], b[:, n, k], method="asymp").statistic for n, k in pairs]))


if __name__ == "__main__":
    typer.run(main)
