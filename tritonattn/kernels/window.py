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

A stretch of tiles is walked in one of these modes: "full" has no mask; "dense" has none of a window, but scores may be
-inf, of a bias or a mask; "edge" asks the window. Should a nan come out, perhaps it is 0 * inf of a pair that does not see
each other: "careful" does the tile once more, CARE rows at a time, so that the rare case takes neither registers nor
shared memory from the others.
"""

from typing import NamedTuple

import triton
import triton.language as tl

CARE = tl.constexpr(16)


class Window(NamedTuple):
    left: int | None = None
    right: int | None = None


def mirror(window):
    """The same pairs, seen from the keys."""
    return Window(window.right, window.left)


@triton.jit
def spans(window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
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


@triton.constexpr_function
def mode_of(part, dense):
    """How the tiles of the left edge (0), the full stretch (1) and the right edge (2) of `spans` are walked."""
    return ("edge", "dense" if dense else "full", "edge")[part]


@triton.constexpr_function
def bounded(mode):
    """Whether a stretch walked in this mode has pairs outside the window, or columns past the end."""
    return mode in ("edge", "careful")


@triton.constexpr_function
def exists(part, left, right):
    """Whether a stretch can hold a tile, given which edges there are."""
    return (left, True, right)[part]


@triton.constexpr_function
def step_of(block, mode):
    """Rows per step of a loop."""
    return CARE if mode == "careful" else block


@triton.constexpr_function
def stages_of(mode):
    return 1 if mode == "careful" else None


@triton.jit
def visible(window, rows, cols, n):
    """[rows, cols] booleans: which of n columns each row sees."""
    seen = (cols < n)[None, :]
    if window.left is not None:
        seen = seen & (cols[None, :] >= rows[:, None] - window.left)
    if window.right is not None:
        seen = seen & (cols[None, :] <= rows[:, None] + window.right)
    return seen
