"""Gradients of O = P V with P = softmax(S), S = scale Q K^T (Dao et al., 2022, arXiv 2205.14135, appendix B):

    dV = P^T dO          dP = dO V^T          delta = rowsum(dO * O) - dLSE
    dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dbias = dS, summed where the bias is broadcast

P is never stored; it is recomputed from the scores and the log-sum-exp of each row. There is one kernel for delta, one for dQ,
one for dK and dV, and one for dbias. Each program owns one tile of its output, so every address has one writer and no atomics
are needed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .forward import Keys, key_views
from .scores import LOG2E, ScoreParams, apply_keep_mask, apply_keep_scale, grad_scale, scores, select_head
from .tile import (
    HeadView,
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
    """Queries, their cotangents and their statistics from the forward pass: tensors, views of one head, or tiles."""

    q: HeadView
    do: HeadView
    lse: HeadView  # natural; in a tile without bias, base 2; in a tile, +inf for rows that attend to no key, so that P is 0
    delta: HeadView
    lse_minus_max: tuple = ()  # with a bias, one element: lse - max S


@triton.jit
def query_views(queries, sizes, batch, head):
    """Return the views of one query head."""
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
    """Load the tile of M queries from `first`; rows past the end get an lse of +inf. Rows are checked only if CHECK."""
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
    """Return P of a tile; 0 at masked pairs, even where the log-sum-exp of the row is NaN."""
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    if len(queries.lse_minus_max) == 0:
        p = tl.exp2(s * exp2_scale - tl.expand_dims(queries.lse, AXIS))
    else:
        # subtract the largest score first, as the forward pass does: lse may be too large to hold lse - max S
        lse_minus_max = queries.lse_minus_max[0]
        p = tl.exp2((s - tl.expand_dims(queries.lse - lse_minus_max, AXIS)) * exp2_scale
                    - tl.expand_dims(lse_minus_max * LOG2E, AXIS))
    if MODE != "unmasked":
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def grad_s(s, p, dp, delta, MODE: tl.constexpr):
    """Return dS = P * (dP - delta), dP with dropout applied; 0 at masked pairs, even where dP is not finite."""
    ds = p * (dp - delta)
    if MODE != "unmasked":
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return ds


@triton.jit
def row_dot(a, b):
    """Return [M]: the dot product of each row of a with the same row of b."""
    total = tl.sum(a[0] * b[0], 1)
    if len(a) == 2:
        total += tl.sum(a[1] * b[1], 1)
    return total


@triton.jit
def delta_kernel(o, o_residual, do, dlse, delta, sizes, static):
    """Compute delta = rowsum(dO * (O + o_residual)) - dLSE. Grid: tiles of queries x query heads x batches."""
    M: tl.constexpr = static.BLOCK_M
    first, head, batch = tile_head_batch(sizes.heads, sizes.n_q, M, False)
    one = tl.full([], 1.0, static.ACC)
    o_tile = scale_tile(load_tile(head_view(o, sizes.batches, batch, head, sizes.n_q), first, M, static.DV, True), one)
    do_tile = scale_tile(load_tile(head_view(do, sizes.batches, batch, head, sizes.n_q), first, M, static.DV, True), one)
    total = row_dot(do_tile, o_tile)
    if o_residual is not None:
        residual_tile = load_tile(head_view(o_residual, sizes.batches, batch, head, sizes.n_q), first, M, static.DV, True)
        total += row_dot(do_tile, scale_tile(residual_tile, one))
    if dlse is not None:
        total -= load_rows(head_view(dlse, sizes.batches, batch, head, sizes.n_q), first, M, 0.0)
    store_rows(head_view(delta, sizes.batches, batch, head, sizes.n_q), first, total, M)


@triton.jit
def accumulate_dq(dq, queries, keys, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Return dq [M, D] plus dS K of the keys [start, stop); `queries` is a tile, `keys` are views."""
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
    """Compute one tile of dQ. Grid: tiles of queries x query heads x batches."""
    M: tl.constexpr = static.BLOCK_M
    HAS_MASK: tl.constexpr = len(scoring.mods.bias) + len(scoring.mods.mask) > 0
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
    if window.left is not None or window.right is not None or HAS_MASK:
        if stored_tile_has_nan(dq, first, M, static.D, static.ACC):
            for row_start in tl.range(first, first + M, NAN_SAFE_ROWS, num_stages=1):
                row_tile = load_queries(queries, row_start, NAN_SAFE_ROWS, static, True)
                row_acc = zero_tile(NAN_SAFE_ROWS, static.D, static.ACC)
                row_acc = accumulate_dq(row_acc, row_tile, keys, row_start + sizes.shift, bounds[0], bounds[3], scoring, static,
                                        "nan_safe")
                store_tile(dq, row_start, scale_tile(row_acc, grad_scale(scoring)), NAN_SAFE_ROWS, static.D)


