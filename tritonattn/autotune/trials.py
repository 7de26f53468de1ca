"""The record of a sweep: a folder with one journal, sweep.jsonl.

    line 1        the plan, frozen: kernels, problems, configs, what is known of their binaries, and the environment
    other lines   one trial each, in the order of trying; the last configs of a job once more, with their windows
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..measure import journal
from ..problem import Problem

JOURNAL = "sweep.jsonl"  # a folder with this file has a sweep
SCHEMA = 3


@dataclass(frozen=True)
class Job:
    """One kernel of one problem, and the configs to be tried."""

    kernel: str
    problem: Problem
    configs: tuple[str, ...]  # by their modelled time, the fastest first
    incumbent: str            # the config that calls use so far; one of the configs

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.problem}"

    def as_json(self) -> dict:
        return vars(self) | {"problem": self.problem.as_json()}

    @staticmethod
    def from_json(content: dict) -> "Job":
        return Job(**content | {"problem": Problem.from_json(content["problem"]), "configs": tuple(content["configs"])})


@dataclass(frozen=True)
class Trial:
    """The result of one config. Times in seconds."""

    job: str       # its name
    config: str
    status: str    # "ok", one of prune.REASONS, or one of search.FAILURES
    note: str = ""
    samples: tuple[float, ...] = ()  # one launch each
    beside: tuple[float, ...] = ()   # the incumbent's samples in the same rounds
    check: dict = field(default_factory=dict)   # {tensor: [error, allowed]}, the worst over all inputs
    static: dict = field(default_factory=dict)  # registers, stack, shared_memory, tensor_memory, occupancy, bound, cycles
    check_seconds: float = 0.0  # with the wait for its binaries, which are compiled next to those of other configs
    windows: tuple[float, ...] = ()         # mean seconds of a launch under continuous load, in one window each
    windows_beside: tuple[float, ...] = ()  # the incumbent's windows in the same rounds
    clock: float | None = None              # MHz, the median over the windows; None: unknown

    @property
    def decisive(self) -> tuple[float, ...]:
        """The windows, or without any the samples."""
        return self.windows or self.samples

    @property
    def seconds(self) -> float | None:
        """The median of the windows, or without any of the samples."""
        return statistics.median(self.decisive) if self.decisive else None

    @property
    def ratio(self) -> float | None:
        """The time of the samples as a multiple of the incumbent's: the median over the rounds, so that clock drift cancels."""
        return _ratio(self.samples, self.beside)

    @property
    def sustained_ratio(self) -> float | None:
        """The time of the windows as a multiple of the incumbent's."""
        return _ratio(self.windows, self.windows_beside)

    @staticmethod
    def from_json(content: dict) -> "Trial":
        """Return the trial with these `vars`."""
        tuples = ("samples", "beside", "windows", "windows_beside")
        return Trial(**content | {name: tuple(content[name]) for name in tuples})


def _ratio(times, beside):
    return statistics.median(a / b for a, b in zip(times, beside)) if beside else None


def sampled_times(trials: dict[str, Trial]) -> dict[str, float]:
    """Return {config: time of its samples}, the fastest first: multiples of the incumbent's in the same rounds, or seconds if
    the incumbent could not be timed."""
    ratios = {name: trial.ratio for name, trial in trials.items() if trial.beside}
    times = ratios or {name: statistics.median(trial.samples) for name, trial in trials.items() if trial.samples}
    return dict(sorted(times.items(), key=lambda item: item[1]))


def sustained_times(trials: dict[str, Trial]) -> dict[str, float]:
    """Return {config: time under continuous load}, the fastest first, in the units of `sampled_times`.

    Only the last configs of a job have windows. A config without windows gets the fastest windowed time multiplied by the
    ratio of their samples, at least 1.
    """
    sampled = sampled_times(trials)
    last = {name: trials[name].sustained_ratio or trials[name].seconds for name in sampled if trials[name].windows}
    if not last:
        return sampled
    best = min(last, key=last.get)
    unit = 1.0 if trials[best].windows_beside else sampled[best] / last[best]  # without the incumbent these are seconds
    times = {name: unit * (last[name] if name in last else last[best] * max(1.0, time / sampled[best]))
             for name, time in sampled.items()}
    return dict(sorted(times.items(), key=lambda item: (item[1], item[0] not in last)))


@dataclass(frozen=True)
class Run:
    """A recorded sweep, finished or not."""

    plan: dict
    jobs: tuple[Job, ...]
    trials: tuple[Trial, ...]

    def of(self, job: Job) -> dict[str, Trial]:
        """Return {config: trial} of one job, in the order of its configs; of repeated trials the last."""
        trials = {trial.config: trial for trial in self.trials if trial.job == job.name}
        return {config: trials[config] for config in job.configs if config in trials}

    @property
    def environment(self) -> dict:
        return self.plan["environment"]

    @property
    def synthetic(self) -> bool:
        """True if the times are made up, for tests and demonstrations."""
        return bool(self.plan.get("synthetic"))


def read(folder: Path) -> Run:
    """Read the sweep in a folder. Raises journal.JournalError if there is none."""
    try:
        head, entries = journal.read(folder / JOURNAL)
        if (schema := head["plan"]["schema"]) != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, got {schema}")
        jobs = tuple(Job.from_json(job) for job in head["plan"]["jobs"])
        return Run(head["plan"], jobs, tuple(Trial.from_json(entry) for entry in entries))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise journal.JournalError(f"{folder}: no sweep can be read: {type(error).__name__}: {error}") from error
