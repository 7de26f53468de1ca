"""A recorded sweep as a bench: search strategies run on it without a GPU, and their regret is known.

    regret = time of the config that was picked / time of the best config - 1        (trials.sustained_times)
"""

import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..measure.timing import Windows
from .search import FAILURES, STRATEGIES, WINDOW_SECONDS, Budget, Search, run_search
from .trials import Run, Trial, sustained_times
from .worker_pool import Failure

# "table" takes configs from the tables, which a sweep need not contain
REPLAYED = tuple(name for name in STRATEGIES if name != "table")
CHECK_SECONDS = 0.05  # of a check, where the sweep has no time of it


class ReplayBench:
    """A search.Bench whose samples are drawn from recorded ones, on a virtual clock. Raises KeyError for other configs.

    `device_seconds` are those of the samples, without the windows.
    """

    def __init__(self, trials: dict[str, Trial], seed: int = 0):
        self._trials, self._rng, self._other_seconds, self.device_seconds = trials, random.Random(seed), 0.0, 0.0
        self._sustained = sustained_times(comparable(trials))

    def now(self) -> float:
        return self._other_seconds + self.device_seconds

    def prepare(self, configs: list[str]) -> None:
        """Do nothing: nothing is compiled."""

    def stop_preparing(self) -> None:
        """Do nothing."""

    def check(self, config: str) -> dict | Failure:
        trial = self._trials[config]
        self._other_seconds += trial.check_seconds or CHECK_SECONDS
        return trial.check if trial.samples else Failure(trial.status, trial.note)

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...]]:
        results = {}
        for trial in map(self._trials.get, configs):
            # the median becomes the ratio to the incumbent, in ms: drift between groups of the sweep cancels
            results[trial.config] = self._draw(trial.samples, trial.ratio, rounds)
        self.device_seconds += sum(map(sum, results.values()))
        return results

    def windows(self, configs: list[str], rounds: int) -> dict[str, Windows]:
        """Return windows like the recorded ones; of a config without, at the time that it is expected to take."""
        self._other_seconds += len(configs) * rounds * 2 * WINDOW_SECONDS
        return {name: Windows(self._draw(self._trials[name].decisive, self._sustained[name], rounds), self._trials[name].clock)
                for name in configs}

    def _draw(self, samples, ratio, rounds):
        scale = 1e-3 * ratio / statistics.median(samples)
        return tuple(self._rng.choice(samples) * scale for _ in range(rounds))


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
        times, static = sustained_times(timed), {name: trial.static for name, trial in trials.items()}
        for seed in seeds:
            bench = ReplayBench(trials, seed)
            search = Search(replace(job, configs=tuple(offered)), bench, budget or Budget(), static)
            pick = run_search(search, strategy, seed).winner()
            if pick is not None:
                outcomes.append(Outcome(job.name, pick, times[pick] / min(times.values()) - 1, len(search.trials),
                                        bench.device_seconds))
    return outcomes


def summary(outcomes: list[Outcome]) -> dict:
    """Return the regret of a strategy (mean, 95th percentile, largest), and its mean number of configs and device seconds."""
    regrets = sorted(outcome.regret for outcome in outcomes)
    return {"jobs": len({outcome.job for outcome in outcomes}), "mean": statistics.fmean(regrets),
            "p95": regrets[min(len(regrets) - 1, int(0.95 * len(regrets)))], "largest": regrets[-1],
            "trials": statistics.fmean(outcome.trials for outcome in outcomes),
            "device_seconds": statistics.fmean(outcome.device_seconds for outcome in outcomes)}
