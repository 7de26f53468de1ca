"""Gradients of O = P V with P = softmax(S), S = scale Q K^T (Dao et al., 2022, arXiv 2205.14135, appendix B):

    dV = P^T dO          dP = dO V^T          delta = rowsum(dO * O) - dLSE
    dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dbias = dS, summed where the bias is broadcast

In dQ and dK, dS is multiplied by the derivatives of the user's function and of the softcap's tanh. A sink needs no kernel
(runtime/row_gradients.py). In sigmoid and ReLU attention dS = dP/dS * dP, without a delta (unnormalized.py).

Two statistics of the weights have gradients, the entropy H of each query and the mass M of each key:

    H_i = -sum_j P_ij ln P_ij       dP_ij += -dH_i (ln P_ij + 1)       delta_i += dH_i (H_i - sum_j P_ij)
    M_j = sum_i P_ij                dP_ij += dM_j                      delta_i += sum_j P_ij dM_j         (kernels/mass.py)

P is never stored; it is recomputed from the scores and two numbers of each row (softmax.py). There is one kernel for delta, one
for dQ, one for dK and dV, and one for dbias. Each program owns one tile of its output, so every address has one writer and no
atomics are needed. Where both accumulators of dK and dV take too many registers, half of the programs compute dV and the
others dK.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .forward import Keys, key_views
from .functions import call_function
from .scores import LN2, ScoreParams, apply_keep_mask, apply_keep_scale, attended, grad_scale, scores, select_head
from .softmax import LOWEST, exponent
from .tile import (
    LENGTHS,
    HeadView,
    Tensor,
    any_row,
    count_nonfinite,
    dot_acc,
    dot_t,
    head_view,
    key_view,
    keys_to_attend,
    load_column,
    load_statistic,
    load_tile,
    lse_view,
    mass_view,
    query_view,
    rows_by_position,
    scale_tile,
    sizes_of_batch,
    statistics_of_head,
    statistics_view,
    store_statistic,
    store_tile,
    stored_rows_with_nan,
    tile_head_batch,
    zero_rows_unless,
    zero_stored_rows,
    zero_tile,
)
from .unnormalized import from_unit, slope, weights
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
    """Queries, their cotangents and their statistics: tensors, views of one head, or tiles."""

    q: HeadView
    do: HeadView
    # of other normalizers than softmax both are ()
    statistics: object  # address, see forward.Outputs; in a view (address of -m, of log2 l), in a tile (-m, log2 l)
    delta: object       # address, see tile.statistics_view; in a tile its numbers
    d_entropy: tuple = ()  # or one element, the cotangents of the entropies: address as lse
    d_mass: tuple = ()     # or one element, those of the key masses: address, see tile.mass_view; in a tile a view by position


class Weights(NamedTuple):
    """Weights of a tile, [M, N] or [N, M]."""

    p: tl.tensor      # in the unit of unnormalized.py; 0 at masked pairs
    slope: tl.tensor  # dP/dS of each pair by itself: of a softmax P, the rest is in delta
    log2_p: object    # of a softmax, else (); anything at masked pairs


@triton.jit
def query_views(queries, sizes, batch, head, static, KEY_ROWS: tl.constexpr):
    """Return the views of one query head. KEY_ROWS: keys are the rows of the scores, so that query 0 has position 0."""
    statistics, delta, d_entropy, d_mass = queries.statistics, queries.delta, queries.d_entropy, queries.d_mass
    if static.NORMALIZER == "softmax":
        address = statistics_view(queries.statistics, sizes, batch, head, 2)
        statistics = address, address + statistics_of_head(sizes)
        delta = statistics_view(queries.delta, sizes, batch, head, 1)
    if len(queries.d_entropy) == 1:
        d_entropy = (HeadView(lse_view(queries.d_entropy[0], sizes, batch, head), 1, 1, sizes.n_q),)
    if len(queries.d_mass) == 1:
        d_mass = (mass_view(queries.d_mass[0], sizes, batch, head),)
        if KEY_ROWS:
            d_mass = (rows_by_position(d_mass[0], -sizes.shift),)
    return Queries(query_view(queries.q, sizes, batch, head), query_view(queries.do, sizes, batch, head), statistics, delta,
                   d_entropy, d_mass)


@triton.jit
def load_log2_l(queries, first, M: tl.constexpr):
    """Return log2 l of M rows: +inf for rows that attend to no key, so that P is 0."""
    return load_statistic(queries.statistics[1], first, queries.q.rows, M, float("inf"))


@triton.jit
def load_queries(queries, first, M: tl.constexpr, static, CHECK: tl.constexpr):
    """Load the tile of M queries from `first`. Rows are checked only if CHECK."""
    statistics, delta, d_entropy = queries.statistics, queries.delta, queries.d_entropy
    if len(queries.d_entropy) == 1:
        d_entropy = (load_column(queries.d_entropy[0], first, M),)
    q, do = load_tile(queries.q, first, M, static.D, CHECK), load_tile(queries.do, first, M, static.DV, CHECK)
    if static.NORMALIZER == "softmax":
        statistics = load_statistic(queries.statistics[0], first, queries.q.rows, M, 0.0), load_log2_l(queries, first, M)
        delta = load_statistic(queries.delta, first, queries.q.rows, M, 0.0)
    return Queries(q, do, statistics, delta, d_entropy, queries.d_mass)


@triton.jit
def recompute_p(s, queries, scoring, static, TRANSPOSED: tl.constexpr, MODE: tl.constexpr):
    """Return the Weights of a tile."""
    if static.NORMALIZER == "softmax":
        p, log2_p = recompute_softmax(s, queries, scoring, TRANSPOSED, MODE)
        return Weights(p, p, log2_p)
    else:
        p = weights(s, scoring, static, queries.q[0].dtype)
        return Weights(p, slope(s, p, scoring, static, queries.q[0].dtype), ())


@triton.jit
def recompute_softmax(s, queries, scoring, TRANSPOSED: tl.constexpr, MODE: tl.constexpr):
    """Return P of a tile, 0 at masked pairs, even where the sum of the row is NaN; and log2 P, anything at masked pairs.

    m and log2 l are subtracted one after the other: for large scores their sum has no digits left for log2 l.
    """
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    minus_m, log2_l = queries.statistics
    log2_p = exponent(s, tl.expand_dims(minus_m, AXIS), scoring, queries.q[0].dtype) - tl.expand_dims(log2_l, AXIS)
    p = tl.exp2(log2_p)
    if MODE != "unmasked":
        p = tl.where(s == float("-inf"), 0.0, p)
    return p, log2_p


@triton.jit
def grad_p(a, b, row, col, scoring, static, TRANSPOSED: tl.constexpr):
    """Return dP = dO V^T of a tile, with dropout applied; transposed, a is V and b is dO."""
    dp, = apply_keep_scale((apply_keep_mask(dot_t(a, b, static), row, col, scoring, TRANSPOSED),), scoring)
    return dp


@triton.jit
def add_entropy_and_mass_grad(dp, log2_p, queries, first_key, TRANSPOSED: tl.constexpr):
    """Return dP plus the derivatives of the entropies and key masses of a tile; its first key is at position `first_key`."""
    if len(queries.d_entropy) == 1:
        d_entropy = tl.expand_dims(queries.d_entropy[0], 0 if TRANSPOSED else 1)
        dp -= d_entropy * (tl.maximum(log2_p, LOWEST) * LN2 + 1.0)
    if len(queries.d_mass) == 1:
        d_mass = load_column(queries.d_mass[0], first_key, dp.shape[0 if TRANSPOSED else 1])
        dp += tl.expand_dims(d_mass, 1 if TRANSPOSED else 0)
    return dp


@triton.jit
def slope_before(weight, capped, row, col, n, scoring, static):
    """Return dP/dS times the derivatives of the user's function and of the softcap: it makes grad_s give that of Q K^T.

    `capped` are the scores before function, biases and masks, of a tile at positions (row, col) with n columns.
    """
    x = weight.slope
    if len(scoring.mods.function) == 1:
        derivative = call_function(static.SCORE_SLOPE, capped, row, col, n, scoring.mods.function[0], static.TRANSPOSED)
        product = (x * derivative).to(static.ACC)
        if static.NORMALIZER == "relu":
            # where a score is not positive, whatever the derivative is
            x = tl.where(x == 0.0, 0.0, product)
        else:
            x = product
    if scoring.softcap is not None:
        # the derivative of tanh is 1 - tanh^2
        tanh = capped * (1.0 / scoring.softcap)
        x = x - x * (tanh * tanh)
    return x


@triton.jit
def grad_s(s, dp_ds, dp, queries, scoring, static, TRANSPOSED: tl.constexpr, MODE: tl.constexpr):
    """Return dS of a tile, dP with dropout applied; 0 at masked pairs, even where dP is not finite.

    dS = dP/dS * dP, of a softmax P * (dP - delta). `dp_ds` is the slope of the Weights, or `slope_before`. For float16 the
    result is multiplied by scoring.ds_scale.
    """
    if static.NORMALIZER == "softmax":
        dp = dp - tl.expand_dims(queries.delta, 0 if TRANSPOSED else 1)
    ds = dp_ds * dp
    if scoring.ds_scale is not None:
        ds = ds * scoring.ds_scale
    if static.NORMALIZER == "relu":
        # at masked pairs too; S itself would take registers
        ds = tl.where(dp_ds == 0.0, 0.0, ds)
    elif MODE != "unmasked":
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return ds


@triton.jit
def row_dot(a, b):
    """Return [M]: the dot product of each row of a with the same row of b."""
    total = tl.sum(a[0] * b[0], 1)
    if len(a) == 2:
        total += tl.sum(a[1] * b[1], 1)
    return total


@triton.jit(do_not_specialize=("n_q",))
def delta_kernel(o, o_residual, do, row_terms, delta, n_q, leading, static):
    """Compute delta = rowsum(dO * (O + o_residual)) - row_terms. Grid: tiles of queries x query heads x batches.

    row_terms: dLSE, and the terms of the entropy (runtime/row_gradients.py), with the addresses of lse.
    """
    M: tl.constexpr = static.BLOCK_M
    first, head, batch = tile_head_batch(leading, leading.heads, n_q, M, False, "q")
    sizes = sizes_of_batch(leading, n_q, 0, 0, batch)
    one = tl.full([], 1.0, static.ACC)
    o_tile = scale_tile(load_tile(query_view(o, sizes, batch, head), first, M, static.DV, True), one)
    do_tile = scale_tile(load_tile(query_view(do, sizes, batch, head), first, M, static.DV, True), one)
    total = row_dot(do_tile, o_tile)
    if o_residual is not None:
        residual_tile = load_tile(query_view(o_residual, sizes, batch, head), first, M, static.DV, True)
        total += row_dot(do_tile, scale_tile(residual_tile, one))
    if row_terms is not None:
        total -= load_column(HeadView(lse_view(row_terms, sizes, batch, head), 1, 1, sizes.n_q), first, M)
    store_statistic(statistics_view(delta, sizes, batch, head, 1), first, sizes.n_q, total, M)


@triton.jit
def accumulate_dq(dq, queries, keys, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Return dq [M, D] plus dS K of the keys [start, stop); `queries` is a tile, `keys` are views."""
    N: tl.constexpr = loop_step(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.UNEVEN and needs_mask(MODE)
    for step in tl.range(start, stop, N, num_stages=loop_stages(MODE)):
        first = block_start(scoring.mods.block_list, step)
        k = load_tile(keys.k, first, N, static.D, CHECK)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        s, capped = scores(queries.q, k, row, first, keys.k.rows, scoring, static, MODE)
        weight = recompute_p(s, queries, scoring, static, False, MODE)
        dp_ds = slope_before(weight, capped, row, first, keys.k.rows, scoring, static)
        dp = grad_p(queries.do, v, row, first, scoring, static, False)
        dp = add_entropy_and_mass_grad(dp, weight.log2_p, queries, first, False)
        ds = grad_s(s, dp_ds, dp, queries, scoring, static, False, MODE)
        dq = dot_acc(dq, ds, k, s, static, MODE)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(queries, keys, dq, n_q, n_k, shift, leading, scoring, static):
    """Compute one tile of dQ. Grid: tiles of queries x query heads x batches."""
    M: tl.constexpr = static.BLOCK_M
    window = scoring.window
    first, head, batch = tile_head_batch(leading, leading.heads, n_q, M, window.right is not None, "q")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    dq = query_view(dq, sizes, batch, head)
    queries = query_views(queries, sizes, batch, head, static, False)
    keys = key_views(keys, sizes, batch, head // static.GROUP)
    mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_q, sizes.shift, static)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
    n_k = keys_to_attend(sizes, first)
    bounds = loop_bounds(mods.block_list, window, first + sizes.shift, n_k, M, static.BLOCK_N)

    tile = load_queries(queries, first, M, static, True)
    acc = zero_tile(M, static.D, static.ACC)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            acc = accumulate_dq(acc, tile, keys, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                                loop_mode(static.LOOP_MODES, part))
    store_tile(dq, first, scale_tile(acc, grad_scale(scoring)), M, static.D)
    if window.left is not None or window.right is not None or static.MAY_MASK:
        if static.NORMALIZER == "softmax":
            # in a row that attends to a key, dS is not finite by definition if delta is not, or if a score is NaN
            log2_l, delta = load_log2_l(queries, first, M), load_statistic(queries.delta, first, sizes.n_q, M, 0.0)
            finite = (log2_l == float("inf")) | ((log2_l == log2_l) & (delta - delta == 0))
            redo = stored_rows_with_nan(dq, first, M, static.D, static.ACC) & finite
        else:
            redo = stored_rows_with_nan(dq, first, M, static.D, static.ACC)
        if any_row(redo, 0, M):
            dq_nan_safe(redo, queries, keys, dq, first, bounds[0], bounds[3], sizes.shift, scoring, static)


@triton.jit
def dq_nan_safe(redo, queries, keys, dq, first, start, stop, shift, scoring, static):
    """Recompute the rows `redo` of one tile of dQ in mode nan_safe, from the keys [start, stop)."""
    for begin in tl.range(0, static.BLOCK_M, NAN_SAFE_ROWS, num_stages=1):
        if any_row(redo, begin, NAN_SAFE_ROWS):
            row = first + begin
            tile = load_queries(queries, row, NAN_SAFE_ROWS, static, True)
            acc = zero_tile(NAN_SAFE_ROWS, static.D, static.ACC)
            acc = accumulate_dq(acc, tile, keys, row + shift, start, stop, scoring, static, "nan_safe")
            store_tile(dq, row, scale_tile(acc, grad_scale(scoring)), NAN_SAFE_ROWS, static.D)


@triton.jit
def accumulate_dkdv(dk, dv, keys, queries, col, start, stop, scoring, static, MODE: tl.constexpr):
    """Return dk [N, D] plus dS^T Q and dv [N, DV] plus P^T dO of the queries [start, stop).

    `keys` is a tile, `queries` are views. Scores are computed transposed, [N, M], so that P^T and dS^T are the left
    operands of their dots in the layout in which they are computed.
    """
    M: tl.constexpr = loop_step(static.BLOCK_M, MODE)
    DP_FIRST: tl.constexpr = static.AHEAD and static.GRADS != "dv" and MODE != "nan_safe"
    for step in tl.range(start, stop, M, num_stages=loop_stages(MODE)):
        first = block_start(scoring.mods.block_list, step)
        tile = load_queries(queries, first, M, static, static.UNEVEN and needs_mask(MODE))
        s, capped = scores(keys.k, tile.q, col, first, queries.q.rows, scoring, static, MODE)
        if DP_FIRST:
            dp = grad_p(keys.v, tile.do, col, first, scoring, static, True)
        weight = recompute_p(s, tile, scoring, static, True, MODE)
        # before the product with P, which leaves P in 16 bits alone
        if static.GRADS != "dv":
            dp_ds = slope_before(weight, capped, col, first, queries.q.rows, scoring, static)
        if static.GRADS != "dk":
            dv = dot_acc(dv, apply_keep_mask(weight.p, col, first, scoring, True), tile.do, s, static, MODE)
        if static.GRADS != "dv":
            if not DP_FIRST:
                dp = grad_p(keys.v, tile.do, col, first, scoring, static, True)
            dp = add_entropy_and_mass_grad(dp, weight.log2_p, tile, col, True)
            ds = grad_s(s, dp_ds, dp, tile, scoring, static, True, MODE)
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
    if len(sizes.key_lengths) == 2:
        in_length = (first + tl.arange(0, N) < sizes.n_k)[:, None]
        dk_tile, dv_tile = zero_rows_unless(in_length, dk_tile), zero_rows_unless(in_length, dv_tile)
    if static.GRADS != "dv":
        store_tile(dk, first, scale_tile(dk_tile, grad_scale(scoring)), N, static.D)
    if static.GRADS != "dk":
        dv_tile = from_unit(apply_keep_scale(dv_tile, scoring), sizes.n_k, static, dv.ptr.dtype.element_ty)
        store_tile(dv, first, dv_tile, N, static.DV)


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(queries, keys, grads, n_q, n_k, shift, leading, scoring, PASSES: tl.constexpr, static_dk, static):
    """Compute one tile of dK and dV. Grid: tiles of keys x key heads x batches.

    One program sums over all query heads of its key head, in order. `scoring` is transposed: its rows are keys. With two
    PASSES the grid has a second axis: the programs of dV, with the constants `static`, and those of dK.
    """
    if PASSES == 2:
        if tl.program_id(1) == 0:
            dkdv_tile(queries, keys, grads, n_q, n_k, shift, leading, scoring, static)
        else:
            dkdv_tile(queries, keys, grads, n_q, n_k, shift, leading, scoring, static_dk)
    else:
        dkdv_tile(queries, keys, grads, n_q, n_k, shift, leading, scoring, static)


@triton.jit
def dkdv_tile(queries, keys, grads, n_q, n_k, shift, leading, scoring, static):
    """Compute the gradients of this program's tile of keys that static.GRADS selects."""
    N: tl.constexpr = static.BLOCK_N
    window = scoring.window
    first, head, batch = tile_head_batch(leading, leading.heads // static.GROUP, n_k, N, window.right is not None, "k")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    dk, dv = None, None
    # a variable for the record in the record would lose its constants
    if static.GRADS != "dv":
        dk = key_view(grads.k, sizes, batch, head, sizes.key_rows)
    if static.GRADS != "dk":
        dv = key_view(grads.v, sizes, batch, head, sizes.key_rows)
    keys = key_views(keys, sizes, batch, head)
    tile = Keys(load_tile(keys.k, first, N, static.D, True), load_tile(keys.v, first, N, static.DV, True))
    col, n = first - sizes.shift, sizes.n_q
    if len(sizes.key_lengths) == 2 or len(sizes.packed) == 5:
        # no query attends to keys past the length of the batch
        n = tl.where(first < sizes.n_k, n, 0)
    dk_tile, dv_tile = zero_tile(N, static.D, static.ACC), zero_tile(N, static.DV, static.ACC)
    if static.GROUP == 1:
        # a loop of one step would cost registers
        mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_k, -sizes.shift, static)
        head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
        views = query_views(queries, sizes, batch, head, static, True)
        dk_tile, dv_tile = accumulate_head(dk_tile, dv_tile, tile, views, col, n, head_params, static)
    else:
        for member in tl.range(0, static.GROUP):
            query_head = head * static.GROUP + member
            mods = select_head(scoring.mods, sizes, batch, query_head, first, sizes.n_k, -sizes.shift, static)
            head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window,
                                      mods)
            views = query_views(queries, sizes, batch, query_head, static, True)
            dk_tile, dv_tile = accumulate_head(dk_tile, dv_tile, tile, views, col, n, head_params, static)
    store_dkdv(dk, dv, dk_tile, dv_tile, first, N, sizes, scoring, static)
    if window.left is not None or window.right is not None or static.MAY_MASK:
        nan_dk, nan_dv = tl.zeros([N], tl.int1), tl.zeros([N], tl.int1)
        if static.GRADS != "dv":
            nan_dk = stored_rows_with_nan(dk, first, N, static.D, static.ACC)
        if static.GRADS != "dk":
            nan_dv = stored_rows_with_nan(dv, first, N, static.DV, static.ACC)
        if any_row(nan_dk | nan_dv, 0, N):
            dkdv_nan_safe(nan_dk, nan_dv, dk, dv, keys, queries, first, head, batch, sizes, scoring, static)


