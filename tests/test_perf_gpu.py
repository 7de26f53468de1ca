"""A visit to a GPU ends in time, whatever its steps do, and leaves what they wrote."""

import sys
import time

import pytest

from perf import cases, ceilings, gpu
from perf.gpu import LOST, Visit
from tests.fakegpu import FakeGpu
from tritonattn import timing


def visit(folder, seconds=60.0, **options):
    return Visit(folder, time.perf_counter() + seconds, "short", None, 0.1, **options)


class Scripted(Visit):
    """Steps that are written down instead of done, and return what they are told."""

    def __init__(self, folder, codes, clock=lambda: 0.0, seconds=540.0):
        super().__init__(folder, seconds, "short", None, 0.1, now=clock)
        self.codes, self.commands = iter(codes), []

    def step(self, name, command, limit):
        self.commands.append((name, command, limit))
        (self.out / f"{name}.log").write_text(f"first\n{name} went well\n")
        return next(self.codes)


def test_a_step_leaves_its_output_and_its_code(tmp_path):
    assert visit(tmp_path).step("a", [sys.executable, "-c", "print('hello'); raise SystemExit(7)"], 60) == 7
    assert (tmp_path / "a.log").read_text() == "hello\n"


@pytest.mark.parametrize(("script", "said"), [
    ("trap 'echo put in order; exit' INT; sleep 60 & wait", "put in order\n"), ("trap '' INT; echo deaf; sleep 60", "deaf\n")])
def test_a_step_that_takes_too_long_is_ended(tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(gpu, "GRACE", 1)
    start = time.perf_counter()
    assert visit(tmp_path).step("a", ["sh", "-c", script], 3) is None
    assert time.perf_counter() - start < 30 and (tmp_path / "a.log").read_text() == said


def test_a_step_without_time_is_not_begun(tmp_path):
    assert visit(tmp_path).step("a", [sys.executable, "-c", "print('hello')"], 5) is None
    assert (tmp_path / "a.log").read_text() == "not begun: 5 s were left\n"


def test_truth_runs_the_gpu_tests_and_the_cases(tmp_path):
    scripted = Scripted(tmp_path, [0, None])
    lines = gpu.truth(scripted)
    assert lines == ["truth-gpu: truth-gpu went well", "truth-cases: time was up; truth-cases went well"] and not scripted.bad
    (_, first, limit), (_, second, _) = scripted.commands
    assert first[-2:] == ["-m", "gpu"] and second[-1] == "tests/test_attention.py" and limit == pytest.approx(0.45 * 530)
    scripted = Scripted(tmp_path, [1, 0])
    gpu.truth(scripted)
    assert scripted.bad


@pytest.mark.parametrize(("codes", "runs", "bad"), [
    ([0, 0], 1, False), ([0, LOST, -11, 0], 3, False), ([0, LOST, None], 2, False), ([0, 1], 1, True), ([1, 0], 1, True),
])
def test_the_baseline_is_taken_up_again_when_the_device_is_lost(tmp_path, codes, runs, bad):
    scripted = Scripted(tmp_path, codes)
    gpu.baseline(scripted)
    assert [name for name, *_ in scripted.commands] == ["ceilings", *["baseline"] * runs] and scripted.bad == bad
    command = scripted.commands[1][1]
    assert command[2:6] == ["perf.run", "--suite", "short", "--rivals"] and "--minutes" in command


def test_earlier_results_are_taken_along(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.record, "RESULTS", tmp_path / "results")
    for name in ("h200/short-1.jsonl", "h200/paper-1.jsonl"):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text("earlier")
    (tmp_path / "out").mkdir()
    gpu._bring_earlier(visit(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").rglob("*.jsonl")] == ["short-1.jsonl"]


def test_the_table_comes_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", {"truth": lambda visit: ["all passed"], "baseline": lambda visit: ["ours 1 us"]})
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "== truth\nall passed\n== baseline\nours 1 us\n" == (tmp_path / "summary.txt").read_text()
    assert gpu.main(["--out", str(tmp_path), "--only", "baseline"]) == 0
    assert capsys.readouterr().out == "== baseline\nours 1 us\n"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--minutes", "0.1"])
    assert "--minutes: expected more than" in capsys.readouterr().err


def test_the_short_suite_begins_with_what_tells_most():
    first = [case.problem for case in cases.SUITES["short"][:6]]
    assert {(problem.d, problem.mask) for problem in first} == {(d, mask) for d in (64, 128, 256) for mask in cases.MASKS}


def test_ceilings_are_rates_of_what_was_done(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(timing, "measure", lambda contenders, clock, settle=timing.measure: settle(
        {name: timing.Contender([fake.kernel(name, 0.5)]) for name in contenders}, clock))
    found = ceilings.ceilings(fake, "cpu", size=8, count=100)
    assert found["matmul"]["rate"] == pytest.approx(2 * 8**3 / 0.5 / 1e12) and found["matmul"]["unit"] == "TFLOP/s"
    assert found["copy"]["rate"] == pytest.approx(400 / 0.5 / 1e12) and found["copy"]["seconds"] == pytest.approx(0.5)


@pytest.mark.gpu
def test_a_whole_visit(tmp_path, device):
    assert ceilings.main(["--out", str(tmp_path / "ceilings.json")]) == 0
    assert "matmul" in (tmp_path / "ceilings.json").read_text()
