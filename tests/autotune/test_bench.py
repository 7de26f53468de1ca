"""The bench on interpreted kernels: correct configs pass, wrong kernels do not; and in a child process."""

import dataclasses
import functools
import itertools
import os
import pickle
import threading
import time
from concurrent.futures import Future

import pytest
import torch

from tests.helpers import score_functions
from tests.helpers.compile_server import compiled
from tests.helpers.score_functions import Both
from tests.helpers.tiers import slow, slow_rows
from tritonattn import Config, Problem, ScoreFunction, attention, gpu
from tritonattn.autotune import bench as benches
from tritonattn.autotune import search
from tritonattn.autotune.bench import Bench, IsolatedBench, JointBench, hard_inputs, results_of
from tritonattn.autotune.worker_pool import Failure, Workers
from tritonattn.measure.timing import TimedError, Windows
from tritonattn.problem import UserFunction
from tritonattn.runtime import launch
from tritonattn.score_function import register

TINY = Problem((1,), 2, 1, 48, 48, 16, 16, torch.float16)
CAUSAL = Problem((1,), 2, 1, 48, 48, 16, 16, torch.float32, (None, 0))


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, problem", [("forward", CAUSAL), *slow_rows(("dkdv", TINY))], ids=["forward", "dkdv"])
def test_a_correct_config_passes_and_is_timed(kernel, problem, device):
    announced = []
    bench = Bench(kernel, problem, device, announce=announced.append)
    errors = bench.check("32x64w4s2")
    assert set(errors) == set(benches.OUTPUTS[kernel]) and not announced
    assert all(0 < error <= allowed for error, allowed in errors.values())
    results = bench.times(["32x64w4s2", "64x64w4s2"], 3)
    assert all(len(samples) == 3 and min(samples) > 0 for samples in results.values())
    assert all(announced.count(config) > 3 for config in ("32x64w4s2", "64x64w4s2"))


TORN = itertools.cycle((0.0, 2e-3))


@pytest.mark.interpreted
@pytest.mark.parametrize("fault, reason", [
    (lambda o: o.mul_(1.01), "incorrect"), (lambda o: o[..., -1, :].fill_(torch.nan), "incorrect"),
    (lambda o: o.view(-1)[:1].add_(next(TORN)), "not repeatable"),
], ids=["scaled", "nan", "torn"])
def test_a_wrong_kernel_does_not_pass(fault, reason, device, monkeypatch):
    real = launch.run

    def run(call, on):
        real(call, on)
        if call.config == Config(32, 64):
            fault(call.arguments[2].o.ptr)

    monkeypatch.setattr(launch, "run", run)
    bench = Bench("forward", TINY, device)
    assert bench.check("32x64w4s2").code == reason and set(bench.check("64x64w4s2")) == {"o", "lse"}


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_variants_are_checked_against_the_definition(kernel, device, monkeypatch):
    variants = "softcap", "sink", "alibi", "relative", "entropy", "key_mass"
    problem = dataclasses.replace(TINY, **dict.fromkeys(variants, True))
    tensors = {"forward": {"o", "lse", "entropy", "key_mass"}, "dkdv": {"dk", "dv"}}
    assert set(Bench(kernel, problem, device).check("32x64w4s2")) == tensors[kernel]
    bench = Bench(kernel, problem, device)
    # the kernel gets another one than the definition
    monkeypatch.setattr(benches, "options_of_reference", lambda options, tensors: options | {"softcap": 5.0})
    assert bench.check("32x64w4s2").code == "incorrect"


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, tensors", [("forward", {"o"}), ("dq", {"dq"}), ("dkdv", {"dk", "dv"}), ("dbias", {"dbias"})])
@pytest.mark.parametrize("normalizer", ["sigmoid", "relu"])
def test_other_normalizers_are_checked_against_the_definition(normalizer, kernel, tensors, device, monkeypatch):
    problem = dataclasses.replace(TINY, normalizer=normalizer, bias=torch.float32 if kernel == "dbias" else None)
    assert set(Bench(kernel, problem, device).check("32x64w4s2")) == tensors
    monkeypatch.setattr(benches, "options_of_reference", lambda options, tensors: options | {"normalizer": "softmax"})
    assert Bench(kernel, problem, device).check("32x64w4s2").code == "incorrect"


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, tensors", [("forward", {"o", "lse"}), ("dq", {"dq"}), ("dkdv", {"dk", "dv"})])
def test_score_functions_are_checked_against_the_definition(kernel, tensors, device, monkeypatch):
    problem = dataclasses.replace(TINY, score_function=UserFunction(Both("squares").of(attention).name))
    assert set(Bench(kernel, problem, device).check("32x64w4s2")) == tensors
    monkeypatch.setattr(benches, "options_of_reference", lambda options, tensors: options | {"score_function": None})
    assert Bench(kernel, problem, device).check("32x64w4s2").code == "incorrect"


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, tensors", [("forward", {"o", "lse"}), ("dkdv", {"dk", "dv"})])
def test_mask_functions_are_checked_against_the_definition(kernel, tensors, device, monkeypatch):
    """The function depends on the batch and the head."""
    function = UserFunction(register(score_functions.stripes))
    problem = dataclasses.replace(TINY, batch=(2,), masked=True, mapped=True, mask_function=function)
    assert set(Bench(kernel, problem, device).check("32x64w4s2")) == tensors
    monkeypatch.setattr(benches, "dense_mask", lambda mask: torch.ones(mask.shape, dtype=torch.bool, device=device))
    assert Bench(kernel, problem, device).check("32x64w4s2").code == "incorrect"


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_inputs_of_a_check_have_no_more_heads_than_the_payload(kernel, device):
    function = UserFunction(Both("penalty").of(attention).name, ("float32", 1))
    problem = dataclasses.replace(CAUSAL, heads=1, score_function=function)
    assert not isinstance(Bench(kernel, problem, device).check("32x64w4s2"), Failure)


