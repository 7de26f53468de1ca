"""Tuning from end to end on a virtual GPU: real candidates and keys, made-up binaries and times."""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import threading

import pytest
import torch

import tritonattn
from tests.autotune.test_prune import GOOD, LOOP
from tests.helpers.fake_bench import FakeBench, bench_of
from tritonattn import Config, Problem, config, gpu
from tritonattn.autotune import first_call, prune
from tritonattn.autotune import tune as tuning
from tritonattn.autotune.search import STRATEGIES, Budget
from tritonattn.autotune.trials import Job
from tritonattn.autotune.tune import TuningSetup
from tritonattn.autotune.worker_pool import Failure
from tritonattn.configs import lookup, shipped, user_cache
from tritonattn.configs.key import key_of
from tritonattn.configs.user_cache import Cache
from tritonattn.gpu import KNOWN

H200 = KNOWN["sm_90"]
PROBLEM = Problem((4,), 32, 32, 4096, 4096, 128, 128, torch.bfloat16)


class Compilers:
    """A worker_pool.Workers that returns a made-up report for each job: good, spilling, or a Failure."""

    def __init__(self, spilling=(), refused=()):
        self.spilling, self.refused, self.jobs = spilling, refused, []

    def map(self, jobs):
        for job in jobs:
            self.jobs.append(job)
            refused, spilling = (str(job[2]) in names for names in (self.refused, self.spilling))
            yield Failure("compile error", "no") if refused else made(*job[:4], spilling)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def made(kernel, problem, chosen, on, spills=False):
    """Return a report with as many dots and exponentials as the tile needs."""
    products = problem.d * chosen.block_m * chosen.block_n * 4 // (2 * 64 * 128 * 16) // max(1, chosen.num_warps // 4)
    exponentials = chosen.block_m * chosen.block_n // (32 * chosen.num_warps)
    sums = chosen.mma_sum * chosen.block_m * chosen.block_n * 8 // (16 * 8 * 16 * chosen.num_warps)
    instructions = (("HGMMA.64x128x16",) * products + ("HMMA.16816",) * sums + ("MUFU.EX2",) * exponentials
                    + ("STL",) * spills)
    loop = dataclasses.replace(LOOP, instructions=instructions)
    return dataclasses.replace(GOOD, kernel=kernel, problem=problem, config=chosen, gpu=on, loops=(loop,), shared_memory=65536)


class Surface(dict):
    """A time for every config, the shortest for `best`."""

    def __init__(self, best):
        self.best = Config.parse(best)

    def __missing__(self, name):
        at = Config.parse(name)
        pairs = ((at.block_m, self.best.block_m), (at.block_n, self.best.block_n), (at.num_warps, self.best.num_warps),
                 (at.num_stages, self.best.num_stages))
        return 1e-3 * (1 + 0.2 * (sum(abs(math.log2(x / y)) for x, y in pairs) + (at.ahead != self.best.ahead)))


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path))
    lookup.clear_lookup_cache()
    bench = bench_of(FakeBench(Surface("64x128w4s2e1m"), jitter=0.003))
    yield TuningSetup(H200, bench, Compilers(), user_cache.current_cache())
    lookup.clear_lookup_cache()


