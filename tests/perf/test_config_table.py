"""The table builder: which configs become rows of a shipped table, and when a table may be restamped."""

import dataclasses
import functools
import sys
import types

import pytest
import torch
import triton

from perf import config_table
from perf.config_table import LIGHT_SPILLS, RowBuilder
from tests.autotune.test_prune import GOOD, H200, LOOP, MI300X
from tests.autotune.test_sweep import begun, quiet
from tests.helpers import corpus
from tests.helpers.compile_server import compiled
from tritonattn import Config, Problem, gpu
from tritonattn.autotune import prune, sweep
from tritonattn.autotune import trials as runs
from tritonattn.autotune.worker_pool import Failure
from tritonattn.configs import lookup, shipped
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.shipped import Entry

BOUNDED = ("forward", 2, 512, "full")  # a row that is neither searched nor checked on other problems


class FakeWorkers:
    """Compilers that return what `compile(job)` returns."""

    def __init__(self, compile):
        self.compile, self.jobs = compile, []

    def map(self, jobs):
        self.jobs += jobs
        return map(self.compile, jobs)


@dataclasses.dataclass(frozen=True)
class Report:
    """A compile report that has its verdict and its cycles."""

    config: Config
    filled: float
    underfilled: float
    reason: str | None
    note: str
    loop_spills: int = 0
    shared_memory: int = 1000
    problem: Problem | None = None
    registers, tensor_memory, occupancy = 100, 0, 1

    @property
    def fits(self):
        return self.reason != "shared memory"


@dataclasses.dataclass(frozen=True)
class Estimate:
    cycles: float
    bound: str = "issue"


@pytest.fixture
def modelled(monkeypatch):
    """Take verdicts and cycles from a Report."""
    def estimate(report):
        return Estimate(getattr(report, lookup.gpu_fill("forward", report.problem, H200)))

    monkeypatch.setattr(config_table, "estimate", estimate)
    monkeypatch.setattr(config_table, "check_report", lambda report: prune.Verdict(
        report.config, report.reason, report.note, report, estimate(report) if report.fits else None))


def report(text, filled=1.0, underfilled=None, reason=None, note="", **fields):
    return Report(Config.parse(text), filled, underfilled or filled, reason, note, **fields)


def workers_of(*reports, **variants):
    """Compilers that return these reports for a row's example, and {name: reports} for other variants."""
    by_name = {name: {each.config: each for each in group} for name, group in {"": reports, **variants}.items()}

    def compile(job):
        _, problem, config, _, precision = job
        whole = "whole" in by_name and problem.n_q % 128 == 0 and not problem.mapped
        name = ("tf32" if precision == "tf32" else "mapped" if problem.mapped else "lengths" if problem.lengths
                else "whole" if whole else "")
        return dataclasses.replace(by_name[name][config], problem=problem)

    return FakeWorkers(compile)


def choose(key, *reports, **variants):
    return RowBuilder(key, H200, workers_of(*reports, **variants)).choose({each.config for each in reports})


def row_of(key, config, *rejected):
    entry = Entry(Config.parse(config), "static-model", 1, 1, 0, 1, "issue")
    return shipped.Row(*key, filled=entry, underfilled=entry, rejected=dict.fromkeys(rejected, "slower"))


def spilling(count):
    loop = dataclasses.replace(LOOP, instructions=LOOP.instructions + ("STL",) * count)
    return dataclasses.replace(GOOD, loops=(loop,))


@pytest.mark.usefixtures("modelled")
def test_a_row_takes_the_fastest_config_of_each_fill_and_lists_the_others():
    reports = [report("32x32w4s1", 9.0, 1.0), report("32x16w4s1", 5.0, 7.0), report("16x32w4s1", 1.0, 0.1, "spill"),
               report("16x16w4s1", 6.0, 6.0), report("64x64w4s1", 1.0, reason="shared memory")]
    row = choose(BOUNDED, *reports)
    assert (str(row.filled.config), str(row.underfilled.config)) == ("32x16w4s1", "32x32w4s1")
    assert row.rejected == {"16x16w4s1": "slower", "16x32w4s1": "spill", "64x64w4s1": "shared memory"}
    assert row.filled == Entry(Config(32, 16, 4, 1), "static-model", 100, 1000, 0, 1, "issue")
    only = choose(BOUNDED, reports[2])
    assert str(only.filled.config) == "16x32w4s1" and only.filled.accepted_fault == "spill"
    assert choose(BOUNDED, reports[4]) is None
    assert choose(BOUNDED, report("64x64w8s2", 1.0, reason="race")) is None, "not even for want of another one"


