"""Sweeps: a frozen plan, resumption after a kill at any byte, and replay without a GPU."""

import dataclasses
import json
import random

import pytest

from tests.autotune.test_tune import H200, PROBLEM, Compilers, Surface
from tests.helpers import corpus
from tests.helpers.fake_bench import FakeBench, bench_of
from tritonattn import gpu
from tritonattn.autotune import measured, prune, replay, search, sweep
from tritonattn.autotune import trials as runs
from tritonattn.autotune.tune import TuningSetup
from tritonattn.configs import shipped as tables
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.user_cache import Cache
from tritonattn.measure.journal import JournalError

JOBS = [(PROBLEM, ("forward",)), (dataclasses.replace(PROBLEM, window=(None, 0)), ("dkdv",))]
SPILLING = {"64x64w4s2e1", "64x64w4s3e1", "64x32w4s2e1", "128x64w8s2e1", "32x32w4s2e1", "128x64w8s3e1", "128x32w8s3e1",
            "128x32w8s2e1", "64x16w4s2e1", "64x32w4s3e1"}


class Steady(FakeBench):
    """Every sample of a config is what it was before a kill."""

    def sample(self, config):
        self.time += 1e-3
        return self.true[config]


def setup_of(tmp_path, bench=None, on=H200):
    bench = bench or Steady(Surface("64x128w4s2e1"), hangs=["32x64w4s2e1"], wrong=["64x128w4s4e1"])
    return TuningSetup(on, bench_of(bench), Compilers(spilling=SPILLING), Cache(tmp_path / "cache"), {"gpu": "made up"})


def quiet(*_, **__):
    pass


def begun(tmp_path, name="run", **options):
    setup = setup_of(tmp_path, **options)
    sweep.begin(tmp_path / name, sweep.plan_of(JOBS, setup, rounds=5, say=quiet), setup.environment)
    return tmp_path / name, setup


def results(folder):
    return [dataclasses.replace(trial, check_seconds=0.0) for trial in runs.read(folder).trials]


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
        controls = [name for name, trial in trials.items() if trial.status in sweep.EXCLUDED and trial.samples]
        # one in ten of the excluded configs is timed, and keeps its reason
        assert sorted(set(controls) - {job.incumbent}) == run.plan["doubted"][job.name] != []
    forward = run.of(run.jobs[0])
    assert forward["32x64w4s2e1"].status == "hang" and forward["64x128w4s4e1"].status == "incorrect"
    ok = [trial for trial in forward.values() if trial.status == "ok"]
    assert min(ok, key=lambda trial: trial.seconds).config == "64x128w4s2e1"
    out = capsys.readouterr().out
    assert "best 64x128w4s2e1" in out and "min left" in out


def test_a_kill_at_any_byte_changes_nothing(tmp_path):
    folder, setup = begun(tmp_path, "whole")
    sweep.resume(folder, setup, say=quiet)
    whole, content = results(folder), (folder / runs.RESULTS).read_bytes()
    rng = random.Random(0)
    for at in sorted(rng.sample(range(200, len(content)), 12)):
        again, setup = begun(tmp_path, f"cut-{at}")
        assert (again / runs.PLAN).read_text() == (folder / runs.PLAN).read_text(), "plans are reproducible"
        (again / runs.RESULTS).write_bytes(content[:at])
        sweep.resume(again, setup, say=quiet)
        assert results(again) == whole


def test_a_finished_sweep_times_nothing_again(tmp_path):
    folder, setup = begun(tmp_path)
    sweep.resume(folder, setup, say=quiet)
    bench = Steady({})
    before = (folder / runs.RESULTS).read_bytes()
    assert sweep.resume(folder, setup_of(tmp_path, bench), say=quiet) and not bench.timed
    assert (folder / runs.RESULTS).read_bytes() == before


def test_an_interrupted_sweep_resumes(tmp_path):
    class Interrupted(Steady):
        def times(self, configs, rounds):
            if len(self.timed) > 30:
                raise KeyboardInterrupt
            return super().times(configs, rounds)

    folder, setup = begun(tmp_path, bench=Interrupted(Surface("64x128w4s2e1")))
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
    ({"versions": {"triton": "9"}}, "planned with versions"), ({"source": "0" * 12}, "planned with source"),
])
def test_a_sweep_resumes_only_with_the_same_gpu_versions_and_kernels(change, words, tmp_path, monkeypatch):
    folder, setup = begun(tmp_path)
    if "on" in change:
        setup.gpu = change["on"]
    if "versions" in change:
        monkeypatch.setattr(sweep, "versions", lambda: change["versions"])
    if "source" in change:
        monkeypatch.setattr(sweep, "kernel_hash", lambda: change["source"])
    with pytest.raises(JournalError, match=words):
        sweep.resume(folder, setup, say=quiet)


