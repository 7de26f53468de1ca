"""A visit to a GPU ends in time, whatever its steps do, and leaves what they wrote."""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from perf import baselines, cases, gpu, peaks
from perf import results as record
from perf.gpu import LOST, Ended, Visit
from tests.helpers.fake_gpu import FakeGpu
from tritonattn.measure import journal, timing

PYTHON = [sys.executable, "-c"]
JOB = {"suite": "short", "direction": "forward", "time": "2026-11-21T15:04:05Z"}


def visit(folder, seconds=60.0, **options):
    return Visit(folder, time.perf_counter() + seconds, "short", None, 0.1, **options)


def recorded(path, status="ok", names=("a", "b")):
    """A file of results whose jobs have these names, ours with this status."""
    ours = {"status": status, "seconds": 2e-3} if status == "ok" else {"status": status, "reason": "why"}
    with journal.Journal(path, {"suite": "short", "environment": {"gpu": "x"}}) as book:
        for name in names:
            book.append({**JOB, "job": f"short/{name}/forward", "case": name, "problem": cases.problem(1, 1, 8, 8).as_json(),
                         "results": {"tritonattn": ours, "fast": {"status": "ok", "seconds": 1e-3}}})
    return path


class Scripted(Visit):
    """Steps that are written down instead of done, and end as they are told: (code, in time[, output])."""

    def __init__(self, folder, ends, seconds=540.0, **options):
        super().__init__(folder, seconds, "short", None, 0.1, now=lambda: 0.0, **options)
        self.ends, self.commands = iter(ends), []

    def step(self, name, command, limit):
        self.commands.append((name, command, limit))
        code, in_time, *output = next(self.ends)
        return Ended(code, in_time, output[0] if output else f"first\n{name} went well\n")


def test_a_step_leaves_its_output_and_its_code(tmp_path):
    ended = visit(tmp_path).step("a", [*PYTHON, "print('hello'); raise SystemExit(7)"], 60)
    assert ended == (7, True, "hello\n") and (tmp_path / "a.log").read_text() == "hello\n"


def test_a_log_grows_and_a_step_knows_its_own_part(tmp_path):
    for word in ("one", "two"):
        assert visit(tmp_path).step("a", [*PYTHON, f"print({word!r})"], 60).output == f"{word}\n"
    assert visit(tmp_path).step("a", [*PYTHON, "print('three')"], 5) == (None, False, "not begun: 5 s were left\n")
    assert (tmp_path / "a.log").read_text() == "one\ntwo\nnot begun: 5 s were left\n"


@pytest.mark.parametrize(("script", "said", "code"), [
    ("trap 'echo put in order; exit 5' INT; sleep 60 & wait", "put in order\n", 5),
    ("trap '' INT; echo deaf; sleep 60", "deaf\n", None)])
def test_a_step_that_takes_too_long_is_ended(tmp_path, monkeypatch, script, said, code):
    monkeypatch.setattr(gpu, "GRACE", 1)
    start = time.perf_counter()
    assert visit(tmp_path).step("a", ["sh", "-c", script], 3) == (code, False, said)
    assert time.perf_counter() - start < 30 and (tmp_path / "a.log").read_text() == said


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks the kernel which processes live")
@pytest.mark.parametrize("leader", ["exit", "wait"])
def test_nobody_outlives_a_step(tmp_path, monkeypatch, leader):
    monkeypatch.setattr(gpu, "GRACE", 1)
    # deaf to the interrupt, while the leader goes: by itself, or when it is interrupted
    script = f"(trap '' INT; sleep 60) & echo $!; trap 'exit' INT; {leader}"
    ended = visit(tmp_path).step("a", ["sh", "-c", script], 4)
    assert ended.in_time == (leader == "exit")
    for _ in range(100):
        if not alive(int(ended.output)):
            break
        time.sleep(0.05)
    assert not alive(int(ended.output))


def test_tuning_sweeps_every_head_size_and_goes_on_where_it_was(tmp_path):
    (tmp_path / "sweep-64-causal").mkdir()
    (tmp_path / "sweep-64-causal/plan.json").write_text("{}")
    scripted = Scripted(tmp_path, [(0, True)] * 4 + [(2, False), (1, True)])
    gpu.tuning(scripted)
    assert scripted.bad and len(scripted.commands) == 6
    (_, first, limit), *_, (_, last, _) = scripted.commands
    assert first[1:5] == ["-m", "tritonattn", "sweep", str(tmp_path / "sweep-128-full")] and "4x32x32x4096x128" in first
    assert "--causal" in last and "4x16x16x4096x256" in last and limit == pytest.approx(530)
    goes_on = scripted.commands[3][1]
    assert goes_on[4].endswith("sweep-64-causal") and "--shape" not in goes_on and "--minutes" in goes_on
    assert scripted.lines[4] == "sweep of 256 full: time was up; tuning went well"


