"""The program of ``dispatcher.program.generative`` once more, in NumPyro, with NUTS as its reference posterior.

Nothing is shared with the Pyro program but its settings (K, the views and their widths) and the evidence, so that a
mistake in one shows against the other: :func:`log_density` is compared with Pyro's, and the served posterior, which is
summed out by quadrature, with :func:`reference_posterior`. Everything here runs in float64, whatever jax's global
setting. This is the only module that imports jax and NumPyro.

Served weights are a set of one, two or three components, and shares of these: normalised exponential variates. NUTS
(Hoffman and Gelman 2014) moves the shares of a set in logs of these. Between its draws, set and shares are chosen anew
among the present ones and many that are drawn afresh, in proportion to their importance weights: iterated sampling
importance resampling (Andrieu, Doucet and Holenstein 2010, section 4), exact whatever the sets are drawn from. NUTS
alone, with sets summed out of its density, takes tens of times as long, and stays for long where it is.

The fitted program, which :func:`joint_posterior` takes, has a Dirichlet in the place of sets. NUTS moves in coordinates
in which one with concentrations near 0 is no funnel: a gamma variate of shape a is one of shape a+1 times
``exp(-e/a)``, ``e`` exponential (Marsaglia and Tsang 2000). In logs of both, scales are near 1 in corners and inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.arguments import whole
from bayes_dispatch.dispatcher.arrays import as_rows
from bayes_dispatch.dispatcher.arviz_data import bulk_ess, rank_r_hat
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.exact.cells import RESOLUTION
from bayes_dispatch.dispatcher.fitting.svi import ALONE
from bayes_dispatch.dispatcher.posterior import DispatchPosterior
from bayes_dispatch.dispatcher.program.generative import DispatchModel, label_informed_start
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import ConfigError, MissingDependencyError, TensorError

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS, init_to_value
    from numpyro.infer.hmc import hmc
    from numpyro.infer.util import log_density as log_joint
except ImportError as error:
    raise MissingDependencyError(
        f"expected jax and numpyro for the reference posterior, got {error}: pip install 'bayes-dispatch[reference]'"
    ) from error

__all__ = ["ReferencePosterior", "conditional_posterior", "joint_posterior", "log_density", "reference_posterior"]

FLOOR = 1e-6  # of w inside the likelihoods
LARGEST_SET = 3  # components that share a prompt, at most
SETS = 4096  # at most: they are listed
TRIES = 128  # sets and shares that are drawn afresh after every draw of NUTS
PILOT = 64  # shares under which every set is tried first, to know which ones to draw
LANES = 64  # chains that run side by side, each draw as long as the longest of them; more run batch after batch
R_HAT, ESS = 1.01, 400  # at most, and at least, of a run that counts
MEMORY = 2**26  # numbers that one batch may keep
Sites = Mapping[str, Any]  # site → array, of torch, NumPy or jax


@dataclass(frozen=True, eq=False, repr=False)
class ReferencePosterior(DispatchPosterior):
    """NUTS draws of the weights, chain after chain, with what tells whether they can be trusted: ``converged``.

    Args:
        weights: ``(chain * draw, prompt, K+1)``.
        experts: the K+1 names, base last.
        k_hat, log_evidence, chains: as in :class:`DispatchPosterior`.
        divergences: ``(prompt,)`` divergent transitions; of the joint chains, the same number for every prompt.
        steps: ``(prompt,)`` mean leapfrog steps of a draw.
        globals: site → ``(chain * draw, ·)`` draws of the globals that were free.

    Raises:
        TensorError, ConfigError: as :class:`DispatchPosterior`.
    """

    divergences: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    globals: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def r_hat(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` split r-hat of rank-normalised weights (Vehtari et al. 2021).

        Weights below a thousandth count as a thousandth, and those near 1 likewise: their logs wander over hundreds of
        nats that no blend tells apart. NaN where nothing else was drawn, or the weight is known.
        """
        return self._diagnose(rank_r_hat)

    @property
    def ess(self) -> Float[np.ndarray, "prompt expert"]:
        """``(prompt, K+1)`` bulk effective sample size over all chains, of the same weights as ``r_hat``."""
        return self._diagnose(bulk_ess)

    @property
    def converged(self) -> Bool[np.ndarray, " prompt"]:
        """``(prompt,)`` whether r-hat ≤ 1.01 and bulk ESS ≥ 400 of every weight: only such draws are a reference.

        Vehtari et al. (2021) give these bounds. A single chain has no r-hat, and has never converged.
        """
        well = (self.r_hat <= R_HAT) & (self.ess >= ESS)
        return np.asarray((well | ~self._moves).all(axis=1))

    def select(self, indices: Shaped[np.ndarray, " selected"] | Sequence[int] | slice) -> ReferencePosterior:
        """The prompts at ``indices``, in that order; raises as :meth:`DispatchPosterior.select`."""
        rows = as_rows(indices, len(self))
        own = {"divergences": self.divergences, "steps": self.steps}
        found = {name: values[rows] for name, values in own.items() if len(values)}  # neither has to be given
        return replace(cast(ReferencePosterior, super().select(rows)), **found)

    @property
    def _resolved(self) -> np.ndarray:
        return np.clip(self.weights, RESOLUTION, 1 - RESOLUTION)

    @property
    def _moves(self) -> np.ndarray:
        return np.ptp(self._resolved, axis=0) > 0

    def _diagnose(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        draws = self._resolved.reshape(self.chains, -1, *self.weights.shape[1:])
        return np.where(self._moves, statistic(draws), np.nan)


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
        fixed = None if given is None else _arrays(given)
        return float(_log_density(model, _Data.of(model, prompts, temper), _arrays(values), fixed))


def reference_posterior(
    dispatcher: Dispatcher,
    evidence: Evidence,
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 500,
    seed: int = 0,
) -> ReferencePosterior:
    """NUTS for the weights of each prompt as they are served, under fixed globals: what the quadrature sums out.

    The globals are at their fitted medians, and ``pi`` at the mean of the serving prior; for others there is
    :func:`conditional_posterior`.

    Given the globals prompts are independent, so every prompt has chains of its own, with their own step size; they run
    side by side.

    Args:
        dispatcher: a fitted one; its views, projection, globals, serving prior and temper are used.
        evidence: of N prompts.
        draws: of each chain, after warm-up.
        chains: for each prompt.
        warmup: draws that adapt step size and mass, and are dropped.
        seed: of all randomness.

    Returns:
        The draws with their diagnostics.

    Raises:
        NotFittedError: before ``fit``.
        ConfigError: fewer than 4 draws, no chain or warm-up, or more than 4,096 sets (28 experts).
        EvidenceError: none of the dispatcher's views.
        TensorError: a view of another width.
    """
    state, run = dispatcher.state, (draws, chains, warmup, seed)
    sites = {**state.globals.center(), "pi": dispatcher.prior.mean}
    return conditional_posterior(state.model, state.prompts(evidence), dispatcher.experts, sites, *run, state.temper)


def conditional_posterior(
    model: DispatchModel,
    prompts: Prompts,
    experts: Sequence[str],
    sites: Sites,
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 500,
    seed: int = 0,
    temper: float | Float[torch.Tensor, " prompt"] = 1.0,
) -> ReferencePosterior:
    """:func:`reference_posterior` for any program, its prompts as :func:`log_density` takes them.

    ``sites`` may hold ``kappa``, which the served prior does not have.

    Raises:
        ConfigError: numbers outside their ranges, another number of names than experts, or too many sets.
        TensorError: a view is not observed, or a global has no value.
    """
    _check_run(draws, chains, warmup, experts, model)
    names = {"pi", *(name for view in _twins(model) for name in view.globals)}
    given = {name: value for name, value in _arrays(sites).items() if name != "kappa"}
    if set(given) != names:
        raise TensorError(f"expected values of the globals {sorted(names)}, got {sorted(sites)}")
    sets, count = _Sets.of(model, given["pi"]), len(prompts)
    with ALONE, jax.enable_x64(True):  # NumPyro has one stack of handlers, as Pyro
        keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(a_seed(seed)), count * chains)))
        data = _Data.of(model, prompts, temper)
        lanes = jax.tree.map(lambda a: np.repeat(a, chains, axis=0)[:, None], data)  # (N * chain, 1, ·)
        size = MEMORY // ((warmup + draws) * (model.n_experts + 1))
        parts = [
            _run_lanes(model, draws, warmup, given, sets, *part)
            for part in _batches((keys, lanes), max(1, min(LANES, size)))
        ]
        weights, diverging, steps = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(3))
    weights = weights[: len(keys)].reshape(count, chains * draws, -1).swapaxes(0, 1)
    diverging, steps = (a[: len(keys)].reshape(count, -1) for a in (diverging, steps))
    found = {"divergences": diverging.sum(1), "steps": steps.mean(1)}
    return ReferencePosterior(_with_known(weights, prompts), (*experts, "base"), chains=chains, **found)


