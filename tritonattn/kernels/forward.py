"""Forward pass: O = softmax(S) V and LSE = log sum_j e^(S_j). One program computes one tile of queries of one head.

    for part in (left, unmasked, right stretch of window_bounds):
        for k, v in tiles of part:  state = softmax_step(state, scores(q, k), v)
    o, lse = softmax_finish(state);  if o has a NaN: recompute it in mode nan_safe

Sigmoid and ReLU attention have other weights P and no LSE (unnormalized.py).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import ScoreParams, apply_keep_mask, apply_keep_scale, load_modifiers, modify, scale_and_cap, select_head
from .softmax import row_entropy, row_max, softmax_finish, softmax_start, softmax_step
from .tile import (
    LENGTHS,
    HeadView,
    Tensor,
    any_row,
    dot_acc,
    dot_t,
    key_view,
    keys_to_attend,
    load_statistic,
    load_tile,
    lse_view,
    query_view,
    rounding_error,
    sizes_of_batch,
    statistics_of_head,
    statistics_view,
    store_statistic,
    store_tile,
    stored_rows_with_nan,
    tile_head_batch,
    zero_tile,
)
from .unnormalized import from_unit, weights
from .window import NAN_SAFE_ROWS, block_start, is_ahead, loop_bounds, loop_mode, loop_stages, loop_step, needs_mask


class Keys(NamedTuple):
    """Keys and values, or their gradients: tensors, views of one head, or a tile of each."""

    k: HeadView
    v: HeadView


class Outputs(NamedTuple):
    """Outputs of the forward pass: tensors, or views of one head."""

    o: Tensor
    lse: object             # address, see tile.lse_view; () of other normalizers than softmax, like the statistics
    statistics: object      # address, see tile.statistics_view: -m and log2 l of softmax.py, in its units
    o_residual: tuple = ()  # or one element, the rounding error of o: o + o_residual has twice the digits of o
    row_max: tuple = ()     # or one element, an address as lse
    entropy: tuple = ()     # the same


@triton.jit
def output_views(outputs, sizes, batch, head, static):
    """Return the views of one head."""
    lse, statistics = outputs.lse, outputs.statistics
    o_residual, largest, entropy = outputs.o_residual, outputs.row_max, outputs.entropy
    if static.NORMALIZER == "softmax":
        lse, statistics = lse_view(lse, sizes, batch, head), statistics_view(statistics, sizes, batch, head, 2)
    if len(outputs.o_residual) == 1:
        o_residual = (query_view(outputs.o_residual[0], sizes, batch, head),)
    if len(outputs.row_max) == 1:
        largest = (lse_view(outputs.row_max[0], sizes, batch, head),)
    if len(outputs.entropy) == 1:
        entropy = (lse_view(outputs.entropy[0], sizes, batch, head),)
    return Outputs(query_view(outputs.o, sizes, batch, head), lse, statistics, o_residual, largest, entropy)


@triton.jit
def start_state(M: tl.constexpr, static, ENTROPY: tl.constexpr):
    """Return the state before the first key: a Softmax; of other normalizers the sum of P V alone."""
    if static.NORMALIZER == "softmax":
        return softmax_start(M, static, ENTROPY)
    else:
        return zero_tile(M, static.DV, static.ACC)


@triton.jit
def key_views(keys, sizes, batch, head):
    """Return the views of one key head."""
    return Keys(key_view(keys.k, sizes, batch, head, sizes.n_k), key_view(keys.v, sizes, batch, head, sizes.n_k))


@triton.jit
def attend_loop(state, q, keys, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Return the state after the keys [start, stop), for queries q [M, D] from position `row`."""
    N: tl.constexpr = loop_step(static.BLOCK_N, MODE)
    M: tl.constexpr = q[0].shape[0]
    CHECK: tl.constexpr = static.UNEVEN and needs_mask(MODE)
    if is_ahead(static.AHEAD, MODE):
        # the last step computes its own product once more, so that the loop has no branch
        last = tl.maximum(stop - N, 0)
        product = dot_t(q, load_tile(keys.k, block_start(scoring.mods.block_list, tl.minimum(start, last)), N, static.D, True),
                        static)
        # no warp group may fill the buffers of the pipeline while another one still reads this tile
        tl.debug_barrier()
    for step in tl.range(start, stop, N, num_stages=loop_stages(MODE)):
        first = block_start(scoring.mods.block_list, step)
        modifiers = load_modifiers(row, first, keys.k.rows, M, N, scoring, MODE)
        if is_ahead(static.AHEAD, MODE):
            current = product
            following = block_start(scoring.mods.block_list, tl.minimum(step + N, last))
            product = dot_t(q, load_tile(keys.k, following, N, static.D, CHECK), static)
        else:
            current = dot_t(q, load_tile(keys.k, first, N, static.D, CHECK), static)
        s = modify(scale_and_cap(current, scoring, q[0].dtype), modifiers, row, first, keys.k.rows, scoring, static, MODE)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        if static.NORMALIZER == "softmax":
            state = softmax_step(state, s, v, row, first, scoring, static, MODE)
        else:
            p = apply_keep_mask(weights(s, scoring, static, q[0].dtype), row, first, scoring, False)
            state = dot_acc(state, p, v, s, static, MODE)
    return state