def test_a_row_without_a_config_that_fits_is_an_error(monkeypatch):
    monkeypatch.setattr(config_table, "candidates", lambda *_: [Config(32, 16, 4, 1)])
    builder = RowBuilder(BOUNDED, H200, FakeWorkers(lambda _: Failure("compile error", "refused")))
    with pytest.raises(ValueError, match=r"H200.*expected a config that fits, got none \(32x16w4s1: compile error: refused\)"):
        builder.build(set(), search=False)


def test_the_known_configs_are_those_of_the_old_row_and_of_neighbours():
    key, narrower = ("forward", 2, 128, "edges"), ("forward", 2, 96, "edges")
    old = {key: row_of(key, "64x64w4s2", "128x64w8s1e1")}
    done = {narrower: row_of(narrower, "32x32w4s2e1", "16x16w4s1")}
    known = functools.partial(config_table.known_configs, key, old=old, done=done)
    assert set(map(str, known(H200, search=None))) == {"64x64w4s2e1m", "64x64w4s2e1am", "128x64w8s1m", "32x32w4s2e1m",
                                                       "32x32w4s2e1am"}, "Hopper has edge stages"
    assert set(map(str, known(MI300X, search=None))) == {"64x64w4s2", "128x64w8s1", "32x32w4s2"}, "AMD adds up without MMA"
    assert set(map(str, known(gpu.KNOWN["sm_80"], search=[]))) == {"64x64w4s2m"}
    exact = ("forward", 4, 64, "edges")
    old = {exact: row_of(exact, "64x16w4s2", "16x16w4s1")}
    assert config_table.known_configs(exact, H200, old, {}, None) == {Config(64, 16, 4, 2)}


def test_rows_choose_among_the_configs_of_searched_rows_of_their_width():
    key, full, other = ("dq", 2, 128, "edges"), ("dq", 2, 128, "full"), ("dq", 2, 128, "pairs")
    done = {full: row_of(full, "128x64w8s2e1"), other: row_of(other, "16x16w4s1")}
    configs = config_table.known_configs(key, H200, {key: row_of(key, "64x64w4s2e1")}, done, ["dq/128/full"])
    assert set(map(str, configs)) == {"64x64w4s2e1", "128x64w8s2e1"}
    assert config_table.searched(full, ["dq/128/full"]) and not config_table.searched(key, ["dq/128/full"])
    assert config_table.searched(full, None) and not config_table.searched(("dq", 2, 96, "full"), None)


@pytest.mark.parametrize("key, on, stages", [
    (("forward", 2, 128, "full"), H200, (2, 3)), (("forward", 2, 128, "full"), MI300X, (1, 2)),
    (("forward", 2, 512, "full"), H200, (1, 2, 3)), (("forward", 4, 128, "edges"), H200, (1, 2)),
    (("forward", 2, 64, "edges"), H200, (2, 3, 4)), (("forward", 2, 64, "edges"), gpu.KNOWN["sm_80"], (2, 3)),
], ids=str)
def test_numbers_of_stages(key, on, stages):
    assert config_table.stages_of(key, on) == stages


def test_largest_tiles_of_a_search():
    def largest(on, *key):
        tiles = [config for config in prune.candidates(key[0], config_table.example_problem(key, "filled", on), on)
                 if config_table.sensible(key, config, on)]
        return max(max(config.block_m, config.block_n) for config in tiles)

    assert largest(H200, "forward", 2, 128, "full") == largest(H200, "forward", 2, 256, "edges") == 128
    # products have 64 rows on Hopper, and 16 for each of AMD's four waves: wide heads need as many too
    assert largest(H200, "forward", 2, 512, "full") == largest(H200, "dq", 2, 256, "pairs") == 64
    assert largest(H200, "dq", 4, 64, "edges") == largest(MI300X, "dq", 4, 512, "edges") == 64
    assert largest(H200, "forward", 4, 128, "edges") == 32


