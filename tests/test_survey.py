"""Static pruning: every reason is found where it is planted; and compilers that hang, die or refuse stop nobody."""

import dataclasses
import sys
import time

import pytest
import torch
import triton

from tests.test_lens import compiled
from tritonattn import Config, Problem, config, gpu
from tritonattn.binary import Loop
from tritonattn.lens import Report
from tritonattn.tuning import survey, table
from tritonattn.tuning.workers import Failure, Workers

H200 = gpu.KNOWN["sm_90"]
PROBLEM = Problem((2,), 8, 8, 4096, 4096, 128, 128, torch.bfloat16)
LOOP = Loop(("HGMMA.64x128x16",) * 16 + ("MUFU.EX2",) * 64 + ("WARPGROUP.DEPBAR",))
GOOD = Report("forward", PROBLEM, H200, Config(128, 128, 8, 2), 240, 0, 160 << 10, 0, loops=(LOOP,))


def with_loop(*instructions):
    return {"loops": (Loop(instructions),)}


@pytest.mark.parametrize("change, reason", [
    ({}, None), ({"shared_memory": 228 << 10}, "shared memory"), ({"tensor_memory": 1}, "tensor memory"),
    ({"registers": 32, "stack": 5000}, "register collapse"), ({"loops": ()}, "register collapse"), ({"loops": None}, None),
    (with_loop(*("HGMMA.64x128x16",) * 8, *("MUFU.EX2",) * 64), "unclear"),
    (with_loop(*LOOP.instructions, "STL"), "spill"),
    (with_loop(*("HMMA.16816",) * 128, *("MUFU.EX2",) * 64), "wrong tensor path"),
    (with_loop(*LOOP.instructions, "HMMA.16816"), "wrong tensor path"),
    (with_loop(*("HGMMA.64x128x16",) * 24, *("MUFU.EX2",) * 64), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16",) * 16, *("MUFU.EX2",) * 128), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16, *("MUFU.EX2",) * 64), "serialized"),
], ids=str)
def test_each_reason(change, reason):
    verdict = survey.judge(dataclasses.replace(GOOD, **change))
    assert verdict.reason == reason and (reason is None or reason in survey.REASONS)
    assert (verdict.estimate is None) == (reason in ("shared memory", "tensor memory") or not change.get("loops", True))


@pytest.mark.parametrize("kernel, text, problem, reason", [
    ("forward", "32x32w8s2", PROBLEM, "constraint"), ("forward", "128x64w4s2", PROBLEM, "prefilter"),
    ("dkdv", "128x16w4s2", PROBLEM, "constraint"), ("dkdv", "64x128w4s2", PROBLEM, "prefilter"),
    ("forward", "256x32w8s2", dataclasses.replace(PROBLEM, masked=True, mapped=True), "constraint"),
    ("forward", "128x128w8s2", PROBLEM, None), ("dkdv", "32x64w4s2", PROBLEM, None),
])
def test_what_is_out_before_compiling(kernel, text, problem, reason):
    verdict = survey.before_compiling(kernel, problem, Config.parse(text), H200)
    assert (verdict and verdict.reason) == reason


def test_the_order_is_by_time_then_memory_then_name_and_what_is_out_stands_behind():
    fast, slow = survey.judge(GOOD), survey.judge(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, *("FFMA",) * 4000)))
    larger = survey.judge(dataclasses.replace(GOOD, shared_memory=161 << 10))
    spilling = survey.judge(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, "STL")))
    out = survey.Verdict(Config(16, 16), "compile error", "it said so")
    assert survey.ranked([out, spilling, slow, larger, fast]) == [fast, larger, slow, spilling, out]


def test_the_space_is_what_one_would_try():
    for kernel in ("forward", "dq", "dkdv", "dbias"):
        for arch in gpu.KNOWN:
            found = survey.candidates(kernel, PROBLEM, gpu.KNOWN[arch])
            assert len(found) == len(set(found)) > 60
            assert {each.edge_stages for each in found if each.num_stages > 1} == ({1} if arch == "sm_90" else {None})


PLANTED = """
import json, torch
from tritonattn import Config, Problem, config, gpu
from tritonattn.tuning import survey
from tritonattn.tuning.workers import Workers
found = []
with Workers(2) as workers:
    for kernel, window, arch, text in {planted}:
        problem = Problem((2,), 8, 8, 4096, 4096, 128, 128, torch.bfloat16, window)
        config, on = Config.parse(text), gpu.KNOWN[arch]
        verdict = survey.judge(*workers.map([(kernel, problem, config, on)]))
        found.append([verdict.reason, verdict.note])
print(json.dumps(found))
"""
FULL, CAUSAL = (None, None), (None, 0)


def test_planted_faults_are_caught_in_real_binaries():
    planted = {
        ("forward", FULL, "sm_90", "128x128w8s2e1"): None,
        ("forward", FULL, "sm_90", "128x64w4s3e1"): "spill",
        ("forward", FULL, "sm_90", "128x128w8s4e1"): "shared memory",
        ("forward", CAUSAL, "sm_90", "64x64w4s2"): "serialized",
        ("forward", FULL, "sm_90", "64x64w8s2e1"): "duplicate work",
        ("forward", FULL, "sm_90", "32x64w4s2e1"): "wrong tensor path",
        ("forward", FULL, "gfx942", "128x64w8s2"): "duplicate work",
    }
    for (cell, reason), (found, note) in zip(planted.items(), compiled(PLANTED.format(planted=list(planted)))):
        assert found == reason, (cell, found, note)


