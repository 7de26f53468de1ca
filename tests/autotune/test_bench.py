"""The bench on interpreted kernels: correct configs pass, wrong kernels do not; and in a child process."""

import itertools
import pickle
import time

import pytest
import torch

from tritonattn import Config, Problem, attention
from tritonattn.autotune import bench as benches
from tritonattn.autotune.bench import Bench, IsolatedBench, hard_inputs, results_of
from tritonattn.autotune.search import Check
from tritonattn.autotune.worker_pool import Failure
from tritonattn.measure.device_timer import Host
from tritonattn.runtime import custom_op, launch

TINY = Problem((1,), 2, 1, 48, 48, 16, 16, torch.float16)
CAUSAL = Problem((1,), 2, 1, 48, 48, 16, 16, torch.float32, (None, 0))


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, problem", [("forward", CAUSAL), ("dkdv", TINY)], ids=["forward", "dkdv"])
def test_a_correct_config_passes_and_is_timed(kernel, problem, device):
    bench = Bench(kernel, problem, device)
    check = bench.check("32x64w4s2")
    assert check.reason is None and set(check.errors) == set(benches.OUTPUTS[kernel])
    assert all(0 < error <= allowed for error, allowed in check.errors.values())
    results = bench.times(["32x64w4s2", "64x64w4s2"], 3)
    assert all(len(samples) == 3 and min(samples) > 0 for samples in results.values()) and bench.now() > 0


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
    assert bench.check("32x64w4s2").reason == reason and bench.check("64x64w4s2").reason is None


@pytest.mark.interpreted
def test_an_error_is_the_result_of_its_config_and_the_others_are_timed(device, monkeypatch):
    real = launch.run

    def run(call, on):
        if call.config == Config(32, 64):
            raise RuntimeError("out of resource: shared memory")
        real(call, on)

    monkeypatch.setattr(launch, "run", run)
    bench = Bench("forward", TINY, device)
    assert bench.check("32x64w4s2") == Check({}, "launch error", "RuntimeError: out of resource: shared memory")
    results = bench.times(["32x64w4s2", "64x64w4s2"], 2)
    assert results["32x64w4s2"] == Failure("launch error", "RuntimeError: out of resource: shared memory")
    assert len(results["64x64w4s2"]) == 2


@pytest.mark.interpreted
def test_a_lost_device_is_raised(device, monkeypatch):
    class Lost(Host):
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(launch, "run", lambda *_: 1 / 0)
    with pytest.raises(benches.DeviceLost, match="ZeroDivisionError"):
        Bench("forward", TINY, device, Lost()).check("32x64w4s2")


VARIANTS = {"full": {}, "causal": {"window": (None, 0)}, "window": {"window": (9, 0)}, "bias": {"bias": torch.float32},
            "mask": {"masked": True}, "map": {"masked": True, "mapped": True}, "dropout": {"dropout": True},
            "lengths": {"lengths": True}}


@pytest.mark.parametrize("name", VARIANTS)
def test_hard_inputs_have_the_property_of_their_name(name):
    problem = Problem((3,), 4, 2, 500, 500, 32, 16, torch.float16, **VARIANTS[name])
    cases = {case[0]: case[1:] for case in hard_inputs(problem, "cpu", 0)}
    assert ("fully masked rows" in cases) == (name not in ("full", "dropout"))
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
    outputs = []
    real = custom_op.empty_outputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benches, "empty_outputs", lambda *arguments: outputs.append(real(*arguments)) or outputs[-1])
        call = benches.launcher("forward", CAUSAL, device, 0)(Config(32, 64))
    launch.run(call, torch.device(device))
    torch.testing.assert_close(outputs[0][0], attention(*tensors[:3], causal=True), rtol=1e-5, atol=1e-5)


# --- in a child process

LOST = Failure("device lost", "RuntimeError: CUDA error")
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
    kind, *rest = pickle.loads(content)
    names = rest[:1] if kind == "check" else rest[0]
    if "hang" in names:
        time.sleep(600)
    if "die" in names:
        os._exit(9)
    if "raise" in names:
        pipe.send_bytes({failure})
    elif kind == "check":
        pipe.send_bytes({correct})
    else:
        pipe.send({{name: (1.0,) * rest[1] for name in names}})
