"""Search strategies over interleaved timings: which configs are timed, and how many samples each gets.

    halving     one sample of each config -> the configs within 1.5 times the best, three samples -> the fastest third, nine
                -> ... -> the last four: successive halving (Jamieson & Talwalkar 2016)
    static      the incumbent and the seven configs that the model ranks first
    table       the incumbent and at most seven of what the shipped tables hold for similar problems (the job differs)
    random      thirty configs, drawn        exhaustive   all configs, thirty samples each

The incumbent, the config that calls currently use, is timed in every round, so that clock and thermal drift affect both
sides of a comparison equally.

Samples are short and have pauses between them, so all configs are ranked at about the same, high clock. In a training run
the GPU reaches its power limit, and the clock falls more for a config that needs more power. So the four fastest, and the
incumbent, are finally timed under continuous load:

    the configs in turns, until the device is warm
    four rounds, in random order:   half a second of launches of a config, not timed | half a second, timed (a window)

The result of a window is the mean time of its launches; the medians of the windows decide. The untimed half comes before
every window, because the clock follows the power with a delay: without it a window would start at the previous config's clock.
If `Budget.seconds` leaves too little time for all windows, the same configs get sixty samples each instead. "table" has no
windows: first calls (first_call.py) use it, and must not wait half a minute.
"""

import contextlib
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..measure.timing import Windows
from .trials import Job, Trial
from .worker_pool import Failure

FAILURES = {
    "incorrect": "a result differs from the definition by more than rounding",
    "not repeatable": "two runs gave different bits",
    "launch error": "the launch raised an error, or made the device unusable",
    "hang": "it did not finish in time",
    "device lost": "it ended the process",
}
INCUMBENT_MARGIN = 0.01  # the incumbent stays if it is slower than the best by at most this share
UNKNOWN_SPREAD = 0.1     # the assumed spread of one or two samples
HALVING_CUTOFF = 1.5     # multiple of the best time beyond which a config is dropped after one sample
HALVING_SAMPLES, HALVING_FACTOR = 3, 3  # samples of the second rung; then three times as many for a third of the configs
QUICK_CONFIGS, QUICK_SAMPLES = 8, 10    # "static" and "table"; "random" has as many samples
RANDOM_CONFIGS, EXHAUSTIVE_SAMPLES = 30, 30
FINAL_SAMPLES = 60                      # of the last configs, if there is no time for windows
SUSTAINED_CONFIGS, WINDOWS = 4, 4       # configs that are timed in windows, besides the incumbent, and windows of each
WINDOW_SECONDS = 0.5                    # of a window, and of its warm-up
WARM_UP_SECONDS = (2.0, 5.0)            # of load before the first window: the least, and the most until the clock is steady


@dataclass
class Budget:
    """Limits of a search. At the end of the budget the samples so far decide."""

    trials: int | None = None       # configs
    seconds: float = math.inf       # on the bench's clock; configs that were checked are still timed once


class BudgetExhausted(Exception):
    """The budget is used up."""


class Bench(Protocol):
    """Checks and times configs by their names. A Failure concerns one config; its code is one of FAILURES."""

    def prepare(self, configs: list[str]) -> None: ...  # that will be checked, in this order
    def stop_preparing(self) -> None: ...  # before anything is timed
    def check(self, config: str) -> dict[str, tuple[float, float]] | Failure: ...  # {tensor: (worst error, allowed)}
    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]: ...
    def windows(self, configs: list[str], rounds: int) -> dict[str, Windows | Failure]: ...
    def now(self) -> float: ...


