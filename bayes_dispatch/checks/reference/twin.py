"""The program of ``dispatcher.program.generative`` in NumPyro, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jaxtyping import Float
from numpyro.infer.util import log_density as log_joint

from bayes_dispatch.dispatcher.fitting.svi import ALONE
from bayes_dispatch.dispatcher.program.generative import DispatchModel
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import TensorError

__all__ = [
    "TWINS",
    "Data",
    "Sites",
    "Tree",
    "as_array",
    "as_arrays",
    "label_shares",
    "likelihoods",
    "log_density",
    "program",
    "twins",
]

FLOOR = 1e-6  # of w inside the likelihoods
Sites = Mapping[str, Any]  # site → array, of torch, NumPy or jax


def log_density(
    model: DispatchModel,
    prompts: Prompts,
    values: Sites,
    temper: float | Float[torch.Tensor, " prompt"] = 1.0,
    given: Sites | None = None,
) -> float:
    """Log density in nats of the whole program: prior of the free sites, and likelihood of the evidence and labels.

    Args:
        model: the program; it is evaluated on all N prompts, whatever its batch size.
        prompts: every view observed (or missing), with labels and known weights where there are any.
        values: site → value, for ``w`` ``(N, K+1)`` and all globals that are not given.
        temper: noise temper τ, scalar or ``(N,)``.
        given: all globals, fixed: their own density does not count. ``kappa`` may be ``(N,)``.

    Raises:
        TensorError: a view is not observed, or a site has no value.
    """
    with ALONE, jax.enable_x64(True):  # NumPyro has one stack of handlers, as Pyro
        fixed = None if given is None else as_arrays(given)
        return float(_log_density(model, Data.of(model, prompts, temper), as_arrays(values), fixed))


class Data(NamedTuple):
    """Prompts as arrays; labels are −1 and known weights NaN where unknown."""

    lengths: Any
    totals: dict[str, Any]
    missing: dict[str, Any]
    observed: dict[str, Any]
    labels: Any
    known: Any
    temper: Any

    @classmethod
    def of(cls, model: DispatchModel, prompts: Prompts, temper: object) -> Data:
        count, names = len(prompts), [view.name for view in model.views]
        if absent := [name for name in names if name not in prompts.observed or name not in prompts.missing]:
            raise TensorError(f"expected prompts with observed views {names}, got none for {absent}")
        labels = np.full(count, -1) if prompts.labels is None else prompts.labels
        known = np.full((count, model.n_experts + 1), np.nan) if prompts.known is None else prompts.known
        return cls(
            as_array(prompts.lengths),
            {name: as_array(values) for name, values in prompts.totals.items()},
            {name: np.asarray(prompts.missing[name]) for name in names},
            {name: as_array(prompts.observed[name]) for name in names},
            np.asarray(labels),
            as_array(known),
            np.broadcast_to(as_array(temper), count),
        )


@dataclass(frozen=True)
class View:
    """The twin of :class:`bayes_dispatch.dispatcher.program.views.View`; the name is that of its evidence and site."""

    width: int
    name: str

    def experts(self) -> dict[str, dist.Distribution]:
        """Priors of each expert's globals."""
        raise NotImplementedError

    def shared(self) -> dict[str, dist.Distribution]:
        """Priors of the globals that all experts share."""
        return {}

    def likelihood(self, sites: Sites, weights: Any, data: Data) -> dist.Distribution:
        """The distribution ``(N,) | (width,)`` of the view's evidence given weights ``(N, K+1)``."""
        raise NotImplementedError

    def site(self, parameter: str) -> str:
        return parameter if self.name in ("hidden", "counts", "surprise") else f"{self.name}_{parameter}"

    @property
    def globals(self) -> tuple[str, ...]:
        """The names of its globals' sites."""
        return tuple(map(self.site, (*self.experts(), *self.shared())))

    def sample(self, priors: Mapping[str, dist.Distribution]) -> dict[str, Any]:
        return {self.site(name): numpyro.sample(self.site(name), prior) for name, prior in priors.items()}

    def normal(self, means: str, variances: str, log_variance: float) -> dict[str, dist.Distribution]:
        spread = dist.LogNormal(jnp.full(self.width, log_variance), 1.0).to_event(1)
        return {means: dist.Normal(jnp.zeros(self.width), 1.0).to_event(1), variances: spread}

    def base(self, means: str, variances: str, middle: float, variance: float) -> dict[str, dist.Distribution]:
        around, spread = jnp.full(self.width, middle), jnp.full(self.width, jnp.log(variance))
        mean, wide = dist.Normal(around, 1.0).to_event(1), dist.LogNormal(spread, 0.5).to_event(1)
        return {f"base_{means}": mean, f"base_{variances}": wide}

    def mixed(self, weights: Any, experts: Any, base: Any) -> Any:
        """``(N, width)`` numbers of the experts ``(K, width)`` and of base ``(width,)``, mixed."""
        return weights[:, :-1] @ experts + base * weights[:, -1:]

    def student(self, means: Any, variances: Any, data: Data) -> dist.Distribution:
        return dist.StudentT(6.0, means, jnp.sqrt(data.temper[:, None] * variances)).to_event(1)


