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

from .forward import Keys, key_views
from .scores import LOG2E, ScoreParams, apply_keep_mask, apply_keep_scale, grad_scale, scores, select_head
from .tile import (
    Matrix,
    dot_acc,
    dot_t,
    head_view,
    load_rows,
    load_tile,
    scale_tile,
    sizes_of_batch,
    store_rows,
    store_tile,
    stored_tile_has_nan,
    tile_head_batch,
    zero_rows_unless,
    zero_tile,
)
from .window import (
    NAN_SAFE_ROWS,
    Window,
    block_start,
    loop_bounds,
    loop_mode,
    loop_stages,
    loop_step,
    needs_mask,
    window_bounds,
)


class Queries(NamedTuple):
    """The queries of one head with what the forward pass left behind: whole matrices, or a tile of each."""

    q: Matrix
    do: Matrix
    lse: Matrix    # natural; in a tile base 2 unless there is a bias, and +inf for rows that see nothing: their P is 0
    delta: Matrix
    lse_minus_max: tuple = ()  # or alone in it how far lse lies over the largest score: with a bias


@triton.jit
def query_views(queries, sizes, batch, head):
    lse_minus_max = queries.lse_minus_max
    if len(queries.lse_minus_max) == 1:
        lse_minus_max = (head_view(queries.lse_minus_max[0], sizes.batches, batch, head, sizes.n_q),)
    return Queries(
        head_view(queries.q, sizes.batches, batch, head, sizes.n_q),
        head_view(queries.do, sizes.batches, batch, head, sizes.n_q),
        head_view(queries.lse, sizes.batches, batch, head, sizes.n_q),
        head_view(queries.delta, sizes.batches, batch, head, sizes.n_q),
        lse_minus_max,
    )


@triton.jit
def load_queries(queries, first, M: tl.constexpr, static, CHECK: tl.constexpr):
    lse, lse_minus_max = load_rows(queries.lse, first, M, float("inf")), queries.lse_minus_max
    if len(queries.lse_minus_max) == 1:
        lse_minus_max = (load_rows(queries.lse_minus_max[0], first, M, 0.0),)
    else:
        lse = lse * LOG2E
    return Queries(
        load_tile(queries.q, first, M, static.D, CHECK),
        load_tile(queries.do, first, M, static.DV, CHECK),
        tl.where(lse == float("-inf"), float("inf"), lse),
        load_rows(queries.delta, first, M, 0.0),
        lse_minus_max,
    )


@triton.jit
def recompute_p(s, queries, exp2_scale, TRANSPOSED: tl.constexpr, MODE: tl.constexpr):
    """P, rebuilt; 0 for unseen pairs, even where the row's log-sum-exp is nan."""
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    if len(queries.lse_minus_max) == 0:
        p = tl.exp2(s * exp2_scale - tl.expand_dims(queries.lse, AXIS))
    else:
        # first from the largest score, as the forward pass did: lse itself may be too large to hold the excess
        lse_minus_max = queries.lse_minus_max[0]
        p = tl.exp2((s - tl.expand_dims(queries.lse - lse_minus_max, AXIS)) * exp2_scale - tl.expand_dims(lse_minus_max * LOG2E, AXIS))
    if MODE != "unmasked":
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def grad_s(s, p, dp, delta, MODE: tl.constexpr):
    """dS = P * (dP - delta) with dP of the weights before they are dropped; 0 for unseen pairs, even where dP is not finite."""
    ds = p * (dp - delta)
    if MODE != "unmasked":
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
def delta_kernel(o, o_residual, do, dlse, delta, sizes, static):
    """delta = rowsum(dO * (O + residual)) - dLSE."""
    M: tl.constexpr = static.BLOCK_M
    first, head, batch = tile_head_batch(sizes.heads, sizes.n_q, M, False)
    one = tl.full([], 1.0, static.ACC)
    o_tile = scale_tile(load_tile(head_view(o, sizes.batches, batch, head, sizes.n_q), first, M, static.DV, True), one)
    do_tile = scale_tile(load_tile(head_view(do, sizes.batches, batch, head, sizes.n_q), first, M, static.DV, True), one)
    total = row_dot(do_tile, o_tile)
    if o_residual is not None:
        lost = load_tile(head_view(o_residual, sizes.batches, batch, head, sizes.n_q), first, M, static.DV, True)
        total += row_dot(do_tile, scale_tile(lost, one))
    if dlse is not None:
        total -= load_rows(head_view(dlse, sizes.batches, batch, head, sizes.n_q), first, M, 0.0)
    store_rows(head_view(delta, sizes.batches, batch, head, sizes.n_q), first, total, M)


