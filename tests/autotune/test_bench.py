"""The bench on real kernels, in the interpreter: right configs pass, wrong kernels do not; and in a process of its own."""

import itertools
import sys
import time

import pytest
import torch

from tritonattn import Config, Problem, attention
from tritonattn.autotune import bench as benches
from tritonattn.autotune import isolation
from tritonattn.autotune.bench import Bench, hard, outcome
from tritonattn.autotune.isolation import Isolated
from tritonattn.autotune.search import Check
from tritonattn.autotune.worker_pool import Failure
from tritonattn.measure.device_timer import Host
from tritonattn.runtime import custom_op, launch

TINY = Problem((1,), 2, 1, 48, 48, 16, 16, torch.float16)
CAUSAL = Problem((1,), 2, 1, 48, 48, 16, 16, torch.float32, (None, 0))


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, problem", [("forward", CAUSAL), ("dkdv", TINY)], ids=["forward", "dkdv"])
def test_a_right_config_passes_and_is_timed(kernel, problem, device):
    bench = Bench(kernel, problem, device)
    check = bench.check("32x64w4s2")
    assert check.reason is None and set(check.errors) == set(benches.MAKES[kernel])
    assert all(0 < error <= allowed for error, allowed in check.errors.values())
    found = bench.times(["32x64w4s2", "64x64w4s2"], 3)
    assert all(len(samples) == 3 and min(samples) > 0 for samples in found.values()) and bench.now() > 0


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
def test_what_raises_is_told_and_the_others_go_on(device, monkeypatch):
    real = launch.run

    def run(call, on):
        if call.config == Config(32, 64):
            raise RuntimeError("out of resource: shared memory")
        real(call, on)

    monkeypatch.setattr(launch, "run", run)
    bench = Bench("forward", TINY, device)
    assert bench.check("32x64w4s2") == Check({}, "launch error", "RuntimeError: out of resource: shared memory")
    found = bench.times(["32x64w4s2", "64x64w4s2"], 2)
    assert found["32x64w4s2"] == Failure("launch error", "RuntimeError: out of resource: shared memory")
    assert len(found["64x64w4s2"]) == 2


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
def test_hard_inputs_are_what_they_are_called(name):
    problem = Problem((3,), 4, 2, 500, 500, 32, 16, torch.float16, **VARIANTS[name])
    found = {each[0]: each[1:] for each in hard(problem, "cpu", 0)}
    assert ("rows that see nothing" in found) == (name not in ("full", "dropout"))
    (q, k, v, do, bias), options = found["large scores"]
    assert (q.float() @ k.repeat_interleave(2, 1).float().mT).abs().max() > 500 and do.shape[-1] == v.shape[-1] == 16
    assert (bias is not None) == (name == "bias") and ("mask" in options) == (name in ("mask", "map"))
    (q, k, _, _, _), _ = found["nan past the ends"]
    beyond = q.as_strided((q.shape[-1] + 1,), (1,), q.storage_offset())
    assert q.isfinite().all() and beyond[-1].isnan() and not k.is_contiguous()
    if name not in ("full", "dropout"):
        tensors, options = found["rows that see nothing"]
        lse, = outcome(benches.reference.attention, tensors, benches.as_defined(options, tensors), ("lse",)).values()
        blind = (lse == -torch.inf).flatten(0, -2).all(0) if name != "lengths" else (lse[0] == -torch.inf).all()
        assert blind.any() and (lse > -torch.inf).any()


@pytest.mark.interpreted
def test_the_launch_that_is_timed_writes_what_attention_gives(device):
    """Not another problem, nor half of it."""
    tensors, _ = benches.draw(CAUSAL, device, 0)
    kept = []
    real = custom_op.empty_outputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benches, "empty_results", lambda *arguments: kept.append(real(*arguments)) or kept[-1])
        call = benches.launches("forward", CAUSAL, device, 0)(Config(32, 64))
    launch.run(call, torch.device(device))
    torch.testing.assert_close(kept[0][0], attention(*tensors[:3], causal=True), rtol=1e-5, atol=1e-5)


# --- in a process of its own

CHILD = """
import os, sys, time
from tritonattn.autotune import search, worker_pool
def answer(kind, *rest):
    if kind == "open":
        return None
    bad = [c for c in (rest[:1] if kind == "check" else rest[0]) if c in ("hang", "die", "raise")]
    for what in bad:
        if what == "hang":
            time.sleep(600)
        if what == "die":
            os._exit(9)
        raise RuntimeError("CUDA error")
    return search.Check() if kind == "check" else {c: (1.0,) * rest[1] for c in rest[0]}
worker_pool.serve(answer, "device lost")
"""


