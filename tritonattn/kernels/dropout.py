"""Which weights are dropped: a number drawn for each pair from where it stands, never from when or in which tile.

    Philox4x32 (Salmon et al., 2011), 7 rounds, key = seed, counter = (query, key / 4, head, batch): four keys share a draw
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """How weights are dropped; in a kernel, of one head."""

    seed: object         # a pointer to 64 bits; in a kernel the number
    threshold: int       # a pair is kept if its 32 random bits are not below
    keep_scale: float          # what is kept is multiplied by: 1 / (1 - p)
    head: int = 0
    batch: int = 0
    shift: int = 0       # rows are counted from here on


@triton.jit
def dropout_of_head(dropout, batch, head, shift):
    """The dropout of one head, whose first row stands at position `shift`."""
    return Dropout(tl.load(dropout.seed), dropout.threshold, dropout.keep_scale, head, batch, shift)


@triton.jit
def keep_mask(dropout, row, col, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[M, N] booleans; rows are positions of queries and columns of keys, or, transposed, the other way round."""
    if TRANSPOSED:
        return keep_mask_of_queries(dropout, col, row - dropout.shift, N, M).T
    else:
        return keep_mask_of_queries(dropout, row - dropout.shift, col, M, N)


@triton.jit
def keep_mask_of_queries(dropout, query, key, M: tl.constexpr, N: tl.constexpr):
    """[M queries, N keys]; the first key is a multiple of four."""
    zero = tl.zeros([M, N // 4], tl.int32)
    a, b, c, d = tl.philox(dropout.seed, zero + (query + tl.arange(0, M))[:, None], zero + (key // 4 + tl.arange(0, N // 4)),
                           zero + dropout.head, zero + dropout.batch, n_rounds=7)
    bits = tl.join(tl.join(a, c), tl.join(b, d)).reshape(M, N)
    return bits.to(tl.uint32, bitcast=True) >= dropout.threshold.to(tl.uint32)


@triton.jit
def keep_kernel(keep, dropout, heads, n_q, n_k, M: tl.constexpr, N: tl.constexpr):
    """Write bytes [batch, heads, n_q, n_k], contiguous: 1 where a weight is kept."""
    col_tiles, row_tiles = tl.cdiv(n_k, N), tl.cdiv(n_q, M)
    tile, at = tl.program_id(0) % (row_tiles * col_tiles), tl.program_id(0) // (row_tiles * col_tiles)
    row, col = tile // col_tiles * M, tile % col_tiles * N
    rows, cols = row + tl.arange(0, M), col + tl.arange(0, N)
    here = dropout_of_head(dropout, at // heads, at % heads, 0)
    ptrs = keep + (tl.cast(at, tl.int64) * n_q + rows)[:, None] * n_k + cols[None, :]
    tl.store(ptrs, keep_mask(here, row, col, M, N, False).to(tl.uint8), mask=(rows < n_q)[:, None] & (cols < n_k)[None, :])
