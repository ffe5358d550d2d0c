"""Loops over one row at a time, compiled for the CPU with numba: what mixers and ``stepping`` call without gradients.

On a CPU a library call costs as much as the arithmetic of a decoded token, and between the matrix products of a prompt
most time goes into memory. Here a mixer is one pass over its inputs between two products, for one token as for many.

All arrays are C-contiguous and of one dtype, float32 or float64. ``threads`` may share a large product, or attention to
many tokens. All loops that call each other are in this one file: numba keeps their programs on disk, and makes one anew
only when the file of its own function changes.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import intrinsic, overload

from bayes_dispatch.errors import TensorError
from bayes_dispatch.loops import compile_with

__all__ = [
    "Matrix",
    "attend",
    "attend_across",
    "convolve",
    "mix_mamba2",
    "multiply",
    "normalise",
    "product",
    "scan_mamba1",
    "step_attention",
    "step_cross_attention",
    "step_feed_forward",
    "step_mamba1",
    "step_mamba2",
]

Array = Any  # numba infers what its functions take
# Keys and values (B, kv_heads, slots, W), numbers, bits of bfloat16, or int8; then the scales of both, (B, kv_heads,
# slots, 1) for int8 and else with slots 0.
Kept = tuple[Array, Array, Array, Array]

TILE = 64  # tokens whose activations stay in a processor's cache
CHANNELS = 128  # of a selective scan, likewise
int64: Any = np.int64  # of a part or column: for a literal 0, or an unsigned number, numba makes another program
PIECE = 1024  # keys that a thread attends to at a time; with their values, they stay in its cache for more queries
SHARED = 2**17  # multiplications of each thread from which on another one saves more than asking it costs
OTHER_SHAPE = "expected cached states of this model's sizes, got others"  # indices are not checked one by one


class Matrix(NamedTuple):
    """A matrix as ``product`` takes it: itself, or U diag(s z) Vᵀ with other scales z for each row of the input.

    Attributes:
        weight: (O, K), or U (O, r). scaled: (1 or B, r), s z; empty for a matrix that is ``weight``. right: Vᵀ (r, K).
        stored: (O, K), what the rows ``plain`` (of those whose scales are all 1) are multiplied by.
        bits: (O, K), of bfloat16, in the place of a ``weight``, or of ``stored``, that is (0, K); or (0, K).
    """

    weight: Array
    scaled: Array
    right: Array
    stored: Array
    plain: Array
    bits: Array


precise = compile_with("contract")  # an exponential needs its two-part constants as they are
LIBERTIES = "contract", "reassoc", "nsz", "arcp"  # sums in any order, NaN and infinity as they are
loop = compile_with(*LIBERTIES)


def _power(typing_context: Any, biased: Any) -> Any:
    """2 to the exponent whose biased form is given: int32 for float32, int64 for float64."""
    narrow = biased == types.int32
    result, shift = (types.float32, 23) if narrow else (types.float64, 52)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shifted = builder.shl(arguments[0], context.get_constant(biased, shift))
        return builder.bitcast(shifted, context.get_value_type(result))

    return result(biased), generate


_power_of_two: Any = intrinsic(_power)


def _wide(typing_context: Any, bits: Any) -> Any:
    """The float32 whose upper half is given: what a bfloat16 is, as uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], context.get_value_type(types.uint32))
        shifted = builder.shl(wide, context.get_constant(types.uint32, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(bits), generate


_widened: Any = intrinsic(_wide)


def _narrow(typing_context: Any, x: Any) -> Any:
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(x), generate


_bits_of: Any = intrinsic(_narrow)

# exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where ln(2) is given in two parts, the first with few digits (Cody and
# Waite). In loops it becomes vector instructions, which the mathematics library's does not.
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693145751953125, 1.42860682030941723212e-6
_LOG2E_32, _LN2_HIGH_32, _LN2_LOW_32 = np.float32(_LOG2E), np.float32(0.693359375), np.float32(-2.12194440e-4)
_BIAS_32, _ROUNDED_BIAS_32 = np.float32(127), np.float32(127.5)
_LEAST_32, _MOST_32, _ZERO_32, _ONE_32, _TWO_32, _127_32 = (np.float32(v) for v in (-87, 88, 0, 1, 2, 127))
_1_2, _1_6, _1_24, _1_120, _1_720, _1_5040 = (np.float32(1 / v) for v in (2, 6, 24, 120, 720, 5040))
_1_3, _1_5, _1_7, _1_9, _1_11, _1_13, _1_15 = (np.float32(1 / v) for v in (3, 5, 7, 9, 11, 13, 15))


@precise
def _exp32(x: Any) -> Any:
    bounded = min(max(x, _LEAST_32), _MOST_32)
    biased = np.int32(bounded * _LOG2E_32 + _ROUNDED_BIAS_32)
    n = np.float32(biased) - _BIAS_32
    r = (bounded - n * _LN2_HIGH_32) - n * _LN2_LOW_32
    tail = ((((_1_5040 * r + _1_720) * r + _1_120) * r + _1_24) * r + _1_6) * r + _1_2
    value = (tail * (r * r) + r + _ONE_32) * _power_of_two(biased)
    value = value if x >= _LEAST_32 else _ZERO_32
    return value if x == x else x


@precise
def _exp64(x: Any) -> Any:
    bounded = min(max(x, -708.0), 709.0)
    biased = np.int64(bounded * _LOG2E + 1023.5)
    n = np.float64(biased) - 1023.0
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    tail = ((1 / 6227020800 * r + 1 / 479001600) * r + 1 / 39916800) * r + 1 / 3628800
    tail = (((tail * r + 1 / 362880) * r + 1 / 40320) * r + 1 / 5040) * r + 1 / 720
    tail = (((tail * r + 1 / 120) * r + 1 / 24) * r + 1 / 6) * r + 1 / 2
    value = (tail * (r * r) + r + 1.0) * _power_of_two(biased)
    value = value if x >= -708.0 else 0.0
    return value if x == x else x


# log(1 + u) = 2 artanh(s) with s = u / (2 + u) <= 1/3 for u = exp(−|x|) <= 1
@precise
def _softplus32(x: Any) -> Any:
    u = _exp32(-abs(x))
    s = u / (_TWO_32 + u)
    z = s * s
    series = ((((((_1_15 * z + _1_13) * z + _1_11) * z + _1_9) * z + _1_7) * z + _1_5) * z + _1_3) * z + _ONE_32
    return max(x, _ZERO_32) + _TWO_32 * s * series


@precise
def _softplus64(x: Any) -> Any:
    u = _exp64(-abs(x))
    s = u / (2.0 + u)
    z = s * s
    series = 1 / 35
    series = (((series * z + 1 / 33) * z + 1 / 31) * z + 1 / 29) * z + 1 / 27
    series = (((series * z + 1 / 25) * z + 1 / 23) * z + 1 / 21) * z + 1 / 19
    series = (((series * z + 1 / 17) * z + 1 / 15) * z + 1 / 13) * z + 1 / 11
    series = ((((series * z + 1 / 9) * z + 1 / 7) * z + 1 / 5) * z + 1 / 3) * z + 1.0
    return max(x, 0.0) + 2.0 * s * series


def number(x: Any) -> Any:
    """What is given, or, for the bits of a bfloat16 and an int8, that as float32."""
    raise NotImplementedError("for compiled functions only")


def keep(vector: Any, kept: Any, scale: Any) -> None:
    """Store numbers as what ``kept`` is of: numbers, bits of bfloat16, or int8, which ``scale`` (1, 1) goes with."""
    raise NotImplementedError("for compiled functions only")


def exp(x: Any) -> Any:
    """To the last digits up to exp(88) in float32 and exp(709) in float64, where it stays; below exp(−87), 0."""
    raise NotImplementedError("for compiled functions only")


def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without the library's threshold."""
    raise NotImplementedError("for compiled functions only")


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(−x))."""
    raise NotImplementedError("for compiled functions only")


@overload(number, strict=False)
def _number(x: Any) -> Any:
    if x == types.int8:
        return lambda x: np.float32(x)
    return (lambda x: _widened(x)) if x == types.uint16 else (lambda x: x)


@overload(keep, strict=False)
def _keep(vector: Any, kept: Any, scale: Any) -> Any:
    if kept.dtype == types.uint16:
        return lambda vector, kept, scale: _keep_bits(vector, kept)
    if kept.dtype == types.int8:
        return lambda vector, kept, scale: _keep_int8(vector, kept, scale)
    return lambda vector, kept, scale: _keep_numbers(vector, kept)


@loop
def _keep_numbers(vector: Any, kept: Any) -> None:
    kept[:] = vector


@precise
def _keep_bits(vector: Any, kept: Any) -> None:
    """To the nearest, half to even, NaN as NaN."""
    for w in range(len(vector)):
        bits = _bits_of(vector[w])
        kept[w] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if vector[w] == vector[w] else 0x7FC0


@precise
def _keep_int8(vector: Any, kept: Any, scale: Any) -> None:
    """As ``AttentionState`` does: in units of a 127th of the largest, half to even; the unit of a NaN is NaN."""
    most, known = vector.dtype.type(1e-12), True
    for w in range(len(vector)):
        most, known = max(most, abs(vector[w])), known and vector[w] == vector[w]
    scale[0, 0] = most / _127_32 if known else np.nan
    for w in range(len(vector)):
        kept[w] = np.int8(np.rint(vector[w] / scale[0, 0])) if known else 0


@overload(exp, strict=False)
def _exp(x: Any) -> Any:
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: _exp64(x))


@overload(softplus, strict=False)
def _softplus(x: Any) -> Any:
    return (lambda x: _softplus32(x)) if x == types.float32 else (lambda x: _softplus64(x))


@overload(sigmoid, strict=False)
def _sigmoid(x: Any) -> Any:
    if x == types.float32:
        return lambda x: _ONE_32 / (_ONE_32 + _exp32(-x))
    return lambda x: 1.0 / (1.0 + _exp64(-x))


@loop
def normalise(x: Array, weight: Array, eps: float, out: Array) -> None:
    """Root-mean-square normalisation of the rows of x (R, D)."""
    rows, width = x.shape
    for r in range(rows):
        total = x.dtype.type(0)
        for d in range(width):
            total += x[r, d] * x[r, d]
        inverse = x.dtype.type(1 / np.sqrt(total / width + eps))
        for d in range(width):
            out[r, d] = x[r, d] * inverse * weight[d]


@loop
def _normalise_groups(x: Array, weight: Array, eps: float, groups: int) -> None:
    """``normalise``, in place, each of so many groups of numbers of a row for itself."""
    width = x.shape[1] // groups
    for r in range(len(x)):
        for g in range(groups):
            values, weights = x[r, g * width : (g + 1) * width], weight[g * width : (g + 1) * width]
            total = x.dtype.type(0)
            for d in range(width):
                total += values[d] * values[d]
            inverse = x.dtype.type(1 / np.sqrt(total / width + eps))
            for d in range(width):
                values[d] = values[d] * inverse * weights[d]


@loop
def _convolve_tile(
    x: Array, first: int, start: int, length: int, history: Array, taps: Array, bias: Array, out: Array
) -> None:
    """silu(convolution) of tokens from ``start`` and channels from ``first`` on of x (T, ·), into out (length, C)."""
    past, width = history.shape
    for j in range(length):
        t = start + j
        for c in range(width):
            out[j, c] = bias[c] + x[t, first + c] * taps[past, c]
        for k in range(past):
            source = t - past + k
            if source >= 0:
                for c in range(width):
                    out[j, c] += x[source, first + c] * taps[k, c]
            else:
                for c in range(width):
                    out[j, c] += history[source + past, c] * taps[k, c]
        for c in range(width):
            out[j, c] *= sigmoid(out[j, c])


@loop
def _remember(x: Array, first: int, tokens: int, history: Array) -> None:
    """Make the last of ``tokens`` inputs x (T, ·) the convolution's history (taps − 1, C)."""
    past, width = history.shape
    for k in range(past):
        source = tokens - past + k
        for c in range(width):
            history[k, c] = x[source, first + c] if source >= 0 else history[source + past, c]


@loop
def convolve(x: Array, tokens: Array, history: Array, taps: Array, bias: Array, out: Array) -> None:
    """silu of the causal convolution of the first C channels of x (B, T, ·), into out (B, T, C).

    ``tokens`` (B,): real ones of each row; ``history`` (B, taps − 1, C) is read and replaced.
    """
    past, width = history.shape[1:]
    if len(history) != len(tokens) or taps.shape != (past + 1, width) or out.shape[2] != width:
        raise TensorError(OTHER_SHAPE)
    for b in range(len(tokens)):
        _convolve_tile(x[b], 0, 0, tokens[b], history[b], taps, bias, out[b])
        out[b, tokens[b] :] = 0
        _remember(x[b], 0, tokens[b], history[b])


@loop
def scan_mamba1(
    x: Array,
    steps: Array,
    selected: Array,
    gated: Array,
    tokens: Array,
    A: Array,
    D: Array,
    dt_bias: Array,
    state: Array,
    out: Array,
) -> None:
    """The selective scan, its skip connection and its gate.

    x, steps before bias and softplus, out (B, T, d); selected (B, T, · + 2 N): B and C are its last; gated
    (B, T, 2 d): the gate is its second half; tokens (B,); A, rates (N, d); state (B, N, d) is read and replaced.
    """
    n_state, width = A.shape
    if state.shape != (len(tokens), n_state, width):
        raise TensorError(OTHER_SHAPE)
    at_b = selected.shape[2] - 2 * n_state
    delta, driven, y = np.empty(CHANNELS, x.dtype), np.empty(CHANNELS, x.dtype), np.empty(CHANNELS, x.dtype)
    for b in range(len(tokens)):
        for first in range(0, width, CHANNELS):
            after = min(first + CHANNELS, width)
            channels = slice(first, after)
            for t in range(tokens[b]):
                u, raw, bias, skip = x[b, t, channels], steps[b, t, channels], dt_bias[channels], D[channels]
                for c in range(after - first):
                    delta[c] = softplus(raw[c] + bias[c])
                    driven[c] = delta[c] * u[c]
                    y[c] = skip[c] * u[c]
                for n in range(n_state):
                    Bn, Cn = selected[b, t, at_b + n], selected[b, t, at_b + n_state + n]
                    rates, values = A[n, channels], state[b, n, channels]
                    for c in range(after - first):
                        value = values[c] * exp(delta[c] * rates[c]) + driven[c] * Bn
                        values[c] = value
                        y[c] += value * Cn
                gate, into = gated[b, t, width + first : width + after], out[b, t, channels]
                for c in range(after - first):
                    into[c] = y[c] * gate[c] * sigmoid(gate[c])
        out[b, tokens[b] :] = 0


@loop
def _scan_token(u: Array, decay: float, Bn: Array, Cn: Array, state: Array, y: Array) -> None:
    """One token of one head: state (P, N) = decay state + u Bᵀ, and y (P,) = state C."""
    width, n_state = state.shape
    for i in range(width):
        total, drive = u.dtype.type(0), u[i]
        for n in range(n_state):
            value = state[i, n] * decay + drive * Bn[n]
            state[i, n] = value
            total += value * Cn[n]
        y[i] = total


@loop
def _scan_tile(u: Array, decay: Array, mixed: Array, at_b: int, at_c: int, state: Array, y: Array) -> None:
    """``_scan_token`` for a tile of tokens, u and y (T, P), of a state (N, P); B and C are columns of ``mixed`` (T, ·).

    In this layout nothing is summed across a vector. The state is read and written once for four tokens.
    """
    n_state, width = state.shape
    y[: len(u)] = 0
    whole = len(u) // 4 * 4
    for t in range(0, whole, 4):
        u0, u1, u2, u3 = u[t], u[t + 1], u[t + 2], u[t + 3]
        y0, y1, y2, y3 = y[t], y[t + 1], y[t + 2], y[t + 3]
        d0, d1, d2, d3 = decay[t], decay[t + 1], decay[t + 2], decay[t + 3]
        m0, m1, m2, m3 = mixed[t], mixed[t + 1], mixed[t + 2], mixed[t + 3]
        for n in range(n_state):
            b0, b1, b2, b3 = m0[at_b + n], m1[at_b + n], m2[at_b + n], m3[at_b + n]
            c0, c1, c2, c3 = m0[at_c + n], m1[at_c + n], m2[at_c + n], m3[at_c + n]
            values = state[n]
            for i in range(width):
                value = values[i] * d0 + u0[i] * b0
                y0[i] += value * c0
                value = value * d1 + u1[i] * b1
                y1[i] += value * c1
                value = value * d2 + u2[i] * b2
                y2[i] += value * c2
                value = value * d3 + u3[i] * b3
                y3[i] += value * c3
                values[i] = value
    for t in range(whole, len(u)):
        drive, into = u[t], y[t]
        for n in range(n_state):
            b, c = mixed[t, at_b + n], mixed[t, at_c + n]
            values = state[n]
            for i in range(width):
                value = values[i] * decay[t] + drive[i] * b
                values[i] = value
                into[i] += value * c


@loop
def mix_mamba2(
    projected: Array,
    tokens: Array,
    history: Array,
    state: Array,
    taps: Array,
    bias: Array,
    A: Array,
    dt_bias: Array,
    D: Array,
    weight: Array,
    eps: float,
    normalised: int,
    groups: int,
    least: float,
    most: float,
    out: Array,
) -> None:
    """All of a Mamba-2 mixer between its two products: convolution, scan, gate, normalisation, into out (B, T, d).

    projected (B, T, d + C + H): gate, inputs of the convolution, steps before bias and softplus; tokens (B,);
    history (B, taps − 1, C) and state (B, H, P, N) are read and replaced; A, rates (H,); weight (d,). ``normalised``
    groups of channels have a norm each, ``groups`` of heads share B and C, steps are between ``least`` and ``most``.
    """
    heads, width, n_state = state.shape[1:]
    inner = heads * width
    at_steps = inner + history.shape[2]
    if len(history) != len(tokens) or len(state) != len(tokens) or taps.shape != (history.shape[1] + 1, len(bias)):
        raise TensorError(OTHER_SHAPE)
    if history.shape[2] != len(bias) or len(bias) != inner + 2 * groups * n_state or len(weight) != inner:
        raise TensorError(OTHER_SHAPE)
    if projected.shape[2] != at_steps + heads or len(A) != heads or inner % normalised > 0:
        raise TensorError(OTHER_SHAPE)
    dtype = projected.dtype
    bounded = least > 0 or most < np.inf
    mixed = np.empty((TILE, history.shape[2]), dtype)
    steps, decay = np.empty((heads, TILE), dtype), np.empty((heads, TILE), dtype)
    transposed = np.empty((n_state, width), dtype)
    u, y = np.empty((TILE, width), dtype), np.empty((TILE, width), dtype)
    for b in range(len(tokens)):
        for start in range(0, tokens[b], TILE):
            length = min(TILE, tokens[b] - start)
            _convolve_tile(projected[b], inner, start, length, history[b], taps, bias, mixed)
            for j in range(length):
                for h in range(heads):
                    steps[h, j] = softplus(projected[b, start + j, at_steps + h] + dt_bias[h])
                    if bounded:
                        steps[h, j] = min(max(steps[h, j], dtype.type(least)), dtype.type(most))
                    decay[h, j] = exp(steps[h, j] * A[h])
            for h in range(heads):
                at_b = inner + h // (heads // groups) * n_state
                at_c = at_b + groups * n_state
                channels = slice(h * width, (h + 1) * width)
                for j in range(length):
                    x, driven, dt = mixed[j, channels], u[j], steps[h, j]
                    for i in range(width):
                        driven[i] = x[i] * dt
                if length == 1:
                    B, C = mixed[0, at_b : at_b + n_state], mixed[0, at_c : at_c + n_state]
                    _scan_token(u[0], decay[h, 0], B, C, state[b, h], y[0])
                else:
                    transposed[:] = state[b, h].T
                    _scan_tile(u[:length], decay[h], mixed, at_b, at_c, transposed, y)
                    state[b, h] = transposed.T
                for j in range(length):
                    x, scanned, into = mixed[j, channels], y[j], out[b, start + j, channels]
                    gate = projected[b, start + j, channels]
                    for i in range(width):
                        into[i] = (scanned[i] + D[h] * x[i]) * gate[i] * sigmoid(gate[i])
            done = out[b, start : start + length]
            if normalised == 1:
                normalise(done, weight, eps, done)
            else:
                _normalise_groups(done, weight, eps, normalised)
        out[b, tokens[b] :] = 0
        _remember(projected[b], inner, tokens[b], history[b])


@loop
def _rotate(x: Array, position: int, base: float, turned: int) -> None:
    """Rotary positions, in place, of the first numbers of the heads x (heads, W)."""
    heads, half = len(x), turned // 2
    for i in range(half):
        angle = position * base ** (-i / half)  # in double: positions may be large
        cos, sin = x.dtype.type(np.cos(angle)), x.dtype.type(np.sin(angle))
        for h in range(heads):
            a, b = x[h, i], x[h, half + i]
            x[h, i], x[h, half + i] = a * cos - b * sin, a * sin + b * cos


@loop
def _compare(query: Array, keys: Array, scores: Array) -> None:
    """Products of a query (W,) with keys (T, W)."""
    for t in range(len(keys)):
        key, score = keys[t], query.dtype.type(0)
        for w in range(len(query)):
            score += query[w] * number(key[w])
        scores[t] = score


@loop
def _scale(scores: Array, scales: Array) -> None:
    """Times scales (T, 1)."""
    for t in range(len(scales)):
        scores[t] *= scales[t, 0]


@loop
def _mix(shares: Array, values: Array, out: Array) -> None:
    """The sum of values (T, W), each times its share.

    Four are added at a time, since a sum in memory waits for the one before it; ``_multiply`` tells why from afar.
    """
    apart, width = len(values) // 4, len(out)
    out[:] = 0
    for t in range(apart):
        v0, v1, v2, v3 = values[t], values[t + apart], values[t + 2 * apart], values[t + 3 * apart]
        s0, s1, s2, s3 = shares[t], shares[t + apart], shares[t + 2 * apart], shares[t + 3 * apart]
        for w in range(width):
            out[w] += (s0 * number(v0[w]) + s1 * number(v1[w])) + (s2 * number(v2[w]) + s3 * number(v3[w]))
    for t in range(4 * apart, len(values)):
        value, share = values[t], shares[t]
        for w in range(width):
            out[w] += share * number(value[w])


@loop
def _attend_pieces(
    queries: Array,
    kept: Kept,
    visible: Array,
    ends: Array,
    scale: float,
    parts: Array,
    most: Array,
    total: Array,
    first: int,
    step: int,
) -> None:
    """Queries attend to the pieces ``first``, ``first + step``, … of all rows and heads.

    For each, ``parts`` becomes the sum of values times exp(score − ``most``), ``total`` that of these exponentials.
    """
    keys, values, key_scales, value_scales = kept
    kv_heads, pieces, width = keys.shape[1], parts.shape[2], keys.shape[3]
    per_head = parts.shape[1] // kv_heads
    factor, scaled, hidden = queries.dtype.type(scale), key_scales.shape[2] > 0, visible.shape[1] > 0
    scores = np.empty(PIECE, queries.dtype)
    summed = np.empty(width, queries.dtype)  # numba's arrays are aligned; a sum in others takes twice as long
    for i in range(first, len(ends) * kv_heads * pieces, step):
        b, k, p = i // (kv_heads * pieces), i // pieces % kv_heads, i % pieces
        start, stop = p * PIECE, min((p + 1) * PIECE, ends[b])
        if start >= stop:
            continue
        for h in range(k * per_head, (k + 1) * per_head):
            _compare(queries[b, h * width : (h + 1) * width], keys[b, k, start:stop], scores)
            if scaled:
                _scale(scores, key_scales[b, k, start:stop])
            if hidden:
                for t in range(stop - start):
                    scores[t] = scores[t] if visible[b, start + t] else -np.inf
            top, whole = queries.dtype.type(-np.inf), queries.dtype.type(0)
            for t in range(stop - start):
                scores[t] *= factor
                top = max(top, scores[t])
            origin = top if top > -np.inf else queries.dtype.type(0)  # where none is visible, all become 0
            for t in range(stop - start):
                scores[t] = exp(scores[t] - origin)
                whole += scores[t]
            if scaled:
                _scale(scores, value_scales[b, k, start:stop])
            _mix(scores, values[b, k, start:stop], summed)
            most[b, h, p], total[b, h, p] = top, whole
            for w in range(width):
                parts[b, h, p, w] = summed[w]


@compile_with(*LIBERTIES, parallel=True)
def _attend_in_parts(
    queries: Array,
    kept: Kept,
    visible: Array,
    ends: Array,
    scale: float,
    parts: Array,
    most: Array,
    total: Array,
    threads: int,
) -> None:
    for thread in prange(threads):
        _attend_pieces(queries, kept, visible, ends, scale, parts, most, total, int64(thread), threads)


@loop
def _attend(queries: Array, threads: int, kept: Kept, visible: Array, ends: Array, scale: float, out: Array) -> None:
    """Queries (B, · W) attend to the first ``ends`` (B,) keys of their rows; where that is 0, out is.

    Pieces of the keys, the same for any number of threads, are joined by their normalisers, as in FlashAttention
    (arXiv 2205.14135). ``visible`` is (B, S), or (B, 0): all are.
    """
    rows, width, pieces = len(queries), kept[0].shape[3], 0
    for end in ends:
        pieces = max(pieces, (end + PIECE - 1) // PIECE)
    n_heads = out.shape[1] // width
    parts = np.empty((rows, n_heads, pieces, width), queries.dtype)
    most, total = np.empty((rows, n_heads, pieces), queries.dtype), np.empty((rows, n_heads, pieces), queries.dtype)
    if threads > 1 and 2 * n_heads * width * ends.sum() >= SHARED * threads:
        _attend_in_parts(queries, kept, visible, ends, scale, parts, most, total, threads)
    else:
        _attend_pieces(queries, kept, visible, ends, scale, parts, most, total, int64(0), int64(1))
    joined = np.empty(width, queries.dtype)
    for b in range(rows):
        filled = (ends[b] + PIECE - 1) // PIECE
        for h in range(n_heads):
            whole, top = queries.dtype.type(0), queries.dtype.type(-np.inf)
            joined[:] = 0
            for p in range(filled):
                top = max(top, most[b, h, p])
            for p in range(filled):
                share = exp(most[b, h, p] - top)
                whole += share * total[b, h, p]
                for w in range(width):
                    joined[w] += share * parts[b, h, p, w]
            for w in range(width):
                out[b, h * width + w] = joined[w] / whole if filled > 0 else 0


@loop
def attend(
    projected: Array,
    threads: int,
    tokens: Array,
    held: Array,
    positions: Array,
    kept: Kept,
    ring: bool,
    base: float,
    turned: int,
    scale: float,
    out: Array,
) -> None:
    """One token of each row attends to what its row has kept, itself included.

    projected (B, (n_heads + 2 kv_heads) W): queries, keys, values; tokens (B,): 0 where a row has no new one; held
    (B,): tokens kept so far, in a ring or in order; positions (B,), by which rotary angles of this ``base`` turn the
    first numbers of a head; ``scale`` of products; out (B, n_heads W).
    """
    keys, values, key_scales, value_scales = kept
    kv_heads, slots, width = keys.shape[1:]
    n_heads = projected.shape[1] // width - 2 * kv_heads
    if len(keys) != len(tokens) or not _fits(kept) or out.shape[1] != n_heads * width or turned > width:
        raise TensorError(OTHER_SHAPE)
    ends = np.zeros(len(tokens), np.int64)
    for b in range(len(tokens)):
        if tokens[b] == 0:
            continue
        if held[b] < 0 or (held[b] >= slots and not ring):
            raise TensorError(OTHER_SHAPE)
        heads = projected[b].reshape(-1, width)
        if turned > 0:
            _rotate(heads[: n_heads + kv_heads], positions[b], base, turned)
        slot = held[b] % slots if ring else held[b]
        for k in range(kv_heads):
            keep(heads[n_heads + k], keys[b, k, slot], key_scales[b, k, slot : slot + 1])
            keep(heads[n_heads + kv_heads + k], values[b, k, slot], value_scales[b, k, slot : slot + 1])
        ends[b] = min(held[b] + 1, slots)
    _attend(projected, threads, kept, np.empty((len(tokens), 0), np.bool_), ends, scale, out)


@loop
def attend_across(queries: Array, threads: int, kept: Kept, visible: Array, scale: float, out: Array) -> None:
    """Queries (B, n_heads W) attend to what is ``visible`` (B, S) of what is kept, or to all of it: (B, 0)."""
    rows, (kv_heads, length, width) = len(queries), kept[0].shape[1:]
    per_head = queries.shape[1] // (kv_heads * width)
    if len(kept[0]) != rows or not _fits(kept) or per_head * kv_heads * width != queries.shape[1]:
        raise TensorError(OTHER_SHAPE)
    if len(visible) != rows or visible.shape[1] not in (0, length):
        raise TensorError(OTHER_SHAPE)
    _attend(queries, threads, kept, visible, np.full(rows, length), scale, out)


@loop
def _fits(kept: Kept) -> bool:
    """Whether keys, values and scales are of one shape."""
    keys, values, key_scales, value_scales = kept
    rows, kv_heads, slots, _ = keys.shape
    scales = (rows, kv_heads, slots if keys.itemsize == 1 else 0, 1)
    return values.shape == keys.shape and key_scales.shape == scales and value_scales.shape == scales


@loop
def product(x: Array, matrix: Matrix, threads: int) -> Array:
    """Rows x (B, K) times a matrix, for few rows: it is read once, and memory is what that waits for."""
    weight, scaled, right, stored, plain, bits = matrix
    if x.shape[1] != (right if len(scaled) > 0 else weight).shape[1]:
        raise TensorError(OTHER_SHAPE)
    inner = np.empty((len(x), len(right)), x.dtype)
    out = np.empty((len(x), max(len(weight), len(bits))), x.dtype)
    if len(scaled) > 0:
        multiply(x, right, inner, threads)
        for b in range(len(x)):
            row, factors = inner[b], scaled[b % len(scaled)]
            for r in range(len(right)):
                row[r] *= factors[r]
        multiply(inner, weight, out, threads)
    elif len(bits) > 0:
        multiply(x, bits, out, threads)
    else:
        multiply(x, weight, out, threads)
    for b in plain:
        if len(bits) > 0:
            multiply(x[b : b + 1], bits, out[b : b + 1], threads)
        else:
            multiply(x[b : b + 1], stored, out[b : b + 1], threads)
    return out


@loop
def multiply(x: Array, weight: Array, out: Array, threads: int) -> None:
    """x (B, K) times weight (O, K), numbers or the bits of bfloat16, into out (B, O); threads share a large product."""
    if threads > 1 and len(x) * weight.size >= SHARED * threads:
        _multiply_in_parts(x, weight, out, threads)
    else:
        _multiply(x, weight, out, int64(0), len(weight))


@compile_with(*LIBERTIES, parallel=True)
def _multiply_in_parts(x: Array, weight: Array, out: Array, threads: int) -> None:
    for part in prange(threads):
        _multiply(x, weight, out, len(weight) * part // threads, len(weight) * (part + 1) // threads)


@loop
def _multiply(x: Array, weight: Array, out: Array, start: int, stop: int) -> None:
    """Some columns.

    Four rows of the matrix are read at a time, far from each other: a processor fetches each of several streams ahead,
    and one core reads half as much again as from a single one. The last rows may be done twice.
    """
    apart = (stop - start + 3) // 4
    for o in range(start, start + apart):
        o1, o2, o3 = min(o + apart, stop - 1), min(o + 2 * apart, stop - 1), min(o + 3 * apart, stop - 1)
        w0, w1, w2, w3 = weight[o], weight[o1], weight[o2], weight[o3]
        for b in range(0, len(x) - 1, 2):
            values, others = x[b], x[b + 1]
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = x.dtype.type(0)
            for k in range(len(values)):
                n0, n1, n2, n3 = number(w0[k]), number(w1[k]), number(w2[k]), number(w3[k])
                s0, s1, s2, s3 = s0 + values[k] * n0, s1 + values[k] * n1, s2 + values[k] * n2, s3 + values[k] * n3
                t0, t1, t2, t3 = t0 + others[k] * n0, t1 + others[k] * n1, t2 + others[k] * n2, t3 + others[k] * n3
            out[b, o], out[b, o1], out[b, o2], out[b, o3] = s0, s1, s2, s3
            out[b + 1, o], out[b + 1, o1], out[b + 1, o2], out[b + 1, o3] = t0, t1, t2, t3
        if len(x) % 2:
            b = len(x) - 1
            values = x[b]
            s0 = s1 = s2 = s3 = x.dtype.type(0)
            for k in range(len(values)):
                n0, n1, n2, n3 = number(w0[k]), number(w1[k]), number(w2[k]), number(w3[k])
                s0, s1, s2, s3 = s0 + values[k] * n0, s1 + values[k] * n1, s2 + values[k] * n2, s3 + values[k] * n3
            out[b, o], out[b, o1], out[b, o2], out[b, o3] = s0, s1, s2, s3


@loop
def _normalised(x: Array, weight: Array, eps: float) -> Array:
    out = np.empty_like(x)
    normalise(x, weight, eps, out)
    return out


@loop
def _add(x: Array, y: Array, residual: float) -> None:
    factor = x.dtype.type(residual)
    for b in range(len(x)):
        row, change = x[b], y[b]
        for d in range(len(row)):
            row[d] += change[d] * factor


# The steps below are whole blocks for one more token of few rows: x (B, D) becomes x + residual * mixer(norm(x)). Each
# matrix comes as the ``Matrix`` that ``product`` takes; the other arguments are those of the functions above.


@loop
def step_mamba1(
    x: Array,
    threads: int,
    tokens: Array,
    history: Array,
    state: Array,
    weight: Array,
    eps: float,
    residual: float,
    in_proj: Matrix,
    x_proj: Matrix,
    dt_proj: Matrix,
    out_proj: Matrix,
    taps: Array,
    bias: Array,
    A: Array,
    D: Array,
    dt_bias: Array,
) -> None:
    """A block of Mamba."""
    rows, width = len(x), A.shape[1]
    projected = product(_normalised(x, weight, eps), in_proj, threads)
    inputs = projected.reshape(rows, 1, 2 * width)
    mixed, out = np.empty((rows, 1, width), x.dtype), np.empty((rows, 1, width), x.dtype)
    convolve(inputs, tokens, history, taps, bias, mixed)
    selected = product(mixed.reshape(rows, width), x_proj, threads)
    rank = selected.shape[1] - 2 * len(A)
    steps = product(np.ascontiguousarray(selected[:, :rank]), dt_proj, threads)
    scan_mamba1(
        mixed, steps.reshape(rows, 1, width), selected.reshape(rows, 1, -1), inputs, tokens, A, D, dt_bias, state, out
    )
    _add(x, product(out.reshape(rows, width), out_proj, threads), residual)


@loop
def step_mamba2(
    x: Array,
    threads: int,
    tokens: Array,
    history: Array,
    state: Array,
    weight: Array,
    eps: float,
    residual: float,
    in_proj: Matrix,
    out_proj: Matrix,
    taps: Array,
    bias: Array,
    A: Array,
    dt_bias: Array,
    D: Array,
    inner_weight: Array,
    inner_eps: float,
    normalised: int,
    groups: int,
    least: float,
    most: float,
) -> None:
    """A block of Mamba-2."""
    rows, width = len(x), len(inner_weight)
    projected = product(_normalised(x, weight, eps), in_proj, threads).reshape(rows, 1, -1)
    out = np.empty((rows, 1, width), x.dtype)
    settings = (inner_eps, normalised, groups, least, most)
    mix_mamba2(projected, tokens, history, state, taps, bias, A, dt_bias, D, inner_weight, *settings, out)
    _add(x, product(out.reshape(rows, width), out_proj, threads), residual)


@loop
def step_attention(
    x: Array,
    threads: int,
    tokens: Array,
    held: Array,
    positions: Array,
    kept: Kept,
    weight: Array,
    eps: float,
    residual: float,
    qkv: Matrix,
    out_proj: Matrix,
    ring: bool,
    base: float,
    turned: int,
    scale: float,
) -> None:
    """A block of attention."""
    projected = product(_normalised(x, weight, eps), qkv, threads)
    out = np.empty((len(x), projected.shape[1] - 2 * kept[0].shape[1] * kept[0].shape[3]), x.dtype)
    attend(projected, threads, tokens, held, positions, kept, ring, base, turned, scale, out)
    _add(x, product(out, out_proj, threads), residual)


@loop
def step_cross_attention(
    x: Array,
    threads: int,
    kept: Kept,
    visible: Array,
    weight: Array,
    eps: float,
    residual: float,
    q_proj: Matrix,
    out_proj: Matrix,
    scale: float,
) -> None:
    """A block of attention to an encoder."""
    queries = product(_normalised(x, weight, eps), q_proj, threads)
    out = np.empty_like(queries)
    attend_across(queries, threads, kept, visible, scale, out)
    _add(x, product(out, out_proj, threads), residual)


@loop
def step_feed_forward(
    x: Array,
    threads: int,
    weight: Array,
    eps: float,
    residual: float,
    in_proj: Matrix,
    out_proj: Matrix,
) -> None:
    """A feed-forward block."""
    projected = product(_normalised(x, weight, eps), in_proj, threads)
    width = projected.shape[1] // 2
    out = np.empty((len(x), width), x.dtype)
    for b in range(len(x)):
        gate, up, into = projected[b, :width], projected[b, width:], out[b]
        for c in range(width):
            into[c] = gate[c] * sigmoid(gate[c]) * up[c]
    _add(x, product(out, out_proj, threads), residual)
