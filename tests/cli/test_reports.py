"""Compile reports as tables and JSON."""

import dataclasses
import json

from tests.helpers.kernel_reports import LOOP, MI300X, PLAIN, report
from tritonattn import Config
from tritonattn.analysis.sass import Loop
from tritonattn.cli import reports

GOOD = report(loops=(LOOP,))


def test_table_has_a_line_for_each_report_and_each_warning():
    faulty = report(loops=(Loop((*LOOP.instructions, "STL")),))
    lines = reports.table([GOOD, faulty, dataclasses.replace(GOOD, kernel="delta", loops=())]).splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["GPU", "kernel", "config"]
    assert "128x128w8s2" in lines[1] and "HGMMA" in lines[1] and "1.00x" in lines[1] and "1 (registers)" in lines[1]
    assert "delta" in lines[3] and lines[4].startswith("sm_90 forward 128x128w8s2: spill:")


def test_side_by_side():
    other = report(config=Config(128, 128, 8, 3), loops=(Loop((*LOOP.instructions, "LOP3.LUT")),))
    lines = reports.side_by_side([GOOD, other]).splitlines()
    figures = {" ".join(line.split()[:-2]): line.split()[-2:] for line in lines[1:]}
    assert lines[0].startswith("forward on H200 (sm_90)") and figures[""] == ["128x128w8s2", "128x128w8s3"]
    assert figures["loops 0 kinds integer"] == ["0", "1"] and figures["loops 0 kinds special"] == ["64", "64"]
    assert figures["loops 0 products HGMMA.64x128x16"] == ["16", "16"] and figures["model bound"] == ["tensor", "tensor"]
    assert figures["shared_memory"] == ["40960", "40960"] and "scalar" not in figures and "precision" not in figures


def test_registers_of_amd():
    of_amd = report(on=MI300X, loops=(Loop(("v_exp_f32", "v_mfma_f32_32x32x8")),), accumulation=12, scalar=99, spilled=3)
    plain = reports.as_json(of_amd)
    assert (plain["accumulation"], plain["scalar"], plain["spilled"]) == (12, 99, 3)
    assert "spilled" in reports.side_by_side([of_amd])


def test_as_json():
    plain = json.loads(json.dumps(reports.as_json(GOOD)))
    assert plain["loops"][0]["products"] == {"HGMMA.64x128x16": 16} and plain["model"]["bound"] == "tensor"
    assert plain["occupancy"] == 1 and plain["loops"][0]["kinds"]["special"] == 64
    assert plain["problem"] == json.loads(json.dumps(PLAIN.as_json())) and plain["warnings"] == []
