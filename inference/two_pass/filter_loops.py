"""Loops of filtering and mixing, compiled for the CPU: what ``filtering`` calls where no gradient is recorded.

Between two tokens of a few rows, a call of the tensor library takes longer than all that it computes. All arrays are
C-contiguous; one file, since a compiled function that is kept on disk is made again only when its own file changes.
"""

import math
from typing import Any

import numpy as np

from bayes_dispatch.model.mambaformer.compiled.loops import precise

__all__ = ["filter_tokens", "mix"]

Array = Any  # numba infers what its functions take


@precise
def _log_sum(values: Array) -> float:
    most = values.max()
    if not math.isfinite(most):
        return most  # NaN too
    total = 0.0
    for value in values:
        total += math.exp(value - most)
    return most + math.log(total)


@precise
def _log_add(a: float, b: float) -> float:
    if a == b:
        return a + math.log(2.0)  # both may be -inf
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a))


@precise
def _times_log(p: float, log_p: float) -> float:
    return p * log_p if p != 0.0 else 0.0  # of no probability, whose logarithm is -inf; NaN stays


@precise
def filter_tokens(
    joint: Array, target: Array, stay: Array, switch: Array, likelihood: Array, counts: Array, found: Array
) -> None:
    """Count T tokens of N prompts, one after the other.

    Args:
        joint: (N, E, S) log-probabilities of rate and particle, changed in place. target: (N, S), after a switch.
        stay, switch: (N, E). likelihood: (N, S, T). counts: (N, T) whether the prompt has the token; the others are
            logarithms of probabilities.
        found: (N, T, S) log-probabilities of the particles after each token.
    """
    prompts, rates, particles = joint.shape
    counted = np.empty((rates, particles))
    for n in range(prompts):
        own = joint[n]
        for t in range(likelihood.shape[2]):
            total = -np.inf
            if counts[n, t]:
                for e in range(rates):
                    for s in range(particles):
                        counted[e, s] = own[e, s] + likelihood[n, s, t]
                total = _log_sum(counted.reshape(-1))
            if total != -np.inf:  # what no particle can say tells nothing of them
                own[:] = counted
                for e in range(rates):
                    for s in range(particles):
                        own[e, s] -= total
                    of_rate = _log_sum(own[e]) + switch[n, e]
                    for s in range(particles):
                        own[e, s] = _log_add(own[e, s] + stay[n, e], of_rate + target[n, s])
            for s in range(particles):
                found[n, t, s] = _log_sum(own[:, s].copy())


@precise
def mix(log_weights: Array, log_probabilities: Array, mixed: Array, entropy: Array, information: Array) -> None:
    """Mix the particles' distributions.

    Args:
        log_weights: (N, S); particles of no probability are left out.
        log_probabilities: (N, S, V), of float32 or float64.
        mixed: (N, V), set to log-probabilities of the mixture. entropy, information: (N,), set to its entropy, and to
            the part that the particles' own entropies leave.
    """
    prompts, particles, tokens = log_probabilities.shape
    terms = np.empty(particles)
    for n in range(prompts):
        possible = np.flatnonzero(log_weights[n] != -np.inf)
        if len(possible) == 1:
            own = 0.0
            for v in range(tokens):
                mixed[n, v] = log_probabilities[n, possible[0], v]
                own -= _times_log(math.exp(mixed[n, v]), mixed[n, v])
            entropy[n], information[n] = own, 0.0
            continue
        for v in range(tokens):
            mixed[n, v] = 0.0
        within = 0.0
        for s in possible:
            weight, own = math.exp(log_weights[n, s]), 0.0
            for v in range(tokens):
                log_p = np.float64(log_probabilities[n, s, v])
                p = math.exp(log_p)
                own -= _times_log(p, log_p)
                mixed[n, v] += weight * p
            within += weight * own
        total = 0.0
        for v in range(tokens):
            p = mixed[n, v]
            if p > 1e-280:
                mixed[n, v] = math.log(p)
            else:  # too small for a sum of probabilities, or NaN
                terms[:] = -np.inf
                for s in possible:
                    terms[s] = log_weights[n, s] + np.float64(log_probabilities[n, s, v])
                mixed[n, v] = _log_sum(terms)
                p = math.exp(mixed[n, v])
            total -= _times_log(p, mixed[n, v])
        entropy[n] = total
        information[n] = max(total - within, 0.0) if not math.isnan(total - within) else total - within
