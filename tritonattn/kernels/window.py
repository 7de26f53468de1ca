"""Structural masks. Each is a window of diagonals, causal and sliding ones included: -left <= key - query <= right.

        full            causal          sliding
     left right None    right 0         left 1, right 0
      k 0 1 2 3         k 0 1 2 3       k 0 1 2 3
    q 0 x x x x       q 0 x . . .     q 0 x . . .
      1 x x x x         1 x x . .       1 x x . .
      2 x x x x         2 x x x .       2 . x x .
      3 x x x x         3 x x x x       3 . . x x

A side of None is unbounded and compiles to no code. Query i is at position i + shift among the keys. For a loop over
queries, the window is transposed and the shift is negative.

The keys that a tile of queries attends to form three stretches: masked | unmasked | masked. With a block mask
(block_mask.py) the stretches are parts of a list of blocks: the full blocks first, then the partial ones. The launch chooses
the mode of each stretch, or None where there is none:

    unmasked     no mask code
    neg_inf      no window, but a bias or a mask may make scores -inf
    masked       evaluates the window and checks the ends of the tensors
    masked_tail  the same without pipelining, after the unmasked stretch: on Hopper a second pipelined loop makes ptxas
                 wait for every single product, in both loops
    nan_safe     a NaN in the stored tile may come from 0 * inf at a masked pair. Such rows are then recomputed in this
                 mode, NAN_SAFE_ROWS at a time, outside the main loop, so that the main loop needs no extra registers or
                 shared memory. Rows that are not finite by definition are left as they are, but for those of dQ
                 without a softmax, so that a training step whose cotangents overflow is not much slower than another
"""

from typing import NamedTuple

import triton
import triton.language as tl

NAN_SAFE_ROWS = tl.constexpr(16)
TILE = tl.constexpr(128)  # rows and columns of the blocks of a block mask; the tiles of a config are at most as large


class Window(NamedTuple):
    """The bounds of key - query, each inclusive, or None."""

    left: int | None = None
    right: int | None = None


def transpose_window(window):
    """Return the window of the transposed mask, with rows of keys and columns of queries."""
    return Window(window.right, window.left)


@triton.jit
def window_bounds(window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the columns, of n, that rows at positions [first, first + ROWS) attend to, in tiles of COLS:

        start .. masked .. unmasked_start .. unmasked .. unmasked_stop .. masked .. stop

    Every row attends to every column of the unmasked tiles. No row attends to a column outside [start, stop).
    """
    last = first + ROWS - 1
    start, unmasked_start = 0, 0
    stop, unmasked_stop = n, n // COLS * COLS
    if window.left is not None:
        start = tl.maximum(first - window.left, 0) // COLS * COLS
        unmasked_start = tl.cdiv(tl.maximum(last - window.left, 0), COLS) * COLS
    if window.right is not None:
        stop = tl.minimum(stop, tl.maximum(last + window.right + 1, 0))
        unmasked_stop = tl.minimum(unmasked_stop, tl.maximum(first + window.right + 1, 0) // COLS * COLS)
    unmasked_start = tl.minimum(unmasked_start, tl.cdiv(stop, COLS) * COLS)
    return start, unmasked_start, tl.maximum(unmasked_stop, unmasked_start), stop


@triton.jit
def loop_bounds(block_list, window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the bounds of `window_bounds`; with a block mask, positions in its list: full blocks, then partial ones."""
    if len(block_list) == 1:
        entries = block_list[0]
        full = tl.load(entries.ptr) * TILE
        return 0, 0, full, full + tl.load(entries.ptr + entries.col) * TILE
    else:
        return window_bounds(window, first, n, ROWS, COLS)


@triton.jit
def block_start(block_list, step):
    """Return the first column of a step of the loop: the step itself, or with a block mask the column that its list holds."""
    if len(block_list) == 1:
        entries, tile = block_list[0], step // TILE
        return tl.load(entries.ptr + (2 + tile) * entries.col) * TILE + (step - tile * TILE)
    else:
        return step


@triton.constexpr_function
def loop_mode(modes, part):
    """Return the mode of stretch `part`: 0 left, 1 unmasked, 2 right."""
    # indexing the constexpr in a kernel would give a bare string, which cannot be an argument of a jitted function
    return modes[part]


@triton.constexpr_function
def needs_mask(mode):
    """Return whether a stretch in this mode may have pairs outside the window, or columns past the end."""
    return mode in ("masked", "masked_tail", "nan_safe")


@triton.constexpr_function
def loop_step(block, mode):
    """Return the rows per step of a loop in this mode."""
    return NAN_SAFE_ROWS if mode == "nan_safe" else block


@triton.constexpr_function
def loop_stages(mode):
    """Return the pipeline stages of a loop in this mode; None means those of the config."""
    return 1 if mode in ("masked_tail", "nan_safe") else None


@triton.jit
def window_mask(window, rows, cols, n):
    """Return [rows, cols] booleans: which of n columns each row attends to."""
    mask = (cols < n)[None, :]
    if window.left is not None:
        mask = mask & (cols[None, :] >= rows[:, None] - window.left)
    if window.right is not None:
        mask = mask & (cols[None, :] <= rows[:, None] + window.right)
    return mask


@triton.constexpr_function
def is_ahead(ahead, mode):
    """Return whether the scores are computed one tile ahead in this mode: in the long stretch, which is pipelined."""
    return ahead and mode in ("unmasked", "neg_inf")
