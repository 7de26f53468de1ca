"""O = softmax(S) V and the log-sum-exp of S, one program per tile of queries."""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import scores
from .softmax import softmax_finish, softmax_start, softmax_step
from .tile import Matrix, has_nan, load_tile, matrix, program, stages_of, step_of, store_rows, store_tile
from .window import spans, stretch_exists


class Keys(NamedTuple):
    """The keys of one head and their values: whole matrices, or a tile of each."""

    k: Matrix
    v: Matrix


@triton.jit
def attend(state, q, keys, rows, start, stop, scoring, static, PRECISE: tl.constexpr, EDGE: tl.constexpr,
           CAREFUL: tl.constexpr):
    """Let the queries q [M, D] at positions `rows` meet the keys [start, stop)."""
    N: tl.constexpr = step_of(static.BLOCK_N, CAREFUL)
    CHECK: tl.constexpr = EDGE and static.RAGGED
    for first in tl.range(start, stop, N, num_stages=stages_of(CAREFUL)):
        k = load_tile(keys.k, first, N, static.D, CHECK)
        s = scores(q, k, rows, first + tl.arange(0, N), keys.k.rows, scoring, static, EDGE)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        state = softmax_step(state, s, v, scoring.unit, static, PRECISE, EDGE, CAREFUL)
    return state


@triton.jit
def forward_kernel(q, k, v, o, residual, lse, shape, scoring, static):
    """`residual`, where given, receives what rounding took from o: o + residual is o to twice the digits."""
    M: tl.constexpr = static.BLOCK_M
    window = scoring.window
    # the last queries see most where the right side is bounded: start with them
    first, head, batch = program(shape.heads, shape.n_q, M, window.right is not None)
    keys = Keys(
        matrix(k, shape.batches, batch, head // static.GROUP, shape.n_k),
        matrix(v, shape.batches, batch, head // static.GROUP, shape.n_k),
    )
    q_tile = load_tile(matrix(q, shape.batches, batch, head, shape.n_q), first, M, static.D, True)
    rows = first + shape.shift + tl.arange(0, M)
    bounds = spans(window, first + shape.shift, shape.n_k, M, static.BLOCK_N)
    state = softmax_start(static)
    for part in tl.static_range(3):
        if stretch_exists(part, window.left is not None, window.right is not None or static.RAGGED):
            state = attend(state, q_tile, keys, rows, bounds[part], bounds[part + 1], scoring, static,
                           residual is not None, part != 1, False)
    if window.left is not None or window.right is not None:
        if has_nan(state.acc):
            # perhaps 0 * inf, of a value that the row must not see: once more, with care
            state = attend(softmax_start(static), q_tile, keys, rows, bounds[0], bounds[3], scoring, static,
                           residual is not None, True, True)
    o_tile, lse_tile = softmax_finish(state)

    store_tile(matrix(o, shape.batches, batch, head, shape.n_q), first, o_tile, M, static.DV)
    store_rows(matrix(lse, shape.batches, batch, head, shape.n_q), first, lse_tile, M)
    if residual is not None:
        lost = rounding(o_tile, residual.ptr.dtype.element_ty)
        store_tile(matrix(residual, shape.batches, batch, head, shape.n_q), first, lost, M, static.DV)


@triton.jit
def rounding(tile, dtype: tl.constexpr):
    """What each part of a tile loses when it is stored as dtype."""
    if len(tile) == 2:
        return tile[0] - tile[0].to(dtype).to(tile[0].dtype), tile[1] - tile[1].to(dtype).to(tile[1].dtype)
    else:
        return (tile[0] - tile[0].to(dtype).to(tile[0].dtype),)
