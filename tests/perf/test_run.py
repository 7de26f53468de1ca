"""Runs resume after a kill at any byte, exclude what is wrong, and print their progress."""

import json
import os
import signal
import time
import types

import pytest
import torch

import tritonattn
from perf import baselines, cases, measure, run
from perf import results as records
from perf.baselines import Implementation
from perf.cases import CAUSAL, Case, problem
from tests.helpers.fake_gpu import FakeGpu
from tritonattn import gpu, reference
from tritonattn.config import Config
from tritonattn.measure import environment, journal, timing

CPU = torch.device("cpu")
F32 = torch.float32
CASES = (Case("full 16", problem(1, 1, 16, 8, dtype=F32), ("forward", "both")),
         Case("causal 16", problem(1, 1, 16, 8, CAUSAL, dtype=F32), ("forward",)))
BUDGET = timing.TimingBudget(seconds=0.01, rounds=(3, 3), settle=(0, 0))
HERE = {"gpu": "NVIDIA Fake 1", "arch": "sm_90", "driver": "1", "torch": "2", "triton": "3", "sensors": "NVML"}


class Stage:
    """A plan of fake implementations on a fake GPU, to be run repeatedly."""

    def __init__(self, folder):
        self.gpu, self.calls, self.folder = FakeGpu(), [], folder
        self.implementations = [self.fake("tritonattn", 2e-3), self.fake("fast", 1e-3), self.fake("wrong", 1e-4, factor=1.01)]
        self.environment, self.commit = HERE, "abc"

    def fake(self, name, seconds, factor=1.0):
        def build(problem, device):
            self.calls.append(name)

            def attention(q, k, v):
                self.gpu.time += seconds
                return factor * reference.attention(q, k, v, window=problem.window, align="top_left")

            return attention

        return Implementation(name, build)

    @property
    def plan(self):
        return run.Plan("fake", CASES, self.implementations, BUDGET, self.environment, self.commit)

    @property
    def path(self):
        return self.plan.path(self.folder)

    def go(self, deadline=float("inf")):
        self.calls.clear()
        return run.run(self.plan, self.path, self.setup, deadline)

    @property
    def setup(self):
        return measure.Setup(CPU, self.gpu, BUDGET)

    def written(self, kind):
        """The values of a key in the journal entries that have it."""
        return [entry[kind] for entry in journal.read(self.path)[1] if kind in entry]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


NAMES = ["fake/full 16/forward", "fake/full 16/both", "fake/causal 16/forward"]


def test_each_job_runs_once_and_is_recorded(stage, capsys):
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and len(stage.calls) == 9
    assert stage.path == stage.folder / "nvidia-fake-1" / f"fake-{journal.digest(stage.plan.as_json())}.jsonl"
    [loaded] = records.load(stage.folder)
    assert loaded.jobs == jobs and loaded.environment["gpu"] == HERE["gpu"] and loaded.environment["date"].startswith("20")
    for job in jobs:
        assert job.ours.seconds == pytest.approx(2e-3) and job.best_baseline.name == "fast"
        assert job.results["wrong"].status == "wrong" and job.results["wrong"].seconds is None
    out = capsys.readouterr().out
    assert "[3/3] fake/causal 16/forward: tritonattn 2000 us" in out and "fast 1000 us, ratio 0.50; 0 min left" in out
    stage.go()
    assert stage.calls == []


def test_resume_after_a_kill_at_or_within_any_line(stage):
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


def test_job_that_crashes_the_process_twice_is_skipped(stage):
    stage.go()
    lines = stage.path.read_bytes().split(b"\n")
    began = next(line for line in lines if b"began" in line)
    stage.path.write_bytes(b"\n".join([lines[0], began, began, b""]))
    jobs = stage.go()
    assert {result.status for result in jobs[0].results.values()} == {"failed"} and jobs[0].ours is None
    assert jobs[0].results["fast"].reason == "the process crashed 2 times in this job" and jobs[1].ours
    assert run.verdict(jobs[0]) == "tritonattn failed: the process crashed 2 times in this job"