"""


def child(opening="pipe.send(None)", failure=LOST):
    return CHILD.format(opening=opening, failure=pickle.dumps(failure), correct=pickle.dumps(Check()))


@pytest.fixture
def isolated():
    with IsolatedBench("forward", TINY, "cpu", code=child()) as bench:
        yield bench


def test_a_config_that_hangs_or_dies_is_reported_and_a_new_process_continues(isolated, monkeypatch):
    assert isolated.check("good").reason is None
    first = isolated._child.process
    assert isolated.check("die").reason == "device lost" and first.poll() == 9
    assert isolated.check("good").reason is None and isolated._child.process.pid != first.pid
    assert isolated.check("raise").note == "RuntimeError: CUDA error"
    assert isolated.check("good").reason is None
    monkeypatch.setattr(benches, "CHECK_LIMIT", 1.0)
    start = time.monotonic()
    assert isolated.check("hang").reason == "hang" and time.monotonic() - start < 30
    last = isolated._child
    assert last is None and isolated.check("good").reason is None
    child = isolated._child.process
    isolated.__exit__()
    assert child.poll() is not None and isolated._child is None


def test_the_failing_config_of_a_group_is_found_and_the_others_are_timed(isolated):
    results = isolated.times(["a", "die", "b"], 4)
    assert results["die"].code == "device lost" and results["a"] == results["b"] == (1.0,) * 4
    assert isolated.times(["die"], 4)["die"].code == "device lost"


def scripted(monkeypatch, seconds, together=None):
    """Return an IsolatedBench without a process, whose clock moves by `seconds` of each config, and the list of its jobs."""
    bench, jobs, clock = IsolatedBench("forward", TINY, "cpu"), [], [0.0]

    def ask(job, limit):
        jobs.append((job[1], limit))
        clock[0] += min(limit, seconds(job[1][0]))
        if job[1] == ["hang"] or len(job[1]) > (together or len(job[1])):
            return Failure("hang", "no result", lasting=False)
        return {config: Failure("launch error", "no") if config == "refused" else (1.0,) * job[2] for config in job[1]}

    def start():
        clock[0] += 40.0

    monkeypatch.setattr(bench, "_ask", ask)
    monkeypatch.setattr(bench, "_start", start)
    monkeypatch.setattr(bench, "now", lambda: clock[0])
    return bench, jobs


def test_the_time_of_a_sample_is_measured_on_a_config_that_gives_one(monkeypatch):
    """Neither a hanging nor a refused config counts, nor the start of the process; and a hanging one is not timed again."""
    bench, jobs = scripted(monkeypatch, lambda name: {"hang": 1e9, "refused": 0.001}.get(name, 2.0))
    results = bench.times(["hang", "refused", "a", "b"], 4)
    assert results["hang"].code == "hang" and results["refused"].code == "launch error"
    assert results["a"] == results["b"] == (1.0,) * 4
    first, limit = benches.FIRST_LIMIT, benches.BASE_LIMIT + (benches.SAMPLE_LIMIT + 2.0) * 8
    assert jobs == [(["hang"], first), (["refused"], first), (["a"], first), (["a", "b"], limit)]
    assert bench.times(["b"], 1) == {"b": (1.0,)} and len(jobs) == 5, "it is measured once"
    assert IsolatedBench("forward", TINY, "cpu").times([], 4) == {}


def test_a_group_that_is_too_slow_only_together_is_split(monkeypatch):
    bench, _ = scripted(monkeypatch, lambda name: 1.0, together=2)
    assert bench.times(["a", "b", "c", "d"], 1) == dict.fromkeys("abcd", (1.0,))


@pytest.mark.parametrize("opening", [f"pipe.send_bytes({pickle.dumps(LOST)})", "os._exit(3)"], ids=["error", "exit"])
def test_a_process_that_cannot_use_the_device_raises(opening):
    with IsolatedBench("forward", TINY, "cuda:7", code=child(opening)) as bench:
        with pytest.raises(RuntimeError, match="bench: a new process cannot use cuda:7: "):
            bench.check("good")
        assert bench._child is None


def test_out_of_memory_raises():
    code = child(failure=Failure("device lost", "OutOfMemoryError: CUDA out of memory"))
    with IsolatedBench("forward", TINY, "cpu", code=code) as bench:
        with pytest.raises(RuntimeError, match="bench: no room for the tensors of"):
            bench.check("raise")


@pytest.mark.slow
@pytest.mark.interpreted
def test_a_real_bench_in_a_child_process(device):
    with IsolatedBench("forward", TINY, "cpu") as bench:
        assert bench.check("32x64w4s2").reason is None
        assert bench.check("32x48w4s2").reason == "launch error", "no such config"
        results = bench.times(["32x64w4s2"], 2)
    assert len(results["32x64w4s2"]) == 2
