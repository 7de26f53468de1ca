"""Softmax of a row that arrives in pieces (Milakov and Gimelshein, 2018, arXiv 1805.02867), in base 2."""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import LN2
from .tile import accumulate, scaled, zeros


class Softmax(NamedTuple):
    """What must be remembered of the keys seen so far, per query row."""

    m: tl.tensor  # [M]     largest exponent
    l: tl.tensor  # [M]     sum of 2^(x - m)
    w: tl.tensor  # [M]     the same sum of the weights as they met V, rounded to its dtype
    acc: tuple    # [M, DV] sum of 2^(x - m) v, in parts


@triton.jit
def softmax_start(M: tl.constexpr, static):
    nothing = tl.zeros([M], static.ACC)
    return Softmax(tl.full([M], float("-inf"), static.ACC), nothing, nothing, zeros(M, static.DV, static.ACC))


@triton.jit
def softmax_step(state, s, v, unit, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Take in scores s [M, N] of the next N keys and their values v [N, DV]; x = unit s.

        m'   = max(m, max_j x_j)          alpha = 2^(m - m')
        l'   = alpha l   + sum_j 2^(x_j - m')
        acc' = alpha acc + sum_j 2^(x_j - m') v_j
    """
    m = tl.maximum(state.m, tl.max(s, 1) * unit)
    # a row may have seen nothing yet, or only scores of -inf: keep -inf - (-inf) away
    pivot = tl.where(m == float("-inf"), 0.0, m)
    alpha = tl.exp2(state.m - pivot)
    p = tl.exp2(s * unit - pivot[:, None])
    l = state.l * alpha + tl.sum(p, 1)
    w = l
    if PRECISE:
        w = state.w * alpha + tl.sum(p.to(v[0].dtype).to(static.ACC), 1)
    acc = accumulate(scaled(state.acc, alpha[:, None]), p, v, s, static, MODE)
    return Softmax(m, l, w, acc)


@triton.jit
def softmax_finish(state):
    """Output [M, DV] in parts, and natural log-sum-exp [M]. Rows that saw no key give 0 and -inf."""
    empty = state.l == 0.0
    o = scaled(state.acc, (1.0 / tl.where(empty, 1.0, state.w))[:, None])
    lse = tl.where(empty, float("-inf"), (state.m + tl.log2(tl.where(empty, 1.0, state.l))) * LN2)
    return o, lse
