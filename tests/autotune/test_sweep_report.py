"""Reports of sweeps: every number by hand on tiny runs, and files that other tools can read."""

import collections
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import sys

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from tests.helpers import corpus
from tests.helpers.legible import assert_legible, texts
from tritonattn import Config, Problem, autotune
from tritonattn.autotune import sweep_plots, sweep_report
from tritonattn.autotune import trials as runs
from tritonattn.autotune.prune import REASONS
from tritonattn.autotune.trials import Job, Run, Trial

PROBLEM = Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16)
A, B, C, D, E = NAMES = ("64x64w4s2", "128x64w4s2", "128x128w8s2", "64x32w4s3", "32x32w4s2")
FAILURES = ("incorrect", "not repeatable", "hang", "launch error", "device lost")
FINISHED = corpus.made_up()


def a_job(configs=NAMES, kernel="forward", incumbent=A, **changes):
    return Job(kernel, dataclasses.replace(PROBLEM, **changes), tuple(configs), incumbent)


def tried(job, config, samples=(), beside=(), status="ok", **options):
    return Trial(job.name, config, status, samples=tuple(samples), beside=tuple(beside), **options)


def a_run(*jobs_and_trials, **plan):
    """A run of (job, its trials) each."""
    jobs, trials = zip(*jobs_and_trials)
    return Run(plan, jobs, tuple(itertools.chain(*trials)), {"gpu": "some GPU", "torch": "2.11.0"})


def costing(job, **costs):
    """Trials that cost so many times the incumbent's time, by the letters of their configs; None: incorrect."""
    configs = dict(zip("ABCDE", NAMES))
    return [tried(job, configs[name], status="incorrect") if cost is None else tried(job, configs[name], [cost] * 3, [1.0] * 3)
            for name, cost in costs.items()]


def standing(*trials, job=None):
    job = job or a_job()
    (found,) = sweep_report.standings(a_run((job, [dataclasses.replace(trial, job=job.name) for trial in trials])))
    return found


def test_what_drifts_does_not_touch_the_ratio():
    job = a_job()
    found = standing(tried(job, A, [10, 10, 10], [10, 10, 10]), tried(job, B, [9, 9, 9], [10, 10, 10]),
                     tried(job, C, [16, 18, 20], [20, 22.5, 25]), tried(job, D, status="hang"))
    # C took the longest of all, in rounds in which the incumbent took longer still
    assert found.best.config == C and found.ratio == pytest.approx(0.8) and found.beside == 22.5
    assert list(found.slowdowns) == [C, B, A] and list(found.slowdowns.values()) == pytest.approx([1, 1.125, 1.25])


@pytest.mark.parametrize("samples, verdict", [
    ([9.0] * 3, "10.0% less time than the incumbent"), ([9.95] * 3, "a tie with the incumbent"),
    ([9.85] * 3, "1.5% less time than the incumbent"),
    # 20 % to 80 % are 8.4 to 9.6: a spread of 6.7 %
    ([8.0, 9.0, 10.0], "a tie with the incumbent"), ([7.0, 8.0, 9.0], "20.0% less time than the incumbent"),
    ([11.0] * 3, "the incumbent is the best"),
])
def test_small_differences_are_a_tie(samples, verdict):
    found = standing(tried(a_job(), A, [10] * 3, [10] * 3), tried(a_job(), B, samples, [10] * 3))
    assert found.verdict == verdict


def test_an_incumbent_that_is_not_ok_may_be_faster():
    assert standing(tried(a_job(), A, [10] * 3, status="spill"), tried(a_job(), B, [11] * 3, [10] * 3)).verdict == (
        "10.0% more time than the incumbent")


def test_without_common_rounds_medians_are_compared():
    found = standing(tried(a_job(), A, [10] * 3), tried(a_job(), B, [9] * 3))
    assert found.ratio == pytest.approx(0.9) and found.beside == 10 and found.verdict.startswith("10.0% less")
    assert standing(tried(a_job(), A, [8, 10, 12]), tried(a_job(), B, [9] * 3)).verdict == "a tie with the incumbent"
    # the incumbent has no trial, but stood beside another
    found = standing(tried(a_job(), B, [9] * 3), tried(a_job(), C, [12] * 3, [10] * 3))
    assert found.ratio == pytest.approx(0.9) and found.costs[C] == pytest.approx(1.2) and found.verdict.startswith("10.0% less")


