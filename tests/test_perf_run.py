"""Runs go on where a kill left them, refuse to time what is wrong, and say how far they are."""

import json

import pytest
import torch

from perf import measure, record, rivals, run
from perf.cases import CAUSAL, Case, problem
from perf.rivals import Rival
from tests.fakegpu import FakeGpu
from tritonattn import gpu, journal, reference, timing

CPU = torch.device("cpu")
F32 = torch.float32
CASES = (Case("full 16", problem(1, 1, 16, 8, dtype=F32), ("forward", "both")),
         Case("causal 16", problem(1, 1, 16, 8, CAUSAL, dtype=F32), ("forward",)))
EFFORT = timing.Effort(seconds=0.01, rounds=(3, 3), settle=(0, 0))
HERE = {"gpu": "NVIDIA Fake 1", "arch": "sm_90", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}


class Stage:
    """A plan of fake contenders on a fake GPU, run as often as one likes."""

    def __init__(self, folder):
        self.gpu, self.calls, self.folder = FakeGpu(), [], folder
        self.rivals = [self.rival("tritonattn", 2e-3), self.rival("fast", 1e-3), self.rival("wrong", 1e-4, spoil=1.01)]
        self.environment = HERE

    def rival(self, name, seconds, spoil=1.0):
        def build(posed, device):
            self.calls.append(name)

            def attention(q, k, v):
                self.gpu.time += seconds
                return spoil * reference.attention(q, k, v, window=posed.window, align="top_left")

            return attention

        return Rival(name, build)

    @property
    def plan(self):
        return run.Plan("fake", CASES, self.rivals, EFFORT, self.environment)

    @property
    def path(self):
        return self.plan.path(self.folder)

    def go(self, deadline=float("inf")):
        self.calls.clear()
        return run.run(self.plan, self.path, measure.Bench(CPU, self.gpu, EFFORT), deadline)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


NAMES = ["fake/full 16/forward", "fake/full 16/both", "fake/causal 16/forward"]


def test_every_job_is_done_once_and_written(stage, capsys):
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and len(stage.calls) == 9
    assert stage.path == stage.folder / "nvidia-fake-1" / f"fake-{journal.digest(stage.plan.as_json())}.jsonl"
    [loaded] = record.load(stage.folder)
    assert loaded.jobs == jobs and loaded.environment["gpu"] == HERE["gpu"] and loaded.environment["date"].startswith("20")
    for job in jobs:
        assert job.ours.seconds == pytest.approx(2e-3) and job.best_rival.contender == "fast"
        assert job.results["wrong"].status == "wrong" and job.results["wrong"].seconds is None
    out = capsys.readouterr().out
    assert "[3/3] fake/causal 16/forward: ours 2000 us" in out and "fast 1000 us: 0.50 of it; 0 min left" in out
    stage.go()
    assert stage.calls == []


def test_a_kill_at_any_line_and_in_any_line(stage):
    complete = stage.go()
    whole = stage.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({0, 7, *ends, *(end + 20 for end in ends[:-1]), *(end - 1 for end in ends)}):
        stage.path.write_bytes(whole[:cut])
        kept = [json.loads(line) for line in whole[:cut].split(b"\n")[:-1]]
        kept = [entry["job"] for entry in kept if "results" in entry]
        jobs = stage.go()
        assert [job.name for job in jobs] == NAMES == [job.name for job in complete], cut
        assert len(stage.calls) == 3 * (3 - len(kept)), cut
        written = [entry["job"] for entry in journal.read(stage.path)[1] if "results" in entry]
        assert written == NAMES, cut


def test_a_job_that_kills_the_process_twice_is_passed_over(stage):
    stage.go()
    lines = stage.path.read_bytes().split(b"\n")
    began = next(line for line in lines if b"began" in line)
    stage.path.write_bytes(b"\n".join([lines[0], began, began, b""]))
    jobs = stage.go()
    assert {result.status for result in jobs[0].results.values()} == {"failed"} and jobs[0].ours is None
    assert jobs[0].results["fast"].reason == "the process died 2 times in this job" and jobs[1].ours
    assert run.verdict(jobs[0]) == "ours failed: the process died 2 times in this job"


