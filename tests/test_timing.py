"""Timing, on a GPU with a virtual clock: turns, settling, marks, repetition. What a real one does is marked gpu."""

import statistics
import time

import pytest
import torch

from tests.fakegpu import FakeGpu, steady
from tritonattn import attention
from tritonattn.clock import Cuda, Host, State
from tritonattn.timing import Contender, ContenderError, Effort, measure, quantiles


def contenders(gpu, **seconds):
    return {name: Contender([gpu.kernel(name, true)]) for name, true in seconds.items()}


def rounds_of(gpu, names, count):
    """The last `count` rounds of the log, each a list of names."""
    log = gpu.log[-count * len(names):]
    return [log[i:i + len(names)] for i in range(0, len(log), len(names))]


def test_contenders_take_turns_in_changing_order():
    gpu = FakeGpu()
    found, _ = measure(contenders(gpu, a=1e-3, b=2e-3, c=3e-3), gpu, Effort(seconds=0.04))
    count = len(found["a"].samples)
    assert count == 20 and {len(x.samples) for x in found.values()} == {count}
    rounds = rounds_of(gpu, "abc", count)
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(set(map(tuple, rounds))) > 3
    again = FakeGpu()
    measure(contenders(again, a=1e-3, b=2e-3, c=3e-3), again, Effort(seconds=0.04))
    assert again.log == gpu.log


def test_drift_falls_on_all_alike():
    def warming(true, gpu):
        return true * (1 + 0.2 * min(1.0, gpu.time))

    gpu = FakeGpu(warming)
    found, _ = measure(contenders(gpu, a=5e-3, b=5e-3), gpu, Effort(seconds=0.4, settle=(0, 0)))
    assert found["a"].seconds == pytest.approx(found["b"].seconds, rel=0.01)
    # one after the other, the second would have looked slower
    gpu = FakeGpu(warming)
    effort = Effort(seconds=0.4, settle=(0, 0))
    first, second = (measure(contenders(gpu, a=5e-3), gpu, effort)[0]["a"].seconds for _ in range(2))
    assert second > 1.05 * first


def test_throttled_samples_are_marked_and_left_out():
    hot = {3, 4, 5}

    def states(reads):
        return State(1980.0, 60.0, 500.0, ("hardware thermal slowdown",) if reads - 1 in hot else ("power cap",))

    gpu = FakeGpu(lambda true, gpu: true * (3 if gpu.reads in hot else 1), states)
    found, said = measure(contenders(gpu, a=1e-3, b=1e-3), gpu, Effort(seconds=0.01, settle=(0, 0)))
    for x in found.values():
        assert x.throttled == (3, 4, 5) and not x.mostly_throttled
        assert [x.samples[i] for i in x.throttled] == pytest.approx([3e-3] * 3)
        assert x.seconds == x.q80 == pytest.approx(1e-3)
    assert len(said) == len(found["a"].samples) and sum(state.throttled for state in said) == 3


def test_throttled_most_of_the_time_counts_and_says_so():
    gpu = FakeGpu(states=lambda reads: State(900.0, 90.0, 300.0, ("power brake",) if reads > 2 else ()))
    found = measure(contenders(gpu, a=1e-3), gpu, Effort(seconds=0.01, settle=(0, 0)))[0]["a"]
    assert found.mostly_throttled and found.seconds == pytest.approx(1e-3) and len(found.throttled) == len(found.samples) - 2


@pytest.mark.parametrize(("climb", "limit"), [(12, 2.0), (10**9, 0.5)])
def test_the_clock_settles_or_patience_ends(climb, limit):
    def climbing(reads):
        return State(345.0 + 100 * min(reads, climb), 40.0, 200.0)

    gpu = FakeGpu(states=climbing)
    measure(contenders(gpu, a=1e-2), gpu, Effort(seconds=0.01, rounds=(1, 1), settle=(0.05, limit)))
    # the reading that follows the only round is the last
    warmed = gpu.reads - 1
    assert warmed == (climb + 3 if climb == 12 else 50)