class VectorsView(View):
    def experts(self) -> dict[str, dist.Distribution]:
        return self.normal("M", "s2", -3.0)

    def shared(self) -> dict[str, dist.Distribution]:
        return {"lt": dist.LogNormal(2.5, 1.0), "xi": dist.LogNormal(-4.0, 1.0)} | self.base("M", "s2", 0.0, 1.0)

    def likelihood(self, sites: Sites, weights: Any, data: Data) -> dist.Distribution:
        means, variances, lt, xi, middle, spread = (sites[name] for name in self.globals)
        known = (1 + 20 * lt / jnp.maximum(data.lengths, 1.0)) / (1 + 0.4 * lt)
        noise = self.mixed(weights, variances, spread) * jnp.where(data.lengths > 0, known, 1.0)[:, None]
        mean = self.mixed(weights, means, middle)
        away = (means - mean[:, None]) ** 2  # (N, K, width), of each expert from the mean
        variance = (weights[:, :-1, None] * away).sum(1) + weights[:, -1:] * (middle - mean) ** 2
        return self.student(mean, noise + xi * variance, data)


class SurpriseView(View):
    def experts(self) -> dict[str, dist.Distribution]:
        return self.normal("a", "a2", -1.0)

    def shared(self) -> dict[str, dist.Distribution]:
        return self.base("a", "a2", 4.0, 9.0)

    def likelihood(self, sites: Sites, weights: Any, data: Data) -> dist.Distribution:
        means, variances, middle, spread = (sites[name] for name in self.globals)
        return self.student(self.mixed(weights, means, middle), self.mixed(weights, variances, spread), data)


class CountsView(View):
    def experts(self) -> dict[str, dist.Distribution]:
        return {"Phi": dist.Dirichlet(jnp.full(self.width, 0.7))}

    def shared(self) -> dict[str, dist.Distribution]:
        return {"conc": dist.LogNormal(3.0, 1.0), "base_Phi": dist.Dirichlet(jnp.full(self.width, 5.0))}

    def concentration(self, sites: Sites, weights: Any, data: Data) -> Any:
        phi, conc, base = (sites[name] for name in self.globals)
        return (conc / data.temper)[:, None] * self.mixed(weights, phi, base) + 1e-3

    def likelihood(self, sites: Sites, weights: Any, data: Data) -> dist.Distribution:
        return dist.DirichletMultinomial(self.concentration(sites, weights, data), data.totals[self.name])


class ProbabilitiesView(CountsView):
    def likelihood(self, sites: Sites, weights: Any, data: Data) -> dist.Distribution:
        return dist.Dirichlet(self.concentration(sites, weights, data))


TWINS: dict[str, type[View]] = {
    "vectors": VectorsView,
    "counts": CountsView,
    "probabilities": ProbabilitiesView,
    "surprise": SurpriseView,
}


def twins(model: DispatchModel) -> list[View]:
    return [TWINS[view.kind](view.width, view.name) for view in model.views]


