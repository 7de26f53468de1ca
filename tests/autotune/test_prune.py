"""Static pruning: every reason is found where it is planted; and compilers that hang, die or refuse stop nobody."""

import dataclasses
import os
import pickle
import sys
import threading
import time

import pytest
import torch
import triton

from tests.helpers.compile_server import compiled
from tritonattn import Config, Problem, gpu
from tritonattn.analysis.compile_report import KernelReport
from tritonattn.analysis.sass import Loop
from tritonattn.autotune import config_table, prune, worker_pool
from tritonattn.autotune.worker_pool import Failure, Workers
from tritonattn.configs import lookup, shipped
from tritonattn.configs.shipped import Entry

H200, MI300X = gpu.KNOWN["sm_90"], gpu.KNOWN["gfx942"]
PROBLEM = Problem((2,), 8, 8, 4096, 4096, 128, 128, torch.bfloat16)
EXACT = dataclasses.replace(PROBLEM, dtype=torch.float32)
LOOP = Loop(("HGMMA.64x128x16",) * 16 + ("MUFU.EX2",) * 64 + ("WARPGROUP.DEPBAR",))
GOOD = KernelReport("forward", PROBLEM, H200, Config(128, 128, 8, 2), 240, 0, 160 << 10, 0, loops=(LOOP,))


def with_loop(*instructions):
    return {"loops": (Loop(instructions),)}


@pytest.mark.parametrize("change, reason", [
    ({}, None), ({"shared_memory": 228 << 10}, "shared memory"), ({"tensor_memory": 1}, "tensor memory"),
    ({"registers": 32, "stack": 5000}, "register collapse"), ({"loops": ()}, "unclear"), ({"loops": None}, None),
    (with_loop(*("HGMMA.64x128x16",) * 8, *("MUFU.EX2",) * 64), "unclear"),
    (with_loop(*LOOP.instructions, "STL"), "spill"),
    (with_loop(*("HMMA.16816",) * 128, *("MUFU.EX2",) * 64), "wrong tensor path"),
    (with_loop(*LOOP.instructions, "HMMA.16816"), "wrong tensor path"),
    (with_loop(*("HMMA.16816",) * 128, *("MUFU.EX2",) * 64, "STL"), "wrong tensor path"),
    (with_loop(*("HGMMA.64x128x16",) * 24, *("MUFU.EX2",) * 64, "STL"), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16, *("MUFU.EX2",) * 64, "STL"), "serialized"),
    (with_loop(*("HGMMA.64x128x16",) * 24, *("MUFU.EX2",) * 64), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16",) * 16, *("MUFU.EX2",) * 128), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16, *("MUFU.EX2",) * 64), "serialized"),
], ids=str)
def test_each_reason(change, reason):
    verdict = prune.check_report(dataclasses.replace(GOOD, **change))
    assert verdict.reason == reason and (reason is None or reason in prune.REASONS)
    assert (verdict.estimate is None) == (reason in ("shared memory", "tensor memory") or not change.get("loops", True))


@pytest.mark.parametrize("kernel, text, problem, reason", [
    ("forward", "32x32w8s2", PROBLEM, "constraint"), ("forward", "128x64w4s2", PROBLEM, "prefilter"),
    ("dkdv", "128x16w4s2", PROBLEM, "constraint"), ("dkdv", "64x128w4s2", PROBLEM, "prefilter"),
    ("forward", "256x32w8s2", dataclasses.replace(PROBLEM, masked=True, mapped=True), "constraint"),
    ("forward", "128x128w8s2", PROBLEM, None), ("dkdv", "32x64w4s2", PROBLEM, None),
    # without tensor cores warps share columns too
    ("forward", "32x32w8s1", EXACT, None), ("forward", "16x32w4s1", EXACT, None), ("forward", "16x16w8s1", EXACT, "constraint"),
])
def test_what_is_out_before_compiling(kernel, text, problem, reason):
    verdict = prune.check_config(kernel, problem, Config.parse(text), H200)
    assert (verdict and verdict.reason) == reason