def test_an_interrupt_is_no_death(stage, monkeypatch):
    work = measure.job
    for _ in range(3):
        monkeypatch.setattr(measure, "job", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage.go()
    monkeypatch.setattr(measure, "job", work)
    assert all(job.ours for job in stage.go())


def test_a_lost_device_ends_the_run_and_the_next_goes_on_without_the_contender(stage):
    def fatal(q, k, v):
        stage.gpu.dead = True
        raise RuntimeError("CUDA error: misaligned address")

    stage.rivals.append(Rival("fatal", lambda posed, device: fatal))
    for done in range(3):
        with pytest.raises(measure.DeviceLost, match="fatal"):
            stage.go()
        assert sum("results" in entry for entry in journal.read(stage.path)[1]) == done
        stage.gpu.dead = False
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and all(job.ours for job in jobs)
    assert all("misaligned" in job.results["fatal"].reason and job.results["fatal"].status == "failed" for job in jobs)


def test_another_source_or_driver_is_another_file(stage):
    first = stage.path
    for change in ({"driver": "2"}, {"source": "other"}, {"gpu": "NVIDIA Fake 2"}):
        stage.environment = HERE | change
        assert stage.path != first


def test_it_stops_in_time_and_says_what_is_left(stage, capsys):
    expected = stage.plan.seconds()
    jobs = stage.go(deadline=stage.gpu.now() + expected / 2)
    assert jobs == [] and "time is up: 3 jobs are left" in capsys.readouterr().out
    # from the first job on, what a job took is what the next is expected to take
    jobs = stage.go(deadline=stage.gpu.now() + expected + 1e-6)
    assert [job.name for job in jobs] == NAMES


def test_flops_of_a_direction():
    posed = problem(2, 3, 16, 8)
    forward, backward, both = (record.Job("s", "c", posed, way, {}).flops for way in ("forward", "backward", "both"))
    assert forward == 2 * 3 * 16 * 16 * 4 * 8 and backward == 2.5 * forward and both == forward + backward


def test_the_best_rival_is_right_and_not_ours():
    results = {name: record.Result(name, status, seconds=seconds) for name, status, seconds in (
        ("tritonattn", "ok", 3.0), ("tritonattn-plain-grad", "ok", 1.0), ("flash", "wrong", 0.5), ("cudnn", "ok", 2.0),
        ("math", "ok", 9.0))}
    assert record.Job("s", "c", problem(1, 1, 8, 8), "forward", results).best_rival.contender == "cudnn"
    assert record.Job("s", "c", problem(1, 1, 8, 8), "forward", {}).best_rival is None


@pytest.mark.parametrize(("arguments", "words"), [
    (["--suite", "large"], "invalid choice: 'large'"), (["--rivals", "cutlass"], "expected some of tritonattn"),
    (["--minutes", "0"], "expected a positive number"), (["--device", "cuda"], "expected a GPU that torch sees"),
    (["--dtype", "float8"], "invalid choice"),
])
def test_wrong_usage(arguments, words, capsys):
    if words.startswith("expected a GPU") and torch.cuda.is_available() and not gpu.INTERPRETED:
        pytest.skip("there is a GPU here, so asking for it is right")
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_without_a_gpu_it_asks_for_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--suite", "tiny"])
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
    assert run.main(["--suite", "tiny", "--dry-run"]) == 0


def test_a_dry_run_lists_everything_and_writes_nothing(tmp_path, capsys):
    command = ["--suite", "models", "--rivals", "torch,cudnn", "--device", "cpu", "--dry-run", "--out", str(tmp_path)]
    assert run.main(command) == 0
    out = capsys.readouterr().out
    assert "models/llama-3-8b training 8k/backward" in out and "jobs of tritonattn, torch" in out and "an estimate" in out
    assert "without cudnn: needs a GPU" in out and not list(tmp_path.iterdir())


@pytest.mark.interpreted
def test_the_whole_way_in_the_interpreter(tmp_path, capsys):
    command = ["--suite", "tiny", "--rivals", "torch,eager,cudnn", "--out", str(tmp_path), "--seconds", "0.01"]
    assert run.main(command) == 0
    [found] = record.load(tmp_path)
    assert len(found.jobs) == 5 and found.environment["arch"] == "interpreter"
    for job in found.jobs:
        assert job.ours and job.results["torch"].status == job.results["eager"].status == "ok"
        assert job.results["cudnn"].reason == "needs a GPU" and job.ours.details["method"] == "host"
        assert job.ours.details["configs"]["forward" if job.direction == "forward" else "dq"] == "64x64w4s2"
    out = capsys.readouterr().out
    assert "[5/5]" in out and str(found.path) in out
    assert run.main(command) == 0 and "[" not in capsys.readouterr().out


@pytest.mark.gpu
def test_the_whole_way_on_a_gpu(tmp_path):
    assert run.main(["--suite", "small", "--rivals", "torch,flash,math", "--out", str(tmp_path), "--seconds", "0.02"]) == 0
    [found] = record.load(tmp_path)
    for job in found.jobs:
        assert job.ours.seconds > 1e-6 and job.ours.details["method"] == "graph", job.name
        assert job.ours.details["kernels"] and job.results["torch"].details["backend"] in rivals.BACKENDS