def joint_posterior(
    model: DispatchModel,
    prompts: Prompts,
    experts: Sequence[str],
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 500,
    seed: int = 0,
    temper: float = 1.0,
) -> ReferencePosterior:
    """NUTS for globals and weights of the program as it is fitted, together: one chain moves tens of prompts.

    Args:
        model, prompts, experts, temper: as in :func:`conditional_posterior`.
        draws, warmup, seed: as in :func:`reference_posterior`.
        chains: each starts at the label-informed start of SVI, jittered weights aside.

    Returns:
        The draws of weights and globals with their diagnostics.

    Raises:
        ConfigError, TensorError: as :func:`conditional_posterior`.
    """
    _check_run(draws, chains, warmup, experts, model)
    with ALONE, jax.enable_x64(True):  # NumPyro has one stack of handlers, as Pyro
        data = _Data.of(model, prompts, temper)
        kind = torch.get_default_dtype()
        known = None if prompts.known is None else prompts.known.to(kind)
        seen = replace(prompts.to(kind), labels=prompts.labels, known=known)
        start = _arrays(label_informed_start(model, seen))
        kernel = NUTS(_program, init_strategy=init_to_value(values=start), target_accept_prob=0.9, max_tree_depth=8)
        run = {"num_warmup": warmup, "num_samples": draws, "num_chains": chains, "chain_method": "vectorized"}
        mcmc = MCMC(kernel, **run, progress_bar=False)
        arguments = (model, data, None, _boosted)
        mcmc.run(jax.random.key(a_seed(seed)), *arguments, extra_fields=("diverging", "num_steps"))
        samples = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
        fields = {name: np.asarray(value) for name, value in mcmc.get_extra_fields().items()}
    weights = _with_known(samples.pop("w"), prompts)
    free = {name: value for name, value in samples.items() if not name.endswith(("gammas", "exponentials"))}
    found = np.sum(fields["diverging"]), np.mean(fields["num_steps"])
    divergences, steps = (np.full(len(prompts), value) for value in found)
    return ReferencePosterior(
        weights, (*experts, "base"), chains=chains, globals=free, divergences=divergences, steps=steps
    )


