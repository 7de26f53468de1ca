"""Timing of calls on a device.

    let the clocks settle, then in each round, in random order:   cold cache | wait | event | calls | event

Timing is interleaved, so that clock and thermal drift affect all calls equally. The wait lets the host queue the calls before
the device begins: launches are not counted, and `host_seconds` has their cost. If the fastest call is short, all of them are
repeated within a sample, in a CUDA graph, so that all are timed in the same way.
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

APART, SPAN = 0.05, 0.3  # seconds between reads of the sensors, which refresh every 0.1 s; and of steady clocks
STEADY = 0.01            # relative difference of clocks that are steady


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


class TimedError(RuntimeError):
    """An error of a call while it was timed; `name` is the call's, `__cause__` the error."""

    def __init__(self, name: str, cause: Exception):
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name


def measure(contenders: Mapping[str, Timed], stopwatch,
            effort: TimingBudget = TimingBudget()) -> tuple[dict[str, Timing], list[State]]:
    """Time calls in turns; return their timings, and the state of the device after each round if it has sensors.

    `stopwatch` is a device_timer.Cuda or device_timer.Host, or has their methods. Raises TimedError.
    """
    timer = InterleavedTimer(contenders, stopwatch, effort)
    timer.settle()
    least, most = effort.rounds
    rounds = max(least, min(most, round(effort.seconds * len(contenders) / max(timer.round_seconds, 1e-9))))
    for _ in range(rounds):
        timer.take()
    return {name: timer.timing(name) for name in contenders}, timer.states


class InterleavedTimer:
    """Time calls round by round. An error of a call is raised as TimedError."""

    def __init__(self, contenders: Mapping[str, Timed], stopwatch, effort: TimingBudget):
        self._stopwatch, self._effort, self._rng = stopwatch, effort, random.Random(effort.seed)
        self.states: list[State] = []
        self._samplers = {name: _apply(name, x.around, lambda x=x: _Sampler(x, stopwatch, effort))
                          for name, x in contenders.items()}
        self._order = list(self._samplers)
        if min((sampler.estimate for sampler in self._samplers.values()), default=math.inf) < effort.small:
            for name, sampler in self._samplers.items():
                _apply(name, sampler.around, lambda sampler=sampler: sampler.repeat(effort))

    @property
    def round_seconds(self) -> float:
        """The estimated length of a round."""
        return sum(sampler.estimate * sampler.repeats for sampler in self._samplers.values())

    def settle(self) -> None:
        """Run the calls until the GPU's clock is steady."""
        _settle(self._samplers, self._stopwatch, self._effort)

    def take(self) -> None:
        """Take one sample of each call, in random order."""
        self._rng.shuffle(self._order)
        for name in self._order:
            _apply(name, self._samplers[name].around, self._samplers[name].take)
        if (state := self._stopwatch.state()) is not None:
            self.states.append(state)
            if state.throttled:
                for sampler in self._samplers.values():
                    sampler.throttled.append(len(sampler.samples) - 1)

    def timing(self, name: str) -> Timing:
        """Return the timing of one call."""
        return self._samplers[name].timing()


def _apply(name, around, action):
    try:
        with around():
            return action()
    except Exception as error:
        raise TimedError(name, error) from error


def _settle(samplers, stopwatch, effort):
    """Run the calls until the GPU's clock is steady: idle devices run slow, cool ones fast."""
    least, most = effort.settle
    reads, start = [], stopwatch.now()  # (seconds, MHz)
    while (spent := stopwatch.now() - start) < most:
        for name, sampler in samplers.items():
            _apply(name, sampler.around, sampler.warm)
        if (now := stopwatch.now()) - (reads[-1][0] if reads else -math.inf) >= APART and (state := stopwatch.state()):
            reads.append((now, state.clock))
        if spent >= least and (not reads or _steady(reads)):
            return


def _steady(reads) -> bool:
    """Return whether the clocks of the last SPAN seconds agree."""
    last, clocks = reads[-1][0], []
    for now, clock in reversed(reads):
        clocks.append(clock)
        if last - now >= SPAN:
            return max(clocks) - min(clocks) <= STEADY * max(clocks)
    return False


class _Sampler:
    """One call, with its repeats and samples."""

    def __init__(self, contender: Timed, stopwatch, effort: TimingBudget):
        self.contender, self.around, self.stopwatch = contender, contender.around, stopwatch
        self.samples, self.throttled, self.note = [], [], None
        for call in contender.calls:
            call()
        stopwatch.synchronize()
        first = contender.calls[0]
        self.host_seconds = stopwatch.host_seconds(first, 1)
        self.estimate = stopwatch.sample(first, 2 * self.host_seconds)
        if self.estimate < effort.long:
            times = min(10, math.ceil(effort.long / max(self.estimate, 1e-6)))
            self.host_seconds = statistics.median(stopwatch.host_seconds(first, times) for _ in range(5))
            self.estimate = min(stopwatch.sample(first, 2 * self.host_seconds) for _ in range(3))
        self.repeats, self.method, self.replay = 1, stopwatch.method, first
        self.caches = "flushed" if stopwatch.cache_bytes > 0 else "warm"

    def repeat(self, effort):
        """Repeat the call within a sample, in a graph if possible, equally often on every copy of the inputs."""
        calls, size = self.contender.calls, self.contender.input_bytes
        turns = math.ceil(effort.sample / max(self.estimate, 1e-6) / len(calls))
        self.repeats = turns * len(calls)
        if self.repeats > 1:
            self.caches = "rotated" if len(calls) * size >= 2 * self.stopwatch.cache_bytes > 0 else "warm"

        def in_turns():
            for _ in range(turns):
                for call in calls:
                    call()

        self.replay = in_turns
        try:
            self.replay, self.method = self.stopwatch.capture(in_turns), "graph"
        except Exception as error:
            # ending a failed capture raises a second error; the first has the reason
            cause = error.__context__ or error
            self.note = f"no graph: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"

    def warm(self):
        self.replay()
        self.stopwatch.synchronize()

    def take(self):
        wait = 2 * self.host_seconds * (1 if self.method == "graph" else self.repeats)
        self.samples.append(self.stopwatch.sample(self.replay, wait) / self.repeats)

    def timing(self) -> Timing:
        held_back = set(self.throttled)
        free = [x for i, x in enumerate(self.samples) if i not in held_back]
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