@triton.jit
def find_attending(found, queries, col, n, scoring, static):
    """Return `found` updated by the first n queries of one head, for the keys [BLOCK_N] of a tile.

    `found` holds three arrays of booleans as int32: whether any query attends to the key, and whether one does that makes
    all its dK, or all its dV, not finite by definition.
    """
    N: tl.constexpr = static.BLOCK_N
    M: tl.constexpr = static.BLOCK_M
    bounds = loop_bounds(scoring.mods.block_list, scoring.window, col, n, N, M)
    for step in tl.range(bounds[0], bounds[3], M, num_stages=1):
        first = block_start(scoring.mods.block_list, step)
        if static.NORMALIZER == "softmax":
            log2_l = load_log2_l(queries, first, M)
            nonfinite = count_nonfinite(load_tile(queries.do, first, M, static.DV, True)) == static.DV
            pairs = attended(col, first, n, N, M, scoring, static) & (log2_l != float("inf"))[None, :]
            breaks_dk = log2_l != log2_l
            breaks_dv = breaks_dk | nonfinite
            if static.GRADS != "dv":
                delta = load_statistic(queries.delta, first, queries.q.rows, M, 0.0)
                breaks_dk = breaks_dk | (delta - delta != 0)
        else:
            nonfinite = count_nonfinite(load_tile(queries.do, first, M, static.DV, True))
            pairs = attended(col, first, n, N, M, scoring, static)
            # one element of dO makes dP of the row not finite, but dS is 0 where a score of relu is not positive
            breaks_dk, breaks_dv = (nonfinite > 0) & (static.NORMALIZER == "sigmoid"), nonfinite == static.DV
        found = (found[0] | tl.max(pairs.to(tl.int32), 1),
                 found[1] | tl.max((pairs & breaks_dk[None, :]).to(tl.int32), 1),
                 found[2] | tl.max((pairs & breaks_dv[None, :]).to(tl.int32), 1))
    return found