@pytest.mark.interpreted
def test_a_score_function_without_a_derivative_is_checked_as_in_inference(device):
    function = ScoreFunction(score_functions.penalty, payload=torch.ones(8))
    problem = dataclasses.replace(TINY, score_function=UserFunction(function.name, ("float32", 8)))
    assert set(Bench("forward", problem, device).check("32x64w4s2")) == {"o", "lse"}


@pytest.mark.interpreted
def test_an_error_while_timing_names_its_config(device, monkeypatch):
    real = launch.run

    def run(call, on):
        if call.config == Config(32, 64):
            raise RuntimeError("out of resource: shared memory")
        real(call, on)

    monkeypatch.setattr(launch, "run", run)
    bench = Bench("forward", TINY, device)
    with pytest.raises(RuntimeError, match="out of resource"):
        bench.check("32x64w4s2")
    with pytest.raises(TimedError, match="32x64w4s2: RuntimeError: out of resource: shared memory"):
        bench.times(["64x64w4s2", "32x64w4s2"], 2)


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(search, "WINDOW_SECONDS", 1e-3)
    monkeypatch.setattr(benches, "SUSTAINED", dataclasses.replace(benches.SUSTAINED, settle=(0.0, 0.0), long=0.0, sample=1e-9))


def pointers(arguments):
    """The addresses of all tensors in the arguments of a launch."""
    if isinstance(arguments, torch.Tensor):
        return {arguments.data_ptr()}
    return set().union(*map(pointers, arguments)) if isinstance(arguments, tuple) else set()


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["forward", *slow("dkdv")])
def test_windows_rotate_over_copies_that_exceed_the_cache_twice(kernel, device, monkeypatch, short_windows):
    used, announced, real = {}, [], launch.run

    def run(call, on):
        real(call, on)
        if announced:  # not the forward passes that make the tensors
            used.setdefault(call.config, []).append(frozenset(pointers(call.arguments)))

    monkeypatch.setattr(launch, "run", run)
    names, bench = ["32x64w4s2", "64x64w4s2"], Bench(kernel, TINY, device, announce=announced.append)
    bench._timer.cache_bytes = 1.2 * TINY.bytes()
    results = bench.windows(names, 1)
    assert all(len(each.seconds) == 1 and min(each.seconds) > 0 and each.clock is None for each in results.values())
    assert set(used) == {Config.parse(name) for name in names}
    first, second = used.values()
    copies = set(first)
    # shared by all configs; a window has as many launches on each
    assert len(copies) == 3 and copies == set(second) and all(len(each) > 3 for each in copies)
    assert not any(a & b for a, b in itertools.combinations(copies, 2))
    assert all(each[-6:].count(copy) == 2 for each in (first, second) for copy in copies)
    # the first call, and the window with its warm-up: each is one message
    assert all(announced.count(name) >= 2 for name in names)