def test_without_a_time_of_the_incumbent_there_is_no_ratio():
    found = standing(tried(a_job(), A, status="incorrect"), tried(a_job(), B, [9] * 3), tried(a_job(), C, [18] * 3))
    assert found.best.config == B and found.ratio is None and found.beside is None
    assert found.slowdowns == {B: 1, C: 2} and found.verdict == "no time of the incumbent"
    assert standing(tried(a_job(), A, status="incorrect")).verdict == "nothing timed"


def test_shares_of_configs_near_the_best():
    found = standing(*costing(a_job(), A=1.0, B=1.04, C=1.2, D=1.9, E=None))
    assert sweep_report.shares(found) == {1.01: 0.25, 1.05: 0.5, 1.1: 0.5, 1.25: 0.75, 1.5: 0.75, 2.0: 1}
    assert sweep_report.shares(standing(tried(a_job(), A, status="hang"))) == {}


def jobs_costing(*costs, **changes):
    """Jobs of one group, each with these costs."""
    jobs = [a_job(n_k=1024 + i, **changes) for i in range(len(costs))]
    return a_run(*((job, costing(job, **each)) for job, each in zip(jobs, costs)))


def test_covers_grow_by_greed():
    run = jobs_costing({"A": 1, "B": 1.2, "C": 2}, {"A": 2, "B": 1.2, "C": 1}, {"A": 1, "B": 1.1, "C": None})
    ((key, covers),) = sweep_report.coverage(sweep_report.standings(run)).items()
    assert key == ("forward", "bfloat16", "64")
    # B alone: (1.2 * 1.2 * 1.1)^(1/3); with A (1 * 1.2 * 1)^(1/3), with C it would be (1.2 * 1 * 1.1)^(1/3)
    assert [cover.configs for cover in covers] == [(B,), (B, A), (B, A, C)]
    assert [cover.worst for cover in covers] == pytest.approx([1.2, 1.2, 1])
    assert [cover.mean for cover in covers] == pytest.approx([1.584 ** (1 / 3), 1.2 ** (1 / 3), 1])
    assert [cover.without for cover in covers] == [0, 0, 0]


def test_a_cover_may_leave_jobs_without():
    run = jobs_costing({"A": 1, "B": None}, {"A": None, "B": 1, "C": 1.5}, {"A": 1, "C": 1.1}, {"A": None})
    first, second = sweep_report.coverage(sweep_report.standings(run))["forward", "bfloat16", "64"]
    # A and C are ok in two jobs each, A without any loss; the last job, with nothing timed, does not count
    assert first == sweep_report.Cover((A,), math.inf, 1, 1)
    assert second.configs == (A, B) and (second.worst, second.mean, second.without) == (1, 1, 0)
    # a slow config for all comes before a fast one for some
    slow = sweep_report.coverage(sweep_report.standings(jobs_costing({"A": 1, "B": 1.5}, {"B": 1.5, "C": 1})))["forward", "bfloat16", "64"]
    assert slow[0].configs == (B,) and slow[0].worst == pytest.approx(1.5)
    json.dumps(sweep_report.as_json(run), allow_nan=False)
    assert sweep_report.as_json(run)["coverage"][0]["covers"][0] == {"configs": [A], "worst": None, "mean": 1, "without": 1}


def test_covers_end_at_six_configs_and_groups_are_apart():
    configs = [str(Config(16 << i, 64)) for i in range(7)]
    jobs = [a_job(configs, n_k=1024 + i) for i in range(7)] + [a_job(configs, kernel="dq"), a_job(configs, d=128, dv=64)]
    run = a_run(*((job, [tried(job, config, [1 + (i != j % 7)] * 3) for i, config in enumerate(configs)])
                  for j, job in enumerate(jobs)))
    found = sweep_report.coverage(sweep_report.standings(run))
    assert {key: len(covers) for key, covers in found.items()} == {
        ("forward", "bfloat16", "64"): 6, ("dq", "bfloat16", "64"): 1, ("forward", "bfloat16", "128/64"): 1}
    assert [cover.worst for cover in found["forward", "bfloat16", "64"]] == [2] * 6


