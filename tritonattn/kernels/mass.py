"""Sums of the weights P, from the statistics of a forward pass, one product Q K^T each:

    key mass           M_j = sum_i P_ij                          [..., H, S]
    its gradient       delta_i += sum_j P_ij dM_j                (backward.py)
    map                sum of P over a tile of queries and a tile of keys

Each program owns the numbers that it stores. Dropout does not apply.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .backward import load_log2_l, recompute_softmax
from .scores import ScoreParams, scores, select_head
from .tile import (
    LENGTHS,
    HeadView,
    key_view,
    keys_to_attend,
    load_column,
    load_statistic,
    load_tile,
    mass_view,
    query_view,
    sizes_of_batch,
    statistics_of_head,
    statistics_view,
    store_statistic,
    tile_head_batch,
)
from .window import block_start, loop_bounds, loop_mode, needs_mask


class Rows(NamedTuple):
    """Queries and their statistics, as in backward.Queries: views of one head, or a tile."""

    q: HeadView
    statistics: tuple


@triton.jit
def row_views(q, statistics, sizes, batch, head):
    """Return the views of one query head."""
    x = statistics_view(statistics, sizes, batch, head, 2)
    return Rows(query_view(q, sizes, batch, head), (x, x + statistics_of_head(sizes)))


@triton.jit
def load_rows(rows, first, M: tl.constexpr, static, CHECK: tl.constexpr):
    """Load the tile of M queries from `first`. Rows are checked only if CHECK."""
    minus_m = load_statistic(rows.statistics[0], first, rows.q.rows, M, 0.0)
    return Rows(load_tile(rows.q, first, M, static.D, CHECK), (minus_m, load_log2_l(rows, first, M)))


@triton.jit
def sum_over_queries(total, k, rows, col, start, stop, scoring, static, MODE: tl.constexpr):
    """Return `total` [N] plus the weights of a tile of keys for the queries [start, stop). `scoring` is transposed."""
    M: tl.constexpr = static.BLOCK_M
    for step in tl.range(start, stop, M):
        first = block_start(scoring.mods.block_list, step)
        tile = load_rows(rows, first, M, static, static.UNEVEN and needs_mask(MODE))
        s, _ = scores(k, tile.q, col, first, rows.q.rows, scoring, static, MODE)
        p, _ = recompute_softmax(s, tile, scoring, True, MODE)
        total += tl.sum(p, 1)
    return total


@triton.jit(do_not_specialize=LENGTHS)
def key_mass_kernel(q, statistics, k, mass, n_q, n_k, shift, leading, scoring, static):
    """Compute the mass of one tile of keys for one query head. Grid: tiles of keys x query heads x batches.

    mass: dense [batch, head, n_k]; of packed sequences [head, all keys].
    """
    N: tl.constexpr = static.BLOCK_N
    first, head, batch = tile_head_batch(leading, leading.heads, n_k, N, scoring.window.right is not None, "k")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    rows = row_views(q, statistics, sizes, batch, head)
    k_tile = load_tile(key_view(k, sizes, batch, head // static.GROUP, sizes.n_k), first, N, static.D, True)
    mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_k, -sizes.shift, static)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
    # no query attends to keys past the length of the batch
    n = tl.where(first < sizes.n_k, sizes.n_q, 0)
    bounds = loop_bounds(mods.block_list, scoring.window, first - sizes.shift, n, N, static.BLOCK_M)
    total = tl.zeros([N], static.ACC)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            total = sum_over_queries(total, k_tile, rows, first - sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                                     loop_mode(static.LOOP_MODES, part))
    cols = first + tl.arange(0, N)
    tl.store(mass_view(mass, sizes, batch, head).ptr + cols, tl.where(cols < sizes.n_k, total, 0.0), mask=cols < sizes.key_rows)


@triton.jit
def sum_over_keys(total, tile, k, d_mass, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Return `total` [M] plus P dM of a tile of queries for the keys [start, stop)."""
    N: tl.constexpr = static.BLOCK_N
    for step in tl.range(start, stop, N):
        first = block_start(scoring.mods.block_list, step)
        k_tile = load_tile(k, first, N, static.D, static.UNEVEN and needs_mask(MODE))
        s, _ = scores(tile.q, k_tile, row, first, k.rows, scoring, static, MODE)
        p, _ = recompute_softmax(s, tile, scoring, False, MODE)
        product = p * load_column(d_mass, first, N)[None, :]
        if MODE != "unmasked":
            product = tl.where(s == float("-inf"), 0.0, product)
        total += tl.sum(product, 1)
    return total