@pytest.mark.interpreted
@pytest.mark.parametrize("cache, copies", [(0, 1), (0.5, 1), (0.6, 2), (4, 8), (1e9, benches.MAX_COPIES)])
def test_large_problems_have_one_copy_and_small_ones_a_limited_number(cache, copies, device, monkeypatch):
    bench = Bench("forward", TINY, device)
    bench._timer.cache_bytes = cache * TINY.bytes()
    monkeypatch.setattr(bench, "_new_launcher", object)
    assert len(bench._launchers) == len(set(bench._launchers)) == copies and bench._launcher is bench._launchers[0]


@pytest.mark.interpreted
@pytest.mark.parametrize("room, copies", [(1, 1), (2, 1), (4, 2)])
def test_without_room_there_are_fewer_copies(room, copies, device, monkeypatch):
    made = []

    def new_launcher():
        if len(made) == room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(object())
        return made[-1]

    bench = Bench("forward", TINY, device)
    bench._timer.cache_bytes = 5 * TINY.bytes()
    monkeypatch.setattr(bench, "_new_launcher", new_launcher)
    assert bench._launchers == made[:copies]


@pytest.mark.gpu
@pytest.mark.alone
def test_windows_of_one_config_agree(device):
    problem = Problem((4,), 16, 16, 2048, 2048, 128, 128, torch.bfloat16)
    for name, (seconds, clock) in Bench("forward", problem, device).windows(["64x64w4s2", "128x64w8s2"], 3).items():
        assert len(seconds) == 3 and 1e-5 < min(seconds) and max(seconds) < 1.05 * min(seconds), name
        assert clock is None or 100 < clock < 5000


VARIANTS = {"full": {}, "causal": {"window": (None, 0)}, "window": {"window": (9, 0)}, "bias": {"bias": torch.float32},
            "mask": {"masked": True}, "map": {"masked": True, "mapped": True}, "dropout": {"dropout": True},
            "lengths": {"lengths": True}}


@pytest.mark.parametrize("name", VARIANTS)
def test_hard_inputs_have_the_property_of_their_name(name):
    problem = Problem((3,), 4, 2, 500, 500, 32, 16, torch.float16, **VARIANTS[name])
    cases = {case[0]: case[1:] for case in hard_inputs(problem, "cpu", 0)}
    (q, k, v, do, bias), options = cases["large scores"]
    assert (q.float() @ k.repeat_interleave(2, 1).float().mT).abs().max() > 500 and do.shape[-1] == v.shape[-1] == 16
    assert (bias is not None) == (name == "bias") and ("mask" in options) == (name in ("mask", "map"))
    (q, k, _, _, _), _ = cases["nan past the ends"]
    beyond = q.as_strided((q.shape[-1] + 1,), (1,), q.storage_offset())
    assert q.isfinite().all() and beyond[-1].isnan() and not k.is_contiguous()
    if name not in ("full", "dropout"):
        tensors, options = cases["fully masked rows"]
        options = benches.options_of_reference(options, tensors)
        lse = results_of(benches.reference.attention, tensors, options, ("lse",))["lse"]
        masked = (lse == -torch.inf).flatten(0, -2).all(0) if name != "lengths" else (lse[0] == -torch.inf).all()
        assert masked.any() and (lse > -torch.inf).any()


@pytest.mark.interpreted
def test_the_timed_launch_writes_the_results_of_attention(device):
    tensors, _ = benches.draw(CAUSAL, device, 0)
    call = benches.launcher("forward", *benches.inputs_of(*benches.draw(CAUSAL, device, 0)))(Config(32, 64))
    o = call.arguments[2].o.ptr
    o.fill_(torch.nan)
    launch.run(call, torch.device(device))
    torch.testing.assert_close(o, attention(*tensors[:3], causal=True), rtol=1e-5, atol=1e-5)