@pytest.mark.parametrize("one, other, expected", [
    ([1, 2, 3], [10, 200, 201], 1), ([1, 2, 3, 4], [4, 3, 2, 1], -1),
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(22.5)), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ([1, 2], [1, 2], None), ([], [], None), ([1, 1, 1], [1, 2, 3], None), ([1, 2, 3], [5, 5, 5], None),
])
def test_spearman(one, other, expected):
    found = sweep_report.spearman(one, other)
    assert found == (expected if expected is None else pytest.approx(expected))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12), st.randoms())
def test_ranks_are_of_the_values_alone(values, rng):
    ranks = dict(zip(values, sweep_report.ranks(values)))
    assert sum(sweep_report.ranks(values)) == len(values) * (len(values) + 1) / 2
    shuffled = rng.sample(values, len(values))
    assert sweep_report.ranks(shuffled) == [ranks[value] for value in shuffled]
    assert sorted(ranks, key=ranks.get) == sorted(ranks)


def with_cycles(trials, *cycles):
    return [dataclasses.replace(trial, static={} if each is None else {"cycles": each}) for trial, each in zip(trials, cycles)]


def test_the_models_order_is_held_against_what_was_timed():
    trials = with_cycles(costing(a_job(), A=1.0, B=0.9, C=0.8, D=1.5), 3, 2, 1, None)
    # what is out has no say, nor what has no cycles
    found = standing(*trials, tried(a_job(), E, [1] * 3, [2] * 3, "spill", static={"cycles": 100}))
    assert found.spearman == pytest.approx(1)
    assert standing(*with_cycles(trials, 1, 2, 3, None)).spearman == pytest.approx(-1)
    assert standing(*with_cycles(trials, 1, 2, None, None)).spearman is None


def test_places_in_the_static_order():
    order = tuple(str(Config(64, 64, 4, depth)) for depth in range(1, 11))
    # the winners are the first, the fourth and the tenth
    jobs = [a_job(order, incumbent=order[0], n_k=1024 + i) for i in range(3)]
    times = [[1] + [2] * 9, [3, 2, 1.5, 1] + [2] * 6, [2] * 5 + [1.25] + [2] * 3 + [1]]
    found = sweep_report.standings(a_run(*((job, [tried(job, config, [each] * 3) for config, each in zip(order, own)])
                                     for job, own in zip(jobs, times))))
    assert [each.place for each in found] == [1, 4, 10]
    assert sweep_report.recall(found) == pytest.approx({1: 1 / 3, 4: 2 / 3, 8: 2 / 3})
    assert [[each.missed(top) for top in (1, 4, 8)] for each in found] == [[1, 1, 1], [3, 1, 1], [2, 2, 1.25]]
    assert sweep_report.regret(found) == (pytest.approx(6 ** (1 / 3)), 3)


def test_wrongly_pruned_are_those_that_are_out_and_near_the_best():
    job = a_job()
    out = [tried(job, config, [cost] * 3, [1] * 3, status) for config, cost, status in (
        (B, 1.04, "spill"), (C, 1.2, "slower"), (D, 0.9, "unclear"), (E, 0.5, "incorrect"))]
    found = standing(*costing(job, A=1.0), *out)
    assert found.best.config == A and found.pruned == pytest.approx({B: 1.04, C: 1.2, D: 0.9})
    assert set(found.wrongly_pruned) == {B, D}
    assert f"{B} (spill, 1.04), {D} (unclear, 0.90)" in sweep_report.text(a_run((job, found.trials.values())))


def test_failures_are_counted_by_kernel():
    one, two = a_job(), a_job(kernel="dq")
    run = a_run((one, [*costing(one, A=1, B=None, C=None), tried(one, D, status="hang")]), (two, costing(two, A=None)))
    assert sweep_report.failures(run) == {"forward": {"incorrect": 2, "hang": 1}, "dq": {"incorrect": 1}}
    assert list(sweep_report.failures(run)["forward"]) == ["incorrect", "hang"]
    assert "No config failed." in sweep_report.text(a_run((one, costing(one, A=1))))