@triton.jit
def dkdv_nan_safe(nan_dk, nan_dv, dk, dv, keys, queries, first, head, batch, sizes, scoring, static):
    """Correct one tile of dK and dV, some of whose rows have a NaN: recompute those that may be finite by definition."""
    none = tl.zeros([static.BLOCK_N], tl.int32)
    found = (none, none, none)
    for member in tl.range(0, static.GROUP):
        query_head = head * static.GROUP + member
        mods = select_head(scoring.mods, sizes, batch, query_head, first, sizes.n_k, -sizes.shift, static)
        head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
        views = query_views(queries, sizes, batch, query_head, static, True)
        found = find_attending(found, views, first - sizes.shift, sizes.n_q, head_params, static)
    if static.GRADS != "dv":
        zero_stored_rows(dk, first, found[0] == 0, static.BLOCK_N, static.D)
    if static.GRADS != "dk":
        zero_stored_rows(dv, first, found[0] == 0, static.BLOCK_N, static.DV)
    redo = (found[0] != 0) & ((nan_dk & (found[1] == 0)) | (nan_dv & (found[2] == 0)))
    for begin in tl.range(0, static.BLOCK_N, NAN_SAFE_ROWS, num_stages=1):
        if any_row(redo, begin, NAN_SAFE_ROWS):
            recompute_dkdv(dk, dv, keys, queries, first + begin, head, batch, sizes, scoring, static)


