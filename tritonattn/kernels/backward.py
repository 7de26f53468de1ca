"""Gradients of O = P V with P = softmax(S), S = scale Q K^T (Dao et al., 2022, arXiv 2205.14135, appendix B):

    dV = P^T dO          dP = dO V^T          delta = rowsum(dO * O) - dLSE
    dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q

P is never stored; it is rebuilt from the scores and the log-sum-exp of each row. A tile of queries
owns its delta and dQ, a tile of keys its dK and dV: nobody shares a write.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .forward import Keys
from .scores import LOG2E, gradient_scale, scores
from .tile import (Matrix, accumulate, has_nan, inner, load_rows, load_tile, matrix, program, scaled, stages_of, step_of, store_rows, store_tile,
                   zeros)
from .window import spans, stretch_exists


class Queries(NamedTuple):
    """The queries of one head with what the forward pass left behind: whole matrices, or a tile of each."""

    q: Matrix
    do: Matrix
    lse: Matrix    # natural; in a tile base 2, and +inf for rows that see nothing, so that their P is 0
    delta: Matrix


@triton.jit
def queries_of(q, do, lse, delta, shape, batch, head):
    return Queries(
        matrix(q, shape.batches, batch, head, shape.n_q),
        matrix(do, shape.batches, batch, head, shape.n_q),
        matrix(lse, shape.batches, batch, head, shape.n_q),
        matrix(delta, shape.batches, batch, head, shape.n_q),
    )


@triton.jit
def load_queries(queries, first, M: tl.constexpr, static, CHECK: tl.constexpr):
    lse = load_rows(queries.lse, first, M, float("inf")) * LOG2E
    return Queries(
        load_tile(queries.q, first, M, static.D, CHECK),
        load_tile(queries.do, first, M, static.DV, CHECK),
        tl.where(lse == float("-inf"), float("inf"), lse),
        load_rows(queries.delta, first, M, 0.0),
    )


@triton.jit
def weights(s, lse, unit, EDGE: tl.constexpr):
    """P, rebuilt; 0 for unseen pairs, even where the row's log-sum-exp is nan."""
    p = tl.exp2(s * unit - lse)
    if EDGE:
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def score_gradient(s, p, dp, delta, EDGE: tl.constexpr):
    """dS = P * (dP - delta); 0 for unseen pairs, even where dP is not finite."""
    ds = p * (dp - delta)
    if EDGE:
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return ds


@triton.jit
def row_dot(a, b):
    """[M]: the dot product of each row of a with the same row of b."""
    total = tl.sum(a[0] * b[0], 1)
    if len(a) == 2:
        total += tl.sum(a[1] * b[1], 1)
    return total


@triton.jit
def delta_kernel(o, residual, do, dlse, delta, shape, static):
    """delta = rowsum(dO * (O + residual)) - dLSE."""
    M: tl.constexpr = static.BLOCK_M
    first, head, batch = program(shape.heads, shape.n_q, M, False)
    one = tl.full([], 1.0, static.ACC)
    o_tile = scaled(load_tile(matrix(o, shape.batches, batch, head, shape.n_q), first, M, static.DV, True), one)
    do_tile = scaled(load_tile(matrix(do, shape.batches, batch, head, shape.n_q), first, M, static.DV, True), one)
    total = row_dot(do_tile, o_tile)
    if residual is not None:
        lost = load_tile(matrix(residual, shape.batches, batch, head, shape.n_q), first, M, static.DV, True)
        total += row_dot(do_tile, scaled(lost, one))
    if dlse is not None:
        total -= load_rows(matrix(dlse, shape.batches, batch, head, shape.n_q), first, M, 0.0)
    store_rows(matrix(delta, shape.batches, batch, head, shape.n_q), first, total, M)


@triton.jit
def gather_dq(dq, queries, keys, rows, start, stop, scoring, static, EDGE: tl.constexpr, CAREFUL: tl.constexpr):
    """Add to dq [M, D] what the keys [start, stop) give; `queries` is a tile, `keys` are matrices."""
    N: tl.constexpr = step_of(static.BLOCK_N, CAREFUL)
    CHECK: tl.constexpr = EDGE and static.RAGGED
    for first in tl.range(start, stop, N, num_stages=stages_of(CAREFUL)):
        k = load_tile(keys.k, first, N, static.D, CHECK)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        s = scores(queries.q, k, rows, first + tl.arange(0, N), keys.k.rows, scoring, static, EDGE)
        p = weights(s, queries.lse[:, None], scoring.unit, EDGE)
        ds = score_gradient(s, p, inner(queries.do, v, static), queries.delta[:, None], EDGE)
        dq = accumulate(dq, ds, k, s, static, CAREFUL)
    return dq


