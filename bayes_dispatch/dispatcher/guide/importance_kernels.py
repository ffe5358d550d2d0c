"""Compiled loops of serving: draws from mixtures of Dirichlets, densities of evidence, Pareto smoothing, resampling.

Every function here has a slow reference: SciPy's densities and Pyro's program for the densities, arviz' ``psislw`` for
the smoothing. All in one file on purpose: numba's program cache notices changes of its own file only.

A prompt's random numbers come from a generator of its own, so that they depend on no other prompt. Making one of
NumPy's for each prompt would take longer than all its draws; here it is xoshiro256++ (Blackman and Vigna 2021), whose
four words SplitMix64 fills from the prompt's key.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

__all__ = [
    "counts_at_vertices",
    "counts_density",
    "draw_weights",
    "mix_bits",
    "pareto_smooth",
    "probabilities_at_vertices",
    "probabilities_density",
    "resample",
    "vectors_at_vertices",
    "vectors_density",
]

FLOOR = 1e-6  # of w inside the likelihoods, as in the program
RESOLUTION = 1e-3  # of weights, as of the guide
LARGE, SMALL = 1e200, 1e-200  # products are taken to logs outside
F = TypeVar("F", bound=Callable[..., Any])
Array = Any  # numba infers what its functions take


def loop(function: F) -> F:
    """Compile a function, with sums in any order, and keep the program on disk where that can be."""
    function = inspect.unwrap(function)  # out of the checks that tests put around annotated functions
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no directory that can be written to
        return cast(F, numba.njit(**options)(function))


@loop
def draw_weights(
    keys: Array,
    shares: Array,
    concentration: Array,
    kappas: Array,
    prior: Array,
    families: Array,
    top: Array,
    weights: Array,
    ratios: Array,
) -> None:
    """Draw from each prompt's mixture of Dirichlets, with the log ratio of the prior's density to the mixture's.

    Gamma variates of small shapes are drawn as logs, which never underflow to 0/0. Both densities count weights below
    ``RESOLUTION`` by their probability to be there: the likelihood is flat in them, and the ratio of their densities
    has no bound. They are then drawn anew from the prior (not with families). The prior is a mixture over J precisions
    of one Dirichlet tree; without families its ``top`` is empty.

    Args:
        keys: ``(N,)`` seeds. shares: ``(N, R)``. concentration: ``(N, R, W)`` of the mixtures.
        kappas: ``(J,)`` precisions, equally likely; none (J = 0) leaves out the ratios.
        prior: ``(J, W)`` concentrations of the weights (leaves). families: ``(W,)``. top: ``(J, F)`` or ``(J, 0)``.
        weights: ``(N, P, W)`` to fill. ratios: ``(N, P)`` to fill.
    """
    rows, draws, width = weights.shape
    parts, grid, many = shares.shape[1], len(kappas), top.shape[1]
    logs = np.empty(width)
    constants = np.empty(parts)
    sums = np.empty(many)
    state = np.empty(4, np.uint64)
    prior_constants, terms = np.empty(grid), np.empty(grid)
    prior_small, mixture_small = np.empty((grid, width)), np.empty((parts, width))
    large, small = np.empty(width, np.int64), np.empty(width, np.bool_)
    log_resolution = math.log(RESOLUTION)
    for j in range(grid):
        prior_constants[j] = _log_constant(prior[j], families, top[j])
        for k in range(width):  # what a weight below the resolution adds to a density
            prior_small[j, k] = (prior[j, k] - 1.0) * log_resolution - math.log(prior[j, k])
            prior_constants[j] += prior_small[j, k]
    for n in range(rows):
        _seed(state, keys[n])
        for r in range(parts if grid else 0):
            total, constant = 0.0, 0.0
            for k in range(width):
                a = concentration[n, r, k]
                total += a
                mixture_small[r, k] = (a - 1.0) * log_resolution - math.log(a)
                constant += mixture_small[r, k] - math.lgamma(a)
            constants[r] = math.log(max(shares[n, r], 1e-300)) + constant + math.lgamma(total)
        for p in range(draws):
            u, r = _uniform(state), 0
            while r < parts - 1 and u >= shares[n, r]:
                u -= shares[n, r]
                r += 1
            total, largest = 0.0, -np.inf
            for k in range(width):
                a = concentration[n, r, k]
                if a >= 0.2:  # a variate of shape < 1 is one of shape + 1 times U^(1/a)
                    weights[n, p, k] = _gamma(state, a if a >= 1.0 else a + 1.0)
                    logs[k] = 0.0 if a >= 1.0 else math.log(_uniform(state)) / a
                else:
                    weights[n, p, k] = 1.0
                    logs[k] = _log_small_gamma(state, a)
                largest = max(largest, logs[k])
            for k in range(width):
                weights[n, p, k] *= math.exp(logs[k] - largest)
                total += weights[n, p, k]
            for k in range(width):
                weights[n, p, k] /= total
            if grid == 0:
                continue
            count = 0
            for k in range(width):
                small[k] = weights[n, p, k] < RESOLUTION
                if not small[k]:
                    logs[k] = math.log(weights[n, p, k])
                    large[count] = k
                    count += 1
            highest, proposal = -np.inf, 0.0
            for r in range(parts):
                value = constants[r]
                for i in range(count):
                    k = large[i]
                    value += (concentration[n, r, k] - 1.0) * logs[k] - mixture_small[r, k]
                proposal, highest = _add_log(proposal, highest, value)
            ratios[n, p] = -highest - math.log(proposal)
            if many:
                for f in range(many):
                    sums[f] = 0.0
                for k in range(width):
                    sums[families[k]] += weights[n, p, k]
            highest = -np.inf
            for j in range(grid):
                value = prior_constants[j]
                for i in range(count):
                    k = large[i]
                    value += (prior[j, k] - 1.0) * logs[k] - prior_small[j, k]
                for f in range(many):
                    leaves, members = 0.0, 0.0
                    for k in range(width):
                        if families[k] == f:
                            leaves += prior[j, k]
                            members += math.log(prior[j, k]) + math.lgamma(prior[j, k])
                    value += (top[j, f] - leaves) * math.log(max(sums[f], RESOLUTION))
                    if sums[f] < RESOLUTION:  # all its members are small: as probable as the family is
                        value += members - math.lgamma(leaves) - math.log(top[j, f])
                terms[j] = value
                highest = max(highest, value)
            density = 0.0
            for j in range(grid):
                terms[j] = math.exp(terms[j] - highest)
                density += terms[j]
            ratios[n, p] += highest + math.log(density / grid)
            if many == 0:
                _redraw_small(state, terms, density, prior, small, weights[n, p])


@loop
def vectors_density(
    weights: Array,
    chosen: Array,
    values: Array,
    missing: Array,
    lengths: Array,
    means: Array,
    variances: Array,
    lts: Array,
    temper: float,
    out: Array,
) -> None:
    """Add ``Σ_d log StudentT(6, w @ M, sqrt(τ · length_factor · w @ s2))`` to ``out (N, P)``.

    Args:
        weights: ``(N, P, W)``. chosen: ``(N, P)`` which of G draws of the globals. values: ``(N, D)``.
        missing: ``(N,)``. lengths: ``(N,)``, 0 where unknown or of no effect. means, variances: ``(G, W, D)``.
        lts: ``(G,)`` how fast noise falls with length. temper: τ.
    """
    rows, draws, width = weights.shape
    size = values.shape[1]
    constant = size * (math.lgamma(3.5) - math.lgamma(3.0) - 0.5 * math.log(6.0 * math.pi))
    mean, variance, factors = np.empty(size), np.empty(size), np.empty(len(lts))
    for n in range(rows):
        if missing[n]:
            continue
        for g in range(len(lts)):
            factors[g] = temper * _length_factor(lengths[n], lts[g])
        for p in range(draws):
            g = chosen[n, p]
            mean[:] = 0.0
            variance[:] = 0.0
            for k in range(width):
                w = (weights[n, p, k] + FLOOR) / (1.0 + width * FLOOR)
                for d in range(size):
                    mean[d] += w * means[g, k, d]
                    variance[d] += w * variances[g, k, d]
            total, spread, tail = 0.0, 1.0, 1.0
            for d in range(size):
                scaled = variance[d] * factors[g]
                spread *= scaled
                tail *= 1.0 + (values[n, d] - mean[d]) ** 2 / (6.0 * scaled)
                if tail > LARGE or spread > LARGE or spread < SMALL:
                    total -= 0.5 * math.log(spread) + 3.5 * math.log(tail)
                    spread, tail = 1.0, 1.0
            out[n, p] += constant + total - 0.5 * math.log(spread) - 3.5 * math.log(tail)


@loop
def counts_density(
    weights: Array, chosen: Array, counts: Array, missing: Array, strengths: Array, classes: Array, out: Array
) -> None:
    """Add ``log DirichletMultinomial(strength · (w @ Phi) + 1e-3)`` of counts ``(N, C)`` to ``out (N, P)``.

    Args:
        strengths: ``(G,)``. classes: ``(G, W, C)``. The others as in :func:`vectors_density`.
    """
    rows, draws, _ = weights.shape
    size = counts.shape[1]
    alpha = np.empty(size)
    for n in range(rows):
        if missing[n]:
            continue
        total, constant = 0.0, 0.0
        for c in range(size):
            total += counts[n, c]
            constant -= math.lgamma(counts[n, c] + 1.0)
        constant += math.lgamma(total + 1.0)
        for p in range(draws):
            g = chosen[n, p]
            _mix(weights[n, p], classes[g], strengths[g], alpha)
            sum_alpha, value = 0.0, constant
            for c in range(size):
                sum_alpha += alpha[c]
            value += _log_rising(alpha, counts[n])
            out[n, p] += value + math.lgamma(sum_alpha) - math.lgamma(sum_alpha + total)


@loop
def probabilities_density(
    weights: Array, chosen: Array, values: Array, missing: Array, strengths: Array, classes: Array, out: Array
) -> None:
    """Add ``log Dirichlet(strength · (w @ Phi) + 1e-3)`` of probabilities ``(N, C)`` to ``out (N, P)``."""
    rows, draws, _ = weights.shape
    size = values.shape[1]
    alpha, logs = np.empty(size), np.empty(size)
    for n in range(rows):
        if missing[n]:
            continue
        for c in range(size):
            logs[c] = math.log(values[n, c])
        for p in range(draws):
            g = chosen[n, p]
            _mix(weights[n, p], classes[g], strengths[g], alpha)
            sum_alpha, value = 0.0, 0.0
            for c in range(size):
                sum_alpha += alpha[c]
                value += (alpha[c] - 1.0) * logs[c] - math.lgamma(alpha[c])
            out[n, p] += value + math.lgamma(sum_alpha)


@loop
def vectors_at_vertices(
    values: Array, missing: Array, lengths: Array, means: Array, variances: Array, lt: float, out: Array
) -> None:
    """Add ``Σ_d log StudentT(6, M_k, sqrt(length_factor · s2_k))`` of ``values (N, D)`` for each k to ``out (N, W)``.

    Args:
        lengths: ``(N,)``, 0 where unknown or of no effect. means, variances: ``(W, D)``. lt: as in
            :func:`vectors_density`.
    """
    size = values.shape[1]
    for n in range(len(values)):
        if missing[n]:
            continue
        factor = _length_factor(lengths[n], lt)
        for k in range(len(means)):
            total, spread, tail = 0.0, 1.0, 1.0
            for d in range(size):
                scaled = variances[k, d] * factor
                spread *= scaled
                tail *= 1.0 + (values[n, d] - means[k, d]) ** 2 / (6.0 * scaled)
                if tail > LARGE or spread > LARGE or spread < SMALL:
                    total -= 0.5 * math.log(spread) + 3.5 * math.log(tail)
                    spread, tail = 1.0, 1.0
            out[n, k] += total - 0.5 * math.log(spread) - 3.5 * math.log(tail)


@loop
def counts_at_vertices(counts: Array, missing: Array, strength: float, classes: Array, out: Array) -> None:
    """Add ``log DirichletMultinomial(strength · Phi_k + 1e-3)`` of ``counts (N, C)``, less what all k share."""
    alpha = np.empty(counts.shape[1])
    for n in range(len(counts)):
        if missing[n]:
            continue
        for k in range(len(classes)):
            for c in range(len(alpha)):
                alpha[c] = strength * classes[k, c] + 1e-3
            out[n, k] += _log_rising(alpha, counts[n])


@loop
def probabilities_at_vertices(values: Array, missing: Array, strength: float, classes: Array, out: Array) -> None:
    """Add ``log Dirichlet(strength · Phi_k + 1e-3)`` of probabilities ``(N, C)``."""
    size = values.shape[1]
    for n in range(len(values)):
        if missing[n]:
            continue
        for k in range(len(classes)):
            total = 0.0
            for c in range(size):
                alpha = strength * classes[k, c] + 1e-3
                total += alpha
                out[n, k] += (alpha - 1.0) * math.log(values[n, c]) - math.lgamma(alpha)
            out[n, k] += math.lgamma(total)


@loop
def pareto_smooth(ratios: Array, k_hats: Array) -> None:
    """Pareto-smoothed importance sampling (Vehtari et al. 2024), in place: log ratios ``(N, P)`` to log weights.

    The largest ratios of each row become quantiles of a generalised Pareto distribution that is fitted to them (Zhang
    and Stephens 2009, with the weak prior of the paper), cut at the largest ratio; weights of a row sum to 1.

    Args:
        ratios: ``(N, P)``. k_hats: ``(N,)`` to fill with the shape of the tail.
    """
    rows, draws = ratios.shape
    count = min(math.ceil(0.2 * draws), math.ceil(3.0 * math.sqrt(draws)))
    for n in range(rows):
        row = ratios[n]
        row -= row.max()
        order = np.argsort(row)
        cutoff = max(row[order[draws - count - 1]], math.log(np.finfo(np.float64).tiny))
        start = draws - count
        while start < draws and row[order[start]] <= cutoff:
            start += 1
        size = draws - start
        k_hats[n] = np.inf
        if size > 4:
            tail = np.exp(row[order[start:]]) - math.exp(cutoff)
            shape, scale = _fit_pareto(tail)
            k_hats[n] = shape
            if np.isfinite(shape):
                for i in range(size):
                    share = (i + 0.5) / size
                    quantile = (
                        -math.log1p(-share) * scale
                        if abs(shape) < 1e-12
                        else scale * math.expm1(-shape * math.log1p(-share)) / shape
                    )
                    row[order[start + i]] = min(math.log(quantile + math.exp(cutoff)), 0.0)
        row -= math.log(np.exp(row - row.max()).sum()) + row.max()


@loop
def resample(keys: Array, weights: Array, log_weights: Array, drawn: Array) -> None:
    """Systematic resampling of ``weights (N, P, W)`` by normalised ``log_weights (N, P)`` to ``drawn (S, N, W)``."""
    rows, proposals, _ = weights.shape
    draws = len(drawn)
    picked = np.empty(draws, np.int64)
    state = np.empty(4, np.uint64)
    for n in range(rows):
        _seed(state, keys[n])
        u, p = _uniform(state), 0
        total = math.exp(log_weights[n, 0])
        for s in range(draws):
            while p < proposals - 1 and (s + u) / draws > total:
                p += 1
                total += math.exp(log_weights[n, p])
            picked[s] = p
        for s in range(draws - 1, 0, -1):  # neighbours would be alike: draws are in random order
            other = int(_uniform(state) * (s + 1))
            picked[s], picked[other] = picked[other], picked[s]
        for s in range(draws):
            drawn[s, n] = weights[n, picked[s]]


@loop
def mix_bits(words: Array, keys: Array) -> None:
    """Fill ``keys (N,)`` with 32 well-mixed bits of 64-bit ``words`` (SplitMix64; Steele et al. 2014)."""
    for n in range(len(words)):
        keys[n] = _finalised(words[n] + np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


@loop
def _finalised(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@loop
def _seed(state: Array, key: Any) -> None:
    """Fill the four words of a generator from a key (SplitMix64)."""
    z = np.uint64(key)
    for i in range(4):
        z += np.uint64(0x9E3779B97F4A7C15)
        state[i] = _finalised(z)


@loop
def _uniform(state: Array) -> float:
    """A number in (0, 1), of 53 bits (xoshiro256++)."""
    mixed = state[0] + state[3]
    value = ((mixed << np.uint64(23)) | (mixed >> np.uint64(41))) + state[0]
    shifted = state[1] << np.uint64(17)
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= shifted
    state[3] = (state[3] << np.uint64(45)) | (state[3] >> np.uint64(19))
    return (float(value >> np.uint64(11)) + 0.5) * 2.0**-53


@loop
def _gamma(state: Array, shape: float) -> float:
    """A gamma variate of shape ≥ 1 (Marsaglia and Tsang 2000)."""
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = _normal(state)
        v = 1.0 + c * x
        if v <= 0.0:
            continue
        v = v * v * v
        u = _uniform(state)
        if u < 1.0 - 0.0331 * x * x * x * x or math.log(u) < 0.5 * x * x + d * (1.0 - v + math.log(v)):
            return d * v


@loop
def _log_small_gamma(state: Array, shape: float) -> float:
    """The log of a gamma variate of shape ≪ 1 (algorithm GS: Ahrens and Dieter 1974)."""
    top = 1.0 + shape / math.e
    while True:
        u, v = top * _uniform(state), _uniform(state)
        if u <= 1.0:
            value = math.log(u) / shape
            if (v <= 0.95 and value < -3.0) or v <= math.exp(-math.exp(value)):  # e^-3 < .05: most need no exponentials
                return value
        else:
            x = -math.log((top - u) / shape)
            if v <= x ** (shape - 1.0):
                return math.log(x)


@loop
def _normal(state: Array) -> float:
    """A standard normal variate, by a ratio of uniforms that next to never takes a logarithm (Leva 1992)."""
    while True:
        u, v = _uniform(state), 1.7156 * (_uniform(state) - 0.5)
        x, y = u - 0.449871, abs(v) + 0.386595
        q = x * x + y * (0.19600 * y - 0.25472 * x)
        if q < 0.27597 or (q < 0.27846 and v * v < -4.0 * u * u * math.log(u)):
            return v / u


@loop
def _fit_pareto(tail: Array) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution for sorted positive numbers."""
    size = len(tail)
    grid = 30 + int(math.sqrt(size))
    quartile = tail[int(size / 4 + 0.5) - 1]
    candidates, profile = np.empty(grid), np.empty(grid)
    for i in range(grid):
        candidates[i] = (1.0 - math.sqrt(grid / (i + 0.5))) / (3.0 * quartile) + 1.0 / tail[-1]
        shape = _mean_log(candidates[i], tail)
        profile[i] = size * (math.log(-candidates[i] / shape) - shape - 1.0)
    chosen, total, highest = 0.0, 0.0, profile.max()
    for i in range(grid):
        weight = math.exp(profile[i] - highest)
        chosen += weight * candidates[i]
        total += weight
    chosen /= total
    shape = _mean_log(chosen, tail)
    scale = -shape / chosen
    return (size * shape + 5.0) / (size + 10.0), scale


