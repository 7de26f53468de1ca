"""Functions of the user's own, called on tiles: one changes scores (score_function.py), one masks pairs (block_mask.py).

    (score [M, N], batch, head, query [M, 1], key [1, N], payload) -> score         transposed: query [1, N], key [M, 1]
    (batch, head, query, key, payload) -> booleans, True takes part
"""

from typing import NamedTuple

import triton
import triton.language as tl


class FunctionView(NamedTuple):
    """The arguments of a function besides scores and indices, for one head."""

    payload: tuple  # one address, or empty
    batch: int
    head: int
    rows: int       # number of rows of the scores, the first of which has position `shift`
    shift: int


@triton.jit
def indices(row, col, n, M: tl.constexpr, N: tl.constexpr, view, TRANSPOSED: tl.constexpr):
    """Return the queries and the keys of a tile that starts at positions (row, col), with n columns; transposed, rows are keys.

    They lie within the problem, also past the ends of a tile: a function may read the payload at them. Without rows or columns
    they are 0.
    """
    rows = tl.maximum(tl.minimum(row - view.shift + tl.arange(0, M), view.rows - 1), 0)[:, None]
    cols = tl.maximum(tl.minimum(col + tl.arange(0, N), n - 1), 0)[None, :]
    if TRANSPOSED:
        return cols, rows
    else:
        return rows, cols


@triton.jit
def call_function(FUNCTION: tl.constexpr, s, row, col, n, view, TRANSPOSED: tl.constexpr):
    """Return the function of a tile of scores; see `indices`."""
    query, key = indices(row, col, n, s.shape[0], s.shape[1], view, TRANSPOSED)
    if len(view.payload) == 1:
        return FUNCTION(s, view.batch, view.head, query, key, view.payload[0])
    else:
        return FUNCTION(s, view.batch, view.head, query, key, None)


@triton.jit
def call_mask_function(FUNCTION: tl.constexpr, row, col, n, M: tl.constexpr, N: tl.constexpr, view, TRANSPOSED: tl.constexpr):
    """Return the booleans of a tile, of a shape that broadcasts to [M, N]; see `indices`."""
    query, key = indices(row, col, n, M, N, view, TRANSPOSED)
    if len(view.payload) == 1:
        return FUNCTION(view.batch, view.head, query, key, view.payload[0]) != 0
    else:
        return FUNCTION(view.batch, view.head, query, key, None) != 0


@triton.jit(do_not_specialize=("n_q", "n_k"))
def evaluate_kernel(scores, payload, heads, n_q, n_k, FUNCTION: tl.constexpr, NAME: tl.constexpr, TRANSPOSED: tl.constexpr,
                    BLOCK: tl.constexpr):
    """Replace contiguous scores [batch, heads, n_q, n_k] by the function of them. Grid: tiles of BLOCK x BLOCK scores.

    NAME: part of the key of Triton's cache, as in tile.Constexprs.
    """
    tiles_q, tiles_k = tl.cdiv(n_q, BLOCK), tl.cdiv(n_k, BLOCK)
    tile, head_batch = tl.program_id(0) % (tiles_q * tiles_k), tl.program_id(0) // (tiles_q * tiles_k)
    first_query, first_key = tile // tiles_k * BLOCK, tile % tiles_k * BLOCK
    query, key = first_query + tl.arange(0, BLOCK), first_key + tl.arange(0, BLOCK)
    offsets = (tl.cast(head_batch, tl.int64) * n_q + query)[:, None] * n_k + key[None, :]
    inside = (query < n_q)[:, None] & (key < n_k)[None, :]
    s = tl.load(scores + offsets, mask=inside, other=0.0)
    batch, head = head_batch // heads, head_batch % heads
    if TRANSPOSED:
        view = FunctionView(payload, batch, head, n_k, 0)
        result = (tl.zeros([BLOCK, BLOCK], s.dtype) + call_function(FUNCTION, s.T, first_key, first_query, n_q, view, True)).T
    else:
        view = FunctionView(payload, batch, head, n_q, 0)
        result = tl.zeros([BLOCK, BLOCK], s.dtype) + call_function(FUNCTION, s, first_query, first_key, n_k, view, False)
    tl.store(scores + offsets, result, mask=inside)


@triton.jit(do_not_specialize=("first", "n_q", "n_k"))
def mask_kernel(mask, payload, heads, first, n_q, n_k, FUNCTION: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """Write contiguous bytes [batch, heads, BLOCK, n_k]: the mask function of BLOCK queries from `first`, 0 past the last one.

    Grid: tiles of BLOCK keys x heads x batches. NAME as in `evaluate_kernel`.
    """
    tiles = tl.cdiv(n_k, BLOCK)
    col, head_batch = tl.program_id(0) % tiles * BLOCK, tl.program_id(0) // tiles
    view = FunctionView(payload, head_batch // heads, head_batch % heads, n_q, 0)
    pairs = call_mask_function(FUNCTION, first, col, n_k, BLOCK, BLOCK, view, False)
    rows, cols = tl.arange(0, BLOCK)[:, None], (col + tl.arange(0, BLOCK))[None, :]
    ptrs = mask + (tl.cast(head_batch, tl.int64) * BLOCK + rows) * n_k + cols
    tl.store(ptrs, (pairs & (first + rows < n_q) & (cols < n_k)).to(tl.uint8), mask=cols < n_k)
