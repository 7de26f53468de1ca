"""Sweeps: a frozen plan, resumption after a kill at any byte, and replay without a GPU."""

import dataclasses
import random
import statistics

import pytest

from tests.autotune.test_tune import H200, PROBLEM, Compilers, Surface
from tests.helpers import corpus
from tests.helpers.fake_bench import FakeBench, bench_of
from tritonattn import gpu
from tritonattn.autotune import prune, replay, search, sweep
from tritonattn.autotune import trials as runs
from tritonattn.autotune.tune import TuningSetup
from tritonattn.autotune.worker_pool import Failure
from tritonattn.configs.user_cache import Cache
from tritonattn.measure.journal import Journal, JournalError

JOBS = [(PROBLEM, ("forward",)), (dataclasses.replace(PROBLEM, window=(None, 0)), ("dkdv",))]
# of dK/dV, and of the forward pass
SPILLING = {f"{tile}e1{flag}" for flag in ("", "m") for tile in (
    "64x64w4s2", "64x64w4s3", "64x32w4s2", "128x64w8s2", "32x32w4s2", "128x64w8s3", "128x32w8s3", "128x32w8s2", "64x16w4s2",
    "64x32w4s3")}


class Steady(FakeBench):
    """Every sample of a config is what it was before a kill."""

    def sample(self, config):
        self.time += 1e-3
        return self.true[config]


def setup_of(tmp_path, bench=None, on=H200):
    bench = bench or Steady(Surface("64x128w4s2e1m"), hangs=["32x64w4s2e1m"], wrong=["64x128w4s4e1m"])
    return TuningSetup(on, bench_of(bench), Compilers(spilling=SPILLING), Cache(tmp_path / "cache"), {"gpu": "made up"})


def quiet(*_, **__):
    pass


def begun(tmp_path, name="run", **options):
    setup = setup_of(tmp_path, **options)
    sweep.begin(tmp_path / name, JOBS, setup, rounds=5, say=quiet)
    return tmp_path / name, setup


def results(folder):
    """The last trial of each config, in the order of the plan."""
    run = runs.read(folder)
    return [dataclasses.replace(trial, check_seconds=0.0) for job in run.jobs for trial in run.of(job).values()]


def test_a_sweep_tries_every_config_of_its_plan(tmp_path, capsys):
    folder, setup = begun(tmp_path)
    assert sweep.resume(folder, setup)
    run = runs.read(folder)
    assert [job.kernel for job in run.jobs] == ["forward", "dkdv"] and run.environment == {"gpu": "made up"}
    for job in run.jobs:
        trials = run.of(job)
        assert list(trials) == list(job.configs) and len(trials) > 50
        assert {trial.status for trial in trials.values()} <= {"ok", *search.FAILURES, *prune.REASONS}
        ok = [trial for trial in trials.values() if trial.status == "ok"]
        assert all(len(trial.samples) == len(trial.beside) == 5 and trial.static["shared_memory"] for trial in ok)
        assert trials[job.incumbent].samples and trials[job.incumbent].ratio == 1
        spilling = [trial for trial in trials.values() if trial.status == "spill"]
        assert {trial.config for trial in spilling} <= SPILLING and len(spilling) >= 2
        would_run = (*sweep.WOULD_RUN, "prefilter")
        controls = [name for name, trial in trials.items() if trial.status in would_run and trial.samples]
        # one in ten of the excluded configs is timed, and keeps its reason
        assert sorted(set(controls) - {job.incumbent}) == run.plan["controls"][job.name] != []
        # the four fastest of those that were not excluded, and the incumbent
        times = sorted(ok, key=lambda trial: statistics.median(trial.samples))
        assert {trial.config for trial in trials.values() if trial.windows} == {
            job.incumbent, *(trial.config for trial in times[:search.SUSTAINED_CONFIGS])}
    forward = run.of(run.jobs[0])
    assert forward["32x64w4s2e1m"].status == "hang" and forward["64x128w4s4e1m"].status == "incorrect"
    ok = [trial for trial in forward.values() if trial.status == "ok"]
    assert min(ok, key=lambda trial: trial.seconds).config == "64x128w4s2e1m"
    out = capsys.readouterr().out
    for words in ("64x128w4s2e1m: 1000 us; at most ", "64x128w4s2e1m: 1000 us sustained; ", "32x64w4s2e1m: hang; "):
        assert words in out


def test_configs_that_pruning_would_not_compile_are_sampled_too(tmp_path):
    folder, _ = begun(tmp_path)
    plan, (job, _) = runs.read(folder).plan, runs.read(folder).jobs
    prefiltered = {name for name, (reason, _) in plan["excluded"][job.name].items() if reason == "prefilter"}
    sampled = prefiltered & set(plan["controls"][job.name])
    assert len(sampled) == round(sweep.CONTROLS * len(prefiltered)) > 1
    assert {name for name in prefiltered if plan["static"][job.name][name]} == sampled, "only these were compiled"
    # one that turns out not to run keeps that reason, and is not timed
    setup = setup_of(tmp_path)
    refused = setup.compilers.refused = sorted(sampled)[:1]
    sweep.begin(tmp_path / "refused", JOBS, setup, rounds=5, say=quiet)
    plan = runs.read(tmp_path / "refused").plan
    assert plan["excluded"][job.name][refused[0]] == ["compile error", "no"]
    assert sampled - set(plan["controls"][job.name]) == set(refused)


