"""Forward pass: O = softmax(S) V and LSE = log sum_j e^(S_j). One program computes one tile of queries of one head.

    for part in (left, unmasked, right stretch of window_bounds):
        for k, v in tiles of part:  state = softmax_step(state, scores(q, k), v)
    o, lse = softmax_finish(state);  if o has a NaN: recompute it in mode nan_safe
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import ScoreParams, scores, select_head
from .softmax import softmax_finish, softmax_start, softmax_step
from .tile import (
    HeadView,
    Tensor,
    head_view,
    load_tile,
    rounding_error,
    sizes_of_batch,
    store_rows,
    store_tile,
    stored_tile_has_nan,
    tile_head_batch,
)
from .window import NAN_SAFE_ROWS, block_start, loop_bounds, loop_mode, loop_stages, loop_step, needs_mask


class Keys(NamedTuple):
    """Keys and values of one head: two views, or a tile of each."""

    k: HeadView
    v: HeadView


class Outputs(NamedTuple):
    """Outputs of the forward pass: tensors, or views of one head. The last two are tuples of one element, or empty."""

    o: Tensor
    lse: Tensor
    o_residual: tuple = ()     # rounding error of o: o + o_residual has twice the digits of o
    lse_minus_max: tuple = ()  # lse - max S, used with a bias: lse itself may be too large to hold the difference


@triton.jit
def output_views(outputs, sizes, batch, head):
    """Return the views of one head."""
    o_residual, lse_minus_max = outputs.o_residual, outputs.lse_minus_max
    if len(outputs.o_residual) == 1:
        o_residual = (head_view(outputs.o_residual[0], sizes.batches, batch, head, sizes.n_q),)
    if len(outputs.lse_minus_max) == 1:
        lse_minus_max = (head_view(outputs.lse_minus_max[0], sizes.batches, batch, head, sizes.n_q),)
    return Outputs(head_view(outputs.o, sizes.batches, batch, head, sizes.n_q),
                   head_view(outputs.lse, sizes.batches, batch, head, sizes.n_q), o_residual, lse_minus_max)


@triton.jit
def key_views(k, v, sizes, batch, head):
    """Return the views of one key head."""
    return Keys(head_view(k, sizes.batches, batch, head, sizes.n_k), head_view(v, sizes.batches, batch, head, sizes.n_k))


@triton.jit
def attend_loop(state, q, keys, row, start, stop, scoring, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Return the state after the keys [start, stop), for queries q [M, D] from position `row`."""
    N: tl.constexpr = loop_step(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.UNEVEN and needs_mask(MODE)
    for step in tl.range(start, stop, N, num_stages=loop_stages(MODE)):
        first = block_start(scoring.mods.block_list, step)
        k = load_tile(keys.k, first, N, static.D, CHECK)
        s = scores(q, k, row, first, keys.k.rows, scoring, static, MODE)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        state = softmax_step(state, s, v, row, first, scoring, static, PRECISE, MODE)
    return state


@triton.jit
def store_outputs(state, outputs, first, M: tl.constexpr, scoring, static):
    """Store the outputs of the M queries from `first`."""
    o_tile, lse_tile, lse_minus_max_tile = softmax_finish(state, scoring)
    store_tile(outputs.o, first, o_tile, M, static.DV)
    store_rows(outputs.lse, first, lse_tile, M)
    if len(outputs.o_residual) == 1:
        store_tile(outputs.o_residual[0], first, rounding_error(o_tile, outputs.o_residual[0].ptr.dtype.element_ty), M,
                   static.DV)
    if len(outputs.lse_minus_max) == 1:
        store_rows(outputs.lse_minus_max[0], first, lse_minus_max_tile, M)


@triton.jit
def forward_kernel(q, k, v, outputs, sizes, scoring, static):
    """Compute the outputs of one tile of queries. Grid: tiles of queries x query heads x batches."""
    M: tl.constexpr = static.BLOCK_M
    PRECISE: tl.constexpr = len(outputs.o_residual) == 1
    HAS_MASK: tl.constexpr = len(scoring.mods.bias) + len(scoring.mods.mask) > 0
    window = scoring.window
    # with a bounded right side the last queries attend to the most keys: the longest programs start first
    first, head, batch = tile_head_batch(sizes.heads, sizes.n_q, M, window.right is not None)
    sizes = sizes_of_batch(sizes, batch)
    q = head_view(q, sizes.batches, batch, head, sizes.n_q)
    outputs = output_views(outputs, sizes, batch, head)
    keys = key_views(k, v, sizes, batch, head // static.GROUP)
    mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_q, sizes.shift)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, window, mods)
    bounds = loop_bounds(mods.block_list, window, first + sizes.shift, sizes.n_k, M, static.BLOCK_N)

    q_tile = load_tile(q, first, M, static.D, True)
    state = softmax_start(M, static)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            state = attend_loop(state, q_tile, keys, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                                PRECISE, loop_mode(static.LOOP_MODES, part))
    store_outputs(state, outputs, first, M, scoring, static)
    if window.left is not None or window.right is not None or HAS_MASK:
        if stored_tile_has_nan(outputs.o, first, M, static.DV, static.ACC):
            for row_start in tl.range(first, first + M, NAN_SAFE_ROWS, num_stages=1):
                q_rows = load_tile(q, row_start, NAN_SAFE_ROWS, static.D, True)
                row_state = softmax_start(NAN_SAFE_ROWS, static)
                row_state = attend_loop(row_state, q_rows, keys, row_start + sizes.shift, bounds[0], bounds[3], scoring, static,
                                        PRECISE, "nan_safe")
                store_outputs(row_state, outputs, row_start, NAN_SAFE_ROWS, scoring, static)
