"""Run a benchmark suite: python -m perf.run --suite paper --baselines all --out perf/results/

Each job is one case in one direction: every implementation is checked against the definition, and the correct ones are
timed together, interleaved. Each job adds a line to <out>/<gpu>/<suite>-<digest>.jsonl. The digest covers the cases, the
implementations and their versions, the timing budget, the GPU, the software versions and the source that runs. After an
interruption or a kill, the same command continues with the jobs that are left.

Exit codes: 0 complete, or the time is up; 1 tritonattn is wrong or failed; 2 wrong usage; 3 the device is lost: run again,
the implementation that lost it is excluded; 130 after Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tritonattn import gpu
from tritonattn.configs import user_cache
from tritonattn.measure import device_timer, environment, journal, timing
from tritonattn.measure.journal import Journal, JournalError

from . import baselines, cases, measure, results
from .cases import Case

DEVICE_LOST = 3   # exit code
MAX_ATTEMPTS = 2  # crashes after which a job is skipped; device losses after which a baseline is excluded
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SETUP_SECONDS = {"flex": 20.0}  # estimate of the time before timing, mostly compilation; 2.5 s for all others


@dataclass(frozen=True)
class Plan:
    """The jobs to run, in order, and the implementations."""

    suite: str
    cases: tuple[Case, ...]
    implementations: list[baselines.Implementation]
    budget: timing.TimingBudget
    environment: dict
    commit: str | None = None  # not in the digest: committing results must not invalidate them

    def jobs(self) -> list[tuple[str, Case, str]]:
        """Return (name, case, direction) of each job."""
        return [(f"{self.suite}/{case.name}/{direction}", case, direction)
                for case in self.cases for direction in case.directions]

    def as_json(self) -> dict:
        return {"suite": self.suite, "cases": [case._asdict() | {"problem": case.problem.as_json()} for case in self.cases],
                "budget": asdict(self.budget), "environment": self.environment,
                "implementations": {each.name: each.identity for each in self.implementations}}

    def path(self, folder: Path) -> Path:
        return folder / environment.slug(self.environment["gpu"]) / f"{self.suite}-{journal.digest(self.as_json())}.jsonl"

    def seconds_per_job(self) -> float:
        """Estimate the duration of a job before the first is measured."""
        names = [each.name for each in self.implementations if not each.missing]
        setup = sum(SETUP_SECONDS.get(name, 2.5) for name in names)
        return setup + 2 * self.budget.seconds * len(names) + self.budget.settle[0]


def run(plan: Plan, path: Path, setup: measure.Setup, deadline: float = float("inf")) -> list[results.Job]:
    """Run the jobs that the file does not hold yet, until the deadline of the timer's clock. Return all complete jobs.

    Raises measure.DeviceLost, and JournalError if the file is broken or belongs to another plan.
    """
    now = setup.timer.now
    with Journal(path, plan.as_json()) as book:
        done = {entry["job"]: results.job_of(entry) for entry in book.entries if "results" in entry}
        pending = [job for job in plan.jobs() if job[0] not in done]
        if pending:
            book.append({"session": {"commit": plan.commit, "time": journal.now()}})
        total, start, expected = len(done) + len(pending), now(), plan.seconds_per_job()
        for count, (name, case, direction) in enumerate(pending):
            if now() + expected > deadline:
                print(f"time is up: {len(pending) - count} jobs are left; run the same command to continue", flush=True)
                break
            done[name] = _run_job(plan, book, setup, name, case, direction)
            expected = (now() - start) / (count + 1)
            minutes = (total - len(done)) * expected / 60
            print(f"[{len(done)}/{total}] {name}: {verdict(done[name])}; {minutes:.0f} min left", flush=True)
        return [done[name] for name, *_ in plan.jobs() if name in done]


def _run_job(plan, book, setup, name, case, direction) -> results.Job:
    """Measure one job, write its entry and return it. An error fails the job, unless the process or the device is lost."""
    if crashes(book.entries, name) >= MAX_ATTEMPTS:
        outcome = _failed(plan, f"the process crashed {MAX_ATTEMPTS} times in this job")
    else:
        book.append({"began": name})
        try:
            outcome = measure.measure_job(setup, case, direction, plan.implementations, excluded(book.entries, name))
        except measure.DeviceLost as lost:
            book.append({"lost": name, "implementation": lost.name, "reason": f"lost the device: {lost.reason}"})
            raise
        except KeyboardInterrupt:
            book.append({"interrupted": name})
            raise
        except Exception as error:
            # in the inputs, the definition or the timer; a device that is lost here counts as a crash of the job
            outcome = _failed(plan, measure.failure(setup, "inputs or reference", error)["reason"])
    book.append({"job": name, "suite": plan.suite, "case": case.name, "problem": case.problem.as_json(),
                 "direction": direction, "time": journal.now()} | outcome)
    return results.job_of(book.entries[-1])


def _failed(plan, reason) -> dict:
    return {"results": {each.name: {"status": "failed", "reason": reason} for each in plan.implementations}, "state": None}


def crashes(entries: list[dict], name: str) -> int:
    """Return how often this job began without a result, a lost device or an interrupt."""
    events = Counter(kind for entry in entries for kind in ("began", "lost", "interrupted") if entry.get(kind) == name)
    return events["began"] - events["lost"] - events["interrupted"]


def excluded(entries: list[dict], name: str) -> dict[str, str]:
    """Return {implementation: reason} for those that lost the device in this job, or repeatedly and are not ours."""
    losses = [entry for entry in entries if "lost" in entry]
    reasons = {entry["implementation"]: entry["reason"] for entry in losses if entry["lost"] == name}
    for implementation, count in Counter(entry["implementation"] for entry in losses).items():
        if count >= MAX_ATTEMPTS and not implementation.startswith(results.OURS):
            reasons.setdefault(implementation, f"excluded: lost the device in {count} other jobs")
    return reasons


def verdict(job: results.Job) -> str:
    """Return our time and the best baseline's, in one line."""
    ours, best = job.ours, job.best_baseline
    if not ours:
        result = job.results.get(results.OURS)
        return f"tritonattn {result.status}: {result.reason}" if result else "tritonattn was not run"
    throttled = " (throttled)" if ours.throttled else ""
    text = f"tritonattn {ours.seconds * 1e6:.0f} us, {job.tflops(ours.seconds):.3g} TFLOP/s{throttled}"
    return f"{text}; {best.name} {best.seconds * 1e6:.0f} us, ratio {best.seconds / ours.seconds:.2f}" if best else text