@pytest.mark.usefixtures("modelled")
@pytest.mark.parametrize("key, known, search", [
    (("forward", 2, 96, "edges"), report("64x64w4s2e1", 2.0), False),
    # the known config has a fault, or does not fit
    (("forward", 2, 96, "edges"), report("64x64w4s2e1", 2.0, reason="spill"), True),
    (("forward", 4, 128, "edges"), report("32x32w4s1", 2.0, reason="spill"), True),
    (("forward", 4, 512, "edges"), report("16x16w4s1", reason="shared memory"), True),
    (("forward", 4, 128, "edges"), report("64x16w4s1", 2.0), True),
    (("forward", 2, 512, "edges"), report("16x32w4s1", 2.0, reason="wrong tensor path"), True),
    # wide heads of float32 spill with every config and take long to compile
    (("forward", 4, 256, "edges"), report("32x32w8s1", 2.0, reason="spill"), False),
], ids=str)
def test_a_row_is_searched_if_its_known_configs_have_faults(key, known, search, monkeypatch):
    new = report("16x32w4s1" if key[1] == 4 else "64x32w8s2e1")
    # with TF32, tiles of 64 rows do not fit
    tf32 = [report(str(each.config), reason="shared memory" if each.config.block_m == 64 else "spill") for each in (new, known)]
    monkeypatch.setattr(config_table, "candidates", lambda *_: [new.config])
    workers = workers_of(known, new, tf32=tf32)
    row = RowBuilder(key, H200, workers).build({known.config}, search=False)
    assert row.filled.config == (new if search else known).config
    assert set(row.rejected) == ({str(known.config)} if search else set())
    assert len(set(map(str, workers.jobs))) == len(workers.jobs), "nothing is compiled twice"
    if not search:
        row = RowBuilder(key, H200, workers).build({known.config}, search=True)
        assert row.filled.config == new.config


@pytest.mark.usefixtures("modelled")
def test_hoppers_rows_with_edges_are_chosen_by_two_binaries():
    """Where lengths are whole tiles, another binary runs: both count, with their faults."""
    key, configs = ("forward", 2, 64, "edges"), ("64x64w4s2e1am", "64x64w4s3e1am", "64x64w4s2am", "64x64w4s3am")
    cycles = {"": (1.0, 2.0, 3.0, 4.0), "whole": (9.0, 3.0, 1.5, 0.5)}
    faults = dict(zip(configs, (None, None, None, "spill")))
    variants = {name: [report(text, time, reason=(name and faults[text]) or None) for text, time in zip(configs, times)]
                for name, times in cycles.items()}
    variants |= dict.fromkeys(("mapped", "lengths"), variants[""])
    row = choose(key, *variants.pop(""), **variants)
    # the mean times are 5, 2.5 and 2.25; the fourth config is the fastest, but its second binary spills
    assert (str(row.filled.config), row.filled.accepted_fault) == ("64x64w4s2am", "")
    assert row.rejected == {"64x64w4s3e1am": "slower", "64x64w4s2e1am": "slower", "64x64w4s3am": "spill"}
    only = choose(key, variants["mapped"][3], **variants)
    assert only.filled.accepted_fault == "spill: in a loop, with whole tiles"


@pytest.mark.usefixtures("modelled")
def test_configs_with_faults_on_other_problems_are_passed_over():
    key = ("forward", 2, 64, "edges")
    texts = ("64x64w4s2e1", "128x64w8s2e1", "64x32w4s2e1")

    def chosen(**faults):
        """The row where these configs (c0 to c2) have these faults with a map and with lengths."""
        variants = {name: [report(text, 1.0, None, *faults.get(f"c{i}", {}).get(name, ())) for i, text in enumerate(texts)]
                    for name in ("mapped", "lengths")}
        return choose(key, *(report(text, cycles) for text, cycles in zip(texts, (1.0, 2.0, 3.0))), **variants)

    spill, both = ("spill", "3 in the loop"), {"mapped": ("spill", "9"), "lengths": ("serialized",)}
    assert str(chosen().filled.config) == "64x64w4s2e1" and not chosen().filled.accepted_fault
    second = chosen(c0={"mapped": ("serialized",)})
    assert str(second.filled.config) == "128x64w8s2e1" and not second.filled.accepted_fault
    assert second.rejected == {"64x64w4s2e1": "serialized", "64x32w4s2e1": "slower"}
    least = chosen(c0=both, c1={"mapped": spill}, c2=both).filled
    assert (str(least.config), least.accepted_fault) == ("128x64w8s2e1", "spill: 3 in the loop, with a map")