@triton.jit
def dq_kernel(q, k, v, do, dq, lse, delta, shape, scoring, static):
    M: tl.constexpr = static.BLOCK_M
    window = scoring.window
    first, head, batch = program(shape.heads, shape.n_q, M, window.right is not None)
    keys = Keys(
        matrix(k, shape.batches, batch, head // static.GROUP, shape.n_k),
        matrix(v, shape.batches, batch, head // static.GROUP, shape.n_k),
    )
    queries = load_queries(queries_of(q, do, lse, delta, shape, batch, head), first, M, static, True)
    rows = first + shape.shift + tl.arange(0, M)
    bounds = spans(window, first + shape.shift, shape.n_k, M, static.BLOCK_N)
    acc = zeros(M, static.D, static.ACC)
    for part in tl.static_range(3):
        if stretch_exists(part, window.left is not None, window.right is not None or static.RAGGED):
            acc = gather_dq(acc, queries, keys, rows, bounds[part], bounds[part + 1], scoring, static, part != 1,
                            False)
    if window.left is not None or window.right is not None:
        if has_nan(acc):
            acc = gather_dq(zeros(M, static.D, static.ACC), queries, keys, rows, bounds[0], bounds[3], scoring, static,
                            True, True)
    store_tile(matrix(dq, shape.batches, batch, head, shape.n_q), first, scaled(acc, gradient_scale(scoring)), M, static.D)


@triton.jit
def gather_dkdv(dk, dv, keys, queries, cols, start, stop, scoring, static, EDGE: tl.constexpr,
                CAREFUL: tl.constexpr):
    """Add to dk [N, D] and dv [N, DV] what the queries [start, stop) give; `keys` is a tile, `queries` are matrices.

    Scores are taken transposed, [N, M], so that P and dS meet dO and Q as they lie in registers.
    """
    M: tl.constexpr = step_of(static.BLOCK_M, CAREFUL)
    for first in tl.range(start, stop, M, num_stages=stages_of(CAREFUL)):
        tile = load_queries(queries, first, M, static, EDGE and static.RAGGED)
        s = scores(keys.k, tile.q, cols, first + tl.arange(0, M), queries.q.rows, scoring, static, EDGE)
        p = weights(s, tile.lse[None, :], scoring.unit, EDGE)
        if static.WANT_DV:
            dv = accumulate(dv, p, tile.do, s, static, CAREFUL)
        if static.WANT_DK:
            ds = score_gradient(s, p, inner(keys.v, tile.do, static), tile.delta[None, :], EDGE)
            dk = accumulate(dk, ds, tile.q, s, static, CAREFUL)
    return dk, dv


@triton.jit
def gather_head(dk, dv, keys, queries, cols, bounds, scoring, static):
    """Add what one query head gives."""
    window = scoring.window
    for part in tl.static_range(3):
        if stretch_exists(part, window.left is not None, window.right is not None or static.RAGGED):
            dk, dv = gather_dkdv(dk, dv, keys, queries, cols, bounds[part], bounds[part + 1], scoring, static,
                                 part != 1, False)
    return dk, dv


@triton.jit
def dkdv_kernel(q, k, v, do, dk, dv, lse, delta, shape, scoring, static):
    """The window in `scoring` is mirrored. One program serves all query heads of its key head, one after the other."""
    N: tl.constexpr = static.BLOCK_N
    window = scoring.window
    first, head, batch = program(shape.heads // static.GROUP, shape.n_k, N, window.right is not None)
    keys = Keys(
        load_tile(matrix(k, shape.batches, batch, head, shape.n_k), first, N, static.D, True),
        load_tile(matrix(v, shape.batches, batch, head, shape.n_k), first, N, static.DV, True),
    )
    cols = first - shape.shift + tl.arange(0, N)
    bounds = spans(window, first - shape.shift, shape.n_q, N, static.BLOCK_M)
    dk_acc, dv_acc = zeros(N, static.D, static.ACC), zeros(N, static.DV, static.ACC)
    if static.GROUP == 1:
        # a loop of one step would cost registers
        queries = queries_of(q, do, lse, delta, shape, batch, head)
        dk_acc, dv_acc = gather_head(dk_acc, dv_acc, keys, queries, cols, bounds, scoring, static)
    else:
        for member in tl.range(0, static.GROUP):
            queries = queries_of(q, do, lse, delta, shape, batch, head * static.GROUP + member)
            dk_acc, dv_acc = gather_head(dk_acc, dv_acc, keys, queries, cols, bounds, scoring, static)
    if window.left is not None or window.right is not None:
        if has_nan(dk_acc) or has_nan(dv_acc):
            dk_acc, dv_acc = zeros(N, static.D, static.ACC), zeros(N, static.DV, static.ACC)
            for member in tl.range(0, static.GROUP):
                queries = queries_of(q, do, lse, delta, shape, batch, head * static.GROUP + member)
                dk_acc, dv_acc = gather_dkdv(dk_acc, dv_acc, keys, queries, cols, bounds[0], bounds[3], scoring, static,
                                             True, True)
    if static.WANT_DK:
        dk_acc = scaled(dk_acc, gradient_scale(scoring))
        store_tile(matrix(dk, shape.batches, batch, head, shape.n_k), first, dk_acc, N, static.D)
    if static.WANT_DV:
        store_tile(matrix(dv, shape.batches, batch, head, shape.n_k), first, dv_acc, N, static.DV)
