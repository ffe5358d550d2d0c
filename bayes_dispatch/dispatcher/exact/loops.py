"""Loops over prompts and weights, compiled: what ``densities`` adds up at a thousand weights of every prompt, and what
``Cells`` does of every cell.

All arrays are C-contiguous. Weights are ``(N, G, M)``: each of N prompts at G weights of up to M components.
"""

import math
from typing import Any

import numpy as np

from bayes_dispatch.loops import compile_with

__all__ = ["add_below", "add_best", "add_counts", "add_probabilities", "add_student"]

Array = Any  # numba infers what its functions take

FARTHEST = 1e300  # squared deviations, so that densities are finite
STUDENT = math.lgamma(3.5) - math.lgamma(3.0) - 0.5 * math.log(6.0 * math.pi)
LARGE, HUGE = 1e8, 1e280  # of factors of a product, and of the product: one logarithm will do for many
RISING = 32  # steps up to which a quotient of Γ is multiplied out

compiled = compile_with("contract")


@compiled
def add_student(
    values: Array,
    noisier: Array,
    missing: Array,
    columns: Array,
    mixing: float,
    temper: float,
    supports: Array,
    weights: Array,
    total: Array,
) -> None:
    """Add log densities of Student's t with 6 degrees of freedom in each of C coordinates.

    Args:
        values: (N, C). noisier: (N,) factor of the noise. missing: (N,), of which nothing is added.
        columns: (K + 1, 4 C) means, noise, squares of means, and variances of what is not known of the means.
        mixing: what the variance of means adds to the noise. temper: of the noise.
        supports: (N, G, M) components. weights: theirs. total: (N, G), changed in place.
    """
    width = values.shape[1]
    prompts, places, most = supports.shape
    for n in range(prompts):
        if missing[n]:
            continue
        for g in range(places):
            tails, near, spread = 0.0, 1.0, 1.0
            for c in range(width):
                mean = noise = square = unknown = 0.0
                for m in range(most):
                    w = weights[n, g, m]
                    if w > 0:
                        of = columns[supports[n, g, m]]
                        mean += w * of[c]
                        noise += w * of[width + c]
                        square += w * of[2 * width + c]
                        unknown += w * w * of[3 * width + c]  # of independent errors
                noise = temper * (noise * noisier[n] + mixing * max(square - mean * mean, 0.0)) + unknown
                deviation = values[n, c] - mean
                away = min(deviation * deviation / (6.0 * noise), FARTHEST)
                if away < LARGE:
                    near *= 1.0 + away
                else:
                    tails += 3.5 * math.log1p(away)
                if near > HUGE:
                    tails += 3.5 * math.log(near)
                    near = 1.0
                if 1.0 / LARGE < noise < LARGE:
                    spread *= noise
                else:
                    tails += 0.5 * math.log(noise)
                if spread > HUGE or spread < 1.0 / HUGE:
                    tails += 0.5 * math.log(spread)
                    spread = 1.0
            total[n, g] += width * STUDENT - tails - 3.5 * math.log(near) - 0.5 * math.log(spread)


@compiled
def _rising(a: float, n: float) -> float:
    """log Γ(a + n) − log Γ(a)."""
    if n > RISING or n != math.floor(n):
        return math.lgamma(a + n) - math.lgamma(a)
    found, product = 0.0, 1.0
    for i in range(int(n)):
        product *= a + i
        if product > HUGE:
            found += math.log(product)
            product = 1.0
    return found + math.log(product)


@compiled
def _concentration(columns: Array, strength: float, c: int, supports: Array, weights: Array) -> float:
    mixed = 0.0
    for m in range(len(supports)):
        if weights[m] > 0:
            mixed += weights[m] * columns[supports[m], c]
    return strength * mixed + 1e-3