def test_a_config_tried_again_counts_once():
    job = a_job()
    run = a_run((job, [tried(job, A, status="hang"), tried(job, A, [1.0] * 3)]))
    assert sweep_report.done(run) == (1, 5) and sweep_report.failures(run) == {"forward": {}} and len(rows_of(run)) == 1


def test_the_text_tells_it_all():
    job = a_job()
    run = a_run((job, [tried(job, A, [10e-6] * 5, [10e-6] * 5), tried(job, B, [7e-6, 8e-6, 8e-6, 8e-6, 9e-6], [10e-6] * 5),
                       tried(job, C, status="spill"), tried(job, D, status="hang"), tried(job, E, status="hang")]))
    lines = [" ".join(line.split()) for line in sweep_report.text(run).splitlines()]
    assert lines[:2] == ["Sweep of 1 jobs, 5 of 5 configs tried", "some GPU, torch 2.11.0"]
    assert f"{job.name} 5/5 2 {B} 8 7.8..8.2 {A} 10 0.800 20.0% less time than the incumbent" in lines
    assert f"{job.name} 2 50% 50% 50% 100% 100% 100%" in lines
    assert f"forward bfloat16 64 1 1.00 1.00 0 {B}" in lines
    assert f"{job.name} - 2/5 1.25 1.00 1.00 0 none" in lines
    assert {"forward hang 2", f"forward spill 1 {REASONS['spill']}"} <= set(lines)
    assert "synthetic" not in sweep_report.text(run) and "unfinished" not in sweep_report.text(run)


def test_json_is_json_and_has_the_numbers():
    found = sweep_report.as_json(FINISHED)
    read = json.loads(json.dumps(found, allow_nan=False))
    assert (found["finished"], found["tried"], found["planned"]) == (True, 300, 300) and len(found["jobs"]) == 12
    for own, standing in zip(found["jobs"], sweep_report.standings(FINISHED)):
        assert own["best"] == standing.best.config and own["seconds"] == standing.best.seconds
        assert own["q20"] <= own["seconds"] <= own["q80"] and own["slowdowns"][own["best"]] == 1
        assert Problem.from_json(own["problem"]) == standing.job.problem
    for own, other in zip(read["jobs"], found["jobs"]):
        # JSON has no tuples
        assert own | {"problem": None} == other | {"problem": None}
    assert read | {"jobs": None} == found | {"jobs": None}


def rows_of(run):
    return list(csv.DictReader(io.StringIO(sweep_report.as_csv(run), newline="")))


def test_a_csv_row_for_each_trial():
    job, note = a_job(d=128), 'o: "a", b\nc'
    static = {"registers": 200, "shared_memory": 70000, "occupancy": 2, "bound": "tensor", "cycles": 5e6, "stack": 0}
    run = a_run((job, [tried(job, A, [1e-3, 2e-3, 3e-3], [1e-3, 2e-3, 3e-3]), tried(job, C, status="hang", note=note),
                       tried(job, B, [2e-3] * 3, [4e-3] * 3, static=static, check_seconds=1.5)]))
    found = rows_of(run)
    assert [row["config"] for row in found] == [A, B, C] and all(row["job"] == job.name for row in found)
    expected = {"kernel": "forward", "batch": "2", "heads": "8", "n_q": "1024", "d": "128", "dv": "64", "dtype": "bfloat16",
                "mask": "full", "block_m": "128", "block_n": "64", "warps": "4", "stages": "2", "status": "ok", "note": "",
                "seconds": "0.002", "q20": "0.002", "q80": "0.002", "n": "3", "ratio": "0.5", "registers": "200",
                "shared_memory": "70000", "occupancy": "2", "bound": "tensor", "cycles": "5000000.0", "check_seconds": "1.5",
                "source": "timed"}
    assert {name: found[1][name] for name in expected} == expected
    assert float(found[0]["q20"]) == pytest.approx(1.4e-3) and float(found[0]["q80"]) == pytest.approx(2.6e-3)
    assert (found[2]["note"], found[2]["n"], found[2]["seconds"], found[2]["ratio"]) == (note, "0", "", "")


