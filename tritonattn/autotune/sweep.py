"""Everything that could be tried of some kernels and problems, timed and written down, one config after the other.

    plan      candidates of every job and what the lens has against them: frozen in plan.json
    carry on  groups of configs in turns with the incumbent, each config a line of results.jsonl when its group is done

A kill at any moment loses at most a group. The same folder goes on where it was; another plan, GPU or version is refused.
Of what the lens is against, one in ten that fits is timed too: how else would anybody know whether the lens is right?
"""

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import triton

from .. import __version__
from ..configs.kernel_hash import kernel_hash
from ..configs.shipped import gpu_fingerprint
from ..measure import journal
from ..measure.journal import Journal, JournalError
from ..problem import Problem
from .search import FAILURES, LONG, Search
from .trials import ENVIRONMENT, PLAN, RESULTS, SCHEMA, Job, Trial
from .tuner import TuningSetup, job_of, static_of

GROUP = 8      # configs that are timed together
DOUBTED = 0.1  # of those that the lens is against, the share that is timed all the same
DOUBTFUL = ("spill", "duplicate work", "serialized", "wrong tensor path", "unclear")


def plan_of(problems: Iterable[tuple[Problem, Iterable[str]]], lab: TuningSetup, rounds: int = LONG, say: Callable = print) -> dict:
    """What is to be done: it takes the compilers a minute for each job."""
    jobs, static, doubted, rng = [], {}, {}, random.Random(lab.seed)
    for problem, kernels in problems:
        for kernel in kernels:
            job, verdicts = job_of(kernel, problem, lab, "exhaustive")
            say(f"{job.name}: {len(verdicts)} candidates, {len(job.configs)} to be timed", flush=True)
            against = [name for name, verdict in verdicts.items() if verdict.reason in DOUBTFUL and name != job.incumbent]
            doubted[job.name] = sorted(rng.sample(against, round(DOUBTED * len(against))))
            static[job.name] = {name: {"reason": verdict.reason, "note": verdict.note} | static_of(verdict)
                                for name, verdict in verdicts.items()}
            # the static order, of those that are out too
            jobs.append(replace(job, configs=tuple(dict.fromkeys([*job.configs, *verdicts]))))
    return {"schema": SCHEMA, "jobs": [job.as_json() for job in jobs], "static": static, "doubted": doubted, "rounds": rounds,
            "seed": lab.seed, "gpu": {"name": lab.gpu.name} | gpu_fingerprint(lab.gpu), "versions": versions(),
            "source": kernel_hash()}


def versions() -> dict:
    """What must be the same for a sweep to go on."""
    return {"tritonattn": __version__, "triton": triton.__version__, "torch": torch.__version__}


def begin(folder: Path, plan: dict, here: dict) -> None:
    """Write a new sweep's plan, and `here`, where it is carried out. FileExistsError: there is one already."""
    expect_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT).write_text(json.dumps(here, indent=1) + "\n")
    # last, since it says that all is there
    beside = folder / f"{PLAN}.part"
    beside.write_text(json.dumps(plan, indent=1) + "\n")
    beside.replace(folder / PLAN)


def expect_new(folder: Path) -> None:
    """FileExistsError: a sweep has begun there."""
    if (folder / PLAN).exists():
        raise FileExistsError(f"{folder}: expected a folder without a sweep, got one that has begun; without problems named "
                              "it goes on")


def carry_on(folder: Path, lab: TuningSetup, seconds: float = float("inf"), say: Callable = print) -> bool:
    """Do what a folder's plan has left to do, for so long at most; whether all is done. JournalError: it cannot go on here."""
    try:
        plan = json.loads((folder / PLAN).read_text())
        jobs = [Job.from_json(job) for job in plan["jobs"]]
        expected = {name: plan[name] for name in ("schema", "gpu", "versions", "source")}
        if set(plan["static"]) != set(plan["doubted"]) or set(plan["static"]) != {job.name for job in jobs}:
            raise ValueError("jobs without what the lens saw of them")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{folder}: expected a sweep's plan, got {type(error).__name__}: {error}") from error
    mine = {"schema": SCHEMA, "gpu": {"name": lab.gpu.name} | gpu_fingerprint(lab.gpu), "versions": versions(),
            "source": kernel_hash()}
    for name, value in mine.items():
        if expected[name] != value:
            raise JournalError(f"{folder}: expected to go on with {name} {expected[name]}, got {value}; "
                               "begin another sweep")
    with Journal(folder / RESULTS, {"digest": journal.digest(plan)}) as book:
        progress = Progress(jobs, book.entries, say)
        for job in jobs:
            if not _job(job, plan, book, lab, progress, seconds):
                return False
    return True


def _job(job, plan, book, lab, progress, seconds) -> bool:
    """Time what is left of one job; whether there was time for all of it."""
    static, doubted = plan["static"][job.name], plan["doubted"][job.name]
    done = {entry["config"] for entry in book.entries if entry.get("job") == job.name}
    timed = [name for name in job.configs if _reason(static, name) is None or name in doubted or name == job.incumbent]

    def write(trial):
        seen = {name: value for name, value in static.get(trial.config, {}).items() if name not in ("reason", "note")}
        book.append(replace(trial, static=seen).as_json() | {"time": journal.now()})
        progress.one(job, trial)

    for name in job.configs:
        if name not in timed and name not in done:
            write(Trial(job.name, name, static[name]["reason"], static[name]["note"]))
    # the groups are those of the plan, whenever they are timed
    groups = [[name for name in timed[i:i + GROUP] if name not in done] for i in range(0, len(timed), GROUP)]
    if not any(groups):
        return True
    with lab.bench(job.kernel, job.problem) as bench:
        race = Search(job, bench)
        for group in filter(None, groups):
            if progress.spent > seconds:
                return False
            race.take(group, plan["rounds"])
            for name in group:
                trial, reason = race.trials[name], _reason(static, name)
                # what the lens was against stays so in name, whatever the clock says
                against = reason is not None and trial.status == "ok"
                write(replace(trial, status=reason, note=static[name]["note"]) if against else trial)
    return True


def _reason(static, name) -> str | None:
    return static.get(name, {}).get("reason")


class Progress:
    """How far a sweep is, who is ahead, and how long it will take."""

    def __init__(self, jobs: list[Job], entries: list[dict], say: Callable):
        self._total = sum(len(job.configs) for job in jobs)
        self._done, self._fresh, self._say = len([entry for entry in entries if "config" in entry]), 0, say
        self._began, self._best = time.monotonic(), {}
        for entry in entries:
            if "config" in entry:
                self._see(Trial.from_json(entry))

    @property
    def spent(self) -> float:
        return time.monotonic() - self._began

    def _see(self, trial):
        best = self._best.get(trial.job)
        if trial.ratio is not None and (best is None or trial.ratio < best.ratio):
            self._best[trial.job] = trial

    def one(self, job: Job, trial: Trial) -> None:
        """One more config is done."""
        self._done, self._fresh = self._done + 1, self._fresh + bool(trial.samples)
        self._see(trial)
        if trial.samples or trial.status in FAILURES:
            best = self._best.get(job.name)
            ahead = f"; best {best.config}, {1 / best.ratio:.2f} times as fast as {job.incumbent}" if best else ""
            left = (self._total - self._done) * self.spent / max(1, self._fresh)
            came_to = f"{trial.seconds * 1e6:.0f} us" if trial.samples else trial.status
            self._say(f"[{self._done}/{self._total}] {job.name} {trial.config}: {came_to}{ahead}; "
                      f"at most {left / 60:.0f} min left", flush=True)