@pytest.mark.parametrize("loop", [LOOP.instructions, ("HMMA.16816",) * 128 + ("MUFU.EX2",) * 64,
                                  ("HGMMA.64x128x16",) * 24 + ("MUFU.EX2",) * 64,
                                  ("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16 + ("MUFU.EX2",) * 64],
                         ids=["good", "wrong path", "duplicate", "serialized"])
def test_a_spill_more_never_helps(loop):
    def expected(spills):
        verdict = prune.check_report(dataclasses.replace(GOOD, **with_loop(*loop, *("STL",) * spills)))
        assert ("spills" in verdict.note) == (spills > 0 and verdict.reason != "spill")
        return verdict.estimate.cycles * prune.time_penalty(verdict.reason, spills)

    found = [expected(spills) for spills in (0, 1, 2, 8, 64, 512)]
    assert found == sorted(found) and found[0] < found[-1]


def test_the_order_is_by_time_then_memory_then_name_and_what_is_out_stands_behind():
    fast, slow = prune.check_report(GOOD), prune.check_report(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, *("FFMA",) * 4000)))
    larger = prune.check_report(dataclasses.replace(GOOD, shared_memory=161 << 10))
    spilling = prune.check_report(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, "STL")))
    out = prune.Verdict(Config(16, 16), "compile error", "it said so")
    # expected to take as long as the fastest one, but the model is not to be trusted there
    twice = prune.check_report(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, *("STL",) * 2)))
    collapsed = prune.check_report(dataclasses.replace(GOOD, registers=32, stack=5000))
    assert twice.estimate.cycles == spilling.estimate.cycles and collapsed.estimate.cycles <= spilling.estimate.cycles
    assert prune.ranked([out, collapsed, twice, spilling, slow, larger, fast]) == [
        fast, larger, slow, spilling, twice, collapsed, out]


def test_the_space_is_what_one_would_try():
    for kernel in ("forward", "dq", "dkdv", "dbias"):
        for arch in gpu.KNOWN:
            found = prune.candidates(kernel, PROBLEM, gpu.KNOWN[arch])
            assert len(found) == len(set(found)) > 60
            assert {each.edge_stages for each in found if each.num_stages > 1} == ({1} if arch == "sm_90" else {None})


PLANTED = """
import json, torch
from tritonattn import Config, Problem, config, gpu
from tritonattn.autotune import prune
from tritonattn.autotune.worker_pool import Workers
found = []
with Workers(2) as workers:
    for kernel, window, arch, text in {planted}:
        problem = Problem((2,), 8, 8, 4096, 4096, 128, 128, torch.bfloat16, window)
        config, on = Config.parse(text), gpu.KNOWN[arch]
        verdict = prune.check_report(*workers.map([(kernel, problem, config, on)]))
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


# with that module alone: torch takes seconds to import, and more beside other work
CHILD = f"""
import importlib.util, sys, time, types
sys.modules |= {{name: types.ModuleType(name) for name in ("tritonattn", "tritonattn.autotune")}}
spec = importlib.util.spec_from_file_location({worker_pool.__name__!r}, {worker_pool.__file__!r})
worker_pool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker_pool)
job = worker_pool._read(sys.stdin.buffer)
"""
ANSWER = "\nworker_pool._write(sys.stdout.buffer, worker_pool.Failure('compile error', job[0]))\n"


def child(does):
    return sys.executable, "-c", CHILD + does


def test_a_compiler_that_hangs_is_stopped_and_the_others_go_on():
    does = "time.sleep(600 if job[0] == 'hang' else 0)" + ANSWER + "time.sleep(600)"
    with Workers(2, timeout=8, command=child(does)) as workers:
        found = list(workers.map([("hang",), ("one",), ("hang",)]))
    assert [each.code for each in found] == ["compile timeout", "compile error", "compile timeout"]
    assert found[1].message == "one" and "8 s" in found[0].message


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
    with Workers(1, timeout=8, command=child(does)) as workers:
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
    builder = config_table.Builder(H200, journal, workers=None)
    builder._learn(cell, Config(16, 16), Failure("compile timeout", "slow", lasting=False))
    builder._learn(cell, Config(32, 32), Failure("compile error", "never"))
    assert [each["config"] for each in kept] == ["32x32w4s2"] and len(builder._seen) == 2


def test_nobody_is_ended_twice(monkeypatch):
    """A number may be another process's once its child was waited for."""
    ended = []
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda number, signal: ended.append(number) or kill(number, signal))
    with Workers(2, timeout=0.5, command=child("import time; time.sleep(600)")) as workers:
        assert {each.code for each in workers.map([("a",), ("b",), ("c",)])} == {"compile timeout"}
        assert not worker_pool._all and len(ended) == 3
    with Workers(2, command=child("import time; time.sleep(600)")) as workers:
        def end():
            deadline = time.monotonic() + 60
            while len(workers._all) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            workers.__exit__()

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        slow = workers.map([("d",), ("e",), ("f",)])
        assert [next(slow).code, next(slow).code] == ["compile error"] * 2
        with pytest.raises(RuntimeError, match="workers: expected to run until the last job is done, got an end before"):
            next(slow)
        ending.join()
    assert len(ended) == len(set(ended)) == 5


