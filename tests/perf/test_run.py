"""Runs go on where a kill left them, refuse to time what is wrong, and say how far they are."""

import json
import os
import signal
import time

import pytest
import torch

import tritonattn
from perf import baselines, cases, measure, run
from perf import results as record
from perf.baselines import Rival
from perf.cases import CAUSAL, Case, problem
from tests.helpers.fake_gpu import FakeGpu
from tritonattn import gpu, reference
from tritonattn.measure import environment, journal, timing

CPU = torch.device("cpu")
F32 = torch.float32
CASES = (Case("full 16", problem(1, 1, 16, 8, dtype=F32), ("forward", "both")),
         Case("causal 16", problem(1, 1, 16, 8, CAUSAL, dtype=F32), ("forward",)))
EFFORT = timing.TimingBudget(seconds=0.01, rounds=(3, 3), settle=(0, 0))
HERE = {"gpu": "NVIDIA Fake 1", "arch": "sm_90", "driver": "1", "torch": "2", "triton": "3", "sensors": "NVML"}


class Stage:
    """A plan of fake contenders on a fake GPU, run as often as one likes."""

    def __init__(self, folder):
        self.gpu, self.calls, self.folder = FakeGpu(), [], folder
        self.rivals = [self.rival("tritonattn", 2e-3), self.rival("fast", 1e-3), self.rival("wrong", 1e-4, spoil=1.01)]
        self.environment, self.commit = HERE, "abc"

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
        return run.Plan("fake", CASES, self.rivals, EFFORT, self.environment, self.commit)

    @property
    def path(self):
        return self.plan.path(self.folder)

    def go(self, deadline=float("inf")):
        self.calls.clear()
        return run.run(self.plan, self.path, self.bench, deadline)

    @property
    def bench(self):
        return measure.Bench(CPU, self.gpu, EFFORT)

    def written(self, kind):
        """What the file holds under a key, entry by entry."""
        return [entry[kind] for entry in journal.read(self.path)[1] if kind in entry]


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
    assert "[3/3] fake/causal 16/forward: ours 2000 us" in out and "fast 1000 us, 0.50 of our time; 0 min left" in out
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


def fail(error):
    raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("want more"), ValueError("o: expected finite numbers"), KeyError(1)])
def test_what_goes_wrong_outside_a_contender_is_written_and_the_run_goes_on(stage, monkeypatch, error):
    truth = measure.truth
    monkeypatch.setattr(measure, "truth", lambda case, inputs: truth(case, inputs) if "causal" in case.name else fail(error))
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and jobs[2].ours and jobs[0].ours is None
    assert {(result.status, result.reason) for job in jobs[:2] for result in job.results.values()} == {
        ("failed", f"{type(error).__name__}: {error}")}
    assert run.ours_is_bad(jobs[0]) and not run.ours_is_bad(jobs[2])
    stage.go()
    assert stage.calls == []


def test_a_device_lost_outside_a_contender_is_a_death_of_the_job(stage, monkeypatch):
    def fatal(case, inputs):
        stage.gpu.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    truth = measure.truth
    monkeypatch.setattr(measure, "truth", lambda case, inputs: (truth if "causal" in case.name else fatal)(case, inputs))
    for _ in range(4):
        with pytest.raises(measure.DeviceLost, match="what all contenders share"):
            stage.go()
        stage.gpu.dead = False
    assert [job.results["fast"].reason for job in stage.go()] == ["the process died 2 times in this job"] * 2 + [None]


def fatal_on(stage):
    def fatal(q, k, v):
        stage.gpu.dead = True
        raise RuntimeError("CUDA error: misaligned address")

    return lambda posed, device: fatal


def test_a_rival_that_loses_the_device_twice_is_left_out_of_all_further_jobs(stage):
    stage.rivals.append(Rival("fatal", fatal_on(stage)))
    for done in range(2):
        with pytest.raises(measure.DeviceLost, match="fatal"):
            stage.go()
        assert len(stage.written("results")) == done
        stage.gpu.dead = False
    jobs = stage.go()
    assert [job.name for job in jobs] == NAMES and all(job.ours for job in jobs)
    assert {job.results["fatal"].status for job in jobs} == {"failed"}
    assert all("misaligned" in job.results["fatal"].reason for job in jobs[:2])
    assert jobs[2].results["fatal"].reason == "lost the device in 2 other jobs, and is not run again"


