"""The table builder: which configs become rows of a shipped table."""

import dataclasses
import sys

import pytest
import triton

from perf import config_table, measured
from tests.analysis.test_compile_report import compiled
from tests.autotune.test_prune import GOOD, H200, LOOP, MI300X
from tests.autotune.test_sweep import begun, quiet, recorded  # noqa: F401
from tests.helpers import corpus
from tritonattn import Config
from tritonattn.autotune import prune, replay, sweep
from tritonattn.autotune import trials as runs
from tritonattn.autotune.worker_pool import Failure
from tritonattn.configs import lookup, shipped
from tritonattn.configs import shipped as tables
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.shipped import Entry


class Known:
    """A journal that has seen everything."""

    def __init__(self, entries):
        self.entries = entries


def test_what_may_do_better_another_time_is_not_kept(tmp_path):
    cell, kept = ("forward", 2, 512, "full"), []
    journal = Known([])
    journal.append = kept.append
    builder = config_table.Builder(H200, journal, workers=None)
    builder._learn(cell, Config(16, 16), Failure("compile timeout", "slow", lasting=False))
    builder._learn(cell, Config(32, 32), Failure("compile error", "never"))
    assert [each["config"] for each in kept] == ["32x32w4s2"] and len(builder._seen) == 2


def entry(text, many, few=None, reason=None, **fields):
    known = {"cell": ["forward", 2, 64, "full"], "config": text, "reason": reason, "note": "", "registers": 100,
             "spills": 0, "shared_memory": 1000, "tensor_memory": 0, "occupancy": 1, "many": many, "few": few or many,
             "bound": "issue"}
    return known | fields


def test_a_row_takes_the_fastest_of_each_kind_and_tells_of_the_others():
    cell = ("forward", 2, 512, "full")
    known = [entry(*fields, cell=list(cell)) for fields in (
        ("32x32w4s1", 9.0, 1.0), ("32x16w4s1", 5.0, 7.0), ("16x32w4s1", 1.0, 0.1, "spill"), ("16x16w4s1", 6.0, 6.0))]
    builder = config_table.Builder(H200, Known(known), workers=None)
    row = builder._chosen(cell, known)
    assert (row.many.config, row.few.config) == ("32x16w4s1", "32x32w4s1")
    assert row.lost == {"16x16w4s1": "slower", "16x32w4s1": "spill"} and not row.many.exception
    only = builder._chosen(cell, known[2:3])
    assert only.many.config == "16x32w4s1" and only.many.exception == "spill"
    with pytest.raises(config_table.NothingFits, match=r"H200.*none \(x: shared memory\)"):
        builder._chosen(cell, [{"config": "x", "reason": "shared memory", "note": ""}])


def test_the_more_a_config_spills_the_less_the_model_is_trusted():
    builder = config_table.Builder(H200, Known([]), workers=None)
    known = [entry("32x32w8s1", 1.0, reason="spill", spills=1141), entry("32x16w4s2", 1.03, reason="spill", spills=400),
             entry("64x32w4s2", 1.5, reason="spill", spills=2), entry("16x32w4s2", 1.2, reason="duplicate work"),
             entry("32x32w4s1", 9.0), entry("16x16w4s1", 0.1, reason="register collapse"),
             entry("64x16w4s2", 1.05, reason="serialized", spills=1141)]
    assert [each["config"] for each in builder._order(known, "many")] == [
        "32x32w4s1", "64x32w4s2", "16x32w4s2", "32x16w4s2", "32x32w8s1", "64x16w4s2", "16x16w4s1"]


@pytest.mark.parametrize("taken, why", [
    ([10, 0, 1], "slower"), (None, "compile error"), ([H200.shared_memory + 1, 0, 0], "shared memory"),
    ([10, 600, 0], "tensor memory"),
], ids=str)
def test_why_a_config_of_float32_lost(taken, why):
    cell = ("forward", 4, 64, "edges")
    builder = config_table.Builder(H200, Known([{"cell": list(cell), "config": "32x32w4s1", "tf32": taken}]), workers=None)
    assert builder._why_lost(cell, entry("32x32w4s1", 9.0)) == why


