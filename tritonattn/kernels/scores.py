"""What a query thinks of a key: S = scale Q K^T. Forward and backward ask here, so a variant is written once."""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import inner
from .window import Window, visible

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Scoring(NamedTuple):
    """How scores are made. Weights are powers of two: e^(scale QK^T) = 2^(unit S), S = sign QK^T."""

    unit: float               # |scale| log2(e), and positive: the largest S stays the largest
    sign: float | None        # None where the scale is positive, else -1 or 0
    window: Window


@triton.jit
def scores(a, b, rows, cols, n, scoring, static, MODE: tl.constexpr):
    """S of two tiles, [rows, cols], still to be multiplied by scoring.unit; -inf where a row does not see a column.

    Symmetric: queries against n keys, or, with the window mirrored, keys against n queries.
    """
    s = inner(a, b, static)
    if scoring.sign is not None:
        s = s * scoring.sign
    if MODE != "full":
        s = tl.where(visible(scoring.window, rows, cols, n), s, float("-inf"))
    return s


@triton.jit
def gradient_scale(scoring):
    """The scale itself, which dQ = scale dS K and dK = scale dS^T Q carry."""
    # returned at once: the interpreter would round a number with a name to float32
    if scoring.sign is not None:
        return scoring.unit * LN2 * scoring.sign
    else:
        return scoring.unit * LN2