def test_a_child_that_is_late_to_begin_is_ended_and_nothing_is_begun_for_what_was_abandoned(monkeypatch):
    """A thread of a map that was left may have its job already, and no child yet; or one that has only just started."""
    begun, left, children = threading.Event(), threading.Event(), []
    real = worker_pool.start

    def slow(*arguments):
        begun.set()
        assert left.wait(60)
        children.append(real(*arguments))
        return children[-1]

    def leave():
        assert begun.wait(60)
        pool.__exit__()
        left.set()

    monkeypatch.setattr(worker_pool, "start", slow)
    with Workers(1, command=child("import time; time.sleep(600)")) as pool:
        leaving = threading.Thread(target=leave)
        leaving.start()
        with pytest.raises(RuntimeError, match="got an end before"):
            next(pool.map([("a",), ("b",)]))
        leaving.join()
        assert not pool._all and len(children) == 1 and children[0].poll() is not None


def test_a_job_that_cannot_be_sent_is_said():
    with Workers(1, command=child(ANSWER)) as workers:
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            next(workers.map([(lambda: None,)]))


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
             "spills": 0, "shared_memory": 1000, "tensor_memory": 0, "occupancy": 1, "many": many, "few": few or many,
             "bound": "issue"}
    return known | fields


def test_a_row_takes_the_fastest_of_each_kind_and_tells_of_the_others():
    cell = ("forward", 2, 512, "full")
    known = [entry(*fields, cell=list(cell)) for fields in (
        ("32x32w4s1", 9.0, 1.0), ("32x16w4s1", 5.0, 7.0), ("16x32w4s1", 1.0, 0.1, "spill"), ("16x16w4s1", 6.0, 6.0))]
    builder = config_table.Builder(H200, Known(known), workers=None)
    row = builder._chosen(cell, known)
    assert (row.many.config, row.few.config) == ("32x16w4s1", "32x32w4s1")
    assert row.lost == {"16x16w4s1": "slower", "16x32w4s1": "spill"} and not row.many.exception
    only = builder._chosen(cell, known[2:3])
    assert only.many.config == "16x32w4s1" and only.many.exception == "spill"
    with pytest.raises(config_table.NothingFits, match=r"H200.*none \(x: shared memory\)"):
        builder._chosen(cell, [{"config": "x", "reason": "shared memory", "note": ""}])


def test_the_more_a_config_spills_the_less_the_model_is_trusted():
    builder = config_table.Builder(H200, Known([]), workers=None)
    known = [entry("32x32w8s1", 1.0, reason="spill", spills=1141), entry("32x16w4s2", 1.03, reason="spill", spills=400),
             entry("64x32w4s2", 1.5, reason="spill", spills=2), entry("16x32w4s2", 1.2, reason="duplicate work"),
             entry("32x32w4s1", 9.0), entry("16x16w4s1", 0.1, reason="register collapse"),
             entry("64x16w4s2", 1.05, reason="serialized", spills=1141)]
    assert [each["config"] for each in builder._order(known, "many")] == [
        "32x32w4s1", "64x32w4s2", "16x32w4s2", "32x16w4s2", "32x32w8s1", "64x16w4s2", "16x16w4s1"]


