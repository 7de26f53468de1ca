"""Softmax of a row that arrives in pieces (Milakov and Gimelshein, 2018, arXiv 1805.02867), in base 2."""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import LN2, apply_keep_mask, apply_keep_scale
from .tile import dot_acc, scale_tile, zero_tile


class Softmax(NamedTuple):
    """What must be remembered of the keys seen so far, per query row."""

    m: tl.tensor  # [M]     largest exponent; with a bias, largest score
    l: tl.tensor  # [M]     sum of 2^(x - m)
    l_rounded: tl.tensor  # [M]     the same sum of the weights as they met V, rounded to its dtype
    acc: tuple    # [M, DV] sum of 2^(x - m) v, in parts


@triton.jit
def softmax_start(M: tl.constexpr, static):
    nothing = tl.zeros([M], static.ACC)
    return Softmax(tl.full([M], float("-inf"), static.ACC), nothing, nothing, zero_tile(M, static.DV, static.ACC))


@triton.jit
def round_p(p, dtype: tl.constexpr):
    """p as it will be multiplied, in its own dtype still; a nan stays one.

    bfloat16 by cutting bits off, which is as exact once the weights are divided by their sum: used twice, a conversion to
    the nearest is made number by number before Blackwell, and in the unit that makes the exponentials.
    """
    if dtype == tl.bfloat16 and p.dtype == tl.float32:
        return (p.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return p.to(dtype).to(p.dtype)


@triton.jit
def softmax_step(state, s, v, row, col, scoring, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Take in scores s [M, N] of the next N keys and their values v [N, DV]; x = unit s. Weights are dropped after the sum.

        m'   = max(m, max_j x_j)          alpha = 2^(m - m')
        l'   = alpha l   + sum_j 2^(x_j - m')
        acc' = alpha acc + sum_j 2^(x_j - m') v_j
    """
    # a row may have seen nothing yet, or only scores of -inf: keep -inf - (-inf) away
    if len(scoring.mods.bias) == 0:
        m = tl.maximum(state.m, tl.max(s, 1) * scoring.exp2_scale)
        pivot = tl.where(m == float("-inf"), 0.0, m)
        alpha = tl.exp2(state.m - pivot)
        p = tl.exp2(s * scoring.exp2_scale - pivot[:, None])
    else:
        # a bias may be the lowest of all finite numbers, which times unit is none: subtract first
        m = tl.maximum(state.m, tl.max(s, 1))
        pivot = tl.where(m == float("-inf"), 0.0, m)
        alpha = tl.exp2((state.m - pivot) * scoring.exp2_scale)
        p = tl.exp2((s - pivot[:, None]) * scoring.exp2_scale)
    l = state.l * alpha + tl.sum(p, 1)
    w = l
    if PRECISE:
        p = round_p(p, v[0].dtype)
        w = state.l_rounded * alpha + tl.sum(p, 1)
    p = apply_keep_mask(p, row, col, scoring, False)
    acc = dot_acc(scale_tile(state.acc, alpha[:, None]), p, v, s, static, MODE)
    return Softmax(m, l, w, acc)


@triton.jit
def softmax_finish(state, scoring):
    """Output [M, DV] in parts, natural log-sum-exp [M], and how far that lies over the largest score (with a bias).

    Rows that saw no key give 0 and -inf.
    """
    empty = state.l == 0.0
    o = apply_keep_scale(scale_tile(state.acc, (1.0 / tl.where(empty, 1.0, state.l_rounded))[:, None]), scoring)
    lse_minus_max = tl.log2(tl.where(empty, 1.0, state.l))
    if len(scoring.mods.bias) == 0:
        lse = (state.m + lse_minus_max) * LN2
    else:
        lse = state.m + lse_minus_max * LN2
    return o, tl.where(empty, float("-inf"), lse), lse_minus_max * LN2
