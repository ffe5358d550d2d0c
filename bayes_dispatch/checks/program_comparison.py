"""Which generative program explains the prompts best? Ranking by PSIS-LOO of one view, the weights integrated out.

A prompt's own weights must not be among what its density is conditioned on: leaving the prompt out would leave out its
weights too, and no importance weights reach that far. So the density is ``p(x_n | globals) = ∫ p(x_n | w, globals)
p(w | globals) dw``, at the fitted precision of the prior. For the one-label program that is a sum over K+1 vertices.
For an admixture it is estimated by importance sampling; the proposal is the guide's answer to that view alone, beside a
share of the prior itself, so that the ratios are bounded, nearly. All draws of the globals share the proposals.

The noise temper is left at 1, at which the globals are fitted: it is chosen for the weights, not for the densities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import logsumexp
from torch import Tensor

from bayes_dispatch.dispatcher.arviz_data import rank_by_loo
from bayes_dispatch.dispatcher.arviz_groups import pointwise_groups
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.fitted import FittedDispatcher
from bayes_dispatch.dispatcher.fitting.svi import isolated
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.dispatcher.program.one_label import label_probabilities
from bayes_dispatch.errors import ConfigError, EvidenceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MarginalDensities", "ProgramComparison", "compare_programs", "marginal_densities"]

PRIOR_SHARE = 0.25  # of the proposals
TINY = 1e-300  # weights that underflow


@dataclass(frozen=True, eq=False)
class ProgramComparison:
    """How programs rank.

    Attributes:
        table: a row for each program, best first. ``elpd`` is the expected log predictive density of all prompts, nats;
            ``elpd_diff`` how far it is below the best one's, with standard error ``dse`` over prompts; ``weight`` that
            of stacking; ``warning`` that some k-hat is high. ``monte_carlo_error`` is the standard error of ``elpd`` by
            the proposals: differences of its size are noise.
        densities: by program the pointwise densities behind it.
        prompts: ``(M,)`` rows of the evidence that have the view: those compared on.
    """

    table: pd.DataFrame
    densities: Mapping[str, MarginalDensities]
    prompts: np.ndarray


class MarginalDensities(NamedTuple):
    """Densities of N prompts' view with the weights integrated out.

    Attributes:
        log_density: ``(S, N)`` nats, under S draws of the globals.
        error: ``(N,)`` Monte Carlo standard error, root mean square over the draws; 0 where exact.
    """

    log_density: np.ndarray
    error: np.ndarray


def compare_programs(
    dispatchers: Mapping[str, Dispatcher],
    evidence: Evidence,
    view: str = "hidden",
    draws: int = 200,
    proposals: int = 512,
    seed: int = 0,
) -> ProgramComparison:
    """Rank the programs of fitted dispatchers by how well they predict one view of prompts.

    Args:
        dispatchers: by name, two at least, fitted on the same evidence with the same seed.
        evidence: the prompts that they were fitted on, of which leave-one-out takes each out again; or fresh ones, for
            which it is a little pessimistic. A view that is projected looks sharper on prompts that its projection was
            fitted on, to all programs alike.
        view: which all programs read.
        draws: of the fitted globals, at least 20.
        proposals: of the weights, for each prompt of an admixture, at least 25.
        seed: of draws and proposals.

    Returns:
        The ranking.

    Raises:
        ConfigError: fewer than two programs, one without the view, or programs that read it as another kind of view or
            through another projection: densities of different variables cannot be compared. Too few draws or proposals.
        NotFittedError: a dispatcher before ``fit``.
        EvidenceError: fewer than two prompts with the view.
    """
    if len(dispatchers) < 2 or draws < 20 or proposals < 25 or seed < 0:
        got = f"{len(dispatchers)}, {draws}, {proposals} and {seed}"
        raise ConfigError(f"expected at least 2 programs, 20 draws, 25 proposals and a seed ≥ 0, got {got}")
    states = {name: each.state for name, each in dispatchers.items()}
    _check_same_variable(states, view)
    rows = np.flatnonzero(~evidence.is_missing(view))
    if len(rows) < 2:
        raise EvidenceError(f"expected at least 2 prompts with a view {view!r}, got {len(rows)}")
    found, groups = {}, {}
    for name, state in states.items():
        fitted = state.globals.to(torch.float64)
        with isolated(seed, torch.float64):
            sites = [fitted.draw() for _ in range(draws)]
        found[name] = marginal_densities(state, sites, evidence.select(rows), view, proposals, seed)
        experts = (*dispatchers[name].experts, "base")
        groups[name] = pointwise_groups(state.model, sites, experts, view, found[name].log_density)
    table = rank_by_loo(groups, view)
    errors = {name: float(np.sqrt(np.square(each.error).sum())) for name, each in found.items()}
    table["monte_carlo_error"] = [errors[name] for name in table.index]
    return ProgramComparison(table, found, rows)


def marginal_densities(
    state: FittedDispatcher,
    sites: Sequence[Mapping[str, Tensor]],
    evidence: Evidence,
    view: str,
    proposals: int = 256,
    seed: int = 0,
) -> MarginalDensities:
    """``log p(x_n | globals)`` of one view, the prompts' weights integrated out under the prior that was fitted.

    Args:
        state: a fitted program that reads the view.
        sites: S draws of its globals, float64.
        evidence: N prompts; other views are not looked at.
        view: its name.
        proposals: P of the weights, for each prompt; the one-label program needs none.
        seed: of the proposals.
    """
    lengths = {name: mask for name, mask in evidence.missing.items() if name in (view, "lengths")}
    prompts = state.prompts(Evidence({view: evidence.views[view]}, evidence.lengths, lengths))
    model = replace(state.model, views=tuple(each for each in state.model.views if each.name == view))
    if state.guide is None:
        exact = [label_probabilities(model, [each], prompts, each["pi"].numpy(), 1.0).log_evidence for each in sites]
        return MarginalDensities(np.stack(exact), np.zeros(len(prompts)))
    with isolated(seed, torch.float64), torch.no_grad():
        weights, log_proposal = _propose(state, prompts, proposals, seed)
        log_density, variances = [], []
        for each in sites:
            likely = model.log_likelihood(each, weights, prompts)[view]
            logs = (model.weights_prior(each).log_prob(weights) + likely - log_proposal).numpy()  # (P, N)
            log_mean = logsumexp(logs, axis=0) - np.log(proposals)
            log_density.append(log_mean)
            variances.append(np.exp(logs - log_mean).var(0, ddof=1) / proposals)
    return MarginalDensities(np.stack(log_density), np.sqrt(np.mean(variances, axis=0)))


def _propose(
    state: FittedDispatcher, prompts: Prompts, proposals: int, seed: int
) -> tuple[Float[Tensor, "proposal prompt weight"], Float[Tensor, "proposal prompt"]]:
    """Weights from the guide's answer mixed with the prior, and their log density."""
    answer = cast(
        DirichletMixtures, state.answer(prompts, state.globals.center()["pi"].double().numpy())
    )  # of a program with a guide
    center = state.model.prior_concentration(state.globals.to(torch.float64).center()).numpy()  # (K+1,)
    prior = np.broadcast_to(center, (len(prompts), 1, len(center)))
    mixture = DirichletMixtures(
        np.concatenate([(1 - PRIOR_SHARE) * answer.shares, np.full((len(prompts), 1), PRIOR_SHARE)], axis=1),
        np.concatenate([answer.concentration, prior], axis=1),
    )
    keys = np.random.SeedSequence(seed).generate_state(len(prompts)).astype(np.uint64)
    weights = np.maximum(mixture.draw(proposals, keys), TINY)
    log_density = np.stack([mixture.log_prob(each) for each in weights])
    return torch.from_numpy(weights), torch.from_numpy(log_density)


def _check_same_variable(states: Mapping[str, FittedDispatcher], view: str) -> None:
    kinds, first = {}, next(iter(states.values())).feature_maps.get(view)
    for name, state in states.items():
        read = {each.name: (each.kind, each.width) for each in state.model.views}
        if view not in read:
            raise ConfigError(f"expected programs that read the view {view!r}, got {sorted(read)} in {name!r}")
        kinds[name] = read[view]
        other = state.feature_maps.get(view)
        same = first is other or (
            first is not None
            and other is not None
            and np.array_equal(first.center, other.center)
            and np.array_equal(first.projection, other.projection)
        )
        if not same:
            raise ConfigError(
                f"expected one projection of the view {view!r}, got another in {name!r}: fit on the same data"
            )
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"expected one kind and width of the view {view!r}, got {kinds}")