class _Data(NamedTuple):
    """Prompts as arrays; labels are −1 and known weights NaN where unknown."""

    lengths: Any
    totals: dict[str, Any]
    missing: dict[str, Any]
    observed: dict[str, Any]
    labels: Any
    known: Any
    temper: Any

    @classmethod
    def of(cls, model: DispatchModel, prompts: Prompts, temper: object) -> _Data:
        count, names = len(prompts), [view.name for view in model.views]
        if absent := [name for name in names if name not in prompts.observed or name not in prompts.missing]:
            raise TensorError(f"expected prompts with observed views {names}, got none for {absent}")
        labels = np.full(count, -1) if prompts.labels is None else prompts.labels
        known = np.full((count, model.n_experts + 1), np.nan) if prompts.known is None else prompts.known
        return cls(
            _array(prompts.lengths),
            {name: _array(values) for name, values in prompts.totals.items()},
            {name: np.asarray(prompts.missing[name]) for name in names},
            {name: _array(prompts.observed[name]) for name in names},
            np.asarray(labels),
            _array(known),
            np.broadcast_to(_array(temper), count),
        )


@dataclass(frozen=True)
class _View:
    """The twin of :class:`bayes_dispatch.dispatcher.program.views.View`; the name is that of its evidence and site."""

    width: int
    name: str

    def experts(self) -> dict[str, dist.Distribution]:
        """Priors of each expert's globals."""
        raise NotImplementedError

    def shared(self) -> dict[str, dist.Distribution]:
        """Priors of the globals that all experts share."""
        return {}

    def likelihood(self, sites: Sites, weights: Any, data: _Data) -> dist.Distribution:
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

    def student(self, means: Any, variances: Any, data: _Data) -> dist.Distribution:
        return dist.StudentT(6.0, means, jnp.sqrt(data.temper[:, None] * variances)).to_event(1)


