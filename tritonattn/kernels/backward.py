"""Gradients of O = P V with P = softmax(S), S = scale Q K^T (Dao et al., 2022, arXiv 2205.14135, appendix B):

    dV = P^T dO          dP = dO V^T          delta = rowsum(dO * O) - dLSE
    dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dbias = dS, summed where the bias is broadcast

P is never stored; it is rebuilt from the scores and the log-sum-exp of each row. A tile of queries
owns its delta and dQ, a tile of keys its dK and dV, a tile of the bias its dbias: nobody shares a write.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .forward import Keys, keys_of
from .scores import LOG2E, Scoring, at_head, dropped, gained, gradient_scale, scores
from .tile import (
    Matrix,
    accumulate,
    inner,
    load_rows,
    load_tile,
    matrix,
    program,
    scaled,
    shape_of,
    store_rows,
    store_tile,
    stored_nan,
    where,
    zeros,
)
from .window import CARE, Window, bounded, mode_of, place, spans, stages_of, step_of, stretches


class Queries(NamedTuple):
    """The queries of one head with what the forward pass left behind: whole matrices, or a tile of each."""

    q: Matrix
    do: Matrix
    lse: Matrix    # natural; in a tile base 2 unless there is a bias, and +inf for rows that see nothing: their P is 0
    delta: Matrix
    excess: tuple = ()  # or alone in it how far lse lies over the largest score: with a bias


@triton.jit
def queries_of(queries, shape, batch, head):
    excess = queries.excess
    if len(queries.excess) == 1:
        excess = (matrix(queries.excess[0], shape.batches, batch, head, shape.n_q),)
    return Queries(
        matrix(queries.q, shape.batches, batch, head, shape.n_q),
        matrix(queries.do, shape.batches, batch, head, shape.n_q),
        matrix(queries.lse, shape.batches, batch, head, shape.n_q),
        matrix(queries.delta, shape.batches, batch, head, shape.n_q),
        excess,
    )


@triton.jit
def load_queries(queries, first, M: tl.constexpr, static, CHECK: tl.constexpr):
    lse, excess = load_rows(queries.lse, first, M, float("inf")), queries.excess
    if len(queries.excess) == 1:
        excess = (load_rows(queries.excess[0], first, M, 0.0),)
    else:
        lse = lse * LOG2E
    return Queries(
        load_tile(queries.q, first, M, static.D, CHECK),
        load_tile(queries.do, first, M, static.DV, CHECK),
        tl.where(lse == float("-inf"), float("inf"), lse),
        load_rows(queries.delta, first, M, 0.0),
        excess,
    )


@triton.jit
def weights(s, queries, unit, TRANSPOSED: tl.constexpr, MODE: tl.constexpr):
    """P, rebuilt; 0 for unseen pairs, even where the row's log-sum-exp is nan."""
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    if len(queries.excess) == 0:
        p = tl.exp2(s * unit - tl.expand_dims(queries.lse, AXIS))
    else:
        # first from the largest score, as the forward pass did: lse itself may be too large to hold the excess
        excess = queries.excess[0]
        p = tl.exp2((s - tl.expand_dims(queries.lse - excess, AXIS)) * unit - tl.expand_dims(excess * LOG2E, AXIS))
    if MODE != "full":
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def score_gradient(s, p, dp, delta, MODE: tl.constexpr):
    """dS = P * (dP - delta) with dP of the weights before they are dropped; 0 for unseen pairs, even where dP is not finite."""
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
def gather_dq(dq, queries, keys, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Add to dq [M, D] what the keys [start, stop) give; `queries` is a tile, `keys` are matrices."""
    N: tl.constexpr = step_of(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.RAGGED and bounded(MODE)
    for step in tl.range(start, stop, N, num_stages=stages_of(MODE)):
        first = place(scoring.pairs.listing, step)
        k = load_tile(keys.k, first, N, static.D, CHECK)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        s = scores(queries.q, k, row, first, keys.k.rows, scoring, static, MODE)
        p = weights(s, queries, scoring.unit, False, MODE)
        dp, = gained((dropped(inner(queries.do, v, static), row, first, scoring, False),), scoring)
        ds = score_gradient(s, p, dp, queries.delta[:, None], MODE)
        dq = accumulate(dq, ds, k, s, static, MODE)
    return dq


@triton.jit
def dq_kernel(queries, k, v, dq, shape, scoring, static):
    M: tl.constexpr = static.BLOCK_M
    HIDES: tl.constexpr = len(scoring.pairs.bias) + len(scoring.pairs.mask) > 0
    window = scoring.window
    first, head, batch = program(shape.heads, shape.n_q, M, window.right is not None)
    shape = shape_of(shape, batch)
    dq = matrix(dq, shape.batches, batch, head, shape.n_q)
    queries = queries_of(queries, shape, batch, head)
    keys = keys_of(k, v, shape, batch, head // static.GROUP)
    pairs = at_head(scoring.pairs, shape.batches, batch, head, first, shape.n_q, shape.shift)
    scoring = Scoring(scoring.unit, scoring.factor, window, pairs)
    bounds = stretches(pairs.listing, window, first + shape.shift, shape.n_k, M, static.BLOCK_N)

    tile = load_queries(queries, first, M, static, True)
    acc = zeros(M, static.D, static.ACC)
    for part in tl.static_range(3):
        if mode_of(static.MODES, part) is not None:
            acc = gather_dq(acc, tile, keys, first + shape.shift, bounds[part], bounds[part + 1], scoring, static,
                            mode_of(static.MODES, part))
    store_tile(dq, first, scaled(acc, gradient_scale(scoring)), M, static.D)
    if window.left is not None or window.right is not None or HIDES:
        if stored_nan(dq, first, M, static.D, static.ACC):
            for some in tl.range(first, first + M, CARE, num_stages=1):
                tile_some = load_queries(queries, some, CARE, static, True)
                again = zeros(CARE, static.D, static.ACC)
                again = gather_dq(again, tile_some, keys, some + shape.shift, bounds[0], bounds[3], scoring, static, "careful")
                store_tile(dq, some, scaled(again, gradient_scale(scoring)), CARE, static.D)


@triton.jit
def gather_dkdv(dk, dv, keys, queries, col, start, stop, scoring, static, MODE: tl.constexpr):
    """Add to dk [N, D] and dv [N, DV] what the queries [start, stop) give; `keys` is a tile, `queries` are matrices.

    Scores are taken transposed, [N, M], so that P and dS meet dO and Q as they lie in registers.
    """
    M: tl.constexpr = step_of(static.BLOCK_M, MODE)
    for step in tl.range(start, stop, M, num_stages=stages_of(MODE)):
        first = place(scoring.pairs.listing, step)
        tile = load_queries(queries, first, M, static, static.RAGGED and bounded(MODE))
        s = scores(keys.k, tile.q, col, first, queries.q.rows, scoring, static, MODE)
        p = weights(s, tile, scoring.unit, True, MODE)
        if static.OUT != "dk":
            dv = accumulate(dv, dropped(p, col, first, scoring, True), tile.do, s, static, MODE)
        if static.OUT != "dv":
            dp, = gained((dropped(inner(keys.v, tile.do, static), col, first, scoring, True),), scoring)
            ds = score_gradient(s, p, dp, tile.delta[None, :], MODE)
            dk = accumulate(dk, ds, tile.q, s, static, MODE)
    return dk, dv


@triton.jit
def gather_head(dk, dv, keys, queries, col, n, scoring, static):
    """Add what the first n queries of one head give."""
    bounds = stretches(scoring.pairs.listing, scoring.window, col, n, static.BLOCK_N, static.BLOCK_M)
    for part in tl.static_range(3):
        if mode_of(static.MODES, part) is not None:
            dk, dv = gather_dkdv(dk, dv, keys, queries, col, bounds[part], bounds[part + 1], scoring, static,
                                 mode_of(static.MODES, part))
    return dk, dv


@triton.jit
def write_dkdv(dk, dv, dk_tile, dv_tile, first, N: tl.constexpr, shape, scoring, static):
    """Store the gradients that were asked for; keys past those that a batch has get 0."""
    if len(shape.lengths) == 2:
        has = (first + tl.arange(0, N) < shape.n_k)[:, None]
        dk_tile, dv_tile = where(has, dk_tile), where(has, dv_tile)
    if static.OUT != "dv":
        store_tile(dk, first, scaled(dk_tile, gradient_scale(scoring)), N, static.D)
    if static.OUT != "dk":
        store_tile(dv, first, gained(dv_tile, scoring), N, static.DV)


@triton.jit
def dkdv_kernel(queries, k, v, dk, dv, shape, scoring, static):
    """`scoring` is seen from the keys. One program serves all query heads of its key head, one after the other."""
    N: tl.constexpr = static.BLOCK_N
    window = scoring.window
    first, head, batch = program(shape.heads // static.GROUP, shape.n_k, N, window.right is not None)
    if static.OUT != "dv":
        dk = matrix(dk, shape.batches, batch, head, shape.n_k)
    if static.OUT != "dk":
        dv = matrix(dv, shape.batches, batch, head, shape.n_k)
    shape = shape_of(shape, batch)
    k, v = keys_of(k, v, shape, batch, head)
    keys = Keys(load_tile(k, first, N, static.D, True), load_tile(v, first, N, static.DV, True))
    col, n = first - shape.shift, shape.n_q
    if len(shape.lengths) == 2:
        # keys past those that a batch has meet no query
        n = tl.where(first < shape.n_k, n, 0)
    dk_tile, dv_tile = zeros(N, static.D, static.ACC), zeros(N, static.DV, static.ACC)
    if static.GROUP == 1:
        # a loop of one step would cost registers
        pairs = at_head(scoring.pairs, shape.batches, batch, head, first, shape.n_k, -shape.shift)
        here = Scoring(scoring.unit, scoring.factor, window, pairs)
        dk_tile, dv_tile = gather_head(dk_tile, dv_tile, keys, queries_of(queries, shape, batch, head), col, n, here, static)
    else:
        for member in tl.range(0, static.GROUP):
            of = head * static.GROUP + member
            pairs = at_head(scoring.pairs, shape.batches, batch, of, first, shape.n_k, -shape.shift)
            here = Scoring(scoring.unit, scoring.factor, scoring.window, pairs)
            dk_tile, dv_tile = gather_head(dk_tile, dv_tile, keys, queries_of(queries, shape, batch, of), col, n, here, static)
    write_dkdv(dk, dv, dk_tile, dv_tile, first, N, shape, scoring, static)
    if window.left is not None or window.right is not None or len(scoring.pairs.bias) + len(scoring.pairs.mask) > 0:
        careful = False
        if static.OUT != "dv":
            careful |= stored_nan(dk, first, N, static.D, static.ACC)
        if static.OUT != "dk":
            careful |= stored_nan(dv, first, N, static.DV, static.ACC)
        if careful:
            dkdv_with_care(dk, dv, Keys(k, v), queries, first, head, batch, shape, scoring, static)


@triton.jit
def dkdv_with_care(dk, dv, keys, queries, first, head, batch, shape, scoring, static):
    """The same once more, CARE keys at a time."""
    for some in tl.range(first, first + static.BLOCK_N, CARE, num_stages=1):
        tile = Keys(load_tile(keys.k, some, CARE, static.D, True), load_tile(keys.v, some, CARE, static.DV, True))
        col = some - shape.shift
        dk_tile, dv_tile = zeros(CARE, static.D, static.ACC), zeros(CARE, static.DV, static.ACC)
        for member in tl.range(0, static.GROUP):
            of = head * static.GROUP + member
            pairs = at_head(scoring.pairs, shape.batches, batch, of, some, shape.n_k, -shape.shift)
            here = Scoring(scoring.unit, scoring.factor, scoring.window, pairs)
            bounds = stretches(pairs.listing, scoring.window, col, shape.n_q, CARE, static.BLOCK_M)
            dk_tile, dv_tile = gather_dkdv(dk_tile, dv_tile, tile, queries_of(queries, shape, batch, of), col, bounds[0],
                                           bounds[3], here, static, "careful")
        write_dkdv(dk, dv, dk_tile, dv_tile, some, CARE, shape, scoring, static)


class Members(NamedTuple):
    """Sizes of the batch dimensions (the innermost first) and of the heads over which something runs."""

    batches: tuple
    heads: int


@triton.jit
def batch_of(own, other, owned, summed):
    """The batch that has in each dimension the index of `own` or of `other`: one of the two has only one there."""
    batch, stride = 0, 1
    for i in tl.static_range(len(owned.batches)):
        batch += (own % owned.batches[i] + other % summed.batches[i]) * stride
        own, other = own // owned.batches[i], other // summed.batches[i]
        stride = stride * owned.batches[i] * summed.batches[i]
    return batch


@triton.jit
def gather_dbias(dbias, queries, keys, col, start, stop, shape, scoring, static):
    """Add to dbias [M, N] the dS of queries [start, stop), one tile after the other, and of a tile of keys."""
    M: tl.constexpr = static.BLOCK_M
    for first in tl.range(start, stop, M):
        tile = load_queries(queries, first, M, static, True)
        row = first + shape.shift
        s = scores(tile.q, keys.k, row, col, shape.n_k, scoring, static, "edge")
        p = weights(s, tile, scoring.unit, False, "edge")
        dp, = gained((dropped(inner(tile.do, keys.v, static), row, col, scoring, False),), scoring)
        ds = score_gradient(s, p, dp, tile.delta[:, None], "edge")
        # past the last query there are zeros, which a nan in a key would turn into one
        dbias += tl.where((first + tl.arange(0, M) < shape.n_q)[:, None], ds, 0.0)
    return dbias


@triton.jit
def dbias_kernel(queries, k, v, dbias, owned, summed, shape, scoring, static):
    """One program per tile of the bias: it visits all pairs that share its entries, batch by batch and head by head.

    `owned` are the bias's own sizes, `summed` those over which it is broadcast; so are the queries if OUT is "keys".
    """
    M: tl.constexpr = static.BLOCK_M
    N: tl.constexpr = static.BLOCK_N
    col_tiles = tl.cdiv(shape.n_k, N)
    row_tiles = 1 if static.OUT == "keys" else tl.cdiv(shape.n_q, M)
    tile, rest = tl.program_id(0) % (row_tiles * col_tiles), tl.program_id(0) // (row_tiles * col_tiles)
    own_head, own_batch = rest % owned.heads, rest // owned.heads
    first, first_col = tile // col_tiles * M, tile % col_tiles * N

    members = summed.heads
    for i in tl.static_range(len(summed.batches)):
        members = members * summed.batches[i]
    total = tl.zeros([M, N], static.ACC)
    for member in tl.range(0, members):
        head, batch = own_head + member % summed.heads, batch_of(own_batch, member // summed.heads, owned, summed)
        here = shape_of(shape, batch)
        keys = keys_of(k, v, here, batch, head // static.GROUP)
        keys = Keys(load_tile(keys.k, first_col, N, static.D, True), load_tile(keys.v, first_col, N, static.DV, True))
        pairs = at_head(scoring.pairs, shape.batches, batch, head, first, shape.n_q, here.shift)
        # the queries that see one of these keys, or of them this tile's
        seen = spans(Window(scoring.window.right, scoring.window.left), first_col - here.shift, shape.n_q, N, M)
        start, stop = seen[0], seen[3]
        if static.OUT != "keys":
            start, stop = first, tl.where((start < first + M) & (stop > first), first + 1, first)
        total = gather_dbias(total, queries_of(queries, shape, batch, head), keys, first_col, start, stop, here,
                             Scoring(scoring.unit, scoring.factor, scoring.window, pairs), static)
    dbias = matrix(dbias, shape.batches, batch_of(own_batch, 0, owned, summed), own_head, shape.n_q)
    cols = first_col + tl.arange(0, N)
    ptrs = dbias.ptr + tl.cast(cols, tl.int64) * dbias.col
    dtype = dbias.ptr.dtype.element_ty
    if static.OUT == "keys":
        tl.store(ptrs, tl.sum(total, 0).to(dtype), mask=cols < shape.n_k)
    else:
        rows = first + tl.arange(0, M)
        tl.store(ptrs[None, :] + tl.cast(rows, tl.int64)[:, None] * dbias.row, total.to(dtype),
                 mask=(rows < shape.n_q)[:, None] & (cols < shape.n_k)[None, :])
