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

from perf import baselines, gpu, peaks
from perf.gpu import DEVICE_LOST
from tests.helpers.fake_gpu import FakeGpu
from tritonattn.autotune import trials
from tritonattn.measure import timing


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a shell script instead of Python."""
    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(gpu.sys, "executable", str(path))
        monkeypatch.setattr(gpu, "GRACE", 1)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    return install


def test_step_keeps_its_output_and_its_exit_code(shell, tmp_path, capsys):
    shell("echo $3; exit $4")
    assert gpu.run_step(tmp_path / "a.log", ["x", "one", "7"], 60) == 7
    assert gpu.run_step(tmp_path / "a.log", ["x", "two", "0"], 60) == 0
    assert (tmp_path / "a.log").read_text() == "one\ntwo\n"
    assert capsys.readouterr().out == "a: exit code 7; one\na: two\n"


@pytest.mark.parametrize(("script", "output"), [
    ("trap 'echo interrupted; exit 5' INT; sleep 60 & wait", "interrupted\n"),
    ("trap '' INT; echo ignored; sleep 60", "ignored\n"),
])
def test_step_is_interrupted_and_then_killed_at_its_limit(shell, tmp_path, script, output, capsys, request):
    shell(script)
    start, before = time.monotonic(), signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts background jobs
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert gpu.run_step(tmp_path / "a.log", ["x"], 2.0) is None and time.monotonic() - start < 40
    assert capsys.readouterr().out == f"a: time limit reached; {output}"


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_sigterm_ends_the_step_with_its_children(shell, tmp_path, monkeypatch, capsys):
    shell("trap '' INT; sleep 60 & echo $!; wait; wait")
    monkeypatch.setattr(gpu, "steps", lambda out, benchmark: iter([("tests", "first", 1.0, ["x"])]))
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert gpu.main(["--out", str(tmp_path)]) == 130 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out == "interrupted; run the same command to continue\n"
    child = int((tmp_path / "first.log").read_text())
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Run stages whose steps end with the given codes; returns (success, [(name, arguments, limit)])."""
    def go(stage, codes, *benchmark):
        ends, done = iter(codes), []
        monkeypatch.setattr(gpu, "run_step", lambda path, *rest: done.append((path.stem, *rest)) or next(ends))
        return gpu.run_stages(tmp_path, [stage], list(benchmark), time.monotonic() + 540), done

    return go


def test_timing_tests_run_alone_then_gpu_tests_then_cases(scripted):
    success, steps = scripted("tests", [0, 0, 0, 0])
    assert success and [name for name, *_ in steps] == ["tests-alone", "tests-gpu", "tests-float32", "tests-cases"]
    (_, alone, limit), (_, tests, _), (_, slow_tests, _), (_, all_cases, _) = steps
    assert alone[:3] == ["pytest", "-n", "0"] and alone[-2:] == ["-m", "gpu and alone"] and limit == pytest.approx(66, abs=1)
    assert tests[-4:] == ["-m", "gpu and not alone", "-k", "not float32"] and slow_tests[-2:] == ["-k", "float32"]
    assert Path(all_cases[-1]).exists()


@pytest.mark.parametrize(("codes", "success"), [((0, 0, 0, 0), True), ((0, 1, 0, 0), False), ((None, 0, 0, 0), False)])
def test_a_step_that_fails_or_exceeds_its_limit_is_a_failure(scripted, codes, success):
    assert scripted("tests", codes)[0] == success


@pytest.mark.parametrize(("codes", "success"), [
    ([0], True), ([DEVICE_LOST, -11, 0], True), ([DEVICE_LOST, None], False), ([1], False),
])
def test_benchmark_continues_after_a_lost_device(scripted, codes, success, tmp_path):
    done, steps = scripted("benchmark", codes, "--suite", "short")
    assert done == success and [name for name, *_ in steps] == ["benchmark"] * len(codes)
    assert steps[0][1] == ["perf.run", "--out", str(tmp_path), "--suite", "short", "--minutes", "8.50"]


def test_peaks_are_one_step(scripted, tmp_path):
    _, ((name, arguments, _),) = scripted("peaks", [0])
    assert name == "peaks" and arguments == ["perf.peaks", "--out", str(tmp_path / "peaks.json")]


def test_steps_are_skipped_without_time(tmp_path, capsys):
    assert gpu.run_stages(tmp_path, ["benchmark"], [], time.monotonic() + 29)
    assert capsys.readouterr().out == "benchmark: skipped, 14 s are left for it\n"


def test_tuning_sweeps_every_head_size_and_resumes(scripted, tmp_path):
    (tmp_path / "sweep-64-causal").mkdir()
    (tmp_path / "sweep-64-causal" / trials.JOURNAL).write_text("{}")
    success, steps = scripted("tuning", [0] * 5 + [1])
    (name, first, *_), *_, (_, last, *_) = steps
    assert not success and len(steps) == 6
    assert name == "sweep-128-full" and first[:3] == ["tritonattn", "sweep", str(tmp_path / name)]
    assert "4x32x32x4096x128" in first and "--causal" in last and "4x16x16x4096x256" in last
    resumed = steps[3][1]
    assert resumed[2].endswith("sweep-64-causal") and "--shape" not in resumed and "--minutes" in resumed


def test_whole_command(shell, tmp_path, capsys):
    shell(textwrap.dedent("""\
        case "$2" in
          pytest) echo "41 passed in 20s";;
          perf.run) echo "$@" | sed 's/.*--suite short/--suite short/; s/ --minutes.*//';;
        esac"""))
    assert gpu.main(["--out", str(tmp_path / "out"), "--stages", "tests", "benchmark", "--suite", "small"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"tests-{name}: 41 passed in 20s" for name in ("alone", "gpu", "float32", "cases")),
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
def test_peaks_of_this_gpu(tmp_path, unwritten_memory_is_nan):
    # cuDNN has no deterministic algorithms
    torch.use_deterministic_algorithms(False)
    assert peaks.main(["--out", str(tmp_path / "peaks.json")]) == 0
    content = json.loads((tmp_path / "peaks.json").read_text())
    assert content["peaks"]["matmul"]["rate"] > 1 and content["peaks"]["copy"]["rate"] > 0.01
    assert set(content["backends"].values()) <= set(baselines.BACKENDS) and len(content["backends"]) == 48
