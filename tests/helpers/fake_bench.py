"""A fake bench: true times with the disturbances of a real GPU, on a virtual clock."""

import contextlib
import math
import random

from tritonattn.autotune.worker_pool import Failure


class FakeBench:
    """A stand-in for autotune.search.Bench. `true` is {config: seconds}.

    wrong, torn: configs with incorrect or unrepeatable results. hangs, poison: configs that hang, or lose the device, when
    they are timed. drift, jitter, spikes, regimes: disturbances of a shared GPU that warms up.
    """

    def __init__(self, true, seed=0, drift=0.0, jitter=0.0, spikes=0.0, regimes=0.0, wrong=(), torn=(), hangs=(), poison=(),
                 distort=lambda config, seconds: seconds):
        self.true, self.rng, self.time, self.device_seconds = true, random.Random(seed), 0.0, 0.0
        self.drift, self.jitter, self.spikes, self.regimes, self.regime = drift, jitter, spikes, regimes, 1.0
        self.wrong, self.torn, self.hangs, self.poison, self.distort = wrong, torn, hangs, poison, distort
        self.checked, self.timed, self.prepared = [], [], []

    def now(self):
        return self.time

    def prepare(self, configs):
        self.prepared.append(list(configs))

    def check(self, config):
        self.checked.append(config)
        self.time += 0.01
        if config in self.wrong:
            return Failure("incorrect", "o is off")
        return Failure("not repeatable", "o") if config in self.torn else {"o": (1e-3, 2e-3)}

    def sample(self, config):
        """Return one sample at the present time of the virtual clock."""
        if self.rng.random() < self.regimes:
            self.regime = self.rng.choice([1.0, 1.0, 1.015])
        warmth = 1 + self.drift * (1 - math.exp(-self.time / 4))
        seconds = self.true[config] * warmth * self.regime * math.exp(self.rng.gauss(0, self.jitter))
        seconds *= 1.3 if self.rng.random() < self.spikes else 1.0
        self.time, self.device_seconds = self.time + seconds, self.device_seconds + seconds
        return self.distort(config, seconds)

    def times(self, configs, rounds):
        self.timed += configs
        failures = {config: Failure("hang", "no answer") for config in configs if config in self.hangs}
        failures |= {config: Failure("device lost", "ended with -9") for config in configs if config in self.poison}
        able, samples = [config for config in configs if config not in failures], {}
        for _ in range(rounds):
            self.rng.shuffle(able)
            for config in able:
                samples.setdefault(config, []).append(self.sample(config))
        return failures | {config: tuple(each) for config, each in samples.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def bench_of(bench):
    """Return a factory of benches for TuningSetup that gives every job the same bench."""
    return lambda kernel, problem: contextlib.nullcontext(bench)
