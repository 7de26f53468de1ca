"""Who sees whom. Every mask here is a window of diagonals: -left <= key - query <= right.

        full            causal          sliding
     left right None    right 0         left 1, right 0
      k 0 1 2 3         k 0 1 2 3       k 0 1 2 3
    q 0 x x x x       q 0 x . . .     q 0 x . . .
      1 x x x x         1 x x . .       1 x x . .
      2 x x x x         2 x x x .       2 . x x .
      3 x x x x         3 x x x x       3 . . x x

A side that is None is unbounded, and no code is compiled for it. Query i stands at position
i + shift among the keys. Seen from the keys the window is mirrored and the shift is negative.

A map of a mask (block_mask.py) gives the stretches too: as a list of tiles, first those that all see, then the mixed ones.

A stretch of tiles is walked in one of these modes, which the launch has chosen (None where there is no stretch): "full"
has no mask; "dense" has none of a window, but scores may be -inf, of a bias or a mask; "edge" asks the window; so does "last",
behind the full stretch, which is not pipelined: on Hopper a second pipelined loop makes ptxas wait for every single product,
in both of them. Should a nan come out, perhaps it is 0 * inf of a pair that does not see each other: "careful" does the tile
once more, CARE rows at a time, so that the rare case takes neither registers nor shared memory from the others.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NAN_SAFE_ROWS = tl.constexpr(16)
TILE = tl.constexpr(128)  # rows and columns of the tiles of a map: no block is larger


class Window(NamedTuple):
    left: int | None = None
    right: int | None = None


def transpose_window(window):
    """The same pairs, seen from the keys."""
    return Window(window.right, window.left)


@triton.jit
def window_bounds(window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What rows at positions [first, first + ROWS) see of n columns, in tiles of COLS:

        start .. edge .. inner .. seen whole by every row .. outer .. edge .. stop

    Tiles between inner and outer need no mask at all; what lies outside start and stop nobody sees.
    """
    last = first + ROWS - 1
    start, inner = 0, 0
    stop, outer = n, n // COLS * COLS
    if window.left is not None:
        start = tl.maximum(first - window.left, 0) // COLS * COLS
        inner = tl.cdiv(tl.maximum(last - window.left, 0), COLS) * COLS
    if window.right is not None:
        stop = tl.minimum(stop, tl.maximum(last + window.right + 1, 0))
        outer = tl.minimum(outer, tl.maximum(first + window.right + 1, 0) // COLS * COLS)
    inner = tl.minimum(inner, tl.cdiv(stop, COLS) * COLS)
    return start, inner, tl.maximum(outer, inner), stop


@triton.jit
def loop_bounds(block_list, window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The bounds of `spans`; with a map those of its list: nothing, the tiles that all see, the mixed ones."""
    if len(block_list) == 1:
        entries = block_list[0]
        full = tl.load(entries.ptr) * TILE
        return 0, 0, full, full + tl.load(entries.ptr + entries.col) * TILE
    else:
        return window_bounds(window, first, n, ROWS, COLS)


@triton.jit
def block_start(block_list, step):
    """Where a step of the loop stands: there, or where the list has it."""
    if len(block_list) == 1:
        entries, tile = block_list[0], step // TILE
        return tl.load(entries.ptr + (2 + tile) * entries.col) * TILE + (step - tile * TILE)
    else:
        return step


@triton.constexpr_function
def loop_mode(modes, part):
    """How the left edge (0), the full stretch (1) or the right edge (2) is walked."""
    # an element of a constexpr would be a bare string, which no function takes
    return modes[part]


@triton.constexpr_function
def needs_mask(mode):
    """Whether a stretch walked in this mode has pairs outside the window, or columns past the end."""
    return mode in ("masked", "masked_tail", "nan_safe")


@triton.constexpr_function
def loop_step(block, mode):
    """Rows per step of a loop."""
    return NAN_SAFE_ROWS if mode == "nan_safe" else block


@triton.constexpr_function
def loop_stages(mode):
    """Tiles in flight; None is as many as the config has."""
    return 1 if mode in ("masked_tail", "nan_safe") else None


@triton.jit
def window_mask(window, rows, cols, n):
    """[rows, cols] booleans: which of n columns each row sees."""
    seen = (cols < n)[None, :]
    if window.left is not None:
        seen = seen & (cols[None, :] >= rows[:, None] - window.left)
    if window.right is not None:
        seen = seen & (cols[None, :] <= rows[:, None] + window.right)
    return seen