AHEAD = """
import json, os, sys, tempfile, torch
folder = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = folder.name
from perf import null_driver
null = null_driver.install()
from triton import knobs
from tritonattn import Config, Problem, gpu
from tritonattn.autotune import bench
from tritonattn.problem import UserFunction
from tritonattn.score_function import register
sys.path.append("tests")  # the package `tests` would set TRITON_INTERPRET
from helpers import score_functions
options = {options}
if "score_function" in options:
    options["score_function"] = UserFunction(register(score_functions.penalty, score_functions.one), ("float32", 8))
if "mask_function" in options:
    options["mask_function"] = UserFunction(register(score_functions.documents), ("int32", 517))
problem = Problem((2,), 4, 2, 517, 517, 16, 16, torch.bfloat16, **options)
before = [(name, None) for name in bench.others_of_a_check({kernel!r}, problem)]
for name, config in [*before, ({kernel!r}, Config(32, 32, 4, 1))]:
    for case in range(len(bench.cases_to_compile(problem))):
        bench.compile_case(name, problem, config, gpu.KNOWN["sm_90"], case)
# nothing is computed, and the check must not stop at the first wrong result
bench.accuracy.max_error, torch.equal = lambda *tensors: 0.0, lambda *tensors: True
hits = []
knobs.compilation.listener = lambda src, cache_hit, **_: hits.append((src.name, cache_hit))
errors = bench.Bench({kernel!r}, problem, "cpu").check("32x32w4s1")
print(json.dumps(dict(checked=sorted(errors), hits=hits, launches=null.launches)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel, options", [
    ("forward", {}), ("forward", {"window": (None, 0), "lengths": True}), ("dq", {"window": (9, 0)}),
    ("dkdv", {"masked": True, "mapped": True}), ("dkdv", {"masked": True, "window": (None, 0)}),
    ("dbias", {"bias": torch.float32}), ("forward", {"softcap": True, "sink": True, "alibi": True, "relative": True}),
    ("forward", {"entropy": True}), ("dkdv", {"entropy": True, "key_mass": True}), ("forward", {"normalizer": "sigmoid"}),
    ("dkdv", {"normalizer": "relu"}), ("dq", {"score_function": True}),
    ("forward", {"mask_function": True, "masked": True, "mapped": True}),
], ids=str)
def test_a_check_compiles_nothing_that_was_compiled_ahead(kernel, options):
    """Slow: compiles up to six binaries of each kernel of a call, in a new process."""
    result = compiled(AHEAD.format(kernel=kernel, options=options), fresh=True)
    statistics = ["entropy"] if kernel == "forward" and "entropy" in options else []
    names = benches.OUTPUTS[kernel][:1] if "normalizer" in options and kernel == "forward" else benches.OUTPUTS[kernel]
    assert result["checked"] == sorted([*names, *statistics]) and result["launches"] >= 12
    # these two belong to the definition and to the inputs, and compile in a second
    missed = {name for name, hit in result["hits"] if not hit} - {"evaluate_kernel", "mask_kernel"}
    assert len(result["hits"]) >= 2 and not missed


# --- in a child process

ERROR = Failure("launch error", "RuntimeError: CUDA error")
# without the package: importing torch takes seconds
CHILD = """
import os, pickle, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
while True:
    content = pipe.recv_bytes()
    if b"open" in content:
        {opening}
        continue
    kind, names, *rounds = pickle.loads(content)
    for name in [names] if kind == "check" else names:
        if kind != "check":
            pipe.send(name)
        if name == "hang":
            time.sleep(600)
        if name == "slow":
            time.sleep(0.3)
        if name == "die":
            os._exit(9)
        if name == "torn":
            os.write(pipe.fileno(), b"abc")
            time.sleep(600)
        if name == "raise":
            pipe.send_bytes({failure})
            break
    else:
        pipe.send({{"o": (1e-3, 2e-3)}} if kind == "check" else {{name: (1.0,) * rounds[0] for name in names}})
