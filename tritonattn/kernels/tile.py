"""Views of memory, the grid, and loads, stores and products of tiles.

    Tensor [batch ..., head, row, col]  ->  HeadView [row, col]  ->  tile: a tuple of parts [N, width]
    grid: program_id(0) = (batch * heads + head) * tiles + tile, decoded by tile_head_batch()
    packed sequences: the rows of a tensor are those of all sequences; program_id(0) = head * tiles + tile (packed.py)

The width of a part is a power of two: a head of 96 columns is held as parts of 64 and 32 columns, not as one of 128.
The start of a tile is a 64-bit address. Offsets inside a tile are 32-bit, which saves registers, unless the tensor
is `wide`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .packed import decoded, packed_tile, sequence_rows, statistics_start


class Strides(NamedTuple):
    """Strides of a Tensor, in elements."""

    batch: tuple  # one per batch dimension, the innermost first
    head: int
    row: int
    col: int


class Tensor(NamedTuple):
    """A [batch ..., head, row, col] tensor as one kernel argument."""

    ptr: object
    strides: Strides
    wide: tl.constexpr = tl.constexpr(False)  # one tile spans more than 2^31 elements


class HeadView(NamedTuple):
    """The [rows, col] matrix of one head of a Tensor."""

    ptr: object  # of its first element
    row: int     # stride of the rows
    col: int     # stride of the columns
    rows: int    # number of rows


class Leading(NamedTuple):
    """The dimensions before the lengths, as one kernel argument.

    The lengths are arguments of their own: an integer in a record is compiled anew when it becomes a multiple of 16.
    """

    batches: tuple           # sizes of the batch dimensions, the innermost first
    heads: int               # query heads
    key_lengths: tuple = ()  # or (pointer to the number of keys of each batch, 1 if the shift depends on that number, else 0)
    packed: tuple = ()       # or one element, the Packed of sequences that take the place of batches


LENGTHS = ("n_q", "n_k", "shift")  # arguments of kernels that are not specialized


class Sizes(NamedTuple):
    """Sizes of one batch of the problem."""

    batches: tuple  # sizes of the batch dimensions, the innermost first
    heads: int      # query heads
    n_q: int
    n_k: int        # keys that take part
    key_rows: int   # keys in memory
    shift: int      # query i is at position i + shift among the keys
    key_lengths: tuple = ()
    packed: tuple = ()  # or (first query in memory, first key, queries of all sequences, number of sequences, keys of all)


class Constexprs(NamedTuple):
    """Compile-time values. A field stays a tl.constexpr only in a record that is a kernel argument."""

    D: tl.constexpr           # head size of q and k
    DV: tl.constexpr          # head size of v and o
    GROUP: tl.constexpr       # query heads per key head
    BLOCK_M: tl.constexpr     # queries per tile
    BLOCK_N: tl.constexpr     # keys per tile
    UNEVEN: tl.constexpr      # the last tile of the loop is partial
    LOOP_MODES: tl.constexpr  # modes of the three stretches of the loop (window.py)
    ACC: tl.constexpr         # dtype of sums
    PRECISION: tl.constexpr   # of float32 products: "ieee" or "tf32"
    AHEAD: tl.constexpr       # a product is started before the softmax: see Config
    MMA_SUM: tl.constexpr     # tensor cores add up the rounded weights of a row
    # dK/dV: "both", "dk" or "dv"; dbias: "pairs", or for sums over queries "keys", for sums over keys "queries"
    GRADS: tl.constexpr = tl.constexpr("both")
    NORMALIZER: tl.constexpr = tl.constexpr("softmax")  # or "sigmoid" or "relu"
    TRANSPOSED: tl.constexpr = tl.constexpr(False)      # rows of the scores are keys
    MAY_MASK: tl.constexpr = tl.constexpr(False)        # pairs inside of the window may be masked, or have scores of -inf
    # the user's functions, None where there is none: of the scores, its derivative, of the mask
    SCORE: tl.constexpr = tl.constexpr(None)
    SCORE_SLOPE: tl.constexpr = tl.constexpr(None)
    MASK: tl.constexpr = tl.constexpr(None)
    # what identifies their code: Triton's cache would confuse two functions with the same name
    FUNCTION_NAMES: tl.constexpr = tl.constexpr(None)


@triton.constexpr_function
def main_width(size):
    """Return the width of a tile's first part: the only part, unless two parts are narrower together."""
    padded = max(16, triton.next_power_of_2(size))
    half = padded // 2
    # a dot needs at least 16 columns
    return half if half >= 16 and half + tail_width(size) < padded else padded


