"""The kernels with everything cut out that plain attention does not need, to be compared with those that ship."""

import re

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tritonattn import Problem, config, gpu
from tritonattn.analysis import compile_report, sass
from tritonattn.kernels import backward, forward, softmax
from tritonattn.kernels.scores import Pairs
from tritonattn.kernels.tile import inner
from tritonattn.kernels.window import bounded, spans, visible


@triton.jit
def bare_scores(a, b, row, col, n, scoring, static, MODE: tl.constexpr):
    s = inner(a, b, static)
    if bounded(MODE):
        rows, cols = row + tl.arange(0, s.shape[0]), col + tl.arange(0, s.shape[1])
        s = tl.where(visible(scoring.window, rows, cols, n), s, float("-inf"))
    return s


@triton.jit
def bare_at_head(pairs, batches, batch, head, first, rows, shift):
    return Pairs((), (), (), ())


@triton.jit
def bare_stretches(listing, window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    return spans(window, first, n, ROWS, COLS)


@triton.jit
def bare_place(listing, step):
    return step


@triton.jit
def bare_dropped(x, row, col, scoring, TRANSPOSED: tl.constexpr):
    return x


@triton.jit
def bare_gained(tile, scoring):
    return tile


@triton.jit
def bare_shape_of(shape, batch):
    return shape


def binaries() -> dict:
    """The instructions of plain kernels, by name."""
    found = {}
    for arch in ("sm_80", "sm_90"):
        for kernel in ("forward", "dq", "dkdv"):
            for mask, window in (("full", (None, None)), ("causal", (None, 0))):
                problem = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16, window)
                compiled = compile_report.compile(kernel, problem, config.find(kernel, problem, gpu.KNOWN[arch]), gpu.KNOWN[arch])
                code = sass.disassemble(compiled.asm["cubin"])
                found[f"{arch} {kernel} {mask}"] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code)
    return found


def compare() -> dict:
    """For each plain kernel: whether it is the same to the instruction, and how many there are with and without."""
    shipped = binaries()
    bare = {name.removeprefix("bare_"): value for name, value in globals().items() if name.startswith("bare_")}
    replaced = set()
    for module in (forward, backward, softmax):
        for name in bare.keys() & vars(module).keys():
            setattr(module, name, bare[name])
            replaced.add(name)
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                # it remembers what it called when its source was hashed
                value.hash = None
                value.used_global_vals.clear()
    assert replaced == bare.keys(), f"nobody calls {bare.keys() - replaced}"
    compile_report._compile.cache_clear()
    again = binaries()
    return {name: (shipped[name] == again[name], len(shipped[name]), len(again[name])) for name in shipped}