@triton.jit
def accumulate_dq(dq, queries, keys, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Add to dq [M, D] what the keys [start, stop) give; `queries` is a tile, `keys` are matrices."""
    N: tl.constexpr = loop_step(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.UNEVEN and needs_mask(MODE)
    for step in tl.range(start, stop, N, num_stages=loop_stages(MODE)):
        first = block_start(scoring.mods.block_list, step)
        k = load_tile(keys.k, first, N, static.D, CHECK)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        s = scores(queries.q, k, row, first, keys.k.rows, scoring, static, MODE)
        p = recompute_p(s, queries, scoring.exp2_scale, False, MODE)
        dp, = apply_keep_scale((apply_keep_mask(dot_t(queries.do, v, static), row, first, scoring, False),), scoring)
        ds = grad_s(s, p, dp, queries.delta[:, None], MODE)
        dq = dot_acc(dq, ds, k, s, static, MODE)
    return dq


@triton.jit
def dq_kernel(queries, k, v, dq, sizes, scoring, static):
    M: tl.constexpr = static.BLOCK_M
    HIDES: tl.constexpr = len(scoring.mods.bias) + len(scoring.mods.mask) > 0
    window = scoring.window
    first, head, batch = tile_head_batch(sizes.heads, sizes.n_q, M, window.right is not None)
    sizes = sizes_of_batch(sizes, batch)
    dq = head_view(dq, sizes.batches, batch, head, sizes.n_q)
    queries = query_views(queries, sizes, batch, head)
    keys = key_views(k, v, sizes, batch, head // static.GROUP)
    mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_q, sizes.shift)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, window, mods)
    bounds = loop_bounds(mods.block_list, window, first + sizes.shift, sizes.n_k, M, static.BLOCK_N)

    tile = load_queries(queries, first, M, static, True)
    acc = zero_tile(M, static.D, static.ACC)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            acc = accumulate_dq(acc, tile, keys, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                            loop_mode(static.LOOP_MODES, part))
    store_tile(dq, first, scale_tile(acc, grad_scale(scoring)), M, static.D)
    if window.left is not None or window.right is not None or HIDES:
        if stored_tile_has_nan(dq, first, M, static.D, static.ACC):
            for some in tl.range(first, first + M, NAN_SAFE_ROWS, num_stages=1):
                tile_some = load_queries(queries, some, NAN_SAFE_ROWS, static, True)
                again = zero_tile(NAN_SAFE_ROWS, static.D, static.ACC)
                again = accumulate_dq(again, tile_some, keys, some + sizes.shift, bounds[0], bounds[3], scoring, static, "nan_safe")
                store_tile(dq, some, scale_tile(again, grad_scale(scoring)), NAN_SAFE_ROWS, static.D)


@triton.jit
def accumulate_dkdv(dk, dv, keys, queries, col, start, stop, scoring, static, MODE: tl.constexpr):
    """Add to dk [N, D] and dv [N, DV] what the queries [start, stop) give; `keys` is a tile, `queries` are matrices.

    Scores are taken transposed, [N, M], so that P and dS meet dO and Q as they lie in registers.
    """
    M: tl.constexpr = loop_step(static.BLOCK_M, MODE)
    for step in tl.range(start, stop, M, num_stages=loop_stages(MODE)):
        first = block_start(scoring.mods.block_list, step)
        tile = load_queries(queries, first, M, static, static.UNEVEN and needs_mask(MODE))
        s = scores(keys.k, tile.q, col, first, queries.q.rows, scoring, static, MODE)
        p = recompute_p(s, tile, scoring.exp2_scale, True, MODE)
        if static.GRADS != "dk":
            dv = dot_acc(dv, apply_keep_mask(p, col, first, scoring, True), tile.do, s, static, MODE)
        if static.GRADS != "dv":
            dp, = apply_keep_scale((apply_keep_mask(dot_t(keys.v, tile.do, static), col, first, scoring, True),), scoring)
            ds = grad_s(s, p, dp, tile.delta[None, :], MODE)
            dk = dot_acc(dk, ds, tile.q, s, static, MODE)
    return dk, dv


@triton.jit
def accumulate_head(dk, dv, keys, queries, col, n, scoring, static):
    """Add what the first n queries of one head give."""
    bounds = loop_bounds(scoring.mods.block_list, scoring.window, col, n, static.BLOCK_N, static.BLOCK_M)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            dk, dv = accumulate_dkdv(dk, dv, keys, queries, col, bounds[part], bounds[part + 1], scoring, static,
                                 loop_mode(static.LOOP_MODES, part))
    return dk, dv


@triton.jit
def store_dkdv(dk, dv, dk_tile, dv_tile, first, N: tl.constexpr, sizes, scoring, static):
    """Store the gradients that were asked for; keys past those that a batch has get 0."""
    if len(sizes.lengths) == 2:
        has = (first + tl.arange(0, N) < sizes.n_k)[:, None]
        dk_tile, dv_tile = zero_rows_unless(has, dk_tile), zero_rows_unless(has, dv_tile)
    if static.GRADS != "dv":
        store_tile(dk, first, scale_tile(dk_tile, grad_scale(scoring)), N, static.D)
    if static.GRADS != "dk":
        store_tile(dv, first, apply_keep_scale(dv_tile, scoring), N, static.DV)


@triton.jit
def dkdv_kernel(queries, k, v, dk, dv, sizes, scoring, static):
    """`scoring` is seen from the keys. One program serves all query heads of its key head, one after the other."""
    N: tl.constexpr = static.BLOCK_N
    window = scoring.window
    first, head, batch = tile_head_batch(sizes.heads // static.GROUP, sizes.n_k, N, window.right is not None)
    if static.GRADS != "dv":
        dk = head_view(dk, sizes.batches, batch, head, sizes.n_k)
    if static.GRADS != "dk":
        dv = head_view(dv, sizes.batches, batch, head, sizes.n_k)
    sizes = sizes_of_batch(sizes, batch)
    k, v = key_views(k, v, sizes, batch, head)
    keys = Keys(load_tile(k, first, N, static.D, True), load_tile(v, first, N, static.DV, True))
    col, n = first - sizes.shift, sizes.n_q
    if len(sizes.lengths) == 2:
        # keys past those that a batch has meet no query
        n = tl.where(first < sizes.n_k, n, 0)
    dk_tile, dv_tile = zero_tile(N, static.D, static.ACC), zero_tile(N, static.DV, static.ACC)
    if static.GROUP == 1:
        # a loop of one step would cost registers
        mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_k, -sizes.shift)
        here = ScoreParams(scoring.exp2_scale, scoring.qk_scale, window, mods)
        dk_tile, dv_tile = accumulate_head(dk_tile, dv_tile, keys, query_views(queries, sizes, batch, head), col, n, here, static)
    else:
        for member in tl.range(0, static.GROUP):
            of = head * static.GROUP + member
            mods = select_head(scoring.mods, sizes.batches, batch, of, first, sizes.n_k, -sizes.shift)
            here = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.window, mods)
            dk_tile, dv_tile = accumulate_head(dk_tile, dv_tile, keys, query_views(queries, sizes, batch, of), col, n, here, static)
    store_dkdv(dk, dv, dk_tile, dv_tile, first, N, sizes, scoring, static)
    if window.left is not None or window.right is not None or len(scoring.mods.bias) + len(scoring.mods.mask) > 0:
        careful = False
        if static.GRADS != "dv":
            careful |= stored_tile_has_nan(dk, first, N, static.D, static.ACC)
        if static.GRADS != "dk":
            careful |= stored_tile_has_nan(dv, first, N, static.DV, static.ACC)
        if careful:
            dkdv_nan_safe(dk, dv, Keys(k, v), queries, first, head, batch, sizes, scoring, static)


@triton.jit
def dkdv_nan_safe(dk, dv, keys, queries, first, head, batch, sizes, scoring, static):
    """The same once more, CARE keys at a time."""
    for some in tl.range(first, first + static.BLOCK_N, NAN_SAFE_ROWS, num_stages=1):
        tile = Keys(load_tile(keys.k, some, NAN_SAFE_ROWS, static.D, True), load_tile(keys.v, some, NAN_SAFE_ROWS, static.DV, True))
        col = some - sizes.shift
        dk_tile, dv_tile = zero_tile(NAN_SAFE_ROWS, static.D, static.ACC), zero_tile(NAN_SAFE_ROWS, static.DV, static.ACC)
        for member in tl.range(0, static.GROUP):
            of = head * static.GROUP + member
            mods = select_head(scoring.mods, sizes.batches, batch, of, some, sizes.n_k, -sizes.shift)
            here = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.window, mods)
            bounds = loop_bounds(mods.block_list, scoring.window, col, sizes.n_q, NAN_SAFE_ROWS, static.BLOCK_M)
            dk_tile, dv_tile = accumulate_dkdv(dk_tile, dv_tile, tile, query_views(queries, sizes, batch, of), col, bounds[0],
                                           bounds[3], here, static, "nan_safe")
        store_dkdv(dk, dv, dk_tile, dv_tile, some, NAN_SAFE_ROWS, sizes, scoring, static)


class AxisSizes(NamedTuple):
    """Sizes of the batch dimensions (the innermost first) and of the heads over which something runs."""

    batches: tuple
    heads: int


@triton.jit
def batch_index(own, other, own_axes, reduced_axes):
    """The batch that has in each dimension the index of `own` or of `other`: one of the two has only one there."""
    batch, stride = 0, 1
    for i in tl.static_range(len(own_axes.batches)):
        batch += (own % own_axes.batches[i] + other % reduced_axes.batches[i]) * stride
        own, other = own // own_axes.batches[i], other // reduced_axes.batches[i]
        stride = stride * own_axes.batches[i] * reduced_axes.batches[i]
    return batch


@triton.jit
def accumulate_dbias(dbias, queries, keys, col, start, stop, sizes, scoring, static):
    """Add to dbias [M, N] the dS of queries [start, stop), one tile after the other, and of a tile of keys."""
    M: tl.constexpr = static.BLOCK_M
    for first in tl.range(start, stop, M):
        tile = load_queries(queries, first, M, static, True)
        row = first + sizes.shift
        s = scores(tile.q, keys.k, row, col, sizes.n_k, scoring, static, "masked")
        p = recompute_p(s, tile, scoring.exp2_scale, False, "masked")
        dp, = apply_keep_scale((apply_keep_mask(dot_t(tile.do, keys.v, static), row, col, scoring, False),), scoring)
        ds = grad_s(s, p, dp, tile.delta[:, None], "masked")
        # past the last query there are zeros, which a nan in a key would turn into one
        dbias += tl.where((first + tl.arange(0, M) < sizes.n_q)[:, None], ds, 0.0)
    return dbias


@triton.jit
def dbias_kernel(queries, k, v, dbias, own_axes, reduced_axes, sizes, scoring, static):
    """One program per tile of the bias: it visits all pairs that share its entries, batch by batch and head by head.

    `owned` are the bias's own sizes, `summed` those over which it is broadcast; so are the queries if OUT is "keys".
    """
    M: tl.constexpr = static.BLOCK_M
    N: tl.constexpr = static.BLOCK_N
    col_tiles = tl.cdiv(sizes.n_k, N)
    row_tiles = 1 if static.GRADS == "keys" else tl.cdiv(sizes.n_q, M)
    tile, rest = tl.program_id(0) % (row_tiles * col_tiles), tl.program_id(0) // (row_tiles * col_tiles)
    own_head, own_batch = rest % own_axes.heads, rest // own_axes.heads
    first, first_col = tile // col_tiles * M, tile % col_tiles * N

    members = reduced_axes.heads
    for i in tl.static_range(len(reduced_axes.batches)):
        members = members * reduced_axes.batches[i]
    total = tl.zeros([M, N], static.ACC)
    for member in tl.range(0, members):
        head, batch = own_head + member % reduced_axes.heads, batch_index(own_batch, member // reduced_axes.heads, own_axes, reduced_axes)
        here = sizes_of_batch(sizes, batch)
        keys = key_views(k, v, here, batch, head // static.GROUP)
        keys = Keys(load_tile(keys.k, first_col, N, static.D, True), load_tile(keys.v, first_col, N, static.DV, True))
        mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_q, here.shift)
        # the queries that see one of these keys, or of them this tile's
        seen = window_bounds(Window(scoring.window.right, scoring.window.left), first_col - here.shift, sizes.n_q, N, M)
        start, stop = seen[0], seen[3]
        if static.GRADS != "keys":
            start, stop = first, tl.where((start < first + M) & (stop > first), first + 1, first)
        total = accumulate_dbias(total, query_views(queries, sizes, batch, head), keys, first_col, start, stop, here,
                             ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.window, mods), static)
    dbias = head_view(dbias, sizes.batches, batch_index(own_batch, 0, own_axes, reduced_axes), own_head, sizes.n_q)
    cols = first_col + tl.arange(0, N)
    ptrs = dbias.ptr + tl.cast(cols, tl.int64) * dbias.col
    dtype = dbias.ptr.dtype.element_ty
    if static.GRADS == "keys":
        tl.store(ptrs, tl.sum(total, 0).to(dtype), mask=cols < sizes.n_k)
    else:
        rows = first + tl.arange(0, M)
        tl.store(ptrs[None, :] + tl.cast(rows, tl.int64)[:, None] * dbias.row, total.to(dtype),
                 mask=(rows < sizes.n_q)[:, None] & (cols < sizes.n_k)[None, :])
