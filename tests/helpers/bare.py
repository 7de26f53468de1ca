"""The kernels with everything cut out that plain attention does not need, to be compared with those that ship."""

import re

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tritonattn import Problem, gpu
from tritonattn.analysis import compile_report, sass
from tritonattn.configs import lookup
from tritonattn.kernels import backward, forward, softmax
from tritonattn.kernels.scores import ScoreMods
from tritonattn.kernels.tile import dot_t
from tritonattn.kernels.window import needs_mask, window_bounds, window_mask


@triton.jit
def bare_scores(a, b, row, col, n, scoring, static, MODE: tl.constexpr):
    s = dot_t(a, b, static)
    if needs_mask(MODE):
        rows, cols = row + tl.arange(0, s.shape[0]), col + tl.arange(0, s.shape[1])
        s = tl.where(window_mask(scoring.window, rows, cols, n), s, float("-inf"))
    return s


@triton.jit
def bare_select_head(pairs, batches, batch, head, first, rows, shift):
    return ScoreMods((), (), (), ())


@triton.jit
def bare_loop_bounds(block_list, window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    return window_bounds(window, first, n, ROWS, COLS)


@triton.jit
def bare_block_start(block_list, step):
    return step


@triton.jit
def bare_apply_keep_mask(x, row, col, scoring, TRANSPOSED: tl.constexpr):
    return x


@triton.jit
def bare_apply_keep_scale(tile, scoring):
    return tile


@triton.jit
def bare_sizes_of_batch(shape, batch):
    return shape


def binaries() -> dict:
    """The instructions of plain kernels, by name."""
    found = {}
    for arch in ("sm_80", "sm_90"):
        for kernel in ("forward", "dq", "dkdv"):
            for mask, window in (("full", (None, None)), ("causal", (None, 0))):
                problem = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16, window)
                compiled = compile_report.compile_kernel(kernel, problem, lookup.get_config(kernel, problem, gpu.KNOWN[arch]), gpu.KNOWN[arch])
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
    compile_report._compile_cached.cache_clear()
    again = binaries()
    return {name: (shipped[name] == again[name], len(shipped[name]), len(again[name])) for name in shipped}