@pytest.mark.parametrize("taken, why", [
    ([10, 0, 1], "slower"), (None, "compile error"), ([H200.shared_memory + 1, 0, 0], "shared memory"),
    ([10, 600, 0], "tensor memory"),
], ids=str)
def test_why_a_config_of_float32_lost(taken, why):
    cell = ("forward", 4, 64, "edges")
    builder = config_table.Builder(H200, Known([{"cell": list(cell), "config": "32x32w4s1", "tf32": taken}]), workers=None)
    assert builder._why_lost(cell, entry("32x32w4s1", 9.0)) == why


def test_what_stood_before_is_a_candidate_as_it_stood():
    """Also where Hopper would leave the edges out of its pipeline, which makes another binary."""
    cell = ("forward", 4, 64, "edges")
    stood = Entry("64x16w4s2", "static-model", 1, 1, 0, 1, "issue")
    old = shipped.Table("old", {}, {}, {cell: shipped.Row(*cell, many=stood, few=stood)})
    builder = config_table.Builder(H200, Known([]), None, old)
    assert builder._before(cell, {}) == {Config(64, 16, 4, 2)}


@pytest.mark.parametrize("cell, on, stages", [
    (("forward", 2, 128, "full"), H200, ((2,), 3)), (("forward", 2, 128, "full"), MI300X, ((2,), 1)),
    (("forward", 2, 512, "full"), H200, ((1, 2), 3)), (("dq", 4, 512, "edges"), MI300X, ((1, 2), 3)),
    (("forward", 4, 128, "edges"), H200, ((1,), 2)), (("forward", 4, 512, "edges"), H200, ((1,), 2)),
], ids=str)
def test_stages_that_are_tried(cell, on, stages):
    assert config_table.stages_of(cell, on) == stages


def test_what_is_worth_compiling_for_a_table():
    def largest(gpu, *cell):
        tiles = [config for config in prune.candidates(cell[0], config_table.example(cell, True, gpu), gpu)
                 if config_table.sensible(cell, config, gpu)]
        return max(max(config.block_m, config.block_n) for config in tiles)

    assert largest(H200, "forward", 2, 128, "full") == largest(H200, "forward", 2, 256, "edges") == 128
    # the tensor cores' own products have 64 rows on Hopper, and 16 for each of AMD's four waves: wide heads need as many too
    assert largest(H200, "forward", 2, 512, "full") == largest(H200, "dq", 2, 256, "pairs") == 64
    assert largest(H200, "dq", 4, 64, "edges") == largest(MI300X, "dq", 4, 512, "edges") == 64
    assert largest(H200, "forward", 4, 128, "edges") == 32


class Nobody:
    """Compilers of which nothing is asked."""

    @staticmethod
    def map(jobs):
        assert not jobs
        return ()


@pytest.mark.parametrize("cell, before, searched", [
    (("forward", 2, 96, "edges"), [("64x64w4s2e1", 2.0)], False),
    # something speaks against all that stood there, or none of it fits
    (("forward", 2, 96, "edges"), [("64x64w4s2e1", 2.0, None, "spill")], True),
    (("forward", 4, 128, "edges"), [("32x32w4s1", 2.0, None, "spill")], True),
    (("forward", 4, 512, "edges"), [("16x16w4s1", None, None, "shared memory")], True),
    (("forward", 4, 128, "edges"), [("64x16w4s1", 2.0)], True),
    (("forward", 2, 512, "edges"), [("16x32w4s1", 2.0, None, "wrong tensor path")], True),
    # wide heads of float32 spill everywhere, take long to compile, and few would notice
    (("forward", 4, 256, "edges"), [("32x32w8s1", 2.0, None, "spill")], False),
], ids=str)
def test_a_build_looks_for_others_where_what_stood_there_does_not_do(cell, before, searched, monkeypatch):
    new = "16x32w4s1" if cell[1] == 4 else "64x32w8s2e1"
    known = [entry(*fields, cell=list(cell)) for fields in (*before, (new, 1.0))]
    # with TF32 64 rows are too many
    known += [{"cell": list(cell), "config": text, "tf32": [H200.shared_memory + text.startswith("64"), 0, 1]}
              for text in (new, "64x16w4s1", "32x32w4s1", "32x32w8s1", "16x16w4s1") if cell[1] == 4]
    known += [{"cell": list(cell), "config": new, "against": []}]
    monkeypatch.setattr(config_table, "candidates", lambda *_: [Config.parse(new)])
    monkeypatch.setattr(config_table, "BEST", 0)
    stood = Entry(before[0][0], "static-model", 1, 1, 0, 1, "issue")
    old = shipped.Table("old", {}, {}, {cell: shipped.Row(*cell, many=stood, few=stood)})
    builder = config_table.Builder(H200, Known(known), Nobody, old, config_table.Look(lambda cell: False))
    row = builder.row(cell, {})
    assert row.many.config == (new if searched else before[0][0])
    assert set(row.lost) == ({before[0][0]} if searched else set())