class Known:
    """A journal that has seen everything."""

    def __init__(self, entries):
        self.entries = entries


CHILD = """
import sys, time
from tritonattn.tuning import workers
job = workers._read(sys.stdin.buffer)
{does}
"""
ANSWER = "\nworkers._write(sys.stdout.buffer, workers.Failure('compile error', job[0]))\n"


def child(does):
    return sys.executable, "-c", CHILD.format(does=does)


def test_a_compiler_that_hangs_is_stopped_and_the_others_go_on():
    does = "time.sleep(600 if job[0] == 'hang' else 0)" + ANSWER + "time.sleep(600)"
    with Workers(2, timeout=20, command=child(does)) as workers:
        found = list(workers.map([("hang",), ("one",), ("hang",)]))
    assert [each.code for each in found] == ["compile timeout", "compile error", "compile timeout"]
    assert found[1].message == "one" and "20 s" in found[0].message


def test_a_compiler_that_dies_is_told():
    with Workers(1, command=child("sys.exit(7)")) as workers:
        found, = workers.map([("any",)])
    assert found == Failure("compile error", "the compiler's process ended with 7", lasting=False)


@pytest.mark.parametrize("command", [("true",), child("sys.stdout.buffer.write(b'abc')"),
                                     child("sys.stdout.buffer.write(workers.HEAD.pack(99) + b'abc')")],
                         ids=["at once", "in the head", "in the answer"])
def test_a_compiler_that_dies_at_any_moment_is_told_and_replaced(command):
    with Workers(1, command=command) as workers:
        found = list(workers.map([("any",)] * 2))
    assert [each.code for each in found] == ["compile error"] * 2 and not any(each.lasting for each in found)


def test_one_that_stops_in_the_middle_of_its_answer_is_stopped():
    does = "sys.stdout.buffer.write(workers.HEAD.pack(99) + b'abc'); sys.stdout.buffer.flush(); time.sleep(600)"
    with Workers(1, timeout=20, command=child(does)) as workers:
        found, = workers.map([("any",)])
    assert found.code == "compile timeout"


def test_nobody_waits_for_what_nobody_wants():
    with Workers(1, command=child("time.sleep(3)" + ANSWER + "time.sleep(600)")) as workers:
        found = workers.map([("a",), ("b",), ("c",), ("d",)])
        next(found)
        began = time.monotonic()
        found.close()
        assert time.monotonic() - began < 3 and not workers._all
        assert next(workers.map([("e",)])).message == "e", "and others are begun when something else is wanted"


def test_what_may_do_better_another_time_is_not_kept(tmp_path):
    cell, kept = ("forward", 2, 512, "full"), []
    journal = Known([])
    journal.append = kept.append
    builder = table.Builder(H200, journal, workers=None)
    builder._learn(cell, Config(16, 16), Failure("compile timeout", "slow", lasting=False))
    builder._learn(cell, Config(32, 32), Failure("compile error", "never"))
    assert [each["config"] for each in kept] == ["32x32w4s2"] and len(builder._seen) == 2


def test_no_child_outlives_its_workers():
    with Workers(2, command=child(ANSWER + "time.sleep(600)")) as workers:
        list(workers.map([("a",), ("b",)]))
        children = list(workers._all)
    assert children and all(each.poll() is not None for each in children)


def test_what_the_compiler_refuses_is_a_verdict():
    problem = dataclasses.replace(PROBLEM, n_q=1024, n_k=1024)
    broken = gpu.Gpu("none", "sm_12345", 1, 99 << 10)
    with Workers(1) as workers:
        found, = workers.map([("forward", problem, Config(64, 64), broken)])
    assert isinstance(found, Failure) and found.code == "compile error" and found.message


# --- tables


def entry(text, many, few=None, reason=None, **fields):
    known = {"cell": ["forward", 2, 64, "full"], "config": text, "reason": reason, "note": "", "registers": 100,
             "shared_memory": 1000, "tensor_memory": 0, "occupancy": 1, "many": many, "few": few or many, "bound": "issue"}
    return known | fields


def test_a_row_takes_the_fastest_of_each_kind_and_tells_of_the_others():
    cell = ("forward", 2, 512, "full")
    known = [entry(*fields, cell=list(cell)) for fields in (
        ("32x32w4s1", 9.0, 1.0), ("32x16w4s1", 5.0, 7.0), ("16x32w4s1", 1.0, 0.1, "spill"), ("16x16w4s1", 6.0, 6.0))]
    builder = table.Builder(H200, Known(known), workers=None)
    row = builder._chosen(cell, known)
    assert (row.many.config, row.few.config) == ("32x16w4s1", "32x32w4s1")
    assert row.lost == {"16x16w4s1": "slower", "16x32w4s1": "spill"} and not row.many.exception
    only = builder._chosen(cell, known[2:3])
    assert only.many.config == "16x32w4s1" and only.many.exception == "spill"
    with pytest.raises(RuntimeError, match=r"H200.*none \(x: shared memory\)"):
        builder._chosen(cell, [{"config": "x", "reason": "shared memory", "note": ""}])