def test_a_kill_at_any_byte_changes_nothing(tmp_path):
    folder, setup = begun(tmp_path, "whole")
    sweep.resume(folder, setup, say=quiet)
    whole, content = results(folder), (folder / runs.JOURNAL).read_bytes()
    rng = random.Random(0)
    # the last cut is in the windows of a job
    for at in sorted([*rng.sample(range(content.index(b"\n") + 1, len(content)), 11), len(content) - 9]):
        again, setup = begun(tmp_path, f"cut-{at}")
        assert runs.read(again).plan == runs.read(folder).plan, "plans are reproducible"
        (again / runs.JOURNAL).write_bytes(content[:at])
        sweep.resume(again, setup, say=quiet)
        assert results(again) == whole


def test_a_finished_sweep_times_nothing_again(tmp_path):
    folder, setup = begun(tmp_path)
    sweep.resume(folder, setup, say=quiet)
    bench = Steady({})
    before = (folder / runs.JOURNAL).read_bytes()
    assert sweep.resume(folder, setup_of(tmp_path, bench), say=quiet) and not bench.timed
    assert (folder / runs.JOURNAL).read_bytes() == before


def test_if_one_of_the_last_configs_fails_the_next_one_has_windows(tmp_path):
    class Tired(Steady):
        """The fastest config hangs under continuous load."""

        def windows(self, configs, rounds):
            failures = {name: Failure("hang", "no answer") for name in configs if name == "64x128w4s2e1m"}
            return super().windows([name for name in configs if name not in failures], rounds) | failures

    folder, setup = begun(tmp_path, bench=(bench := Tired(Surface("64x128w4s2e1m"))))
    sweep.resume(folder, setup, say=quiet)
    job, _ = runs.read(folder).jobs
    trials = runs.read(folder).of(job)
    assert trials["64x128w4s2e1m"].status == "hang" and not trials["64x128w4s2e1m"].decisive
    assert len({job.incumbent, *(name for name, trial in trials.items() if trial.windows)}) == search.SUSTAINED_CONFIGS + 1
    count = len(bench.windowed)
    assert count == 3 and sweep.resume(folder, setup, say=quiet) and len(bench.windowed) == count, "nothing is left to do"


def test_an_interrupted_sweep_resumes(tmp_path):
    class Interrupted(Steady):
        def times(self, configs, rounds):
            if len(self.timed) > 30:
                raise KeyboardInterrupt
            return super().times(configs, rounds)

    folder, setup = begun(tmp_path, bench=Interrupted(Surface("64x128w4s2e1m")))
    with pytest.raises(KeyboardInterrupt):
        sweep.resume(folder, setup, say=quiet)
    done = len(results(folder))
    assert done > 20
    assert sweep.resume(folder, setup_of(tmp_path), say=quiet) and len(results(folder)) > done


def test_a_sweep_resumes_after_its_time_limit(tmp_path):
    folder, setup = begun(tmp_path)
    assert not sweep.resume(folder, setup, seconds=-1, say=quiet)
    assert not any(trial.samples for trial in results(folder))
    assert sweep.resume(folder, setup, say=quiet)


@pytest.mark.parametrize("change, words", [
    ({"on": gpu.named("h100")}, "planned with gpu .*H200.*this is .*H100"),
    ({"version": "9"}, "planned with versions"), ({"source": "0" * 12}, "planned with source"),
])
def test_a_sweep_resumes_only_with_the_same_gpu_versions_and_kernels(change, words, tmp_path, monkeypatch):
    folder, setup = begun(tmp_path)
    if "on" in change:
        setup.gpu = change["on"]
    if "version" in change:
        monkeypatch.setattr(sweep, "__version__", change["version"])
    if "source" in change:
        monkeypatch.setattr(sweep, "kernel_hash", lambda: change["source"])
    with pytest.raises(JournalError, match=words):
        sweep.resume(folder, setup, say=quiet)


def test_a_folder_with_or_without_a_sweep_raises(tmp_path):
    folder, setup = begun(tmp_path)
    with pytest.raises(FileExistsError, match="already has a sweep"):
        begun(tmp_path)
    with pytest.raises(JournalError, match="no sweep can be read: FileNotFoundError"):
        sweep.resume(tmp_path / "none", setup)
    with pytest.raises(JournalError, match="no sweep can be read: FileNotFoundError"):
        runs.read(tmp_path / "none")
    content = (folder / runs.JOURNAL).read_text()
    (folder / runs.JOURNAL).write_text(content.replace('"rounds":5', '"rounds":6'))
    with pytest.raises(JournalError, match="line 1: expected a plan and its digest"):
        sweep.resume(folder, setup)
    (tmp_path / "other").mkdir()
    for plan, words in (({}, "KeyError: 'schema'"), ({"schema": 1}, "ValueError: expected schema 3, got 1")):
        (tmp_path / "other" / runs.JOURNAL).unlink(missing_ok=True)
        with Journal(tmp_path / "other" / runs.JOURNAL, plan), pytest.raises(JournalError, match=f"can be read: {words}"):
            sweep.resume(tmp_path / "other", setup)


