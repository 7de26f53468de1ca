"""From a problem, a config and tensors to a grid and kernel arguments. The only file that launches kernels."""

import contextlib
import math
from typing import NamedTuple

import torch
import triton.language as tl

from ..block_mask import TILE
from ..config import Config
from ..gpu import INTERPRETED
from ..kernels import backward, diagonals, forward
from ..kernels.backward import AxisSizes, BiasGrad, Queries
from ..kernels.dropout import Dropout, keep_kernel
from ..kernels.forward import Keys, Outputs
from ..kernels.functions import evaluate_kernel, mask_kernel
from ..kernels.mass import key_mass_kernel, map_kernel, mass_delta_kernel
from ..kernels.packed import Packed, encoded
from ..kernels.scores import LOG2E, MaskArguments, Relative, ScoreMods, ScoreParams
from ..kernels.tile import Constexprs, Leading, Strides, Tensor
from ..kernels.window import Window, transpose_window
from ..problem import Problem
from ..score_function import functions_named
from .arguments import AttentionInputs, empty_statistics, score_scale

if INTERPRETED:
    from . import interpreter

PASSES = ("dv", "dk")  # of dK/dV in two passes, in the order of the grid
RELATIVE_ENTRIES = 257  # of the table of relative positions in an example: those of T5
ANY_BATCH = 2**30 + 1  # larger than any number of batches
ACC = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64}


class KernelLaunch(NamedTuple):
    """A kernel, its number of programs in each pass, its arguments and its config."""

    kernel: object
    programs: int
    arguments: tuple
    config: Config
    passes: int = 1


def run(call: KernelLaunch, device: torch.device):
    """Launch the kernel on the tensors' device, on its current stream, and return it as Triton compiled it.

    Returns None in the interpreter, and where there is nothing to do.
    """
    if call.programs == 0:
        return None
    with device_guard(device), interpreter.patched() if INTERPRETED else contextlib.nullcontext():
        return call.kernel[(call.programs, call.passes)](*call.arguments, **compile_options(call.config))


def compile_options(config: Config) -> dict:
    """Return the compiler's options. Fused multiply-adds are on, whatever Triton's default is."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def device_guard(device: torch.device):
    """Return a context in which this device is current: Triton launches there, wherever the tensors are."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def forward_launch(problem: Problem, config: Config, inputs: AttentionInputs, results: Outputs) -> KernelLaunch:
    """Return the launch that writes `results`, the tensors in the kernel's record; an empty o_residual is not written."""
    strided = results._replace(lse=None, statistics=None, row_max=(), entropy=())
    sink = _of_heads(problem, inputs.sink)
    q, keys, outputs, sink, *others = kernel_arguments(problem, config, inputs.q, Keys(inputs.k, inputs.v), strided, sink,
                                                       _score_mods(problem, inputs))
    outputs = outputs._replace(lse=results.lse, statistics=results.statistics, row_max=results.row_max, entropy=results.entropy)
    records = q, keys, outputs, *others
    programs = _tiles_of_queries(problem, config, inputs)
    *others, scoring, static = _arguments(problem, inputs, records, _over_keys(problem, config))
    arguments = *others, scoring._replace(mods=scoring.mods._replace(sink=sink)), static
    return KernelLaunch(forward.forward_kernel, programs, arguments, config)


def delta_launch(problem: Problem, config: Config, inputs: AttentionInputs, outputs: tuple, delta) -> KernelLaunch:
    """Return the launch that writes delta. `outputs` are o, o_residual, do and row_terms; the second and last may be None."""
    *strided, row_terms = outputs
    *records, leading = kernel_arguments(problem, config, *strided)
    leading = _with_packed(leading, inputs)
    arguments = (*records, row_terms, delta, problem.n_q, leading, _constexprs(problem, config))
    return KernelLaunch(backward.delta_kernel, _tiles_of_queries(problem, config, inputs), arguments, config)


def dq_launch(problem: Problem, config: Config, inputs: AttentionInputs, queries: Queries, dq) -> KernelLaunch:
    """Return the launch that writes dq. `queries` holds tensors."""
    records = _backward_arguments(problem, config, queries, Keys(inputs.k, inputs.v), dq, _score_mods(problem, inputs))
    arguments = _arguments(problem, inputs, records, _over_keys(problem, config))
    return KernelLaunch(backward.dq_kernel, _tiles_of_queries(problem, config, inputs), arguments, config)


