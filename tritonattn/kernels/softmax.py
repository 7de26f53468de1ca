"""Online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), in base 2.

    x = exp2_scale s        m' = max(m, max_j x_j)        alpha = 2^(m - m')
    l'   = alpha l   + sum_j 2^(x_j - m')
    acc' = alpha acc + sum_j 2^(x_j - m') v_j             o = acc / l        lse = (m + log2 l) ln 2

Where `subtracts_first`, m is the largest score, not the largest exponent. A sink is one more term of l at the end.

The entropy of a row, in natural logarithms, is H = ln2 (log2 l - t / l) without a sink. It needs one more sum:

    t' = alpha (t + (m - m') l) + sum_j 2^(x_j - m') (x_j - m')
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import LN2, LOG2E, apply_keep_mask, apply_keep_scale
from .tile import dot_acc, scale_tile, zero_tile

LOWEST = tl.constexpr(-2000.0)  # 2^LOWEST is 0 in every dtype; 0 * LOWEST is 0, unlike 0 * -inf


class Softmax(NamedTuple):
    """Running state of each query row."""

    m: tl.tensor          # [M]     largest exponent x, or largest score s
    l: tl.tensor          # [M]     sum of 2^(x - m)
    l_rounded: tl.tensor  # [M]     the same sum over the weights rounded to 16 bits; with MMA_SUM [M, 8], 8 equal columns
    acc: tuple            # [M, DV] sum of 2^(x - m) v, in parts
    t: tuple = ()         # or one element, [M]: sum of 2^(x - m) (x - m)


@triton.constexpr_function
def rounds(dtype, sum_dtype):
    """Return whether weights are rounded to this dtype of V: to 16 bits."""
    return dtype != sum_dtype


@triton.jit
def softmax_start(M: tl.constexpr, static, ENTROPY: tl.constexpr = False):
    """Return the state before the first key. ENTROPY: whether the sum for the entropy is computed."""
    zeros = tl.zeros([M], static.ACC)
    l_rounded = zeros
    if static.MMA_SUM:
        l_rounded = tl.zeros([M, 8], static.ACC)
    t = ()
    if ENTROPY:
        t = (zeros,)
    return Softmax(tl.full([M], float("-inf"), static.ACC), zeros, l_rounded, zero_tile(M, static.DV, static.ACC), t)


@triton.jit
def round_p(p, dtype: tl.constexpr):
    """Return p with the precision of `dtype`, still in its own dtype; NaN stays NaN.

    bfloat16 is truncated. The errors, all downward, nearly cancel, because P is normalised by the sum of the truncated weights.
    Rounding to nearest would be slower, because the result is used twice: GPUs before Blackwell then convert one number per
    instruction, in the unit of the exponentials.
    """
    if dtype == tl.bfloat16 and p.dtype == tl.float32:
        return (p.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return p.to(dtype).to(p.dtype)


@triton.constexpr_function
def subtracts_first(biases, dtype):
    """Return whether the largest score is subtracted before the scale is applied.

    That is exact at any score, and with a bias, which may be the lowest finite number, the product could overflow. In 16 bits
    without a bias one fused multiply-add does both: the rounding error of m, half a unit in its last place, is an exponent that
    all weights of a row have in common. It leaves the range of float16 only where |m| exceeds about 2^28.
    """
    return biases > 0 or dtype == tl.float32 or dtype == tl.float64


@triton.jit
def exponent(s, minus_m, scoring, dtype: tl.constexpr):
    """Return x - m for scores of queries of this dtype."""
    if subtracts_first(len(scoring.mods.bias) + len(scoring.mods.relative) + len(scoring.mods.function), dtype):
        return (s + minus_m) * scoring.exp2_scale
    else:
        return tl.fma(s, scoring.exp2_scale, minus_m)


@triton.jit
def softmax_step(state, s, v, row, col, scoring, static, MODE: tl.constexpr):
    """Return the state after the next N keys, from their scores s [M, N] and values v [N, DV].

    Dropout applies to the weights of acc only: l sums all weights.
    """
    # the maximum of a row is -inf before its first unmasked key: avoid -inf - (-inf)
    if subtracts_first(len(scoring.mods.bias) + len(scoring.mods.relative) + len(scoring.mods.function), v[0].dtype):
        m = tl.maximum(state.m, tl.max(s, 1))
        pivot = tl.where(m == float("-inf"), 0.0, m)
        log2_alpha = (state.m - pivot) * scoring.exp2_scale
    else:
        m = tl.maximum(state.m, tl.max(s, 1) * scoring.exp2_scale)
        pivot = tl.where(m == float("-inf"), 0.0, m)
        log2_alpha = state.m - pivot
    alpha = tl.exp2(log2_alpha)
    x = exponent(s, -pivot[:, None], scoring, v[0].dtype)
    p = tl.exp2(x)
    l = state.l * alpha + tl.sum(p, 1)
    t, l_rounded = state.t, state.l_rounded
    if len(state.t) == 1:
        earlier = state.t[0] + tl.maximum(log2_alpha, LOWEST) * state.l
        t = (earlier * alpha + tl.sum(p * tl.maximum(x, LOWEST), 1),)
    if rounds(v[0].dtype, static.ACC):
        if static.MMA_SUM:
            ones = tl.full([8, s.shape[1]], 1.0, v[0].dtype)
            l_rounded = tl.dot(p.to(v[0].dtype), ones.T, l_rounded * alpha[:, None])
        else:
            p = round_p(p, v[0].dtype)
            l_rounded = l_rounded * alpha + tl.sum(p, 1)
    p = apply_keep_mask(p, row, col, scoring, False)
    acc = dot_acc(scale_tile(state.acc, alpha[:, None]), p, v, s, static, MODE)
    return Softmax(m, l, l_rounded, acc, t)


@triton.jit
def add_sink(m, l, sink, scoring, dtype: tl.constexpr):
    """Return m and l with one more key, whose score is `sink`, and the part of the other keys in this l."""
    if subtracts_first(len(scoring.mods.bias) + len(scoring.mods.relative) + len(scoring.mods.function), dtype):
        sink = sink * (LOG2E / scoring.exp2_scale)
        largest = tl.maximum(m, sink)
        factor, weight = tl.exp2((m - largest) * scoring.exp2_scale), tl.exp2((sink - largest) * scoring.exp2_scale)
    else:
        sink = sink * LOG2E
        largest = tl.maximum(m, sink)
        factor, weight = tl.exp2(m - largest), tl.exp2(sink - largest)
    of_keys = l * factor
    return largest, of_keys + weight, of_keys


@triton.jit
def softmax_finish(state, scoring, static, dtype: tl.constexpr):
    """Return the output [M, DV] in parts, not yet in `dtype`, and three statistics [M] of each row.

    The statistics are the natural log-sum-exp, and the two numbers from which the backward pass computes the weights: -m and
    log2 l. Rows that attend to no key give an output of 0, a log-sum-exp of -inf (with a sink, its score), 0 and +inf.
    """
    empty, l, total = state.l == 0.0, state.l, state.l
    if rounds(dtype, l.dtype):
        total = state.l_rounded
        if static.MMA_SUM:
            total = tl.max(total, 1)
    m, factor, empty_lse = tl.where(empty, 0.0, state.m), 1.0 / tl.where(empty, 1.0, total), float("-inf")
    if len(scoring.mods.sink) == 1:
        empty_lse = scoring.mods.sink[0].to(static.ACC)
        m, l, of_keys = add_sink(m, l, empty_lse, scoring, dtype)
        # the errors of rounded weights cancel in acc / total; the keys' part of all weights is taken from exact ones
        factor *= of_keys / tl.where(empty, 1.0, l)
    o = apply_keep_scale(scale_tile(state.acc, factor[:, None]), scoring)
    log2_l = tl.log2(tl.where(empty, 1.0, l))
    if len(scoring.mods.bias) + len(scoring.mods.relative) + len(scoring.mods.function) > 0:
        lse = m + log2_l * LN2
    elif subtracts_first(0, dtype):
        lse = (m * scoring.exp2_scale + log2_l) * LN2
    else:
        lse = (m + log2_l) * LN2
    return o, tl.where(empty, empty_lse, lse), -m, tl.where(empty, float("inf"), log2_l)


@triton.jit
def row_max(state, scoring, dtype: tl.constexpr):
    """Return [M]: the largest score of each row, without sinks; -inf in rows that attend to no key, NaN where a score is."""
    m = state.m
    if len(scoring.mods.bias) + len(scoring.mods.relative) + len(scoring.mods.function) == 0:
        if subtracts_first(0, dtype):
            m = m * scoring.exp2_scale * LN2
        else:
            m = m * LN2
    return tl.where(state.l == state.l, tl.where(state.l == 0.0, float("-inf"), m), float("nan"))


@triton.jit
def row_entropy(state, minus_m, log2_l, scoring, dtype: tl.constexpr):
    """Return [M]: -sum p ln p over the keys of each row, from the statistics of `softmax_finish`; 0 in rows without keys."""
    empty = state.l == 0.0
    if len(scoring.mods.sink) == 1:
        # relative to the largest exponent of the keys
        moved = minus_m + tl.where(empty, 0.0, state.m)
        if subtracts_first(len(scoring.mods.bias) + len(scoring.mods.relative) + len(scoring.mods.function), dtype):
            log2_l -= moved * scoring.exp2_scale
        else:
            log2_l -= moved
    # where the sink has all the weight, an infinite log2 l times 0 would be NaN
    log2_l = tl.minimum(tl.where(empty, 0.0, log2_l), -LOWEST)
    entropy = tl.exp2(-log2_l) * (state.l * log2_l - state.t[0]) * LN2
    # rounding may make it negative, and its square root NaN; a NaN stays
    return tl.where(entropy < 0.0, 0.0, entropy)
