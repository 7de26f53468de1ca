"""A recorded sweep as a bench: any strategy can be tried on it without a GPU, and its regret is known.

    regret = true time of the pick / true best - 1         what was never timed cannot be asked for
"""

import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .search import FAILURES, STRATEGIES, Budget, Check, Search, run_search
from .trials import Job, Run, Trial
from .worker_pool import Failure

# "table" offers other configs, which a sweep need not have
REPLAYED = tuple(name for name in STRATEGIES if name != "table")
CHECKED = 0.05  # seconds that a check takes, where a sweep does not say


class Recorded:
    """Has the methods of race.Bench; its clock moves by what the samples say. Samples are drawn from those recorded."""

    def __init__(self, trials: dict[str, Trial], seed: int = 0):
        self._trials, self._rng, self._time = trials, random.Random(seed), 0.0
        self.device_seconds = 0.0

    def now(self) -> float:
        return self._time

    def _of(self, config):
        if config not in self._trials:
            raise KeyError(f"{config}: expected a config that the sweep tried, got one that it did not")
        return self._trials[config]

    def check(self, config: str) -> Check:
        trial = self._of(config)
        self._time += trial.check_seconds or CHECKED
        return Check(trial.check) if trial.samples else Check({}, trial.status, trial.note)

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        # what drifted while the sweep ran has drifted for the incumbent too: only the ratio is the config's own
        scale = {config: _scale(self._of(config)) for config in configs}
        found = {config: tuple(self._rng.choice(self._of(config).samples) * scale[config] for _ in range(rounds))
                 for config in configs}
        spent = sum(map(sum, found.values()))
        self._time, self.device_seconds = self._time + spent, self.device_seconds + spent
        return found


def _scale(trial: Trial) -> float:
    """What brings the samples' median to its ratio to the incumbent, whose time is 1 ms then."""
    return 1e-3 * trial.ratio / trial.seconds


def comparable(trials: dict[str, Trial]) -> dict[str, Trial]:
    """Those that were timed in the same rounds as the incumbent: only their `ratio` can be told."""
    return {name: trial for name, trial in trials.items() if trial.samples and trial.beside}


@dataclass(frozen=True)
class Outcome:
    """What a strategy came to on one job."""

    job: str
    strategy: str
    seed: int
    pick: str
    regret: float
    trials: int
    device_seconds: float


def replay(recorded: Run, strategy: str, seeds: Iterable[int] = range(5), budget: Budget | None = None) -> list[Outcome]:
    """Let a strategy run on every job of a sweep that was timed, once for each seed."""
    found = []
    for job in recorded.jobs:
        trials = recorded.of(job)
        right = comparable(trials)
        # what lost its incumbent on the way says nothing
        trials = {name: trial for name, trial in trials.items() if name in right or not trial.samples}
        # what the lens was against is not offered to a strategy
        offered = Job(job.kernel, job.problem, tuple(name for name, trial in trials.items() if trial.status == "ok" or (
            not trial.samples and trial.status in FAILURES)), job.incumbent)
        if job.incumbent not in right or not offered.configs:
            continue
        best = min(trial.ratio for trial in right.values())
        for seed in seeds:
            bench = Recorded(trials, seed)
            race = run_search(Search(offered, bench, budget or Budget()), strategy, seed)
            pick = race.winner(lambda name, trials=trials: trials[name].static.get("shared_memory", 0))
            if pick is not None:
                found.append(Outcome(job.name, strategy, seed, pick, right[pick].ratio / best - 1, len(race.trials),
                                     bench.device_seconds))
    return found


def summary(outcomes: list[Outcome]) -> dict:
    """Regret (mean, p95 and largest), configs tried and device seconds of one strategy, on average."""
    regrets = sorted(outcome.regret for outcome in outcomes)
    return {"jobs": len({outcome.job for outcome in outcomes}), "mean": statistics.fmean(regrets),
            "p95": regrets[min(len(regrets) - 1, int(0.95 * len(regrets)))], "largest": regrets[-1],
            "trials": statistics.fmean(outcome.trials for outcome in outcomes),
            "device_seconds": statistics.fmean(outcome.device_seconds for outcome in outcomes)}
