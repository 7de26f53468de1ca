"""Timing, on a GPU with a virtual clock: turns, settling, marks, repetition. What a real one does is marked gpu."""

import contextlib
import itertools
import statistics
import sys
import time
import types

import pytest
import torch

from tests.helpers.fake_gpu import FakeGpu, steady
from tritonattn import attention
from tritonattn.measure import device_timer, timing
from tritonattn.measure.device_timer import Cuda, Host, State
from tritonattn.measure.timing import Timed, TimedError, TimingBudget, measure, quantiles


def timed(gpu, **seconds):
    return {name: Timed([gpu.kernel(name, true)]) for name, true in seconds.items()}


def rounds_of(gpu, names, count):
    """The last `count` rounds of the log, each a list of names."""
    log = gpu.log[-count * len(names):]
    return [log[i:i + len(names)] for i in range(0, len(log), len(names))]


def test_calls_take_turns_in_changing_order():
    gpu = FakeGpu()
    found, _ = measure(timed(gpu, a=1e-3, b=2e-3, c=3e-3), gpu, TimingBudget(seconds=0.04))
    count = len(found["a"].samples)
    assert count == 20 and {len(x.samples) for x in found.values()} == {count}
    rounds = rounds_of(gpu, "abc", count)
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(set(map(tuple, rounds))) > 3
    again = FakeGpu()
    measure(timed(again, a=1e-3, b=2e-3, c=3e-3), again, TimingBudget(seconds=0.04))
    assert again.log == gpu.log


def test_clock_drift_affects_all_calls_equally():
    def warming(true, gpu):
        return true * (1 + 0.2 * min(1.0, gpu.time))

    gpu = FakeGpu(warming)
    found, _ = measure(timed(gpu, a=5e-3, b=5e-3), gpu, TimingBudget(seconds=0.4, settle=(0, 0)))
    assert found["a"].seconds == pytest.approx(found["b"].seconds, rel=0.01)
    # one after the other, the second would have looked slower
    gpu = FakeGpu(warming)
    budget = TimingBudget(seconds=0.4, settle=(0, 0))
    first, second = (measure(timed(gpu, a=5e-3), gpu, budget)[0]["a"].seconds for _ in range(2))
    assert second > 1.05 * first


def test_throttled_samples_are_marked_and_left_out():
    hot = {3, 4, 5}

    def states(reads):
        return State(1980.0, 60.0, 500.0, ("hardware thermal slowdown",) if reads - 1 in hot else ("power cap",))

    gpu = FakeGpu(lambda true, gpu: true * (3 if gpu.reads in hot else 1), states)
    found, said = measure(timed(gpu, a=1e-3, b=1e-3), gpu, TimingBudget(seconds=0.01, settle=(0, 0)))
    for x in found.values():
        assert x.throttled == (3, 4, 5) and not x.mostly_throttled
        assert [x.samples[i] for i in x.throttled] == pytest.approx([3e-3] * 3)
        assert x.seconds == x.q80 == pytest.approx(1e-3)
    assert len(said) == len(found["a"].samples) and sum(state.throttled for state in said) == 3


def test_mostly_throttled_run_uses_all_samples_and_is_marked():
    gpu = FakeGpu(states=lambda reads: State(900.0, 90.0, 300.0, ("power brake",) if reads > 2 else ()))
    found = measure(timed(gpu, a=1e-3), gpu, TimingBudget(seconds=0.01, settle=(0, 0)))[0]["a"]
    assert found.mostly_throttled and found.seconds == pytest.approx(1e-3) and len(found.throttled) == len(found.samples) - 2