def test_short_calls_are_repeated_in_a_graph_every_copy_equally():
    gpu = FakeGpu(states=steady)
    calls = [gpu.kernel(name, 1e-5) for name in "xyz"]
    found = measure({"short": Contender(calls, 800)}, gpu, Effort(settle=(0, 0)))[0]["short"]
    assert found.method == "graph" and found.calls % 3 == 0 and found.calls >= 40
    assert found.seconds == pytest.approx(1e-5) and found.caches == "rotated" and found.note is None
    sample = gpu.log[-found.calls:]
    assert {name: sample.count(name) for name in "xyz"} == dict.fromkeys("xyz", found.calls // 3)


@pytest.mark.parametrize(("copies", "size", "caches"), [(1, 10, "warm"), (3, 100, "warm"), (3, 700, "rotated")])
def test_short_calls_say_what_the_cache_held(copies, size, caches):
    gpu = FakeGpu()
    calls = [gpu.kernel("x", 1e-5) for _ in range(copies)]
    assert measure({"x": Contender(calls, size)}, gpu, Effort(settle=(0, 0)))[0]["x"].caches == caches


def test_where_a_graph_fails_calls_are_queued_and_the_reason_is_kept():
    gpu = FakeGpu(graphs=False)
    found = measure({"x": Contender([gpu.kernel("x", 1e-5)])}, gpu, Effort(settle=(0, 0)))[0]["x"]
    assert found.method == "events" and found.calls == 40 and found.seconds == pytest.approx(1e-5)
    assert found.note == "no graph: RuntimeError: operation not permitted when stream is capturing"
    # the device waits until all of them are queued
    assert gpu.waits[-1] == pytest.approx(2 * 40 * found.host_seconds)


def test_long_calls_are_taken_one_by_one_on_a_flushed_cache():
    gpu = FakeGpu()
    found = measure(contenders(gpu, x=1e-3), gpu, Effort(settle=(0, 0)))[0]["x"]
    assert (found.calls, found.caches, found.method) == (1, "flushed", "events") and found.host_seconds == 1e-5


@pytest.mark.parametrize(("true", "count"), [(1.0, 7), (1e-3, 100), (2e-2, 25)])
def test_rounds_follow_the_budget_within_bounds(true, count):
    gpu = FakeGpu()
    assert len(measure(contenders(gpu, x=true), gpu, Effort(settle=(0, 0)))[0]["x"].samples) == count


@pytest.mark.parametrize("after", [0, 70])
def test_a_contender_that_fails_is_named(after):
    gpu, count = FakeGpu(), [0]

    def failing():
        count[0] += 1
        if count[0] > after:
            raise ValueError("out of luck")
        gpu.time += 1e-3

    with pytest.raises(ContenderError, match="bad: ValueError: out of luck") as caught:
        measure(contenders(gpu, good=1e-3) | {"bad": Contender([failing])}, gpu, Effort(settle=(0, 0)))
    assert caught.value.name == "bad" and isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_quantiles_are_those_of_torch(count):
    samples = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    expected = torch.quantile(samples, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    assert quantiles(samples.tolist()) == pytest.approx(expected)


def test_the_host_has_a_clock_too():
    found, states = measure({"nap": Contender([lambda: time.sleep(2e-3)])}, Host(), Effort(0.01, (3, 5), (0, 0)))
    assert 2e-3 <= found["nap"].seconds < 0.2 and found["nap"].method == "host" and not states


@pytest.fixture
def clock(device):
    return Cuda(device)


@pytest.mark.gpu
def test_a_product_of_twice_the_size_takes_eight_times_as_long(clock, device):
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (4096, 8192))
    found, _ = measure({"small": Contender([lambda: a @ a]), "large": Contender([lambda: b @ b])}, clock)
    assert 5 < found["large"].seconds / found["small"].seconds < 11


@pytest.mark.gpu
def test_the_cache_is_cold_in_every_sample(clock, device):
    x = torch.randn(clock.cache_bytes // 8, device=device)
    call = x.sum
    warm = statistics.median(clock.sample(lambda: [call() for _ in range(10)], 1e-3) / 10 for _ in range(20))
    assert statistics.median(clock.sample(call, 1e-4) for _ in range(20)) > 1.2 * warm


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_our_own_kernels_are_captured(clock, device, direction):
    q, k, v, do = (torch.randn(1, 2, 128, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
    with clock.context():
        leaves = [x.requires_grad_(direction != "forward") for x in (q, k, v)]
        o = attention(*leaves)
        call = {"forward": lambda: attention(q, k, v),
                "backward": lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
                "both": lambda: torch.autograd.grad(attention(*leaves), leaves, do)}[direction]
        found = measure({"ours": Contender([call], 1 << 16)}, clock)[0]["ours"]
    assert found.method == "graph" and found.note is None and 1e-6 < found.seconds < 1e-3


@pytest.mark.gpu
def test_the_peak_of_memory_is_seen(clock, device):
    assert clock.peak_bytes(lambda: torch.empty(50 << 20, dtype=torch.int8, device=device)) == 50 << 20


@pytest.mark.gpu
def test_sensors_are_read(clock):
    pytest.importorskip("pynvml", reason="reading clocks needs nvidia-ml-py")
    state = clock.state()
    assert 100 < state.clock < 5000 and 0 < state.temperature < 120 and state.power > 10