def test_a_folder_with_or_without_a_sweep_raises(tmp_path):
    folder, setup = begun(tmp_path)
    with pytest.raises(FileExistsError, match="already has a sweep"):
        begun(tmp_path)
    with pytest.raises(JournalError, match="no plan of a sweep can be read: FileNotFoundError"):
        sweep.resume(tmp_path / "none", setup)
    with pytest.raises(JournalError, match="no sweep can be read: FileNotFoundError"):
        runs.read(tmp_path / "none")
    (folder / runs.PLAN).write_text("{}")
    with pytest.raises(JournalError, match="can be read: KeyError"):
        sweep.resume(folder, setup)


def test_an_edited_plan_raises(tmp_path):
    folder, setup = begun(tmp_path)
    sweep.resume(folder, setup, say=quiet)
    plan = json.loads((folder / runs.PLAN).read_text())
    (folder / runs.PLAN).write_text(json.dumps(plan | {"rounds": 6}))
    with pytest.raises(JournalError, match="expected the plan"):
        sweep.resume(folder, setup)
    with pytest.raises(JournalError, match="the results are of the plan"):
        runs.read(folder)


# --- replay


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
    with pytest.raises(KeyError, match="was not tried in this sweep"):
        bench.check("16x16w1s1")
    failed = next(trial for trial in recorded.trials if trial.status == "incorrect")
    assert replay.ReplayBench({failed.config: failed}).check(failed.config).reason == "incorrect"


# --- tables of what was measured


def test_a_table_takes_what_was_measured(tmp_path):
    folder, setup = begun(tmp_path)
    sweep.resume(folder, setup, say=quiet)
    shipped, = (each for each in tables.shipped_tables() if each.name == "h200")
    path = tables.write_table(dataclasses.replace(shipped, made=shipped.made | {"source": kernel_hash()}), tmp_path)
    new = tables.read_table(measured.build([runs.read(folder)], H200, path, tmp_path / "."))
    entry = new.rows["forward", 2, 128, "full"].many
    assert (entry.config, entry.source, entry.shared_memory) == ("64x128w4s2e1", "measured", 65536)
    assert new.rows["dkdv", 2, 128, "edges"].many.source == "measured"
    others = [key for key in shipped.rows if key not in (("forward", 2, 128, "full"), ("dkdv", 2, 128, "edges"))]
    assert all(new.rows[key] == shipped.rows[key] for key in others)
    assert new.rows["forward", 2, 128, "full"].few == shipped.rows["forward", 2, 128, "full"].few


def test_a_synthetic_sweep_makes_no_table(tmp_path):
    with pytest.raises(ValueError, match="expected sweeps that were timed, got a synthetic one"):
        measured.build([corpus.made_up()], H200, tables.FOLDER / "h200.json", tmp_path)


@pytest.mark.parametrize("change", [{"arch": "sm_80"}, {"sms": 114}, {"memory": 80 << 30}], ids=str)
def test_a_sweep_of_another_gpu_makes_no_row_of_this(change, tmp_path):
    folder, setup = begun(tmp_path)
    sweep.resume(folder, setup, say=quiet)
    run = runs.read(folder)
    run = dataclasses.replace(run, plan=run.plan | {"gpu": run.plan["gpu"] | change})
    with pytest.raises(ValueError, match="expected a sweep of the kernels and the GPU of this table"):
        measured.build([run], H200, tables.FOLDER / "h200.json", tmp_path)


def test_what_a_map_could_not_use_and_what_lost_its_incumbent_make_no_row(recorded):
    job = recorded.jobs[0]
    good, = (trial for trial in recorded.of(job).values() if trial.config == job.incumbent)
    fast = dataclasses.replace(good, config="256x64w8s2", samples=(1e-6,) * len(good.samples))
    alone = dataclasses.replace(good, config="128x32w4s2", samples=(1e-6,), beside=())
    # a tile that no table is made with unless it was timed
    little = dataclasses.replace(good, config="32x64w4s2", samples=tuple(seconds / 2 for seconds in good.samples))
    small = dataclasses.replace(job, configs=(job.incumbent, fast.config, alone.config, little.config))
    run = dataclasses.replace(recorded, jobs=(small,), trials=(good, fast, alone, little))
    (_, by_config), = measured.slowdowns([run], H200).items()
    assert by_config == {job.incumbent: [2.0], "256x64w8s2": [None], "128x32w4s2": [None], "32x64w4s2": [1.0]}
    outcome, = replay.replay(run, "exhaustive", [0])
    assert outcome.pick == fast.config and outcome.regret == 0, "seconds and ratios are not mixed"


def test_a_row_takes_what_does_best_over_all_its_problems():
    by_config = {"a": [1.0, 1.5, 1.5], "b": [1.2, 1.2, 1.2], "c": [1.0, 1.0, None]}
    assert measured._best(by_config) == "b", "c was not timed everywhere"
    assert measured._best({"b": [1.0], "a": [1.0]}) == "a"
