"""Every kernel compiles for every GPU, without one: it fits, does not spill in its loop, and has no mask where none is.

Each GPU is compiled for in a process of its own, since here the kernels are interpreted.
"""

import pytest

from tests.test_lens import compiled
from tritonattn.gpu import KNOWN

SURVEY = """
import dataclasses, itertools, json, torch
from concurrent.futures import ThreadPoolExecutor
from tritonattn import Problem, config, gpu, lens
gpu = gpu.KNOWN[{arch!r}]
windows = {{"full": (None, None), "causal": (None, 0), "window": (100, 0)}}
def inspect(cell):
    kernel, dtype, d, dv, window, group, n = cell
    problem = Problem((2,), 8, 8 // group, n, n, d, dv, getattr(torch, dtype), windows[window])
    report = lens.inspect(kernel, problem, config.rule(kernel, problem, gpu), gpu)
    return dict(cell=cell, fits=report.fits, spills=report.loop_spills, report=str(report), registers=report.registers,
                serialized=report.serialized)
cells = {cells}
with ThreadPoolExecutor(2) as pool:
    print(json.dumps(list(pool.map(inspect, cells))))
"""
KERNELS = ("forward", "dq", "dkdv")
# which of the cells get no spill in the loop, promised: the head sizes that nearly everybody uses
CLEAN = (64, 128)


def survey(arch, cells):
    return compiled(SURVEY.format(arch=arch, cells=cells))


@pytest.mark.parametrize("arch", KNOWN)
def test_the_rule_fits_and_does_not_spill(arch):
    cells = [(kernel, "bfloat16", d, d, window, group, 1024)
             for kernel in KERNELS for d in CLEAN for window, group in (("full", 1), ("causal", 4))]
    cells += [("delta", "bfloat16", 128, 128, "full", 1, 1000), ("forward", "float16", 64, 64, "window", 1, 1000)]
    for row in survey(arch, cells):
        assert row["fits"], row
        assert row["spills"] == 0 and row["registers"] > 8 and not row["serialized"], row


def test_no_product_waits_for_another_on_hopper():
    """Whatever the mask: the last stretch is not pipelined, which else would serialize all of them."""
    masks = [("full", 1000), ("causal", 1000), ("window", 1024), ("window", 1000)]
    cells = [(kernel, dtype, d, d, mask, 1, n) for kernel in KERNELS for dtype, d in (("bfloat16", 64), ("float16", 128))
             for mask, n in masks]
    for row in survey("sm_90", cells):
        assert not row["serialized"], row


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_the_rule_fits_at_every_width(arch):
    cells = [(kernel, "bfloat16", d, d, "causal", 4, 1000) for kernel in KERNELS for d in (96, 192, 256, 512)]
    cells += [(kernel, "float16", d, dv, "window", 1, 1000) for kernel in KERNELS for d, dv in ((1, 8), (17, 1), (129, 33))]
    # without tensor cores a wide float32 tile takes long to compile: only where memory is short
    widths = (64, 256) if arch in ("sm_86", "gfx942") else (64,)
    cells += [(kernel, "float32", d, d, "causal", 1, 1000) for kernel in KERNELS for d in widths]
    cells += [("delta", "float32", 512, 512, "full", 1, 1000)]
    for row in survey(arch, cells):
        assert row["fits"] and row["registers"] > 8, row


MASKS = r"""
import json, re, torch
from tritonattn import Problem, config, gpu, lens
hopper = gpu.KNOWN["sm_90"]
def selects(window, n):
    found = {}
    for kernel in ("forward", "dq", "dkdv"):
        problem = Problem((2,), 8, 8, n, n, 64, 64, torch.bfloat16, window)
        chosen = config.rule(kernel, problem, hopper)
        text = lens.compile(kernel, problem, chosen, hopper).asm["ttir"]
        tile = {f"{chosen.block_m}x{chosen.block_n}", f"{chosen.block_n}x{chosen.block_m}"}
        loops = re.findall(r"scf\.for.*?scf\.yield", text, re.S)
        mask = re.compile(rf"arith\.(?:select|cmp[if]).*tensor<(?:{'|'.join(tile)})x")
        found[kernel] = [len(mask.findall(loop)) for loop in loops]
    return found
print(json.dumps({"full": selects((None, None), 1024), "ragged": selects((None, None), 1000),
                  "causal": selects((None, 0), 1024)}))
"""


