"""A fake bench: true times with the disturbances of a real GPU, on a virtual clock."""

import contextlib
import math
import random

from tritonattn.autotune import search
from tritonattn.autotune.worker_pool import Failure
from tritonattn.measure.timing import Windows

CLOCK = 1980.0  # MHz without a limit
DELAY = 0.05    # seconds after which the clock has followed most of a change of power
PAUSE = 1e-3    # seconds without load before each sample
STEP = 0.05     # of the simulation of a window


class FakeBench:
    """A stand-in for autotune.search.Bench. `true` is {config: seconds}.

    wrong, torn: configs with incorrect or unrepeatable results. hangs, poison: configs that hang, or lose the device, when
    they are timed. drift, jitter, spikes, regimes: disturbances of a shared GPU that warms up. watts: {config: power at the
    full clock, as a multiple of the limit}; where the mean of the last DELAY seconds exceeds 1, the clock falls.
    """

    def __init__(self, true, seed=0, drift=0.0, jitter=0.0, spikes=0.0, regimes=0.0, wrong=(), torn=(), hangs=(), poison=(),
                 distort=lambda config, seconds: seconds, watts=None):
        self.true, self.rng, self.time, self.device_seconds = true, random.Random(seed), 0.0, 0.0
        self.watts, self.load = watts, 0.0
        self.drift, self.jitter, self.spikes, self.regimes, self.regime = drift, jitter, spikes, regimes, 1.0
        self.wrong, self.torn, self.hangs, self.poison, self.distort = wrong, torn, hangs, poison, distort
        self.checked, self.timed, self.windowed, self.prepared = [], [], [], []

    def now(self):
        return self.time

    def prepare(self, configs):
        self.prepared += configs

    def stop_preparing(self):
        pass

    def check(self, config):
        self.checked.append(config)
        self.time += 0.01
        if config in self.wrong:
            return Failure("incorrect", "o is off")
        return Failure("not repeatable", "o") if config in self.torn else {"o": (1e-3, 2e-3)}

    def clock(self):
        """Return the clock now, as a share of CLOCK: power grows with its cube."""
        return min(1.0, max(self.load, 1e-9) ** (-1 / 3))

    def advance(self, seconds, watts=0.0):
        """Let the time pass with this power."""
        self.time += seconds
        self.load += (watts - self.load) * (1 - math.exp(-seconds / DELAY))

    def seconds(self, config):
        """Return the time of a launch now, without jitter."""
        warmth = 1 + self.drift * (1 - math.exp(-self.time / 4))
        return self.true[config] * warmth * self.regime / self.clock()

    def watts_of(self, config):
        return self.watts[config] if self.watts else 0.0

    def redraw_regime(self, launches):
        if self.rng.random() < 1 - (1 - self.regimes) ** launches:
            self.regime = self.rng.choice([1.0, 1.0, 1.015])

    def sample(self, config):
        """Return one sample at the present time of the virtual clock."""
        self.redraw_regime(1)
        if self.watts:
            self.advance(PAUSE)
        seconds = self.seconds(config) * math.exp(self.rng.gauss(0, self.jitter))
        seconds *= 1.3 if self.rng.random() < self.spikes else 1.0
        self.advance(seconds, self.watts_of(config))
        self.device_seconds += seconds
        return self.distort(config, seconds)

    def window(self, config):
        """Return the mean time of a launch, and of the clock, over a window."""
        launches, clocks = 0.0, []
        for _ in range(round(search.WINDOW_SECONDS / STEP)):
            self.redraw_regime(STEP / self.true[config])
            launches += STEP / (self.seconds(config) * (1 + 0.3 * self.spikes))
            clocks.append(CLOCK * self.clock())
            self.advance(STEP, self.watts_of(config))
        jitter = math.exp(self.rng.gauss(0, self.jitter / math.sqrt(launches)))
        return self.distort(config, search.WINDOW_SECONDS / launches * jitter), sum(clocks) / len(clocks)

    def times(self, configs, rounds):
        self.timed += configs
        failures, able = self.failures(configs)
        samples = {config: [] for config in able}
        for _ in range(rounds):
            self.rng.shuffle(able)
            for config in able:
                samples[config].append(self.sample(config))
        return failures | {config: tuple(each) for config, each in samples.items()}

    def windows(self, configs, rounds):
        """Follow the method of timing.InterleavedTimer.windows."""
        failures, able = self.failures(configs)
        self.windowed.append(tuple(able))
        windows = {config: [] for config in able}
        self.time += search.WARM_UP_SECONDS[0]
        for _ in range(rounds):
            self.rng.shuffle(able)
            for config in able:
                self.window(config)
                windows[config].append(self.window(config))
        return failures | {config: Windows(tuple(seconds for seconds, _ in each), each[-1][1] if self.watts else None)
                           for config, each in windows.items()}

    def failures(self, configs):
        """Return {config: failure}, and the other configs."""
        failures = {config: Failure("hang", "no answer") for config in configs if config in self.hangs}
        failures |= {config: Failure("device lost", "ended with -9") for config in configs if config in self.poison}
        return failures, [config for config in configs if config not in failures]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def bench_of(bench):
    """Return a factory of benches for TuningSetup that gives every job the same bench."""
    return lambda kernel, problem: contextlib.nullcontext(bench)