@triton.constexpr_function
def tail_width(size):
    """Return the width of a part for the columns beyond the first half of the padded size; 0 without such columns."""
    half = max(16, triton.next_power_of_2(size)) // 2
    return max(16, triton.next_power_of_2(size - half)) if size > half else 0


@triton.constexpr_function
def has_two_parts(size):
    """Return whether a head of this size is held in two parts."""
    return main_width(size) < size


@triton.jit
def tile_head_batch(leading, heads, n, BLOCK: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    """Return the first row of this program's tile, its head and its batch. There are n rows; of packed sequences, ROWS "q"
    are the queries, "k" the keys, "qk" both, one after the other.

    Tiles of one head are neighbours in the grid, so that they share the head's data in L2.
    """
    if len(leading.packed) == 1:
        first, head, batch = packed_tile(leading.packed[0], BLOCK, REVERSE, ROWS)
        return first, head, batch
    else:
        tiles = tl.cdiv(n, BLOCK)
        tile = tl.program_id(0) % tiles
        if REVERSE:
            tile = tiles - 1 - tile
        head = tl.program_id(0) // tiles
        return tile * BLOCK, head % heads, head // heads


@triton.jit
def sizes_of_batch(leading, n_q, n_k, shift, batch):
    """Return the sizes of one batch, with its own number of keys, or of one packed sequence."""
    if len(leading.packed) == 1:
        packed = leading.packed[0]
        sequences, q_total = decoded(packed.sequences), decoded(packed.q_total)
        q_start, q_rows = sequence_rows(packed.q_starts, q_total, n_q, batch, sequences)
        k_total = decoded(packed.k_total)
        k_start, k_rows = sequence_rows(packed.k_starts, k_total, n_k, batch, sequences)
        # the rows after the last sequence attend to no key
        own = tl.where(batch < sequences, k_rows, 0)
        if len(leading.key_lengths) == 2:
            own = tl.minimum(tl.maximum(tl.load(leading.key_lengths[0] + batch, mask=batch < sequences, other=0), 0), own)
        return Sizes(leading.batches, leading.heads, q_rows, own, k_rows, (own - q_rows) * packed.bottom_right,
                     leading.key_lengths, (q_start, k_start, q_total, sequences, k_total))
    elif len(leading.key_lengths) == 2:
        own = tl.minimum(tl.maximum(tl.load(leading.key_lengths[0] + batch), 0), n_k)
        shift += (own - n_k) * leading.key_lengths[1]
        return Sizes(leading.batches, leading.heads, n_q, own, n_k, shift, leading.key_lengths, ())
    else:
        return Sizes(leading.batches, leading.heads, n_q, n_k, n_k, shift, leading.key_lengths, ())


@triton.jit
def keys_to_attend(sizes, first):
    """Return the number of keys of the tile of queries from `first`: 0 if the sequence ends before."""
    if len(sizes.packed) == 5:
        return tl.where(first < sizes.n_q, sizes.n_k, 0)
    else:
        return sizes.n_k


@triton.jit
def query_view(x, sizes, batch, head):
    """Return the view of one head of a tensor with a row for each query."""
    if len(sizes.packed) == 5:
        return rows_of_sequence(x, sizes.packed[0], head, sizes.n_q)
    else:
        return head_view(x, sizes.batches, batch, head, sizes.n_q)


@triton.jit
def key_view(x, sizes, batch, head, rows):
    """Return the view of one head of a tensor with a row for each key, of which `rows` are read or written."""
    if len(sizes.packed) == 5:
        return rows_of_sequence(x, sizes.packed[1], head, rows)
    else:
        return head_view(x, sizes.batches, batch, head, rows)


@triton.jit
def rows_of_sequence(x, first, head, rows):
    """Return the view of the rows from `first` of one head of packed sequences."""
    view = head_view(x, (), 0, head, rows)
    return HeadView(view.ptr + tl.cast(first, tl.int64) * view.row, view.row, view.col, rows)


@triton.jit
def head_view(x, batches, batch, head, rows):
    """Return the view of one head."""
    start = x.ptr + tl.cast(head, tl.int64) * x.strides.head
    for i in tl.static_range(len(batches)):
        start += tl.cast(batch % batches[i], tl.int64) * x.strides.batch[i]
        batch = batch // batches[i]
    if x.wide:
        return HeadView(start, tl.cast(x.strides.row, tl.int64), tl.cast(x.strides.col, tl.int64), rows)
    else:
        return HeadView(start, x.strides.row, x.strides.col, rows)


@triton.jit
def pointers(x, first, N: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """Return [N, WIDTH] addresses: rows from `first`, columns from BEGIN."""
    # offsets inside a tile are loop invariant, so the compiler hoists them
    offsets = tl.arange(0, N)[:, None] * x.row + (BEGIN + tl.arange(0, WIDTH))[None, :] * x.col
    return x.ptr + tl.cast(first, tl.int64) * x.row + offsets


@triton.jit
def in_bounds(x, first, N: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return [N, WIDTH] booleans: which of `pointers` lie inside a matrix of SIZE columns."""
    rows, cols = first + tl.arange(0, N), BEGIN + tl.arange(0, WIDTH)
    return (rows[:, None] < x.rows) & (cols[None, :] < SIZE)


@triton.jit
def load_part(x, first, N: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHECK: tl.constexpr):
    """Load columns BEGIN .. BEGIN + WIDTH of N rows; elements outside the matrix are 0. Rows are checked only if CHECK."""
    ptrs = pointers(x, first, N, BEGIN, WIDTH)
    if CHECK:
        return tl.load(ptrs, mask=in_bounds(x, first, N, BEGIN, WIDTH, SIZE), other=0.0)
    elif BEGIN + WIDTH > SIZE:
        return tl.load(ptrs, mask=(BEGIN + tl.arange(0, WIDTH))[None, :] < SIZE, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_tile(x, first, N: tl.constexpr, SIZE: tl.constexpr, CHECK: tl.constexpr):
    """Load N rows from `first`, in parts; elements outside the matrix are 0. Rows are checked only if CHECK."""
    MAIN: tl.constexpr = main_width(SIZE)
    if has_two_parts(SIZE):
        return load_part(x, first, N, 0, MAIN, SIZE, CHECK), load_part(x, first, N, MAIN, tail_width(SIZE), SIZE, CHECK)
    else:
        return (load_part(x, first, N, 0, MAIN, SIZE, CHECK),)


@triton.jit
def load_column(x, first, N: tl.constexpr):
    """Load the numbers of N rows from `first` of a view with one column, which are contiguous; 0 past the end."""
    rows = first + tl.arange(0, N)
    return tl.load(x.ptr + rows, mask=rows < x.rows, other=0.0)


@triton.jit
def store_tile(x, first, tile, N: tl.constexpr, SIZE: tl.constexpr):
    """Store the elements of a tile that lie inside the matrix."""
    MAIN: tl.constexpr = main_width(SIZE)
    dtype = x.ptr.dtype.element_ty
    tl.store(pointers(x, first, N, 0, MAIN), tile[0].to(dtype), mask=in_bounds(x, first, N, 0, MAIN, SIZE))
    if has_two_parts(SIZE):
        TAIL: tl.constexpr = tail_width(SIZE)
        tl.store(pointers(x, first, N, MAIN, TAIL), tile[1].to(dtype), mask=in_bounds(x, first, N, MAIN, TAIL, SIZE))


@triton.jit
def padded_rows(n):
    """Return n rounded up to a multiple of 16.

    A kernel is compiled once for all lengths. If the compiler knew no divisor of a length, each number of a row would be
    loaded and stored by an instruction of its own.
    """
    return tl.cdiv(n, 16) * 16


@triton.jit
def lse_view(x, sizes, batch, head):
    """Return the address of a head in a dense [batch, head, n_q] tensor; of packed sequences [head, queries]."""
    if len(sizes.packed) == 5:
        return x + tl.cast(head, tl.int64) * sizes.packed[2] + sizes.packed[0]
    else:
        return x + (tl.cast(batch, tl.int64) * sizes.heads + head) * sizes.n_q


@triton.jit
def mass_view(x, sizes, batch, head):
    """Return the view of one head of a dense [batch, head, key_rows] tensor; of packed sequences [head, keys]."""
    if len(sizes.packed) == 5:
        return HeadView(x + tl.cast(head, tl.int64) * sizes.packed[4] + sizes.packed[1], 1, 1, sizes.n_k)
    else:
        return HeadView(x + (tl.cast(batch, tl.int64) * sizes.heads + head) * sizes.key_rows, 1, 1, sizes.n_k)


@triton.jit
def statistics_view(x, sizes, batch, head, COUNT: tl.constexpr):
    """Return the address of a head in a dense [batch, head, COUNT, `statistics_of_head`] tensor."""
    if len(sizes.packed) == 5:
        return x + tl.cast(head, tl.int64) * COUNT * statistics_of_head(sizes) + statistics_start(sizes.packed[0], batch)
    else:
        return x + (tl.cast(batch, tl.int64) * sizes.heads + head) * COUNT * statistics_of_head(sizes)


@triton.jit
def statistics_of_head(sizes):
    """Return how many numbers of each statistic there are for a head: of all packed sequences."""
    if len(sizes.packed) == 5:
        return statistics_start(sizes.packed[2], sizes.packed[3] + 1)
    else:
        return padded_rows(sizes.n_q)


@triton.jit
def load_statistic(x, first, n, M: tl.constexpr, OTHER: tl.constexpr):
    """Load M of padded_rows(n) numbers from the address x of the first; OTHER past their end."""
    rows = first + tl.arange(0, M)
    return tl.load(x + rows, mask=rows < padded_rows(n), other=OTHER)


@triton.jit
def store_statistic(x, first, n, values, M: tl.constexpr):
    """Store M of padded_rows(n) numbers. Those past n do not matter."""
    rows = first + tl.arange(0, M)
    tl.store(x + rows, values, mask=rows < padded_rows(n))


@triton.jit
def pairwise_view(x, batches, batch, head, rows, shift):
    """Return the view of one head of a tensor with one entry per (query, key) pair, its rows indexed by position.

    Row `shift` of the view is the first row of the tensor.
    """
    return rows_by_position(head_view(x, batches, batch, head, rows), shift)


@triton.jit
def rows_by_position(view, shift):
    """Return the view whose row `shift` is the first row of `view`."""
    return HeadView(view.ptr - tl.cast(shift, tl.int64) * view.row, view.row, view.col, view.rows + shift)


@triton.jit
def load_pairwise(x, row, col, n, M: tl.constexpr, N: tl.constexpr, CHECK: tl.constexpr):
    """Load [M, N] entries of a pairwise view from (row, col); elements outside are 0. Columns >= n are masked if CHECK."""
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    base = x.ptr + tl.cast(row, tl.int64) * x.row + tl.cast(col, tl.int64) * x.col
    mask = (row + rows < x.rows)[:, None]
    if CHECK:
        mask = mask & (col + cols < n)[None, :]
    return tl.load(base + (rows[:, None] * x.row + cols[None, :] * x.col), mask=mask, other=0)


@triton.jit
def zero_tile(N: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr):
    """Return an accumulator of zeros, in parts."""
    if has_two_parts(SIZE):
        return tl.zeros([N, main_width(SIZE)], ACC), tl.zeros([N, tail_width(SIZE)], ACC)
    else:
        return (tl.zeros([N, main_width(SIZE)], ACC),)


@triton.jit
def scale_tile(tile, factor):
    """Return a tile times `factor`, a number or [N, 1]."""
    if len(tile) == 2:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@triton.jit
def zero_rows_unless(condition, tile):
    """Return a tile with zeros in the rows where `condition` [N, 1] is false."""
    if len(tile) == 2:
        return tl.where(condition, tile[0], 0.0), tl.where(condition, tile[1], 0.0)
    else:
        return (tl.where(condition, tile[0], 0.0),)


@triton.jit
def dot_t(a, b, static):
    """Return A B^T, [M, N]: the dot products of the rows of two tiles."""
    product = tl.dot(a[0], b[0].T, input_precision=static.PRECISION, out_dtype=static.ACC)
    if len(a) == 2:
        product = tl.dot(a[1], b[1].T, product, input_precision=static.PRECISION, out_dtype=static.ACC)
    return product


@triton.jit
def dot_acc(acc, p, x, s, static, MODE: tl.constexpr):
    """Return acc + P X, part by part. P is 0 where S is -inf; in mode nan_safe 0 * inf and 0 * NaN are 0 there too."""
    if len(x) == 2:
        return dot_acc_part(acc[0], p, x[0], s, static, MODE), dot_acc_part(acc[1], p, x[1], s, static, MODE)
    else:
        return (dot_acc_part(acc[0], p, x[0], s, static, MODE),)


@triton.jit
def dot_acc_part(acc, p, x, s, static, MODE: tl.constexpr):
    """Return acc + P X for one part. Mode nan_safe counts the infinities and NaN that each row meets by dots of their own."""
    if MODE == "nan_safe":
        unmasked = s != float("-inf")
        attends, zero_weight = unmasked.to(x.dtype), (unmasked & (p.to(x.dtype) == 0)).to(x.dtype)
        inf_or_nan = ((x == float("inf")) | (x != x)).to(x.dtype)
        neg_inf_or_nan = ((x == float("-inf")) | (x != x)).to(x.dtype)
        acc += tl.where(tl.dot(attends, inf_or_nan, out_dtype=static.ACC) > 0, float("inf"), 0.0)
        acc -= tl.where(tl.dot(attends, neg_inf_or_nan, out_dtype=static.ACC) > 0, float("inf"), 0.0)
        # at an unmasked pair, a weight of 0 times infinity is NaN, as in the other modes
        acc += tl.where(tl.dot(zero_weight, (x - x != 0).to(x.dtype), out_dtype=static.ACC) > 0, float("nan"), 0.0)
        x = tl.where(x - x == 0, x, 0.0)
    return tl.dot(p.to(x.dtype), x, acc, input_precision=static.PRECISION, out_dtype=static.ACC)


@triton.jit
def stored_rows_with_nan(x, first, N: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr):
    """Return [N] booleans: which rows of the tile that this program has just stored have a NaN, or infinities of both signs.

    The tile is read back from memory: a reduction of the accumulator in registers would constrain its layout in the
    main loop. The barrier makes this program's stores visible to all its threads; no other program writes the tile.
    """
    tl.debug_barrier()
    tile = load_tile(x, first, N, SIZE, True)
    sums = tl.sum(tile[0].to(ACC), 1)
    if len(tile) == 2:
        sums += tl.sum(tile[1].to(ACC), 1)
    return sums != sums


@triton.jit
def zero_stored_rows(x, first, condition, N: tl.constexpr, SIZE: tl.constexpr):
    """Store zeros in the rows of a tile where `condition` [N] is true."""
    MAIN: tl.constexpr = main_width(SIZE)
    dtype = x.ptr.dtype.element_ty
    inside = in_bounds(x, first, N, 0, MAIN, SIZE)
    tl.store(pointers(x, first, N, 0, MAIN), tl.zeros([N, MAIN], dtype), mask=inside & condition[:, None])
    if has_two_parts(SIZE):
        TAIL: tl.constexpr = tail_width(SIZE)
        inside = in_bounds(x, first, N, MAIN, TAIL, SIZE)
        tl.store(pointers(x, first, N, MAIN, TAIL), tl.zeros([N, TAIL], dtype), mask=inside & condition[:, None])


@triton.jit
def any_row(condition, begin, N: tl.constexpr):
    """Return whether `condition` is true in any of N rows from `begin`: a scalar, so that all threads branch alike."""
    rows = tl.arange(0, condition.shape[0])
    return tl.max((condition & (rows >= begin) & (rows < begin + N)).to(tl.int32), 0) != 0


@triton.jit
def count_nonfinite(tile):
    """Return [N]: how many elements of each row of a tile are not finite. Columns past the head size are 0."""
    count = tl.sum((tile[0] - tile[0] != 0).to(tl.int32), 1)
    if len(tile) == 2:
        count += tl.sum((tile[1] - tile[1] != 0).to(tl.int32), 1)
    return count


@triton.jit
def rounding_error(tile, dtype: tl.constexpr):
    """Return a tile minus its value after rounding to dtype."""
    if len(tile) == 2:
        return tile[0] - tile[0].to(dtype).to(tile[0].dtype), tile[1] - tile[1].to(dtype).to(tile[1].dtype)
    else:
        return (tile[0] - tile[0].to(dtype).to(tile[0].dtype),)
