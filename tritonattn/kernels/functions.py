"""A function of the user's own, of each score and its place (score_function.py), called on tiles.

    (score [M, N], batch, head, query [M, 1], key [1, N], payload) -> score [M, N]          transposed: query [1, N], key [M, 1]
"""

from typing import NamedTuple

import triton
import triton.language as tl


class FunctionView(NamedTuple):
    """What a function needs besides the scores, for one head."""

    payload: tuple  # one address, or empty
    batch: int
    head: int
    rows: int       # number of rows of the scores, the first of which has position `shift`
    shift: int


@triton.jit
def call_function(FUNCTION: tl.constexpr, s, row, col, n, view, TRANSPOSED: tl.constexpr):
    """Return the function of a tile of scores that starts at positions (row, col), with n columns; transposed, rows are keys.

    Its indices lie within the problem, also past the ends of a tile: the function may read the payload there.
    """
    rows = tl.minimum(row - view.shift + tl.arange(0, s.shape[0]), view.rows - 1)[:, None]
    cols = tl.minimum(col + tl.arange(0, s.shape[1]), n - 1)[None, :]
    if len(view.payload) == 1:
        if TRANSPOSED:
            return FUNCTION(s, view.batch, view.head, cols, rows, view.payload[0])
        else:
            return FUNCTION(s, view.batch, view.head, rows, cols, view.payload[0])
    elif TRANSPOSED:
        return FUNCTION(s, view.batch, view.head, cols, rows, None)
    else:
        return FUNCTION(s, view.batch, view.head, rows, cols, None)


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
