"""Compilers that hang, die or fail do not stop the other jobs; no child outlives its pool."""

import dataclasses
import pickle
import sys
import time

import pytest
import torch

from tritonattn import Config, Problem, gpu
from tritonattn.autotune.worker_pool import Child, Failure, Workers

PROBLEM = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16)
# without the package: importing torch takes seconds
LOOP = """
import os, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
while True:
    job = pipe.recv()
    {work}
    pipe.send(("done", *job))
"""


def code(work="pass"):
    return LOOP.format(work=work)


def test_results_keep_the_order_of_the_jobs_and_children_are_reused():
    with Workers(2, code=code("time.sleep(job[1])\n    job = (*job, os.getpid())")) as workers:
        results = [*workers.map([("slow", 0.5), ("fast", 0), ("fast", 0)]), *workers.map([("again", 0)])]
        assert [result[1] for result in results] == ["slow", "fast", "fast", "again"]
        assert len({result[-1] for result in results}) == 2
        assert list(workers.map([])) == []


def test_a_hanging_compiler_is_killed_and_the_others_continue():
    with Workers(2, timeout=2, code=code("time.sleep(600 * (job[0] == 'hang'))")) as workers:
        results = list(workers.map([("hang",), ("one",), ("hang",), ("two",)]))
        assert results[1::2] == [("done", "one"), ("done", "two")]
        assert results[0] == results[2] == Failure("compile timeout", "no result in 2 s")


def test_a_timeout_kills_what_the_compiler_started(tmp_path):
    work = f"""import subprocess; p = subprocess.Popen(["sleep", "600"]); open({str(tmp_path / "pid")!r}, "w").write(str(p.pid))
    time.sleep(600)"""
    with Workers(1, timeout=2, code=code(work)) as workers:
        assert next(workers.map([("hang",)])).code == "compile timeout"
    pid = (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and " Z " not in (stat := status(pid)) and stat:
        time.sleep(0.05)
    assert not stat or " Z " in stat


def status(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def test_a_compiler_that_hangs_in_the_middle_of_its_result_is_killed():
    with Workers(1, timeout=2, code=code("(os.write(pipe.fileno(), b'abc'), time.sleep(600 * (job[0] == 'hang')))")) as workers:
        assert next(workers.map([("hang",)])).code == "compile timeout"


@pytest.mark.parametrize("work", ["os._exit(7) if job[0] == 'die' else None",
                                  "(os.write(pipe.fileno(), b'abc'), os._exit(0)) if job[0] == 'die' else None"],
                         ids=["before the result", "in the result"])
def test_a_dead_compiler_is_replaced(work):
    with Workers(1, code=code(work)) as workers:
        results = list(workers.map([("die",), ("one",)]))
    assert results == [Failure("compile error", "its process ended"), ("done", "one")]


def test_a_compiler_that_does_not_start_fails_every_job():
    with Workers(2, code="sys.exit(1)") as workers:
        results = list(workers.map([("a",)] * 3))
    assert [result.code for result in results] == ["compile error"] * 3


def test_no_child_outlives_its_pool():
    with Workers(2, code=code("time.sleep(600 * (job[0] == 'hang'))")) as workers:
        list(workers.map([("a",), ("b",)]))
        suspended = workers.map([("c",), ("hang",), ("hang",), ("never",), ("never",)])
        next(suspended)
        children = list(workers._children)
    assert len(children) == 2 and all(child.process.poll() is not None for child in children)


def test_two_maps_do_not_share_a_busy_child():
    with Workers(2, code=code()) as workers:
        for first in workers.map([("a",), ("b",), ("c",)]):
            assert next(workers.map([("inner", *first)])) == ("done", "inner", *first)


def test_a_job_that_cannot_be_pickled_raises():
    with Workers(1, code=code()) as workers:
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            next(workers.map([(lambda: None,)]))
        assert next(workers.map([("b",)])) == ("done", "b")


@pytest.mark.parametrize("uses_gpu, inherited", [(False, [None, "", None]), (True, ["1", None, None])])
def test_only_a_child_that_uses_the_gpu_inherits_the_interpreter(uses_gpu, inherited, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITONATTN_AUTOTUNE", "quick")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "TRITONATTN_AUTOTUNE"
    child = Child(code(f"job = [os.environ.get(name) for name in {names}]"), uses_gpu)
    assert child.ask((), 60, ("hang", "death")) == ("done", *inherited)
    child.stop()


def test_another_python_runs_the_compilers(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nWHICH=other exec {sys.executable} \"$@\"\n")
    python.chmod(0o755)
    with Workers(1, python=str(python), code=code("job = (os.environ['WHICH'],)")) as workers:
        assert next(workers.map([()])) == ("done", "other")


def test_compilers_use_the_requested_precision_and_return_what_is_refused():
    problem = dataclasses.replace(PROBLEM, dtype=torch.float32)
    unknown = gpu.Gpu("none", "sm_12345", 1, 99 << 10)
    blackwell = gpu.KNOWN["sm_100"]
    jobs = [("forward", problem, Config(64, 32, 8, 2), blackwell, precision) for precision in ("ieee", "tf32", "ieee")]
    with Workers(1) as workers:
        *reports, failure = workers.map([*jobs, ("forward", PROBLEM, Config(64, 64), unknown)])
    assert [(report.precision, report.mma_instruction, report.best_mma_instruction) for report in reports] == [
        ("ieee", "", ""), ("tf32", "UTCHMMA", "UTCHMMA"), ("ieee", "", "")]
    assert reports[1].duplicated == 1.0 and reports[1].tensor_memory > 0 == reports[0].tensor_memory
    assert reports[0] == reports[2]
    assert isinstance(failure, Failure) and failure.code == "compile error" and failure.message
