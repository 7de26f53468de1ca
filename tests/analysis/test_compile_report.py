"""Compile reports, on made-up instructions and on kernels compiled by the compile server."""

import dataclasses

import pytest
import torch
import triton

from tests.helpers.compile_server import compiled
from tests.helpers.kernel_reports import A100, B200, H200, MI300X, PLAIN, report
from tritonattn import Config
from tritonattn.analysis import compile_report
from tritonattn.analysis.sass import Loop


@pytest.mark.interpreted
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_report.inspect_kernel("forward", PLAIN, Config(64, 64), H200)


@pytest.mark.parametrize("fields, blocks, limiter", [
    # 65,536 registers: 256 threads with 168 each take 43,008, with 128 each half of them
    ({}, 1, "registers"), ({"registers": 128}, 2, "registers"),
    ({"registers": 255, "config": Config(64, 64, 4)}, 2, "registers"),
    # 228 KB, of which the driver reserves 1 for each block
    ({"registers": 32, "shared_memory": 56 << 10}, 4, "shared memory"),
    ({"registers": 32, "shared_memory": 57 << 10}, 3, "shared memory"),
    ({"registers": 32, "shared_memory": 0}, 8, "warps"),
    ({"registers": 16, "shared_memory": 0, "config": Config(16, 16, 1)}, 32, "blocks"),
    ({"registers": 64, "tensor_memory": 256, "on": B200}, 2, "tensor memory"),
    ({"registers": 64, "shared_memory": 164 << 10, "on": A100}, 0, "shared memory"),
    # AMD: four SIMDs with 512 registers per lane and at most eight waves each
    ({"registers": 255, "on": MI300X, "config": Config(64, 64, 4), "shared_memory": 20 << 10}, 2, "registers"),
    ({"registers": 60, "on": MI300X, "config": Config(64, 64, 4), "shared_memory": 20 << 10}, 3, "shared memory"),
    ({"registers": 60, "on": MI300X, "config": Config(64, 64, 4), "shared_memory": 0}, 8, "warps"),
], ids=str)
def test_occupancy_and_its_limiter(fields, blocks, limiter):
    found = report(**fields)
    assert (found.occupancy, found.occupancy_limiter) == (blocks, limiter), found.blocks_by_resource


def test_duplicated_products_and_exponentials():
    assert report(config=Config(128, 64, 8)).needed == 2 * 128 * 64 * (128 + 128)
    loop = Loop(("HGMMA.64x64x16.F32",) * 8 + ("HGMMA.64x128x16.F32",) * 4 + ("MUFU.EX2",) * 33)
    found = report(config=Config(128, 64, 8), loops=(loop,))
    assert found.duplicated == 1.0 and found.redone == 33 / 32
    assert found.mma_instruction == found.best_mma_instruction == "HGMMA"
    doubled = report(config=Config(64, 64, 8), loops=(loop,))
    assert doubled.duplicated == 2.0 and doubled.redone == 33 / 16
    of_blackwell = report(on=B200, config=Config(128, 64, 8), loops=(Loop(("UTCHMMA",) * 12),))
    assert of_blackwell.duplicated == 1.0
    assert of_blackwell.mma_instruction == of_blackwell.best_mma_instruction == "UTCHMMA"
    tf32 = dataclasses.replace(PLAIN, dtype=torch.float32)
    half = dataclasses.replace(of_blackwell, problem=tf32, precision="tf32", loops=(Loop(("UTCHMMA",) * 24),))
    assert half.duplicated == 1.0 and half.best_mma_instruction == "UTCHMMA", "a TF32 product takes half as much of K"
    assert dataclasses.replace(half, precision="ieee").best_mma_instruction == ""
    of_ampere = report(on=A100, config=Config(128, 64, 8), loops=(Loop(("HMMA.16816.F32.BF16",) * 128),))
    assert of_ampere.duplicated == 1.0 and of_ampere.mma_instruction == of_ampere.best_mma_instruction == "HMMA"


def test_serialized_products_are_detected():
    product, wait = "HGMMA.64x64x16.F32.BF16", "WARPGROUP.DEPBAR.LE"

    def serialized(*instructions):
        return report(loops=(Loop(("MUFU.EX2",)), Loop(instructions))).serialized
    assert serialized(*(product, wait) * 8) and serialized(*(product, wait) * 3), "also where a tile is one or two products"
    assert not serialized(*((product,) * 4 + (wait,)) * 2) and not serialized(product, wait, product, wait)