def test_the_best_config_is_stored_and_used_by_the_next_call(setup, tmp_path):
    before = lookup.lookup_config("forward", PROBLEM, H200)
    assert before.origin == "table"
    record = tuning.tune_kernel("forward", PROBLEM, setup)
    assert str(record.config) == "64x128w4s2e1m" and record.default == before.config
    slowdown = Surface("64x128w4s2e1m")[str(record.default)] / 1e-3
    assert record.default_seconds / record.seconds == pytest.approx(slowdown, rel=0.02)
    assert record.check == {"o": [1e-3, 2e-3]} and record.static["shared_memory"] == 65536
    assert record.run["strategy"] == "halving" and record.run["trials"] > 20
    found = lookup.lookup_config("forward", PROBLEM, H200)
    assert found.origin == "cache" and found.config == record.config and found.record == record
    alike = dataclasses.replace(PROBLEM, n_q=3968, n_k=3968, batch=(5,))
    assert lookup.lookup_config("forward", alike, H200).origin == "cache", "the same key"
    for other in ({"d": 64, "dv": 64}, {"window": (None, 0)}, {"dtype": torch.float16}, {"masked": True}):
        changed = dataclasses.replace(PROBLEM, **other)
        assert lookup.lookup_config("forward", changed, H200).origin == "table", "only the exact key matches"
    assert lookup.lookup_config("dq", PROBLEM, H200).origin == "table"
    model = gpu.named("h100")
    assert lookup.lookup_config("forward", PROBLEM, model).origin == "architecture", "another GPU model of this architecture"
    user_cache.cache_at.cache_clear()
    lookup.clear_lookup_cache()
    assert lookup.lookup_config("forward", PROBLEM, H200).origin == "cache", "from the file"


def test_explain_shows_the_tuned_config(setup):
    from tritonattn.analysis import explain

    tuning.tune_kernel("forward", PROBLEM, setup)
    found = explain.explain_problem(PROBLEM, H200)
    assert found.lines[0].origin == "cache" and found.as_json()["kernels"][0]["record"]["config"] == "64x128w4s2e1m"
    for words in ("forward    64x128w4s2e1m   tuned on this machine (user cache)", "measured: 10",
                  "the median of 4 windows of continuous load; ",
                  "the config without tuning, took 19", "by halving on 20", "bound by", "65536 bytes of shared memory",
                  f"slower: {found.lines[0].record.default}"):
        assert words in str(found), str(found)


def test_excluded_configs_are_not_timed(setup):
    setup.compilers = Compilers(spilling=["64x128w4s2e1m"], refused=["64x128w4s3e1"])
    bench = FakeBench(Surface("64x128w4s2e1m"))
    setup.bench = bench_of(bench)
    record = tuning.tune_kernel("forward", PROBLEM, setup)
    assert str(record.config) not in ("64x128w4s2e1m", "64x128w4s3e1")
    assert not {"64x128w4s2e1m", "64x128w4s3e1"} & {*bench.timed, *bench.checked}


def test_a_wrong_candidate_never_wins(setup):
    setup.bench = bench_of(FakeBench(Surface("64x128w4s2e1m"), wrong=["64x128w4s2e1m"]))
    assert tuning.tune_kernel("forward", PROBLEM, setup).config != Config.parse("64x128w4s2e1m")


def test_nothing_is_stored_if_nothing_can_be_timed(setup):
    class Broken(FakeBench):
        def check(self, name):
            return Failure("launch error", "no")

    setup.bench = bench_of(Broken(Surface("64x128w4s2e1m")))
    assert tuning.tune_kernel("forward", PROBLEM, setup) is None
    assert list(user_cache.current_cache().records()) == [] and lookup.lookup_config("forward", PROBLEM, H200).origin == "table"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_stores_a_config_that_fits(setup, strategy):
    record = tuning.tune_kernel("dkdv", PROBLEM, setup, strategy, Budget(trials=12))
    assert record.static["shared_memory"] <= H200.shared_memory and record.run["strategy"] == strategy


def test_strategy_table_has_few_configs_from_the_tables():
    for kernel in ("forward", "dq", "dkdv"):
        found = tuning.candidate_configs(kernel, PROBLEM, H200)
        table, = (each for each in shipped.shipped_tables() if each.name == "h200")
        known = {str(getattr(row, fill).config) for row in table.rows.values() for fill in shipped.FILLS}
        assert found[0] == str(lookup.lookup_config(kernel, PROBLEM, H200).config) and len(found) <= 8 and set(found) <= known