def test_what_lost_before_is_looked_at_again_and_what_another_gpu_has():
    cell = ("forward", 2, 128, "edges")
    def row(best, *lost):
        made = Entry(best, "static-model", 1, 1, 0, 1, "issue")
        return shipped.Row(*cell, many=made, few=made, lost=dict.fromkeys(lost, "slower"))
    old = shipped.Table("old", {}, {}, {cell: row("64x64w4s2e1", "128x64w8s2e1")})
    look = config_table.Look(lambda cell: False, {cell: row("128x128w8s3", "64x32w4s1")})
    found = config_table.Builder(H200, Known([]), None, old, look)._before(cell, {})
    assert set(map(str, found)) == {"64x64w4s2e1", "128x64w8s2e1", "128x128w8s3e1", "64x32w4s1"}


def test_what_does_badly_on_other_problems_of_its_row_is_passed_over():
    cell = ("forward", 2, 64, "edges")
    known = [entry(*fields, cell=list(cell)) for fields in (("64x64w4s2e1", 1.0), ("128x64w8s2e1", 2.0), ("64x32w4s2e1", 3.0))]

    def proved(**against):
        return [{"cell": list(cell), "config": text, "against": against.get(f"c{i}", [])}
                for i, text in enumerate(("64x64w4s2e1", "128x64w8s2e1", "64x32w4s2e1"))]

    def chosen(**against):
        return config_table.Builder(H200, Known(known + proved(**against)), workers=None)._chosen(cell, known).many

    assert chosen().config == "64x64w4s2e1" and not chosen().exception
    second = chosen(c0=["spill: 9 in the loop, with a map"])
    assert second.config == "128x64w8s2e1" and not second.exception
    least = chosen(c0=["a", "b"], c1=["spill: 3 in the loop, with a map"], c2=["a", "b"])
    assert (least.config, least.exception) == ("128x64w8s2e1", "spill: 3 in the loop, with a map")
    builder = config_table.Builder(H200, Known(known + proved(c0=["serialized, with a map"])), workers=None)
    assert builder._chosen(cell, known).lost == {"64x64w4s2e1": "serialized", "64x32w4s2e1": "slower"}


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
    usual, other = Compilers(0), Compilers(config_table.LIGHT)
    assert config_table.Builder(H200, journal, usual, also=other)._against(cell, "128x128w8s2e1") == []
    assert [problem.masked for problem in usual.jobs] == [True, False, True] and len(other.jobs) == 4
    assert kept == [{"cell": list(cell), "config": "128x128w8s2e1", "against": []}]
    builder = config_table.Builder(H200, journal, Compilers(1), also=Compilers(config_table.LIGHT + 1))
    said = builder._against(cell, "128x128w8s2e1")
    assert "spill: 1 in the loop, with a mask" in said and "spill: 17 in the loop, by another Triton" in said and len(said) == 7
    for mask, count in (("full", 0), ("edges", 1), ("window", 0), ("pairs", 3)):
        found = config_table.others(("forward", 2, 128, mask))
        assert len(found) == count and all(lookup.mask_class("forward", each) == mask for each in found.values())
    assert len(config_table.others(("forward", 2, 64, "edges"))) == 2, "a map at small head sizes"
    assert config_table.others(("forward", 4, 64, "pairs")) == config_table.others(("forward", 2, 256, "pairs")) == {}


