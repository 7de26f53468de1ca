"""Timing of calls on a device.

    let the clocks settle, then in each round, in random order:   cold cache | wait | event | calls | event

Timing is interleaved, so that clock and thermal drift affect all calls equally. The wait lets the host queue the calls before
the device begins: launches are not counted, and `host_seconds` has their cost. If the fastest call is short, all of them are
repeated within a sample, in a CUDA graph, so that all are timed in the same way.

The pauses between samples keep the power low and the clock high. `windows` times calls at the clock that they sustain:

    in each round, in random order:   calls for half a second | event | calls for half a second | event
"""

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from .device_timer import Call, State

READ_INTERVAL = 0.05  # least seconds between reads of the sensors, which refresh every 0.1 s
STEADY_SECONDS = 0.3  # the clock is steady if it has varied by at most STEADY_SPREAD for this long
STEADY_SPREAD = 0.01  # relative


class Timed(NamedTuple):
    """A call on one or several copies of its inputs of `input_bytes` each; every use is inside the context `around()`."""

    calls: Sequence[Call]
    input_bytes: int = 0
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class TimingBudget:
    """The length of a measurement. Times are in seconds."""

    seconds: float = 0.5       # of samples, per call on average; all calls have the same number of samples
    rounds: tuple[int, int] = (7, 100)
    settle: tuple[float, float] = (0.4, 2.0)  # least and most work before the first sample; the least if there are no sensors
    small: float = 100e-6      # if the fastest call takes less, all are repeated within a sample, in a graph if possible
    sample: float = 400e-6     # least length of a sample of repeated calls
    long: float = 20e-3        # longer calls run only once before they are timed
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quantiles of the samples without throttling, or of all samples if most were throttled.

    The sensors are read once after each round, and count for every sample of that round.
    """

    seconds: float       # the median
    q20: float
    q80: float
    samples: tuple[float, ...]
    throttled: tuple[int, ...]  # indices of samples
    calls: int           # per sample
    method: str          # "events"; "graph" for replays; "host" without a device timer
    caches: str          # "flushed" before each sample, inputs "rotated" beyond the cache, or "warm"
    host_seconds: float  # of the host to issue a call, without waiting for the device
    note: str | None = None

    @property
    def mostly_throttled(self) -> bool:
        return 2 * len(self.throttled) > len(self.samples)


class Windows(NamedTuple):
    """Times under continuous load: the mean seconds per call over each window, and the clock in MHz.

    The clock is the median over the windows of one reading each, when half of the window's calls have run.
    """

    seconds: tuple[float, ...]
    clock: float | None  # None without sensors


class TimedError(RuntimeError):
    """An error of a call while it was timed; `name` is the call's, `__cause__` the error."""

    def __init__(self, name: str, cause: Exception):
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name


def measure(calls: Mapping[str, Timed], timer, budget: TimingBudget = TimingBudget()) -> tuple[dict[str, Timing], list[State]]:
    """Time calls, interleaved; return their timings, and the state of the device after each round if it has sensors.

    `timer` is a device_timer.Cuda or device_timer.Host, or has their methods. Raises TimedError.
    """
    interleaved = InterleavedTimer(calls, timer, budget)
    interleaved.settle()
    least, most = budget.rounds
    rounds = round(budget.seconds * len(calls) / max(interleaved.round_seconds, 1e-9))
    for _ in range(max(least, min(most, rounds))):
        interleaved.take()
    return {name: interleaved.timing(name) for name in calls}, interleaved.states


