"""Sums of dS over the pairs of one offset: all that the gradients of ALiBi slopes and of relative positions need of dS.

    diagonal    0       1       ...            n_q + n_k - 2
    offset     -(n_q - 1)       ...            n_k - 1           key position - query position, if the first ones are aligned
               -(n_k - 1)       ...            n_q - 1           if the last ones are

    W diagonals of M = W queries are a parallelogram in a tile of 2 W keys:      q i     x x x x . . . .
                                                                                   i + 1 . x x x x . . .
                                                                                   i + 2 . . x x x x . .

Each diagonal of a head has one program that sums it, so no atomics are needed. runtime/diagonal_gradients.py sums over batches
and over the diagonals that share an entry of a table.
"""

import triton
import triton.language as tl

from .backward import add_entropy_and_mass_grad, grad_p, grad_s, load_queries, query_views, recompute_p
from .forward import key_views
from .packed import total_rows
from .scores import ScoreParams, scores, select_head
from .tile import LENGTHS, load_tile, sizes_of_batch, tile_head_batch


@triton.jit
def diagonals_of_head(leading, n_q, n_k):
    """Return the number of diagonals of a batch, of which the last has no pair; of packed sequences, that of all of them."""
    if len(leading.packed) == 1:
        return total_rows(leading.packed[0], "qk")
    else:
        return n_q + n_k


@triton.jit
def diagonal_zero(sizes, leading, n_q, shift):
    """Return minus the offset of diagonal 0; n_q and shift are those of the problem, not of a batch."""
    if len(leading.packed) == 1:
        return sizes.n_q - 1 + (sizes.key_rows - sizes.n_q) * leading.packed[0].bottom_right
    else:
        return n_q - 1 + shift


@triton.jit
def diagonals_view(x, sizes, batch, head, count):
    """Return the address of a head in a dense [batch, head, count] tensor; of packed sequences [head, all queries and keys]."""
    if len(sizes.packed) == 5:
        return x + tl.cast(head, tl.int64) * count + sizes.packed[0] + sizes.packed[1]
    else:
        return x + (tl.cast(batch, tl.int64) * sizes.heads + head) * count


@triton.jit
def queries_of_diagonals(offset, sizes, window, W: tl.constexpr):
    """Return the first and the last query, exclusive, that have a key at one of W offsets from `offset`."""
    start, stop = tl.maximum(-offset - sizes.shift - (W - 1), 0), tl.minimum(sizes.n_q, sizes.n_k - offset - sizes.shift)
    if window.left is not None:
        stop = tl.where(offset + W <= -window.left, start, stop)
    if window.right is not None:
        stop = tl.where(offset > window.right, start, stop)
    return start, stop


@triton.jit
def sum_diagonals(ds, lead, W: tl.constexpr):
    """Return [W]: entry w is the sum over the rows m of ds [W, 2 W] at column m + w + lead, if that is one of its columns."""
    columns = tl.arange(0, W)[:, None] + tl.arange(0, W)[None, :] + lead
    inside = (columns >= 0) & (columns < 2 * W)
    return tl.sum(tl.where(inside, tl.gather(ds, tl.where(inside, columns, 0), 1), 0.0), 0)


@triton.jit
def accumulate_diagonals(sums, queries, keys, offset, start, stop, sizes, scoring, static):
    """Return `sums` [W] plus those of the queries [start, stop) at W offsets from `offset`; queries and keys are views."""
    W: tl.constexpr = static.BLOCK_N // 2
    # dropout draws for four keys together: the tile may begin up to three keys earlier, and takes fewer queries
    ALIGNMENT: tl.constexpr = 4 if len(scoring.mods.dropout) == 1 else 1
    STEP: tl.constexpr = W + 1 - ALIGNMENT
    for first in tl.range(start, stop, STEP, num_stages=1):
        row = first + sizes.shift
        # the first query may be before the first key
        col = tl.maximum(row + offset, 0) // ALIGNMENT * ALIGNMENT
        tile = load_queries(queries, first, W, static, True)
        k = load_tile(keys.k, col, 2 * W, static.D, True)
        v = load_tile(keys.v, col, 2 * W, static.DV, True)
        s, _ = scores(tile.q, k, row, col, sizes.n_k, scoring, static, "masked")
        weight = recompute_p(s, tile, scoring, static, False, "masked")
        dp = grad_p(tile.do, v, row, col, scoring, static, False)
        dp = add_entropy_and_mass_grad(dp, weight.log2_p, tile, col, False)
        ds = grad_s(s, weight.slope, dp, tile, scoring, static, False, "masked")
        # rows past the last query are loaded as 0, and 0 times a NaN in a key is NaN
        own = (first + tl.arange(0, W) < sizes.n_q) & (tl.arange(0, W) < STEP)
        ds = tl.where(own[:, None], ds, 0.0)
        sums += sum_diagonals(ds, row + offset - col, W)
    return sums


@triton.jit(do_not_specialize=LENGTHS)
def diagonals_kernel(queries, keys, sums, n_q, n_k, shift, leading, scoring, static):
    """Compute the sums of W = BLOCK_N / 2 diagonals of one head. Grid: tiles of diagonals x query heads x batches."""
    W: tl.constexpr = static.BLOCK_N // 2
    count = diagonals_of_head(leading, n_q, n_k)
    first, head, batch = tile_head_batch(leading, leading.heads, count, W, False, "qk")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    queries = query_views(queries, sizes, batch, head, static, False)
    keys = key_views(keys, sizes, batch, head // static.GROUP)
    mods = select_head(scoring.mods, sizes, batch, head, 0, sizes.n_q, sizes.shift, static)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)

    offset = first - diagonal_zero(sizes, leading, n_q, shift)
    start, stop = queries_of_diagonals(offset, sizes, scoring.window, W)
    total = accumulate_diagonals(tl.zeros([W], static.ACC), queries, keys, offset, start, stop, sizes, scoring, static)
    diagonals = first + tl.arange(0, W)
    tl.store(diagonals_view(sums, sizes, batch, head, count) + diagonals, total, mask=diagonals < sizes.n_q + sizes.key_rows)