def test_interrupt_does_not_count_as_a_crash(stage, monkeypatch):
    measure_job = measure.measure_job
    for _ in range(3):
        monkeypatch.setattr(measure, "measure_job", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage.go()
    monkeypatch.setattr(measure, "measure_job", measure_job)
    assert all(job.ours for job in stage.go())


def fail(error):
    raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("want more"), ValueError("o: not finite"), KeyError(1)])
def test_error_outside_the_implementations_fails_the_job_alone(stage, monkeypatch, error):
    expected = measure.expected_tensors
    monkeypatch.setattr(measure, "expected_tensors",
                        lambda case, inputs: expected(case, inputs) if "causal" in case.name else fail(error))
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and jobs[2].ours and jobs[0].ours is None
    assert {(result.status, result.reason) for job in jobs[:2] for result in job.results.values()} == {
        ("failed", f"{type(error).__name__}: {error}")}
    assert run.has_failure(jobs[0]) and not run.has_failure(jobs[2])
    stage.go()
    assert stage.calls == []


def test_device_lost_outside_the_implementations_counts_as_a_crash(stage, monkeypatch):
    def fatal(case, inputs):
        stage.gpu.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    expected = measure.expected_tensors
    monkeypatch.setattr(measure, "expected_tensors",
                        lambda case, inputs: (expected if "causal" in case.name else fatal)(case, inputs))
    for _ in range(4):
        with pytest.raises(measure.DeviceLost, match="inputs or reference"):
            stage.go()
        stage.gpu.dead = False
    assert [job.results["fast"].reason for job in stage.go()] == ["the process crashed 2 times in this job"] * 2 + [None]


def fatal_on(stage):
    def fatal(q, k, v):
        stage.gpu.dead = True
        raise RuntimeError("CUDA error: misaligned address")

    return lambda problem, device: fatal


def test_baseline_that_loses_the_device_twice_is_excluded_from_further_jobs(stage):
    stage.implementations.append(Implementation("fatal", fatal_on(stage)))
    for done in range(2):
        with pytest.raises(measure.DeviceLost, match="fatal"):
            stage.go()
        assert len(stage.written("results")) == done
        stage.gpu.dead = False
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and all(job.ours for job in jobs)
    assert {job.results["fatal"].status for job in jobs} == {"failed"}
    assert all("misaligned" in job.results["fatal"].reason for job in jobs[:2])
    assert jobs[2].results["fatal"].reason == "excluded: lost the device in 2 other jobs"


def test_ours_is_never_excluded_from_further_jobs(stage):
    stage.implementations.append(Implementation("tritonattn-other", fatal_on(stage)))
    for _ in NAMES:
        with pytest.raises(measure.DeviceLost, match="tritonattn-other"):
            stage.go()
        stage.gpu.dead = False
    assert all("misaligned" in job.results["tritonattn-other"].reason for job in stage.go())


def test_other_source_or_driver_is_another_file(stage):
    first = stage.path
    for change in ({"driver": "2"}, {"source": "other"}, {"gpu": "NVIDIA Fake 2"}, {"sensors": "NVML: unknown"}):
        stage.environment = HERE | change
        assert stage.path != first


def test_other_version_or_absence_of_a_baseline_is_another_file(stage):
    paths, [ours, fast, wrong] = [stage.path], stage.implementations
    for other in (fast._replace(version="2.0"), fast._replace(missing="not installed"), fast._replace(name="faster")):
        stage.implementations = [ours, other, wrong]
        paths.append(stage.path)
    assert len(set(paths)) == 4
    # the reason for a missing package differs between machines
    stage.implementations = [ours, fast._replace(missing="no such module", version="3"), wrong]
    assert stage.path == paths[2]