class InterleavedTimer:
    """Time calls round by round. An error of a call is raised as TimedError."""

    def __init__(self, calls: Mapping[str, Timed], timer, budget: TimingBudget):
        self._timer, self._budget, self._rng = timer, budget, random.Random(budget.seed)
        self.states: list[State] = []
        self._samplers = {name: _Sampler(timed, timer, budget) for name, timed in calls.items()}
        self._each(_Sampler.estimate_seconds)
        if min((sampler.estimate for sampler in self._samplers.values()), default=math.inf) < budget.small:
            self._each(_Sampler.repeat)

    def _each(self, action: Callable[["_Sampler"], None], shuffled: bool = False) -> None:
        """Apply an action to every call, inside the call's context."""
        for name in self._rng.sample(list(self._samplers), len(self._samplers)) if shuffled else self._samplers:
            try:
                with self._samplers[name].timed.around():
                    action(self._samplers[name])
            except Exception as error:
                raise TimedError(name, error) from error

    @property
    def round_seconds(self) -> float:
        """The estimated length of a round."""
        return sum(sampler.estimate * sampler.repeats for sampler in self._samplers.values())

    def settle(self) -> None:
        """Run the calls until the GPU's clock is steady: idle devices run slow, cool ones fast."""
        least, most = self._budget.settle
        reads, start = [], self._timer.now()  # (seconds, MHz)
        while (spent := self._timer.now() - start) < most:
            self._each(_Sampler.warm)
            now = self._timer.now()
            if (not reads or now - reads[-1][0] >= READ_INTERVAL) and (state := self._timer.state()):
                reads.append((now, state.clock))
            if spent >= least and (not reads or _steady(reads)):
                return

    def take(self) -> None:
        """Take one sample of each call, in random order."""
        self._each(_Sampler.take, shuffled=True)
        if (state := self._timer.state()) is not None:
            self.states.append(state)
            if state.throttled:
                for sampler in self._samplers.values():
                    sampler.throttled.append(len(sampler.samples) - 1)

    def windows(self, seconds: float, rounds: int) -> dict[str, Windows]:
        """Time `rounds` windows of so many seconds of each call, in turns. `settle` must have warmed the device.

        Before each window its own call runs as long untimed: the clock follows the power with a delay, so without it a window
        would start at the previous call's clock. The cache is not flushed in a window: calls that must not find their inputs
        there need several copies of them, and are repeated over these copies if the fastest takes less than `small`.
        """
        for _ in range(rounds):
            self._each(lambda sampler: sampler.window(seconds), shuffled=True)
        return {name: Windows(tuple(sampler.windows), float(statistics.median(sampler.clocks)) if sampler.clocks else None)
                for name, sampler in self._samplers.items()}

    def timing(self, name: str) -> Timing:
        """Return the timing of one call."""
        return self._samplers[name].timing()


def _steady(reads) -> bool:
    """Return whether the clock has been steady for STEADY_SECONDS."""
    last, clocks = reads[-1][0], []
    for now, clock in reversed(reads):
        clocks.append(clock)
        if last - now >= STEADY_SECONDS:
            return max(clocks) - min(clocks) <= STEADY_SPREAD * max(clocks)
    return False


class _Sampler:
    """One call, with its repeats and samples."""

    def __init__(self, timed: Timed, timer, budget: TimingBudget):
        self.timed, self._timer, self._budget = timed, timer, budget
        self.samples, self.throttled, self.note = [], [], None
        self.windows, self.clocks, self._replay_seconds = [], [], None
        self.repeats, self.method, self.replay = 1, timer.method, timed.calls[0]
        self.caches = "flushed" if timer.cache_bytes > 0 else "warm"

    def estimate_seconds(self):
        """Run every call once, then estimate the seconds that the host and the device need."""
        for call in self.timed.calls:
            call()
        timer, long = self._timer, self._budget.long
        timer.synchronize()
        self.host_seconds = timer.host_seconds(self.replay, 1)
        self.estimate = timer.sample(self.replay, 2 * self.host_seconds)
        if self.estimate < long:
            times = min(10, math.ceil(long / max(self.estimate, 1e-6)))
            self.host_seconds = statistics.median(timer.host_seconds(self.replay, times) for _ in range(5))
            self.estimate = min(timer.sample(self.replay, 2 * self.host_seconds) for _ in range(3))

    def repeat(self):
        """Repeat the call within a sample, in a graph if possible, equally often on every copy of the inputs."""
        calls, cache = self.timed.calls, self._timer.cache_bytes
        turns = math.ceil(self._budget.sample / max(self.estimate, 1e-6) / len(calls))
        self.repeats = turns * len(calls)
        if self.repeats > 1:
            self.caches = "rotated" if len(calls) * self.timed.input_bytes >= 2 * cache > 0 else "warm"

        def in_turns():
            for _ in range(turns):
                for call in calls:
                    call()

        self.replay = in_turns
        try:
            self.replay, self.method = self._timer.capture(in_turns), "graph"
        except Exception as error:
            # ending a failed capture raises a second error; the first has the reason
            cause = error.__context__ or error
            self.note = f"no graph: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"

    def warm(self):
        self.replay()
        self._timer.synchronize()

    def take(self):
        wait = 2 * self.host_seconds * (1 if self.method == "graph" else self.repeats)
        self.samples.append(self._timer.sample(self.replay, wait) / self.repeats)

    def window(self, seconds):
        """Run for so long untimed, which also tells how many calls fill a window, then as long timed."""
        for _ in range(2):
            times = max(1, round(seconds / (self._replay_seconds or self.estimate * self.repeats)))
            self._replay_seconds, state = self._timer.mean(self.replay, times)
        self.windows.append(self._replay_seconds / self.repeats)
        if state is not None:
            self.clocks.append(state.clock)

    def timing(self) -> Timing:
        free = [x for i, x in enumerate(self.samples) if i not in self.throttled]
        counted = free if 2 * len(free) >= len(self.samples) else self.samples
        q20, median, q80 = quantiles(counted)
        return Timing(median, q20, q80, tuple(self.samples), tuple(self.throttled), self.repeats, self.method, self.caches,
                      self.host_seconds, self.note)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile, interpolated between neighbours."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
