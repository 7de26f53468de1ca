"""How kernels see memory, and the products of what they saw.

    Tensor [batch ..., head, row, col]  ->  Matrix [row, col]  ->  tile, a tuple of parts [N, width]

A tile's width is a power of two, so a head of 96 columns is held in parts of 64 and 32 and not
in one of 128. Where a tile begins is a 64-bit address; inside it 32 bits do, which saves registers,
unless the tensor is `wide`.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Strides(NamedTuple):
    """Distances in elements."""

    batch: tuple  # one per batch dimension, the innermost first
    head: int
    row: int
    col: int


class Tensor(NamedTuple):
    """A [batch ..., head, row, col] tensor as one kernel argument."""

    ptr: object
    strides: Strides
    wide: tl.constexpr = tl.constexpr(False)  # a stride is so long that even a tile spans more than 2^31 elements


class Matrix(NamedTuple):
    """One head of a Tensor: where it begins, the distances between its rows and between its columns, its length."""

    ptr: object
    row: int
    col: int
    rows: int


class Sizes(NamedTuple):
    """Sizes of the problem that may change without a new compilation."""

    batches: tuple  # sizes of the batch dimensions, the innermost first
    heads: int      # of the queries
    n_q: int
    n_k: int
    shift: int      # query i stands at position i + shift among the keys
    lengths: tuple = ()  # or where the number of keys of each batch lies, and 1 if the shift moves with it, else 0


class Constexprs(NamedTuple):
    """What the compiler knows, each a tl.constexpr. It stays one only in a record that was launched."""

    D: tl.constexpr                                # head size of q and k
    DV: tl.constexpr                               # head size of v and o
    GROUP: tl.constexpr                            # query heads per key head
    BLOCK_M: tl.constexpr                          # queries per tile
    BLOCK_N: tl.constexpr                          # keys per tile
    UNEVEN: tl.constexpr                           # the last tile of the loop is not whole
    LOOP_MODES: tl.constexpr                            # of the three stretches of the loop (window.py)
    ACC: tl.constexpr                              # dtype of sums
    PRECISION: tl.constexpr                        # of float32 products: "ieee" or "tf32"
    GRADS: tl.constexpr = tl.constexpr("both")       # the gradients asked for of a tile of keys: "both", "dk" or "dv"


@triton.constexpr_function
def main_width(size):
    """Width of a tile's first part: the one that holds everything, unless two parts are less."""
    whole = max(16, triton.next_power_of_2(size))
    half = whole // 2
    # a product needs at least 16
    return half if half >= 16 and half + tail_width(size) < whole else whole


@triton.constexpr_function
def tail_width(size):
    """Width that the columns beyond the first half of the padded size need; 0 if there are none."""
    half = max(16, triton.next_power_of_2(size)) // 2
    return max(16, triton.next_power_of_2(size - half)) if size > half else 0


@triton.constexpr_function
def has_two_parts(size):
    """Whether a head of this size is held in two parts."""
    return main_width(size) < size


