"""Compile reports as tables, JSON and pictures."""

import dataclasses
import json

import pytest
from matplotlib.axes import Axes

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
    assert figures["integer"] == ["0", "1"] and figures["special"] == ["64", "64"]
    assert figures["HGMMA.64x128x16"] == ["16", "16"]


def test_figures_of_amd():
    of_amd = report(on=MI300X, loops=(Loop(("v_exp_f32", "v_mfma_f32_32x32x8")),), accumulation=12, scalar=99, spilled=3)
    found = reports.figures(of_amd)
    assert (found["accumulation"], found["scalar"], found["spilled"]) == (12, 99, 3) and "spilled" not in reports.figures(GOOD)
    assert reports.as_json(of_amd)["spilled"] == 3


def test_as_json():
    plain = json.loads(json.dumps(reports.as_json(GOOD)))
    assert plain["loops"][0]["products"] == {"HGMMA.64x128x16": 16} and plain["model"]["bound"] == "tensor"
    assert plain["occupancy"] == 1 and plain["problem"] == json.loads(json.dumps(PLAIN.as_json())) and plain["warnings"] == []


def test_plot_stacks_the_units(tmp_path, monkeypatch):
    path, drawn = tmp_path / "units.png", []
    barh = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda self, *args, **kwargs: drawn.append(barh(self, *args, **kwargs)) or drawn[-1])
    reports.plot([GOOD, GOOD, dataclasses.replace(GOOD, kernel="delta", loops=())], str(path))
    assert path.read_bytes()[:4] == b"\x89PNG" and [len(bars) for bars in drawn] == [2] * len(reports.UNITS)
    tensor, special = (bars[0] for bars in drawn[:2])
    assert tensor.get_width() == pytest.approx(1000 * 2048 / 128**2) and special.get_x() == pytest.approx(tensor.get_width())
    first, second = drawn[0]
    assert first.get_y() != second.get_y(), "two reports of the same name have their own bars"