@triton.jit
def accumulate_dkdv(dk, dv, keys, queries, col, start, stop, scoring, static, MODE: tl.constexpr):
    """Return dk [N, D] plus dS^T Q and dv [N, DV] plus P^T dO of the queries [start, stop).

    `keys` is a tile, `queries` are views. Scores are computed transposed, [N, M], so that P^T and dS^T are the left
    operands of their dots in the layout in which they are computed.
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
    """Return dk and dv plus the contributions of the first n queries of one head."""
    bounds = loop_bounds(scoring.mods.block_list, scoring.window, col, n, static.BLOCK_N, static.BLOCK_M)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            dk, dv = accumulate_dkdv(dk, dv, keys, queries, col, bounds[part], bounds[part + 1], scoring, static,
                                     loop_mode(static.LOOP_MODES, part))
    return dk, dv


@triton.jit
def store_dkdv(dk, dv, dk_tile, dv_tile, first, N: tl.constexpr, sizes, scoring, static):
    """Store the gradients that static.GRADS selects; those of keys past the length of the batch are 0."""
    if len(sizes.lengths) == 2:
        in_length = (first + tl.arange(0, N) < sizes.n_k)[:, None]
        dk_tile, dv_tile = zero_rows_unless(in_length, dk_tile), zero_rows_unless(in_length, dv_tile)
    if static.GRADS != "dv":
        store_tile(dk, first, scale_tile(dk_tile, grad_scale(scoring)), N, static.D)
    if static.GRADS != "dk":
        store_tile(dv, first, apply_keep_scale(dv_tile, scoring), N, static.DV)


@triton.jit
def dkdv_kernel(queries, k, v, dk, dv, sizes, scoring, static):
    """Compute one tile of dK and dV. Grid: tiles of keys x key heads x batches.

    One program sums over all query heads of its key head, in order. `scoring` is transposed: its rows are keys.
    """
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
        # no query attends to keys past the length of the batch
        n = tl.where(first < sizes.n_k, n, 0)
    dk_tile, dv_tile = zero_tile(N, static.D, static.ACC), zero_tile(N, static.DV, static.ACC)
    if static.GROUP == 1:
        # a loop of one step would cost registers
        mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_k, -sizes.shift)
        head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, window, mods)
        dk_tile, dv_tile = accumulate_head(dk_tile, dv_tile, keys, query_views(queries, sizes, batch, head), col, n,
                                           head_params, static)
    else:
        for member in tl.range(0, static.GROUP):
            query_head = head * static.GROUP + member
            mods = select_head(scoring.mods, sizes.batches, batch, query_head, first, sizes.n_k, -sizes.shift)
            head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.window, mods)
            dk_tile, dv_tile = accumulate_head(dk_tile, dv_tile, keys, query_views(queries, sizes, batch, query_head), col, n,
                                               head_params, static)
    store_dkdv(dk, dv, dk_tile, dv_tile, first, N, sizes, scoring, static)
    if window.left is not None or window.right is not None or len(scoring.mods.bias) + len(scoring.mods.mask) > 0:
        has_nan = False
        if static.GRADS != "dv":
            has_nan |= stored_tile_has_nan(dk, first, N, static.D, static.ACC)
        if static.GRADS != "dk":
            has_nan |= stored_tile_has_nan(dv, first, N, static.DV, static.ACC)
        if has_nan:
            dkdv_nan_safe(dk, dv, Keys(k, v), queries, first, head, batch, sizes, scoring, static)


@triton.jit
def dkdv_nan_safe(dk, dv, keys, queries, first, head, batch, sizes, scoring, static):
    """Recompute one tile of dK and dV in mode nan_safe, NAN_SAFE_ROWS keys at a time."""
    for row_start in tl.range(first, first + static.BLOCK_N, NAN_SAFE_ROWS, num_stages=1):
        tile = Keys(load_tile(keys.k, row_start, NAN_SAFE_ROWS, static.D, True),
                    load_tile(keys.v, row_start, NAN_SAFE_ROWS, static.DV, True))
        col = row_start - sizes.shift
        dk_tile, dv_tile = zero_tile(NAN_SAFE_ROWS, static.D, static.ACC), zero_tile(NAN_SAFE_ROWS, static.DV, static.ACC)
        for member in tl.range(0, static.GROUP):
            query_head = head * static.GROUP + member
            mods = select_head(scoring.mods, sizes.batches, batch, query_head, row_start, sizes.n_k, -sizes.shift)
            head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.window, mods)
            bounds = loop_bounds(mods.block_list, scoring.window, col, sizes.n_q, NAN_SAFE_ROWS, static.BLOCK_M)
            dk_tile, dv_tile = accumulate_dkdv(dk_tile, dv_tile, tile, query_views(queries, sizes, batch, query_head), col,
                                               bounds[0], bounds[3], head_params, static, "nan_safe")
        store_dkdv(dk, dv, dk_tile, dv_tile, row_start, NAN_SAFE_ROWS, sizes, scoring, static)


class AxisSizes(NamedTuple):
    """Sizes of the batch dimensions (the innermost first) and of the head dimension, of the bias or of a reduction."""

    batches: tuple
    heads: int


@triton.jit
def batch_index(own, reduced, own_axes, reduced_axes):
    """Return the index of a batch from an index into own_axes and one into reduced_axes.

    In each batch dimension one of the two has size 1, and the other has the size of the batch.
    """
    batch, stride = 0, 1
    for i in tl.static_range(len(own_axes.batches)):
        batch += (own % own_axes.batches[i] + reduced % reduced_axes.batches[i]) * stride
        own, reduced = own // own_axes.batches[i], reduced // reduced_axes.batches[i]
        stride = stride * own_axes.batches[i] * reduced_axes.batches[i]
    return batch


@triton.jit
def accumulate_dbias(dbias, queries, keys, col, start, stop, sizes, scoring, static):
    """Return dbias [M, N] plus dS of the queries [start, stop) and a tile of keys; `queries` are views."""
    M: tl.constexpr = static.BLOCK_M
    for first in tl.range(start, stop, M):
        tile = load_queries(queries, first, M, static, True)
        row = first + sizes.shift
        s = scores(tile.q, keys.k, row, col, sizes.n_k, scoring, static, "masked")
        p = recompute_p(s, tile, scoring.exp2_scale, False, "masked")
        dp, = apply_keep_scale((apply_keep_mask(dot_t(tile.do, keys.v, static), row, col, scoring, False),), scoring)
        ds = grad_s(s, p, dp, tile.delta[:, None], "masked")
        # rows past the last query are loaded as 0, and 0 times a NaN in a key is NaN
        dbias += tl.where((first + tl.arange(0, M) < sizes.n_q)[:, None], ds, 0.0)
    return dbias


@triton.jit
def dbias_kernel(queries, k, v, dbias, own_axes, reduced_axes, sizes, scoring, static):
    """Compute one tile of dbias: the sum of dS over all batches and heads that share the bias.

    Grid: tiles of the bias x own_axes, the sizes of the bias itself. One program loops over reduced_axes, the sizes over
    which the bias is broadcast, and over all queries if it is broadcast over them (GRADS is "keys").
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
        head = own_head + member % reduced_axes.heads
        batch = batch_index(own_batch, member // reduced_axes.heads, own_axes, reduced_axes)
        batch_sizes = sizes_of_batch(sizes, batch)
        keys = key_views(k, v, batch_sizes, batch, head // static.GROUP)
        keys = Keys(load_tile(keys.k, first_col, N, static.D, True), load_tile(keys.v, first_col, N, static.DV, True))
        mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_q, batch_sizes.shift)
        # the queries that attend to at least one of these keys; unless GRADS is "keys", only those of this tile
        bounds = window_bounds(Window(scoring.window.right, scoring.window.left), first_col - batch_sizes.shift, sizes.n_q,
                               N, M)
        start, stop = bounds[0], bounds[3]
        if static.GRADS != "keys":
            start, stop = first, tl.where((start < first + M) & (stop > first), first + 1, first)
        total = accumulate_dbias(total, query_views(queries, sizes, batch, head), keys, first_col, start, stop, batch_sizes,
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
