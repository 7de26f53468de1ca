"""How long a call takes on a device: the one home of timing.

    settle the clocks, then in each round, in another order:   cold cache | wait | event | calls | event

Contenders take turns, so that whatever drifts (clocks, heat, neighbours) drifts for all alike. The wait lets the host
queue the calls before the device begins, so launches are not counted; `host_seconds` says what they cost. Where the
fastest call is short, all are repeated within a sample, in a graph, so that one comparison is of one kind.
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

APART, SPAN = 0.05, 0.3  # seconds: sensors are asked no oftener, and must agree for so long; they refresh every 0.1 s or so
STEADY = 0.01            # share of the clock by which they may differ


class Timed(NamedTuple):
    """The same call on one or several copies of its inputs, of so many bytes each; each use is made inside `around()`."""

    calls: Sequence[Call]
    input_bytes: int = 0
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class TimingBudget:
    """How much is spent. Times in seconds."""

    seconds: float = 0.5       # of samples, per contender on average: all have as many, so slower ones take more of it
    rounds: tuple[int, int] = (7, 100)
    settle: tuple[float, float] = (0.4, 2.0)  # of work beforehand, at least (where no sensor tells, just so much) and at most
    small: float = 100e-6      # where the fastest takes less, all are repeated within a sample, in a graph where that works
    sample: float = 400e-6     # what a sample of repeated calls lasts at the least
    long: float = 20e-3        # longer calls are tried only once before they are timed
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quantiles of the samples during which the device was not throttled (of all, if most were).

    The device is asked once a round, after it; what it says then is held of every contender's sample of that round.
    """

    seconds: float       # the median
    q20: float
    q80: float
    samples: tuple[float, ...]
    throttled: tuple[int, ...]  # which samples
    calls: int           # per sample
    method: str          # "events"; "graph" replays; "host" where only the host has a clock
    caches: str          # "flushed" before each sample, inputs "rotated" beyond the cache, or "warm"
    host_seconds: float  # what the host spends on a call, the device's work not awaited
    note: str | None = None

    @property
    def mostly_throttled(self) -> bool:
        return 2 * len(self.throttled) > len(self.samples)


class TimedError(RuntimeError):
    """A contender failed while it was timed; `name` says which, `__cause__` how."""

    def __init__(self, name: str, cause: Exception):
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name


def measure(contenders: Mapping[str, Timed], stopwatch, effort: TimingBudget = TimingBudget()) -> tuple[dict[str, Timing], list[State]]:
    """Time contenders in turns; also what the device said after each round, if it says anything.

    `stopwatch` is a clock.Cuda, a clock.Host, or whatever has their methods. Raises ContenderError.
    """
    turns = InterleavedTimer(contenders, stopwatch, effort)
    turns.settle()
    least, most = effort.rounds
    rounds = max(least, min(most, round(effort.seconds * len(contenders) / max(turns.round_seconds, 1e-9))))
    for _ in range(rounds):
        turns.take()
    return {name: turns.timing(name) for name in contenders}, turns.states


class InterleavedTimer:
    """Contenders, each tried, that are timed round by round. What raises does so as a ContenderError."""

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
        """What a round of all takes, about."""
        return sum(sampler.estimate * sampler.repeats for sampler in self._samplers.values())

    def settle(self) -> None:
        """Work until the clock stops moving."""
        _settle(self._samplers, self._stopwatch, self._effort)

    def take(self) -> None:
        """One more sample of each, in another order than the last."""
        self._rng.shuffle(self._order)
        for name in self._order:
            _apply(name, self._samplers[name].around, self._samplers[name].take)
        if (state := self._stopwatch.state()) is not None:
            self.states.append(state)
            if state.throttled:
                for sampler in self._samplers.values():
                    sampler.throttled.append(len(sampler.samples) - 1)

    def timing(self, name: str) -> Timing:
        """What the samples of one say."""
        return self._samplers[name].timing()


def _apply(name, around, action):
    try:
        with around():
            return action()
    except Exception as error:
        raise TimedError(name, error) from error


def _settle(samplers, stopwatch, effort):
    """Work until the clock stops moving: idle devices run slow, cool ones fast."""
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
    """Whether the last reads agree, as many as it takes to span SPAN seconds."""
    last, clocks = reads[-1][0], []
    for now, clock in reversed(reads):
        clocks.append(clock)
        if last - now >= SPAN:
            return max(clocks) - min(clocks) <= STEADY * max(clocks)
    return False


class _Sampler:
    """One contender, ready to be sampled."""

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
        """Let several calls make a sample, in a graph if it can be; each copy of the inputs has the same number of turns."""
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
            # ending a capture that failed is an error of its own, raised over the one that tells why
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
    """The 20th, 50th and 80th percentile, interpolated between neighbours."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