class _VectorsView(_View):
    def experts(self) -> dict[str, dist.Distribution]:
        return self.normal("M", "s2", -3.0)

    def shared(self) -> dict[str, dist.Distribution]:
        return {"lt": dist.LogNormal(2.5, 1.0), "xi": dist.LogNormal(-4.0, 1.0)} | self.base("M", "s2", 0.0, 1.0)

    def likelihood(self, sites: Sites, weights: Any, data: _Data) -> dist.Distribution:
        means, variances, lt, xi, middle, spread = (sites[name] for name in self.globals)
        known = (1 + 20 * lt / jnp.maximum(data.lengths, 1.0)) / (1 + 0.4 * lt)
        noise = self.mixed(weights, variances, spread) * jnp.where(data.lengths > 0, known, 1.0)[:, None]
        mean = self.mixed(weights, means, middle)
        away = (means - mean[:, None]) ** 2  # (N, K, width), of each expert from the mean
        variance = (weights[:, :-1, None] * away).sum(1) + weights[:, -1:] * (middle - mean) ** 2
        return self.student(mean, noise + xi * variance, data)


class _SurpriseView(_View):
    def experts(self) -> dict[str, dist.Distribution]:
        return self.normal("a", "a2", -1.0)

    def shared(self) -> dict[str, dist.Distribution]:
        return self.base("a", "a2", 4.0, 9.0)

    def likelihood(self, sites: Sites, weights: Any, data: _Data) -> dist.Distribution:
        means, variances, middle, spread = (sites[name] for name in self.globals)
        return self.student(self.mixed(weights, means, middle), self.mixed(weights, variances, spread), data)


class _CountsView(_View):
    def experts(self) -> dict[str, dist.Distribution]:
        return {"Phi": dist.Dirichlet(jnp.full(self.width, 0.7))}

    def shared(self) -> dict[str, dist.Distribution]:
        return {"conc": dist.LogNormal(3.0, 1.0), "base_Phi": dist.Dirichlet(jnp.full(self.width, 5.0))}

    def concentration(self, sites: Sites, weights: Any, data: _Data) -> Any:
        phi, conc, base = (sites[name] for name in self.globals)
        return (conc / data.temper)[:, None] * self.mixed(weights, phi, base) + 1e-3

    def likelihood(self, sites: Sites, weights: Any, data: _Data) -> dist.Distribution:
        return dist.DirichletMultinomial(self.concentration(sites, weights, data), data.totals[self.name])


