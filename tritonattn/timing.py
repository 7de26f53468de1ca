"""How long a call takes on a device: the one home of timing.

    settle the clocks, then in each round, in another order:   cold caches | wait | event | calls | event

Contenders take turns, so that whatever drifts (clocks, heat, neighbours) drifts for all alike. The wait lets the host
queue the calls before the device begins, so launches are not counted; `host_seconds` says what they cost.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .clock import Call, State


class Contender(NamedTuple):
    """The same call on one or several copies of its inputs, of so many bytes each."""

    calls: Sequence[Call]
    input_bytes: int = 0


@dataclass(frozen=True)
class Effort:
    """How much is spent. Times in seconds."""

    seconds: float = 0.5       # of samples, per contender
    rounds: tuple[int, int] = (7, 100)
    settle: tuple[float, float] = (0.1, 2.0)
    small: float = 100e-6      # shorter calls are repeated within a sample, in a graph where that works
    sample: float = 400e-6     # what a sample of short calls lasts at the least
    long: float = 20e-3        # longer calls are tried only once before they are timed
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quantiles of the samples during which the device was not throttled (of all, if most were)."""

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


class ContenderError(RuntimeError):
    """A contender failed while it was timed; `name` says which, `__cause__` how."""

    def __init__(self, name: str, cause: Exception):
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name


def measure(contenders: Mapping[str, Contender], device, effort: Effort = Effort()) -> tuple[dict[str, Timing], list[State]]:
    """Time contenders in turns; also what the device said after each round, if it says anything.

    `device` is a clock.Cuda, a clock.Host, or whatever has their methods. Raises ContenderError.
    """
    samplers = {name: _naming(name, lambda x=x: _Sampler(x, device, effort)) for name, x in contenders.items()}
    _settle(samplers, device, effort)
    spent = sum(sampler.estimate * sampler.repeats for sampler in samplers.values())
    least, most = effort.rounds
    rounds = max(least, min(most, round(effort.seconds * len(samplers) / max(spent, 1e-9))))
    order, rng, states = list(samplers), random.Random(effort.seed), []
    for index in range(rounds):
        rng.shuffle(order)
        for name in order:
            _naming(name, samplers[name].take)
        if (state := device.state()) is not None:
            states.append(state)
            for sampler in samplers.values():
                sampler.throttled += [index] * state.throttled
    return {name: sampler.timing() for name, sampler in samplers.items()}, states


def _naming(name, action):
    try:
        return action()
    except Exception as error:
        raise ContenderError(name, error) from error


def _settle(samplers, device, effort):
    """Work until the clock stops moving: idle devices run slow, cool ones fast."""
    least, most = effort.settle
    clocks, start = [], device.now()
    while (spent := device.now() - start) < most:
        for name, sampler in samplers.items():
            _naming(name, sampler.warm)
        state = device.state()
        clocks.append(state.clock if state else 0.0)
        steady = len(clocks) >= 4 and max(clocks[-4:]) - min(clocks[-4:]) <= 0.01 * max(clocks[-4:])
        if spent >= least and steady:
            return


class _Sampler:
    """One contender, ready to be sampled."""

    def __init__(self, contender: Contender, device, effort: Effort):
        self.device, self.samples, self.throttled, self.note = device, [], [], None
        for call in contender.calls:
            call()
        device.synchronize()
        first = contender.calls[0]
        self.host_seconds = device.host(first, 1)
        self.estimate = device.sample(first, 2 * self.host_seconds)
        if self.estimate < effort.long:
            times = min(10, math.ceil(effort.long / max(self.estimate, 1e-6)))
            self.host_seconds = statistics.median(device.host(first, times) for _ in range(5))
            self.estimate = min(device.sample(first, 2 * self.host_seconds) for _ in range(3))
        self.repeats, self.method, self.replay = 1, device.method, first
        if self.estimate < effort.small:
            self._repeat(contender.calls, effort)
        rotated = self.repeats > 1 and len(contender.calls) * contender.input_bytes >= 2 * device.cache_bytes > 0
        flushed = self.repeats == 1 and device.cache_bytes > 0
        self.caches = "flushed" if flushed else "rotated" if rotated else "warm"

    def _repeat(self, calls, effort):
        """Several calls make a sample; each copy of the inputs has the same number of turns."""
        turns = math.ceil(effort.sample / max(self.estimate, 1e-6) / len(calls))
        self.repeats = turns * len(calls)

        def in_turns():
            for _ in range(turns):
                for call in calls:
                    call()

        self.replay = in_turns
        try:
            self.replay, self.method = self.device.capture(in_turns), "graph"
        except Exception as error:
            self.note = f"no graph: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def warm(self):
        self.replay()
        self.device.synchronize()

    def take(self):
        wait = 2 * self.host_seconds * (1 if self.method == "graph" else self.repeats)
        self.samples.append(self.device.sample(self.replay, wait) / self.repeats)

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
