"""NUTS for the weights of prompts, as they are served and as they are fitted.

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
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jaxtyping import Float
from numpyro.infer import MCMC, NUTS, init_to_value
from numpyro.infer.hmc import hmc

from bayes_dispatch.arguments import seed as a_seed
from bayes_dispatch.arguments import whole
from bayes_dispatch.checks.reference.draws import ReferencePosterior
from bayes_dispatch.checks.reference.twin import (
    Data,
    Sites,
    Tree,
    as_array,
    as_arrays,
    label_shares,
    likelihoods,
    program,
    twins,
)
from bayes_dispatch.dispatcher.estimator import Dispatcher
from bayes_dispatch.dispatcher.evidence.evidence import Evidence
from bayes_dispatch.dispatcher.fitting.svi import ALONE
from bayes_dispatch.dispatcher.program.generative import DispatchModel, label_informed_start
from bayes_dispatch.dispatcher.program.observed import Prompts
from bayes_dispatch.errors import ConfigError, TensorError

__all__ = ["conditional_posterior", "joint_posterior", "reference_posterior"]

LARGEST_SET = 3  # components that share a prompt, at most
SETS = 4096  # at most: they are listed
TRIES = 128  # sets and shares that are drawn afresh after every draw of NUTS
PILOT = 64  # shares under which every set is tried first, to know which ones to draw
LANES = 64  # chains that run side by side, each draw as long as the longest of them; more run batch after batch
MEMORY = 2**26  # numbers that one batch may keep


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
    dispatcher = copy(dispatcher)  # of this moment, whatever other threads fit
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
    names = {"pi", *(name for view in twins(model) for name in view.globals)}
    given = {name: value for name, value in as_arrays(sites).items() if name != "kappa"}
    if set(given) != names:
        raise TensorError(f"expected values of the globals {sorted(names)}, got {sorted(sites)}")
    sets, count = _Sets.of(model, given["pi"]), len(prompts)
    with ALONE, jax.enable_x64(True):  # NumPyro has one stack of handlers, as Pyro
        keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(a_seed(seed)), count * chains)))
        data = Data.of(model, prompts, temper)
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
        data = Data.of(model, prompts, temper)
        kind = torch.get_default_dtype()
        known = None if prompts.known is None else prompts.known.to(kind)
        seen = replace(prompts.to(kind), labels=prompts.labels, known=known)
        start = as_arrays(label_informed_start(model, seen))
        kernel = NUTS(program, init_strategy=init_to_value(values=start), target_accept_prob=0.9, max_tree_depth=8)
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


def _boosted(prior: Any) -> Any:
    """The same weights from gamma variates of shapes above 1 and exponentials (see the module's docstring)."""
    inner = prior.base_dist
    alpha = inner.leaves if isinstance(inner, Tree) else inner.concentration
    logs = _boosted_logs("gammas", "exponentials", alpha)
    if isinstance(inner, Tree):
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
    known = as_array(prompts.known)
    return np.where(np.isfinite(known[:, :1]), np.nan_to_num(known), weights)


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
        shares, logs, members = label_shares(model, pi), [], []
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
def _run_lanes(model: DispatchModel, draws: int, warmup: int, given: Sites, sets: _Sets, keys: Any, lanes: Data) -> Any:
    """One chain of one prompt in each lane: weights ``(lane, draw, K+1)``, divergent, steps ``(lane, draw)``."""
    sets = jax.tree.map(jnp.asarray, sets)

    def evidence(data: Data, weights: Any) -> Any:  # (R, K+1) → (R,)
        return sum(each.log_prob(observed) for _, each, observed in likelihoods(model, given, weights, data))

    def run(key: Any, data: Data) -> Any:
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