def has_failure(job: results.Job) -> bool:
    """Return whether tritonattn or a variant of it is wrong or failed."""
    return any(result.ours and result.status in ("wrong", "failed") for result in job.results.values())


def describe(plan: Plan, path: Path) -> str:
    """Return the plan as text, for --dry-run."""
    lines = [f"{name:60}{case.problem}" for name, case, _ in plan.jobs()]
    minutes = plan.seconds_per_job() * len(lines) / 60
    available = ", ".join(each.name for each in plan.implementations if not each.missing)
    missing = [f"missing: {each.name} ({each.missing})" for each in plan.implementations if each.missing]
    return "\n".join([*lines, f"{len(lines)} jobs with {available}", *missing,
                      f"results: {path}", f"about {minutes:.0f} minutes (estimated, not measured)"])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m perf.run", description=__doc__.split("\n\n", 1)[1],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--suite", choices=cases.SUITES, default="paper", help="default: %(default)s")
    top.add_argument("--baselines", default="all", metavar="NAMES", help='comma-separated names, or "all" (default)')
    top.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR", help="default: perf/results")
    top.add_argument("--dtype", choices=DTYPES, help="default: that of each case, mostly bfloat16")
    top.add_argument("--seconds", type=positive, default=0.5, metavar="S",
                     help="samples per implementation and job (default: %(default)s)")
    top.add_argument("--minutes", type=positive, metavar="M", help="stop before a job that would end later")
    top.add_argument("--commit", metavar="ID", help="commit to record, for a source tree without its repository")
    top.add_argument("--dry-run", action="store_true", help="print the plan and the estimated duration, and exit")
    return top


def positive(text: str) -> float:
    """Return a positive number, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def make_plan(arguments, device: torch.device) -> Plan:
    """Return the plan of these command-line arguments on this machine. Raises ValueError."""
    facts = environment.environment_of(device)
    commit = facts.pop("commit")
    facts["source"] = environment.source_digest(Path(baselines.__file__), Path(measure.__file__))
    # configs tuned on this machine are used here too, and other configs are other kernels
    tuned = {path.name: str(record.config) for path, record in user_cache.current_cache().records()}
    facts["tuned"] = journal.digest(tuned) if tuned else None
    return Plan(arguments.suite, cases.suite(arguments.suite, DTYPES.get(arguments.dtype)),
                baselines.select(arguments.baselines, device.type), timing.TimingBudget(seconds=arguments.seconds), facts,
                arguments.commit or commit)


@contextlib.contextmanager
def interruptible():
    """Turn SIGTERM into KeyboardInterrupt, and SIGINT too where a background shell ignores it."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    top, start = parser(), time.perf_counter()
    arguments = top.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not gpu.INTERPRETED else "cpu")
    if device.type == "cpu" and not gpu.INTERPRETED and not arguments.dry_run:
        top.error("no GPU was found: set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
    try:
        plan = make_plan(arguments, device)
    except ValueError as error:
        top.error(str(error))
    path = plan.path(arguments.out)
    if arguments.dry_run:
        print(describe(plan, path))
        return 0
    print(f"results: {path}", flush=True)
    if device.type == "cuda" and plan.environment["sensors"] != "NVML":
        print(f"throttling is not recorded: {plan.environment['sensors']}", file=sys.stderr, flush=True)
    deadline = start + 60 * arguments.minutes if arguments.minutes else float("inf")
    try:
        with interruptible():
            done = run(plan, path, measure.Setup(device, device_timer.timer_of(device), plan.budget), deadline)
    except JournalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; complete jobs are in {path}; run the same command to continue", file=sys.stderr)
        return 130
    except measure.DeviceLost as lost:
        print(f"device lost in {lost}; run the same command to continue without it", file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)  # the teardown of a broken device context may hang
    return 1 if any(map(has_failure, done)) else 0


if __name__ == "__main__":
    sys.exit(main())
