"""Reports of sweeps: the numbers by hand on small runs, and files that other tools can read."""

import dataclasses
import itertools
import json
import math
import statistics

import pytest
import torch
from matplotlib.image import imread

from tests.helpers import corpus
from tests.helpers.legible import assert_legible, texts
from tritonattn import Config, Problem
from tritonattn.autotune import sweep_report
from tritonattn.autotune import trials as runs
from tritonattn.autotune.prune import REASONS
from tritonattn.autotune.search import FAILURES
from tritonattn.autotune.trials import Job, Run, Trial

PROBLEM = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16)
A, B, C, D, E = NAMES = ("64x64w4s2", "128x64w4s2", "128x128w8s2", "64x32w4s3", "32x32w4s2")
FINISHED = corpus.made_up()


def a_job(configs=NAMES, kernel="forward", **changes):
    return Job(kernel, dataclasses.replace(PROBLEM, **changes), tuple(configs), A)


def tried(job, config, samples=(), beside=(), status="ok", **options):
    return Trial(job.name, config, status, samples=tuple(samples), beside=tuple(beside), **options)


def a_run(*jobs_and_trials, **plan):
    """Return a run of (job, its trials) each."""
    jobs, trials = zip(*jobs_and_trials)
    plan = {"environment": {"gpu": "some GPU", "torch": "2.11.0"}} | plan
    return Run(plan, jobs, tuple(itertools.chain(*trials)))


def result_of(*trials):
    result, = sweep_report.results_of(a_run((a_job(), trials)))
    return result


def lines_of(run):
    return [" ".join(line.split()) for line in sweep_report.text(run).splitlines()]


def test_drift_does_not_change_the_order():
    job = a_job()
    result = result_of(tried(job, A, [10] * 3, [10] * 3), tried(job, B, [9] * 3, [10] * 3),
                       tried(job, C, [16, 18, 20], [20, 22.5, 25]), tried(job, D, status="hang"))
    # C has the longest samples, but in rounds in which the default was even slower
    assert result.ok[0].config == C and result.default_slowdown == pytest.approx(1.25)
    assert list(result.slowdowns) == [C, B, A] and list(result.slowdowns.values()) == pytest.approx([1, 1.125, 1.25])


def test_without_the_default_medians_are_compared():
    job = a_job()
    # trials without the default cannot be compared with those beside it
    result = result_of(tried(job, B, [8] * 3), tried(job, C, [12] * 3, [10] * 3), tried(job, D, [15] * 3, [10] * 3))
    assert result.default_slowdown == pytest.approx(1 / 1.2) and result.slowdowns == pytest.approx({C: 1, D: 1.25})
    result = result_of(tried(job, A, status="incorrect"), tried(job, B, [9] * 3), tried(job, C, [18] * 3))
    assert result.default_slowdown is None and result.slowdowns == {B: 1, C: 2}
    assert result_of(tried(job, A, status="incorrect")).ok == []


def test_a_default_that_is_not_ok_may_be_faster():
    result = result_of(tried(a_job(), A, [10] * 3, status="spill"), tried(a_job(), B, [12.5] * 3, [10] * 3))
    assert result.ok[0].config == B and result.default_slowdown == pytest.approx(0.8)


@pytest.mark.parametrize("xs, ys, expected", [
    ([1, 2, 3], [10, 200, 201], 1), ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    # ranks 1 2.5 2.5 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(22.5)), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ([1, 2], [1, 2], None), ([], [], None), ([1, 1, 1], [1, 2, 3], None), ([1, 2, 3], [5, 5, 5], None),
])
def test_spearman(xs, ys, expected):
    correlation = sweep_report.spearman(list(zip(xs, ys)))
    assert correlation == (expected if expected is None else pytest.approx(expected))


def test_the_model_is_compared_with_the_ok_configs():
    job = a_job()
    timed = [(A, 1.0, 3), (B, 0.9, 2), (C, 0.8, 1)]

    def correlation(sign):
        trials = [tried(job, config, [cost] * 3, [1] * 3, static={"cycles": sign * cycles}) for config, cost, cycles in timed]
        excluded = tried(job, E, [1] * 3, [2] * 3, "spill", static={"cycles": 100})
        return result_of(*trials, tried(job, D, [1.5] * 3, [1] * 3), excluded)

    assert correlation(1).correlation == pytest.approx(1) and correlation(-1).correlation == pytest.approx(-1)