def test_equal_keys_are_tuned_once(setup, capsys):
    alike = dataclasses.replace(PROBLEM, batch=(8,))
    kernels = tuning.kernels_of(PROBLEM)
    assert kernels == ("forward", "dq", "dkdv") and tuning.kernels_of(PROBLEM, False) == ("forward",)
    assert tuning.kernels_of(dataclasses.replace(PROBLEM, bias=torch.float32))[-1] == "dbias"
    found, missed = tuning.tune_all([(PROBLEM, kernels), (alike, kernels)], setup, "static")
    assert not missed and [record.key.split()[0] for record in found] == list(kernels)
    assert "times as fast as" in capsys.readouterr().out


def test_a_new_candidate_is_timed_against_the_earlier_best_only(setup, monkeypatch):
    new, every = Config.parse("64x128w4s2e1m"), tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *arguments: [each for each in every(*arguments) if each != new])
    first = tuning.tune_kernel("forward", PROBLEM, setup)
    bench = FakeBench(Surface(str(new)))
    setup.bench = bench_of(bench)
    assert tuning.tune_kernel("forward", PROBLEM, setup) == first and not bench.timed, "nothing new"
    monkeypatch.setattr(tuning, "candidates", every)
    second = tuning.tune_kernel("forward", PROBLEM, setup)
    assert set(bench.timed) == {str(new), str(first.config)} and second.config == new and second.default == first.config
    assert set(second.run["tried"]) == {*first.run["tried"], str(new)}
    tuning.tune_kernel("forward", PROBLEM, setup, again=True)
    assert len(set(bench.timed)) > 20


def test_a_record_says_at_which_clock_its_config_won(setup, capsys):
    class Warm(FakeBench):
        """The winner needs twice the power that the GPU may use, the others half of it."""

        def watts_of(self, name):
            return 2.0 if name == "64x128w4s2e1m" else 0.5

    setup.bench = bench_of(Warm(Surface("64x128w4s2e1m"), watts=True))
    tuning.tune_all([(PROBLEM, ("forward",))], setup)
    (_, record), = setup.store.records()
    assert str(record.config) != "64x128w4s2e1m" and record.sustained and record.samples == 4 and record.clock == 1980.0
    assert " us at 1980 MHz, " in capsys.readouterr().out
    setup.bench = bench_of(FakeBench(Surface("64x128w4s2e1m")))
    record = tuning.tune_kernel("dq", PROBLEM, setup, "table")
    assert not record.sustained and record.clock is None and record.samples == 10
    record = tuning.tune_kernel("dkdv", PROBLEM, setup)
    assert record.sustained and record.clock is None, "no sensors"


# --- several problems together

LONG = dataclasses.replace(PROBLEM, n_q=16384, n_k=16384)
CAUSAL = dataclasses.replace(PROBLEM, window=(None, 0))


class Scaled(dict):
    """The times of a surface, multiplied."""

    def __init__(self, best, factor):
        self.surface, self.factor = Surface(best), factor

    def __missing__(self, name):
        return self.factor * self.surface[name]


def benches_of(setup, **surfaces):
    """Give every problem a bench of its own, by the name of its mask or its length."""
    benches = {name: FakeBench(surface) for name, surface in surfaces.items()}
    setup.bench = lambda kernel, problem: contextlib.nullcontext(benches["long" if problem.n_q > 4096 else problem.mask])
    return benches


def test_problems_together_get_the_config_with_the_least_time_in_all(setup, capsys):
    benches_of(setup, full=Surface("64x128w4s2e1m"), long=Scaled("128x64w8s3e1m", 16))
    records, failed = tuning.tune_all([(PROBLEM, ("forward",)), (LONG, ("forward",))], setup, together=True)
    # the long problem decides
    assert not failed and [str(record.config) for record in records] == ["128x64w8s3e1m"] * 2
    assert [record.key for record in records] == [key_of("forward", each, H200) for each in (PROBLEM, LONG)]
    # each record has the times of its own problem
    assert records[0].seconds == pytest.approx(Surface("64x128w4s2e1m")["128x64w8s3e1m"]) and records[0].sustained
    assert records[1].seconds == pytest.approx(16e-3) and records[1].default_seconds >= records[1].seconds
    assert records[0].run["together"] == sorted(record.key for record in records)
    assert "forward  4x32x4096x128 bfloat16 full and 1 more: 128x64w8s3e1m, 1" in capsys.readouterr().out
    for problem in (PROBLEM, LONG):
        assert lookup.lookup_config("forward", problem, H200).config == Config.parse("128x64w8s3e1m")