def test_new_commit_resumes_the_same_file(stage):
    stage.go(deadline=stage.gpu.now() + stage.plan.seconds_per_job() / 2)
    stage.commit, first = "def", stage.path
    stage.go()
    stage.commit = "ghi"
    assert stage.path == first and len(stage.go()) == 3 and stage.calls == []
    [loaded] = records.load(stage.folder)
    # the commit of the last session that measured something
    assert loaded.environment["commit"] == "def"
    assert [session["commit"] for session in stage.written("session")] == ["abc", "def"]


def test_plan_depends_on_what_changes_results_and_on_nothing_else(monkeypatch, tmp_path):
    arguments = run.parser().parse_args(["--baselines", "torch,eager,flash"])

    def plan():
        return run.make_plan(arguments, CPU)

    first = plan()
    assert "commit" not in first.environment and first.as_json()["implementations"] == {
        "tritonattn": tritonattn.__version__, "torch": torch.__version__, "eager": torch.__version__, "flash": "missing"}
    monkeypatch.setattr(environment, "commit", lambda: "another")
    assert plan().commit == "another" and plan().path(tmp_path) == first.path(tmp_path)
    (tmp_path / "edited.py").write_text("edited")
    for module in (baselines, measure):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(tmp_path / "edited.py"))
            assert plan().path(tmp_path) != first.path(tmp_path)


def test_configs_tuned_on_this_machine_change_the_plan(monkeypatch, tmp_path):
    arguments, paths = run.parser().parse_args(["--baselines", "eager"]), set()
    for tuned in ([], ["64x64w4s2"], ["128x64w4s2"]):
        cached = [(tmp_path / "key.json", types.SimpleNamespace(config=Config.parse(text))) for text in tuned]
        cache = types.SimpleNamespace(records=lambda cached=cached: iter(cached))
        monkeypatch.setattr(run.user_cache, "current_cache", lambda cache=cache: cache)
        paths.add(run.make_plan(arguments, CPU).path(tmp_path))
    assert len(paths) == 3


@pytest.mark.parametrize("sensors", ["NVML", "nvidia-ml-py is not installed"])
def test_a_gpu_has_a_deadline_and_missing_sensors_are_reported(stage, monkeypatch, sensors, capsys):
    deadlines, stage.environment = [], HERE | {"sensors": sensors}
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "make_plan", lambda arguments, device: stage.plan)
    monkeypatch.setattr(run.device_timer, "timer_of", lambda device: stage.gpu)
    monkeypatch.setattr(run, "run", lambda plan, path, setup, deadline: deadlines.append(deadline) or [])
    assert run.main(["--minutes", "10"]) == run.main([]) == 0
    assert deadlines == [pytest.approx(time.perf_counter() + 600, abs=60), float("inf")]
    assert capsys.readouterr().err == ("" if sensors == "NVML" else f"throttling is not recorded: {sensors}\n" * 2)


def test_run_stops_before_the_deadline_and_prints_what_is_left(stage, capsys):
    expected = stage.plan.seconds_per_job()
    jobs = stage.go(deadline=stage.gpu.now() + expected / 2)
    assert jobs == [] and "time is up: 3 jobs are left" in capsys.readouterr().out
    # after the first job, the measured durations replace the estimate
    jobs = stage.go(deadline=stage.gpu.now() + expected + 1e-6)
    assert [job.name for job in jobs] == NAMES


def test_rate_counts_the_products_of_a_direction():
    forward, backward, both = (records.Job("s", "c", problem(2, 3, 16, 8), direction, {}).tflops(1e-12)
                               for direction in ("forward", "backward", "both"))
    assert forward == 2 * 3 * 16 * 16 * 4 * 8 and backward == 2.5 * forward and both == forward + backward


