"""Masked attention scores, shared by forward and backward: each variant is implemented once.

    P = e^(scale Q K^T + bias - LSE) = 2^(exp2_scale S - LSE log2(e))      S = qk_scale Q K^T + bias
    with a softcap c, of c tanh(scale Q K^T / c) + bias:                   S = c tanh(qk_scale Q K^T) + bias

A function f of the user's, which may depend on the pair, is applied before the biases: S = f(c tanh(...)) + bias.

ALiBi and a table of relative positions are biases that depend on the offset alone, key position - query position:

    bias = -slope |offset| + table[offset]          beyond the ends of the table its first and last entry
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import dropout_of_head, keep_mask
from .functions import FunctionView, call_function, call_mask_function
from .packed import decoded
from .tile import HeadView, dot_t, head_view, load_pairwise, pairwise_view, scale_tile
from .window import TILE, Window, needs_mask, window_mask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Relative(NamedTuple):
    """A table with one entry for each offset from -radius to radius."""

    table: object  # Tensor with one row; in a view of one head, the address of the entry of offset 0
    step: int      # 1, or -1 where rows are keys; in a view, from the entry of one offset to that of the next
    radius: int    # `packed.encoded`; in a view, the number itself


class MaskArguments(NamedTuple):
    """The payload of a mask function, and whether it gets the batch and the head: 0 for a mask that is the same for all."""

    payload: tuple
    per_batch: int
    per_head: int


class ScoreMods(NamedTuple):
    """Modifications of the score of each (query, key) pair: tensors, or views of one head.

    Each field is a tuple of one element, or empty: Triton 3.6 cannot return a record that holds None.
    """

    bias: tuple = ()        # added to the score, -inf masks a pair; strides are 0 where it is broadcast
    mask: tuple = ()        # bytes, 0 masks a pair
    dropout: tuple = ()     # a Dropout
    block_list: tuple = ()  # full and partial blocks of the mask; in a view, the list of one block of rows
    sink: tuple = ()        # forward only: the score of one more key, without a value, of each head; in a view, the number
    alibi: tuple = ()       # slope of each head; in a view, the number
    relative: tuple = ()    # a Relative
    normalizer: tuple = ()  # the bias of a sigmoid, if given; in a view `normalizer_number`, unless it is a softmax
    function: tuple = ()       # of static.SCORE: (payload,) or ((),); in a view a FunctionView. The payload is () or (address,)
    mask_function: tuple = ()  # of static.MASK, with a block_list: a MaskArguments; in a view a FunctionView


class ScoreParams(NamedTuple):
    """Parameters of the scores.

    Without biases, softcap and function the scale is applied together with the exponential: exp2_scale is |scale| log2(e),
    which is positive, so that max S is the largest exponent, and qk_scale the sign of the scale, None where it is positive.
    Else exp2_scale is log2(e), and qk_scale the scale, divided by the softcap if there is one.
    """

    exp2_scale: float
    qk_scale: float | None
    ds_scale: float | None  # float16: a power of two near the scale, 1/16 to 1, so that dS rarely overflows. Else None
    softcap: float | None   # bound of the scores before bias and masks
    window: Window
    mods: ScoreMods


@triton.jit
def select_head(mods, sizes, batch, head, first, rows, shift, static):
    """Return the views of one head, with rows indexed by position; the first row is at position `shift`.

    `first` is the index, not the position, of the first row of this program's tile.
    """
    bias, mask, dropout, block_list, sink = mods.bias, mods.mask, mods.dropout, mods.block_list, mods.sink
    alibi, relative, normalizer, batches = mods.alibi, mods.relative, mods.normalizer, sizes.batches
    function, mask_function = mods.function, mods.mask_function
    if len(mods.bias) == 1:
        bias = (pairwise_view(mods.bias[0], batches, batch, head, rows, shift),)
    if len(mods.mask) == 1:
        mask = (pairwise_view(mods.mask[0], batches, batch, head, rows, shift),)
    if len(mods.dropout) == 1:
        dropout = (dropout_of_head(mods.dropout[0], batch, head, shift),)
    if len(mods.block_list) == 1:
        lists = head_view(mods.block_list[0], batches, batch, head, rows)
        block_list = (HeadView(lists.ptr + tl.cast(first // TILE, tl.int64) * lists.row, lists.row, lists.col, lists.rows),)
    if len(mods.sink) == 1:
        sink = (tl.load(head_view(mods.sink[0], batches, batch, head, 1).ptr),)
    if len(mods.alibi) == 1:
        alibi = (tl.load(head_view(mods.alibi[0], batches, batch, head, 1).ptr),)
    if len(mods.relative) == 1:
        view, radius = head_view(mods.relative[0].table, batches, batch, head, 1), decoded(mods.relative[0].radius)
        relative = (Relative(view.ptr + radius * view.col, view.col * mods.relative[0].step, radius),)
    if static.NORMALIZER != "softmax":
        normalizer = (normalizer_number(mods.normalizer, sizes.n_k, static),)
    if len(mods.function) == 1:
        function = (FunctionView(mods.function[0], batch, head, rows, shift),)
    if len(mods.mask_function) == 1:
        given = mods.mask_function[0]
        mask_function = (FunctionView(given.payload, batch * given.per_batch, head * given.per_head, rows, shift),)
    return ScoreMods(bias, mask, dropout, block_list, sink, alibi, relative, normalizer, function, mask_function)


@triton.jit
def normalizer_number(given, n, static):
    """Return, for n keys, the bias of sigmoid attention times log2(e), `given` or -ln n; 1/n of ReLU attention."""
    n = tl.maximum(n, 1).to(static.ACC)
    if static.NORMALIZER == "relu":
        return 1.0 / n
    elif len(given) == 1:
        return tl.full([], LOG2E, static.ACC) * given[0]
    else:
        return -tl.log2(n)


@triton.jit
def apply_keep_mask(x, row, col, scoring, TRANSPOSED: tl.constexpr):
    """Return x, or 0 where dropout drops the weight, not yet scaled. Its first entry is at positions (row, col)."""
    if len(scoring.mods.dropout) == 1:
        x = tl.where(keep_mask(scoring.mods.dropout[0], row, col, x.shape[0], x.shape[1], TRANSPOSED), x, 0.0)
    return x


@triton.jit
def apply_keep_scale(tile, scoring):
    """Return a tile times 1 / (1 - p), which compensates for the dropped weights."""
    if len(scoring.mods.dropout) == 1:
        tile = scale_tile(tile, scoring.mods.dropout[0].keep_scale)
    return tile


@triton.constexpr_function
def loads_mask(masks, block_lists, mode):
    """Return whether the mask is loaded in this mode: with a block list, only its partial blocks need it."""
    return masks == 1 and (block_lists == 0 or needs_mask(mode))


@triton.jit
def load_modifiers(row, col, n, M: tl.constexpr, N: tl.constexpr, scoring, MODE: tl.constexpr):
    """Return bias, mask and table entries of a tile from positions (row, col), as `modify` takes them in this mode."""
    bias, mask, relative = scoring.mods.bias, scoring.mods.mask, scoring.mods.relative
    if len(scoring.mods.bias) == 1:
        bias = (load_pairwise(scoring.mods.bias[0], row, col, n, M, N, needs_mask(MODE)),)
    if loads_mask(len(scoring.mods.mask), len(scoring.mods.block_list), MODE):
        mask = (load_pairwise(scoring.mods.mask[0], row, col, n, M, N, needs_mask(MODE)),)
    if len(scoring.mods.relative) == 1:
        relative = (load_relative(scoring.mods.relative[0], row, col, M, N),)
    return bias, mask, relative


@triton.jit
def load_relative(view, row, col, M: tl.constexpr, N: tl.constexpr):
    """Load the entries of the offsets of a tile [M, N] that starts at positions (row, col). None is outside of the table."""
    offsets = (col - row + tl.arange(0, N))[None, :] - tl.arange(0, M)[:, None]
    return tl.load(view.table + tl.minimum(tl.maximum(offsets, -view.radius), view.radius) * view.step)


@triton.jit
def distances(row, col, M: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr):
    """Return |offset| of a tile [M, N] that starts at positions (row, col): exact in float32 up to 2^24."""
    rows = (col - row).to(dtype) - tl.arange(0, M).to(dtype)
    return tl.abs(rows[:, None] + tl.arange(0, N).to(dtype)[None, :])


@triton.jit
def tanh(x, dtype: tl.constexpr):
    """Return tanh(x) = 1 - 2 / (e^2x + 1), with an absolute error of 3e-7; for queries in float32 also with a relative one."""
    # a division takes three more instructions
    root = tl.rsqrt(tl.exp2(x * (2 * LOG2E)) + 1.0)
    y = 1.0 - 2.0 * root * root
    if dtype == tl.float32:
        # near 0 the difference has few digits; a polynomial fitted for |x| < 0.6, with a relative error of 3e-9
        z = x * x
        odd = 0.13331924 + z * (-0.05378383 + z * (0.020795971 + z * -0.0058951578))
        y = tl.where(tl.abs(x) < 0.6, x + x * z * (-0.333332986 + z * odd), y)
    return y


@triton.jit
def scale_and_cap(product, scoring, dtype: tl.constexpr):
    """Return S before bias and masks, from the product of queries and keys of this dtype."""
    if scoring.qk_scale is not None:
        product = product * scoring.qk_scale
    if scoring.softcap is not None:
        product = tanh(product, dtype) * scoring.softcap
    return product


@triton.jit
def modify(s, modifiers, row, col, n, scoring, static, MODE: tl.constexpr):
    """Return S, not yet times exp2_scale, from `scale_and_cap`: with the biases, and -inf at masked pairs."""
    if len(scoring.mods.function) == 1:
        changed = call_function(static.SCORE, s, row, col, n, scoring.mods.function[0], static.TRANSPOSED)
        s = tl.broadcast_to(changed.to(static.ACC), s.shape)
    if len(scoring.mods.alibi) == 1:
        s -= scoring.mods.alibi[0].to(static.ACC) * distances(row, col, s.shape[0], s.shape[1], static.ACC)
    if len(scoring.mods.relative) == 1:
        s = add_bias(s, modifiers[2][0].to(static.ACC))
    if len(scoring.mods.bias) == 1:
        s = add_bias(s, modifiers[0][0].to(static.ACC))
    if loads_mask(len(scoring.mods.mask), len(scoring.mods.block_list), MODE):
        s = tl.where(modifiers[1][0] != 0, s, float("-inf"))
    if len(scoring.mods.mask_function) == 1 and needs_mask(MODE):
        pairs = call_mask_function(static.MASK, row, col, n, s.shape[0], s.shape[1], scoring.mods.mask_function[0],
                                   static.TRANSPOSED)
        s = tl.where(pairs, s, float("-inf"))
    if needs_mask(MODE):
        rows, cols = row + tl.arange(0, s.shape[0]), col + tl.arange(0, s.shape[1])
        s = tl.where(window_mask(scoring.window, rows, cols, n), s, float("-inf"))
    return s


@triton.jit
def add_bias(s, bias):
    """Return S + bias. Select instead of adding -inf: the score of a masked pair may be NaN."""
    return tl.where(bias == float("-inf"), bias, s + bias)


@triton.jit
def scores(a, b, row, col, n, scoring, static, MODE: tl.constexpr):
    """Return S of two tiles that start at positions (row, col), not yet times exp2_scale, and S before bias and masks.

    Masked pairs are -inf in the first. Rows are queries and the n columns keys; with `scoring` transposed, rows are keys and
    the n columns queries.
    """
    # load before the dot: the row reduction gets the layout of the last operand computed, and after a late load several
    # warps would compute the same exponentials
    modifiers = load_modifiers(row, col, n, a[0].shape[0], b[0].shape[0], scoring, MODE)
    s = scale_and_cap(dot_t(a, b, static), scoring, a[0].dtype)
    return modify(s, modifiers, row, col, n, scoring, static, MODE), s


@triton.jit
def attended(row, col, n, M: tl.constexpr, N: tl.constexpr, scoring, static):
    """Return [M, N] booleans: which pairs of a tile neither the window nor the mask nor a bias of -inf masks.

    The user's function masks a pair if it is -inf for a score of 0.
    """
    pairs = window_mask(scoring.window, row + tl.arange(0, M), col + tl.arange(0, N), n)
    if len(scoring.mods.bias) == 1:
        pairs = pairs & (load_pairwise(scoring.mods.bias[0], row, col, n, M, N, True) != float("-inf"))
    if len(scoring.mods.relative) == 1:
        pairs = pairs & (load_relative(scoring.mods.relative[0], row, col, M, N) != float("-inf"))
    if len(scoring.mods.mask) == 1:
        pairs = pairs & (load_pairwise(scoring.mods.mask[0], row, col, n, M, N, True) != 0)
    if len(scoring.mods.mask_function) == 1:
        pairs = pairs & call_mask_function(static.MASK, row, col, n, M, N, scoring.mods.mask_function[0], static.TRANSPOSED)
    if len(scoring.mods.function) == 1:
        zeros = tl.zeros([M, N], static.ACC)
        s = call_function(static.SCORE, zeros, row, col, n, scoring.mods.function[0], static.TRANSPOSED)
        pairs = pairs & (s != float("-inf"))
    return pairs


@triton.jit
def grad_scale(scoring):
    """Return the scale of dQ = scale dS K and dK = scale dS^T Q, divided by ds_scale."""
    # return the expression directly: the interpreter rounds a number to float32 when it is assigned to a name
    if scoring.softcap is not None:
        if scoring.ds_scale is not None:
            return scoring.softcap * scoring.qk_scale / scoring.ds_scale
        else:
            return scoring.softcap * scoring.qk_scale
    elif scoring.ds_scale is not None:
        if scoring.qk_scale is not None:
            return scoring.exp2_scale * LN2 * scoring.qk_scale / scoring.ds_scale
        else:
            return scoring.exp2_scale * LN2 / scoring.ds_scale
    elif scoring.qk_scale is not None:
        return scoring.exp2_scale * LN2 * scoring.qk_scale
    else:
        return scoring.exp2_scale * LN2