def test_calls_are_weights(setup):
    benches_of(setup, full=Surface("64x128w4s2e1m"), long=Scaled("128x64w8s3e1m", 16))
    problems = [(PROBLEM, {"forward": 160}), (LONG, {"forward": 1})]
    records, _ = tuning.tune_all(problems, setup, together=True)
    assert [str(record.config) for record in records] == ["64x128w4s2e1m"] * 2
    assert records[0].seconds == pytest.approx(1e-3), "of one call"
    setup.store.clear()
    lookup.clear_lookup_cache()
    again = [(PROBLEM, ("forward",))] * 160 + [(LONG, ("forward",))]
    assert tuning.tune_all(again, setup, together=True)[0][0].config == records[0].config


def test_kernels_are_shared_by_the_problems_that_have_them(setup):
    biased = dataclasses.replace(PROBLEM, bias=torch.float32)
    problems = [(each, tuning.kernels_of(each)) for each in (CAUSAL, biased)]
    records, failed = tuning.tune_all(problems, setup, "table", together=True)
    kernels = [record.key.split()[0] for record in records]
    assert not failed and kernels == ["forward", "forward", "dq", "dq", "dkdv", "dkdv", "dbias"]
    assert len({(record.key.split()[0], str(record.config)) for record in records}) == 4


def test_other_groups_of_problems_are_tuned_anew(setup):
    bench = FakeBench(Surface("64x128w4s2e1m"))
    setup.bench = bench_of(bench)
    alone = tuning.tune_kernel("forward", PROBLEM, setup)
    bench.timed.clear()
    together = tuning.tune_together("forward", {PROBLEM: 1, CAUSAL: 1}, setup)
    assert len(set(bench.timed)) > 20 and together[0].run["together"] and not alone.run["together"]
    bench.timed.clear()
    assert tuning.tune_together("forward", {CAUSAL: 1, PROBLEM: 1}, setup) == together[::-1] and not bench.timed, "nothing new"
    again = tuning.tune_together("forward", {CAUSAL: 1, PROBLEM: 2}, setup)
    assert len(set(bench.timed)) > 20, "other weights may have another winner"
    bench.timed.clear()
    assert tuning.tune_together("forward", {CAUSAL: 1, PROBLEM: 2}, setup) == again and not bench.timed
    tuning.tune_kernel("forward", PROBLEM, setup)
    assert len(set(bench.timed)) > 20


def test_all_records_of_a_group_are_stored_or_none(setup, monkeypatch):
    real = tuning.record_of

    def record_of(key, problem, *arguments):
        if problem == CAUSAL:
            raise RuntimeError("did not compile again")
        return real(key, problem, *arguments)

    monkeypatch.setattr(tuning, "record_of", record_of)
    with pytest.raises(RuntimeError, match="did not compile again"):
        tuning.tune_together("forward", {PROBLEM: 1, CAUSAL: 1}, setup)
    assert list(setup.store.records()) == []


def test_a_config_that_one_problem_excludes_is_no_candidate(setup):
    class Particular(Compilers):
        """Compiles the best config for full masks only."""

        def map(self, jobs):
            for kernel, problem, chosen, on, _ in jobs:
                refused = str(chosen) == "64x128w4s2e1m" and problem.mask == "causal"
                yield Failure("compile error", "no") if refused else made(kernel, problem, chosen, on)

    setup.compilers = Particular()
    bench = FakeBench(Surface("64x128w4s2e1m"))
    setup.bench = bench_of(bench)
    found = tuning.tune_together("forward", {PROBLEM: 1, CAUSAL: 1}, setup)
    assert len(found) == 2 and "64x128w4s2e1m" not in bench.checked