def test_what_stood_before_is_a_candidate_as_it_stood():
    """Also where Hopper would leave the edges out of its pipeline, which makes another binary."""
    cell = ("forward", 4, 64, "edges")
    stood = Entry("64x16w4s2", "static-model", 1, 1, 0, 1, "issue")
    old = shipped.Table("old", {}, {}, {cell: shipped.Row(*cell, many=stood, few=stood)})
    builder = config_table.Builder(H200, Known([]), None, old)
    assert builder._before(cell, {}) == {Config(64, 16, 4, 2)}


@pytest.mark.parametrize("cell, on, stages", [
    (("forward", 2, 128, "full"), H200, ((2,), 3)), (("forward", 2, 128, "full"), MI300X, ((2,), 1)),
    (("forward", 2, 512, "full"), H200, ((1, 2), 3)), (("dq", 4, 512, "edges"), MI300X, ((1, 2), 3)),
    (("forward", 4, 128, "edges"), H200, ((1,), 2)), (("forward", 4, 512, "edges"), H200, ((1,), 2)),
], ids=str)
def test_stages_that_are_tried(cell, on, stages):
    assert config_table.stages_of(cell, on) == stages


def test_what_is_worth_compiling_for_a_table():
    def largest(gpu, *cell):
        tiles = [config for config in prune.candidates(cell[0], config_table.example(cell, True, gpu), gpu)
                 if config_table.sensible(cell, config, gpu)]
        return max(max(config.block_m, config.block_n) for config in tiles)

    assert largest(H200, "forward", 2, 128, "full") == largest(H200, "forward", 2, 256, "edges") == 128
    # the tensor cores' own products have 64 rows on Hopper, and 16 for each of AMD's four waves: wide heads need as many too
    assert largest(H200, "forward", 2, 512, "full") == largest(H200, "dq", 2, 256, "pairs") == 64
    assert largest(H200, "dq", 4, 64, "edges") == largest(MI300X, "dq", 4, 512, "edges") == 64
    assert largest(H200, "forward", 4, 128, "edges") == 32


class Nobody:
    """Compilers of which nothing is asked."""

    @staticmethod
    def map(jobs):
        assert not jobs
        return ()


@pytest.mark.parametrize("cell, before, searched", [
    (("forward", 2, 96, "edges"), [("64x64w4s2e1", 2.0)], False),
    # something speaks against all that stood there, or none of it fits
    (("forward", 2, 96, "edges"), [("64x64w4s2e1", 2.0, None, "spill")], True),
    (("forward", 4, 128, "edges"), [("32x32w4s1", 2.0, None, "spill")], True),
    (("forward", 4, 512, "edges"), [("16x16w4s1", None, None, "shared memory")], True),
    (("forward", 4, 128, "edges"), [("64x16w4s1", 2.0)], True),
    (("forward", 2, 512, "edges"), [("16x32w4s1", 2.0, None, "wrong tensor path")], True),
    # wide heads of float32 spill everywhere, take long to compile, and few would notice
    (("forward", 4, 256, "edges"), [("32x32w8s1", 2.0, None, "spill")], False),
], ids=str)
def test_a_build_looks_for_others_where_what_stood_there_does_not_do(cell, before, searched, monkeypatch):
    new = "16x32w4s1" if cell[1] == 4 else "64x32w8s2e1"
    known = [entry(*fields, cell=list(cell)) for fields in (*before, (new, 1.0))]
    # with TF32 64 rows are too many
    known += [{"cell": list(cell), "config": text, "tf32": [H200.shared_memory + text.startswith("64"), 0, 1]}
              for text in (new, "64x16w4s1", "32x32w4s1", "32x32w8s1", "16x16w4s1") if cell[1] == 4]
    known += [{"cell": list(cell), "config": new, "against": []}]
    monkeypatch.setattr(config_table, "candidates", lambda *_: [Config.parse(new)])
    monkeypatch.setattr(config_table, "BEST", 0)
    stood = Entry(before[0][0], "static-model", 1, 1, 0, 1, "issue")
    old = shipped.Table("old", {}, {}, {cell: shipped.Row(*cell, many=stood, few=stood)})
    builder = config_table.Builder(H200, Known(known), Nobody, old, config_table.Look(lambda cell: False))
    row = builder.row(cell, {})
    assert row.many.config == (new if searched else before[0][0])
    assert set(row.lost) == ({before[0][0]} if searched else set())


