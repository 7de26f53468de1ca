"""From a problem, a config and tensors to a grid and kernel arguments; the only place that starts kernels."""

import contextlib
import math
from typing import NamedTuple

import torch
import triton.language as tl

from .config import Config
from .gpu import INTERPRETED
from .kernels import backward, forward
from .kernels.scores import LOG2E, Scoring
from .kernels.tile import Shape, Static, Strides, Tensor
from .kernels.window import Window, mirror
from .problem import Problem

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
        call.kernel[(call.programs,)](*call.arguments, num_warps=call.config.num_warps, num_stages=call.config.num_stages)


def on(device: torch.device):
    """Make this device the current one: Triton launches there, wherever its tensors are."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def forward_call(problem: Problem, config: Config, scale: float, q, k, v, o, residual, lse) -> Call:
    """`residual` may be None: nothing is kept of what rounding takes from o."""
    tensors = arguments(problem, config, q, k, v, o, residual, lse)
    static = _static(problem, config, problem.n_k % config.block_n != 0)
    programs = _programs(problem, problem.heads, problem.n_q, config.block_m)
    scoring = _scoring(scale, Window(*problem.window))
    return Call(forward.forward_kernel, programs, (*tensors, scoring, static), config)


def delta_call(problem: Problem, config: Config, o, residual, do, dlse, delta) -> Call:
    """`residual` and `dlse` may be None."""
    tensors = arguments(problem, config, o, residual, do, dlse, delta)
    programs = _programs(problem, problem.heads, problem.n_q, config.block_m)
    static = _static(problem, config, False)
    return Call(backward.delta_kernel, programs, (*tensors, static), config)


def dq_call(problem: Problem, config: Config, scale: float, q, k, v, do, dq, lse, delta) -> Call:
    tensors = arguments(problem, config, q, k, v, do, dq, lse, delta)
    static = _static(problem, config, problem.n_k % config.block_n != 0)
    programs = _programs(problem, problem.heads, problem.n_q, config.block_m)
    scoring = _scoring(scale, Window(*problem.window))
    return Call(backward.dq_kernel, programs, (*tensors, scoring, static), config)


def dkdv_call(problem: Problem, config: Config, scale: float, q, k, v, do, dk, dv, lse, delta) -> Call:
    """`dk` or `dv` may be None: it is then not computed. `delta` is needed only for dk."""
    tensors = arguments(problem, config, q, k, v, do, dk, dv, lse, delta)
    static = _static(problem, config, problem.n_q % config.block_m != 0)
    static = static._replace(OUT=tl.constexpr("dv" if dk is None else "dk" if dv is None else "both"))
    programs = _programs(problem, problem.kv_heads, problem.n_k, config.block_n)
    scoring = _scoring(scale, mirror(Window(*problem.window)))
    return Call(backward.dkdv_kernel, programs, (*tensors, scoring, static), config)


def arguments(problem: Problem, config: Config, *tensors) -> tuple:
    """The tensors as the kernels take them (None stays None), and the Shape they share.

    Batch dimensions that lie behind one another in every tensor become one; most often one is left.
    """
    rank = len(problem.batch)
    present = [x for x in tensors if x is not None]
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
    records = iter([_record(x, rank, [strides[i] for _, strides in merged], block) for i, x in enumerate(present)])
    shape = Shape(tuple(size for size, _ in merged), problem.heads, problem.n_q, problem.n_k, problem.shift)
    return *(None if x is None else next(records) for x in tensors), shape


def _record(x, rank, batch_strides, block) -> Tensor:
    """A tensor as the kernels take it. Statistics of rows have no column axis."""
    head, row, col = x.stride()[rank:] if x.dim() == rank + 3 else (*x.stride()[rank:], 0)
    width = x.shape[-1] if x.dim() == rank + 3 else 1
    wide = block * abs(row) + 2 * width * abs(col) >= 2**31
    return Tensor(x, Strides(tuple(batch_strides), head, row, col), tl.constexpr(wide))


def _static(problem: Problem, config: Config, ragged: bool) -> Static:
    # what torch.set_float32_matmul_precision sets, also where the newer fp32_precision was used
    tf32 = problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    values = (problem.d, problem.dv, problem.group, config.block_m, config.block_n, ragged, ACC[problem.dtype],
              "tf32" if tf32 else "ieee")
    return Static(*map(tl.constexpr, values))


def _scoring(scale: float, window: Window) -> Scoring:
    # what float32 holds only as a subnormal number is 0 here: -inf * 0 would be nan
    size = abs(scale) if abs(scale) >= 2.0**-126 else 0.0
    sign = (None if scale > 0 else -1.0) if size else 0.0
    return Scoring((size or 1.0) * LOG2E.value, sign, window)


def _programs(problem: Problem, heads: int, rows: int, block: int) -> int:
    return math.prod(problem.batch) * heads * -(-rows // block)


def example_call(kernel: str, problem: Problem, config: Config, residual: bool = True) -> Call:
    """A call of this kernel on tensors without data: what `lens` compiles, with the very arguments of a real launch."""
    q, k, v = problem.tensors("meta")
    o = q.new_empty(*q.shape[:-1], problem.dv)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    kept = torch.empty_like(o) if residual and problem.dtype.itemsize == 2 else None
    return {
        "forward": lambda: forward_call(problem, config, 1.0, q, k, v, o, kept, lse),
        "delta": lambda: delta_call(problem, config, o, kept, o, None, lse),
        "dq": lambda: dq_call(problem, config, 1.0, q, k, v, o, q, lse, lse),
        "dkdv": lambda: dkdv_call(problem, config, 1.0, q, k, v, o, k, v, lse, lse),
    }[kernel]()