@dataclass
class Search:
    """The search for the best config of one job. `trials` holds the result of each config, in the order of trying."""

    job: Job
    bench: Bench
    budget: Budget = field(default_factory=Budget)
    static: dict[str, dict] = field(default_factory=dict)  # properties of the binaries, as far as they are known
    trials: dict[str, Trial] = field(default_factory=dict)
    problems: int = 1  # that the bench times

    def __post_init__(self):
        self._start, self._lost_incumbent = self.bench.now(), False

    @property
    def candidates(self) -> list[str]:
        """The configs of the job that have not failed, in its order, after the incumbent."""
        names = dict.fromkeys((self.job.incumbent, *self.job.configs))
        return [name for name in names if name not in self.trials or self.trials[name].status == "ok"]

    def time_round(self, configs: Sequence[str], rounds: int) -> list[str]:
        """Time these configs and the incumbent, interleaved. Return those that did not fail, the fastest first.

        Raises BudgetExhausted.
        """
        new = [name for name in dict.fromkeys((self.job.incumbent, *configs)) if name not in self.trials]
        if new and not self._is_late:
            left = len(new) if self.budget.trials is None else self.budget.trials - len(self.trials)
            self.bench.prepare(new[:left])
        correct = [name for name in dict.fromkeys((self.job.incumbent, *configs)) if self._is_correct(name)]
        if self._is_late and any(trial.samples for trial in self.trials.values()):
            raise BudgetExhausted
        results = self.bench.times(correct, rounds) if correct else {}
        self._record_failures(results)
        beside = results.get(self.job.incumbent, ())
        for name, samples in results.items():
            if not isinstance(samples, Failure):
                self.trials[name] = replace(self.trials[name], samples=tuple(samples),
                                            beside=() if isinstance(beside, Failure) else tuple(beside))
        timed = [name for name in dict.fromkeys(configs) if name in results and self.trials[name].status == "ok"]
        return sorted(timed, key=lambda name: (self.trials[name].seconds, name))

    def time_windows(self, configs: Sequence[str]) -> None:
        """Time these configs and the incumbent, which were timed before, in windows.

        If the budget has too little time for all windows, take FINAL_SAMPLES of each config instead. Raises BudgetExhausted.
        """
        last = [name for name in dict.fromkeys((self.job.incumbent, *configs)) if self.trials[name].status == "ok"]
        needed = self.problems * (WARM_UP_SECONDS[1] + WINDOWS * len(last) * 2 * WINDOW_SECONDS)
        if self.bench.now() + needed > self._start + self.budget.seconds:
            self.time_round(last, FINAL_SAMPLES)
            return
        results = self.bench.windows(last, WINDOWS) if last else {}
        self._record_failures(results)
        beside = results.get(self.job.incumbent)
        for name, windows in results.items():
            if not isinstance(windows, Failure):
                self.trials[name] = replace(self.trials[name], windows=windows.seconds, clock=windows.clock,
                                            windows_beside=beside.seconds if isinstance(beside, Windows) else ())

    def _record_failures(self, results):
        """Record the configs that failed."""
        for name, result in results.items():
            if isinstance(result, Failure):
                # the samples of earlier rounds can no longer be compared with later ones
                self._lost_incumbent |= name == self.job.incumbent and bool(self.trials[name].samples)
                self.trials[name] = replace(self.trials[name], status=result.code, note=result.message, samples=(), beside=(),
                                            windows=(), windows_beside=(), clock=None)

    def _is_correct(self, name) -> bool:
        """Return whether a config may be timed. Each is checked once; beyond the budget only the first is."""
        if name not in self.trials:
            if self.trials and (self._is_late or len(self.trials) >= (self.budget.trials or math.inf)):
                return False
            start, result = self.bench.now(), self.bench.check(name)
            outcome = ({"status": result.code, "note": result.message} if isinstance(result, Failure) else
                       {"status": "ok", "check": result})
            self.trials[name] = Trial(self.job.name, name, static=self.static.get(name, {}),
                                      check_seconds=round(self.bench.now() - start, 3), **outcome)
        return self.trials[name].status == "ok"

    @property
    def _is_late(self) -> bool:
        return self.bench.now() - self._start > self.budget.seconds

    def winner(self) -> str | None:
        """Return the fastest config among those with windows, or without any among those with the most samples.

        The incumbent stays if it is slower by less than INCUMBENT_MARGIN or twice the spread of the median. Without windows,
        other configs that differ by less than that spread are equal, and the one with the least shared memory wins. There is
        no winner if nothing could be timed, or the incumbent failed after it had been timed.
        """
        timed = {name: trial for name, trial in self.trials.items() if trial.status == "ok" and trial.samples}
        if not timed or self._lost_incumbent:
            return None
        most = max(len(trial.samples) for trial in timed.values())
        last = ({name: trial for name, trial in timed.items() if trial.windows} or
                {name: trial for name, trial in timed.items() if len(trial.samples) == most})
        best = min(last, key=lambda name: (last[name].seconds, name))
        margin = 2 * spread(last[best].decisive)
        tie = last[best].seconds * (1 + max(INCUMBENT_MARGIN, margin))
        if self.job.incumbent in last and last[self.job.incumbent].seconds <= tie:
            return self.job.incumbent
        if last[best].windows:
            # a mean over half a second of launches has little noise, so there is no tie to break
            return best
        equals = [name for name, trial in last.items() if trial.seconds <= last[best].seconds * (1 + margin)]
        return min(equals, key=lambda name: (last[name].static.get("shared_memory", 0), last[name].seconds, name))


def spread(samples: Sequence[float]) -> float:
    """Return the standard error of the median of these samples, as a share of it."""
    if len(samples) < 3:
        return UNKNOWN_SPREAD
    middle = statistics.median(samples)
    deviation = statistics.median(abs(x - middle) for x in samples)
    # normal distribution: sigma is 1.48 median absolute deviations, and the median's error 1.25 times that of the mean
    return 1.48 * 1.25 * deviation / math.sqrt(len(samples)) / middle


def halving(search: Search) -> list[str]:
    """Successive halving; the module's docstring has the schedule. Return the last configs, the fastest first."""
    names = search.time_round(search.candidates, 1)
    limit = HALVING_CUTOFF * search.trials[names[0]].seconds if names else 0.0
    names, rounds = [name for name in names if search.trials[name].seconds <= limit], HALVING_SAMPLES
    while len(names) > SUSTAINED_CONFIGS:
        names = search.time_round(names, rounds)
        names, rounds = names[:max(SUSTAINED_CONFIGS, math.ceil(len(names) / HALVING_FACTOR))], rounds * HALVING_FACTOR
    return names


STRATEGIES = ("halving", "static", "table", "random", "exhaustive")


def run_search(search: Search, strategy: str, seed: int = 0) -> Search:
    """Run a strategy until it is done or the budget is used up, and return the search. Raises ValueError."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    names = search.candidates
    with contextlib.suppress(BudgetExhausted):
        if strategy == "halving":
            names = halving(search)
        elif strategy == "random":
            names = search.time_round(random.Random(seed).sample(names, min(RANDOM_CONFIGS, len(names))), QUICK_SAMPLES)
        elif strategy == "exhaustive":
            names = search.time_round(names, EXHAUSTIVE_SAMPLES)
        else:
            names = search.time_round(names[:QUICK_CONFIGS], QUICK_SAMPLES)
        if strategy != "table":
            search.time_windows(names[:SUSTAINED_CONFIGS])
    return search