@pytest.fixture
def isolated(monkeypatch):
    monkeypatch.setattr(isolation, "CHECKING", 15.0)
    monkeypatch.setattr(isolation, "TIMING", 15.0)
    with Isolated("forward", TINY, "cpu", command=(sys.executable, "-c", CHILD)) as bench:
        yield bench


def test_what_hangs_or_dies_is_told_and_a_new_process_goes_on(isolated):
    assert isolated.check("good").reason is None
    first = isolated._child.pid
    assert isolated.check("die").reason == "device lost" and isolated.check("good").reason is None
    assert isolated._child.pid != first
    assert isolated.check("raise").note == "RuntimeError: CUDA error"
    began = time.monotonic()
    assert isolated.check("hang").reason == "hang" and time.monotonic() - began < 60
    assert isolated.check("good").reason is None


def test_the_culprit_among_many_is_found_and_the_others_are_timed(isolated):
    found = isolated.times(["a", "die", "b"], 4)
    assert found["die"].code == "device lost" and found["a"] == found["b"] == (1.0,) * 4
    assert isolated.times(["die"], 4)["die"].code == "device lost"


def test_how_long_a_sample_takes_is_learned_from_one_that_gives_one(monkeypatch):
    """Not from a launch that is refused in a moment, nor from a process that begins; and one that hangs is not asked again."""
    asked, clock = [], [0.0]

    def ask(job, timeout):
        asked.append((job[1], timeout))
        took = {"hang": timeout, "refused": 0.001}.get(job[1][0], 2.0)
        clock[0] += took
        if job[1][0] == "hang":
            return Failure("hang", "no answer", lasting=False)
        return {config: Failure("launch error", "no") if config == "refused" else (1.0,) * job[2] for config in job[1]}

    bench = Isolated("forward", TINY, "cpu")
    def opened():
        clock[0] += 40.0

    monkeypatch.setattr(bench, "_ask", ask)
    monkeypatch.setattr(bench, "_open", opened)
    monkeypatch.setattr(bench, "now", lambda: clock[0])
    found = bench.times(["hang", "refused", "a", "b"], 4)
    assert found["hang"].code == "hang" and found["refused"].code == "launch error" and found["a"] == found["b"] == (1.0,) * 4
    first, patience = isolation.FIRST, isolation.TIMING + (isolation.SAMPLE + 2.0) * 8
    assert asked == [(["hang"], first), (["refused"], first), (["a"], first), (["a", "b"], patience)]
    assert bench.times(["b"], 1) == {"b": (1.0,)} and len(asked) == 5, "and what is known is not learned again"
    assert Isolated("forward", TINY, "cpu").times([], 4) == {}


def test_a_group_that_takes_too_long_together_is_halved(monkeypatch):
    together = CHILD.replace("bad = [", "if kind == 'times' and len(rest[0]) > 2: time.sleep(600)\n    bad = [")
    monkeypatch.setattr(isolation, "TIMING", 12.0)
    monkeypatch.setattr(isolation, "SAMPLE", 0.0)
    with Isolated("forward", TINY, "cpu", command=(sys.executable, "-c", together)) as bench:
        assert bench.times(["a", "b", "c", "d"], 1) == dict.fromkeys("abcd", (1.0,))


@pytest.mark.parametrize("opening", ["raise RuntimeError('no such device')", "os._exit(3)"])
def test_a_process_that_cannot_open_the_bench_is_no_configs_fault(opening):
    broken = CHILD.replace("return None", opening)
    with Isolated("forward", TINY, "cuda:7", command=(sys.executable, "-c", broken)) as bench:
        with pytest.raises(RuntimeError, match="bench: expected a process that can use cuda:7, got"):
            bench.check("good")
        assert bench._child is None


def test_no_room_is_no_configs_fault():
    full = CHILD.replace("raise RuntimeError", "import torch; raise torch.OutOfMemoryError")
    with Isolated("forward", TINY, "cpu", command=(sys.executable, "-c", full)) as bench:
        with pytest.raises(RuntimeError, match="bench: expected room for the tensors of"):
            bench.check("raise")


def test_its_process_is_gone_at_the_end(isolated):
    isolated.check("good")
    child = isolated._child
    isolated.__exit__()
    assert child.poll() is not None and isolated._child is None


@pytest.mark.interpreted
def test_a_real_bench_in_a_process_of_its_own(device):
    with Isolated("forward", TINY, "cpu") as bench:
        assert bench.check("32x64w4s2").reason is None
        assert bench.check("32x48w4s2").reason == "launch error", "no such config"
        found = bench.times(["32x64w4s2"], 2)
    assert len(found["32x64w4s2"]) == 2
