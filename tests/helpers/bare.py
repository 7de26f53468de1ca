"""Kernels without the variants (bias, mask, softcap, sink, ...), to compare their binaries with the shipped ones.

A function bare_NAME replaces the function NAME in every kernels module that calls it.
"""

import itertools
import re

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tritonattn import Problem, gpu
from tritonattn.analysis import compile_report, sass
from tritonattn.configs import lookup
from tritonattn.kernels import backward, forward, scores, softmax
from tritonattn.kernels.scores import ScoreMods
from tritonattn.kernels.tile import Sizes, head_view, padded_rows
from tritonattn.kernels.window import needs_mask, window_bounds, window_mask


@triton.jit
def bare_load_modifiers(row, col, n, M: tl.constexpr, N: tl.constexpr, scoring, MODE: tl.constexpr):
    return (), (), ()


@triton.jit
def bare_modify(s, modifiers, row, col, n, scoring, static, MODE: tl.constexpr):
    if needs_mask(MODE):
        rows, cols = row + tl.arange(0, s.shape[0]), col + tl.arange(0, s.shape[1])
        s = tl.where(window_mask(scoring.window, rows, cols, n), s, float("-inf"))
    return s


@triton.jit
def bare_scale_and_cap(product, scoring, dtype: tl.constexpr):
    return product


@triton.jit
def bare_exponent(s, minus_m, scoring, dtype: tl.constexpr):
    return tl.fma(s, scoring.exp2_scale, minus_m)


@triton.jit
def bare_select_head(mods, sizes, batch, head, first, rows, shift, static):
    return ScoreMods((), (), (), (), (), (), (), (), (), ())


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
def bare_add_entropy_and_mass_grad(dp, log2_p, queries, first_key, TRANSPOSED: tl.constexpr):
    return dp


@triton.jit
def bare_sizes_of_batch(leading, n_q, n_k, shift, batch):
    return Sizes(leading.batches, leading.heads, n_q, n_k, n_k, shift, leading.key_lengths, ())


@triton.jit
def bare_tile_head_batch(leading, heads, n, BLOCK: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    tiles = tl.cdiv(n, BLOCK)
    tile = tl.program_id(0) % tiles
    if REVERSE:
        tile = tiles - 1 - tile
    head = tl.program_id(0) // tiles
    return tile * BLOCK, head % heads, head // heads


@triton.jit
def bare_keys_to_attend(sizes, first):
    return sizes.n_k


@triton.jit
def bare_query_view(x, sizes, batch, head):
    return head_view(x, sizes.batches, batch, head, sizes.n_q)


@triton.jit
def bare_key_view(x, sizes, batch, head, rows):
    return head_view(x, sizes.batches, batch, head, rows)


@triton.jit
def bare_lse_view(x, sizes, batch, head):
    return x + (tl.cast(batch, tl.int64) * sizes.heads + head) * sizes.n_q


@triton.jit
def bare_statistics_view(x, sizes, batch, head, COUNT: tl.constexpr):
    return x + (tl.cast(batch, tl.int64) * sizes.heads + head) * COUNT * padded_rows(sizes.n_q)


@triton.jit
def bare_statistics_of_head(sizes):
    return padded_rows(sizes.n_q)


def binaries() -> dict:
    """Return {name: instructions} of kernels for plain attention."""
    code = {}
    masks = {"full": (None, None), "causal": (None, 0)}
    for arch, kernel, mask in itertools.product(("sm_80", "sm_90"), ("forward", "dq", "dkdv"), masks):
        problem = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16, masks[mask])
        config = lookup.get_config(kernel, problem, gpu.KNOWN[arch])
        binary = compile_report.compile_kernel(kernel, problem, config, gpu.KNOWN[arch]).asm["cubin"]
        code[f"{arch} {kernel} {mask}"] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass.disassemble(binary))
    return code


def compare() -> dict:
    """Return {name: (identical, instructions with the variants, instructions without)}."""
    shipped = binaries()
    bare = {name.removeprefix("bare_"): value for name, value in globals().items() if name.startswith("bare_")}
    replaced = set()
    for module in (forward, backward, scores, softmax):
        for name in bare.keys() & vars(module).keys():
            setattr(module, name, bare[name])
            replaced.add(name)
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                # forget the functions that it called when its source was hashed
                value.hash = None
                value.used_global_vals.clear()
    assert replaced == bare.keys(), f"bare functions without a caller: {bare.keys() - replaced}"
    compile_report._compile_cached.cache_clear()
    plain = binaries()
    return {name: (shipped[name] == plain[name], len(shipped[name]), len(plain[name])) for name in shipped}
