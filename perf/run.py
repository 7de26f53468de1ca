"""python -m perf.run --suite paper --rivals all --out perf/results/

Ours and every rival, each checked and then timed in turns; one line per job in <out>/<gpu>/<suite>-<digest>.jsonl. The
digest is of the plan: cases, contenders and their versions, effort, GPU, versions and the source that runs. The same
command goes on where a kill left off. When nothing is left to be timed, the kernels that ran are named. Exit codes: 0 all
is done, or the time is up; 1 a contender of ours is wrong or failed; 2 wrong usage; 3 the device is lost, run again to go
on without the contender that lost it; 130 after Ctrl-C or a request to end.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tritonattn import gpu
from tritonattn.configs import user_cache
from tritonattn.measure import device_timer, environment, journal, timing
from tritonattn.measure.journal import Journal, JournalError

from . import baselines, cases, measure, results
from .cases import Case

LOST = 3       # the exit code that asks to be run again
ATTEMPTS = 2   # of a job that kills the process; and losses of the device after which a rival is left out for good
NAMING = 0.1   # of the minutes, kept for naming kernels
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ON_HOST = timing.TimingBudget(seconds=1.0, rounds=(3, 5), settle=(0.0, 0.0))
# rough: seconds that one contender takes before it is timed, mostly compiling; FlexAttention compiles its own way
SETUP, SETUP_FLEX = 2.5, 20.0


@dataclass(frozen=True)
class Plan:
    """What will be measured, in order, and with whom."""

    suite: str
    cases: tuple[Case, ...]
    rivals: list[baselines.Rival]
    effort: timing.TimingBudget
    environment: dict
    commit: str | None = None  # no part of what is digested: committing results must not begin them anew

    def jobs(self) -> Iterator[tuple[str, Case, str]]:
        """(name, case, direction)"""
        for case in self.cases:
            for direction in case.directions:
                yield f"{self.suite}/{case.name}/{direction}", case, direction

    def as_json(self) -> dict:
        described = [{"name": case.name, "problem": case.problem.as_json(), "directions": list(case.directions)}
                     for case in self.cases]
        return {"suite": self.suite, "cases": described, "contenders": {rival.name: rival.identity for rival in self.rivals},
                "effort": asdict(self.effort) | {"rounds": list(self.effort.rounds), "settle": list(self.effort.settle)},
                "environment": self.environment}

    def path(self, folder: Path) -> Path:
        return folder / environment.slug(self.environment["gpu"]) / f"{self.suite}-{journal.digest(self.as_json())}.jsonl"

    def seconds(self) -> float:
        """A job takes about so long: no measurement, a rule of thumb to plan by."""
        able = [rival for rival in self.rivals if not rival.missing]
        setup = sum(SETUP_FLEX if rival.name == "flex" else SETUP for rival in able)
        return setup + 2 * self.effort.seconds * len(able) + self.effort.settle[0]


def run(plan: Plan, path: Path, bench: measure.Bench, deadline: float = float("inf")) -> list[results.Job]:
    """Do every job that the file at `path` does not hold yet, until the clock shows `deadline`; all jobs that are done.

    Raises measure.DeviceLost when the device is gone, JournalError when the file is not this plan's.
    """
    with Journal(path, plan.as_json()) as book:
        done = {entry["job"]: entry for entry in book.entries if "results" in entry}
        todo = [job for job in plan.jobs() if job[0] not in done]
        if todo:
            book.append({"session": {"commit": plan.commit, "time": journal.now()}})
        progress = Progress(len(done), len(done) + len(todo), bench.stopwatch.now)
        expected = plan.seconds()
        for name, case, direction in todo:
            if bench.stopwatch.now() + expected > deadline:
                print(f"time is up: {len(todo) - progress.fresh} jobs are left; the same command goes on", flush=True)
                break
            entry = _job(plan, book, bench, name, case, direction)
            done[name] = entry
            progress.line(results.job_of(entry))
            expected = progress.seconds_each
        return [results.job_of(done[name]) for name, *_ in plan.jobs() if name in done]


def _job(plan, book, bench, name, case, direction) -> dict:
    """Measure one job and write it; what kills the process twice is written as failed."""
    if deaths(book.entries, name) >= ATTEMPTS:
        outcome = _failed(plan, f"the process died {ATTEMPTS} times in this job")
    else:
        outcome = _attempt(plan, book, bench, name, case, direction)
    entry = {"job": name, "suite": plan.suite, "case": case.name, "problem": case.problem.as_json(), "direction": direction,
             "time": journal.now()} | outcome
    book.append(entry)
    return entry


def _attempt(plan, book, bench, name, case, direction) -> dict:
    """The outcome of a job, whatever goes wrong in it, if the process and the device outlive it."""
    book.append({"began": name})
    try:
        return measure.job(bench, case, direction, plan.rivals, left_out(book.entries, name))
    except measure.DeviceLost as lost:
        book.append({"lost": name, "contender": lost.name, "reason": f"lost the device: {lost.reason}"})
        raise
    except KeyboardInterrupt:
        book.append({"interrupted": name})
        raise
    except Exception as error:
        # of no contender: of the inputs, the definition, the stopwatch. A device lost here counts as a death of the job
        return _failed(plan, measure.failure(bench, "what all contenders share", error)["reason"])


def _failed(plan, reason) -> dict:
    return {"results": {rival.name: {"status": "failed", "reason": reason} for rival in plan.rivals}, "state": None}


def name_kernels(plan: Plan, path: Path, bench: measure.Bench, deadline: float = float("inf")) -> None:
    """Write which kernels each contender ran in every job that is done, until the clock shows `deadline`.

    After all timing, since a profiler that was once at work may slow the launches of its process for good.
    Raises measure.DeviceLost, JournalError.
    """
    by_name = {rival.name: rival for rival in plan.rivals}
    with Journal(path, plan.as_json()) as book:
        done = {entry["job"]: entry["results"] for entry in book.entries if "results" in entry}
        tried = Counter(entry["naming"] for entry in book.entries if "naming" in entry)
        named = {entry["named"] for entry in book.entries if "named" in entry}
        for name, case, direction in plan.jobs():
            if bench.stopwatch.now() > deadline:
                return
            if name in done and name not in named and tried[name] < ATTEMPTS:
                book.append({"naming": name})
                timed = [by_name[contender] for contender, result in done[name].items() if result["status"] == "ok"]
                book.append({"named": name, "kernels": measure.names(bench, case, direction, timed)})


def deaths(entries: list[dict], name: str) -> int:
    """How often this job ended the process without a word."""
    seen = Counter(kind for entry in entries for kind in ("began", "lost", "interrupted") if entry.get(kind) == name)
    return seen["began"] - seen["lost"] - seen["interrupted"]


def left_out(entries: list[dict], name: str) -> dict[str, str]:
    """{contender: why it is not run in this job}: it lost the device there, or is a rival that did so too often elsewhere."""
    lost = [entry for entry in entries if "lost" in entry]
    found = {entry["contender"]: entry["reason"] for entry in lost if entry["lost"] == name}
    for contender, times in Counter(entry["contender"] for entry in lost).items():
        if times >= ATTEMPTS and not contender.startswith(results.OURS):
            found.setdefault(contender, f"lost the device in {times} other jobs, and is not run again")
    return found


class Progress:
    """How far it is, who is ahead, and how long it will take."""

    def __init__(self, done: int, total: int, now):
        self.done, self.total, self.now, self.start, self.fresh = done, total, now, now(), 0

    @property
    def seconds_each(self) -> float:
        return (self.now() - self.start) / max(1, self.fresh)

    def line(self, job: results.Job) -> None:
        self.done, self.fresh = self.done + 1, self.fresh + 1
        left = (self.total - self.done) * self.seconds_each
        print(f"[{self.done}/{self.total}] {job.name}: {verdict(job)}; {left / 60:.0f} min left", flush=True)


def verdict(job: results.Job) -> str:
    """Ours beside the best rival, in a few words."""
    ours, best = job.ours, job.best_rival
    if not ours:
        theirs = job.results.get(results.OURS)
        return f"ours {theirs.status}: {theirs.reason}" if theirs else "ours is not among the contenders"
    mark = " (throttled)" if ours.throttled else ""
    text = f"ours {ours.seconds * 1e6:.0f} us, {ours.tflops(job):.3g} TFLOP/s{mark}"
    share = best and f"; {best.contender} {best.seconds * 1e6:.0f} us, {best.seconds / ours.seconds:.2f} of our time"
    return text + (share or "")


def dry_run(plan: Plan, path: Path) -> str:
    """The plan as text."""
    lines = [f"{name:60}{case.problem}" for name, case, _ in plan.jobs()]
    absent = [f"{rival.name}: {rival.missing}" for rival in plan.rivals if rival.missing]
    able = [rival.name for rival in plan.rivals if not rival.missing]
    minutes = plan.seconds() * len(lines) / 60
    return "\n".join([*lines, f"{len(lines)} jobs of {', '.join(able)}", *(f"without {line}" for line in absent),
                      f"to {path}; about {minutes:.0f} minutes (an estimate, not a measurement)"])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m perf.run", description=__doc__.split("\n\n")[1],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--suite", choices=cases.SUITES, default="paper", help="default: %(default)s")
    top.add_argument("--rivals", default="all", metavar="NAMES", help='names with commas between, or "all" (default)')
    top.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR", help="default: perf/results")
    top.add_argument("--resume-from", type=Path, metavar="DIR",
                     help="begin with what this folder holds of the same plan, if --out holds nothing of it")
    top.add_argument("--dtype", choices=DTYPES, help="default: the suite's own, mostly bfloat16")
    top.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    top.add_argument("--seconds", type=_positive, metavar="S", help="of samples, per contender and job (default: 0.5)")
    top.add_argument("--minutes", type=_positive, metavar="M", help="stop before a job that would end later")
    top.add_argument("--commit", metavar="ID", help="to be recorded, where the tree came without its repository")
    top.add_argument("--dry-run", action="store_true", help="list the plan and the estimated minutes, and stop")
    return top


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def plan_of(arguments, device: torch.device) -> Plan:
    """The plan that the command line asks for, on this machine."""
    here = environment.environment_of(device)
    commit = here.pop("commit")
    here["source"] = environment.source_digest(Path(baselines.__file__), Path(measure.__file__))
    # what was tuned on this machine is used here too: other configs are other kernels
    tuned = {path.name: str(found.config) for path, found in user_cache.current_cache().records()}
    here["tuned"] = journal.digest(tuned) if tuned else None
    effort = timing.TimingBudget() if device.type == "cuda" else ON_HOST
    effort = replace(effort, seconds=arguments.seconds) if arguments.seconds else effort
    dtype = DTYPES.get(arguments.dtype)
    contenders = baselines.chosen(arguments.rivals, device.type)
    return Plan(arguments.suite, cases.suite(arguments.suite, dtype), contenders, effort, here, arguments.commit or commit)


def device_of(arguments, top: argparse.ArgumentParser) -> torch.device:
    """The device that the command line asks for, or the best there is; wrong usage if kernels cannot run on it."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() and not gpu.INTERPRETED else "cpu"))
    if device.type == "cpu" and not gpu.INTERPRETED and not arguments.dry_run:
        top.error("without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    if device.type == "cuda" and (gpu.INTERPRETED or not torch.cuda.is_available()):
        top.error("--device cuda: expected a GPU that torch sees, and TRITON_INTERPRET not set")
    return device


@contextlib.contextmanager
def ended_in_order():
    """A request to end (SIGTERM) is taken as Ctrl-C is: what was measured is kept, and it is no death of a job."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bring(plan: Plan, source: Path, target: Path) -> None:
    """Copy what one folder of results holds of a plan to another that holds nothing of it."""
    earlier, path = plan.path(source), plan.path(target)
    if earlier.exists() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier, path)


def carry_out(plan: Plan, path: Path, device: torch.device, start: float, minutes: float | None) -> list[results.Job]:
    """Time what is left to be timed, then name kernels, within so many minutes of the start. Raises what `run` raises."""
    seconds = 60 * minutes if minutes else float("inf")
    bench = measure.Bench(device, device_timer.timer_of(device), plan.effort)
    if device.type != "cuda":
        return run(plan, path, bench, start + seconds)
    if plan.environment["sensors"] != "NVML":
        print(f"throttling cannot be seen: {plan.environment['sensors']}", file=sys.stderr, flush=True)
    done = run(plan, path, bench, start + (1 - NAMING) * seconds)
    name_kernels(plan, path, bench, start + seconds)
    return done


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    top, start = parser(), time.perf_counter()
    arguments = top.parse_args(argv)
    device = device_of(arguments, top)
    try:
        plan = plan_of(arguments, device)
    except ValueError as error:
        top.error(str(error))
    path = plan.path(arguments.out)
    if arguments.dry_run:
        print(dry_run(plan, path))
        return 0
    if arguments.resume_from:
        bring(plan, arguments.resume_from, arguments.out)
    print(f"results: {path}", flush=True)
    try:
        with ended_in_order():
            done = carry_out(plan, path, device, start, arguments.minutes)
    except JournalError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; what was measured is in {path}, and the same command goes on", file=sys.stderr)
        return 130
    except measure.DeviceLost as lost:
        print(f"the device is lost to {lost}; run again to go on without it", file=sys.stderr, flush=True)
        os._exit(LOST)  # what is left of the device's context may not come down in order
    return 1 if any(map(ours_is_bad, done)) else 0


def ours_is_bad(job: results.Job) -> bool:
    """Whether a contender of ours is wrong or failed."""
    return any(name.startswith(results.OURS) and result.status in ("wrong", "failed") for name, result in job.results.items())


if __name__ == "__main__":
    sys.exit(main())
