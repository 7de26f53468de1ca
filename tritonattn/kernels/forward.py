"""O = softmax(S) V and the log-sum-exp of S, one program per tile of queries."""

from typing import NamedTuple

import triton
import triton.language as tl

from .scores import Scoring, at_head, scores
from .softmax import softmax_finish, softmax_start, softmax_step
from .tile import Matrix, Tensor, load_tile, matrix, program, rounding, shape_of, store_rows, store_tile, stored_nan
from .window import CARE, bounded, mode_of, place, stages_of, step_of, stretches


class Keys(NamedTuple):
    """The keys of one head and their values: whole matrices, or a tile of each."""

    k: Matrix
    v: Matrix


class Results(NamedTuple):
    """What a forward pass writes: tensors, or the matrices of one head."""

    o: Tensor
    lse: Tensor
    residual: tuple = ()  # or alone in it what rounding took from o: o + residual is o to twice the digits
    excess: tuple = ()    # or how far lse lies over the largest score: asked for with a bias, which may be huge


@triton.jit
def results_of(results, shape, batch, head):
    residual, excess = results.residual, results.excess
    if len(results.residual) == 1:
        residual = (matrix(results.residual[0], shape.batches, batch, head, shape.n_q),)
    if len(results.excess) == 1:
        excess = (matrix(results.excess[0], shape.batches, batch, head, shape.n_q),)
    return Results(matrix(results.o, shape.batches, batch, head, shape.n_q),
                   matrix(results.lse, shape.batches, batch, head, shape.n_q), residual, excess)


@triton.jit
def keys_of(k, v, shape, batch, head):
    return Keys(matrix(k, shape.batches, batch, head, shape.n_k), matrix(v, shape.batches, batch, head, shape.n_k))


@triton.jit
def attend(state, q, keys, row, start, stop, scoring, static, PRECISE: tl.constexpr, MODE: tl.constexpr):
    """Let the queries q [M, D] from position `row` on meet the keys [start, stop)."""
    N: tl.constexpr = step_of(static.BLOCK_N, MODE)
    CHECK: tl.constexpr = static.RAGGED and bounded(MODE)
    for step in tl.range(start, stop, N, num_stages=stages_of(MODE)):
        first = place(scoring.pairs.listing, step)
        k = load_tile(keys.k, first, N, static.D, CHECK)
        s = scores(q, k, row, first, keys.k.rows, scoring, static, MODE)
        v = load_tile(keys.v, first, N, static.DV, CHECK)
        state = softmax_step(state, s, v, row, first, scoring, static, PRECISE, MODE)
    return state


@triton.jit
def write(state, results, first, M: tl.constexpr, scoring, static):
    """Store what the queries from `first` have come to."""
    o_tile, lse_tile, excess_tile = softmax_finish(state, scoring)
    store_tile(results.o, first, o_tile, M, static.DV)
    store_rows(results.lse, first, lse_tile, M)
    if len(results.residual) == 1:
        store_tile(results.residual[0], first, rounding(o_tile, results.residual[0].ptr.dtype.element_ty), M, static.DV)
    if len(results.excess) == 1:
        store_rows(results.excess[0], first, excess_tile, M)


@triton.jit
def forward_kernel(q, k, v, results, shape, scoring, static):
    M: tl.constexpr = static.BLOCK_M
    PRECISE: tl.constexpr = len(results.residual) == 1
    HIDES: tl.constexpr = len(scoring.pairs.bias) + len(scoring.pairs.mask) > 0
    window = scoring.window
    # the last queries see most where the right side is bounded: start with them
    first, head, batch = program(shape.heads, shape.n_q, M, window.right is not None)
    shape = shape_of(shape, batch)
    q = matrix(q, shape.batches, batch, head, shape.n_q)
    results = results_of(results, shape, batch, head)
    keys = keys_of(k, v, shape, batch, head // static.GROUP)
    pairs = at_head(scoring.pairs, shape.batches, batch, head, first, shape.n_q, shape.shift)
    scoring = Scoring(scoring.unit, scoring.factor, window, pairs)
    bounds = stretches(pairs.listing, window, first + shape.shift, shape.n_k, M, static.BLOCK_N)

    q_tile = load_tile(q, first, M, static.D, True)
    state = softmax_start(M, static)
    for part in tl.static_range(3):
        if mode_of(static.MODES, part) is not None:
            state = attend(state, q_tile, keys, first + shape.shift, bounds[part], bounds[part + 1], scoring, static, PRECISE,
                           mode_of(static.MODES, part))
    write(state, results, first, M, scoring, static)
    if window.left is not None or window.right is not None or HIDES:
        if stored_nan(results.o, first, M, static.DV, static.ACC):
            for some in tl.range(first, first + M, CARE, num_stages=1):
                q_some = load_tile(q, some, CARE, static.D, True)
                again = softmax_start(CARE, static)
                again = attend(again, q_some, keys, some + shape.shift, bounds[0], bounds[3], scoring, static, PRECISE,
                               "careful")
                write(again, results, some, CARE, scoring, static)