def test_best_baseline_is_correct_and_not_ours():
    results = {name: records.Result(name, status, seconds=seconds) for name, status, seconds in (
        ("tritonattn", "ok", 3.0), ("tritonattn-plain-grad", "ok", 1.0), ("flash", "wrong", 0.5), ("cudnn", "ok", 2.0),
        ("math", "ok", 9.0))}
    assert records.Job("s", "c", problem(1, 1, 8, 8), "forward", results).best_baseline.name == "cudnn"
    assert records.Job("s", "c", problem(1, 1, 8, 8), "forward", {}).best_baseline is None


@pytest.mark.parametrize(("arguments", "message"), [
    (["--suite", "large"], "invalid choice: 'large'"), (["--baselines", "cutlass"], "unknown cutlass"),
    (["--minutes", "0"], "expected a positive number"), (["--dtype", "float8"], "invalid choice"),
])
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_the_error_names_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--suite", "tiny"])
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
    assert run.main(["--suite", "tiny", "--dry-run"]) == 0


def test_dry_run_lists_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["--suite", "models", "--baselines", "torch,cudnn", "--dry-run", "--out", str(tmp_path)]
    assert run.main(command) == 0
    out = capsys.readouterr().out
    assert "models/llama-3-8b training 8k/backward" in out and "jobs with tritonattn, torch" in out
    assert "(estimated, not measured)" in out
    assert "missing: cudnn (needs a GPU)" in out and not list(tmp_path.iterdir())


TINY = ["--suite", "tiny", "--baselines", "torch,eager,cudnn", "--seconds", "0.01"]


@pytest.mark.interpreted
def test_sigterm_does_not_count_as_a_crash(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(measure, "measure_job", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    assert run.main([*TINY, "--out", str(tmp_path)]) == 130 and signal.getsignal(signal.SIGTERM) is before
    [path] = tmp_path.rglob("*.jsonl")
    assert [list(entry) for entry in journal.read(path)[1]] == [["session"], ["began"], ["interrupted"]]
    assert "interrupted; complete jobs are in" in capsys.readouterr().err


@pytest.mark.interpreted
def test_run_in_the_interpreter(tmp_path, monkeypatch, capsys):
    one_head = Case("one head", problem(1, 1, 16, 8, CAUSAL, dtype=F32), ("forward", "both"))
    monkeypatch.setitem(cases.SUITES, "tiny", (one_head,))
    command = [*TINY, "--out", str(tmp_path)]
    assert run.main(command) == 0
    [recorded] = records.load(tmp_path)
    assert len(recorded.jobs) == 2 and recorded.environment["arch"] == "interpreter"
    for job in recorded.jobs:
        assert job.ours and job.results["torch"].status == job.results["eager"].status == "ok"
        assert job.results["cudnn"].reason == "needs a GPU" and job.ours.details["method"] == "host"
        assert job.ours.details["configs"] == dict.fromkeys(measure.KERNELS[job.direction], "64x64w4s2")
    assert measure.KERNELS["both"] == ("forward", "delta", "dq", "dkdv")
    out = capsys.readouterr().out
    assert "[2/2]" in out and str(recorded.path) in out
    assert run.main(command) == 0 and "[" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.alone
def test_small_suite_on_a_gpu(tmp_path, monkeypatch, unwritten_memory_is_nan):
    # cuDNN has no deterministic algorithms
    torch.use_deterministic_algorithms(False)
    few = tuple(case for case in cases.SUITES["small"] if case.name in ("batch 1 full 256", "batch 4 causal 512"))
    monkeypatch.setitem(cases.SUITES, "small", few)
    assert run.main(["--suite", "small", "--baselines", "torch,cudnn,flash", "--out", str(tmp_path), "--seconds", "0.02"]) == 0
    [recorded] = records.load(tmp_path)
    assert len(recorded.jobs) == 6
    for job in recorded.jobs:
        assert job.ours.seconds > 1e-6 and job.ours.details["method"] == "graph", job.name
        assert job.results["cudnn"].status == "ok", job.name
        assert job.results["torch"].details["backend"] in baselines.BACKENDS