def dkdv_launch(problem: Problem, config: Config, inputs: AttentionInputs, queries: Queries, dk, dv) -> KernelLaunch:
    """Return the launch that writes dk and dv; one of them may be None. `queries.delta` is needed only for dk."""
    mods = _transposed_mods(problem, inputs)
    records = _backward_arguments(problem, config, queries, Keys(inputs.k, inputs.v), Keys(dk, dv), mods)
    static = _over_queries(problem, config)
    if dk is None or dv is None:
        passes = ("dv" if dk is None else "dk",)
    else:
        passes = PASSES if config.two_passes else ("both",)
    static, *static_dk = (static._replace(GRADS=tl.constexpr(grads)) for grads in passes)
    programs = _grid(problem, problem.kv_heads, problem.n_k, inputs.k.shape[-2], config.block_n)
    *others, static = _arguments(problem, inputs, records, static, transposed=True)
    arguments = *others, len(passes), static_dk[0] if static_dk else None, static
    return KernelLaunch(backward.dkdv_kernel, programs, arguments, config, len(passes))


def dbias_launch(problem: Problem, config: Config, inputs: AttentionInputs, queries: Queries, dbias) -> KernelLaunch:
    """Return the launch that writes dbias: of the shape of the bias, but with a row for each query if it has one column."""
    target, mods = _expanded(problem, dbias), _score_mods(problem, inputs)._replace(block_list=())
    *records, target, mods, leading = _backward_arguments(problem, config, queries, Keys(inputs.k, inputs.v), target, mods)
    own = tuple(1 if stride == 0 else size for stride, size in zip(target.strides.batch, leading.batches))
    own_axes = AxisSizes(own, dbias.shape[-3])
    reduced_axes = AxisSizes(tuple(size // part for size, part in zip(leading.batches, own)), problem.heads // dbias.shape[-3])
    rows, cols = dbias.shape[-2:]
    grads = "queries" if cols == 1 < problem.n_k else "keys" if rows == 1 else "pairs"
    static = _constexprs(problem, config)._replace(GRADS=tl.constexpr(grads))
    programs = math.prod(own) * own_axes.heads * -(-rows // config.block_m) * -(-cols // config.block_n)
    records += BiasGrad(target, own_axes, reduced_axes), mods, leading
    *others, scoring, static = _arguments(problem, inputs, records, static)
    arguments = (*others, scoring._replace(ds_scale=None), static)  # dbias is dS itself
    return KernelLaunch(backward.dbias_kernel, programs, arguments, config)


def diagonals_launch(problem: Problem, config: Config, inputs: AttentionInputs, queries: Queries, sums) -> KernelLaunch:
    """Return the launch that writes the sums of dS along its diagonals (kernels/diagonals.py), [..., H, n_q + n_k].

    Raises RuntimeError where the queries and keys together are too many for numbers of 32 bits.
    """
    if sums.shape[-1] >= 2**31 - config.block_n:
        raise RuntimeError(f"alibi, relative: expected at most {2**31 - config.block_n - 1} queries and keys together where a "
                           f"gradient is needed, got {sums.shape[-1]}")
    mods = _score_mods(problem, inputs)._replace(block_list=())
    *records, mods, leading = _backward_arguments(problem, config, queries, Keys(inputs.k, inputs.v), mods)
    records = *records, sums, mods, leading
    *others, scoring, static = _arguments(problem, inputs, records, _constexprs(problem, config))
    arguments = (*others, scoring._replace(ds_scale=None), static)  # as in dbias
    programs = _grid(problem, problem.heads, sums.shape[-1], sums.shape[-1], config.block_n // 2)
    return KernelLaunch(diagonals.diagonals_kernel, programs, arguments, config)


def key_mass_launch(problem: Problem, config: Config, inputs: AttentionInputs, statistics, mass) -> KernelLaunch:
    """Return the launch that writes the mass of each key, [..., H, S], from the statistics of a forward pass."""
    q, k, mods, leading = kernel_arguments(problem, config, inputs.q, inputs.k, _transposed_mods(problem, inputs))
    records = q, statistics, k, mass, mods, leading
    arguments = _arguments(problem, inputs, records, _over_queries(problem, config), transposed=True)
    programs = _grid(problem, problem.heads, problem.n_k, inputs.k.shape[-2], config.block_n)
    return KernelLaunch(key_mass_kernel, programs, arguments, config)


def mass_delta_launch(problem: Problem, config: Config, inputs: AttentionInputs, queries: Queries) -> KernelLaunch:
    """Return the launch that adds to delta what the cotangents of the key masses, queries.d_mass, contribute."""
    q, k, mods, leading = kernel_arguments(problem, config, inputs.q, inputs.k, _score_mods(problem, inputs))
    records = q, queries.statistics, k, *queries.d_mass, queries.delta, mods, leading
    arguments = _arguments(problem, inputs, records, _over_keys(problem, config))
    return KernelLaunch(mass_delta_kernel, _tiles_of_queries(problem, config, inputs), arguments, config)


def map_launch(problem: Problem, block: int, inputs: AttentionInputs, statistics, tiles) -> KernelLaunch:
    """Return the launch that writes the sums of the weights over tiles of block x block pairs, those in the window and mask."""
    config = Config(block, block, 4, 1)
    q, k, mods, leading = kernel_arguments(problem, config, inputs.q, inputs.k, _score_mods(problem, inputs))
    arguments = _arguments(problem, inputs, (q, statistics, k, tiles, mods, leading), _over_keys(problem, config))
    return KernelLaunch(map_kernel, _tiles_of_queries(problem, config, inputs), arguments, config)


def _backward_arguments(problem: Problem, config: Config, queries: Queries, *tensors) -> tuple:
    """Return the `kernel_arguments` of queries and other tensors. Numbers of rows are dense, and have no strides: these would
    depend on the lengths, and so would the binary."""
    dense = {name: getattr(queries, name) for name in ("statistics", "delta", "d_entropy", "d_mass")}
    strided = queries._replace(statistics=None, delta=None, d_entropy=(), d_mass=())
    records, *others = kernel_arguments(problem, config, strided, *tensors)
    return records._replace(**dense), *others


def _arguments(problem: Problem, inputs: AttentionInputs, records, static: Constexprs, transposed: bool = False) -> tuple:
    """Return the arguments of a kernel that computes scores, from those of `kernel_arguments`, the last of which are mods.

    transposed: rows of the scores are keys.
    """
    *records, mods, leading = records
    if inputs.key_lengths is not None:
        leading = leading._replace(key_lengths=(inputs.key_lengths, int(inputs.bottom_right)))
    leading = _with_packed(leading, inputs)
    if mods.relative:
        radius = encoded(inputs.relative.shape[-1] // 2)
        mods = mods._replace(relative=(Relative(mods.relative[0], -1 if transposed else 1, radius),))
    window = Window(*problem.window)
    scoring = _score_params(inputs, transpose_window(window) if transposed else window, mods)
    return *records, problem.n_q, problem.n_k, problem.shift, leading, scoring, static


def _with_packed(leading: Leading, inputs: AttentionInputs) -> Leading:
    """Return a Leading with the packed sequences of these inputs, if there are any."""
    if inputs.q_starts is None:
        return leading
    totals = encoded(inputs.q.shape[-2]), encoded(inputs.k.shape[-2])
    packed = Packed(inputs.q_starts, totals[0], inputs.k_starts, totals[1], encoded(inputs.q_starts.shape[0] - 1),
                    int(inputs.bottom_right))
    # the index of a sequence is the index of its bias and mask; as a size, the number of sequences would be specialized
    return leading._replace(batches=(ANY_BATCH,), packed=(packed,))


def _over_keys(problem: Problem, config: Config) -> Constexprs:
    """Return the constants of a loop over keys. With key lengths, any tile may be the last one, and partial."""
    ragged = (problem.lengths or problem.packed is not None
              or problem.n_k % _loop_granularity(problem, config, config.block_n) != 0)
    return _constexprs(problem, config, ragged, loop_modes(problem, config, problem.window, ragged))


def _over_queries(problem: Problem, config: Config) -> Constexprs:
    """Return the constants of a loop over queries, whose window is the transposed one."""
    ragged = problem.packed is not None or problem.n_q % _loop_granularity(problem, config, config.block_m) != 0
    modes = loop_modes(problem, config, transpose_window(Window(*problem.window)), ragged)
    return _constexprs(problem, config, ragged, modes)._replace(TRANSPOSED=tl.constexpr(True))


def _loop_granularity(problem: Problem, config: Config, block: int) -> int:
    """Return the granularity of a loop in steps of `block`: lengths that are multiples of it need no partial tile."""
    if problem.mapped and max(config.block_m, config.block_n) > TILE:
        raise ValueError(f"config: expected blocks of at most {TILE}, the size of a block mask's blocks, got {config}")
    return TILE if problem.mapped else block


def loop_modes(problem: Problem, config: Config, window, ragged: bool) -> tuple:
    """Return the modes of the loop at the left edge, in the middle and at the right edge (kernels/window.py)."""
    left, right = (side is not None for side in window)
    last = "masked_tail" if config.edge_stages == 1 else "masked"
    if problem.mapped:
        # a full block may still reach out of the window, or past the keys of its batch
        biased = problem.bias or problem.relative or problem.score_function
        middle = "masked" if left or right or problem.lengths else "neg_inf" if biased else "unmasked"
        return None, middle, last
    middle = "neg_inf" if may_mask(problem) else "unmasked"
    return "masked" if left else None, middle, last if right or ragged else None


def may_mask(problem: Problem) -> bool:
    """Return whether pairs inside of the window may be masked, or have scores of -inf."""
    return bool(problem.bias or problem.masked or problem.relative or problem.score_function)


def _of_heads(problem: Problem, x) -> tuple:
    """Return a tensor [..., H, 1, n] with the batch of the problem, in a tuple; an empty one for None."""
    return () if x is None else (x.expand(*problem.batch, -1, -1, -1),)


def _expanded(problem: Problem, x):
    """Return a view of the size of the scores."""
    return x.expand(*problem.batch, problem.heads, problem.n_q, problem.n_k)


def _score_mods(problem: Problem, inputs: AttentionInputs) -> ScoreMods:
    """Return biases and mask, expanded, and the block lists; the mask as bytes, which all versions of Triton load alike."""
    mask = () if inputs.mask is None else (_expanded(problem, inputs.mask.view(torch.uint8)),)
    bias = () if inputs.bias is None else (_expanded(problem, inputs.bias),)
    return ScoreMods(bias, mask, (), _block_lists(problem, inputs.kv_blocks), (), _of_heads(problem, inputs.alibi),
                     _of_heads(problem, inputs.relative))


def _transposed_mods(problem: Problem, inputs: AttentionInputs) -> ScoreMods:
    """Return the same for a loop over queries."""
    mods = _score_mods(problem, inputs)
    bias, mask = (tuple(x.mT for x in each) for each in mods[:2])
    return mods._replace(bias=bias, mask=mask, block_list=_block_lists(problem, inputs.q_blocks))


def _block_lists(problem: Problem, lists) -> tuple:
    """Return the lists of blocks of every batch and head."""
    return () if lists is None else (lists.expand(*problem.batch, problem.heads, -1, -1),)


def kernel_arguments(problem: Problem, config: Config, *tensors) -> tuple:
    """Return tensors as the kernels take them, and their Leading. None stays None; tuples of tensors stay tuples.

    Batch dimensions that are contiguous with one another in every tensor are merged; most often one is left.
    """
    rank, present = len(problem.batch), list(flatten(tensors))
    merged = []
    for i in reversed(range(rank)):
        # packed sequences share their tensors, which have a batch of one
        size, strides = problem.batch[i], [x.stride(i) if x.shape[i] > 1 else 0 for x in present]
        if size == 1:
            continue
        if merged and all(outer == inner * merged[-1][0] for outer, inner in zip(strides, merged[-1][1])):
            merged[-1] = (size * merged[-1][0], merged[-1][1])
        else:
            merged.append((size, strides))
    merged = merged or [(1, [0] * len(present))]
    block = max(config.block_m, config.block_n)
    # a kernel loads bias and mask block by block, other tensors in whole rows
    in_blocks = {id(x) for mods in tensors if isinstance(mods, ScoreMods) for x in flatten(mods[:2])}
    records = iter([_record(x, rank, [strides[i] for _, strides in merged], block, block if id(x) in in_blocks else x.shape[-1])
                    for i, x in enumerate(present)])
    return *_map_nested(tensors, records), Leading(tuple(size for size, _ in merged), problem.heads)


def flatten(tensors):
    """Yield the tensors in nested tuples, in order."""
    for x in tensors:
        if isinstance(x, tuple):
            yield from flatten(x)
        elif x is not None:
            yield x


def _map_nested(tensors, records):
    """Return the same nested tuples with records in place of their tensors."""
    return [None if x is None else next(records) if isinstance(x, torch.Tensor) else
            type(x)(*_map_nested(x, records)) if hasattr(x, "_fields") else tuple(_map_nested(x, records)) for x in tensors]


def _record(x, rank, batch_strides, block, width) -> Tensor:
    """Return a tensor as the kernels take it, `block` rows and `width` columns at a time. Row statistics have no columns."""
    head, row, col = x.stride()[rank:] if x.dim() == rank + 3 else (*x.stride()[rank:], 0)
    wide = block * abs(row) + 2 * width * abs(col) >= 2**31
    return Tensor(x, Strides(tuple(batch_strides), head, row, col), tl.constexpr(wide))


def _constexprs(problem: Problem, config: Config, ragged: bool = False, modes: tuple = ()) -> Constexprs:
    # set_float32_matmul_precision changes this setting too
    tf32 = problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    names = [each and each.name for each in (problem.score_function, problem.mask_function)]
    (score, slope), (mask, _) = ((None, None) if name is None else functions_named(name) for name in names)
    # the interpreter has no cache
    codes = tuple(getattr(function, "cache_key", None) for function in (score, slope, mask))
    values = (problem.d, problem.dv, problem.group, config.block_m, config.block_n, ragged, modes, ACC[problem.dtype],
              "tf32" if tf32 else "ieee", config.ahead and problem.n_k > 0, config.mma_sum and problem.dtype.itemsize == 2,
              "both", problem.normalizer, False, may_mask(problem), score, slope, mask, (*names, *codes))
    return Constexprs(*map(tl.constexpr, values))


def _score_params(inputs: AttentionInputs, window: Window, mods: ScoreMods) -> ScoreParams:
    mods = mods._replace(dropout=(dropout_record(inputs.dropout_p, inputs.seed),) if inputs.dropout_p else ())
    if inputs.sigmoid_bias is not None:
        mods = mods._replace(normalizer=(inputs.sigmoid_bias,))
    if inputs.score_function is not None:
        mods = mods._replace(function=(() if inputs.payload is None else (inputs.payload,),))
    if inputs.mask_function is not None:
        payload, (*batch, heads) = () if inputs.mask_payload is None else (inputs.mask_payload,), inputs.kv_blocks.shape[:-2]
        mods = mods._replace(mask_function=(MaskArguments(payload, int(math.prod(batch) > 1), int(heads > 1)),))
    scale, ds_scale = score_scale(inputs.scale), None
    if inputs.q.dtype == torch.float16:
        # near the scale, which dQ gets in the end; not so small that float16 loses more at its lower end
        ds_scale = 2.0 ** min(0, max(-4, round(math.log2(abs(scale or 1.0)))))
    if inputs.softcap is not None:
        return ScoreParams(LOG2E.value, scale / inputs.softcap, ds_scale, inputs.softcap, window, mods)
    if mods.bias or mods.alibi or mods.relative or mods.function:
        return ScoreParams(LOG2E.value, scale, ds_scale, None, window, mods)
    sign = (None if scale > 0 else -1.0) if scale else 0.0
    return ScoreParams((abs(scale) or 1.0) * LOG2E.value, sign, ds_scale, None, window, mods)


def dropout_record(p: float, seed: torch.Tensor) -> Dropout:
    """Return Dropout with p rounded to a multiple of 2^-32. Kept weights are multiplied by 1 / (1 - p), by 0 if p is 1."""
    threshold = min(round(p * 2**32), 2**32 - 1)
    return Dropout(seed, threshold, 2**32 / (2**32 - threshold) if p < 1 else 0.0)


def keep_launch(keep: torch.Tensor, dropout: Dropout) -> KernelLaunch:
    """Return the launch that fills `keep` [batch, heads, n_q, n_k], contiguous bytes: 1 for each weight that is kept."""
    batch, heads, n_q, n_k = keep.shape
    config = Config(32, 64)
    programs = batch * heads * -(-n_q // config.block_m) * -(-n_k // config.block_n)
    return KernelLaunch(keep_kernel, programs, (keep, dropout, heads, n_q, n_k, config.block_m, config.block_n), config)


def evaluate_launch(function, name: str, payload: torch.Tensor | None, scores: torch.Tensor, transposed: bool) -> KernelLaunch:
    """Return the launch that replaces contiguous scores [batch, heads, n_q, n_k] by a `triton.jit` function of them."""
    batch, heads, n_q, n_k = scores.shape
    config = Config(32, 32)
    programs = batch * heads * -(-n_q // config.block_m) * -(-n_k // config.block_m)
    payload = () if payload is None else (payload,)
    arguments = scores, payload, heads, n_q, n_k, function, name, transposed, config.block_m
    return KernelLaunch(evaluate_kernel, programs, arguments, config)


def mask_launch(function, name: str, payload: torch.Tensor | None, mask: torch.Tensor, first: int, n_q: int) -> KernelLaunch:
    """Return the launch that writes a mask function of TILE queries from `first` to bytes [batch, heads, TILE, n_k]."""
    batch, heads, _, n_k = mask.shape
    payload = () if payload is None else (payload,)
    arguments = mask, payload, heads, first, n_q, n_k, function, name, TILE
    return KernelLaunch(mask_kernel, batch * heads * -(-n_k // TILE), arguments, Config(TILE, TILE))


def _tiles_of_queries(problem: Problem, config: Config, inputs: AttentionInputs) -> int:
    """Return the number of programs of a kernel with one for each tile of queries."""
    return _grid(problem, problem.heads, problem.n_q, inputs.q.shape[-2], config.block_m)


def _grid(problem: Problem, heads: int, rows: int, packed_rows: int, block: int) -> int:
    """Return the number of programs with one for each tile of rows; of packed sequences `packed_rows` is their number."""
    if problem.packed is not None:
        return heads * (packed_rows // block + problem.batch[0] + 1)
    return math.prod(problem.batch) * heads * -(-rows // block)


def example_launch(kernel: str, problem: Problem, config: Config, o_residual: bool = True) -> KernelLaunch:
    """Return a launch of this kernel on meta tensors, for `inspect` to compile with the arguments of a real launch."""
    q, k, v = problem.tensors("meta")
    o = q.new_empty(*q.shape[:-1], problem.dv)
    kept = torch.empty_like(o) if o_residual and problem.dtype.itemsize == 2 else None
    mods = q.new_empty(*problem.batch, problem.heads, problem.n_q, problem.n_k, dtype=problem.bias or torch.bool)
    lengths = q.new_empty(problem.batch, dtype=torch.int32) if problem.lengths else None
    tiles = [-(-n // TILE) for n in (problem.n_q, problem.n_k)]
    lists = [q.new_empty(*q.shape[:-2], rows, 2 + cols, dtype=torch.int32) for rows, cols in (tiles, tiles[::-1])]
    of_heads = [q.new_empty(problem.heads, 1, n) if given else None
                for n, given in ((1, problem.sink), (1, problem.alibi), (RELATIVE_ENTRIES, problem.relative))]
    functions = problem.score_function, problem.mask_function
    names = [each and each.name for each in functions]
    starts = [None if problem.packed is None else q.new_empty(problem.batch[0] + 1, dtype=torch.int32) for _ in "qk"]
    inputs = AttentionInputs(q, k, v, mods if problem.bias else None, *of_heads,
                             mods.to(torch.bool) if problem.masked and names[1] is None else None,
                             *lists if problem.mapped else (None, None), *starts,
                             *(each and each.example_payload("meta") for each in functions), q.new_empty(1, dtype=torch.int64),
                             lengths, dropout_p=0.5 * problem.dropout, softcap=30.0 if problem.softcap else None,
                             normalizer=problem.normalizer, score_function=names[0], mask_function=names[1])
    lse, statistics, delta = o[..., 0].float(), empty_statistics(inputs, (2,)), empty_statistics(inputs)
    entropy, mass = (lse,) if problem.entropy else (), lse.new_empty(*q.shape[:-2], k.shape[-2])
    sums = lse.new_empty(*q.shape[:-2], q.shape[-2] + k.shape[-2])
    if problem.normalizer != "softmax":
        kept, lse, statistics, delta = None, (), (), ()
    queries = Queries(q, o, statistics, delta, entropy, (mass,) if problem.key_mass else ())
    return {
        "forward": lambda: forward_launch(problem, config, inputs,
                                          Outputs(o, lse, statistics, () if kept is None else (kept,), (), entropy)),
        "delta": lambda: delta_launch(problem, config, inputs, (o, kept, o, None), delta),
        "dq": lambda: dq_launch(problem, config, inputs, queries, q),
        "dkdv": lambda: dkdv_launch(problem, config, inputs, queries, k, v),
        "dbias": lambda: dbias_launch(problem, config, inputs, queries, mods),
        "diagonals": lambda: diagonals_launch(problem, config, inputs, queries, sums),
        "key_mass": lambda: key_mass_launch(problem, config, inputs, statistics, mass),
        "mass_delta": lambda: mass_delta_launch(problem, config, inputs, queries._replace(d_mass=(mass,))),
    }[kernel]()
