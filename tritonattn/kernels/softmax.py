"""Online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), in base 2.

    x = exp2_scale s        m' = max(m, max_j x_j)        alpha = 2^(m - m')
    l'   = alpha l   + sum_j 2^(x_j - m')
    acc' = alpha acc + sum_j 2^(x_j - m') v_j             o = acc / l        lse = (m + log2 l) ln 2
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import LN2, apply_keep_mask, apply_keep_scale
from .tile import dot_acc, scale_tile, zero_tile


class Softmax(NamedTuple):
    """Running state of each query row."""

    m: tl.tensor          # [M]     largest exponent x; with a bias, largest score s
    l: tl.tensor          # [M]     sum of 2^(x - m)
    l_rounded: tl.tensor  # [M]     the same sum over the weights rounded to the dtype of V; if not PRECISE, the same as l
    acc: tuple            # [M, DV] sum of 2^(x - m) v, in parts


@triton.jit
def softmax_start(M: tl.constexpr, static):
    """Return the state before the first key."""
    zeros = tl.zeros([M], static.ACC)
    return Softmax(tl.full([M], float("-inf"), static.ACC), zeros, zeros, zero_tile(M, static.DV, static.ACC))


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


@triton.jit
def softmax_step(state, s, v, row, col, scoring, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Return the state after the next N keys, from their scores s [M, N] and values v [N, DV].

    Dropout applies to the weights of acc only: l sums all weights.
    """
    # the maximum of a row is -inf before its first unmasked key: avoid -inf - (-inf)
    if len(scoring.mods.bias) == 0:
        m = tl.maximum(state.m, tl.max(s, 1) * scoring.exp2_scale)
        pivot = tl.where(m == float("-inf"), 0.0, m)
        alpha = tl.exp2(state.m - pivot)
        p = tl.exp2(s * scoring.exp2_scale - pivot[:, None])
    else:
        # subtract first: a bias may be the lowest finite number, which overflows when multiplied by exp2_scale
        m = tl.maximum(state.m, tl.max(s, 1))
        pivot = tl.where(m == float("-inf"), 0.0, m)
        alpha = tl.exp2((state.m - pivot) * scoring.exp2_scale)
        p = tl.exp2((s - pivot[:, None]) * scoring.exp2_scale)
    l = state.l * alpha + tl.sum(p, 1)
    l_rounded = l
    if PRECISE:
        p = round_p(p, v[0].dtype)
        l_rounded = state.l_rounded * alpha + tl.sum(p, 1)
    p = apply_keep_mask(p, row, col, scoring, False)
    acc = dot_acc(scale_tile(state.acc, alpha[:, None]), p, v, s, static, MODE)
    return Softmax(m, l, l_rounded, acc)


@triton.jit
def softmax_finish(state, scoring):
    """Return the output [M, DV] in parts, the natural log-sum-exp [M], and log-sum-exp minus largest score [M].

    Rows that attend to no key give an output of 0 and a log-sum-exp of -inf.
    """
    empty = state.l == 0.0
    o = apply_keep_scale(scale_tile(state.acc, (1.0 / tl.where(empty, 1.0, state.l_rounded))[:, None]), scoring)
    lse_minus_max = tl.log2(tl.where(empty, 1.0, state.l))
    if len(scoring.mods.bias) == 0:
        lse = (state.m + lse_minus_max) * LN2
    else:
        lse = state.m + lse_minus_max * LN2
    return o, tl.where(empty, float("-inf"), lse), lse_minus_max * LN2