def test_a_row_of_float32_fits_with_tf32_and_says_what_the_larger_binary_takes():
    class Compilers:
        jobs = []

        def map(self, jobs):
            self.jobs += jobs
            for _, _, tried, on, _ in jobs:
                yield dataclasses.replace(GOOD, shared_memory=on.shared_memory + 1 if tried.block_m == 64 else 5000)

    cell, kept = ("forward", 4, 64, "edges"), []
    known = [entry(*fields, cell=list(cell)) for fields in (("64x32w4s1", 1.0), ("32x32w4s1", 2.0), ("32x16w4s1", 3.0))]
    journal = Known(known)
    journal.append = kept.append
    row = config_table.Builder(H200, journal, Compilers())._chosen(cell, known)
    assert (row.many.config, row.many.shared_memory, row.many.occupancy) == ("32x32w4s1", 5000, 1) and row.few == row.many
    assert row.lost == {"64x32w4s1": "shared memory", "32x16w4s1": "slower"}
    assert [(job[2].block_m, job[4]) for job in Compilers.jobs] == [(64, "tf32"), (32, "tf32")], "each once"
    assert [each["tf32"] for each in kept] == [[H200.shared_memory + 1, 0, 0], [5000, 0, 1]]
    again = config_table.Builder(H200, Known(known + kept), workers=None)
    assert again._chosen(cell, known) == row, "a journal knows it"
    with pytest.raises(config_table.NothingFits, match=r"H200.*expected a config that fits with TF32, got 1 that do not"):
        again._chosen(cell, known[:1])


def test_a_child_compiles_with_the_precision_that_it_is_told():
    problem = dataclasses.replace(PROBLEM, dtype=torch.float32, d=64, dv=64)
    jobs = [("forward", problem, Config(64, 32, 8, 2), gpu.KNOWN["sm_100"], each) for each in ("ieee", "tf32", "ieee")]
    with Workers(1) as workers:
        found = list(workers.map(jobs))
    assert [(each.precision, each.mma_instruction, each.best_mma_instruction) for each in found] == [
        ("ieee", "", ""), ("tf32", "UTCHMMA", "UTCHMMA"), ("ieee", "", "")]
    assert found[1].duplicated == 1.0 and found[1].tensor_memory > 0 == found[0].tensor_memory and found[0] == found[2]


def test_another_python_is_asked_for_its_triton():
    assert config_table.version_in(sys.executable) == triton.__version__
    with pytest.raises(ValueError, match="expected a Python with Triton"):
        config_table.version_in("false")


def test_what_stands_for_a_cell_fills_the_gpu_or_half_of_it():
    for cell in config_table.cells(H200):
        many, few = (config_table.example(cell, fills, H200) for fills in (True, False))
        assert (lookup.gpu_fill(cell[0], many, H200), lookup.gpu_fill(cell[0], few, H200)) == ("many", "few")
        assert lookup.mask_class(cell[0], many) == lookup.mask_class(cell[0], few) == cell[3]
        assert many.d == cell[2] and min(many.dtype.itemsize, 4) == cell[1]


BUILD = """
import json, pathlib, tempfile
from tritonattn import gpu
from tritonattn.configs import shipped as tables
from tritonattn.autotune import config_table
cell, on = ("forward", 2, 64, "full"), gpu.KNOWN["sm_90"]
config_table.sensible = lambda cell, config, gpu: str(config) in ("64x64w4s2e1", "128x128w8s2e1")
with tempfile.TemporaryDirectory() as folder:
    folder, said = pathlib.Path(folder), []
    path = config_table.build(on, [cell], folder, folder, say=lambda line, flush: said.append(line))
    first, journal = path.read_text(), next(folder.glob("*.jsonl")).read_text()
    config_table.build(on, [cell], folder, folder, say=lambda line, flush: said.append(line))
    row = tables.read_table(path).rows[cell]
    print(json.dumps([first == path.read_text(), journal == next(folder.glob("*.jsonl")).read_text(), row.many.config,
                      row.many.registers, sorted(row.lost) + [row.few.config], said]))
"""


def test_a_build_is_repeatable_and_compiles_nothing_twice():
    same, nothing_new, many, registers, lost, said = compiled(BUILD, fresh=True)
    assert same and nothing_new and registers > 100 and len(said) == 2
    assert {"64x64w4s2e1", "128x128w8s2e1", "64x64w4s3e1", "128x128w8s3e1"} <= {*lost, many}