@triton.jit(do_not_specialize=LENGTHS)
def mass_delta_kernel(q, statistics, k, d_mass, delta, n_q, n_k, shift, leading, scoring, static):
    """Add P dM to the delta of one tile of queries. Grid: tiles of queries x query heads x batches."""
    M: tl.constexpr = static.BLOCK_M
    first, head, batch = tile_head_batch(leading, leading.heads, n_q, M, scoring.window.right is not None, "q")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    tile = load_rows(row_views(q, statistics, sizes, batch, head), first, M, static, True)
    mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_q, sizes.shift, static)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
    n_k = keys_to_attend(sizes, first)
    bounds = loop_bounds(mods.block_list, scoring.window, first + sizes.shift, n_k, M, static.BLOCK_N)
    k, d_mass = key_view(k, sizes, batch, head // static.GROUP, sizes.n_k), mass_view(d_mass, sizes, batch, head)
    total = tl.zeros([M], static.ACC)
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            total = sum_over_keys(total, tile, k, d_mass, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                                  loop_mode(static.LOOP_MODES, part))
    # between the rows of packed sequences delta stays 0
    total = tl.where(first + tl.arange(0, M) < sizes.n_q, total, 0.0)
    x = statistics_view(delta, sizes, batch, head, 1)
    store_statistic(x, first, sizes.n_q, load_statistic(x, first, sizes.n_q, M, 0.0) + total, M)


@triton.jit
def store_map(tiles, tile, own, k, row, start, stop, scoring, static, MODE: tl.constexpr):
    """Store the sums of the weights of a tile of queries, of which `own` are in the tensor, over each tile of [start, stop)."""
    N: tl.constexpr = static.BLOCK_N
    for step in tl.range(start, stop, N):
        first = block_start(scoring.mods.block_list, step)
        k_tile = load_tile(k, first, N, static.D, static.UNEVEN and needs_mask(MODE))
        s, _ = scores(tile.q, k_tile, row, first, k.rows, scoring, static, MODE)
        p, _ = recompute_softmax(s, tile, scoring, False, MODE)
        # the last block of a block mask may reach past the keys
        tl.store(tiles + first // N, tl.sum(tl.sum(tl.where(own[:, None], p, 0.0), 1), 0), mask=first < k.rows)


@triton.jit(do_not_specialize=LENGTHS)
def map_kernel(q, statistics, k, tiles, n_q, n_k, shift, leading, scoring, static):
    """Compute one row of the map. Grid: tiles of queries x query heads x batches.

    tiles: dense [batch, head, tiles of queries, tiles of keys]; those that no query attends to are not written.
    """
    M: tl.constexpr = static.BLOCK_M
    first, head, batch = tile_head_batch(leading, leading.heads, n_q, M, scoring.window.right is not None, "q")
    sizes = sizes_of_batch(leading, n_q, n_k, shift, batch)
    tile = load_rows(row_views(q, statistics, sizes, batch, head), first, M, static, True)
    k_view = key_view(k, sizes, batch, head // static.GROUP, sizes.n_k)
    mods = select_head(scoring.mods, sizes, batch, head, first, sizes.n_q, sizes.shift, static)
    scoring = ScoreParams(scoring.exp2_scale, scoring.qk_scale, scoring.ds_scale, scoring.softcap, scoring.window, mods)
    bounds = loop_bounds(mods.block_list, scoring.window, first + sizes.shift, sizes.n_k, M, static.BLOCK_N)
    index = (tl.cast(batch, tl.int64) * leading.heads + head) * tl.cdiv(n_q, M) + first // M
    tiles += index * tl.cdiv(n_k, static.BLOCK_N)
    own = first + tl.arange(0, M) < sizes.n_q
    for part in tl.static_range(3):
        if loop_mode(static.LOOP_MODES, part) is not None:
            store_map(tiles, tile, own, k_view, first + sizes.shift, bounds[part], bounds[part + 1], scoring, static,
                      loop_mode(static.LOOP_MODES, part))