@compiled
def add_counts(
    values: Array, missing: Array, columns: Array, strength: float, supports: Array, weights: Array, total: Array
) -> None:
    """Add log probabilities of a Dirichlet-multinomial.

    Args:
        values: (N, C) counts. columns: (K + 1, C) chances of classes. strength: of concentrations.
        Others: see ``add_student``.
    """
    classes = values.shape[1]
    for n in range(len(values)):
        if missing[n]:
            continue
        seen = constant = 0.0
        for c in range(classes):
            seen += values[n, c]
            constant -= math.lgamma(values[n, c] + 1)
        constant += math.lgamma(seen + 1)
        for g in range(supports.shape[1]):
            found, mass = constant, 0.0
            for c in range(classes):
                alpha = _concentration(columns, strength, c, supports[n, g], weights[n, g])
                mass += alpha
                if values[n, c] > 0:
                    found += _rising(alpha, values[n, c])
            total[n, g] += found - _rising(mass, seen)


@compiled
def add_probabilities(
    logs: Array, missing: Array, columns: Array, strength: float, supports: Array, weights: Array, total: Array
) -> None:
    """Add log densities of a Dirichlet.

    Args:
        logs: (N, C) of probabilities. columns: (K + 1, C) chances of classes. strength: of concentrations.
        Others: see ``add_student``.
    """
    for n in range(len(logs)):
        if missing[n]:
            continue
        for g in range(supports.shape[1]):
            found = mass = 0.0
            for c in range(logs.shape[1]):
                alpha = _concentration(columns, strength, c, supports[n, g], weights[n, g])
                mass += alpha
                found += (alpha - 1) * logs[n, c] - math.lgamma(alpha)
            total[n, g] += found + math.lgamma(mass)


@compiled
def add_below(mass: Array, sizes: Array, supports: Array, corners: Array, weights: Array, total: Array) -> None:
    """Add the probabilities that weights are at most the given ones.

    Args:
        mass, sizes, supports, corners: of cells, see ``Cells``.
        weights, total: (N, K + 1), of which the second is changed in place.
    """
    for n in range(len(mass)):
        without = np.ones(total.shape[1])
        for g in range(mass.shape[1]):
            for m in range(sizes[n, g]):
                k = supports[n, g, m]
                at, low, high = weights[n, k], np.inf, -np.inf
                for c in range(sizes[n, g]):
                    low, high = min(low, corners[n, g, c, m]), max(high, corners[n, g, c, m])
                without[k] -= mass[n, g]
                if at >= high:
                    total[n, k] += mass[n, g]
                elif at >= low and sizes[n, g] < 3:
                    total[n, k] += mass[n, g] * (at - low) / (high - low)
                elif at >= low:  # on a triangle the density rises on a line up to the corner between, and falls on one
                    between = corners[n, g, 0, m] + corners[n, g, 1, m] + corners[n, g, 2, m] - low - high
                    if at < between:
                        share = (at - low) ** 2 / ((between - low) * (high - low))
                    else:
                        share = 1 - (high - at) ** 2 / ((high - between) * (high - low))
                    total[n, k] += mass[n, g] * share
        for k in range(total.shape[1]):
            if weights[n, k] >= 0:
                total[n, k] += without[k]


@compiled
def add_best(mass: Array, sizes: Array, supports: Array, corners: Array, probes: Array, total: Array) -> None:
    """Add the probabilities that weights are the largest, from Q points of each cell.

    Args:
        mass, sizes, supports, corners: of cells, see ``Cells``.
        probes: (M, Q, M) shares of the corners at each point, by size. total: (N, K + 1), changed in place.
    """
    for n in range(len(mass)):
        for g in range(mass.shape[1]):
            size = sizes[n, g]
            for q in range(probes.shape[1]):
                best, most = 0, -1.0
                for m in range(size):
                    weight = 0.0
                    for c in range(size):
                        weight += probes[size - 1, q, c] * corners[n, g, c, m]
                    if weight > most:
                        best, most = m, weight
                total[n, supports[n, g, best]] += mass[n, g] / probes.shape[1]
