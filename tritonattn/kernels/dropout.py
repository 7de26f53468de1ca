"""Dropout of attention weights. The random bits of a (query, key) pair depend on its indices only, not on tiles or order.

    Philox4x32 (Salmon et al., 2011), 7 rounds, key = seed, counter = (query, key / 4, head, batch)
    The four 32-bit numbers of one draw belong to four neighbouring keys. keep = bits >= threshold, threshold = p 2^32
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """Parameters of dropout; after dropout_of_head(), of one head."""

    seed: object       # pointer to 64 bits; of one head, their value
    threshold: int     # a weight is kept if its 32 random bits are not below this
    keep_scale: float  # factor of kept weights, 1 / (1 - p)
    head: int = 0
    batch: int = 0
    shift: int = 0     # position of the first query


@triton.jit
def dropout_of_head(dropout, batch, head, shift):
    """Return the dropout of one head, whose first query is at position `shift`."""
    return Dropout(tl.load(dropout.seed), dropout.threshold, dropout.keep_scale, head, batch, shift)


@triton.jit
def keep_mask(dropout, row, col, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return [M, N] booleans from positions (row, col): rows are queries and columns keys, or the reverse if TRANSPOSED."""
    if TRANSPOSED:
        return keep_mask_of_queries(dropout, col, row - dropout.shift, N, M).T
    else:
        return keep_mask_of_queries(dropout, row - dropout.shift, col, M, N)


@triton.jit
def keep_mask_of_queries(dropout, query, key, M: tl.constexpr, N: tl.constexpr):
    """Return [M queries, N keys] booleans from indices (query, key); `key` is a multiple of four."""
    zero = tl.zeros([M, N // 4], tl.int32)
    a, b, c, d = tl.philox(dropout.seed, zero + (query + tl.arange(0, M))[:, None], zero + (key // 4 + tl.arange(0, N // 4)),
                           zero + dropout.head, zero + dropout.batch, n_rounds=7)
    bits = tl.join(tl.join(a, c), tl.join(b, d)).reshape(M, N)
    return bits.to(tl.uint32, bitcast=True) >= dropout.threshold.to(tl.uint32)


@triton.jit(do_not_specialize=("n_q", "n_k"))
def keep_kernel(keep, dropout, heads, n_q, n_k, M: tl.constexpr, N: tl.constexpr):
    """Write contiguous bytes [batch, heads, n_q, n_k]: 1 where a weight is kept, else 0."""
    col_tiles, row_tiles = tl.cdiv(n_k, N), tl.cdiv(n_q, M)
    tile, head_batch = tl.program_id(0) % (row_tiles * col_tiles), tl.program_id(0) // (row_tiles * col_tiles)
    row, col = tile // col_tiles * M, tile % col_tiles * N
    rows, cols = row + tl.arange(0, M), col + tl.arange(0, N)
    head_dropout = dropout_of_head(dropout, head_batch // heads, head_batch % heads, 0)
    ptrs = keep + (tl.cast(head_batch, tl.int64) * n_q + rows)[:, None] * n_k + cols[None, :]
    tl.store(ptrs, keep_mask(head_dropout, row, col, M, N, False).to(tl.uint8),
             mask=(rows < n_q)[:, None] & (cols < n_k)[None, :])
