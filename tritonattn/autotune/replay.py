"""A recorded sweep as a bench: search strategies run on it without a GPU, and their regret is known.

    regret = time of the config that was picked / time of the best config - 1
"""

import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .search import FAILURES, STRATEGIES, Budget, Search, run_search
from .trials import Run, Trial
from .worker_pool import Failure

# "table" takes configs from the tables, which a sweep need not contain
REPLAYED = tuple(name for name in STRATEGIES if name != "table")
CHECK_SECONDS = 0.05  # of a check, where the sweep has no time of it


class ReplayBench:
    """A search.Bench whose samples are drawn from recorded ones, on a virtual clock. Raises KeyError for other configs."""

    def __init__(self, trials: dict[str, Trial], seed: int = 0):
        self._trials, self._rng, self._check_seconds, self.device_seconds = trials, random.Random(seed), 0.0, 0.0

    def now(self) -> float:
        return self._check_seconds + self.device_seconds

    def prepare(self, configs: list[str]) -> None:
        """Do nothing: nothing is compiled."""

    def check(self, config: str) -> dict | Failure:
        trial = self._trials[config]
        self._check_seconds += trial.check_seconds or CHECK_SECONDS
        return trial.check if trial.samples else Failure(trial.status, trial.note)

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...]]:
        results = {}
        for trial in map(self._trials.get, configs):
            # the median becomes the ratio to the incumbent, in ms: drift between groups of the sweep cancels
            scale = 1e-3 * trial.ratio / trial.seconds
            results[trial.config] = tuple(self._rng.choice(trial.samples) * scale for _ in range(rounds))
        self.device_seconds += sum(map(sum, results.values()))
        return results


def comparable(trials: dict[str, Trial]) -> dict[str, Trial]:
    """Return the trials that were timed in the same rounds as the incumbent; only their `ratio` is known."""
    return {name: trial for name, trial in trials.items() if trial.samples and trial.beside}


@dataclass(frozen=True)
class Outcome:
    """The result of one strategy on one job."""

    job: str
    pick: str
    regret: float
    trials: int
    device_seconds: float


def replay(recorded: Run, strategy: str, seeds: Iterable[int] = range(5), budget: Budget | None = None) -> list[Outcome]:
    """Run a strategy on every job of a sweep that was timed, once for each seed."""
    outcomes = []
    for job in recorded.jobs:
        timed = comparable(recorded.of(job))
        trials = {name: trial for name, trial in recorded.of(job).items() if name in timed or not trial.samples}
        # pruned configs are not offered to a strategy
        offered = [name for name, trial in trials.items()
                   if trial.status == "ok" or (not trial.samples and trial.status in FAILURES)]
        if job.incumbent not in timed or not offered:
            continue
        best, static = min(trial.ratio for trial in timed.values()), {name: trial.static for name, trial in trials.items()}
        for seed in seeds:
            bench = ReplayBench(trials, seed)
            search = Search(replace(job, configs=tuple(offered)), bench, budget or Budget(), static)
            pick = run_search(search, strategy, seed).winner()
            if pick is not None:
                outcomes.append(Outcome(job.name, pick, timed[pick].ratio / best - 1, len(search.trials),
                                        bench.device_seconds))
    return outcomes


def summary(outcomes: list[Outcome]) -> dict:
    """Return the regret of a strategy (mean, 95th percentile, largest), and its mean number of configs and device seconds."""
    regrets = sorted(outcome.regret for outcome in outcomes)
    return {"jobs": len({outcome.job for outcome in outcomes}), "mean": statistics.fmean(regrets),
            "p95": regrets[min(len(regrets) - 1, int(0.95 * len(regrets)))], "largest": regrets[-1],
            "trials": statistics.fmean(outcome.trials for outcome in outcomes),
            "device_seconds": statistics.fmean(outcome.device_seconds for outcome in outcomes)}
