"""O = softmax(S) V and the log-sum-exp of S, one program per tile of queries."""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import scores
from .softmax import softmax_finish, softmax_start, softmax_step
from .tile import Matrix, load_tile, matrix, program, rounding, store_rows, store_tile, stored_nan
from .window import CARE, exists, mode_of, spans, stages_of, step_of


class Keys(NamedTuple):
    """The keys of one head and their values: whole matrices, or a tile of each."""

    k: Matrix
    v: Matrix


@triton.jit
def keys_of(k, v, shape, batch, head):
    return Keys(matrix(k, shape.batches, batch, head, shape.n_k), matrix(v, shape.batches, batch, head, shape.n_k))


@triton.jit
def attend(state, q, keys, rows, start, stop, scoring, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Let the queries q [M, D] at positions `rows` meet the keys [start, stop)."""
    N: tl.constexpr = step_of(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.RAGGED and MODE != "full"
    for first in tl.range(start, stop, N, num_stages=stages_of(MODE)):
        k = load_tile(keys.k, first, N, static.D, CHECK)
        s = scores(q, k, rows, first + tl.arange(0, N), keys.k.rows, scoring, static, MODE)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        state = softmax_step(state, s, v, scoring.unit, static, PRECISE, MODE)
    return state


@triton.jit
def write(state, o, residual, lse, first, M: tl.constexpr, static):
    """Store what the queries from `first` have come to."""
    o_tile, lse_tile = softmax_finish(state)
    store_tile(o, first, o_tile, M, static.DV)
    store_rows(lse, first, lse_tile, M)
    if residual is not None:
        store_tile(residual, first, rounding(o_tile, residual.ptr.dtype.element_ty), M, static.DV)


@triton.jit
def forward_kernel(q, k, v, o, residual, lse, shape, scoring, static):
    """`residual`, where given, receives what rounding took from o: o + residual is o to twice the digits."""
    M: tl.constexpr = static.BLOCK_M
    PRECISE: tl.constexpr = residual is not None
    window = scoring.window
    # the last queries see most where the right side is bounded: start with them
    first, head, batch = program(shape.heads, shape.n_q, M, window.right is not None)
    q = matrix(q, shape.batches, batch, head, shape.n_q)
    o = matrix(o, shape.batches, batch, head, shape.n_q)
    lse = matrix(lse, shape.batches, batch, head, shape.n_q)
    if residual is not None:
        residual = matrix(residual, shape.batches, batch, head, shape.n_q)
    keys = keys_of(k, v, shape, batch, head // static.GROUP)
    bounds = spans(window, first + shape.shift, shape.n_k, M, static.BLOCK_N)

    q_tile = load_tile(q, first, M, static.D, True)
    rows = first + shape.shift + tl.arange(0, M)
    state = softmax_start(M, static)
    for part in tl.static_range(3):
        if exists(part, window.left is not None, window.right is not None or static.RAGGED):
            state = attend(state, q_tile, keys, rows, bounds[part], bounds[part + 1], scoring, static, PRECISE, mode_of(part))
    write(state, o, residual, lse, first, M, static)
    if window.left is not None or window.right is not None:
        if stored_nan(o, first, M, static.DV, static.ACC):
            for some in tl.range(first, first + M, CARE, num_stages=1):
                q_some = load_tile(q, some, CARE, static.D, True)
                rows_some = some + shape.shift + tl.arange(0, CARE)
                again = softmax_start(CARE, static)
                again = attend(again, q_some, keys, rows_some, bounds[0], bounds[3], scoring, static, PRECISE, "careful")
                write(again, o, residual, lse, some, CARE, static)
