"""From a problem, a config and tensors to a grid and kernel arguments; the only place that starts kernels."""

import contextlib
import math
from typing import NamedTuple

import torch
import triton.language as tl

from ..block_mask import TILE
from ..config import Config
from ..gpu import INTERPRETED
from ..kernels import backward, forward
from ..kernels.backward import Members, Queries
from ..kernels.dropout import Dropout, keep_kernel
from ..kernels.forward import Results
from ..kernels.scores import LOG2E, Pairs, Scoring
from ..kernels.tile import Shape, Static, Strides, Tensor
from ..kernels.window import Window, mirror
from ..problem import Problem

if INTERPRETED:
    from . import interpreter

ACC = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64}


class Call(NamedTuple):
    """A kernel, how many programs of it, and its arguments."""

    kernel: object
    programs: int
    arguments: tuple
    config: Config


def run(call: Call, device: torch.device) -> None:
    """Start the kernel on the tensors' own device, on its current stream."""
    if call.programs == 0:
        return
    with on(device), interpreter.quiet() if INTERPRETED else contextlib.nullcontext():
        call.kernel[(call.programs,)](*call.arguments, **options(call.config))


def options(config: Config) -> dict:
    """What the compiler is told besides the arguments. Multiply-adds stay fused, whatever Triton's default is."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def on(device: torch.device):
    """Make this device the current one: Triton launches there, wherever its tensors are."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