def test_every_status_has_a_name_in_t4():
    assert set(sweep_report.INVALIDITY) == {*REASONS, "ok", *FAILURES}
    assert set(sweep_report.INVALIDITY.values()) == {"timeout", "compile", "runtime", "correctness", "constraints", "correct"}
    assert [sweep_report.invalidity(status) for status in ("ok", *FAILURES)] == [
        "correct", "correctness", "correctness", "timeout", "runtime", "runtime"]
    with pytest.raises(ValueError, match="status: expected one of ok, .*; got 'odd'"):
        sweep_report.invalidity("odd")


def test_t4_is_what_the_schema_asks_for():
    found = json.loads(json.dumps(sweep_report.as_t4(FINISHED), allow_nan=False))
    assert found["schema_version"] == "1.0.0" and len(found["results"]) == 300
    numbers, seen = (int, float), set()
    for each, trial in zip(found["results"], FINISHED.trials):
        assert {"configuration", "times", "invalidity", "correctness"} <= set(each)
        assert each["invalidity"] == sweep_report.INVALIDITY[trial.status] and each["correctness"] == (trial.status == "ok")
        assert set(each["times"]) == {"compilation_time", "runtimes", "framework", "search_algorithm", "validation"}
        assert all(isinstance(value, numbers) for name, value in each["times"].items() if name != "runtimes")
        assert each["times"]["runtimes"] == pytest.approx([1e3 * sample for sample in trial.samples])
        assert each["times"]["compilation_time"] == pytest.approx(1e3 * trial.check_seconds)
        measured = {each["name"]: each for each in each["measurements"]}
        assert ("time" in measured) == bool(trial.samples) and each["objectives"] == ["time"]
        assert not trial.samples or measured["time"] == {"name": "time", "value": 1e3 * trial.seconds, "unit": "ms"}
        seen.add(json.dumps(each["configuration"], sort_keys=True))
    assert len(seen) == 300, "jobs and configs are told apart"


def test_configs_that_differ_in_their_edges_alone_are_two_in_t4():
    job = a_job([A, f"{A}e1"])
    one, two = sweep_report.as_t4(a_run((job, [tried(job, config) for config in job.configs])))["results"]
    assert one["configuration"] != two["configuration"]


def test_an_unknown_status_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="got 'odd'"):
        sweep_report.write(a_run((a_job(), [tried(a_job(), A, status="odd")])), tmp_path)
    assert not list(tmp_path.iterdir())


def shown(run):
    jobs = sweep_report.standings(run)
    return sweep_plots.pages(jobs, sweep_report.coverage(jobs), sweep_report.origin(run))


def awkward(count):
    """A run whose names are long, with every reason there is, times far apart, and a job with nothing timed."""
    configs = [str(Config(16 << i, 16 << j, 4, 2, 1)) for i in range(5) for j in range(4)]
    statuses = ["ok"] * 8 + [*REASONS, *FAILURES]
    jobs = [a_job(configs, "dbias" if i % 3 else "forward", configs[0], n_k=30000 + i, dv=192, window=(1000, 0), shift=28976,
                  bias=torch.float32, dropout=True, lengths=True) for i in range(count)]
    return a_run(*((job, [
        tried(job, config, [1e-4 * 1.3 ** ((7 * k + i) % 13)] * 3 if i != 1 and k % 3 else (), (), statuses[(k + 5 * i) % 26],
              static={"cycles": 1000 * (k + 1)}) for k, config in enumerate(configs[:-1])]) for i, job in enumerate(jobs)))


@pytest.mark.parametrize("run", [FINISHED, corpus.made_up(corpus.JOBS[:1]), awkward(9), awkward(1)],
                         ids=["corpus", "one job", "awkward", "awkward alone"])