@loop
def _mean_log(rate: float, tail: Array) -> float:
    """Mean of ``log(1 - rate · x)``: one logarithm for many factors."""
    total, product = 0.0, 1.0
    for x in tail:
        product *= 1.0 - rate * x
        if product > LARGE or product < SMALL:
            total += math.log(product)
            product = 1.0
    return (total + math.log(product)) / len(tail)


@loop
def _redraw_small(state: Array, terms: Array, density: float, prior: Array, small: Array, weights: Array) -> None:
    """Draw the weights below ``RESOLUTION`` from the prior, at a precision drawn in proportion to ``terms``."""
    u, j = _uniform(state) * density, 0
    while j < len(terms) - 1 and u >= terms[j]:
        u -= terms[j]
        j += 1
    before, after = 0.0, 0.0
    for k in range(len(weights)):
        if small[k]:
            before += weights[k]
            weights[k] = RESOLUTION * math.exp(math.log(_uniform(state)) / prior[j, k])
            after += weights[k]
    for k in range(len(weights)):
        if not small[k]:
            weights[k] *= (1.0 - after) / (1.0 - before)


@loop
def _mix(weights: Array, classes: Array, strength: float, alpha: Array) -> None:
    """Concentrations ``strength · (w @ Phi) + 1e-3`` of C classes."""
    width = len(weights)
    alpha[:] = 0.0
    for k in range(width):
        w = (weights[k] + FLOOR) / (1.0 + width * FLOOR) * strength
        for c in range(len(alpha)):
            alpha[c] += w * classes[k, c]
    for c in range(len(alpha)):
        alpha[c] += 1e-3