class _ProbabilitiesView(_CountsView):
    def likelihood(self, sites: Sites, weights: Any, data: _Data) -> dist.Distribution:
        return dist.Dirichlet(self.concentration(sites, weights, data))


TWINS: dict[str, type[_View]] = {
    "vectors": _VectorsView,
    "counts": _CountsView,
    "probabilities": _ProbabilitiesView,
    "surprise": _SurpriseView,
}


def _twins(model: DispatchModel) -> list[_View]:
    return [TWINS[view.kind](view.width, view.name) for view in model.views]


class _Tree(dist.Distribution):  # type: ignore[misc]
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


def _program(model: DispatchModel, data: _Data, given: Sites | None, weigh: Callable[[Any], Any]) -> None:
    """The program as it is fitted; ``given`` globals are fixed."""
    sites = dict(given) if given is not None else _sample_globals(model)
    with numpyro.plate("prompts", len(data.lengths)):
        shares = _label_shares(model, sites["pi"])
        concentration = jnp.broadcast_to(sites["kappa"], data.lengths.shape)[:, None] * shares  # (N, K+1)
        known = jnp.isfinite(data.known[:, 0])
        drawn = weigh(_weights_prior(model.tree, sites["kappa"], concentration).mask(~known))
        weights = jnp.where(known[:, None], jnp.nan_to_num(data.known), drawn)
        for name, likelihood, observed in _likelihoods(model, sites, weights, data):
            numpyro.sample(name, likelihood, obs=observed)


def _label_shares(model: DispatchModel, pi: Any) -> Any:
    return 0.95 * pi + 0.05 / (model.n_experts + 1)


def _likelihoods(
    model: DispatchModel, sites: Sites, weights: Any, data: _Data
) -> Iterator[tuple[str, dist.Distribution, Any]]:
    """Name, distribution and value of what is observed of prompts, given weights ``(N, K+1)``; of one prompt, any."""
    floored = (weights + FLOOR) / (weights + FLOOR).sum(-1, keepdims=True)
    yield "labels", dist.Categorical(probs=floored).mask(data.labels >= 0), jnp.maximum(data.labels, 0)
    for view in _twins(model):
        likelihood = view.likelihood(sites, floored, data).mask(~data.missing[view.name])
        yield view.name, likelihood, data.observed[view.name]


def _weights_prior(tree: tuple[int, ...] | None, kappa: Any, concentration: Any) -> dist.Distribution:
    if tree is None:
        return dist.Dirichlet(concentration)
    families = np.array(tree)
    top = jnp.stack([concentration[:, families == f].sum(-1) for f in range(max(tree) + 1)], -1)  # (N, F)
    leaves = jnp.broadcast_to(kappa, concentration.shape[:1])[:, None] * concentration / top[:, families]
    return _Tree(top, leaves, tree)


def _sample_globals(model: DispatchModel) -> dict[str, Any]:
    prior = np.array(model.prior or (*[3.0] * model.n_experts, 1.5))
    shares: dist.Distribution = dist.Dirichlet(prior)
    if model.tree is not None:
        families = np.array(model.tree)
        shares = _Tree(np.array([prior[families == f].mean() for f in range(max(families) + 1)]), prior, model.tree)
    sites = {"pi": numpyro.sample("pi", shares), "kappa": numpyro.sample("kappa", dist.LogNormal(0.0, 0.7))}
    for view in _twins(model):
        sites |= view.sample(view.shared())
    with numpyro.plate("experts", model.n_experts):
        for view in _twins(model):
            sites |= view.sample(view.experts())
    return sites


def _plain(prior: Any) -> Any:
    """Weights as one site ``w``, as in the Pyro program."""
    return numpyro.sample("w", prior)


