"""perf.gpu runs its steps within their limits, keeps their output, and continues after an interruption."""

import json
import os
import signal
import textwrap
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from perf import baselines, cases, gpu, peaks, results
from perf.gpu import DEVICE_LOST, Ended, Visit
from tests.helpers.fake_gpu import FakeGpu
from tests.perf.recorded import bad, entry, ok, write
from tritonattn.measure import timing


def options(folder, **changed):
    defaults = {"stages": ["truth", "baseline"], "suite": "short", "baselines": "torch", "seconds": 0.1, "commit": None,
                "ptxas": None}
    return Namespace(out=folder, **defaults | changed)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a shell script instead of Python; returns the arguments of a visit's step."""
    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(gpu.sys, "executable", str(path))
        monkeypatch.setattr(gpu, "GRACE", 1)
        return Visit(options(tmp_path), time.monotonic() + 60)

    return install


def test_step_keeps_its_output_and_its_exit_code(shell, tmp_path, capsys):
    visit = shell("echo $3 $PTXAS; exit $4")
    assert visit.step("a", ["x", "one", "7"], 60, PTXAS="p") == (7, "one p\n")
    assert visit.step("a", ["x", "two", "0"], 60) == (0, "two\n")
    assert visit.step("a", ["x", "three", "0"], 1.9) == (None, "")
    assert (tmp_path / "a.log").read_text() == "one p\ntwo\n"
    summary = "a: exit code 7; one p\na: two\na: skipped, 2 s are left\n"
    assert capsys.readouterr().out == summary == (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize(("script", "output"), [
    ("trap 'echo interrupted; exit 5' INT; sleep 60 & wait", "interrupted\n"),
    ("trap '' INT; echo ignored; sleep 60", "ignored\n"),
])
def test_step_is_interrupted_and_then_killed_at_its_limit(shell, script, output, capsys):
    start = time.monotonic()
    assert shell(script).step("a", ["x"], 2.5) == (None, output) and time.monotonic() - start < 30
    assert "a: time limit reached; " in capsys.readouterr().out


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_sigterm_ends_the_step_with_its_children(shell, tmp_path, monkeypatch, capsys):
    shell("trap '' INT; sleep 60 & echo $!; wait; wait")
    monkeypatch.setattr(gpu, "truth", lambda visit: visit.step("first", ["x"], 50))
    monkeypatch.setattr(gpu, "baseline", None)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert gpu.main(["--out", str(tmp_path)]) == 130 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out == "== truth\ninterrupted; run the same command to continue\n"
    child = int((tmp_path / "first.log").read_text())
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


class Scripted(Visit):
    """A visit whose steps are recorded, and end with the given codes and outputs."""

    def __init__(self, folder, ends, **changed):
        super().__init__(options(folder, **changed), time.monotonic() + 540)
        self.ends, self.commands = iter(ends), []

    def step(self, name, arguments, limit, **environment):
        self.commands.append((name, arguments, limit, environment))
        code, *output = next(self.ends)
        return Ended(code, output[0] if output else "")


def test_truth_runs_timing_tests_alone_then_gpu_tests_then_cases(tmp_path):
    visit = Scripted(tmp_path, [(0,)] * 4, ptxas="/ptxas")
    gpu.truth(visit)
    assert [name for name, *_ in visit.commands] == ["truth-alone", "truth-gpu", "truth-gpu-ptxas", "truth-cases"]
    (_, alone, limit, _), (_, tests, _, plain), (_, again, _, other), (_, all_cases, _, _) = visit.commands
    assert alone[:3] == ["pytest", "-n", "0"] and alone[-2:] == ["-m", "gpu and alone"] and limit == pytest.approx(243, abs=1)
    assert tests == again and tests[-2:] == ["-m", "gpu and not alone"] and not plain
    assert other == {"TRITON_PTXAS_PATH": "/ptxas"} and Path(all_cases[-1]).exists() and not visit.failed


@pytest.mark.parametrize(("end", "failed"), [
    ((1,), True), ((0,), False), ((None,), False), ((None, "5 passed in 9s\n"), False), ((0, "12 passed, 0 failed\n"), False),
    ((None, "FAILED a\n1 failed, 5 passed in 9s\n"), True), ((None, "12 passed, 2 errors in 1s\n"), True),
])
def test_failed_tests_are_found_although_the_limit_was_reached(tmp_path, end, failed):
    visit = Scripted(tmp_path, [(0,), end, (0,)])
    gpu.truth(visit)
    assert visit.failed == failed


@pytest.mark.parametrize(("ends", "runs", "failed"), [
    ([(0,), (0,)], 1, False), ([(0,), (DEVICE_LOST,), (-11,), (0,)], 3, False), ([(0,), (DEVICE_LOST,), (None,)], 2, False),
    ([(0,), (1,)], 1, True), ([(1,), (0,)], 1, True), ([(None,), (None,)], 1, False),
])
def test_baseline_continues_after_a_lost_device(tmp_path, ends, runs, failed):
    visit = Scripted(tmp_path, ends)
    gpu.baseline(visit)
    assert [name for name, *_ in visit.commands] == ["peaks", *["baseline"] * runs] and visit.failed == failed
    command = visit.commands[1][1]
    assert command[:5] == ["perf.run", "--suite", "short", "--baselines", "torch"] and "--minutes" in command


def test_earlier_results_are_continued_and_newer_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "earlier")
    for name in ("a", "b"):
        write(tmp_path / "earlier", name=name)
    newer = tmp_path / "out" / "nvidia-h200" / "a.jsonl"
    newer.parent.mkdir(parents=True)
    newer.write_text("newer")
    gpu.baseline(Scripted(tmp_path / "out", [(0,), (0,)]))
    assert newer.read_text() == "newer"
    assert newer.with_name("b.jsonl").read_bytes() == (tmp_path / "earlier/nvidia-h200/b.jsonl").read_bytes()