"""
GOOD = {"o": (1e-3, 2e-3)}


def child(opening="pipe.send(None)", failure=ERROR):
    return CHILD.format(opening=opening, failure=pickle.dumps(failure))


@pytest.fixture
def isolated():
    with IsolatedBench("forward", TINY, "cpu", code=child()) as bench:
        yield bench


def test_a_config_that_hangs_or_dies_is_reported_and_a_new_process_continues(isolated, monkeypatch):
    assert isolated.check("good") == GOOD
    first = isolated._child.process
    assert isolated.check("die").code == "device lost" and first.poll() == 9
    assert isolated.check("good") == GOOD and isolated._child.process.pid != first.pid
    assert isolated.check("raise") == ERROR and isolated._child is None
    assert isolated.check("good") == GOOD
    monkeypatch.setattr(benches, "CHECK_LIMIT", 1.0)
    for name in ("hang", "torn"):
        start = time.monotonic()
        assert isolated.check(name).code == "hang" and time.monotonic() - start < 30
    assert isolated._child is None and isolated.check("good") == GOOD
    child = isolated._child.process
    isolated.__exit__()
    assert child.poll() is not None and isolated._child is None


def test_the_failing_configs_of_a_group_are_named_and_the_others_are_timed(isolated, monkeypatch):
    monkeypatch.setattr(benches, "TIMING_LIMIT", 1.0)
    results = isolated.times(["a", "die", "b", "raise", "hang"], 4)
    codes = {name: failure.code for name, failure in results.items() if isinstance(failure, Failure)}
    assert codes == {"die": "device lost", "raise": "launch error", "hang": "hang"}
    assert results["a"] == results["b"] == (1.0,) * 4
    assert isolated.times(["die"], 4)["die"].code == "device lost" and isolated.times([], 4) == {}
    results = isolated.windows(["a", "hang", "b"], 2)
    assert results == {"a": (1.0, 1.0), "b": (1.0, 1.0), "hang": Failure("hang", "no result in 1 s")}


def test_a_window_is_a_message_of_the_child(isolated, monkeypatch):
    """The limit is for each message: many windows may take longer in all."""
    monkeypatch.setattr(benches, "TIMING_LIMIT", 1.5)
    start = time.monotonic()
    assert isolated.windows(["slow"] * 6, 1) == {"slow": (1.0,)} and time.monotonic() - start > 1.5


# --- several problems


class Fixed:
    """A bench with fixed results, and a log of its calls."""

    def __init__(self, seconds, clock=None, wrong=(), hangs=()):
        self.seconds, self.clock, self.wrong, self.hangs, self.log, self.prepared = seconds, clock, wrong, hangs, [], []

    def prepare(self, configs):
        self.prepared.append((self, *configs))

    def stop_preparing(self):
        self.prepared.append((self, "stop"))

    def now(self):
        return 7.0

    def check(self, config):
        return Failure("incorrect", "o") if config in self.wrong else {"o": (self.seconds[config], 1.0)}

    def times(self, configs, rounds):
        self.log.append(list(configs))
        return {config: Failure("hang", "") if config in self.hangs else (self.seconds[config],) * rounds for config in configs}

    def windows(self, configs, rounds):
        return {config: result if isinstance(result, Failure) else Windows(result, self.clock)
                for config, result in self.times(configs, rounds).items()}


def test_the_time_of_a_joint_bench_is_the_sum_over_its_problems_by_their_calls():
    first, second = Fixed({"a": 1.0, "b": 2.0}, 1500.0), Fixed({"a": 10.0, "b": 5.0}, 1800.0)
    bench = JointBench({TINY: first, CAUSAL: second}, {TINY: 3, CAUSAL: 1})
    first.prepared = second.prepared = []
    bench.prepare(["a", "b"])
    # a check of the first config for the second problem does not wait for other configs of the first problem
    assert first.prepared == [(first, "a"), (second, "a"), (first, "b"), (second, "b")]
    assert bench.now() == 7.0 and bench.check("a") == {"o": (1.0, 1.0)}
    assert bench.checks["a"] == {TINY: {"o": (1.0, 1.0)}, CAUSAL: {"o": (10.0, 1.0)}}
    assert bench.times(["a", "b"], 2) == {"a": (13.0, 13.0), "b": (11.0, 11.0)}
    assert first.prepared[4:] == [(first, "stop"), (second, "stop")], "nothing is compiled while it times"
    assert bench.timings["b"] == {TINY: ((2.0, 2.0), None), CAUSAL: ((5.0, 5.0), None)}
    assert bench.windows(["a"], 1) == {"a": ((13.0,), None)}
    assert bench.timings["a"] == {TINY: ((1.0,), 1500.0), CAUSAL: ((10.0,), 1800.0)} and bench.timings["b"][TINY].clock is None
    assert JointBench({TINY: first}, {TINY: 1}).windows(["a"], 1) == {"a": ((1.0,), 1500.0)}, "one problem has a clock"


def test_a_config_that_fails_for_one_problem_fails_for_all():
    first, second = Fixed({"a": 1.0, "b": 2.0}, wrong=["b"]), Fixed({"a": 1.0, "b": 2.0}, wrong=["a"], hangs=["a"])
    bench = JointBench({TINY: first, CAUSAL: second}, {TINY: 1, CAUSAL: 1})
    assert bench.check("a").code == bench.check("b").code == "incorrect"
    assert bench.times(["a", "b"], 1) == {"a": Failure("hang", ""), "b": (4.0,)} and "a" not in bench.timings
    bench = JointBench({CAUSAL: second, TINY: first}, {TINY: 1, CAUSAL: 1})
    assert bench.windows(["a", "b"], 1)["a"].code == "hang" and first.log[-1] == ["b"], "it is not timed further"


def test_an_error_before_the_first_config_raises():
    code = child().replace('if kind != "check":', 'if False:')
    with IsolatedBench("forward", TINY, "cpu", code=code) as bench:
        with pytest.raises(RuntimeError, match="bench: forward of 1x2/1x48x16 float16 full cannot be timed: its process ended"):
            bench.times(["die"], 2)


def test_a_wrong_result_does_not_end_the_process():
    with IsolatedBench("forward", TINY, "cpu", code=child(failure=Failure("incorrect", "o"))) as bench:
        assert bench.check("raise").code == "incorrect" and bench._child is not None


@pytest.mark.parametrize("opening", [f"pipe.send_bytes({pickle.dumps(ERROR)})", "os._exit(3)"], ids=["error", "exit"])
def test_a_process_that_cannot_use_the_device_raises(opening):
    with IsolatedBench("forward", TINY, "cuda:7", code=child(opening)) as bench:
        with pytest.raises(RuntimeError, match="bench: a new process cannot use cuda:7: "):
            bench.check("good")
        assert bench._child is None


def test_out_of_memory_raises():
    code = child(failure=Failure("launch error", "OutOfMemoryError: CUDA out of memory"))
    with IsolatedBench("forward", TINY, "cpu", code=code) as bench:
        with pytest.raises(RuntimeError, match="bench: no room for the tensors of"):
            bench.check("raise")


class Compilers:
    """Stands in for Workers: notes the jobs, which are done at once."""

    def __init__(self):
        self.jobs = []

    def submit(self, jobs):
        self.jobs += jobs
        futures = [Future() for _ in jobs]
        [future.set_result(None) for future in futures]
        return futures


@pytest.mark.parametrize("kernel, before", [("forward", []), ("dq", ["forward", "delta"])])
def test_the_cases_of_each_config_are_compiled_after_what_comes_before_its_kernel(kernel, before):
    compilers, cases = Compilers(), len(benches.cases_to_compile(TINY))
    with IsolatedBench(kernel, TINY, "cpu", code=child(), compilers=(compilers, gpu.KNOWN["sm_90"])) as bench:
        bench.prepare([])
        assert compilers.jobs == []
        bench.prepare(["32x32w4s1", "64x64w4s2"])
        assert [job[0] for job in compilers.jobs[::cases]] == [*before, *[kernel] * 2]
        assert [job[-1].keywords["case"] for job in compilers.jobs[:cases]] == list(range(cases))
        bench.times(["32x32w4s1"], 1)
        bench.prepare(["64x32w4s2", "64x64w4s2"])
    configs = [Config(32, 32, 4, 1), Config(64, 64), Config(64, 32)]
    assert [job[2] for job in compilers.jobs[::cases]] == [*[None] * len(before), *configs], "each is compiled once"


# without the package; job number i writes its begin, and its end when `allowed` jobs may end
COMPILER = """
import os, time
from multiprocessing.connection import Connection
pipe, folder = Connection(int(sys.argv[1])), {folder!r}
while True:
    pipe.recv_bytes()
    with open(folder + "/begun", "a") as file:
        file.write("x")
    while os.path.getsize(folder + "/begun") > os.path.getsize(folder + "/allowed"):
        time.sleep(0.01)
    with open(folder + "/ended", "a") as file:
        file.write("x")
    pipe.send(None)