def settled_after(clock, settle=(0.05, 3.0), refresh=0.1):
    """How long a GPU is warmed whose sensor shows, anew every `refresh` seconds, the clock at that time."""
    gpu, start = FakeGpu(), 0.0
    gpu.states = clock and (lambda reads: State(clock((gpu.time - start) // refresh * refresh), 40.0, 200.0))
    timer = timing.InterleavedTimer(timed(gpu, busy=1e-2), gpu, TimingBudget(settle=settle))
    start = gpu.time
    timer.settle()
    return gpu.time - start


@pytest.mark.parametrize("refresh", [0.02, 0.1])
def test_it_waits_until_the_clock_has_settled(refresh):
    # within a refresh every clock looks steady
    assert 1.3 <= settled_after(lambda now: 345.0 + 1600 * min(now, 1.0), refresh=refresh) <= 1.5
    assert 0.3 <= settled_after(lambda now: 1980.0, refresh=refresh) <= 0.4


def test_settling_stops_at_its_limit():
    assert settled_after(lambda now: 300.0 + 1000 * now, settle=(0.05, 0.5)) == pytest.approx(0.5, abs=0.011)


def test_without_sensors_it_warms_for_a_fixed_time():
    assert settled_after(None, settle=(0.25, 2.0)) == pytest.approx(0.25, abs=0.011)


def test_sensors_are_not_asked_all_the_time():
    gpu = FakeGpu(states=steady)
    measure(timed(gpu, a=1e-4), gpu, TimingBudget(seconds=0.01, rounds=(1, 1), settle=(1.0, 1.0)))
    assert 15 <= gpu.reads <= 22


def test_short_calls_are_repeated_in_a_graph_every_copy_equally():
    gpu = FakeGpu(states=steady)
    calls = [gpu.kernel(name, 1e-5) for name in "xyz"]
    found = measure({"short": Timed(calls, 800)}, gpu, TimingBudget(settle=(0, 0)))[0]["short"]
    assert found.method == "graph" and found.calls % 3 == 0 and found.calls >= 40
    assert found.seconds == pytest.approx(1e-5) and found.caches == "rotated" and found.note is None
    sample = gpu.log[-found.calls:]
    assert {name: sample.count(name) for name in "xyz"} == dict.fromkeys("xyz", found.calls // 3)


@pytest.mark.parametrize(("copies", "size", "caches"), [(1, 10, "warm"), (3, 100, "warm"), (3, 700, "rotated")])
def test_short_calls_record_the_cache_state(copies, size, caches):
    gpu = FakeGpu()
    calls = [gpu.kernel("x", 1e-5) for _ in range(copies)]
    assert measure({"x": Timed(calls, size)}, gpu, TimingBudget(settle=(0, 0)))[0]["x"].caches == caches


def test_where_a_graph_fails_calls_are_queued_and_the_reason_is_kept():
    gpu = FakeGpu(graphs=False)
    found = measure({"x": Timed([gpu.kernel("x", 1e-5)])}, gpu, TimingBudget(settle=(0, 0)))[0]["x"]
    assert found.method == "events" and found.calls == 40 and found.seconds == pytest.approx(1e-5)
    # not the error of ending a capture that had failed
    assert found.note == "no graph: RuntimeError: operation not permitted when stream is capturing"
    # the device waits until all of them are queued
    assert gpu.waits[-1] == pytest.approx(2 * 40 * found.host_seconds)


@pytest.mark.parametrize(("fastest", "method", "caches"), [(5e-5, "graph", "rotated"), (1.5e-4, "events", "flushed")])
def test_all_calls_of_a_job_use_the_same_method(fastest, method, caches):
    gpu = FakeGpu()
    calls = {name: Timed([gpu.kernel(f"{name}{copy}", true) for copy in range(4)], 600)
             for name, true in (("fast", fastest), ("near", 1.2e-4), ("slow", 2e-3))}
    if method == "events":
        calls.pop("near")
    found, _ = measure(calls, gpu, TimingBudget(settle=(0, 0)))
    assert {(x.method, x.caches) for x in found.values()} == {(method, caches)}
    if method == "graph":
        # even the slow one runs over every copy
        assert found["slow"].calls == 4 and {name for name in gpu.log[-200:] if name[:4] == "slow"} == {
            f"slow{copy}" for copy in range(4)}
    assert found["slow"].seconds == pytest.approx(2e-3)


def test_calls_run_inside_their_context():
    gpu, depth, seen = FakeGpu(), [], []

    @contextlib.contextmanager
    def around():
        depth.append(gpu.time)
        yield
        depth.pop()

    def call():
        seen.append(len(depth))
        gpu.time += 1e-5

    measure({"inside": Timed([call], 1, around), "outside": Timed([call])}, gpu, TimingBudget(settle=(0.01, 0.01)))
    assert set(seen) == {0, 1} and not depth and 0.4 < sum(seen) / len(seen) < 0.6


def test_entering_the_context_is_not_timed():
    gpu = FakeGpu()

    @contextlib.contextmanager
    def slow_to_enter():
        gpu.time += 1.0
        yield
        gpu.time += 1.0

    found = measure({"x": Timed([gpu.kernel("x", 1e-3)], 0, slow_to_enter)}, gpu, TimingBudget(settle=(0, 0)))[0]["x"]
    assert found.seconds == pytest.approx(1e-3) and found.host_seconds == pytest.approx(1e-5)


def test_long_calls_are_taken_one_by_one_on_a_flushed_cache():
    gpu = FakeGpu()
    found = measure(timed(gpu, x=1e-3), gpu, TimingBudget(settle=(0, 0)))[0]["x"]
    assert (found.calls, found.caches, found.method) == (1, "flushed", "events") and found.host_seconds == 1e-5


@pytest.mark.parametrize(("true", "count"), [(1.0, 7), (1e-3, 100), (2e-2, 25)])
def test_rounds_follow_the_budget_within_bounds(true, count):
    gpu = FakeGpu()
    assert len(measure(timed(gpu, x=true), gpu, TimingBudget(settle=(0, 0)))[0]["x"].samples) == count


# --- windows


class PowerLimited(FakeGpu):
    """Calls of 1 ms need twice the power that the GPU may use, others little; the clock follows within some 50 ms."""

    def __init__(self, sensors=True):
        super().__init__(self.slowed, (lambda reads: State(1980.0 * self.clock, 60.0, 700.0)) if sensors else None)
        self.load = 0.0

    @property
    def clock(self):
        return min(1.0, max(self.load, 0.1) ** (-1 / 3))

    def slowed(self, true, gpu):
        seconds = true / self.clock
        self.load += ((2.0 if true == 1e-3 else 0.5) - self.load) * min(1.0, seconds / 0.05)
        return seconds

    def sample(self, call, wait):
        self.time, self.load = self.time + 2e-3, 0.9 * self.load
        return super().sample(call, wait)


SUSTAINED = 1e-3 * 2 ** (1 / 3)  # of the call of 1 ms


def blocks(log):
    """The (name, number of calls in a row) of a log."""
    return [(name, len(list(calls))) for name, calls in itertools.groupby(log)]


def test_windows_rank_by_the_sustained_clock_and_samples_by_the_common_one():
    calls = {"hot": 1e-3, "cool": 1.1e-3}
    gpu = PowerLimited()
    samples, _ = measure(timed(gpu, **calls), gpu, TimingBudget(seconds=0.1, settle=(0, 0)))
    assert samples["hot"].seconds < samples["cool"].seconds
    gpu = PowerLimited()
    timer = timing.InterleavedTimer(timed(gpu, **calls), gpu, TimingBudget())
    timer.settle()
    windows = timer.windows(0.5, 4)
    # whatever ran before it, a window has its own clock
    assert windows["hot"].seconds == pytest.approx([SUSTAINED] * 4, rel=1e-3)
    assert windows["cool"].seconds == pytest.approx([1.1e-3] * 4, rel=1e-3)
    assert windows["hot"].clock == pytest.approx(1980 * 2 ** (-1 / 3), rel=1e-3) and windows["cool"].clock == 1980.0
    # without half a second of warm-up the first would gain from the second: the clock falls within the window
    hot, cool = (gpu.kernel(name, true) for name, true in calls.items())
    gpu.mean(cool, 500)
    assert gpu.mean(hot, 400)[0] < 0.985 * SUSTAINED


def test_windows_and_their_warm_up_last_as_long_as_asked_in_changing_order():
    gpu = FakeGpu()
    timer = timing.InterleavedTimer(timed(gpu, a=2e-3, b=5e-3, c=1.0), gpu, TimingBudget(settle=(0, 0)))
    gpu.log.clear()
    found = timer.windows(0.5, 6)
    # a launch that is longer than a window is one
    assert {name: each.seconds for name, each in found.items()} == {
        name: pytest.approx([true] * 6) for name, true in {"a": 2e-3, "b": 5e-3, "c": 1.0}.items()}
    assert found["a"].clock is None, "no sensors"
    rounds = [gpu.log[i:i + 702] for i in range(0, len(gpu.log), 702)]
    assert len(rounds) == 6 and all(sorted(blocks(each)) == [("a", 500), ("b", 200), ("c", 2)] for each in rounds)
    assert len({tuple(blocks(each)) for each in rounds}) > 2


def test_windows_of_short_calls_replay_graphs():
    gpu = FakeGpu()
    timer = timing.InterleavedTimer(timed(gpu, a=2e-4), gpu, TimingBudget(small=1e-3, sample=5e-3))
    gpu.log.clear()
    assert timer.windows(0.5, 1)["a"].seconds == pytest.approx([2e-4]) and len(gpu.log) == 2 * 2500
    timer.take()
    assert timer.timing("a").method == "graph"


def test_the_host_has_windows_too():
    (seconds,), clock = timing.InterleavedTimer({"nap": Timed([lambda: time.sleep(2e-3)])}, Host(),
                                                TimingBudget()).windows(0.02, 1)["nap"]
    assert 2e-3 <= seconds < 0.2 and clock is None


@pytest.mark.parametrize("times, half", [(1, 1), (2, 1), (5, 3)])
def test_the_clock_of_a_window_is_read_when_half_of_its_calls_have_run(times, half):
    class Event:
        """An event on a device that runs nothing before the host waits."""

        def __init__(self, name):
            self.name = name

        def record(self):
            issued.append(self.name)

        def synchronize(self):
            while self.name in issued:
                ran.append(issued.pop(0))

        def elapsed_time(self, other):
            return 1e3 * ran.count("call")

    issued, ran = [], []
    cuda = object.__new__(Cuda)
    cuda._events, cuda.state = [Event(name) for name in ("start", "middle", "end")], lambda: ran.count("call")
    assert cuda.mean(lambda: issued.append("call"), times) == (1.0, half)


@pytest.mark.gpu
@pytest.mark.alone
def test_a_window_is_as_long_as_its_calls(timer, device):
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    with timer.context():
        interleaved = timing.InterleavedTimer({"product": Timed([lambda: a @ a])}, timer, TimingBudget(small=1e-3, sample=5e-3))
        interleaved.settle()
        start = time.perf_counter()
        window, = interleaved.windows(0.5, 1).values()
    assert 0.8 < time.perf_counter() - start < 1.5 and 5e-5 < window.seconds[0] < 1e-2
    assert window.clock is None or 100 < window.clock < 5000


@pytest.mark.parametrize("after", [0, 70])
def test_a_call_that_fails_is_named(after):
    gpu, count = FakeGpu(), [0]

    def failing():
        count[0] += 1
        if count[0] > after:
            raise ValueError("out of luck")
        gpu.time += 1e-3

    with pytest.raises(TimedError, match="bad: ValueError: out of luck") as caught:
        measure(timed(gpu, good=1e-3) | {"bad": Timed([failing])}, gpu, TimingBudget(settle=(0, 0)))
    assert caught.value.name == "bad" and isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_quantiles_are_those_of_torch(count):
    samples = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    expected = torch.quantile(samples, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    assert quantiles(samples.tolist()) == pytest.approx(expected)


def test_host_timer_measures_wall_time():
    found, states = measure({"nap": Timed([lambda: time.sleep(2e-3)])}, Host(), TimingBudget(0.01, (3, 5), (0, 0)))
    assert 2e-3 <= found["nap"].seconds < 0.2 and found["nap"].method == "host" and not states


class FakeNvml:
    """NVIDIA's sensors, which may fail."""

    NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, fails=""):
        self.fails = fails

    def __getattr__(self, name):
        def ask(*_):
            if name in self.fails:
                raise self.NVMLError("Not Supported")
            return 0x48

        return ask


def test_sensors_that_fail_once_cost_no_measurement(monkeypatch):
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1"))
    sensors = device_timer.Sensors("cuda")
    slow = "hardware slowdown", "hardware thermal slowdown"
    assert sensors.missing is None and sensors.state() == State(0x48, 0x48, 0.072, slow)
    nvml.fails = "nvmlDeviceGetPowerUsage"
    assert sensors.state() is None


def test_missing_sensors_have_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1"))
    for module, reason in ((FakeNvml("nvmlDeviceGetTemperature"), "NVML: Not Supported"),
                           (FakeNvml("nvmlInit"), "NVML: Not Supported"), (None, "nvidia-ml-py is not installed"),
                           (FakeNvml(), None)):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        sensors = device_timer.Sensors("cuda")
        assert sensors.missing == reason and (sensors.state() is None) == (reason is not None)


@pytest.fixture
def timer(device):
    return Cuda(device)


@pytest.mark.gpu
@pytest.mark.alone
def test_a_product_of_twice_the_size_takes_eight_times_as_long(timer, device):
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (4096, 8192))
    found, _ = measure({"small": Timed([lambda: a @ a]), "large": Timed([lambda: b @ b])}, timer)
    assert 5 < found["large"].seconds / found["small"].seconds < 11


@pytest.mark.gpu
@pytest.mark.alone
def test_the_cache_is_cold_in_every_sample(timer, device, monkeypatch):
    x = torch.randn(timer.cache_bytes // 16, device=device)  # a quarter of the cache

    def median():
        return statistics.median(timer.sample(x.sum, 1e-4) for _ in range(50))

    cold = median()
    monkeypatch.setattr(timer, "_flush", lambda: None)
    assert cold > 1.2 * median()


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_our_own_kernels_are_captured(timer, device, direction):
    q, k, v, do = (torch.randn(1, 2, 128, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
    with timer.context():
        leaves = [x.requires_grad_(direction != "forward") for x in (q, k, v)]
        o = attention(*leaves)
        call = {"forward": lambda: attention(q, k, v),
                "backward": lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
                "both": lambda: torch.autograd.grad(attention(*leaves), leaves, do)}[direction]
        found = measure({"ours": Timed([call], 1 << 16)}, timer)[0]["ours"]
    assert found.method == "graph" and found.note is None and 1e-6 < found.seconds < 1e-3


@pytest.mark.gpu
def test_the_peak_of_memory_is_seen(timer, device):
    assert timer.peak_bytes(lambda: torch.empty(50 << 20, dtype=torch.int8, device=device)) == 50 << 20


@pytest.mark.gpu
def test_sensors_are_read(timer):
    pytest.importorskip("pynvml", reason="reading clocks needs nvidia-ml-py")
    state = timer.state()
    assert 100 < state.clock < 5000 and 0 < state.temperature < 120 and state.power > 10