def test_excluded_configs_near_the_best_are_named():
    job = a_job()
    costs = ((A, 1.0, "ok"), (B, 1.04, "spill"), (C, 1.2, "slower"), (D, 0.9, "unclear"), (E, 0.5, "incorrect"))
    trials = [tried(job, config, [cost] * 3, [1] * 3, status) for config, cost, status in costs]
    assert [trial.config for trial in result_of(*trials).ok] == [A]
    assert (f"3 excluded configs were timed; within 5% of the best: {D} of {job.name} (unclear, slowdown 0.90), "
            f"{B} of {job.name} (spill, slowdown 1.04).") in lines_of(a_run((job, trials)))


def test_the_text():
    job, other = a_job(), a_job(kernel="dq")
    run = a_run((job, [tried(job, A, [10e-6] * 5, [10e-6] * 5), tried(job, B, [7e-6, 8e-6, 8e-6, 8e-6, 9e-6], [10e-6] * 5),
                       tried(job, C, status="spill"), tried(job, D, status="hang"), tried(job, E, status="hang")]),
                (other, [tried(other, A, [1e-6], [1e-6])]))
    lines = lines_of(run)
    assert lines[0] == "Sweep of 2 jobs; unfinished: 6 of 10 configs tried; some GPU, torch 2.11.0"
    assert f"{job.name} 5/5 2 {B} 8 - {A} 1.250 -" in lines
    assert f"Slowdown of the defaults: {math.sqrt(1.25):.3f} in the geometric mean, 1.250 at most." in lines
    assert {f"forward hang 2 {FAILURES['hang']}", f"forward spill 1 {REASONS['spill']}"} <= set(lines)
    assert lines.index(f"forward hang 2 {FAILURES['hang']}") < lines.index(f"forward spill 1 {REASONS['spill']}")


def test_a_config_tried_again_counts_once():
    job = a_job()
    run = a_run((job, [tried(job, A, status="hang"), tried(job, A, [1.0] * 3)]))
    assert "unfinished: 1 of 5" in sweep_report.origin(run) and "hang" not in sweep_report.text(run)


def test_every_trial_is_in_t4():
    t4 = sweep_report.as_t4(FINISHED)
    assert json.loads(json.dumps(t4, allow_nan=False)) == t4 and t4["schema_version"] == "1.0.0"
    trials = [trial for job in FINISHED.jobs for trial in FINISHED.of(job).values()]
    for entry, trial in zip(t4["results"], trials, strict=True):
        assert entry["times"]["runtimes"] == pytest.approx([1e3 * sample for sample in trial.samples])
        assert entry["times"]["validation"] == pytest.approx(1e3 * trial.check_seconds)
        assert [each["name"] for each in entry["measurements"]] == (
            ["time"] * bool(trial.samples) + ["sustained time"] * bool(trial.windows))
        # in one file, "time" has one meaning
        for each, seconds in zip(entry["measurements"], (trial.samples, trial.windows)):
            assert each["value"] == pytest.approx(1e3 * statistics.median(seconds)) and each["unit"] == "ms"
        assert entry["correctness"] == (trial.status == "ok")
        config = Config.parse(trial.config)
        assert entry["configuration"]["job"] == trial.job and entry["configuration"]["block_m"] == config.block_m
    assert len({json.dumps(entry["configuration"], sort_keys=True) for entry in t4["results"]}) == 300


def test_t4_has_a_name_for_every_status():
    job = a_job()
    statuses = ("ok", *REASONS, *FAILURES)
    run = a_run(*((a_job(n_k=1024 + i), [tried(a_job(n_k=1024 + i), A, status=status)]) for i, status in enumerate(statuses)))
    names = dict(zip(statuses, (entry["invalidity"] for entry in sweep_report.as_t4(run)["results"])))
    assert set(sweep_report.T4_INVALIDITY) <= set(statuses) and job.incumbent == A
    assert set(names.values()) == {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}
    assert [names[status] for status in ("ok", "incorrect", "hang", "launch error", "compile error", "spill")] == [
        "correct", "correctness", "timeout", "runtime", "compile", "constraints"]


