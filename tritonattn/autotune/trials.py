"""The record of a sweep: a folder with one journal, sweep.jsonl.

    line 1        the plan, frozen: kernels, problems, configs, what is known of their binaries, and the environment
    other lines   one trial each, in the order of trying
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..measure import journal
from ..problem import Problem

JOURNAL = "sweep.jsonl"  # a folder with this file has a sweep
SCHEMA = 2


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
    check_seconds: float = 0.0  # compiling included

    @property
    def seconds(self) -> float | None:
        """The median of the samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def ratio(self) -> float | None:
        """The time as a multiple of the incumbent's: the median over the rounds, in which clock drift cancels."""
        return statistics.median(a / b for a, b in zip(self.samples, self.beside)) if self.beside else None

    @staticmethod
    def from_json(content: dict) -> "Trial":
        """Return the trial with these `vars`."""
        return Trial(**content | {"samples": tuple(content["samples"]), "beside": tuple(content["beside"])})


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