def test_a_config_is_checked_on_other_problems_and_with_a_second_triton():
    key, config = ("forward", 2, 128, "pairs"), Config(128, 128, 8, 2, 1)
    usual, second = FakeWorkers(lambda _: GOOD), FakeWorkers(lambda _: spilling(LIGHT_SPILLS))
    assert RowBuilder(key, H200, usual, second).faults(config) == []
    assert [job[1].masked for job in usual.jobs] == [True, False, True] and len(second.jobs) == 4
    usual, second = FakeWorkers(lambda _: spilling(1)), FakeWorkers(lambda _: spilling(LIGHT_SPILLS + 1))
    faults = RowBuilder(key, H200, usual, second).faults(config)
    assert "spill: 1 in the loop, with a mask" in faults and "spill: 17 in the loop, by another Triton" in faults
    assert len(faults) == 7


def test_other_problems_use_the_same_row():
    for width, mask, count in ((128, "full", 0), (128, "edges", 1), (64, "edges", 2), (128, "window", 0), (128, "pairs", 3)):
        problems = config_table.other_problems(("forward", 2, width, mask))
        assert len(problems) == count and all(lookup.mask_class("forward", each) == mask for each in problems.values())
    for key in (("forward", 4, 64, "pairs"), ("forward", 2, 256, "pairs")):
        assert config_table.other_problems(key) == {}


@pytest.mark.usefixtures("modelled")
def test_a_float32_row_fits_with_tf32_and_records_the_larger_binary():
    key = ("forward", 4, 64, "edges")
    reports = [report("64x32w4s1", 1.0), report("32x32w4s1", 2.0), report("32x16w4s1", 3.0)]
    tf32 = [report("64x32w4s1", reason="shared memory"), report("32x32w4s1", reason="spill", shared_memory=5000)]
    workers = workers_of(*reports, tf32=tf32)
    row = RowBuilder(key, H200, workers).choose({each.config for each in reports})
    assert (str(row.filled.config), row.filled.shared_memory, row.filled.occupancy) == ("32x32w4s1", 5000, 1)
    assert row.underfilled == row.filled and row.rejected == {"64x32w4s1": "shared memory", "32x16w4s1": "slower"}
    assert [(job[2].block_m, job[4]) for job in workers.jobs[3:]] == [(64, "tf32"), (32, "tf32")], "each config once"
    assert choose(key, reports[0], tf32=tf32) is None


def test_example_problems_fill_the_gpu_or_half_of_it_and_belong_to_their_row():
    for key in config_table.row_keys_of(H200):
        for fill in shipped.FILLS:
            problem = config_table.example_problem(key, fill, H200)
            assert lookup.gpu_fill(key[0], problem, H200) == fill and next(lookup.row_keys(key[0], problem)) == key
            assert problem.d == key[2] and min(problem.dtype.itemsize, 4) == key[1]


def test_the_triton_of_another_python():
    assert config_table.triton_of(sys.executable) == triton.__version__
    with pytest.raises(ValueError, match="expected a Python with Triton"):
        config_table.triton_of("false")


BUILD = """
import json, pathlib, tempfile
from tritonattn import gpu
from tritonattn.configs import shipped
from perf import config_table
key, on = ("forward", 2, 64, "full"), gpu.KNOWN["sm_90"]
config_table.row_keys_of = lambda gpu: [key]
config_table.sensible = lambda key, config, gpu: str(config) in ("64x64w4s2e1m", "128x128w8s2e1m", "128x128w8s3e1m")
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    path = config_table.build(on, folder=folder, work=folder)
    table, config_table.RowBuilder = path.read_text(), None
    config_table.build(on, folder=folder, work=folder)
    row = shipped.read_table(path).rows[key]
    print(json.dumps([table == path.read_text(), str(row.filled.config), row.filled.registers,
                      sorted(row.rejected) + [str(row.underfilled.config)]]))
"""


@pytest.mark.slow
def test_a_build_is_repeatable_and_compiles_nothing_twice():
    same_table, filled, registers, others = compiled(BUILD, fresh=True)
    assert same_table and registers > 100
    assert {"64x64w4s2e1m", "128x128w8s2e1m", "128x128w8s3e1m"} <= {*others, filled}


# sweeps

@pytest.fixture
def swept(tmp_path):
    folder, setup = begun(tmp_path)
    sweep.resume(folder, setup, say=quiet)
    return runs.read(folder)


