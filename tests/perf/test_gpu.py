"""perf.gpu runs its steps within their limits, keeps their output, and continues after an interruption."""

import json
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from perf import gpu, peaks
from perf.gpu import DEVICE_LOST, Session
from tests.helpers.fake_gpu import FakeGpu
from tritonattn.measure import timing


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a shell script instead of Python; returns a session."""
    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(gpu.sys, "executable", str(path))
        monkeypatch.setattr(gpu, "GRACE", 1)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return Session(tmp_path, time.monotonic() + 60)

    return install


def test_step_keeps_its_output_and_its_exit_code(shell, tmp_path, capsys):
    session = shell("echo $3; exit $4")
    assert session.step("a", ["x", "one", "7"], 60) == (7, "one\n")
    assert session.step("a", ["x", "two", "0"], 60) == (0, "two\n")
    assert session.step("a", ["x", "three", "0"], 1.9) == (None, "")
    assert (tmp_path / "a.log").read_text() == "one\ntwo\n"
    assert capsys.readouterr().out == "a: exit code 7; one\na: two\na: skipped, 2 s are left\n"


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
    monkeypatch.setattr(gpu, "tests", lambda session, seconds: session.step("first", ["x"], 50))
    monkeypatch.setattr(gpu, "benchmark", None)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert gpu.main(["--out", str(tmp_path)]) == 130 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out == "interrupted; run the same command to continue\n"
    child = int((tmp_path / "first.log").read_text())
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


class Scripted(Session):
    """A session whose steps are recorded, and end with the given codes and outputs."""

    def __init__(self, folder, ends):
        super().__init__(folder, time.monotonic() + 540)
        self.ends, self.commands = iter(ends), []

    def step(self, name, arguments, limit):
        self.commands.append((name, arguments, limit))
        code, *output = next(self.ends)
        return code, output[0] if output else ""


def test_timing_tests_run_alone_then_gpu_tests_then_cases(tmp_path):
    session = Scripted(tmp_path, [(0,)] * 3)
    gpu.tests(session, 200)
    assert [name for name, *_ in session.commands] == ["tests-alone", "tests-gpu", "tests-cases"]
    (_, alone, limit), (_, tests, _), (_, all_cases, _) = session.commands
    assert alone[:3] == ["pytest", "-n", "0"] and alone[-2:] == ["-m", "gpu and alone"] and limit == pytest.approx(200, abs=1)
    assert tests[-2:] == ["-m", "gpu and not alone"] and Path(all_cases[-1]).exists() and not session.failed


@pytest.mark.parametrize(("end", "failed"), [
    ((1,), True), ((0,), False), ((None,), False), ((None, "5 passed in 9s\n"), False), ((0, "12 passed, 0 failed\n"), False),
    ((None, "FAILED a\n1 failed, 5 passed in 9s\n"), True), ((None, "12 passed, 2 errors in 1s\n"), True),
])
def test_failed_tests_are_found_although_the_limit_was_reached(tmp_path, end, failed):
    session = Scripted(tmp_path, [(0,), end, (0,)])
    gpu.tests(session, 200)
    assert session.failed == failed


@pytest.mark.parametrize(("ends", "runs", "failed"), [
    ([(0,), (0,)], 1, False), ([(0,), (DEVICE_LOST,), (-11,), (0,)], 3, False), ([(0,), (DEVICE_LOST,), (None,)], 2, False),
    ([(0,), (1,)], 1, True), ([(1,), (0,)], 1, True), ([(None,), (None,)], 1, False),
])
def test_benchmark_continues_after_a_lost_device(tmp_path, ends, runs, failed):
    session = Scripted(tmp_path, ends)
    gpu.benchmark(session, ["--suite", "short"])
    assert [name for name, *_ in session.commands] == ["peaks", *["benchmark"] * runs] and session.failed == failed
    command = session.commands[1][1]
    assert command[:4] == ["perf.run", "--out", str(tmp_path), "--minutes"] and command[5:] == ["--suite", "short"]


def test_tuning_sweeps_every_head_size_and_resumes(tmp_path):
    (tmp_path / "sweep-64-causal").mkdir()
    (tmp_path / "sweep-64-causal/plan.json").write_text("{}")
    session = Scripted(tmp_path, [(0,)] * 4 + [(None,), (1,)])
    gpu.tuning(session)
    assert session.failed and len(session.commands) == 6
    (name, first, *_), *_, (_, last, *_) = session.commands
    assert name == "sweep-128-full" and first[:3] == ["tritonattn", "sweep", str(tmp_path / name)]
    assert "4x32x32x4096x128" in first and "--causal" in last and "4x16x16x4096x256" in last
    resumed = session.commands[3][1]
    assert resumed[2].endswith("sweep-64-causal") and "--shape" not in resumed and "--minutes" in resumed


def test_whole_session(shell, tmp_path, capsys):
    shell(textwrap.dedent("""\
        case "$2" in
          pytest) echo "41 passed in 20s";;
          perf.peaks) echo "matmul: 700 TFLOP/s";;
          perf.run) echo "$@" | sed 's/.*--minutes [0-9.]* //';;
        esac"""))
    assert gpu.main(["--out", str(tmp_path / "out"), "--stages", "tests", "benchmark", "--suite", "small"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"tests-{name}: 41 passed in 20s" for name in ("alone", "gpu", "cases")), "peaks: matmul: 700 TFLOP/s",
        "benchmark: --suite short --baselines torch,cudnn,flash --seconds 0.1 --suite small"]


@pytest.mark.parametrize(("wrong", "message"), [(["--stages", "rest"], "invalid choice: 'rest'"),
                                                (["--suite", "large"], "invalid choice: 'large'")])
def test_wrong_options_are_errors_before_any_step(wrong, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out"), *wrong])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_gpu_is_an_error_before_any_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_peaks_are_rates(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(timing, "measure", lambda calls, timer, real=timing.measure: real(
        {name: timing.Timed([fake.kernel(name, 0.5)]) for name in calls}, timer))
    rates = peaks.peaks(fake, "cpu", size=8, count=100)
    assert rates["matmul"]["rate"] == pytest.approx(2 * 8**3 / 0.5 / 1e12) and rates["matmul"]["unit"] == "TFLOP/s"
    assert rates["copy"]["rate"] == pytest.approx(400 / 0.5 / 1e12) and rates["copy"]["seconds"] == pytest.approx(0.5)


@pytest.mark.gpu
@pytest.mark.alone
def test_peaks_of_this_gpu(tmp_path):
    assert peaks.main(["--out", str(tmp_path / "peaks.json")]) == 0
    content = json.loads((tmp_path / "peaks.json").read_text())
    assert content["peaks"]["matmul"]["rate"] > 1 and content["peaks"]["copy"]["rate"] > 0.01
