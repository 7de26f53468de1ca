"""The lens, on kernels compiled in a process of their own: here they are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonattn import Config, lens

SASS = """
 .L_x_1:
        /*0010*/   MUFU.EX2 R1, R2 ;
        /*0020*/   STL [R1], R2 ;
        /*0030*/   MUFU.EX2 R1, R2 ;
        /*0040*/   @P0 BRA `(.L_x_1) ;
 .L_x_2:
 .L_x_3:
        /*0050*/   MUFU.EX2 R1, R2 ;
        /*0060*/   LDL R1, [R2] ;
        /*0070*/   @P0 BRA `(.L_x_3) ;
        /*0080*/   @P1 BRA `(.L_x_2) ;
        /*0090*/   STL [R1], R2 ;
"""


def compiled(code):
    """What `code` prints as JSON, run where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                         cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_loops_over_tiles_are_the_innermost_with_most_exponentials():
    loops = lens.tile_loops(SASS)
    assert len(loops) == 1 and "STL" in loops[0] and "LDL" not in loops[0]
    assert len(lens.SPILL.findall(loops[0])) == 1


def test_products_that_wait_for_each_other_are_seen():
    product, wait = "  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;\n", "  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert lens.serialized((product + wait) * 8)
    assert not lens.serialized((product * 4 + wait) * 2) and not lens.serialized((product + wait) * 4)


def test_interpreted_kernels_cannot_be_compiled():
    if lens.launch.INTERPRETED:
        from tritonattn import Problem, gpu
        problem = Problem((1,), 1, 1, 64, 64, 64, 64, __import__("torch").float16)
        with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
            lens.inspect("forward", problem, Config(64, 64), gpu.KNOWN["sm_90"])


def test_a_spilling_and_an_oversized_config_are_seen():
    code = """
import dataclasses, json, torch
from tritonattn import Config, Problem, gpu, lens
problem = Problem((1,), 8, 8, 1024, 1024, 128, 128, torch.bfloat16)
def row(config):
    report = lens.inspect("forward", problem, config, gpu.KNOWN["sm_90"])
    return dataclasses.asdict(report) | {"fits": report.fits}
print(json.dumps([row(Config(128, 64, 8, 2)), row(Config(128, 128, 4, 2)), row(Config(128, 128, 8, 4))]))
"""
    good, spilling, oversized = compiled(code)
    assert good["fits"] and good["loop_spills"] == 0 and 64 < good["registers"] <= 255
    # two stages of K and V, 64 keys of 128 sixteen-bit numbers each, beside the 128 queries
    assert good["shared_memory"] == 2 * 2 * 64 * 128 * 2 + 128 * 128 * 2
    assert spilling["loop_spills"] > 50 and spilling["stack"] > 0
    assert not oversized["fits"] and oversized["shared_memory"] > 227 * 1024