@triton.jit
def recompute_dkdv(dk, dv, keys, queries, first, head, batch, sizes, scoring, static):
    """Recompute NAN_SAFE_ROWS rows of dK and dV in mode nan_safe."""
    tile = Keys(load_tile(keys.k, first, NAN_SAFE_ROWS, static.D, True),
                load_tile(keys.v, first, NAN_SAFE_ROWS, static.DV, True))
    col = first - sizes.shift
    dk_tile, dv_tile = zero_tile(NAN_SAFE_ROWS, static.D, static.ACC), zero_tile(NAN_SAFE_ROWS, static.DV, static.ACC)
    for member in tl.range(0, static.GROUP):
        query_head = head * static.GROUP + member
        mods = select_head(scoring.mods, sizes, batch, query_head, first, sizes.n_k, -sizes.shift, static)
        head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
        bounds = loop_bounds(mods.block_list, scoring.window, col, sizes.n_q, NAN_SAFE_ROWS, static.BLOCK_M)
        views = query_views(queries, sizes, batch, query_head, static, True)
        dk_tile, dv_tile = accumulate_dkdv(dk_tile, dv_tile, tile, views, col, bounds[0], bounds[3], head_params, static,
                                           "nan_safe")
    store_dkdv(dk, dv, dk_tile, dv_tile, first, NAN_SAFE_ROWS, sizes, scoring, static)