def test_pictures_can_be_read(run):
    found = shown(run)
    kinds = collections.Counter(name.partition("-")[0] for name in found)
    pages = math.ceil(sum(bool(each.trials) for each in sweep_report.standings(run)) / 8)
    assert set(kinds) == {"heat", "slowdown", "coverage", "model"} and kinds["heat"] == pages
    for figure in found.values():
        assert_legible(figure, rotated=True)
        assert sweep_report.origin(run) in " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_pages_hold_eight_jobs_and_say_which_they_are():
    found = shown(FINISHED)
    assert list(found) == ["heat-1", "heat-2", "slowdown-1", "slowdown-2", "coverage-1", "model-1", "model-2"]
    for kind in ("slowdown", "model"):
        pages = [{text for text in texts(found[f"{kind}-{page}"]) if text in {job.name for job in FINISHED.jobs}}
                 for page in (1, 2)]
        assert [len(page) for page in pages] == [8, 4] and not pages[0] & pages[1]
    assert any("Page 2 of 2." in text for text in texts(found["heat-2"]))
    assert not any("Page" in text for text in texts(found["coverage-1"]))


def test_a_heat_map_has_the_best_of_each_tile_or_the_reason():
    configs = (A, "64x64w8s3", B, "128x64w8s2", C, D, "64x128w4s2", "64x128w8s2")
    job = a_job(configs)
    run = a_run((job, [tried(job, A, [10e-6] * 3), tried(job, "64x64w8s3", [8e-6] * 3), tried(job, B, [12e-6] * 3),
                       tried(job, "128x64w8s2", status="hang"), tried(job, C, status="duplicate work"),
                       tried(job, D, [7e-6] * 3, status="spill")]))
    cells = [text.get_text() for text in shown(run)["heat-1"].axes[0].texts]
    # row by row: 64 x 32, 64, 128; 128 x 64, 128, and nothing at 128 x 32, which was not planned
    assert cells == ["spill", "1.00\nw8s3", "not\ntried", "1.50\nw4s2", "double\nwork"]


def test_lines_and_points_are_the_numbers():
    job, changed = a_job(), a_job(n_k=2048)
    run = a_run(*((each, with_cycles([tried(each, A, [4e-6] * 3), tried(each, B, [3e-6] * 3), tried(each, C, [6e-6] * 3)],
                                     *cycles)) for each, cycles in ((job, (200, 100, 300)), (changed, (100, 200, 300)))))
    found = shown(run)
    line = found["slowdown-1"].axes[0].lines[0]
    assert list(line.get_xdata()) == pytest.approx([100 / 3, 200 / 3, 100])
    assert list(line.get_ydata()) == pytest.approx([1, 4 / 3, 2])
    model = found["model-1"].axes[0]
    assert sorted(map(tuple, model.collections[0].get_offsets())) == [(100, 3e-6), (200, 4e-6), (300, 6e-6)]
    # 1 in the one job, 0.5 in the other
    assert model.get_title("left") == "forward: Spearman 0.75, median of 2 jobs"
    assert "1 config for each kernel" in found["coverage-1"].texts[0].get_text()


def test_pictures_leave_the_users_settings_alone():
    def drawn():
        return {name: sweep_plots.png(figure) for name, figure in shown(corpus.made_up(corpus.JOBS[:1])).items()}

    backend, first = matplotlib.get_backend(), drawn()
    matplotlib.use("svg")
    try:
        with matplotlib.rc_context({"font.size": 31}):
            before = matplotlib.rcParams.copy()
            assert drawn() == first and matplotlib.rcParams == before and before["backend"] == "svg"
    finally:
        matplotlib.use(backend)