"""


@pytest.fixture
def compiling(tmp_path):
    """A compiler, a function that allows so many jobs to end, and one that counts the jobs that have begun and ended."""
    names = ("begun", "ended", "allowed")
    [(tmp_path / name).touch() for name in names]
    with Workers(1, code=COMPILER.format(folder=str(tmp_path))) as workers:
        yield (workers, functools.partial(os.truncate, tmp_path / "allowed"),
               lambda: [(tmp_path / name).stat().st_size for name in names[:2]])


def test_a_check_waits_for_its_own_binaries_and_no_compiler_runs_while_it_times(compiling):
    cases, (workers, allow, counts) = len(benches.cases_to_compile(TINY)), compiling
    allow(cases)
    with IsolatedBench("forward", TINY, "cpu", code=child(), compilers=(workers, gpu.KNOWN["sm_90"])) as bench:
        bench.prepare(["32x32w4s1", "64x64w4s2", "64x32w4s2"])
        assert bench.check("32x32w4s1") == GOOD and counts()[1] == cases
        assert bench.check("another") == GOOD and counts()[1] == cases, "checked without preparation"
        while counts()[0] == cases:
            time.sleep(0.01)
        threading.Timer(0.3, allow, [cases + 1]).start()
        # a bench that does not cancel the others waits for them
        rest = threading.Timer(3.0, allow, [99])
        rest.start()
        bench.times(["32x32w4s1"], 1)
        assert counts() == [cases + 1] * 2, "what runs is waited for"
        rest.cancel()
        allow(99)
        time.sleep(0.2)
        assert counts() == [cases + 1] * 2, "the others are cancelled"
        # a config whose compilation was cancelled can be checked, and prepared again
        assert bench.check("64x32w4s2") == GOOD and counts() == [cases + 1] * 2
        bench.prepare(["64x32w4s2"])
        assert bench.check("64x32w4s2") == GOOD and counts() == [2 * cases + 1] * 2


def test_the_timing_of_one_problem_does_not_wait_for_the_queue_of_another(compiling):
    workers, allow, counts = compiling
    first, second = (IsolatedBench("forward", problem, "cpu", code=child(), compilers=(workers, gpu.KNOWN["sm_90"]))
                     for problem in (TINY, CAUSAL))
    bench = JointBench({TINY: first, CAUSAL: second}, {TINY: 1, CAUSAL: 1})
    with first, second:
        bench.prepare(["32x32w4s1", "64x64w4s2"])
        while counts()[0] == 0:
            time.sleep(0.01)
        # one job runs now, and the second problem's may begin another before it is cancelled too
        timers = [threading.Timer(seconds, allow, [count]) for seconds, count in ((0.3, 2), (3.0, 99))]
        [timer.start() for timer in timers]
        assert bench.times(["32x32w4s1"], 1) == {"32x32w4s1": (2.0,)}
        timers[1].cancel()
        begun, ended = counts()
        assert begun == ended <= 2


@pytest.mark.slow
@pytest.mark.interpreted
def test_a_real_bench_in_a_child_process(device):
    with IsolatedBench("forward", TINY, "cpu") as bench:
        assert set(bench.check("32x64w4s2")) == {"o", "lse"}
        assert bench.check("32x48w4s2").code == "launch error", "no such config"
        results = bench.times(["32x64w4s2"], 2)
    assert len(results["32x64w4s2"]) == 2
