"""Benchmark results as perf/results stores them.

    <gpu>/<suite>-<digest>.jsonl     line 1: the plan, with the environment     then: journal entries, one per event

A job is one case in one direction with every implementation. Its entry is written when the job is complete. Each process
that works on a plan adds a session with its commit.
"""

from dataclasses import dataclass
from pathlib import Path

from tritonattn import Problem
from tritonattn.measure import journal

RESULTS = Path(__file__).parent / "results"
OURS = "tritonattn"


@dataclass(frozen=True)
class Result:
    """The outcome of one implementation in one job. Times are device seconds per call: the median and two quantiles."""

    name: str
    status: str                # "ok", "missing", "refused", "wrong" or "failed"
    reason: str | None = None  # set unless the status is "ok"
    seconds: float | None = None
    q20: float | None = None
    q80: float | None = None
    throttled: bool = False    # the GPU was throttled during most samples
    details: dict | None = None

    @property
    def ours(self) -> bool:
        """True for tritonattn and its variants, whose names begin with it."""
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Job:
    """A case in one direction ("forward", "backward" or "both") with the results of all implementations."""

    suite: str
    case: str
    problem: Problem
    direction: str
    results: dict[str, Result]

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.case}/{self.direction}"

    @property
    def timed(self) -> dict[str, Result]:
        """The results that are "ok"."""
        return {name: result for name, result in self.results.items() if result.status == "ok"}

    @property
    def ours(self) -> Result | None:
        """Our result, if it is "ok"."""
        return self.timed.get(OURS)

    @property
    def best_baseline(self) -> Result | None:
        """The fastest result that is "ok" and not ours."""
        baselines = [result for result in self.timed.values() if not result.ours]
        return min(baselines, key=lambda result: result.seconds, default=None)

    def tflops(self, seconds: float) -> float:
        """Return the rate of `seconds` per call in TFLOP/s of unmasked pairs (backward: 5 products, both: 7)."""
        parts = ("forward", "backward") if self.direction == "both" else (self.direction,)
        return sum(self.problem.flops(part) for part in parts) / seconds / 1e12


@dataclass(frozen=True)
class Run:
    """The contents of one file: the environment, and all complete jobs."""

    path: Path
    environment: dict
    jobs: list[Job]


def load(folder: Path = RESULTS) -> list[Run]:
    """Read all files of results under a folder, sorted by name. Raises JournalError for a broken file."""
    return [read(path) for path in sorted(folder.rglob("*.jsonl"))]


def read(path: Path) -> Run:
    """Read one file of results. The commit is that of the last session. Raises JournalError for a broken file."""
    head, entries = journal.read(path)
    environment = {"date": head["begun"]} | head["plan"]["environment"]
    for entry in entries:
        environment |= {"commit": entry["session"]["commit"]} if "session" in entry else {}
    return Run(path, environment, [job_of(entry) for entry in entries if "results" in entry])


def job_of(entry: dict) -> Job:
    """Return the job of a journal entry."""
    results = {name: Result(name, **fields) for name, fields in entry["results"].items()}
    return Job(entry["suite"], entry["case"], Problem.from_json(entry["problem"]), entry["direction"], results)