def test_what_does_badly_on_other_problems_of_its_row_is_passed_over():
    cell = ("forward", 2, 64, "edges")
    known = [entry(*fields, cell=list(cell)) for fields in (("64x64w4s2e1", 1.0), ("128x64w8s2e1", 2.0), ("64x32w4s2e1", 3.0))]

    def proved(**against):
        return [{"cell": list(cell), "config": text, "against": against.get(f"c{i}", [])}
                for i, text in enumerate(("64x64w4s2e1", "128x64w8s2e1", "64x32w4s2e1"))]

    def chosen(**against):
        return table.Builder(H200, Known(known + proved(**against)), workers=None)._chosen(cell, known).many

    assert chosen().config == "64x64w4s2e1" and not chosen().exception
    second = chosen(c0=["spill: 9 in the loop, with a map"])
    assert second.config == "128x64w8s2e1" and not second.exception
    least = chosen(c0=["a", "b"], c1=["spill: 3 in the loop, with a map"], c2=["a", "b"])
    assert (least.config, least.exception) == ("128x64w8s2e1", "spill: 3 in the loop, with a map")


def test_a_row_is_proved_on_what_it_serves_and_by_both_compilers():
    class Compilers:
        def __init__(self, spills):
            self.spills, self.jobs = spills, []

        def map(self, jobs):
            for job in jobs:
                self.jobs.append(job[1])
                loop = dataclasses.replace(LOOP, instructions=LOOP.instructions + ("STL",) * self.spills)
                yield dataclasses.replace(GOOD, loops=(loop,))

    cell, kept = ("forward", 2, 128, "pairs"), []
    journal = Known([])
    journal.append = kept.append
    usual, other = Compilers(0), Compilers(table.LIGHT)
    assert table.Builder(H200, journal, usual, also=other)._against(cell, "128x128w8s2e1") == []
    assert [problem.masked for problem in usual.jobs] == [True, False, True] and len(other.jobs) == 4
    assert kept == [{"cell": list(cell), "config": "128x128w8s2e1", "against": []}]
    builder = table.Builder(H200, journal, Compilers(1), also=Compilers(table.LIGHT + 1))
    said = builder._against(cell, "128x128w8s2e1")
    assert "spill: 1 in the loop, with a mask" in said and "spill: 17 in the loop, by another Triton" in said and len(said) == 7
    for mask, count in (("full", 0), ("edges", 1), ("window", 0), ("pairs", 3)):
        found = table.others(("forward", 2, 128, mask))
        assert len(found) == count and all(config.mask_class("forward", each) == mask for each in found.values())
    assert len(table.others(("forward", 2, 64, "edges"))) == 2, "a map at small head sizes"
    assert table.others(("forward", 4, 64, "pairs")) == table.others(("forward", 2, 256, "pairs")) == {}


def test_another_python_is_asked_for_its_triton():
    assert table.version_in(sys.executable) == triton.__version__
    with pytest.raises(ValueError, match="expected a Python with Triton"):
        table.version_in("false")


def test_what_stands_for_a_cell_fills_the_gpu_or_half_of_it():
    for cell in table.cells(H200):
        many, few = (table.example(cell, fills, H200) for fills in (True, False))
        assert (config.fill(cell[0], many, H200), config.fill(cell[0], few, H200)) == ("many", "few")
        assert config.mask_class(cell[0], many) == config.mask_class(cell[0], few) == cell[3]
        assert many.d == cell[2] and min(many.dtype.itemsize, 4) == cell[1]


BUILD = """
import json, pathlib, tempfile
from tritonattn import gpu, tables
from tritonattn.tuning import table
cell, on = ("forward", 2, 64, "full"), gpu.KNOWN["sm_90"]
table.sensible = lambda cell, config: str(config) in ("64x64w4s2e1", "128x128w8s2e1")
with tempfile.TemporaryDirectory() as folder:
    folder, said = pathlib.Path(folder), []
    path = table.build(on, [cell], folder, folder, say=lambda line, flush: said.append(line))
    first, journal = path.read_text(), next(folder.glob("*.jsonl")).read_text()
    table.build(on, [cell], folder, folder, say=lambda line, flush: said.append(line))
    row = tables.read(path).rows[cell]
    print(json.dumps([first == path.read_text(), journal == next(folder.glob("*.jsonl")).read_text(), row.many.config,
                      row.many.registers, sorted(row.lost) + [row.few.config], said]))
"""


def test_a_build_is_repeatable_and_compiles_nothing_twice():
    same, nothing_new, many, registers, lost, said = compiled(BUILD)
    assert same and nothing_new and registers > 100 and len(said) == 2
    assert {"64x64w4s2e1", "128x128w8s2e1", "64x64w4s3e1", "128x128w8s3e1"} <= {*lost, many}