def test_the_full_stretch_has_no_mask():
    """In Triton's own form of the code: compares and selects of the size of a tile of scores, loop by loop."""
    found = compiled(MASKS)
    for kernel in KERNELS:
        assert found["full"][kernel] == [0], f"{kernel}: full attention has one loop, without a mask"
        full, edge = found["ragged"][kernel]
        assert full == 0 and edge > 0, f"{kernel}: only the last tile of a ragged length has a mask"
        loops = found["causal"][kernel]
        assert 0 in loops and max(loops) > 0, f"{kernel}: causal has a loop without a mask and one with it"


PRODUCTS = r"""
import json, re, tempfile, torch
from tritonattn import Config, Problem, gpu, lens
def work(d):
    problem = Problem((2,), 8, 8, 1024, 1024, d, d, torch.bfloat16)
    binary = lens.compile("forward", problem, Config(128, 64, 8, 2), gpu.KNOWN["sm_90"])
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary.asm["cubin"])
        file.flush()
        loop, = lens.tile_loops(lens._tool("nvdisasm", "-c", file.name))
    products = re.findall(r"HGMMA\.(\d+)x(\d+)x(\d+)", loop)
    return sum(int(m) * int(n) * int(k) for m, n, k in products), binary.metadata.shared
print(json.dumps([work(d) for d in (64, 72, 96, 128)]))
"""


def test_a_head_of_96_is_not_computed_as_128():
    """Two parts, 64 + 32, take three quarters of the products and of the shared memory; 72 takes 64 + 16."""
    (of_64, _), (of_72, _), (of_96, shared_96), (of_128, shared_128) = compiled(PRODUCTS)
    assert of_64 * 2 == of_128 and of_72 * 8 == of_128 * 5
    assert of_96 * 4 == of_128 * 3 and shared_96 * 4 == shared_128 * 3


PAIRS = """
import dataclasses, itertools, json, torch
from tritonattn import Problem, config, gpu, lens
gpu = gpu.KNOWN[{arch!r}]
given = dict(bias=dict(bias=torch.float32), mask=dict(masked=True), dropout=dict(dropout=True), lengths=dict(lengths=True))
given["all"] = {{name: value for options in given.values() for name, value in options.items()}}
found = []
for kernel, d, name in itertools.product({kernels}, {sizes}, {names}):
    if kernel != "dbias" or "bias" in given[name]:
        problem = Problem((2,), 8, 2, 1000, 1000, d, d, torch.bfloat16, (None, 0), **given[name])
        report = lens.inspect(kernel, problem, config.rule(kernel, problem, gpu), gpu)
        found.append(dict(cell=[kernel, d, name], fits=report.fits, spills=report.loop_spills, report=str(report)))
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_what_is_given_for_each_pair_fits_and_spills_little(arch):
    """At head size 64 nothing spills in the loop but with everything at once; larger heads fit, and are right, not fast."""
    kernels = ("forward", "dq", "dkdv", "dbias")
    for row in compiled(PAIRS.format(arch=arch, kernels=kernels, sizes=(64,), names=("bias", "mask", "dropout", "lengths"))):
        assert row["fits"] and row["spills"] == 0, row
    for row in compiled(PAIRS.format(arch=arch, kernels=kernels, sizes=(128, 256), names=("all",))):
        assert row["fits"], row


MAPPED = """
import json, torch
from tritonattn import Problem, config, gpu, lens
gpu = gpu.KNOWN[{arch!r}]
found = []
for kernel in ("forward", "dq", "dkdv"):
    for others in ({{}}, dict(lengths=True), dict(window=(100, 0))):
        problem = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16, masked=True, mapped=True, **others)
        report = lens.inspect(kernel, problem, config.rule(kernel, problem, gpu), gpu)
        found.append(dict(kernel=kernel, fits=report.fits, spills=report.loop_spills, report=str(report)))
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", KNOWN)
def test_a_map_of_tiles_costs_no_spill(arch):
    for row in compiled(MAPPED.format(arch=arch)):
        assert row["fits"] and row["spills"] == 0, row


def test_variants_that_are_not_used_leave_no_trace():
    """Plain attention, instruction by instruction, is what it is with every variant cut out of the kernels' source."""
    # not as a part of the tests, which would have the kernels interpreted
    found = compiled("import json, sys; sys.path.append('tests'); import bare; print(json.dumps(bare.compare()))")
    for cell, (same, ours, bare) in found.items():
        assert same and ours > 100, f"{cell}: {ours} instructions, {bare} without the variants"