@pytest.mark.parametrize("incumbents, expected", [
    (("64x128w4s2", "64x64w4s2"), "64x64w4s2"), (("64x128w4s2", "64x128w4s2"), "128x64w8s2"),
    (("64x64w4s2", "64x128w4s2"), "64x64w4s2")], ids=["the first's is excluded", "all are", "the second's is"])
def test_an_incumbent_that_another_problem_excludes_is_neither_timed_nor_stored(setup, monkeypatch, incumbents, expected):
    names, racy = ("128x64w8s2", "64x64w4s2", "64x128w4s2"), "64x128w4s2"

    def job_of(kernel, problem, *_):
        verdicts = {name: prune.Verdict(Config.parse(name), "race" if name == racy and problem == CAUSAL else None)
                    for name in names}
        return Job(kernel, problem, names, incumbents[problem == CAUSAL]), verdicts

    monkeypatch.setattr(tuning, "job_of", job_of)
    job, _, _ = tuning.joint_job("forward", [PROBLEM, CAUSAL], setup, "halving")
    assert job.incumbent == expected and racy not in job.configs
    bench = FakeBench(Surface(racy))  # it would win
    setup.bench = bench_of(bench)
    records = tuning.tune_together("forward", {PROBLEM: 1, CAUSAL: 1}, setup)
    assert racy not in bench.checked and len(records) == 2 and Config.parse(racy) not in {each.config for each in records}
    # alone, the config that calls use is timed whatever its verdict
    job, _, _ = tuning.joint_job("forward", [CAUSAL], setup, "halving")
    assert job.incumbent == incumbents[1]


def test_without_a_common_config_the_error_says_so(setup, monkeypatch, capsys):
    def job_of(kernel, problem, *_):
        names = ("64x64w4s2", "64x32w4s2")[::1 if problem == PROBLEM else -1]
        verdict = prune.Verdict(Config.parse(names[1]), "spill")
        return Job(kernel, problem, names, names[0]), {names[1]: verdict}

    monkeypatch.setattr(tuning, "job_of", job_of)
    assert tuning.tune_all([(PROBLEM, ("forward",)), (CAUSAL, ("forward",))], setup, together=True) == ([], 1)
    assert ("not tuned: tune: expected a config of forward that suits all of 2 problems, but each is excluded for one of them"
            in capsys.readouterr().out)


@pytest.mark.parametrize("together, words", [
    ([], r"together: expected a list of at least one call \(q, k, v, options\), got \[\]"),
    ({}, "together: expected a list of at least one call"), (3, "got 3"),
    ([(1, 2, 3)], r"together\[0\]: expected \(q, k, v, options\) with a dict of options, got \['int', 'int', 'int'\]"),
    ([(1, 2, 3, True)], "with a dict of options, got .*'bool'"), (["q"], r"together\[0\]: .* got str"),
])
def test_invalid_calls_together_raise(together, words):
    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(ValueError, match=words):
        tritonattn.tune(q, q, q, together=together)


def test_calls_together_are_checked_like_calls_of_attention():
    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(RuntimeError, match="k: expected the head size of q"):
        tritonattn.tune(q, q, q, together=[(q, q[..., :3], q, {})])
    with pytest.raises(TypeError, match="strategy"):
        tritonattn.tune(q, q, q, together=[(q, q, q, {"strategy": "table"})])
    half = q.half()
    problems = tuning.problems_together([(half, half, half, {"causal": True}), (q, q, q, {})], q.device)
    assert [problem.mask for problem in problems] == ["causal", "full"] and tuning.problems_together(None, q.device) == []
    with pytest.raises(ValueError, match=r"together\[0\]: expected tensors on cuda:1 like the first call's, got cpu"):
        tuning.problems_together([(q, q, q, {})], torch.device("cuda:1"))
    with pytest.raises(RuntimeError, match="tune needs a GPU"):
        tritonattn.tune(q, q, q, together=[(q, q, q, {})])