class AxisSizes(NamedTuple):
    """Sizes of the batch dimensions (the innermost first) and of the head dimension, of the bias or of a reduction."""

    batches: tuple
    heads: int


class BiasGrad(NamedTuple):
    """The gradient of a bias. In each batch dimension and in that of the heads, one of the two axes has size 1."""

    x: Tensor
    own_axes: AxisSizes      # of the bias itself
    reduced_axes: AxisSizes  # over which it is broadcast


@triton.jit
def batch_index(own, reduced, own_axes, reduced_axes):
    """Return the index of a batch from an index into own_axes and one into reduced_axes."""
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
        s, _ = scores(tile.q, keys.k, row, col, sizes.n_k, scoring, static, "masked")
        weight = recompute_p(s, tile, scoring, static, False, "masked")
        dp = grad_p(tile.do, keys.v, row, col, scoring, static, False)
        dp = add_entropy_and_mass_grad(dp, weight.log2_p, tile, col, False)
        ds = grad_s(s, weight.slope, dp, tile, scoring, static, False, "masked")
        # rows past the last query are loaded as 0, and 0 times a NaN in a key is NaN
        dbias += tl.where((first + tl.arange(0, M) < sizes.n_q)[:, None], ds, 0.0)
    return dbias


@triton.jit
def accumulate_member(dbias, queries, keys, first, col, batch, head, sizes, scoring, static):
    """Return dbias [M, N] plus dS of one head and batch, for the tile of keys from `col`.

    The queries are those of the tile from `first`, with GRADS "keys" all that attend to at least one of these keys.
    """
    M: tl.constexpr = static.BLOCK_M
    N: tl.constexpr = static.BLOCK_N
    views = key_views(keys, sizes, batch, head // static.GROUP)
    key_tile = Keys(load_tile(views.k, col, N, static.D, True), load_tile(views.v, col, N, static.DV, True))
    mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_q, sizes.shift, static)
    bounds = window_bounds(Window(scoring.window.right, scoring.window.left), col - sizes.shift, sizes.n_q, N, M)
    start, stop = bounds[0], bounds[3]
    if static.GRADS != "keys":
        start, stop = first, tl.where((start < first + M) & (stop > first), first + 1, first)
    head_params = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
    return accumulate_dbias(dbias, query_views(queries, sizes, batch, head, static, False), key_tile, col, start, stop, sizes,
                            head_params, static)