def test_the_heat_map_has_the_least_slowdown_of_each_tile():
    configs = (A, "64x64w8s3", B, "128x64w8s2", C, D, "64x128w4s2")
    job = a_job(configs)
    run = a_run((job, [tried(job, A, [10e-6] * 3), tried(job, "64x64w8s3", [8e-6] * 3), tried(job, B, [12e-6] * 3),
                       tried(job, "128x64w8s2", status="hang"), tried(job, C, status="duplicate work"),
                       tried(job, D, [7e-6] * 3, status="spill")]))
    axes = sweep_report.heat_map(run).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64x32", "64x64", "64x128", "128x64", "128x128"]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(1, 0): "1.00", (3, 0): "1.50"}
    assert [math.isnan(value) for value in axes.images[0].get_array().filled(math.nan)[0]] == [True, False, True, False, True]


def awkward(count):
    """Return a run with long names, every status, and a job in which nothing was timed."""
    configs = [str(Config(16 << i, 16 << j, 4, 2, 1)) for i in range(5) for j in range(4)]
    statuses = ["ok"] * 8 + [*REASONS, *FAILURES]
    jobs = [a_job(configs, "dbias" if i % 3 else "forward", n_k=30000 + i, dv=192, window=(1000, 0), shift=28976,
                  bias=torch.float32, dropout=True, lengths=True) for i in range(count)]
    return a_run(*((job, [tried(job, config, [1e-4 * 1.3 ** ((7 * k + i) % 13)] * 3 if i != 1 and k % 3 else (), (),
                                statuses[(k + 5 * i) % len(statuses)]) for k, config in enumerate(configs)])
                   for i, job in enumerate(jobs)))


@pytest.mark.parametrize("run", [FINISHED, awkward(9), awkward(1)], ids=["corpus", "awkward", "awkward alone"])
def test_the_heat_map_is_legible(run):
    figure = sweep_report.heat_map(run)
    assert_legible(figure, rotated=True)
    assert sweep_report.origin(run) in texts(figure)


def test_the_files(tmp_path):
    run = corpus.made_up(corpus.JOBS[:2])
    (tmp_path / "t4.json").write_text("old")
    assert [path.name for path in sweep_report.write(run, tmp_path / "new")] == ["t4.json"]
    paths = sweep_report.write(run, tmp_path, plot=True)
    assert [path.name for path in paths] == ["t4.json", "heat.png"]
    assert json.loads(paths[0].read_text()) == sweep_report.as_t4(run)
    image = imread(paths[1])
    assert image.shape[0] > 300 and image.shape[1] > 900 and image[..., :3].std() > 0.05


def test_synthetic_runs_are_labelled_everywhere():
    t4 = sweep_report.as_t4(FINISHED)
    assert sweep_report.SYNTHETIC in lines_of(FINISHED)[0] and t4["note"] == sweep_report.SYNTHETIC
    assert any(sweep_report.SYNTHETIC in text for text in texts(sweep_report.heat_map(FINISHED)))
    timed = dataclasses.replace(FINISHED, plan={"environment": FINISHED.environment})
    for text in (sweep_report.text(timed), json.dumps(sweep_report.as_t4(timed)),
                 *texts(sweep_report.heat_map(timed))):
        assert sweep_report.SYNTHETIC not in text


@pytest.mark.parametrize("run", [dataclasses.replace(FINISHED, trials=()), Run({"environment": {}}, (), ()),
                                 a_run((a_job(), [tried(a_job(), A, status="incorrect")]))],
                         ids=["no trials", "no jobs", "nothing timed"])
def test_a_run_without_times_has_a_report(run, tmp_path):
    assert sweep_report.text(run).startswith(f"Sweep of {len(run.jobs)} jobs; ") and "Slowdown" not in sweep_report.text(run)
    assert len(sweep_report.write(run, tmp_path, plot=True)) == 2


def test_the_corpus_reads_as_it_was_written(tmp_path):
    for _ in range(2):
        assert corpus.write_to(tmp_path) == FINISHED == runs.read(tmp_path)
    assert corpus.made_up(seed=1) != FINISHED
    # a job does not depend on the others
    alone = corpus.made_up(corpus.JOBS[5:6])
    assert alone.jobs == FINISHED.jobs[5:6] and alone.trials == tuple(FINISHED.of(alone.jobs[0]).values())
    assert {"ok", "spill", "shared memory", "duplicate work", "incorrect", "hang"} == {each.status for each in FINISHED.trials}
    assert any(trial.samples and trial.status == "spill" for trial in FINISHED.trials)
    for result in sweep_report.results_of(FINISHED):
        assert len(result.trials) == 25 and result.trials[A].status == "ok" and 0.2 < result.correlation < 0.99
