"""What was measured, as the files in perf/results hold it, and how it is read back.

    <gpu>/<suite>-<digest>.jsonl     line 1: the plan, with the environment     then: one entry per job, and others

A job is one case in one direction with every contender, whose samples were interleaved; it is written when it is done.
Every process that works on a plan writes a session, with its commit; the kernels that ran are named after all timing.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tritonattn import Problem
from tritonattn.measure import journal

RESULTS = Path(__file__).parent / "results"
OURS = "tritonattn"


@dataclass(frozen=True)
class Result:
    """One contender at one job. Times are seconds per call on the device, the median and two quantiles."""

    contender: str
    status: str                # "ok"; else "missing", "refused", "wrong", "failed"
    reason: str | None = None  # why it is not ok
    seconds: float | None = None
    q20: float | None = None
    q80: float | None = None
    throttled: bool = False    # the device held its clocks back during most samples
    details: dict | None = None

    def tflops(self, job: "Job") -> float | None:
        """Floating-point operations of visible pairs per second, 1e12; backward counts five products, both counts seven."""
        return job.flops / self.seconds / 1e12 if self.seconds else None


@dataclass(frozen=True)
class Job:
    """A case in one direction ("forward", "backward" alone, "both"), with all results."""

    suite: str
    case: str
    problem: Problem
    direction: str
    results: dict[str, Result]

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.case}/{self.direction}"

    @property
    def flops(self) -> int:
        parts = ("forward", "backward") if self.direction == "both" else (self.direction,)
        return sum(self.problem.flops(part) for part in parts)

    @property
    def ours(self) -> Result | None:
        return self._ok(OURS)

    @property
    def best_rival(self) -> Result | None:
        """The fastest contender that is right and is not ours (whose variants carry our name in front)."""
        rivals = [self._ok(name) for name in self.results if not name.startswith(OURS)]
        return min((rival for rival in rivals if rival), key=lambda rival: rival.seconds, default=None)

    def _ok(self, name) -> Result | None:
        result = self.results.get(name)
        return result if result and result.status == "ok" else None


@dataclass(frozen=True)
class Run:
    """One file: where, with what, and all jobs that are done."""

    path: Path
    environment: dict
    jobs: list[Job]


def load(folder: Path = RESULTS) -> list[Run]:
    """Every file of results under a folder, in the order of their names; raises JournalError for a broken one."""
    return [read(path) for path in sorted(folder.rglob("*.jsonl"))]


def read(path: Path) -> Run:
    """One file of results; raises JournalError if it is broken. The commit is that of the last session."""
    head, entries = journal.read(path)
    environment = {"date": head["begun"]} | head["plan"]["environment"]
    for entry in entries:
        environment |= {"commit": entry["session"]["commit"]} if "session" in entry else {}
    named = {entry["named"]: entry["kernels"] for entry in entries if "named" in entry}
    return Run(path, environment, [job_of(entry, named.get(entry["job"])) for entry in entries if "results" in entry])


def job_of(entry: dict, kernels: dict[str, list[str]] | None = None) -> Job:
    """The job that an entry of the journal holds, with the kernels that each contender ran, if they are known."""
    results = {name: Result(name, **fields) for name, fields in entry["results"].items()}
    for name, ran in (kernels or {}).items():
        results[name] = replace(results[name], details=(results[name].details or {}) | {"kernels": ran})
    return Job(entry["suite"], entry["case"], Problem.from_json(entry["problem"]), entry["direction"], results)