def test_padding_counts_as_needed_but_not_as_useful():
    odd = dataclasses.replace(report(config=Config(64, 64, 4)), problem=dataclasses.replace(PLAIN, d=17, dv=1))
    assert (odd.needed, odd.useful) == (2 * 64 * 64 * (32 + 16), 2 * 64 * 64 * (17 + 1))


@pytest.mark.parametrize("kernel, products", [("forward", 2), ("dq", 3), ("dkdv", 4), ("dbias", 2), ("delta", 0)])
def test_products_of_each_kernel(kernel, products):
    found = dataclasses.replace(report(config=Config(32, 64, 4)), kernel=kernel)
    assert found.needed == products * 2 * 32 * 64 * 128


def test_padded_head_sizes():
    assert [compile_report.padded(d) for d in (1, 16, 17, 64, 72, 96, 129, 192, 512)] == [16, 16, 32, 64, 80, 96, 144, 192, 512]


IMPORTS = """
import dataclasses, json, torch
from tritonattn import Config, Problem, gpu
from tritonattn.analysis import compile_report, cost_model
problem = Problem((1,), 8, 8, 1024, 1024, 128, 128, torch.bfloat16)
def inspect(text, arch, kernel="forward", d=128, window=(None, None)):
    variant = dataclasses.replace(problem, d=d, dv=d, window=window)
    return compile_report.inspect_kernel(kernel, variant, Config.parse(text), gpu.KNOWN[arch])
"""
GOLDEN = IMPORTS + """
found = [inspect(*cell) for cell in {cells}]
print(json.dumps([[each.registers, each.shared_memory, each.loop_spills, each.mma_instruction, round(each.duplicated, 3),
                   each.loops[0].counts.get("tensor", 0), each.loops[0].exponentials, each.tensor_memory] for each in found]))
"""
# by Triton 3.6: registers, bytes of shared memory, spills in the loop, MMA instruction, duplicated work, MMA instructions in
# the loop, exponentials, columns of tensor memory. Later versions use other registers, and pad shared memory
CELLS = {
    ("128x64w8s2", "sm_90"): (186, 98304, 0, "HGMMA", 1.0, 12, 34, 0),
    ("128x64w8s3", "sm_80"): (195, 98304, 0, "HMMA", 1.0, 128, 34, 0),
    ("128x64w8s3", "sm_100"): (217, 131616, 0, "UTCHMMA", 1.0, 12, 33, 256),
    ("128x64w4s1", "gfx942"): (353, 32768, 0, "v_mfma", 1.0, 64, 33, 0),
    ("128x64w8s2", "sm_86"): (202, 65536, 0, "HMMA", 1.0, 128, 34, 0),
    ("128x64w8s2", "sm_120"): (199, 65536, 0, "HMMA", 1.0, 128, 34, 0),
    ("64x64w4s2", "sm_89", "dq"): (255, 73728, 0, "HMMA", 1.0, 192, 32, 0),
    ("128x64w8s2", "sm_90", "dq"): (199, 131072, 0, "HGMMA", 1.0, 20, 32, 0),
    ("128x64w8s2", "sm_100", "dq"): (127, 147504, 0, "UTCHMMA", 1.0, 20, 32, 512),
    ("32x128w8s2", "sm_80", "dkdv"): (255, 82304, 0, "HMMA", 1.0, 128, 16, 0),
    ("64x64w4s2", "sm_90", "dkdv"): (255, 99072, 36, "HGMMA", 1.0, 24, 32, 0),
    ("32x128w4s1", "gfx942", "dkdv"): (384, 32768, 0, "v_mfma", 1.0, 64, 16, 0),
}


@pytest.mark.slow  # compiles twelve kernels
def test_golden_reports():
    for (cell, golden), found in zip(CELLS.items(), compiled(GOLDEN.format(cells=list(CELLS)))):
        assert found[3] == golden[3] and 0.5 * golden[1] <= found[1] <= 2 * golden[1] and found[0] > 100, (cell, found)
        if triton.__version__.startswith("3.6."):
            assert abs(found[0] - golden[0]) <= 8 and 0.9 * golden[1] <= found[1] <= 1.2 * golden[1], (cell, found)
            assert found[2] == golden[2], (cell, found)
            assert found[4:6] == list(golden[4:6]) and abs(found[6] - golden[6]) <= 2 and found[7] == golden[7], (cell, found)