class Tree(dist.Distribution):  # type: ignore[misc]
    """A Dirichlet over families and one within each, by change of variables to shares and shares within."""

    support = dist.constraints.simplex
    pytree_data_fields = ("top", "leaves")
    pytree_aux_fields = ("families",)

    def __init__(self, top: Any, leaves: Any, families: tuple[int, ...]) -> None:
        self.top, self.leaves, self.families = top, leaves, families
        super().__init__(jnp.shape(leaves)[:-1], jnp.shape(leaves)[-1:])

    def log_prob(self, value: Any) -> Any:
        shares = jnp.stack([value[..., members].sum(-1) for _, members in self._members()], -1)
        density = dist.Dirichlet(self.top).log_prob(shares)
        for family, members in self._members():
            if len(members) > 1:
                share = shares[..., family]
                within = dist.Dirichlet(self.leaves[..., members]).log_prob(value[..., members] / share[..., None])
                density = density + within - (len(members) - 1) * jnp.log(share)
        return density

    def _members(self) -> list[tuple[int, np.ndarray]]:
        families = np.array(self.families)
        return [(family, np.flatnonzero(families == family)) for family in range(max(families) + 1)]


def program(model: DispatchModel, data: Data, given: Sites | None, weigh: Callable[[Any], Any]) -> None:
    """The program as it is fitted; ``given`` globals are fixed."""
    sites = dict(given) if given is not None else _sample_globals(model)
    with numpyro.plate("prompts", len(data.lengths)):
        shares = label_shares(model, sites["pi"])
        concentration = jnp.broadcast_to(sites["kappa"], data.lengths.shape)[:, None] * shares  # (N, K+1)
        known = jnp.isfinite(data.known[:, 0])
        drawn = weigh(_weights_prior(model.tree, sites["kappa"], concentration).mask(~known))
        weights = jnp.where(known[:, None], jnp.nan_to_num(data.known), drawn)
        for name, likelihood, observed in likelihoods(model, sites, weights, data):
            numpyro.sample(name, likelihood, obs=observed)


def label_shares(model: DispatchModel, pi: Any) -> Any:
    return 0.95 * pi + 0.05 / (model.n_experts + 1)


def likelihoods(
    model: DispatchModel, sites: Sites, weights: Any, data: Data
) -> Iterator[tuple[str, dist.Distribution, Any]]:
    """Name, distribution and value of what is observed of prompts, given weights ``(N, K+1)``; of one prompt, any."""
    floored = (weights + FLOOR) / (weights + FLOOR).sum(-1, keepdims=True)
    yield "labels", dist.Categorical(probs=floored).mask(data.labels >= 0), jnp.maximum(data.labels, 0)
    for view in twins(model):
        likelihood = view.likelihood(sites, floored, data).mask(~data.missing[view.name])
        yield view.name, likelihood, data.observed[view.name]


def _weights_prior(tree: tuple[int, ...] | None, kappa: Any, concentration: Any) -> dist.Distribution:
    if tree is None:
        return dist.Dirichlet(concentration)
    families = np.array(tree)
    top = jnp.stack([concentration[:, families == f].sum(-1) for f in range(max(tree) + 1)], -1)  # (N, F)
    leaves = jnp.broadcast_to(kappa, concentration.shape[:1])[:, None] * concentration / top[:, families]
    return Tree(top, leaves, tree)


def _sample_globals(model: DispatchModel) -> dict[str, Any]:
    prior = np.array(model.prior or (*[3.0] * model.n_experts, 1.5))
    shares: dist.Distribution = dist.Dirichlet(prior)
    if model.tree is not None:
        families = np.array(model.tree)
        shares = Tree(np.array([prior[families == f].mean() for f in range(max(families) + 1)]), prior, model.tree)
    sites = {"pi": numpyro.sample("pi", shares), "kappa": numpyro.sample("kappa", dist.LogNormal(0.0, 0.7))}
    for view in twins(model):
        sites |= view.sample(view.shared())
    with numpyro.plate("experts", model.n_experts):
        for view in twins(model):
            sites |= view.sample(view.experts())
    return sites


def _plain(prior: Any) -> Any:
    """Weights as one site ``w``, as in the Pyro program."""
    return numpyro.sample("w", prior)


@partial(jax.jit, static_argnums=0)
def _log_density(model: DispatchModel, data: Data, values: Sites, given: Sites | None) -> Any:
    wanted = {"w"} if given is not None else {"w", "pi", "kappa", *(n for view in twins(model) for n in view.globals)}
    if wanted != set(values):
        raise TensorError(f"expected values of the sites {sorted(wanted)}, got {sorted(values)}")
    return log_joint(program, (model, data, given, _plain), {}, values)[0]


def as_arrays(sites: Sites) -> dict[str, Any]:
    return {name: as_array(value) for name, value in sites.items()}


def as_array(value: Any) -> Any:
    return np.asarray(value, dtype=np.float64)