def test_a_table_takes_the_results_of_a_sweep(swept, tmp_path):
    old, = (table for table in shipped.shipped_tables() if table.name == "h200")
    new = shipped.read_table(config_table.build_from_sweeps(H200, [swept], tmp_path))
    entry = new.rows["forward", 2, 128, "full"].filled
    assert (str(entry.config), entry.source, entry.shared_memory) == ("64x128w4s2e1m", "measured", 65536)
    assert new.rows["dkdv", 2, 128, "edges"].filled.source == "measured"
    assert all(new.rows[key] == row for key, row in old.rows.items()
               if key not in (("forward", 2, 128, "full"), ("dkdv", 2, 128, "edges")))
    assert new.rows["forward", 2, 128, "full"].underfilled == old.rows["forward", 2, 128, "full"].underfilled


def test_a_synthetic_sweep_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="expected measured sweeps, got a synthetic one"):
        config_table.build_from_sweeps(H200, [corpus.made_up()], tmp_path)


@pytest.mark.parametrize("change", [{"gpu": {"arch": "sm_80"}}, {"gpu": {"sms": 114}}, {"gpu": {"memory": 80 << 30}},
                                    {"source": "0" * 12}], ids=str)
def test_a_sweep_of_another_gpu_or_of_other_kernels_is_rejected(change, swept, tmp_path):
    plan = swept.plan | change | {"gpu": swept.plan["gpu"] | change.get("gpu", {})}
    with pytest.raises(ValueError, match="expected a sweep of the GPU and the kernels of this table"):
        config_table.build_from_sweeps(H200, [dataclasses.replace(swept, plan=plan)], tmp_path)


def test_a_table_leaves_out_large_tiles_and_configs_timed_without_the_incumbent(swept, tmp_path):
    job = next(job for job in swept.jobs if job.kernel == "forward")
    good = swept.of(job)[job.incumbent]

    def scaled(config, samples, windows):
        return dataclasses.replace(good, config=config, samples=tuple(samples * seconds for seconds in good.samples),
                                   windows=tuple(windows * seconds for seconds in good.windows))

    alone = dataclasses.replace(good, config="128x32w4s2e1", samples=(1e-9,), beside=(), windows=(), windows_beside=())
    # the windows count
    trials = (good, scaled("256x64w8s2e1", 0.1, 0.1), alone, fast := scaled("32x64w4s2e1", 0.5, 0.8),
              scaled("64x32w4s2e1", 0.4, 0.9))
    small = dataclasses.replace(job, configs=tuple(trial.config for trial in trials))
    run = dataclasses.replace(swept, jobs=(small,), trials=trials)
    new = shipped.read_table(config_table.build_from_sweeps(H200, [run], tmp_path))
    assert str(new.rows[next(lookup.row_keys(job.kernel, job.problem))].filled.config) == fast.config


def test_the_fastest_is_so_over_all_problems():
    def group(*ratios):
        return [(ratio, {}) for ratio in ratios]

    a, b, c = Config(16, 16), Config(32, 32), Config(64, 64)
    assert config_table.fastest({a: group(1.0, 1.5, 1.5), b: group(1.2, 1.2, 1.2), c: group(1.0, 1.0)}) == b
    assert config_table.fastest({b: group(1.0), a: group(1.0)}) == a


# restamping and the command line

@pytest.fixture
def copied(tmp_path):
    """A copy of the H200's table that was made from other kernels, with few rows; and compilers that agree with it."""
    table, = (table for table in shipped.shipped_tables() if table.name == "h200")
    rows = {key: row for key, row in table.rows.items() if key[0] == "forward"}
    provenance = table.provenance | {"kernel_hash": "0" * 12, "triton": triton.__version__}
    shipped.write_table(dataclasses.replace(table, rows=rows, provenance=provenance), tmp_path)
    entries = [(key[2], key[3], entry) for key, row in rows.items() if key[1] == 2 for entry in (row.filled, row.underfilled)]

    def agree(job):
        entry = next(entry for width, mask, entry in entries if (width, mask, entry.config) == (
            job[1].d, lookup.mask_class("forward", job[1]), job[2]))
        return dataclasses.replace(GOOD, registers=entry.registers, shared_memory=entry.shared_memory)

    return tmp_path, agree