@pytest.mark.parametrize(("output", "failures"), [
    ("..F.\n1 failed, 3 passed in 2.05s\n", True), ("12 passed, 2 errors in 1s\n", True), ("40 passed, 3 skipped\n", False),
    ("FAILED a::b\n!!! KeyboardInterrupt !!!\n(to show a full traceback)\n2 failed, 7 passed in 60s\n", True),
    ("test_failed.py\n10 passed, 0 failed in 1s\n", False), ("", False),
])
def test_failures_are_read_from_the_last_words_of_a_test_run(output, failures):
    assert Ended(2, False, output).failures == failures


def test_truth_runs_the_gpu_tests_the_cases_and_the_tests_of_timing_alone(tmp_path):
    scripted = Scripted(tmp_path, [(0, True), (2, False), (0, True)])
    gpu.truth(scripted)
    assert not scripted.bad and scripted.lines == [
        "truth-gpu: truth-gpu went well", "truth-cases: time was up; truth-cases went well",
        "truth-alone: truth-alone went well"]
    (_, first, limit), (_, second, _), (_, third, _) = scripted.commands
    assert first[-2:] == ["-m", "gpu and not alone"] and second[-1] == "tests/test_attention.py"
    assert third[third.index("-n") + 1] == "0" and third[-2:] == ["-m", "gpu and alone"]
    assert limit == pytest.approx(0.45 * 530)


@pytest.mark.parametrize(("end", "bad"), [
    ((1, True), True), ((0, True), False), ((None, False), False), ((2, False, "5 passed in 9s\n"), False),
    ((2, False, "1 failed, 5 passed in 9s\n"), True),
])
def test_a_test_that_fails_is_known_although_time_ran_out(tmp_path, end, bad):
    scripted = Scripted(tmp_path, [end, (0, True), (0, True)])
    gpu.truth(scripted)
    assert scripted.bad == bad


@pytest.mark.parametrize(("ends", "runs", "bad"), [
    ([(0, True), (0, True)], 1, False), ([(0, True), (LOST, True), (-11, True), (0, True)], 3, False),
    ([(0, True), (LOST, True), (130, False)], 2, False), ([(0, True), (1, True)], 1, True), ([(1, True), (0, True)], 1, True),
    ([(130, False), (0, True)], 1, False), ([(None, False), (None, False)], 1, False),
])
def test_the_baseline_is_taken_up_again_when_the_device_is_lost(tmp_path, ends, runs, bad):
    scripted = Scripted(tmp_path, ends)
    gpu.baseline(scripted)
    assert [name for name, *_ in scripted.commands] == ["ceilings", *["baseline"] * runs] and scripted.bad == bad
    command = scripted.commands[1][1]
    assert command[2:6] == ["perf.run", "--suite", "short", "--rivals"] and "--minutes" in command
    assert command[command.index("--resume-from") + 1] == str(record.RESULTS)


def test_the_table_is_of_this_plans_file_alone(tmp_path):
    mine = recorded(tmp_path / "x" / "short-1.jsonl")
    recorded(tmp_path / "x" / "short-2.jsonl", names=["another plan"])
    said = f"results: {mine}\n[1/2] and so on\n"
    scripted = Scripted(tmp_path, [(0, True), (LOST, True, said), (-9, True, "killed before that\n"), (0, True, said)])
    gpu.baseline(scripted)
    assert [line.split()[0] for line in scripted.lines[2:]] == ["short/a/forward", "short/b/forward"] and not scripted.bad
    assert scripted.lines[-1].endswith("fast 1000 us, 0.50 of our time")


def test_a_wrong_result_of_ours_is_known_although_time_ran_out(tmp_path):
    path = recorded(tmp_path / "short-1.jsonl", status="wrong")
    scripted = Scripted(tmp_path, [(0, True), (130, False, f"results: {path}\n")])
    gpu.baseline(scripted)
    assert scripted.bad


def test_results_that_cannot_be_read_are_no_end_of_the_visit(tmp_path):
    scripted = Scripted(tmp_path, [(0, True), (0, True, f"results: {tmp_path / 'none.jsonl'}\n")])
    gpu.baseline(scripted)
    assert "no results: " in scripted.lines[-1] and "none.jsonl" in scripted.lines[-1]