def test_ours_is_tried_in_every_job(stage):
    stage.rivals.append(Rival("tritonattn-other", fatal_on(stage)))
    for _ in NAMES:
        with pytest.raises(measure.DeviceLost, match="tritonattn-other"):
            stage.go()
        stage.gpu.dead = False
    assert all("misaligned" in job.results["tritonattn-other"].reason for job in stage.go())


def test_another_source_or_driver_is_another_file(stage):
    first = stage.path
    for change in ({"driver": "2"}, {"source": "other"}, {"gpu": "NVIDIA Fake 2"}, {"sensors": "NVML: unknown"}):
        stage.environment = HERE | change
        assert stage.path != first


def test_another_version_of_a_rival_is_another_file_and_so_is_its_absence(stage):
    paths, [ours, fast, wrong] = [stage.path], stage.rivals
    for other in (fast._replace(version="2.0"), fast._replace(missing="not installed"), fast._replace(name="faster")):
        stage.rivals = [ours, other, wrong]
        paths.append(stage.path)
    assert len(set(paths)) == 4
    # why it is missing is said in other words elsewhere
    stage.rivals = [ours, fast._replace(missing="no such module", version="3"), wrong]
    assert stage.path == paths[2]


def test_a_commit_begins_nothing_anew(stage):
    stage.go(deadline=stage.gpu.now() + stage.plan.seconds() / 2)
    stage.commit, first = "def", stage.path
    stage.go()
    stage.commit = "ghi"
    assert stage.path == first and len(stage.go()) == 3 and stage.calls == []
    [loaded] = record.load(stage.folder)
    # the last that measured something
    assert loaded.environment["commit"] == "def"
    assert [session["commit"] for session in stage.written("session")] == ["abc", "def"]


def test_the_plan_knows_what_changes_numbers_and_nothing_else(monkeypatch, tmp_path):
    arguments = run.parser().parse_args(["--rivals", "torch,eager,flash"])

    def plan():
        return run.plan_of(arguments, CPU)

    first = plan()
    assert "commit" not in first.environment and first.as_json()["contenders"] == {
        "tritonattn": tritonattn.__version__, "torch": torch.__version__, "eager": torch.__version__, "flash": "missing"}
    monkeypatch.setattr(environment, "commit", lambda: "another")
    assert plan().commit == "another" and plan().path(tmp_path) == first.path(tmp_path)
    (tmp_path / "edited.py").write_text("edited")
    for module in (baselines, measure):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(tmp_path / "edited.py"))
            assert plan().path(tmp_path) != first.path(tmp_path)


def test_kernels_are_named_after_all_timing(stage, monkeypatch):
    monkeypatch.setattr(measure, "names", lambda bench, case, direction, contenders: {
        rival.name: [f"kernel of {rival.name}", direction] for rival in contenders})
    stage.go(deadline=stage.gpu.now() + stage.plan.seconds() / 2)
    run.name_kernels(stage.plan, stage.path, stage.bench)
    assert stage.written("named") == []
    stage.go()
    run.name_kernels(stage.plan, stage.path, stage.bench)
    [loaded] = record.load(stage.folder)
    for job in loaded.jobs:
        # of those that were timed, and beside what was known of them
        assert job.ours.details["kernels"] == ["kernel of tritonattn", job.direction] and job.ours.details["samples_us"]
        assert "kernels" not in job.results["wrong"].details
    monkeypatch.setattr(measure, "names", None)
    run.name_kernels(stage.plan, stage.path, stage.bench)
    assert stage.written("named") == NAMES


def test_naming_ends_in_time_and_gives_up_what_kills_it(stage, monkeypatch):
    jobs = stage.go()
    monkeypatch.setattr(measure, "names", lambda *_: fail(measure.DeviceLost("fast", "gone")))
    run.name_kernels(stage.plan, stage.path, stage.bench, deadline=stage.gpu.now() - 1)
    assert stage.written("naming") == []
    for name in [name for name in NAMES for _ in range(2)]:
        with pytest.raises(measure.DeviceLost):
            run.name_kernels(stage.plan, stage.path, stage.bench)
        assert stage.written("naming")[-1] == name
    run.name_kernels(stage.plan, stage.path, stage.bench)
    assert jobs == record.load(stage.folder)[0].jobs