def test_a_record_of_another_triton_is_not_used(setup):
    record = tuning.tune_kernel("forward", PROBLEM, setup)
    user_cache.current_cache().clear()
    setup.store.put(dataclasses.replace(record, versions=record.versions | {"triton": "2.0.0"}))
    lookup.clear_lookup_cache()
    assert lookup.lookup_config("forward", PROBLEM, H200).origin == "table"


def test_invalid_arguments_of_tune_raise():
    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(ValueError, match="strategy: expected one of halving.*got 'fast'"):
        tritonattn.tune(q, q, q, strategy="fast")
    with pytest.raises(RuntimeError, match="tune needs a GPU, but (kernels are interpreted|torch finds no GPU)"):
        tritonattn.tune(q, q, q)
    with pytest.raises(ValueError, match="trials: expected a positive integer or None, got 0"):
        tritonattn.tune(q, q, q, trials=0)
    with pytest.raises(ValueError, match="seconds: expected a positive number, got nan"):
        tritonattn.tune(q, q, q, seconds=float("nan"))
    with pytest.raises(RuntimeError, match="k: expected the head size of q"):
        tritonattn.tune(q, q[..., :3], q)


# --- at the first call


@pytest.fixture
def timed(monkeypatch):
    """Disable deterministic algorithms, which all tests enable, and under which nothing is timed."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


class Tuned:
    def __init__(self):
        self.jobs = []

    def __call__(self, kernel, problem, on):
        assert on == H200
        self.jobs.append((kernel, problem))


def test_a_cold_key_is_tuned_once_by_one_of_eight_threads(setup, timed):
    tuned = Tuned()
    with lookup.observed(first_call.FirstCallTuner(tuned)):
        def often():
            for _ in range(20):
                lookup.get_config("forward", PROBLEM, H200)

        threads = [threading.Thread(target=often) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for kernel in lookup.UNTUNED:
            lookup.get_config(kernel, PROBLEM, H200)
        lookup.get_config("dq", PROBLEM, H200)
    assert tuned.jobs == [("forward", PROBLEM), ("dq", PROBLEM)]


def test_calls_made_while_tuning_are_not_tuned(setup, timed):
    inside = []

    def tune(kernel, problem, on):
        inside.append(lookup.get_config("dq", problem, H200))
        thread = threading.Thread(target=lambda: inside.append(lookup.get_config("dkdv", problem, H200)))
        thread.start()
        thread.join()

    watch, tuned = first_call.FirstCallTuner(tune), Tuned()
    with lookup.observed(watch):
        lookup.get_config("forward", PROBLEM, H200)
        assert len(inside) == 2
        watch._tune = tuned
        lookup.get_config("dq", PROBLEM, H200)
    assert tuned.jobs == [("dq", PROBLEM)], "they are tuned later"


@pytest.mark.parametrize("how", ["capture", "deterministic", "ranks", "interpreter", "pinned", "tuned before"])
def test_nothing_is_timed_where_it_must_not_be(setup, timed, how, monkeypatch):
    tuned, on = Tuned(), H200
    if how == "capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if how == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if how == "ranks":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    if how == "interpreter":
        on = gpu.INTERPRETER
    if how == "tuned before":
        tuning.tune_kernel("forward", PROBLEM, setup)
    with lookup.observed(first_call.FirstCallTuner(tuned)), config.pinned(*([Config(64, 64)] if how == "pinned" else [])):
        lookup.get_config("forward", PROBLEM, on)
    assert tuned.jobs == []


def test_an_error_of_tuning_is_a_warning(setup, timed):
    def tune(kernel, problem, on):
        raise torch.OutOfMemoryError("no room")

    with lookup.observed(first_call.FirstCallTuner(tune)):
        with pytest.warns(UserWarning, match="TRITONATTN_AUTOTUNE: forward of .* was not tuned: OutOfMemoryError: no room"):
            first = lookup.get_config("forward", PROBLEM, H200)
        assert lookup.get_config("forward", PROBLEM, H200) == first, "it is not tried again"


def test_the_variable_must_be_quick():
    before = list(lookup.observers)
    first_call.install({})
    first_call.install({"TRITONATTN_AUTOTUNE": "off"})
    assert lookup.observers == before
    with pytest.warns(UserWarning, match="TRITONATTN_AUTOTUNE: expected quick or off, got 'always'"):
        first_call.install({"TRITONATTN_AUTOTUNE": "always"})
    first_call.install({"TRITONATTN_AUTOTUNE": "quick"})
    assert isinstance(lookup.observers.pop(), first_call.FirstCallTuner) and lookup.observers == before


# --- several processes


def _rank(rank, size, folder, port, out):
    os.environ |= {"TRITONATTN_CACHE_DIR": f"{folder}/{rank}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    # alone, each rank would choose another
    best = ("64x128w4s2e1m", "128x32w8s3e1")[rank]
    setup = TuningSetup(H200, bench_of(FakeBench(Surface(best))), Compilers(), user_cache.current_cache())
    found = tuning.on_rank0(lambda: tuning.tune_all([(PROBLEM, ("forward",))], setup, say=lambda *_, **__: None)[0], setup)
    out.put((rank, [str(record.config) for record in found], str(lookup.lookup_config("forward", PROBLEM, H200).config)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_get_the_configs_of_rank_0(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, 2, tmp_path, port, out)) for rank in range(2)]
    [each.start() for each in ranks]
    found = sorted(out.get(timeout=240) for _ in ranks)
    [each.join() for each in ranks]
    assert found == [(rank, ["64x128w4s2e1m"], "64x128w4s2e1m") for rank in range(2)]


def test_an_error_in_one_kernel_does_not_stop_the_others(setup, capsys):
    real = setup.bench

    def bench(kernel, problem):
        if kernel == "dq":
            raise RuntimeError("bench: expected room")
        return real(kernel, problem)

    setup.bench = bench
    found, missed = tuning.tune_all([(PROBLEM, ("forward", "dq", "dkdv"))], setup, "static")
    assert missed == 1 and [record.key.split()[0] for record in found] == ["forward", "dkdv"]
    assert "not tuned: bench: expected room" in capsys.readouterr().out


@pytest.fixture
def tf32():
    """A function that enables TF32 until the end of the test."""
    before = torch.get_float32_matmul_precision()
    yield lambda: torch.set_float32_matmul_precision("high")
    torch.set_float32_matmul_precision(before)


def test_tf32_is_not_tuned_and_has_keys_of_its_own(setup, tf32):
    problem = dataclasses.replace(PROBLEM, dtype=torch.float32, d=64, dv=64)
    tuning.tune_kernel("forward", problem, setup, "table")
    assert lookup.lookup_config("forward", problem, H200).origin == "cache"
    tf32()
    lookup.clear_lookup_cache()
    assert "tf32" in key_of("forward", problem, H200) and "tf32" not in key_of("forward", PROBLEM, H200)
    assert lookup.lookup_config("forward", problem, H200).origin == "table"
    with pytest.raises(ValueError, match="tune: float32 dots use TF32"):
        tuning.tune_kernel("forward", problem, setup)


def test_first_call_needs_the_tensors_on_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "gpu_of", lambda device: gpu.named("h100"))
    with pytest.raises(RuntimeError, match="the tensors are on another GPU than the current device, cuda:0"):
        first_call.tune_from_tables("forward", PROBLEM, H200)


def test_a_single_process_sends_nothing(setup):
    assert tuning.on_rank0(lambda: ["mine"], setup) == ["mine"]


def test_the_record_has_the_key_of_its_problem(setup):
    record = tuning.tune_kernel("forward", PROBLEM, setup, "table")
    assert record.key == key_of("forward", PROBLEM, H200) and isinstance(setup.store, Cache)
    assert record.static["shared_memory"] == 65536, "configs of the tables are compiled for it"