def test_the_table_comes_last_and_is_added_to_the_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", {"truth": lambda visit: visit.say("all passed"),
                                       "baseline": lambda visit: visit.say("ours 1 us")})
    assert gpu.main(["--out", str(tmp_path)]) == 0
    first = "== truth\nall passed\n== baseline\nours 1 us\n"
    assert capsys.readouterr().out == first == (tmp_path / "summary.txt").read_text()
    assert gpu.main(["--out", str(tmp_path), "--only", "baseline"]) == 0
    assert capsys.readouterr().out == "== baseline\nours 1 us\n"
    assert (tmp_path / "summary.txt").read_text() == first + "== baseline\nours 1 us\n"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--minutes", "0.1"])
    assert "--minutes: expected more than" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_was_found_is_kept_whatever_happens_next(tmp_path, monkeypatch, capsys, error):
    def baseline(visit):
        # it is there before the step has ended
        assert (tmp_path / "summary.txt").read_text() == "== truth\nall passed\n== baseline\n"
        raise error

    monkeypatch.setattr(gpu, "STEPS", {"truth": lambda visit: visit.say("all passed"), "baseline": baseline})
    if error is KeyboardInterrupt:
        assert gpu.main(["--out", str(tmp_path)]) == 130
    else:
        with pytest.raises(error):
            gpu.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out == "== truth\nall passed\n== baseline\n"


def test_a_request_to_end_ends_the_step_and_the_visit(tmp_path, monkeypatch, capsys):
    def first(visit):
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        ended = visit.step("first", ["sh", "-c", "trap 'echo put in order; exit' INT; sleep 60 & wait"], 60)
        visit.say(ended.last_line)

    def second(visit):
        visit.say(visit.step("second", ["sh", "-c", "echo begun"], 60).last_line)

    monkeypatch.setattr(gpu, "STEPS", {"first": first, "second": second})
    before, start = signal.getsignal(signal.SIGTERM), time.perf_counter()
    assert gpu.main(["--out", str(tmp_path)]) == 130 and time.perf_counter() - start < 30
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out == "== first\nput in order\n== second\nnot begun: the visit was stopped\n"


def test_a_whole_visit(tmp_path, monkeypatch, capsys):
    """Every process but the visit's own is stood in for by one that says and writes what it would."""
    results = recorded(tmp_path / "elsewhere.jsonl")
    python = tmp_path / "python"
    python.write_text(textwrap.dedent(f"""\
        #!/bin/sh
        shift
        case "$1" in
          pytest) echo "41 passed in 20s";;
          perf.peaks) echo "matmul: 700 TFLOP/s"; echo "copy: 4 TB/s";;
          perf.run) mkdir -p "{tmp_path}/out/x"; cp {results} "{tmp_path}/out/x/short-1.jsonl"
                    echo "results: {tmp_path}/out/x/short-1.jsonl";;
        esac
        """))
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "9"]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "out" / "summary.txt").read_text()
    assert out.splitlines()[:7] == ["== truth", *(f"truth-{name}: 41 passed in 20s" for name in ("gpu", "cases", "alone")),
                                    "== baseline", "matmul: 700 TFLOP/s", "copy: 4 TB/s"]
    assert len(out.splitlines()) == 9 and {path.stem for path in (tmp_path / "out").glob("*.log")} == {
        "truth-gpu", "truth-cases", "truth-alone", "ceilings", "baseline"}


def test_the_short_suite_begins_with_what_tells_most():
    first = [case.problem for case in cases.SUITES["short"][:6]]
    assert {(problem.d, problem.mask) for problem in first} == {(d, mask) for d in (64, 128, 256) for mask in cases.MASKS}


def test_ceilings_are_rates_of_what_was_done(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(timing, "measure", lambda contenders, stopwatch, real=timing.measure: real(
        {name: timing.Timed([fake.kernel(name, 0.5)]) for name in contenders}, stopwatch))
    found = peaks.ceilings(fake, "cpu", size=8, count=100)
    assert found["matmul"]["rate"] == pytest.approx(2 * 8**3 / 0.5 / 1e12) and found["matmul"]["unit"] == "TFLOP/s"
    assert found["copy"]["rate"] == pytest.approx(400 / 0.5 / 1e12) and found["copy"]["seconds"] == pytest.approx(0.5)


@pytest.mark.gpu
@pytest.mark.alone
def test_the_ceilings_of_this_gpu(tmp_path, unwritten_memory_is_nan):
    # cuDNN has no deterministic algorithms, which tests ask for
    torch.use_deterministic_algorithms(False)
    assert peaks.main(["--out", str(tmp_path / "ceilings.json")]) == 0
    found = json.loads((tmp_path / "ceilings.json").read_text())
    assert found["ceilings"]["matmul"]["rate"] > 1 and found["ceilings"]["copy"]["rate"] > 0.01
    assert set(found["backends"].values()) <= set(baselines.BACKENDS) and len(found["backends"]) == 48