def test_a_restamped_table_changes_its_kernel_hash_alone(copied):
    folder, agree = copied
    old, workers = shipped.read_table(folder / "h200.json"), FakeWorkers(agree)
    new = shipped.read_table(config_table.restamp(H200, workers, folder))
    assert new.provenance == old.provenance | {"kernel_hash": kernel_hash()} and new.rows == old.rows
    assert {(job[1].d, job[1].dtype) for job in workers.jobs} == {(64, torch.bfloat16), (128, torch.bfloat16)}
    assert len(workers.jobs) == 2 * sum(key[1] == 2 and key[2] in (64, 128) for key in old.rows)


@pytest.mark.parametrize("binary", [lambda good: dataclasses.replace(good, registers=good.registers + 1),
                                    lambda good: dataclasses.replace(good, shared_memory=good.shared_memory + 16),
                                    lambda good: dataclasses.replace(good, tensor_memory=64),
                                    lambda good: Failure("compile error", "refused")])
def test_a_table_is_not_restamped_if_one_binary_differs(binary, copied):
    folder, agree = copied
    text = (folder / "h200.json").read_text()

    def differ(job):
        return binary(agree(job)) if job[1].d == 128 else agree(job)

    with pytest.raises(ValueError, match="compiles to another binary"):
        config_table.restamp(H200, FakeWorkers(differ), folder)
    assert (folder / "h200.json").read_text() == text


def test_an_updated_table_has_the_figures_of_its_checked_rows_alone(copied, monkeypatch):
    folder, agree = copied
    old = shipped.read_table(folder / "h200.json")
    narrow, faulty = ("forward", 2, 64, "full"), ("forward", 2, 128, "full")

    def check_report(report):
        reason = "spill" if report.problem.d == 128 and not report.problem.window[1] == 0 and report.config in bad else None
        return prune.Verdict(report.config, reason, "", report, types.SimpleNamespace(bound="tensor"))

    bad = {old.rows[faulty].filled.config}
    monkeypatch.setattr(config_table, "check_report", check_report)
    monkeypatch.setattr(RowBuilder, "build", lambda self, configs, search: ("searched", self.key, configs, search))
    written = []
    monkeypatch.setattr(config_table, "write_table", lambda table, folder: written.append(table))
    config_table.restamp(H200, FakeWorkers(lambda job: dataclasses.replace(
        agree(job), problem=job[1], config=job[2], registers=agree(job).registers + 1)), folder, update=True)
    new, = written
    assert new.provenance["kernel_hash"] == kernel_hash() and "second_triton" not in new.provenance
    assert new.rows[narrow].filled.registers == old.rows[narrow].filled.registers + 1
    assert new.rows["forward", 2, 96, "full"].filled.registers is None
    assert new.rows[faulty] == ("searched", faulty, bad | {old.rows[faulty].underfilled.config}, True)


def test_a_table_is_not_restamped_with_another_version_of_triton(copied, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"made with Triton .*, got 9\.9\.9"):
        config_table.restamp(H200, FakeWorkers(None), copied[0])


def test_the_command_line(monkeypatch, capsys):
    calls = []
    for name in ("build", "build_from_sweeps", "restamp"):
        monkeypatch.setattr(config_table, name, lambda on, *arguments, name=name, **options: calls.append(
            (name, on.name, *arguments, *options.values())))
    monkeypatch.setattr(runs, "read", lambda folder: folder.name)
    assert config_table.main(["h200", "a100", "--like", "l40s", "--also", "python3"]) == 0
    assert calls == [("build", name, gpu.named("l40s"), "python3", None) for name in ("H200", "A100")]
    assert config_table.main(["h200", "--from-sweeps", "a", "b"]) == 0
    assert calls[2] == ("build_from_sweeps", "H200", ["a", "b"])
    assert config_table.main(["h200", "--restamp"]) == 0 and calls[3][:2] == ("restamp", "H200") and calls[3][-1] is False
    assert config_table.main(["h200", "--search", "dq/128/full"]) == 0 and calls[4][-1] == ["dq/128/full"]
    monkeypatch.undo()
    monkeypatch.setattr(config_table, "restamp", lambda *_, **__: (_ for _ in ()).throw(ValueError("another binary")))
    for wrong, message in ((["gtx"], "H200"), ([], "GPU"), (["h200", "--restamp", "--like", "a100"], "not allowed"),
                           (["h200", "--update"], "--restamp"),
                           (["h200", "--restamp"], "another binary"), (["h200", "--from-sweeps", "nowhere"], "nowhere")):
        with pytest.raises(SystemExit, match="2"):
            config_table.main(wrong)
        assert message in capsys.readouterr().err