# --- replay


def tried(config, samples, windows=()):
    """The trial of a config next to an incumbent that takes 1 s in samples and 2 s in windows."""
    return runs.Trial("job", config, "ok", samples=(samples,) * 3, beside=(1.0,) * 3, windows=tuple(windows),
                      windows_beside=(2.0,) * len(windows), clock=1500.0 if windows else None)


def test_configs_without_windows_are_as_much_slower_than_the_fastest_as_their_samples():
    trials = {each.config: each for each in (tried("hot", 0.5, [1.8] * 4), tried("cool", 0.6, [1.6] * 4), tried("out", 0.9),
                                             tried("incumbent", 1.0, [2.0] * 4), tried("unlucky", 0.55))}
    assert runs.sampled_times(trials) == {"hot": 0.5, "unlucky": 0.55, "cool": 0.6, "out": 0.9, "incumbent": 1.0}
    times = runs.sustained_times(trials)
    assert times == pytest.approx({"cool": 0.8, "unlucky": 0.8, "hot": 0.9, "incumbent": 1.0, "out": 0.8 * 0.9 / 0.6})
    assert next(iter(times)) == "cool"
    # an incumbent that failed in the windows leaves seconds, in the units of the samples' ratios
    alone = {name: dataclasses.replace(trial, windows_beside=()) for name, trial in trials.items()}
    assert runs.sustained_times(alone) == pytest.approx({name: 0.6 / 0.8 * time for name, time in times.items()})
    without = {name: dataclasses.replace(trial, windows=()) for name, trial in alone.items()}
    assert runs.sustained_times(without) == runs.sampled_times(trials) and runs.sustained_times({}) == {}


def test_a_replay_picks_by_the_windows():
    job = runs.Job("forward", PROBLEM, ("hot", "cool", "out", "incumbent"), "incumbent")
    trials = [dataclasses.replace(each, job=job.name) for each in (
        tried("hot", 0.5, [1.8] * 4), tried("cool", 0.6, [1.6] * 4), tried("out", 0.9), tried("incumbent", 1.0, [2.0] * 4))]
    found, = replay.replay(runs.Run({}, (job,), tuple(trials)), "halving", seeds=[0])
    assert found.pick == "cool" and found.regret == 0 and 0 < found.device_seconds < 0.1
    bench = replay.ReplayBench({trial.config: trial for trial in trials})
    assert bench.windows(["cool", "out"], 2) == {
        "cool": (pytest.approx([0.8e-3] * 2), 1500.0), "out": (pytest.approx([1.2e-3] * 2), None)}
    assert bench.now() == 2 * 2 * 2 * search.WINDOW_SECONDS and bench.device_seconds == 0


@pytest.fixture(scope="module")
def recorded():
    return corpus.made_up()


@pytest.mark.parametrize("strategy", replay.REPLAYED)
def test_every_strategy_replays_a_recorded_sweep(recorded, strategy):
    found = replay.replay(recorded, strategy, seeds=range(3))
    assert {each.job for each in found} == {job.name for job in recorded.jobs}
    trials = {(job.name, name): trial for job in recorded.jobs for name, trial in recorded.of(job).items()}
    assert all(each.regret >= 0 and trials[each.job, each.pick].samples and each.device_seconds > 0 for each in found)
    assert replay.replay(recorded, strategy, seeds=range(3)) == found, "seeded"


def test_halving_and_exhaustive_find_the_best_and_a_small_budget_does_not(recorded):
    found = {name: replay.summary(replay.replay(recorded, name, range(10))) for name in ("halving", "exhaustive")}
    assert found["halving"]["p95"] <= 0.02 and found["exhaustive"]["p95"] <= 0.02
    assert found["halving"]["device_seconds"] < found["exhaustive"]["device_seconds"]
    few = replay.summary(replay.replay(recorded, "halving", range(10), search.Budget(trials=3)))
    assert few["mean"] > found["halving"]["mean"] and few["trials"] <= 3


def test_a_config_that_was_not_tried_raises(recorded):
    bench = replay.ReplayBench(recorded.of(recorded.jobs[0]))
    with pytest.raises(KeyError, match="16x16w1s1"):
        bench.check("16x16w1s1")
    failed = next(trial for trial in recorded.trials if trial.status == "incorrect")
    assert replay.ReplayBench({failed.config: failed}).check(failed.config).code == "incorrect"