@pytest.mark.parametrize("wrong", [False, True])
def test_summary_has_a_line_for_each_job_of_this_run(tmp_path, wrong, capsys):
    outcome = bad("wrong") if wrong else ok(2e-3)
    path = write(tmp_path, entry(cases.SHORT[0], suite="short", tritonattn=outcome, fast=ok(1e-3)))
    write(tmp_path, entry(cases.SHORT[1], suite="short", tritonattn=ok(1.0)), name="other")
    visit = Scripted(tmp_path, [(0,), (DEVICE_LOST, f"results: {path}\n[1/2]\n"), (-9, "killed early\n"), (None,)])
    gpu.baseline(visit)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("short/d128 full 4096/forward ") and visit.failed == wrong
    assert line.endswith("tritonattn wrong: error 3.25 | of 1" if wrong else "fast 1000 us, ratio 0.50")


def test_tuning_sweeps_every_head_size_and_resumes(tmp_path):
    (tmp_path / "sweep-64-causal").mkdir()
    (tmp_path / "sweep-64-causal/plan.json").write_text("{}")
    visit = Scripted(tmp_path, [(0,)] * 4 + [(None,), (1,)])
    gpu.tuning(visit)
    assert visit.failed and len(visit.commands) == 6
    (name, first, *_), *_, (_, last, *_) = visit.commands
    assert name == "sweep-128-full" and first[:3] == ["tritonattn", "sweep", str(tmp_path / name)]
    assert "4x32x32x4096x128" in first and "--causal" in last and "4x16x16x4096x256" in last
    resumed = visit.commands[3][1]
    assert resumed[2].endswith("sweep-64-causal") and "--shape" not in resumed and "--minutes" in resumed


def test_whole_visit(shell, tmp_path, capsys):
    path = write(tmp_path / "other", entry(cases.SHORT[0], suite="short", tritonattn=ok(2e-3)))
    shell(textwrap.dedent(f"""\
        case "$2" in
          pytest) echo "41 passed in 20s";;
          perf.peaks) echo "matmul: 700 TFLOP/s";;
          perf.run) echo "results: {path}"; echo "[1/1]";;
        esac"""))
    assert gpu.main(["--out", str(tmp_path / "out"), "--stages", "truth,baseline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == ["== truth", *(f"truth-{name}: 41 passed in 20s" for name in ("alone", "gpu", "cases")), "== baseline",
                         "peaks: matmul: 700 TFLOP/s", "baseline: [1/1]"] and lines[7].startswith("short/d128 full 4096")
    assert (tmp_path / "out/summary.txt").read_text().splitlines() == lines and len(lines) == 8
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path), "--stages", "truth,rest"])
    assert "unknown rest; known are truth, baseline, tuning" in capsys.readouterr().err


def test_peaks_are_rates(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(timing, "measure", lambda calls, timer, real=timing.measure: real(
        {name: timing.Timed([fake.kernel(name, 0.5)]) for name in calls}, timer))
    rates = peaks.peaks(fake, "cpu", size=8, count=100)
    assert rates["matmul"]["rate"] == pytest.approx(2 * 8**3 / 0.5 / 1e12) and rates["matmul"]["unit"] == "TFLOP/s"
    assert rates["copy"]["rate"] == pytest.approx(400 / 0.5 / 1e12) and rates["copy"]["seconds"] == pytest.approx(0.5)


@pytest.mark.gpu
@pytest.mark.alone
def test_peaks_of_this_gpu(tmp_path, unwritten_memory_is_nan):
    # cuDNN has no deterministic algorithms
    torch.use_deterministic_algorithms(False)
    assert peaks.main(["--out", str(tmp_path / "peaks.json")]) == 0
    content = json.loads((tmp_path / "peaks.json").read_text())
    assert content["peaks"]["matmul"]["rate"] > 1 and content["peaks"]["copy"]["rate"] > 0.01
    assert set(content["backends"].values()) <= set(baselines.BACKENDS) and len(content["backends"]) == 48