@triton.jit
def tile_head_batch(heads, n, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """First row of this program's tile, its head and batch. Tiles of one head are neighbours: they share it in L2."""
    tiles = tl.cdiv(n, BLOCK)
    tile = tl.program_id(0) % tiles
    if REVERSE:
        tile = tiles - 1 - tile
    head = tl.program_id(0) // tiles
    return tile * BLOCK, head % heads, head // heads


@triton.jit
def sizes_of_batch(shape, batch):
    """The shape of one batch: with as many keys as it has."""
    if len(shape.lengths) == 2:
        n_k = tl.minimum(tl.maximum(tl.load(shape.lengths[0] + batch), 0), shape.n_k)
        shift = shape.shift + (n_k - shape.n_k) * shape.lengths[1]
        return Sizes(shape.batches, shape.heads, shape.n_q, n_k, shift, shape.lengths)
    else:
        return shape


@triton.jit
def head_view(x, batches, batch, head, rows):
    """The [rows, col] matrix of one head."""
    start = x.ptr + tl.cast(head, tl.int64) * x.strides.head
    for i in tl.static_range(len(batches)):
        start += tl.cast(batch % batches[i], tl.int64) * x.strides.batch[i]
        batch = batch // batches[i]
    if x.wide:
        return Matrix(start, tl.cast(x.strides.row, tl.int64), tl.cast(x.strides.col, tl.int64), rows)
    else:
        return Matrix(start, x.strides.row, x.strides.col, rows)


@triton.jit
def pointers(x, first, N: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """[N, WIDTH] addresses: rows from `first`, columns from BEGIN."""
    # the offsets within a tile are one value, the same in every step of a loop
    offsets = tl.arange(0, N)[:, None] * x.row + (BEGIN + tl.arange(0, WIDTH))[None, :] * x.col
    return x.ptr + tl.cast(first, tl.int64) * x.row + offsets


@triton.jit
def in_bounds(x, first, N: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """[N, WIDTH]: which of the `pointers` lie in a matrix of SIZE columns."""
    rows, cols = first + tl.arange(0, N), BEGIN + tl.arange(0, WIDTH)
    return (rows[:, None] < x.rows) & (cols[None, :] < SIZE)


@triton.jit
def load_part(x, first, N: tl.constexpr, BEGIN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHECK: tl.constexpr):
    ptrs = pointers(x, first, N, BEGIN, WIDTH)
    if CHECK:
        return tl.load(ptrs, mask=in_bounds(x, first, N, BEGIN, WIDTH, SIZE), other=0.0)
    elif BEGIN + WIDTH > SIZE:
        return tl.load(ptrs, mask=(BEGIN + tl.arange(0, WIDTH))[None, :] < SIZE, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_tile(x, first, N: tl.constexpr, SIZE: tl.constexpr, CHECK: tl.constexpr):
    """N rows from `first`, in parts. What lies outside reads as zero; rows are tested only if CHECK."""
    MAIN: tl.constexpr = main_width(SIZE)
    if has_two_parts(SIZE):
        return load_part(x, first, N, 0, MAIN, SIZE, CHECK), load_part(x, first, N, MAIN, tail_width(SIZE), SIZE, CHECK)
    else:
        return (load_part(x, first, N, 0, MAIN, SIZE, CHECK),)


@triton.jit
def store_tile(x, first, tile, N: tl.constexpr, SIZE: tl.constexpr):
    """Write the parts of a tile, as far as they lie inside."""
    MAIN: tl.constexpr = main_width(SIZE)
    dtype = x.ptr.dtype.element_ty
    tl.store(pointers(x, first, N, 0, MAIN), tile[0].to(dtype), mask=in_bounds(x, first, N, 0, MAIN, SIZE))
    if has_two_parts(SIZE):
        TAIL: tl.constexpr = tail_width(SIZE)
        tl.store(pointers(x, first, N, MAIN, TAIL), tile[1].to(dtype), mask=in_bounds(x, first, N, MAIN, TAIL, SIZE))


@triton.jit
def load_rows(x, first, N: tl.constexpr, OTHER: tl.constexpr):
    """[N] entries of a one-column matrix (a statistic of each row); OTHER past its end."""
    ptrs = x.ptr + tl.cast(first, tl.int64) * x.row + tl.arange(0, N) * x.row
    return tl.load(ptrs, mask=first + tl.arange(0, N) < x.rows, other=OTHER)


@triton.jit
def store_rows(x, first, values, N: tl.constexpr):
    ptrs = x.ptr + tl.cast(first, tl.int64) * x.row + tl.arange(0, N) * x.row
    tl.store(ptrs, values, mask=first + tl.arange(0, N) < x.rows)


@triton.jit
def pairwise_view(x, batches, batch, head, rows, shift):
    """The matrix of one head of a tensor with an entry for each pair, its rows counted by their positions: from `shift` on."""
    found = head_view(x, batches, batch, head, rows + shift)
    return Matrix(found.ptr - tl.cast(shift, tl.int64) * found.row, found.row, found.col, found.rows)


@triton.jit
def load_pairwise(x, row, col, n, M: tl.constexpr, N: tl.constexpr, CHECK: tl.constexpr):
    """[M, N] entries of `pairs_of` from here on; what lies outside reads as zero, columns are tested against n if CHECK."""
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    base = x.ptr + tl.cast(row, tl.int64) * x.row + tl.cast(col, tl.int64) * x.col
    within = (row + rows < x.rows)[:, None]
    if CHECK:
        within = within & (col + cols < n)[None, :]
    return tl.load(base + (rows[:, None] * x.row + cols[None, :] * x.col), mask=within, other=0)


@triton.jit
def zero_tile(N: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr):
    """A tile of sums, in parts."""
    if has_two_parts(SIZE):
        return tl.zeros([N, main_width(SIZE)], ACC), tl.zeros([N, tail_width(SIZE)], ACC)
    else:
        return (tl.zeros([N, main_width(SIZE)], ACC),)


@triton.jit
def scale_tile(tile, factor):
    """Every part of a tile, times `factor` (a number, or [N, 1])."""
    if len(tile) == 2:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@triton.jit
def zero_rows_unless(condition, tile):
    """Every part of a tile, 0 where the condition [N, 1] does not hold."""
    if len(tile) == 2:
        return tl.where(condition, tile[0], 0.0), tl.where(condition, tile[1], 0.0)
    else:
        return (tl.where(condition, tile[0], 0.0),)


@triton.jit
def dot_t(a, b, static):
    """A B^T, [M, N]: the dot products of the rows of two tiles."""
    product = tl.dot(a[0], b[0].T, input_precision=static.PRECISION, out_dtype=static.ACC)
    if len(a) == 2:
        product = tl.dot(a[1], b[1].T, product, input_precision=static.PRECISION, out_dtype=static.ACC)
    return product


@triton.jit
def dot_acc(acc, p, x, s, static, MODE: tl.constexpr):
    """acc + P X, part by part. P is 0 where the score in S is -inf; in a careful loop so is 0 * inf, which else is nan."""
    if len(x) == 2:
        return dot_acc_part(acc[0], p, x[0], s, static, MODE), dot_acc_part(acc[1], p, x[1], s, static, MODE)
    else:
        return (dot_acc_part(acc[0], p, x[0], s, static, MODE),)


@triton.jit
def dot_acc_part(acc, p, x, s, static, MODE: tl.constexpr):
    if MODE == "nan_safe":
        met = s != float("-inf")
        seen, weightless = met.to(x.dtype), (met & (p.to(x.dtype) == 0)).to(x.dtype)
        up = ((x == float("inf")) | (x != x)).to(x.dtype)
        down = ((x == float("-inf")) | (x != x)).to(x.dtype)
        acc += tl.where(tl.dot(seen, up, out_dtype=static.ACC) > 0, float("inf"), 0.0)
        acc -= tl.where(tl.dot(seen, down, out_dtype=static.ACC) > 0, float("inf"), 0.0)
        # as in any other loop, a weight of 0 that is seen makes nan of what is not finite
        acc += tl.where(tl.dot(weightless, (x - x != 0).to(x.dtype), out_dtype=static.ACC) > 0, float("nan"), 0.0)
        x = tl.where(x - x == 0, x, 0.0)
    return tl.dot(p.to(x.dtype), x, acc, input_precision=static.PRECISION, out_dtype=static.ACC)


@triton.jit
def stored_tile_has_nan(x, first, N: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr):
    """Whether the tile that this program has just stored holds a nan (or infinities of both signs in one row).

    Read back rather than taken from registers: what is asked of a sum there ties its layout, and costs in every loop.
    The barrier makes the stores of this program visible to all its threads; nobody else writes there. The answer is one
    number, so all threads branch alike.
    """
    tl.debug_barrier()
    tile = load_tile(x, first, N, SIZE, True)
    sums = tl.sum(tile[0].to(ACC), 1)
    if len(tile) == 2:
        sums += tl.sum(tile[1].to(ACC), 1)
    return tl.max((sums != sums).to(tl.int32), 0) != 0


@triton.jit
def rounding_error(tile, dtype: tl.constexpr):
    """What each part of a tile loses when it is stored as dtype."""
    if len(tile) == 2:
        return tile[0] - tile[0].to(dtype).to(tile[0].dtype), tile[1] - tile[1].to(dtype).to(tile[1].dtype)
    else:
        return (tile[0] - tile[0].to(dtype).to(tile[0].dtype),)