@triton.jit
def store_outputs(state, outputs, first, M: tl.constexpr, sizes, scoring, static):
    """Store the outputs of the M queries from `first`."""
    if static.NORMALIZER == "softmax":
        store_softmax(state, outputs, first, M, sizes, scoring, static)
    else:
        o_tile = from_unit(apply_keep_scale(state, scoring), sizes.n_k, static, outputs.o.ptr.dtype.element_ty)
        store_tile(outputs.o, first, o_tile, M, static.DV)


@triton.jit
def store_softmax(state, outputs, first, M: tl.constexpr, sizes, scoring, static):
    """Store the outputs of M queries whose state is a Softmax."""
    o_tile, lse, minus_m, log2_l = softmax_finish(state, scoring, static, outputs.o.ptr.dtype.element_ty)
    store_tile(outputs.o, first, o_tile, M, static.DV)
    rows = first + tl.arange(0, M)
    tl.store(outputs.lse + rows, lse, mask=rows < sizes.n_q)
    store_statistic(outputs.statistics, first, sizes.n_q, minus_m, M)
    store_statistic(outputs.statistics + statistics_of_head(sizes), first, sizes.n_q, log2_l, M)
    if len(outputs.row_max) == 1:
        largest = row_max(state, scoring, outputs.o.ptr.dtype.element_ty)
        tl.store(outputs.row_max[0] + rows, largest, mask=rows < sizes.n_q)
    if len(outputs.entropy) == 1:
        entropy = row_entropy(state, minus_m, log2_l, scoring, outputs.o.ptr.dtype.element_ty)
        tl.store(outputs.entropy[0] + rows, entropy, mask=rows < sizes.n_q)
    if len(outputs.o_residual) == 1:
        store_tile(outputs.o_residual[0], first, rounding_error(o_tile, outputs.o_residual[0].ptr.dtype.element_ty), M,
                   static.DV)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(q, keys, outputs, n_q, n_k, shift, leading, scoring, static):
    """Compute the outputs of one tile of queries. Grid: tiles of queries x query heads x batches."""
    M: tl.constexpr = static.BLOCK_M
    window = scoring.window
    # with a bounded right side the last queries attend to the most keys: the longest programs start first
    first, head, batch = tile_head_batch(leading, leading.heads, n_q, M, window.right is not None, "q")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    q = query_view(q, sizes, batch, head)
    outputs = output_views(outputs, sizes, batch, head, static)
    keys = key_views(keys, sizes, batch, head // static.GROUP)
    mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_q, sizes.shift, static)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
    n_k = keys_to_attend(sizes, first)
    bounds = loop_bounds(mods.block_list, window, first + sizes.shift, n_k, M, static.BLOCK_N)

    q_tile = load_tile(q, first, M, static.D, True)
    state = start_state(M, static, len(outputs.entropy))
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            state = attend_loop(state, q_tile, keys, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                                loop_mode(static.LOOP_MODES, part))
    store_outputs(state, outputs, first, M, sizes, scoring, static)
    if window.left is not None or window.right is not None or static.MAY_MASK:
        # a NaN among its scores makes a row NaN by definition, and its sum too
        redo = stored_rows_with_nan(outputs.o, first, M, static.DV, static.ACC)
        if static.NORMALIZER == "softmax":
            log2_l = load_statistic(outputs.statistics + statistics_of_head(sizes), first, sizes.n_q, M, 0.0)
            redo = redo & (log2_l == log2_l)
        if any_row(redo, 0, M):
            forward_nan_safe(redo, q, keys, outputs, first, bounds[0], bounds[3], sizes, scoring, static)


@triton.jit
def forward_nan_safe(redo, q, keys, outputs, first, start, stop, sizes, scoring, static):
    """Recompute the rows `redo` of one tile of the outputs in mode nan_safe, from the keys [start, stop)."""
    for begin in tl.range(0, static.BLOCK_M, NAN_SAFE_ROWS, num_stages=1):
        if any_row(redo, begin, NAN_SAFE_ROWS):
            row = first + begin
            q_rows = load_tile(q, row, NAN_SAFE_ROWS, static.D, True)
            state = start_state(NAN_SAFE_ROWS, static, len(outputs.entropy))
            state = attend_loop(state, q_rows, keys, row + sizes.shift, start, stop, scoring, static, "nan_safe")
            store_outputs(state, outputs, row, NAN_SAFE_ROWS, sizes, scoring, static)
