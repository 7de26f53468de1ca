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

from .forward import Keys, keys_of
from .scores import LOG2E, gradient_scale, scores
from .tile import (
    Matrix,
    accumulate,
    inner,
    load_rows,
    load_tile,
    matrix,
    program,
    scaled,
    store_rows,
    store_tile,
    stored_nan,
    zeros,
)
from .window import CARE, exists, mode_of, spans, stages_of, step_of


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
def weights(s, lse, unit, MODE: tl.constexpr):
    """P, rebuilt; 0 for unseen pairs, even where the row's log-sum-exp is nan."""
    p = tl.exp2(s * unit - lse)
    if MODE != "full":
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def score_gradient(s, p, dp, delta, MODE: tl.constexpr):
    """dS = P * (dP - delta); 0 for unseen pairs, even where dP is not finite."""
    ds = p * (dp - delta)
    if MODE != "full":
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
def gather_dq(dq, queries, keys, rows, start, stop, scoring, static, MODE: tl.constexpr):
    """Add to dq [M, D] what the keys [start, stop) give; `queries` is a tile, `keys` are matrices."""
    N: tl.constexpr = step_of(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.RAGGED and MODE != "full"
    for first in tl.range(start, stop, N, num_stages=stages_of(MODE)):
        k = load_tile(keys.k, first, N, static.D, CHECK)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        s = scores(queries.q, k, rows, first + tl.arange(0, N), keys.k.rows, scoring, static, MODE)
        p = weights(s, queries.lse[:, None], scoring.unit, MODE)
        ds = score_gradient(s, p, inner(queries.do, v, static), queries.delta[:, None], MODE)
        dq = accumulate(dq, ds, k, s, static, MODE)
    return dq


@triton.jit
def dq_kernel(q, k, v, do, dq, lse, delta, shape, scoring, static):
    M: tl.constexpr = static.BLOCK_M
    window = scoring.window
    first, head, batch = program(shape.heads, shape.n_q, M, window.right is not None)
    dq = matrix(dq, shape.batches, batch, head, shape.n_q)
    queries = queries_of(q, do, lse, delta, shape, batch, head)
    keys = keys_of(k, v, shape, batch, head // static.GROUP)
    bounds = spans(window, first + shape.shift, shape.n_k, M, static.BLOCK_N)

    tile = load_queries(queries, first, M, static, True)
    rows = first + shape.shift + tl.arange(0, M)
    acc = zeros(M, static.D, static.ACC)
    for part in tl.static_range(3):
        if exists(part, window.left is not None, window.right is not None or static.RAGGED):
            acc = gather_dq(acc, tile, keys, rows, bounds[part], bounds[part + 1], scoring, static, mode_of(part))
    store_tile(dq, first, scaled(acc, gradient_scale(scoring)), M, static.D)
    if window.left is not None or window.right is not None:
        if stored_nan(dq, first, M, static.D, static.ACC):
            for some in tl.range(first, first + M, CARE, num_stages=1):
                tile_some = load_queries(queries, some, CARE, static, True)
                rows_some = some + shape.shift + tl.arange(0, CARE)
                again = zeros(CARE, static.D, static.ACC)
                again = gather_dq(again, tile_some, keys, rows_some, bounds[0], bounds[3], scoring, static, "careful")
                store_tile(dq, some, scaled(again, gradient_scale(scoring)), CARE, static.D)


@triton.jit
def gather_dkdv(dk, dv, keys, queries, cols, start, stop, scoring, static, MODE: tl.constexpr):
    """Add to dk [N, D] and dv [N, DV] what the queries [start, stop) give; `keys` is a tile, `queries` are matrices.

    Scores are taken transposed, [N, M], so that P and dS meet dO and Q as they lie in registers.
    """
    M: tl.constexpr = step_of(static.BLOCK_M, MODE)
    for first in tl.range(start, stop, M, num_stages=stages_of(MODE)):
        tile = load_queries(queries, first, M, static, static.RAGGED and MODE != "full")
        s = scores(keys.k, tile.q, cols, first + tl.arange(0, M), queries.q.rows, scoring, static, MODE)
        p = weights(s, tile.lse[None, :], scoring.unit, MODE)
        if static.OUT != "dk":
            dv = accumulate(dv, p, tile.do, s, static, MODE)
        if static.OUT != "dv":
            ds = score_gradient(s, p, inner(keys.v, tile.do, static), tile.delta[None, :], MODE)
            dk = accumulate(dk, ds, tile.q, s, static, MODE)
    return dk, dv


@triton.jit
def gather_head(dk, dv, keys, queries, cols, bounds, scoring, static):
    """Add what one query head gives."""
    window = scoring.window
    for part in tl.static_range(3):
        if exists(part, window.left is not None, window.right is not None or static.RAGGED):
            dk, dv = gather_dkdv(dk, dv, keys, queries, cols, bounds[part], bounds[part + 1], scoring, static, mode_of(part))
    return dk, dv


@triton.jit
def write_dkdv(dk, dv, dk_tile, dv_tile, first, N: tl.constexpr, scoring, static):
    """Store the gradients that were asked for."""
    if static.OUT != "dv":
        store_tile(dk, first, scaled(dk_tile, gradient_scale(scoring)), N, static.D)
    if static.OUT != "dk":
        store_tile(dv, first, dv_tile, N, static.DV)


@triton.jit
def dkdv_kernel(q, k, v, do, dk, dv, lse, delta, shape, scoring, static):
    """The window in `scoring` is mirrored. One program serves all query heads of its key head, one after the other."""
    N: tl.constexpr = static.BLOCK_N
    window = scoring.window
    first, head, batch = program(shape.heads // static.GROUP, shape.n_k, N, window.right is not None)
    if static.OUT != "dv":
        dk = matrix(dk, shape.batches, batch, head, shape.n_k)
    if static.OUT != "dk":
        dv = matrix(dv, shape.batches, batch, head, shape.n_k)
    k, v = keys_of(k, v, shape, batch, head)
    bounds = spans(window, first - shape.shift, shape.n_q, N, static.BLOCK_M)

    keys = Keys(load_tile(k, first, N, static.D, True), load_tile(v, first, N, static.DV, True))
    cols = first - shape.shift + tl.arange(0, N)
    dk_tile, dv_tile = zeros(N, static.D, static.ACC), zeros(N, static.DV, static.ACC)
    if static.GROUP == 1:
        # a loop of one step would cost registers
        queries = queries_of(q, do, lse, delta, shape, batch, head)
        dk_tile, dv_tile = gather_head(dk_tile, dv_tile, keys, queries, cols, bounds, scoring, static)
    else:
        for member in tl.range(0, static.GROUP):
            queries = queries_of(q, do, lse, delta, shape, batch, head * static.GROUP + member)
            dk_tile, dv_tile = gather_head(dk_tile, dv_tile, keys, queries, cols, bounds, scoring, static)
    write_dkdv(dk, dv, dk_tile, dv_tile, first, N, scoring, static)
    if window.left is not None or window.right is not None:
        careful = False
        if static.OUT != "dv":
            careful |= stored_nan(dk, first, N, static.D, static.ACC)
        if static.OUT != "dk":
            careful |= stored_nan(dv, first, N, static.DV, static.ACC)
        if careful:
            dkdv_with_care(dk, dv, k, v, q, do, lse, delta, first, bounds, head, batch, shape, scoring, static)


@triton.jit
def dkdv_with_care(dk, dv, k, v, q, do, lse, delta, first, bounds, head, batch, shape, scoring, static):
    """The same once more, CARE keys at a time."""
    for some in tl.range(first, first + static.BLOCK_N, CARE, num_stages=1):
        keys = Keys(load_tile(k, some, CARE, static.D, True), load_tile(v, some, CARE, static.DV, True))
        cols = some - shape.shift + tl.arange(0, CARE)
        dk_tile, dv_tile = zeros(CARE, static.D, static.ACC), zeros(CARE, static.DV, static.ACC)
        for member in tl.range(0, static.GROUP):
            queries = queries_of(q, do, lse, delta, shape, batch, head * static.GROUP + member)
            dk_tile, dv_tile = gather_dkdv(dk_tile, dv_tile, keys, queries, cols, bounds[0], bounds[3], scoring, static,
                                           "careful")
        write_dkdv(dk, dv, dk_tile, dv_tile, some, CARE, scoring, static)