def test_what_is_written(tmp_path):
    run = corpus.made_up(corpus.JOBS[:2])
    (tmp_path / "t4.json").write_text("old")
    paths = sweep_report.write(run, tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == ["summary.csv", "t4.json", *(f"plots/{kind}-1.png" for kind in ("heat", "slowdown", "coverage", "model"))]
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file()), "nothing else is left"
    assert paths[0].read_text() == sweep_report.as_csv(run) and json.loads(paths[1].read_text()) == sweep_report.as_t4(run)
    for path in paths[2:]:
        image = imread(path)
        assert image.shape[0] > 400 and image.shape[1] > 900 and image[..., :3].std() > 0.05, path


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    run = a_run((a_job(), costing(a_job(), A=None)))
    sweep_report.write(run, tmp_path)
    before = (tmp_path / "summary.csv").read_text()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep_report.write(dataclasses.replace(run, trials=()), tmp_path)
    assert (tmp_path / "summary.csv").read_text() == before


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.delattr(autotune, "pictures")
    monkeypatch.delitem(sys.modules, "tritonattn.autotune.sweep_plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    assert [path.name for path in sweep_report.write(FINISHED, tmp_path, said.append)] == ["summary.csv", "t4.json"]
    assert said == ["no pictures: expected matplotlib, got none; pip install matplotlib"]


def test_another_missing_module_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delattr(autotune, "pictures")
    monkeypatch.setitem(sys.modules, "tritonattn.autotune.sweep_plots", None)
    with pytest.raises(ModuleNotFoundError, match="pictures"):
        sweep_report.write(FINISHED, tmp_path)


def test_what_is_synthetic_says_so_everywhere():
    words = "synthetic: no GPU was timed"
    assert FINISHED.synthetic and sweep_report.SYNTHETIC == words
    assert words in sweep_report.text(FINISHED) and sweep_report.as_json(FINISHED)["synthetic"] == words
    assert {row["source"] for row in rows_of(FINISHED)} == {words}
    t4 = sweep_report.as_t4(FINISHED)
    assert t4["note"] == words and {each["configuration"]["note"] for each in t4["results"]} == {words}
    assert all(any(words in text for text in texts(figure)) for figure in shown(FINISHED).values())
    timed = dataclasses.replace(FINISHED, plan={})
    everything = [sweep_report.text(timed), json.dumps(sweep_report.as_json(timed)), sweep_report.as_csv(timed), json.dumps(sweep_report.as_t4(timed)),
                  *itertools.chain(*(texts(figure) for figure in shown(timed).values()))]
    assert not any(words in text for text in everything)


def test_an_unfinished_run_says_how_far_it_is():
    run = dataclasses.replace(FINISHED, trials=FINISHED.trials[:40])
    words = "unfinished: 40 of 300 configs tried"
    assert words in sweep_report.text(run) and not sweep_report.as_json(run)["finished"] and len(rows_of(run)) == 40
    assert "15/25" in sweep_report.text(run) and "0/25" in sweep_report.text(run) and "nothing timed" in sweep_report.text(run)
    found = shown(run)
    assert all(any(words in text for text in texts(figure)) for figure in found.values())
    assert "heat-2" not in found, "jobs of which nothing was tried are left out"


@pytest.mark.parametrize("run", [dataclasses.replace(FINISHED, trials=()), Run({}, (), (), {})], ids=["no trials", "no jobs"])
def test_an_empty_run_gives_words(run, tmp_path):
    said = []
    assert sweep_report.text(run).splitlines()[-1] == "Nothing was tried yet, so there is nothing to report."
    assert sweep_report.as_json(run)["recall"] == {} and sweep_report.as_json(run)["regret"] is None
    assert [path.name for path in sweep_report.write(run, tmp_path, said.append)] == ["summary.csv", "t4.json"]
    assert said == ["no pictures: nothing was timed"] and rows_of(run) == []
    assert json.loads((tmp_path / "t4.json").read_text())["results"] == []


def test_a_run_in_which_all_fails_gives_the_reasons(tmp_path):
    run = a_run((a_job(), costing(a_job(), A=None, B=None)))
    assert "nothing timed" in sweep_report.text(run) and "forward  incorrect" in sweep_report.text(run)
    assert sweep_report.write(run, tmp_path, lambda said: None) == [tmp_path / "summary.csv", tmp_path / "t4.json"]


def test_the_corpus_reads_as_it_was_made(tmp_path):
    for _ in range(2):
        assert corpus.write_to(tmp_path) == FINISHED == runs.read(tmp_path)
    assert corpus.made_up(seed=1) != FINISHED
    # each job by itself
    alone = corpus.made_up(corpus.JOBS[5:6])
    assert alone.jobs == FINISHED.jobs[5:6] and alone.trials == tuple(FINISHED.of(alone.jobs[0]).values())
    assert {"ok", "spill", "shared memory", "duplicate work", "incorrect", "hang"} == {each.status for each in FINISHED.trials}
    assert any(each.samples and each.status == "spill" for each in FINISHED.trials)
    for each in sweep_report.standings(FINISHED):
        assert len(each.trials) == 25 and each.trials[each.job.incumbent].status == "ok"
        assert 0.2 < each.spearman < 0.99
