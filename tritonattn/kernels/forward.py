"""O = softmax(S) V and the log-sum-exp of S, one program per tile of queries."""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import ScoreParams, scores, select_head
from .softmax import softmax_finish, softmax_start, softmax_step
from .tile import (
    Matrix,
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
    """The keys of one head and their values: whole matrices, or a tile of each."""

    k: Matrix
    v: Matrix


class Outputs(NamedTuple):
    """What a forward pass writes: tensors, or the matrices of one head."""

    o: Tensor
    lse: Tensor
    o_residual: tuple = ()  # or alone in it what rounding took from o: o + residual is o to twice the digits
    lse_minus_max: tuple = ()    # or how far lse lies over the largest score: asked for with a bias, which may be huge


@triton.jit
def output_views(results, sizes, batch, head):
    o_residual, lse_minus_max = results.o_residual, results.lse_minus_max
    if len(results.o_residual) == 1:
        o_residual = (head_view(results.o_residual[0], sizes.batches, batch, head, sizes.n_q),)
    if len(results.lse_minus_max) == 1:
        lse_minus_max = (head_view(results.lse_minus_max[0], sizes.batches, batch, head, sizes.n_q),)
    return Outputs(head_view(results.o, sizes.batches, batch, head, sizes.n_q),
                   head_view(results.lse, sizes.batches, batch, head, sizes.n_q), o_residual, lse_minus_max)


@triton.jit
def key_views(k, v, sizes, batch, head):
    return Keys(head_view(k, sizes.batches, batch, head, sizes.n_k), head_view(v, sizes.batches, batch, head, sizes.n_k))


@triton.jit
def attend_loop(state, q, keys, row, start, stop, scoring, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Let the queries q [M, D] from position `row` on meet the keys [start, stop)."""
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
def store_outputs(state, results, first, M: tl.constexpr, scoring, static):
    """Store what the queries from `first` have come to."""
    o_tile, lse_tile, excess_tile = softmax_finish(state, scoring)
    store_tile(results.o, first, o_tile, M, static.DV)
    store_rows(results.lse, first, lse_tile, M)
    if len(results.o_residual) == 1:
        store_tile(results.o_residual[0], first, rounding_error(o_tile, results.o_residual[0].ptr.dtype.element_ty), M, static.DV)
    if len(results.lse_minus_max) == 1:
        store_rows(results.lse_minus_max[0], first, excess_tile, M)


@triton.jit
def forward_kernel(q, k, v, results, sizes, scoring, static):
    M: tl.constexpr = static.BLOCK_M
    PRECISE: tl.constexpr = len(results.o_residual) == 1
    HIDES: tl.constexpr = len(scoring.mods.bias) + len(scoring.mods.mask) > 0
    window = scoring.window
    # the last queries see most where the right side is bounded: start with them
    first, head, batch = tile_head_batch(sizes.heads, sizes.n_q, M, window.right is not None)
    sizes = sizes_of_batch(sizes, batch)
    q = head_view(q, sizes.batches, batch, head, sizes.n_q)
    results = output_views(results, sizes, batch, head)
    keys = key_views(k, v, sizes, batch, head // static.GROUP)
    mods = select_head(scoring.mods, sizes.batches, batch, head, first, sizes.n_q, sizes.shift)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, window, mods)
    bounds = loop_bounds(mods.block_list, window, first + sizes.shift, sizes.n_k, M, static.BLOCK_N)

    q_tile = load_tile(q, first, M, static.D, True)
    state = softmax_start(M, static)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            state = attend_loop(state, q_tile, keys, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static, PRECISE,
                           loop_mode(static.LOOP_MODES, part))
    store_outputs(state, results, first, M, scoring, static)
    if window.left is not None or window.right is not None or HIDES:
        if stored_tile_has_nan(results.o, first, M, static.DV, static.ACC):
            for some in tl.range(first, first + M, NAN_SAFE_ROWS, num_stages=1):
                q_some = load_tile(q, some, NAN_SAFE_ROWS, static.D, True)
                again = softmax_start(NAN_SAFE_ROWS, static)
                again = attend_loop(again, q_some, keys, some + sizes.shift, bounds[0], bounds[3], scoring, static, PRECISE,
                               "nan_safe")
                store_outputs(again, results, some, NAN_SAFE_ROWS, scoring, static)