FAULTS = IMPORTS + """
good, spilling, oversized = (inspect(text, "sm_90") for text in ("128x64w8s2", "128x128w4s2", "128x128w8s4"))
def row(each):
    return dict(fits=each.fits, spills=each.loop_spills, stack=each.stack, registers=each.registers, shared=each.shared_memory)
serial = problem, Config.parse("64x64w4s2"), gpu.KNOWN["sm_90"]
causal = dataclasses.replace(problem, window=(None, 0)), *serial[1:]
serialized = [compile_report.inspect_kernel("forward", *each).serialized for each in (serial, causal)]
remarks = [compile_report.ptxas_remarks("forward", *each) for each in (serial, causal)]
print(json.dumps([row(good), row(spilling), row(oversized), serialized, remarks]))
"""


def test_spilling_oversized_and_serialized_configs_are_detected():
    good, spilling, oversized, serialized, remarks = compiled(FAULTS)
    assert good["fits"] and good["spills"] == 0 and 64 < good["registers"] <= 255
    # two stages of K and V, 64 keys of 128 numbers of 16 bits each, and 128 queries
    assert good["shared"] == 2 * 2 * 64 * 128 * 2 + 128 * 128 * 2
    # 4 warps hold 128 x 128 scores and outputs: twice what their registers have room for. Triton 3.6 makes more than 50
    # spill instructions in the loop, 3.8 makes 36
    assert spilling["spills"] > 20 and spilling["stack"] > 0 and spilling["registers"] == 255
    assert not oversized["fits"] and oversized["shared"] > 227 * 1024
    # the disassembled loops and the remarks of ptxas agree
    assert serialized == [False, True]
    assert not remarks[0] and any("C75" in line and "serializ" in line for line in remarks[1]), remarks


BROKEN = IMPORTS + """
import triton
from tritonattn.analysis import sass
config, on = Config.parse("64x64w4s2"), gpu.KNOWN["sm_90"]
whole = compile_report.compile_kernel("forward", problem, config, on).asm["cubin"]
def error_of(read, content):
    try:
        return f"no error: {read(content)!s:.60}"
    except ValueError as error:
        return str(error)
cuts = [0, 40, len(whole) // 2, 3 * len(whole) // 4]
amdgcn = compile_report.compile_kernel("forward", problem, config, gpu.KNOWN["gfx942"]).asm["amdgcn"]
analysed = sass.run_tool(triton.knobs.nvidia.nvdisasm, whole, "-c")
print(json.dumps([[error_of(sass.resources_of_cubin, whole[:cut]) for cut in cuts],
                  [error_of(sass.disassemble, whole[:cut]) for cut in cuts], error_of(sass.resources_of_amdgcn, amdgcn[:9000]),
                  len(analysed) > 10_000 and analysed == sass.disassemble(whole)]))
"""


def test_truncated_binary_is_an_error():
    resources, texts, amd, same = compiled(BROKEN)
    assert all(each.startswith("cuobjdump: expected a file that it can read, got: cuobjdump ") for each in resources), resources
    assert all(each.startswith("nvdisasm: expected a file that it can read, got: nvdisasm ") for each in texts), texts
    assert amd == "amdgcn: expected the note .vgpr_count, got none: cut off, or stripped"
    assert same, "--no-dataflow changes nothing in the text"


SPEED = IMPORTS + """
import os, sys
sys.path.append("tests")  # the package `tests` would set TRITON_INTERPRET
from helpers.cpu_speed import slowness
inspect("128x64w8s2", "sm_90")
def cpu_seconds():
    # of this process and of the tools that it starts
    before = sum(os.times()[:4])
    inspect("128x64w8s2", "sm_90")
    return sum(os.times()[:4]) - before
print(json.dumps(min(cpu_seconds() / slowness() for _ in range(3))))
"""


@pytest.mark.slow
def test_report_of_a_compiled_kernel_is_fast():
    assert compiled(SPEED, fresh=True) < 0.5