def test_what_lost_before_is_looked_at_again_and_what_another_gpu_has():
    cell = ("forward", 2, 128, "edges")
    def row(best, *lost):
        made = Entry(best, "static-model", 1, 1, 0, 1, "issue")
        return shipped.Row(*cell, many=made, few=made, lost=dict.fromkeys(lost, "slower"))
    old = shipped.Table("old", {}, {}, {cell: row("64x64w4s2e1", "128x64w8s2e1")})
    look = config_table.Look(lambda cell: False, {cell: row("128x128w8s3", "64x32w4s1")})
    found = config_table.Builder(H200, Known([]), None, old, look)._before(cell, {})
    assert set(map(str, found)) == {"64x64w4s2e1", "128x64w8s2e1", "128x128w8s3e1", "64x32w4s1"}


def test_what_does_badly_on_other_problems_of_its_row_is_passed_over():
    cell = ("forward", 2, 64, "edges")
    known = [entry(*fields, cell=list(cell)) for fields in (("64x64w4s2e1", 1.0), ("128x64w8s2e1", 2.0), ("64x32w4s2e1", 3.0))]

    def proved(**against):
        return [{"cell": list(cell), "config": text, "against": against.get(f"c{i}", [])}
                for i, text in enumerate(("64x64w4s2e1", "128x64w8s2e1", "64x32w4s2e1"))]

    def chosen(**against):
        return config_table.Builder(H200, Known(known + proved(**against)), workers=None)._chosen(cell, known).many

    assert chosen().config == "64x64w4s2e1" and not chosen().exception
    second = chosen(c0=["spill: 9 in the loop, with a map"])
    assert second.config == "128x64w8s2e1" and not second.exception
    least = chosen(c0=["a", "b"], c1=["spill: 3 in the loop, with a map"], c2=["a", "b"])
    assert (least.config, least.exception) == ("128x64w8s2e1", "spill: 3 in the loop, with a map")
    builder = config_table.Builder(H200, Known(known + proved(c0=["serialized, with a map"])), workers=None)
    assert builder._chosen(cell, known).lost == {"64x64w4s2e1": "serialized", "64x32w4s2e1": "slower"}


def test_a_row_is_proved_on_what_it_serves_and_by_both_compilers():
    class Compilers:
        def __init__(self, spills):
            self.spills, self.jobs = spills, []

        def map(self, jobs):
            for job in jobs:
                self.jobs.append(job[1])
                loop = dataclasses.replace(LOOP, instructions=LOOP.instructions + ("STL",) * self.spills)
                yield dataclasses.replace(GOOD, loops=(loop,))

    cell, kept = ("forward", 2, 128, "pairs"), []
    journal = Known([])
    journal.append = kept.append
    usual, other = Compilers(0), Compilers(config_table.LIGHT)
    assert config_table.Builder(H200, journal, usual, also=other)._against(cell, "128x128w8s2e1") == []
    assert [problem.masked for problem in usual.jobs] == [True, False, True] and len(other.jobs) == 4
    assert kept == [{"cell": list(cell), "config": "128x128w8s2e1", "against": []}]
    builder = config_table.Builder(H200, journal, Compilers(1), also=Compilers(config_table.LIGHT + 1))
    said = builder._against(cell, "128x128w8s2e1")
    assert "spill: 1 in the loop, with a mask" in said and "spill: 17 in the loop, by another Triton" in said and len(said) == 7
    for mask, count in (("full", 0), ("edges", 1), ("window", 0), ("pairs", 3)):
        found = config_table.others(("forward", 2, 128, mask))
        assert len(found) == count and all(lookup.mask_class("forward", each) == mask for each in found.values())
    assert len(config_table.others(("forward", 2, 64, "edges"))) == 2, "a map at small head sizes"
    assert config_table.others(("forward", 4, 64, "pairs")) == config_table.others(("forward", 2, 256, "pairs")) == {}