def _boosted(prior: Any) -> Any:
    """The same weights from gamma variates of shapes above 1 and exponentials (see the module's docstring)."""
    inner = prior.base_dist
    alpha = inner.leaves if isinstance(inner, _Tree) else inner.concentration
    logs = _boosted_logs("gammas", "exponentials", alpha)
    if isinstance(inner, _Tree):
        tops = jax.nn.log_softmax(_boosted_logs("family_gammas", "family_exponentials", inner.top))
        within = [jax.nn.log_softmax(logs[:, members]) for _, members in inner._members()]
        order = np.argsort(np.concatenate([members for _, members in inner._members()]))
        logs = jnp.concatenate(within, -1)[:, order] + tops[:, np.array(inner.families)]
    return numpyro.deterministic("w", jax.nn.softmax(logs))


def _boosted_logs(gammas: str, exponentials: str, alpha: Any) -> Any:
    drawn = numpyro.sample(gammas, dist.Gamma(alpha + 1.0).to_event(1))
    exponential = numpyro.sample(exponentials, dist.Exponential(jnp.ones_like(alpha)).to_event(1))
    return jnp.log(drawn) - exponential / alpha


def _with_known(weights: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Draws ``(draw, prompt, K+1)`` with known weights in their rows: the program draws some there and ignores them."""
    if prompts.known is None:
        return weights
    known = _array(prompts.known)
    return np.where(np.isfinite(known[:, :1]), np.nan_to_num(known), weights)


@partial(jax.jit, static_argnums=0)
def _log_density(model: DispatchModel, data: _Data, values: Sites, given: Sites | None) -> Any:
    wanted = {"w"} if given is not None else {"w", "pi", "kappa", *(n for view in _twins(model) for n in view.globals)}
    if wanted != set(values):
        raise TensorError(f"expected values of the sites {sorted(wanted)}, got {sorted(values)}")
    return log_joint(_program, (model, data, given, _plain), {}, values)[0]


class _Sets(NamedTuple):
    """Every set of components that can share a prompt: ``(C,)`` log probability, and ``(C, 3, K+1)`` its members.

    Members are one-hot, and rows of zeros beyond the size of the set.
    """

    log_prior: Any
    members: Any

    @classmethod
    def of(cls, model: DispatchModel, pi: np.ndarray) -> _Sets:
        """By size, then by number of families, in proportion to the product of label shares."""
        width = model.n_experts + 1
        if (count := sum(math.comb(width, size) for size in range(1, LARGEST_SET + 1))) > SETS:
            raise ConfigError(f"expected at most {SETS} sets of components to sum over, got {count} of {width}")
        families = np.zeros(width, int) if model.tree is None else np.array(model.tree)
        shares, logs, members = _label_shares(model, pi), [], []
        for size, probability in enumerate(model.sizes, 1):
            sets = [list(each) for each in combinations(range(width), size)] if probability else []
            products = np.array([shares[each].prod() for each in sets])
            kinds = np.array([len(np.unique(families[each])) for each in sets])
            for kind in np.unique(kinds):
                share = probability / len(np.unique(kinds)) / products[kinds == kind].sum()
                logs.append(np.log(share * products[kinds == kind]))
            order = np.argsort(kinds, kind="stable")
            members += [np.pad(np.eye(width)[sets[each]], [(0, LARGEST_SET - size), (0, 0)]) for each in order]
        return cls(np.concatenate(logs), np.stack(members))

    def weights(self, chosen: Any, logs: Any) -> Any:
        """``(·, K+1)`` weights in the sets ``(·)``, where logs ``(·, 3)`` of exponential variates give their shares."""
        members = self.members[chosen]
        shares = jax.nn.softmax(jnp.where(members.sum(-1) > 0, logs, -jnp.inf))  # uniform on the simplex of the set
        return (shares[..., None] * members).sum(-2)


# Level 1: a program of this size compiles in half the time of the default, and runs no slower.
@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 1})
def _run_lanes(
    model: DispatchModel, draws: int, warmup: int, given: Sites, sets: _Sets, keys: Any, lanes: _Data
) -> Any:
    """One chain of one prompt in each lane: weights ``(lane, draw, K+1)``, divergent, steps ``(lane, draw)``."""
    sets = jax.tree.map(jnp.asarray, sets)

    def evidence(data: _Data, weights: Any) -> Any:  # (R, K+1) → (R,)
        return sum(each.log_prob(observed) for _, each, observed in _likelihoods(model, given, weights, data))

    def run(key: Any, data: _Data) -> Any:
        pilot_key, set_key, start_key, nuts_key, key = jax.random.split(jax.random.wrap_key_data(key), 5)
        every = jnp.arange(len(sets.log_prior))
        tried = jax.lax.map(lambda logs: evidence(data, sets.weights(every, logs)), _fresh(pilot_key, PILOT))
        likely = jax.nn.log_softmax(sets.log_prior + jax.nn.logsumexp(tried, 0))
        proposal = jnp.logaddexp(sets.log_prior, likely) - jnp.log(2.0)  # half the prior at least: no ratio explodes

        def potential(chosen: Any) -> Callable[[Any], Any]:
            return lambda logs: -evidence(data, sets.weights(chosen, logs)[None])[0] - (logs - jnp.exp(logs)).sum()

        init, sample = hmc(potential_fn_gen=potential, algo="NUTS")
        chosen, start = jax.random.categorical(set_key, proposal), _fresh(start_key, 1)[0]
        run = {"target_accept_prob": 0.8, "max_tree_depth": 5, "rng_key": nuts_key, "model_args": (chosen,)}

        def advance(carry: Any, key: Any) -> tuple[Any, Any]:
            chosen, state = carry
            state = sample(state, model_args=(chosen,))
            set_key, fresh_key, key = jax.random.split(key, 3)
            others = jax.random.categorical(set_key, proposal, shape=(TRIES,))
            among, logs = jnp.append(others, chosen), jnp.vstack([_fresh(fresh_key, TRIES), state.z])
            weights = sets.weights(among, logs)
            ratios = evidence(data, weights) + sets.log_prior[among] - proposal[among]
            row = jax.random.categorical(key, ratios)
            energy, slope = jax.value_and_grad(potential(among[row]))(logs[row])
            state = state._replace(z=logs[row], potential_energy=energy, z_grad=slope)
            return (among[row], state), (weights[row], state.diverging, state.num_steps)

        first = chosen, init(start, warmup, **run)
        _, found = jax.lax.scan(advance, first, jax.random.split(key, warmup + draws))  # warm-up too: it compiles once
        return jax.tree.map(lambda a: a[warmup:], found)

    return jax.vmap(run)(keys, lanes)


def _fresh(key: Any, count: int) -> Any:
    """``(count, 3)`` logs of exponential variates."""
    return jnp.log(jax.random.exponential(key, (count, LARGEST_SET)))


def _batches(tree: Any, size: int) -> list[Any]:
    """A tree of arrays ``(L, ·)`` in pieces of one size, the last padded with its last row, so that one compiles."""
    total = len(jax.tree.leaves(tree)[0])
    count = -(-total // size)
    each = -(-total // count)
    rows = np.minimum(np.arange(count * each), total - 1).reshape(count, each)
    return [jax.tree.map(lambda a, part=part: a[part], tree) for part in rows]


def _check_run(draws: int, chains: int, warmup: int, experts: Sequence[str], model: DispatchModel) -> None:
    whole("draws", draws, 4)
    whole("chains", chains, 1)
    whole("warmup", warmup, 1)
    if len(experts) != model.n_experts:
        raise ConfigError(f"expected {model.n_experts} expert names, got {len(experts)}")


def _arrays(sites: Sites) -> dict[str, Any]:
    return {name: _array(value) for name, value in sites.items()}


def _array(value: Any) -> Any:
    return np.asarray(value, dtype=np.float64)
