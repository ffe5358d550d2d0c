"""The globals' posterior with the weights of the prompts integrated out: a second stage after SVI.

SVI takes the weights of a prompt to be independent of the globals. What it says of the prior's ``pi`` and ``kappa``,
which nothing but the weights informs, is then too narrow (against NUTS by half and by three quarters) and off. Here
each prompt's weights are summed out by importance sampling (Burda et al. 2016, arXiv 1509.00519, of the weights
alone): proposals are the guide's and, defensively, the prior's. Weights below :data:`RESOLUTION` are integrated out in
closed form, ``∫₀^ε w^(a−1) dw = ε^a / a``: evidence does not tell them apart, but their logs, which the prior's density
multiplies, range over hundreds. The posterior of all globals together is a normal of full covariance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor
from tqdm.auto import tqdm

from bayes_dispatch.dispatcher.fitting.svi import GlobalsPosterior, SVISettings, isolated
from bayes_dispatch.dispatcher.guide.dirichlet_mixtures import DirichletMixtures
from bayes_dispatch.dispatcher.guide.guides import RESOLUTION
from bayes_dispatch.dispatcher.program.generative import DispatchModel, OneLabelModel, floored
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import ConfigError

__all__ = ["check_collapsed", "fit_collapsed"]

MOST = 1_000  # numbers of the globals, for a full covariance
GUIDES, PRIORS = 96, 32  # proposals of each prompt and step
BATCH = 256  # prompts of a step
KAPPAS = tuple(float(kappa) for kappa in np.geomspace(0.1, 4.0, 8))  # precisions of the prior that proposes


def check_collapsed(model: DispatchModel) -> None:
    """Raise ``ConfigError`` where weights cannot be integrated out: families, one label, or too many globals."""
    if model.families is not None or isinstance(model, OneLabelModel):
        kind = "one label a prompt" if model.families is None else "families of experts"
        raise ConfigError(f"expected an admixture without families for collapsed steps, got {kind}")
    with isolated(0):
        count = sum(value.numel() for value in model.sample_globals().values())
    if count > MOST:
        raise ConfigError(f"expected at most {MOST:,} numbers of globals for collapsed steps, got {count:,}")


def fit_collapsed(
    model: DispatchModel,
    start: GlobalsPosterior,
    prompts: Prompts,
    answer: DirichletMixtures,
    settings: SVISettings,
    seed: int,
    progress: bool = False,
) -> tuple[GlobalsPosterior, Float[np.ndarray, " step"]]:
    """Fit a normal of full covariance to the posterior of the globals given the prompts, from SVI's centre.

    Args:
        model: the program, without families.
        start: what SVI found.
        prompts: N prompts, every view observed (missing rows masked), with labels and known weights where there are
            any.
        answer: the guide's posterior of the N prompts' weights, without their labels.
        settings: ``collapsed`` steps at its learning rate, which falls to 0.
        seed: of every draw.
        progress: show a bar.

    Returns:
        The posterior, float64, and the loss of each step: negative ELBO, nats a prompt.

    Raises:
        ConfigError: as :func:`check_collapsed`.
    """
    check_collapsed(model)
    with isolated(seed, torch.float64):
        every = _as_doubles(prompts)
        count, size = len(every), min(len(prompts), BATCH)

        def program() -> None:
            rows = torch.randperm(count)[:size]
            batch = every.select(rows)
            weights, density = _propose(model, _select(answer, rows))
            sites = model.sample_globals()
            evidence = _log_evidence(model, sites, batch, weights, density)
            pyro.factor("evidence", evidence.sum() * (count / size))

        values = {name: value.clone() for name, value in start.to(torch.float64).center().items()}
        guide = AutoMultivariateNormal(program, init_loc_fn=init_to_value(values=values), init_scale=0.1)
        order = list(guide())  # this makes its parameters
        optimiser = torch.optim.Adam(guide.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.collapsed)
        elbo, losses = Trace_ELBO(), []
        for _ in tqdm(range(settings.collapsed), desc="globals (collapsed)", disable=not progress):
            loss = elbo.differentiable_loss(program, guide)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0 * count)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()) / count)
        mean, scale, tril = (cast(Tensor, getattr(guide, name)).detach() for name in ("loc", "scale", "scale_tril"))
        shapes = {name: start.locations[name].shape for name in order}
        return GlobalsPosterior.correlated(shapes, mean, scale[:, None] * tril), np.array(losses)


def _as_doubles(prompts: Prompts) -> Prompts:
    known = None if prompts.known is None else prompts.known.double()
    doubles = prompts.to(torch.float64)
    return Prompts(doubles.lengths, doubles.totals, doubles.missing, doubles.observed, prompts.labels, known)


def _select(answer: DirichletMixtures, rows: Int[Tensor, " prompt"]) -> DirichletMixtures:
    return DirichletMixtures(answer.shares[rows.numpy()], answer.concentration[rows.numpy()])


def _propose(
    model: DispatchModel, answer: DirichletMixtures
) -> tuple[Float[Tensor, "proposal prompt weight"], Float[Tensor, "proposal prompt"]]:
    """Weights from the guide and from the prior, and the log density of both together."""
    count = len(answer)
    keys = torch.randint(2**32, (count,)).numpy().astype(np.uint64)
    labels = model.label_shares(model.prior_of_shares() / model.prior_of_shares().sum())
    prior = torch.tensor(KAPPAS)[:, None] * labels  # (J, K+1)
    drawn = torch.distributions.Dirichlet(prior[torch.randint(len(prior), (PRIORS, count))]).sample()
    weights = torch.cat([torch.from_numpy(answer.draw(GUIDES, keys)), drawn])
    guides = log_dirichlet(torch.from_numpy(answer.concentration).movedim(1, 0)[:, None], weights)  # (R, S, N)
    shares = torch.from_numpy(answer.shares).log().T[:, None]
    priors = log_dirichlet(prior[:, None, None], weights).logsumexp(0) - np.log(len(prior))
    part = np.log(GUIDES / (GUIDES + PRIORS))
    rest = np.log(PRIORS / (GUIDES + PRIORS))
    return weights, torch.logaddexp((guides + shares).logsumexp(0) + part, priors + rest)


def _log_evidence(
    model: DispatchModel,
    sites: Mapping[str, Tensor],
    prompts: Prompts,
    weights: Float[Tensor, "proposal prompt weight"],
    density: Float[Tensor, "proposal prompt"],
) -> Float[Tensor, " prompt"]:
    """Log density of each prompt's evidence and label given the globals, its weights summed over."""
    ratios = log_dirichlet(model.prior_concentration(sites), weights) - density
    if prompts.labels is not None:
        labelled = prompts.labels >= 0
        label = prompts.labels.clamp(min=0).expand(len(weights), -1)[..., None]
        ratios = ratios + torch.where(labelled, floored(weights).gather(-1, label)[..., 0].log(), 0.0)
    if prompts.known is not None:
        given = torch.isfinite(prompts.known[:, :1])
        weights = torch.where(given, prompts.known.nan_to_num(), weights)
        ratios = torch.where(given[:, 0], 0.0, ratios)
    for values in model.log_likelihood(sites, weights, prompts).values():
        ratios = ratios + values
    return ratios.logsumexp(0) - np.log(len(weights))


def log_dirichlet(
    concentration: Float[Tensor, "... weight"], weights: Float[Tensor, "... weight"]
) -> Float[Tensor, "..."]:
    """Log density of a Dirichlet at weights, those below the resolution integrated out."""
    small: Bool[Tensor, "... weight"] = weights < RESOLUTION
    logs = torch.where(small, torch.ones_like(weights), weights).log()
    parts = torch.where(small, concentration * np.log(RESOLUTION) - concentration.log(), (concentration - 1) * logs)
    return concentration.sum(-1).lgamma() - concentration.lgamma().sum(-1) + parts.sum(-1)