def test_a_row_of_float32_fits_with_tf32_and_says_what_the_larger_binary_takes():
    class Compilers:
        jobs = []

        def map(self, jobs):
            self.jobs += jobs
            for _, _, tried, on, _ in jobs:
                yield dataclasses.replace(GOOD, shared_memory=on.shared_memory + 1 if tried.block_m == 64 else 5000)

    cell, kept = ("forward", 4, 64, "edges"), []
    known = [entry(*fields, cell=list(cell)) for fields in (("64x32w4s1", 1.0), ("32x32w4s1", 2.0), ("32x16w4s1", 3.0))]
    journal = Known(known)
    journal.append = kept.append
    row = config_table.Builder(H200, journal, Compilers())._chosen(cell, known)
    assert (row.many.config, row.many.shared_memory, row.many.occupancy) == ("32x32w4s1", 5000, 1) and row.few == row.many
    assert row.lost == {"64x32w4s1": "shared memory", "32x16w4s1": "slower"}
    assert [(job[2].block_m, job[4]) for job in Compilers.jobs] == [(64, "tf32"), (32, "tf32")], "each once"
    assert [each["tf32"] for each in kept] == [[H200.shared_memory + 1, 0, 0], [5000, 0, 1]]
    again = config_table.Builder(H200, Known(known + kept), workers=None)
    assert again._chosen(cell, known) == row, "a journal knows it"
    with pytest.raises(config_table.NothingFits, match=r"H200.*expected a config that fits with TF32, got 1 that do not"):
        again._chosen(cell, known[:1])


def test_another_python_is_asked_for_its_triton():
    assert config_table.version_in(sys.executable) == triton.__version__
    with pytest.raises(ValueError, match="expected a Python with Triton"):
        config_table.version_in("false")


def test_what_stands_for_a_cell_fills_the_gpu_or_half_of_it():
    for cell in config_table.cells(H200):
        many, few = (config_table.example(cell, fills, H200) for fills in (True, False))
        assert (lookup.gpu_fill(cell[0], many, H200), lookup.gpu_fill(cell[0], few, H200)) == ("many", "few")
        assert lookup.mask_class(cell[0], many) == lookup.mask_class(cell[0], few) == cell[3]
        assert many.d == cell[2] and min(many.dtype.itemsize, 4) == cell[1]


BUILD = """
import json, pathlib, tempfile
from tritonattn import gpu
from tritonattn.configs import shipped as tables
from perf import config_table
cell, on = ("forward", 2, 64, "full"), gpu.KNOWN["sm_90"]
config_table.sensible = lambda cell, config, gpu: str(config) in ("64x64w4s2e1", "128x128w8s2e1")
with tempfile.TemporaryDirectory() as folder:
    folder, said = pathlib.Path(folder), []
    path = config_table.build(on, [cell], folder, folder, say=lambda line, flush: said.append(line))
    first, journal = path.read_text(), next(folder.glob("*.jsonl")).read_text()
    config_table.build(on, [cell], folder, folder, say=lambda line, flush: said.append(line))
    row = tables.read_table(path).rows[cell]
    print(json.dumps([first == path.read_text(), journal == next(folder.glob("*.jsonl")).read_text(), row.many.config,
                      row.many.registers, sorted(row.lost) + [row.few.config], said]))
"""


def test_a_build_is_repeatable_and_compiles_nothing_twice():
    same, nothing_new, many, registers, lost, said = compiled(BUILD)
    assert same and nothing_new and registers > 100 and len(said) == 2
    assert {"64x64w4s2e1", "128x128w8s2e1", "64x64w4s3e1", "128x128w8s3e1"} <= {*lost, many}


def test_a_table_takes_what_was_measured(tmp_path):
    folder, lab = begun(tmp_path)
    sweep.carry_on(folder, lab, say=quiet)
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
    folder, lab = begun(tmp_path)
    sweep.carry_on(folder, lab, say=quiet)
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