@pytest.mark.parametrize("minutes", [None, 10.0])
def test_on_a_gpu_names_come_last_and_have_their_share_of_the_time(stage, monkeypatch, minutes, capsys):
    told = []
    monkeypatch.setattr(run.clock, "of", lambda device: stage.gpu)
    monkeypatch.setattr(run, "run", lambda plan, path, bench, deadline: told.append(deadline))
    monkeypatch.setattr(run, "name_kernels", lambda plan, path, bench, deadline: told.append(deadline))
    stage.environment = HERE | {"sensors": "nvidia-ml-py is not installed"}
    run.carry_out(stage.plan, stage.path, torch.device("cuda"), 100.0, minutes)
    assert told == ([100 + 540, 100 + 600] if minutes else [float("inf")] * 2)
    assert capsys.readouterr().err == "throttling cannot be seen: nvidia-ml-py is not installed\n"
    stage.environment = HERE
    run.carry_out(stage.plan, stage.path, torch.device("cuda"), 100.0, minutes)
    assert capsys.readouterr().err == ""


def test_earlier_results_of_the_same_plan_are_taken_along(stage, tmp_path):
    stage.go()
    stage.path.with_name("fake-000000000000.jsonl").write_bytes(stage.path.read_bytes())
    run.bring(stage.plan, stage.folder, tmp_path / "out")
    here = stage.plan.path(tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.jsonl")) == [here] and here.read_bytes() == stage.path.read_bytes()
    # what is there already may hold more
    here.write_text("more")
    run.bring(stage.plan, stage.folder, tmp_path / "out")
    run.bring(stage.plan, tmp_path / "nowhere", tmp_path / "out")
    assert here.read_text() == "more"


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


TINY = ["--suite", "tiny", "--rivals", "torch,eager,cudnn", "--seconds", "0.01"]


@pytest.mark.interpreted
def test_a_request_to_end_is_no_death_of_a_job(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(measure, "job", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    assert run.main([*TINY, "--out", str(tmp_path)]) == 130 and signal.getsignal(signal.SIGTERM) is before
    [path] = tmp_path.rglob("*.jsonl")
    assert [list(entry) for entry in journal.read(path)[1]] == [["session"], ["began"], ["interrupted"]]
    assert "stopped; what was measured is in" in capsys.readouterr().err


@pytest.mark.interpreted
def test_a_run_goes_on_from_another_folder(tmp_path, capsys):
    assert run.main([*TINY, "--out", str(tmp_path / "first")]) == 0
    assert "[5/5]" in capsys.readouterr().out
    assert run.main([*TINY, "--out", str(tmp_path / "second"), "--resume-from", str(tmp_path / "first")]) == 0
    out = capsys.readouterr().out
    assert "[" not in out and out.startswith(f"results: {tmp_path / 'second'}")


@pytest.mark.interpreted
def test_the_whole_way_in_the_interpreter(tmp_path, capsys):
    command = [*TINY, "--out", str(tmp_path)]
    assert run.main(command) == 0
    [found] = record.load(tmp_path)
    assert len(found.jobs) == 5 and found.environment["arch"] == "interpreter"
    for job in found.jobs:
        assert job.ours and job.results["torch"].status == job.results["eager"].status == "ok"
        assert job.results["cudnn"].reason == "needs a GPU" and job.ours.details["method"] == "host"
        kernels = {"forward": {"forward"}, "backward": {"delta", "dq", "dkdv"}}
        kernels["both"] = kernels["forward"] | kernels["backward"]
        assert job.ours.details["configs"] == dict.fromkeys(kernels[job.direction], "64x64w4s2")
    out = capsys.readouterr().out
    assert "[5/5]" in out and str(found.path) in out
    assert run.main(command) == 0 and "[" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.alone
def test_the_whole_way_on_a_gpu(tmp_path, monkeypatch, unwritten_memory_is_nan):
    # cuDNN has no deterministic algorithms, which tests ask for
    torch.use_deterministic_algorithms(False)
    few = tuple(case for case in cases.SUITES["small"] if case.name in ("batch 1 full 256", "batch 4 causal 512"))
    monkeypatch.setitem(cases.SUITES, "small", few)
    assert run.main(["--suite", "small", "--rivals", "torch,cudnn,flash", "--out", str(tmp_path), "--seconds", "0.02"]) == 0
    [found] = record.load(tmp_path)
    assert len(found.jobs) == 6
    for job in found.jobs:
        assert job.ours.seconds > 1e-6 and job.ours.details["method"] == "graph", job.name
        assert job.ours.details["kernels"][0] not in ("not seen", "") and job.results["cudnn"].status == "ok", job.name
        assert job.results["torch"].details["backend"] in baselines.BACKENDS