@triton.jit(do_not_specialize=LENGTHS)
def dbias_kernel(queries, keys, dbias, n_q, n_k, shift, leading, scoring, static):
    """Compute one tile of dbias: the sum of dS over all batches and heads that share the bias.

    Grid: tiles of the bias x the sizes of its own axes. One program loops over the axes over which the bias is broadcast; over
    all queries if it is broadcast over them (GRADS is "keys"), over all keys if over these (GRADS is "queries").
    """
    M: tl.constexpr = static.BLOCK_M
    N: tl.constexpr = static.BLOCK_N
    col_tiles = 1 if static.GRADS == "queries" else tl.cdiv(n_k, N)
    row_tiles = 1 if static.GRADS == "keys" else tl.cdiv(n_q, M)
    tile, rest = tl.program_id(0) % (row_tiles * col_tiles), tl.program_id(0) // (row_tiles * col_tiles)
    own_head, own_batch = rest % dbias.own_axes.heads, rest // dbias.own_axes.heads
    first, first_col = tile // col_tiles * M, tile % col_tiles * N

    members = dbias.reduced_axes.heads
    for i in tl.static_range(len(dbias.reduced_axes.batches)):
        members = members * dbias.reduced_axes.batches[i]
    total = tl.zeros([M, N], static.ACC)
    for member in tl.range(0, members):
        head = own_head + member % dbias.reduced_axes.heads
        batch = batch_index(own_batch, member // dbias.reduced_axes.heads, dbias.own_axes, dbias.reduced_axes)
        sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
        if static.GRADS == "queries":
            bounds = window_bounds(scoring.window, first + sizes.shift, sizes.n_k, M, N)
            for col in tl.range(bounds[0], bounds[3], N):
                total = accumulate_member(total, queries, keys, first, col, batch, head, sizes, scoring, static)
        else:
            total = accumulate_member(total, queries, keys, first, first_col, batch, head, sizes, scoring, static)
    view = head_view(dbias.x, leading.batches, batch_index(own_batch, 0, dbias.own_axes, dbias.reduced_axes), own_head, n_q)
    rows, cols = first + tl.arange(0, M), first_col + tl.arange(0, N)
    by_row, by_col = tl.cast(rows, tl.int64) * view.row, tl.cast(cols, tl.int64) * view.col
    dtype = view.ptr.dtype.element_ty
    if static.GRADS == "keys":
        tl.store(view.ptr + by_col, tl.sum(total, 0).to(dtype), mask=cols < n_k)
    elif static.GRADS == "queries":
        tl.store(view.ptr + by_row, tl.sum(total, 1).to(dtype), mask=rows < n_q)
    else:
        tl.store(view.ptr + by_row[:, None] + by_col[None, :], total.to(dtype),
                 mask=(rows < n_q)[:, None] & (cols < n_k)[None, :])