class Inputs(NamedTuple):
    """What a call is about: its tensors, then its numbers, in the order of the ops.

    bias and mask have as many dimensions as q, each of the full size or 1; the mask is boolean.
    Weights are dropped with probability dropout_p, as the seed has it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    query_lists: torch.Tensor | None = None  # of a mask whose tiles are known (block_mask.py)
    key_lists: torch.Tensor | None = None
    seed: torch.Tensor | None = None         # [1] int64, where dropout_p is not 0
    key_lengths: torch.Tensor | None = None  # one int32 for each batch, contiguous
    scale: float = 1.0
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False               # the last query stands at the last key, wherever a batch has it
    dropout_p: float = 0.0

    @property
    def problem(self) -> Problem:
        """What is asked, without the tensors."""
        return Problem.of(*self[:3], (self.left, self.right), self.bottom_right, self.bias, self.mask, self.dropout_p,
                          self.key_lengths, self.query_lists)


def forward_call(problem: Problem, config: Config, inputs: Inputs, results: Results) -> Call:
    """`results` are tensors; without a residual nothing is kept of what rounding takes from o."""
    *records, pairs, shape = arguments(problem, config, *inputs[:3], results, _pairs(problem, inputs))
    shape, static = _bounded(inputs, shape), _over_keys(problem, config)
    programs = _programs(problem, problem.heads, problem.n_q, config.block_m)
    scoring = _scoring(inputs, Window(*problem.window), pairs)
    return Call(forward.forward_kernel, programs, (*records, shape, scoring, static), config)


def delta_call(problem: Problem, config: Config, o, residual, do, dlse, delta) -> Call:
    """`residual` and `dlse` may be None."""
    tensors = arguments(problem, config, o, residual, do, dlse, delta)
    programs = _programs(problem, problem.heads, problem.n_q, config.block_m)
    static = _static(problem, config)
    return Call(backward.delta_kernel, programs, (*tensors, static), config)


def dq_call(problem: Problem, config: Config, inputs: Inputs, queries: Queries, dq) -> Call:
    """`queries` are tensors: q, its cotangent, and what the forward pass left behind."""
    *records, pairs, shape = arguments(problem, config, queries, *inputs[1:3], dq, _pairs(problem, inputs))
    shape, static = _bounded(inputs, shape), _over_keys(problem, config)
    programs = _programs(problem, problem.heads, problem.n_q, config.block_m)
    scoring = _scoring(inputs, Window(*problem.window), pairs)
    return Call(backward.dq_kernel, programs, (*records, shape, scoring, static), config)


def dkdv_call(problem: Problem, config: Config, inputs: Inputs, queries: Queries, dk, dv) -> Call:
    """`dk` or `dv` may be None: it is then not computed. `queries.delta` is needed only for dk."""
    # seen from the keys, what is given for each pair lies transposed
    given = _pairs(problem, inputs)
    turned = Pairs(tuple(x.mT for x in given.bias), tuple(x.mT for x in given.mask), (), _lists(problem, inputs.key_lists))
    *records, pairs, shape = arguments(problem, config, queries, *inputs[1:3], dk, dv, turned)
    shape, static = _bounded(inputs, shape), _over_queries(problem, config)
    static = static._replace(OUT=tl.constexpr("dv" if dk is None else "dk" if dv is None else "both"))
    programs = _programs(problem, problem.kv_heads, problem.n_k, config.block_n)
    scoring = _scoring(inputs, mirror(Window(*problem.window)), pairs)
    return Call(backward.dkdv_kernel, programs, (*records, shape, scoring, static), config)


def dbias_call(problem: Problem, config: Config, inputs: Inputs, queries: Queries, dbias) -> Call:
    """`dbias` has the shape of the bias, whose last size is that of the keys."""
    target, given = _expanded(problem, dbias), _pairs(problem, inputs)._replace(listing=())
    *records, target, pairs, shape = arguments(problem, config, queries, *inputs[1:3], target, given)
    own = tuple(1 if stride == 0 else size for stride, size in zip(target.strides.batch, shape.batches))
    owned = Members(own, dbias.shape[-3])
    summed = Members(tuple(size // mine for size, mine in zip(shape.batches, own)), problem.heads // dbias.shape[-3])
    rows = 1 if dbias.shape[-2] == 1 else problem.n_q
    static = _static(problem, config)._replace(OUT=tl.constexpr("keys" if rows == 1 else "pairs"))
    programs = math.prod(own) * owned.heads * -(-rows // config.block_m) * -(-problem.n_k // config.block_n)
    scoring = _scoring(inputs, Window(*problem.window), pairs)
    shape = _bounded(inputs, shape)
    return Call(backward.dbias_kernel, programs, (*records, target, owned, summed, shape, scoring, static), config)


def _bounded(inputs: Inputs, shape: Shape) -> Shape:
    """The shape, with the number of keys that each batch has."""
    return shape if inputs.key_lengths is None else shape._replace(lengths=(inputs.key_lengths, int(inputs.bottom_right)))


def _over_keys(problem: Problem, config: Config) -> Static:
    """For a loop over keys; where batches have their own numbers of them, any tile may be the last, and not whole."""
    ragged = problem.lengths or problem.n_k % _unit(problem, config, config.block_n) != 0
    return _static(problem, config, ragged, modes(problem, config, problem.window, ragged))


def _over_queries(problem: Problem, config: Config) -> Static:
    """For a loop over queries, seen from the keys."""
    ragged = problem.n_q % _unit(problem, config, config.block_m) != 0
    return _static(problem, config, ragged, modes(problem, config, mirror(Window(*problem.window)), ragged))


def _unit(problem: Problem, config: Config, block: int) -> int:
    """All tiles of a loop in steps of `block` are whole if what it walks is a multiple of this."""
    if problem.mapped and max(config.block_m, config.block_n) > TILE:
        raise ValueError(f"config: expected blocks of at most {TILE}, the tiles of the mask's map, got {config}")
    return TILE if problem.mapped else block


def modes(problem: Problem, config: Config, window, ragged: bool) -> tuple:
    """How the left edge, the full stretch and the right edge of the loop are walked (kernels/window.py)."""
    left, right = (side is not None for side in window)
    last = "last" if config.edge_stages == 1 else "edge"
    if problem.mapped:
        # what all see according to the map may still lie outside the window, or past the keys of its batch
        whole = "edge" if left or right or problem.lengths else "dense" if problem.bias else "full"
        return None, whole, last
    whole = "dense" if problem.bias or problem.masked else "full"
    return "edge" if left else None, whole, last if right or ragged else None


def _expanded(problem: Problem, x):
    """Over the dimensions in which it has size 1, without a copy."""
    return x.expand(*problem.batch, problem.heads, problem.n_q, problem.n_k)


def _pairs(problem: Problem, inputs: Inputs) -> Pairs:
    """Bias and mask, expanded; the mask as bytes, which Triton loads alike in all its versions."""
    mask = () if inputs.mask is None else (_expanded(problem, inputs.mask.view(torch.uint8)),)
    bias = () if inputs.bias is None else (_expanded(problem, inputs.bias),)
    return Pairs(bias, mask, (), _lists(problem, inputs.query_lists))


def _lists(problem: Problem, lists) -> tuple:
    """Lists of tiles for every batch and head."""
    return () if lists is None else (lists.expand(*problem.batch, problem.heads, -1, -1),)


def arguments(problem: Problem, config: Config, *tensors) -> tuple:
    """Tensors as the kernels take them, and the Shape they share. None stays None; tuples of tensors stay tuples.

    Batch dimensions that lie behind one another in every tensor become one; most often one is left.
    """
    rank, present = len(problem.batch), list(_flat(tensors))
    merged = []
    for i in reversed(range(rank)):
        size, strides = problem.batch[i], [x.stride(i) for x in present]
        if size == 1:
            continue
        if merged and all(outer == inner * merged[-1][0] for outer, inner in zip(strides, merged[-1][1])):
            merged[-1] = (size * merged[-1][0], merged[-1][1])
        else:
            merged.append((size, strides))
    merged = merged or [(1, [0] * len(present))]
    block = max(config.block_m, config.block_n)
    # of what is given for each pair a kernel sees a block at a time, of other tensors whole rows
    in_blocks = {id(x) for given in tensors if isinstance(given, Pairs) for x in _flat(given)}
    records = iter([_record(x, rank, [strides[i] for _, strides in merged], block, block if id(x) in in_blocks else x.shape[-1])
                    for i, x in enumerate(present)])
    shape = Shape(tuple(size for size, _ in merged), problem.heads, problem.n_q, problem.n_k, problem.shift)
    return *_refilled(tensors, records), shape


def _flat(tensors):
    """The tensors in nested tuples, in order."""
    for x in tensors:
        if isinstance(x, tuple):
            yield from _flat(x)
        elif x is not None:
            yield x


def _refilled(tensors, records):
    """The same nested tuples with records in place of their tensors."""
    return [None if x is None else next(records) if isinstance(x, torch.Tensor) else
            type(x)(*_refilled(x, records)) if hasattr(x, "_fields") else tuple(_refilled(x, records)) for x in tensors]


def _record(x, rank, batch_strides, block, width) -> Tensor:
    """A tensor as the kernels take it, `block` rows and `width` columns at a time. Statistics of rows have no column axis."""
    head, row, col = x.stride()[rank:] if x.dim() == rank + 3 else (*x.stride()[rank:], 0)
    wide = block * abs(row) + 2 * width * abs(col) >= 2**31
    return Tensor(x, Strides(tuple(batch_strides), head, row, col), tl.constexpr(wide))


def _static(problem: Problem, config: Config, ragged: bool = False, walked: tuple = ()) -> Static:
    # what torch.set_float32_matmul_precision sets, also where the newer fp32_precision was used
    tf32 = problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    values = (problem.d, problem.dv, problem.group, config.block_m, config.block_n, ragged, walked, ACC[problem.dtype],
              "tf32" if tf32 else "ieee")
    return Static(*map(tl.constexpr, values))


def _scoring(inputs: Inputs, window: Window, pairs: Pairs) -> Scoring:
    pairs = pairs._replace(dropout=(dropping(inputs.dropout_p, inputs.seed),) if inputs.dropout_p else ())
    # what float32 holds only as a subnormal number is 0 here: -inf * 0 would be nan
    scale = inputs.scale if abs(inputs.scale) >= 2.0**-126 else 0.0
    if pairs.bias:
        return Scoring(LOG2E.value, scale, window, pairs)
    sign = (None if scale > 0 else -1.0) if scale else 0.0
    return Scoring((abs(scale) or 1.0) * LOG2E.value, sign, window, pairs)


def dropping(p: float, seed: torch.Tensor) -> Dropout:
    """Dropout with probability p, rounded to a multiple of 2^-32; what is kept is multiplied by 1 / (1 - p), by 0 if p is 1."""
    threshold = min(round(p * 2**32), 2**32 - 1)
    return Dropout(seed, threshold, 2**32 / (2**32 - threshold) if p < 1 else 0.0)


def keep_call(keep: torch.Tensor, dropout: Dropout) -> Call:
    """`keep` is [batch, heads, n_q, n_k], bytes, contiguous: it gets 1 for each weight that is kept."""
    batch, heads, n_q, n_k = keep.shape
    config = Config(32, 64)
    programs = batch * heads * -(-n_q // config.block_m) * -(-n_k // config.block_n)
    return Call(keep_kernel, programs, (keep, dropout, heads, n_q, n_k, config.block_m, config.block_n), config)


def _programs(problem: Problem, heads: int, rows: int, block: int) -> int:
    return math.prod(problem.batch) * heads * -(-rows // block)


def example_call(kernel: str, problem: Problem, config: Config, residual: bool = True) -> Call:
    """A call of this kernel on tensors without data: what `lens` compiles, with the very arguments of a real launch."""
    q, k, v = problem.tensors("meta")
    o = q.new_empty(*q.shape[:-1], problem.dv)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    kept = torch.empty_like(o) if residual and problem.dtype.itemsize == 2 else None
    pairs = q.new_empty(*q.shape[:-1], problem.n_k, dtype=problem.bias or torch.bool)
    excess = (lse,) if problem.bias else ()
    lengths = q.new_empty(problem.batch, dtype=torch.int32) if problem.lengths else None
    tiles = [-(-n // TILE) for n in (problem.n_q, problem.n_k)]
    lists = [q.new_empty(*q.shape[:-2], rows, 2 + cols, dtype=torch.int32) for rows, cols in (tiles, tiles[::-1])]
    inputs = Inputs(q, k, v, pairs if problem.bias else None, pairs.to(torch.bool) if problem.masked else None,
                    *lists if problem.mapped else (None, None), q.new_empty(1, dtype=torch.int64), lengths,
                    dropout_p=0.5 * problem.dropout)
    queries = Queries(q, o, lse, lse, excess)
    return {
        "forward": lambda: forward_call(problem, config, inputs, Results(o, lse, () if kept is None else (kept,), excess)),
        "delta": lambda: delta_call(problem, config, o, kept, o, None, lse),
        "dq": lambda: dq_call(problem, config, inputs, queries, q),
        "dkdv": lambda: dkdv_call(problem, config, inputs, queries, k, v),
        "dbias": lambda: dbias_call(problem, config, inputs, queries, pairs),
    }[kernel]()
