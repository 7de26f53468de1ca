"""A folder that holds a sweep: what was planned, what came of each config, and where.

    plan.json         kernels, problems and configs, frozen; its digest is in the first line of the results
    results.jsonl     a journal: one line per config that was tried, in the order of trying
    environment.json  GPU, versions, clocks: what a number needs to be believed
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..measure import journal
from ..problem import Problem

PLAN, RESULTS, ENVIRONMENT = "plan.json", "results.jsonl", "environment.json"
SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """One kernel of one problem, and the configs to be tried."""

    kernel: str
    problem: Problem
    configs: tuple[str, ...]  # in the order of the static ranking, those first that are expected to be the fastest
    incumbent: str            # what a call would have used before; among the configs

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.problem}"

    def as_json(self) -> dict:
        return {"kernel": self.kernel, "problem": self.problem.as_json(), "configs": list(self.configs),
                "incumbent": self.incumbent}

    @staticmethod
    def from_json(content: dict) -> "Job":
        return Job(content["kernel"], Problem.from_json(content["problem"]), tuple(content["configs"]), content["incumbent"])


@dataclass(frozen=True)
class Trial:
    """What came of one config. Times in seconds."""

    job: str       # its name
    config: str
    status: str    # "ok", one of survey.REASONS, or one of race.FAILURES
    note: str = ""
    samples: tuple[float, ...] = ()  # of one launch each; round by round in turns with those `beside`
    beside: tuple[float, ...] = ()   # the incumbent's, in the same rounds: what drifts has drifted for both
    check: dict = field(default_factory=dict)   # {tensor: [error, allowed]}, the worst over all inputs
    static: dict = field(default_factory=dict)  # registers, stack, shared_memory, tensor_memory, occupancy, bound, cycles
    check_seconds: float = 0.0  # until it was found right or not, compiling included

    @property
    def seconds(self) -> float | None:
        """The median of the samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def ratio(self) -> float | None:
        """The time as a multiple of the incumbent's: the median over the rounds. What drifts does not touch it."""
        return statistics.median(a / b for a, b in zip(self.samples, self.beside)) if self.beside else None

    def as_json(self) -> dict:
        return asdict(self) | {"samples": list(self.samples), "beside": list(self.beside)}

    @staticmethod
    def from_json(content: dict) -> "Trial":
        known = {name: content[name] for name in Trial.__dataclass_fields__ if name in content}
        return Trial(**known | {name: tuple(content[name]) for name in ("samples", "beside")})


@dataclass(frozen=True)
class Run:
    """A sweep as it was recorded, finished or not."""

    plan: dict
    jobs: tuple[Job, ...]
    trials: tuple[Trial, ...]
    environment: dict

    def of(self, job: Job) -> dict[str, Trial]:
        """{config: its trial} of one job, in the order of its configs."""
        found = {trial.config: trial for trial in self.trials if trial.job == job.name}
        return {config: found[config] for config in job.configs if config in found}

    @property
    def synthetic(self) -> bool:
        """Whether no GPU was timed, and numbers are made up for tests and demonstrations."""
        return bool(self.plan.get("synthetic"))


def read(folder: Path) -> Run:
    """The run in a folder. Raises journal.JournalError: none is there, or its results are of another plan."""
    try:
        plan = json.loads((folder / PLAN).read_text())
        head, entries = journal.read(folder / RESULTS)
        if head["plan"] != {"digest": journal.digest(plan)}:
            raise journal.JournalError(f"{folder}: expected results of its plan {journal.digest(plan)}, got {head['plan']}")
        environment = json.loads((folder / ENVIRONMENT).read_text())
        jobs = tuple(Job.from_json(job) for job in plan["jobs"])
        return Run(plan, jobs, tuple(Trial.from_json(entry) for entry in entries if "config" in entry), environment)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise journal.JournalError(f"{folder}: expected a sweep, got {type(error).__name__}: {error}") from error
