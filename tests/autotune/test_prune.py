"""Static pruning: every reason is found where it is planted; and compilers that hang, die or refuse stop nobody."""

import dataclasses
import os
import pickle
import sys
import threading
import time

import pytest
import torch

from tests.helpers.compile_server import compiled
from tritonattn import Config, Problem, gpu
from tritonattn.analysis.compile_report import KernelReport
from tritonattn.analysis.sass import Loop
from tritonattn.autotune import prune, worker_pool
from tritonattn.autotune.worker_pool import Failure, Workers

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


def test_a_child_compiles_with_the_precision_that_it_is_told():
    problem = dataclasses.replace(PROBLEM, dtype=torch.float32, d=64, dv=64)
    jobs = [("forward", problem, Config(64, 32, 8, 2), gpu.KNOWN["sm_100"], each) for each in ("ieee", "tf32", "ieee")]
    with Workers(1) as workers:
        found = list(workers.map(jobs))
    assert [(each.precision, each.mma_instruction, each.best_mma_instruction) for each in found] == [
        ("ieee", "", ""), ("tf32", "UTCHMMA", "UTCHMMA"), ("ieee", "", "")]
    assert found[1].duplicated == 1.0 and found[1].tensor_memory > 0 == found[0].tensor_memory and found[0] == found[2]
