"""A bench without a GPU: true times, and on top of them all that a real one does to them, on a virtual clock."""

import contextlib
import math
import random

from tritonattn.autotune.search import Check
from tritonattn.autotune.worker_pool import Failure


class FakeBench:
    """Has the methods of race.Bench. `true` has the seconds of each config.

    wrong, torn: configs with incorrect or unrepeatable results; hangs, poison: those that hang, or lose the device, when
    they are timed. Drift, jitter, spikes and regimes as in a GPU that warms up among neighbours.
    """

    def __init__(self, true, seed=0, drift=0.0, jitter=0.0, spikes=0.0, regimes=0.0, wrong=(), torn=(), hangs=(), poison=(),
                 distort=lambda config, seconds: seconds):
        self.true, self.rng, self.time, self.device_seconds = true, random.Random(seed), 0.0, 0.0
        self.drift, self.jitter, self.spikes, self.regimes, self.regime = drift, jitter, spikes, regimes, 1.0
        self.wrong, self.torn, self.hangs, self.poison, self.distort = wrong, torn, hangs, poison, distort
        self.checked, self.timed = [], []

    def now(self):
        return self.time

    def check(self, config):
        self.checked.append(config)
        self.time += 0.01
        if config in self.wrong:
            return Check({}, "incorrect", "o is off")
        return Check({}, "not repeatable", "o") if config in self.torn else Check({"o": (1e-3, 2e-3)})

    def sample(self, config):
        """One sample, at this moment of the virtual clock."""
        if self.rng.random() < self.regimes:
            self.regime = self.rng.choice([1.0, 1.0, 1.015])
        warmth = 1 + self.drift * (1 - math.exp(-self.time / 4))
        seconds = self.true[config] * warmth * self.regime * math.exp(self.rng.gauss(0, self.jitter))
        seconds *= 1.3 if self.rng.random() < self.spikes else 1.0
        self.time, self.device_seconds = self.time + seconds, self.device_seconds + seconds
        return self.distort(config, seconds)

    def times(self, configs, rounds):
        self.timed += configs
        found = {config: Failure("hang", "no answer") for config in configs if config in self.hangs}
        found |= {config: Failure("device lost", "ended with -9") for config in configs if config in self.poison}
        able, samples = [config for config in configs if config not in found], {}
        for _ in range(rounds):
            self.rng.shuffle(able)
            for config in able:
                samples.setdefault(config, []).append(self.sample(config))
        return found | {config: tuple(each) for config, each in samples.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def bench_of(bench):
    """As tuner.Lab has it: the same bench for every job."""
    return lambda kernel, problem: contextlib.nullcontext(bench)
