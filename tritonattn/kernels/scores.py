"""What a query thinks of a key: S = scale Q K^T. Forward and backward ask here, so a variant is written once."""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import dropout_of_head, keep_mask
from .tile import Matrix, dot_t, head_view, load_pairwise, pairwise_view, scale_tile
from .window import TILE, Window, needs_mask, window_mask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class ScoreMods(NamedTuple):
    """What is given for each pair of a query and a key: tensors, or the matrices of one head. Each is alone in a tuple,
    which is empty where nothing is given: Triton 3.6 returns no record with a None in it."""

    bias: tuple = ()     # added to the score, -inf hides a pair; strides are 0 where it is broadcast
    mask: tuple = ()     # bytes, 0 hides a pair
    dropout: tuple = ()  # a Dropout: which weights are kept
    block_list: tuple = ()  # of the mask, which tiles are seen whole and in part; of one head, the list of one tile of rows


class ScoreParams(NamedTuple):
    """How scores are made. Weights are powers of two: e^(scale QK^T + bias) = 2^(unit S), S = factor QK^T + bias."""

    exp2_scale: float               # |scale| log2(e), and positive: the largest S stays the largest; with a bias log2(e)
    qk_scale: float | None      # the sign of the scale, None where it is positive; with a bias the scale itself
    window: Window
    mods: ScoreMods


@triton.jit
def select_head(mods, batches, batch, head, first, rows, shift):
    """What is given for the pairs of one head: its matrices, rows counted by their positions, the first at `shift`.

    `first` is the row with which a program's tile begins, not its position.
    """
    bias, mask, dropout, block_list = mods.bias, mods.mask, mods.dropout, mods.block_list
    if len(mods.bias) == 1:
        bias = (pairwise_view(mods.bias[0], batches, batch, head, rows, shift),)
    if len(mods.mask) == 1:
        mask = (pairwise_view(mods.mask[0], batches, batch, head, rows, shift),)
    if len(mods.dropout) == 1:
        dropout = (dropout_of_head(mods.dropout[0], batch, head, shift),)
    if len(mods.block_list) == 1:
        lists = head_view(mods.block_list[0], batches, batch, head, rows)
        block_list = (Matrix(lists.ptr + tl.cast(first // TILE, tl.int64) * lists.row, lists.row, lists.col, lists.rows),)
    return ScoreMods(bias, mask, dropout, block_list)


@triton.jit
def apply_keep_mask(x, row, col, scoring, TRANSPOSED: tl.constexpr):
    """x where the weight is kept, else 0: the gain is still to come. Its first entry belongs to the positions row, col."""
    if len(scoring.mods.dropout) == 1:
        x = tl.where(keep_mask(scoring.mods.dropout[0], row, col, x.shape[0], x.shape[1], TRANSPOSED), x, 0.0)
    return x


@triton.jit
def apply_keep_scale(tile, scoring):
    """A tile times what makes up for the weights that were dropped."""
    if len(scoring.mods.dropout) == 1:
        tile = scale_tile(tile, scoring.mods.dropout[0].keep_scale)
    return tile


@triton.jit
def scores(a, b, row, col, n, scoring, static, MODE: tl.constexpr):
    """S of two tiles that begin at these positions, still to be multiplied by scoring.unit; -inf hides a pair.

    Symmetric: queries against n keys, or, with `scoring` seen from the keys, keys against n queries.
    """
    M: tl.constexpr = a[0].shape[0]
    N: tl.constexpr = b[0].shape[0]
    # with a list, only what is walked as an edge is not seen whole
    HIDES: tl.constexpr = len(scoring.mods.mask) == 1 and (len(scoring.mods.block_list) == 0 or needs_mask(MODE))
    # loaded before the product: of several layouts Triton gives the sums of a row that of the last that comes to it
    if len(scoring.mods.bias) == 1:
        bias = load_pairwise(scoring.mods.bias[0], row, col, n, M, N, needs_mask(MODE))
    if HIDES:
        mask = load_pairwise(scoring.mods.mask[0], row, col, n, M, N, needs_mask(MODE))
    s = dot_t(a, b, static)
    if scoring.qk_scale is not None:
        s = s * scoring.qk_scale
    if len(scoring.mods.bias) == 1:
        bias = bias.to(static.ACC)
        # chosen, not added: a score that is hidden may be nan
        s = tl.where(bias == float("-inf"), bias, s + bias)
    if HIDES:
        s = tl.where(mask != 0, s, float("-inf"))
    if needs_mask(MODE):
        s = tl.where(window_mask(scoring.window, row + tl.arange(0, M), col + tl.arange(0, N), n), s, float("-inf"))
    return s


@triton.jit
def grad_scale(scoring):
    """The scale itself, which dQ = scale dS K and dK = scale dS^T Q carry."""
    # returned at once: the interpreter would round a number with a name to float32
    if scoring.qk_scale is not None:
        return scoring.exp2_scale * LN2 * scoring.qk_scale
    else:
        return scoring.exp2_scale * LN2
