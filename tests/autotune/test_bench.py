"""The bench on interpreted kernels: correct configs pass, wrong kernels do not; and in a child process."""

import itertools
import pickle
import time

import pytest
import torch

from tests.helpers.compile_server import compiled
from tests.helpers.tiers import slow_rows
from tritonattn import Config, Problem, attention, gpu
from tritonattn.autotune import bench as benches
from tritonattn.autotune.bench import Bench, IsolatedBench, hard_inputs, results_of
from tritonattn.autotune.worker_pool import Failure
from tritonattn.measure.timing import TimedError
from tritonattn.runtime import launch

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
            fault(call.arguments[3].o.ptr)

    monkeypatch.setattr(launch, "run", run)
    bench = Bench("forward", TINY, device)
    assert bench.check("32x64w4s2").code == reason and set(bench.check("64x64w4s2")) == {"o", "lse"}


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
    o = call.arguments[3].o.ptr
    o.fill_(torch.nan)
    launch.run(call, torch.device(device))
    torch.testing.assert_close(o, attention(*tensors[:3], causal=True), rtol=1e-5, atol=1e-5)


AHEAD = """
import json, os, tempfile, torch
folder = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = folder.name
from perf import null_driver
null = null_driver.install()
from triton import knobs
from tritonattn import Config, Problem, gpu
from tritonattn.autotune import bench
problem = Problem((2,), 4, 2, 517, 517, 16, 16, torch.bfloat16, **{options})
before = [("forward", None), ("delta", None)] if {kernel!r} != "forward" else []
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
    ("dbias", {"bias": torch.float32}),
], ids=str)
def test_a_check_compiles_nothing_that_was_compiled_ahead(kernel, options):
    """Slow: compiles up to six binaries of each kernel of a call, in a new process."""
    result = compiled(AHEAD.format(kernel=kernel, options=options), fresh=True)
    assert result["checked"] == sorted(benches.OUTPUTS[kernel]) and result["launches"] >= 12
    assert len(result["hits"]) >= 2 and [name for name, hit in result["hits"] if not hit] == []


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
        if kind == "times":
            pipe.send(name)
        if name == "hang":
            time.sleep(600)
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


def test_an_error_before_the_first_config_raises():
    code = child().replace('if kind == "times":', 'if False:')
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
    """Stands in for Workers: notes the jobs, those that were waited for, and whether the rest was cancelled."""

    def map(self, jobs):
        self.jobs, self.done, self.cancelled = jobs, 0, False
        return self._results()

    def _results(self):
        try:
            for number, _ in enumerate(self.jobs, 1):
                self.done = number
                yield None
        finally:
            self.cancelled = True


@pytest.mark.parametrize("kernel, before", [("forward", []), ("dq", ["forward", "delta"])])
def test_a_check_waits_for_its_own_binaries_and_the_timing_cancels_the_others(kernel, before):
    compilers, cases = Compilers(), len(benches.cases_to_compile(TINY))
    with IsolatedBench(kernel, TINY, "cpu", code=child(), compilers=(compilers, gpu.KNOWN["sm_90"])) as bench:
        bench.prepare(["32x32w4s1", "64x64w4s2", "64x32w4s2"])
        assert [job[0] for job in compilers.jobs[::cases]] == [*before, *[kernel] * 3]
        assert [job[2] for job in compilers.jobs[-3 * cases::cases]] == [Config(32, 32, 4, 1), Config(64, 64), Config(64, 32)]
        assert [job[-1].keywords["case"] for job in compilers.jobs[:cases]] == list(range(cases))
        for i, config in enumerate(["32x32w4s1", "64x64w4s2"]):
            assert bench.check(config) == GOOD and compilers.done == cases * (len(before) + 1 + i)
        assert bench.check("another") == GOOD and not compilers.cancelled, "checked without preparation"
        bench.times(["32x32w4s1"], 1)
        assert compilers.cancelled and bench.check("64x32w4s2") == GOOD and compilers.done == cases * (len(before) + 2)


@pytest.mark.slow
@pytest.mark.interpreted
def test_a_real_bench_in_a_child_process(device):
    with IsolatedBench("forward", TINY, "cpu") as bench:
        assert set(bench.check("32x64w4s2")) == {"o", "lse"}
        assert bench.check("32x48w4s2").code == "launch error", "no such config"
        results = bench.times(["32x64w4s2"], 2)
    assert len(results["32x64w4s2"]) == 2
