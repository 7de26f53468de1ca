"""Who is the fastest: configs are timed in turns, and fewer and fewer of them oftener and oftener.

    halving    all, one sample each -> those within half again of the best, three each -> the fastest third, nine each ->
               ... -> the last four, sixty each
    static     the incumbent, and the seven that the model expects to be the fastest
    table      what would be used anyway, and what the tables have for others of its kind: another job, not another race
    random     thirty of them, drawn          exhaustive    all of them, thirty samples each

A strategy says who is timed and how often; the race keeps what came of it, and who may not go on. Whoever is timed, the
incumbent is timed in the same rounds: only so is "faster" more than drift.
"""

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from .trials import Job, Trial
from .worker_pool import Failure

FAILURES = {
    "incorrect": "its results are off by more than rounding",
    "not repeatable": "two runs gave different bits",
    "launch error": "the device refused it, or the launch raised",
    "hang": "it did not come back in time",
    "device lost": "it ended the process, or left the device unusable",
}
TIE = 0.01     # share of the best time by which the incumbent may be slower and stay
UNKNOWN = 0.1  # the spread of one or two samples: a guess on the safe side
HOPELESS = 1.5               # halving: slower than this many times the best, after one sample, is out
FIRST, KEPT, LAST = 3, 3, 4  # then samples at first; one of so many goes on; so many are left at last
FINAL = 60                   # samples of those
SHORT, LONG = 10, 30         # samples where there is one rung alone
FEW, RANDOM = 8, 30           # configs of "static" and "random"


@dataclass
class Budget:
    """When a race ends at the latest. What was timed until then counts."""

    trials: int | None = None       # configs that are tried
    seconds: float = math.inf       # on the bench's clock; who was found right by then is timed once at least


class BudgetExhausted(Exception):
    """The budget is."""


@dataclass(frozen=True)
class Check:
    """Whether a config is right: the worst error of each tensor beside what it may be, over all inputs."""

    errors: dict = field(default_factory=dict)  # {tensor: (error, allowed)}
    reason: str | None = None                   # one of FAILURES; None: nothing is wrong
    note: str = ""


class Bench(Protocol):
    """Where configs, by their names, are checked and timed. A Failure is one config's; it has one of FAILURES."""

    def check(self, config: str) -> Check: ...
    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]: ...
    def now(self) -> float: ...


@dataclass
class Search:
    """One job on a bench. `trials` has what came of each config that was tried, in that order."""

    job: Job
    bench: Bench
    budget: Budget = field(default_factory=Budget)
    trials: dict[str, Trial] = field(default_factory=dict)

    def __post_init__(self):
        self._began, self._alone = self.bench.now(), False

    @property
    def alive(self) -> list[str]:
        """Those that nothing speaks against so far, as the job has them, the incumbent first."""
        names = dict.fromkeys((self.job.incumbent, *self.job.configs))
        return [name for name in names if name not in self.trials or self.trials[name].status == "ok"]

    def take(self, configs: Sequence[str], rounds: int) -> list[str]:
        """Time these and the incumbent in turns; those that came through, the fastest first. Raises Spent."""
        able = [name for name in dict.fromkeys((self.job.incumbent, *configs)) if self._right(name)]
        if self._late and any(trial.samples for trial in self.trials.values()):
            raise BudgetExhausted
        found = self.bench.times(able, rounds) if able else {}
        beside = found.get(self.job.incumbent, ())
        # without an incumbent to compare with, nobody takes its place
        self._alone |= isinstance(beside, Failure) and bool(self.trials[self.job.incumbent].samples)
        for name, samples in found.items():
            if isinstance(samples, Failure):
                change = {"status": samples.code, "note": samples.message, "samples": (), "beside": ()}
            else:
                change = {"samples": tuple(samples), "beside": () if isinstance(beside, Failure) else tuple(beside)}
            self.trials[name] = replace(self.trials[name], **change)
        timed = [name for name in dict.fromkeys(configs) if name in found and self.trials[name].status == "ok"]
        return sorted(timed, key=lambda name: (self.trials[name].seconds, name))

    def _right(self, name) -> bool:
        """Whether it may be timed: each is checked once, before that."""
        if name not in self.trials:
            if self.trials and (self._late or len(self.trials) >= (self.budget.trials or math.inf)):
                return False
            began, found = self.bench.now(), self.bench.check(name)
            self.trials[name] = Trial(self.job.name, name, found.reason or "ok", found.note, check=dict(found.errors),
                                      check_seconds=round(self.bench.now() - began, 3))
        return self.trials[name].status == "ok"

    @property
    def _late(self) -> bool:
        return self.bench.now() - self._began > self.budget.seconds

    def winner(self, shared_memory: Callable[[str], int] = lambda name: 0) -> str | None:
        """The fastest of those with the most samples. Nobody takes the incumbent's place for less than TIE or twice the
        spread of the median; of others that differ by no more than that spread, the one with less shared memory does.

        None: nothing could be timed, or the incumbent failed on the way.
        """
        if self._alone:
            return None
        timed = {name: trial for name, trial in self.trials.items() if trial.status == "ok" and trial.samples}
        if not timed:
            return None
        most = max(len(trial.samples) for trial in timed.values())
        last = {name: trial for name, trial in timed.items() if len(trial.samples) == most}
        best = min(last, key=lambda name: (last[name].seconds, name))
        unsure = 2 * spread(last[best].samples)
        if self.job.incumbent in last and last[self.job.incumbent].seconds <= last[best].seconds * (1 + max(TIE, unsure)):
            return self.job.incumbent
        equals = [name for name, trial in last.items() if trial.seconds <= last[best].seconds * (1 + unsure)]
        return min(equals, key=lambda name: (shared_memory(name), last[name].seconds, name))


def spread(samples: Sequence[float]) -> float:
    """How far the median of so many samples may lie off, as a share of it: its standard error, from their deviations."""
    if len(samples) < 3:
        return UNKNOWN
    middle = statistics.median(samples)
    deviation = statistics.median(abs(x - middle) for x in samples)
    # of a normal distribution: 1.48 deviations are one sigma, and a median is 1.25 times as uncertain as a mean
    return 1.48 * 1.25 * deviation / math.sqrt(len(samples)) / middle


Strategy = Callable[[Search, random.Random], None]


def halving(race: Search, rng: random.Random) -> None:
    left = race.take(race.alive, 1)
    limit = HOPELESS * race.trials[left[0]].seconds if left else 0.0
    left, rounds = [name for name in left if race.trials[name].seconds <= limit], FIRST
    while len(left) > LAST:
        left = race.take(left, rounds)
        left, rounds = left[:max(LAST, math.ceil(len(left) / KEPT))], rounds * 3
    race.take(left, FINAL)


def static(race: Search, rng: random.Random) -> None:
    race.take(race.alive[:FEW], SHORT)


def table(race: Search, rng: random.Random) -> None:
    race.take(race.alive, SHORT)


def randomly(race: Search, rng: random.Random) -> None:
    names = race.alive
    race.take(rng.sample(names, min(RANDOM, len(names))), SHORT)


def exhaustive(race: Search, rng: random.Random) -> None:
    race.take(race.alive, LONG)


STRATEGIES: dict[str, Strategy] = {
    "halving": halving, "static": static, "table": table, "random": randomly, "exhaustive": exhaustive,
}


def run_search(race: Search, strategy: str, seed: int = 0) -> Search:
    """Let a strategy have its way with a race until it is done or the budget is spent; what was timed until then counts."""
    with contextlib.suppress(BudgetExhausted):
        STRATEGIES[strategy](race, random.Random(seed))
    return race