@loop
def _log_rising(alpha: Array, counts: Array) -> float:
    """``Σ_c lgamma(alpha + count) - lgamma(alpha)``: rising products, one logarithm for many factors."""
    value, product = 0.0, 1.0
    for c in range(len(alpha)):
        if counts[c] > 24 or counts[c] != math.floor(counts[c]):
            value += math.lgamma(alpha[c] + counts[c]) - math.lgamma(alpha[c])
            continue
        for i in range(int(counts[c])):
            product *= alpha[c] + i
            if product > LARGE or product < SMALL:
                value += math.log(product)
                product = 1.0
    return value + math.log(product)


@loop
def _length_factor(length: float, lt: float) -> float:
    """Noise variance at a length relative to 50 tokens, 1 where it is 0 (unknown), as in the program."""
    return (1.0 + 20.0 * lt / max(length, 1.0)) / (1.0 + 0.4 * lt) if length > 0.0 else 1.0


@loop
def _add_log(total: float, highest: float, value: float) -> tuple[float, float]:
    """One more term of a sum of exponentials kept as ``total · exp(highest)``."""
    if value <= highest:
        return total + math.exp(value - highest), highest
    return total * math.exp(highest - value) + 1.0, value


@loop
def _log_constant(leaves: Array, families: Array, top: Array) -> float:
    """Normaliser of a Dirichlet tree, or of a Dirichlet where ``top`` is empty."""
    value, total = 0.0, 0.0
    for k in range(len(leaves)):
        value -= math.lgamma(leaves[k])
        total += leaves[k]
    if len(top) == 0:
        return value + math.lgamma(total)
    for f in range(len(top)):
        inside = 0.0
        for k in range(len(leaves)):
            if families[k] == f:
                inside += leaves[k]
        value += math.lgamma(inside) - math.lgamma(top[f])
    return value + math.lgamma(top.sum())
