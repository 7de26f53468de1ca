"""Packed sequences: the rows of all sequences lie one after the other in one tensor, and no row is padding.

    starts        0        3     5                 11      13 = rows of the tensor
    rows          a a a | b b | c c c c c c | . .          the rows after the last sequence attend to nothing
    sequence      0       1     2             3 = sequences

The number of programs depends on the numbers of rows and sequences only, so that the host needs no length: the tiles of
sequence i, of BLOCK rows, are numbered from start // BLOCK + i. That leaves room for every tile, since
(start + length) // BLOCK + 1 >= start // BLOCK + cdiv(length, BLOCK), and at most one number for each sequence has no tile.
Statistics lie alike, 16 numbers at a time: those of a sequence begin at a multiple of 16.

Starts that fall or lie outside of the tensor give wrong results, but no access outside of a tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

SEARCH = tl.constexpr(128)  # starts that a program loads at a time


class Packed(NamedTuple):
    """Packed sequences, as a part of one kernel argument."""

    q_starts: object   # pointer to the first query of each sequence, and the end of the last one
    q_total: int       # `encoded` number of queries in memory
    k_starts: object   # the same for keys
    k_total: int
    sequences: int     # `encoded`
    bottom_right: int  # 1: the last query of a sequence is aligned with its last key; 0: the first with the first


def encoded(n: int) -> int:
    """Return a number for n that is odd and not 1: an integer in a record is compiled anew when it becomes a multiple of 16."""
    return 2 * n + 3


@triton.jit
def decoded(number):
    """Return the n of `encoded`."""
    return number // 2 - 1


@triton.jit
def clamped(start, total):
    """Return a start that lies in the tensor."""
    return tl.minimum(tl.maximum(start, 0), total)


@triton.jit
def total_rows(packed, ROWS: tl.constexpr):
    """Return the number of rows of all sequences: ROWS "q" are queries, "k" keys, "qk" both, one after the other."""
    if ROWS == "q":
        return decoded(packed.q_total)
    elif ROWS == "k":
        return decoded(packed.k_total)
    else:
        return decoded(packed.q_total) + decoded(packed.k_total)


@triton.jit
def load_starts(packed, index, inside, ROWS: tl.constexpr):
    """Load the first rows of sequences, 0 where not `inside`."""
    start = index * 0
    if ROWS != "k":
        start += clamped(tl.load(packed.q_starts + index, mask=inside, other=0), decoded(packed.q_total))
    if ROWS != "q":
        start += clamped(tl.load(packed.k_starts + index, mask=inside, other=0), decoded(packed.k_total))
    return start


@triton.jit
def packed_tile(packed, BLOCK: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    """Return the first row of this program's tile in its sequence, its head and its sequence."""
    total, sequences = total_rows(packed, ROWS), decoded(packed.sequences)
    tiles = total // BLOCK + sequences + 1
    tile = tl.program_id(0) % tiles
    if REVERSE:
        tile = tiles - 1 - tile
    begun = 0
    for i in tl.range(0, sequences + 1, SEARCH, num_stages=1):
        index = i + tl.arange(0, SEARCH)
        inside = index <= sequences
        first_tile = load_starts(packed, index, inside, ROWS) // BLOCK + index
        begun += tl.sum((inside & (first_tile <= tile)).to(tl.int32), 0)
    sequence = tl.maximum(begun - 1, 0)
    # not negative, whatever the starts are
    first = tl.maximum(tile - load_starts(packed, sequence, True, ROWS) // BLOCK - sequence, 0) * BLOCK
    return first, tl.program_id(0) // tiles, sequence


@triton.jit
def sequence_rows(starts, total, longest, sequence, sequences):
    """Return the first row of a sequence and the number of its rows; of sequence `sequences`, the rows after the last one."""
    is_sequence = sequence < sequences
    start = clamped(tl.load(starts + sequence), total)
    stop = clamped(tl.load(starts + sequence + 1, mask=is_sequence, other=total), total)
    rows = tl.maximum(stop - start, 0)
    return start, tl.where(is_sequence, tl.minimum(rows, longest), rows)


@triton.jit
def statistics_start(start, sequence):
    """Return where the statistics of a sequence begin, among those of one head."""
    return (start // 16 + sequence) * 16
