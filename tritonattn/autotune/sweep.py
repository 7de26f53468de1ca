"""A sweep: check and time every config of some kernels and problems, and record each (trials.py).

    begin     the candidates of every job and the verdicts on them: frozen in plan.json
    resume    groups of configs, interleaved with the incumbent; each config is a line of results.jsonl when its group is done

A kill at any moment loses at most one group. A sweep resumes only with the same plan, GPU and versions. One in ten of the
configs that static pruning excludes is timed as well, to measure how good the pruning is.
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
from .tune import TuningSetup, job_of, static_of

GROUP = 8        # configs that are timed together
CONTROLS = 0.1   # share of the excluded configs that is timed
EXCLUDED = ("spill", "duplicate work", "serialized", "wrong tensor path", "unclear")  # reasons of configs that would run


def plan_of(problems: Iterable[tuple[Problem, Iterable[str]]], setup: TuningSetup, rounds: int = LONG,
            say: Callable = print) -> dict:
    """Compile all candidates, which takes about a minute for each job, and return the plan."""
    jobs, static, controls, rng = [], {}, {}, random.Random(setup.seed)
    for problem, kernels in problems:
        for kernel in kernels:
            job, verdicts = job_of(kernel, problem, setup, "exhaustive")
            say(f"{job.name}: {len(verdicts)} candidates, {len(job.configs)} to be timed", flush=True)
            excluded = [name for name, verdict in verdicts.items() if verdict.reason in EXCLUDED and name != job.incumbent]
            controls[job.name] = sorted(rng.sample(excluded, round(CONTROLS * len(excluded))))
            static[job.name] = {name: {"reason": verdict.reason, "note": verdict.note} | static_of(verdict)
                                for name, verdict in verdicts.items()}
            # by modelled time, excluded ones last
            jobs.append(replace(job, configs=tuple(dict.fromkeys([*job.configs, *verdicts]))))
    return {"jobs": [job.as_json() for job in jobs], "static": static, "doubted": controls, "rounds": rounds,
            "seed": setup.seed} | conditions(setup)


def conditions(setup: TuningSetup) -> dict:
    """Return the part of a plan that must be the same for a sweep to resume."""
    return {"schema": SCHEMA, "gpu": {"name": setup.gpu.name} | gpu_fingerprint(setup.gpu), "versions": versions(),
            "source": kernel_hash()}


def versions() -> dict:
    """Return the versions that decide about binaries and times."""
    return {"tritonattn": __version__, "triton": triton.__version__, "torch": torch.__version__}


def begin(folder: Path, plan: dict, environment: dict) -> None:
    """Write the plan of a new sweep and its environment. Raises FileExistsError if the folder has a sweep."""
    expect_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1) + "\n")
    # the plan comes last and whole: it marks a sweep that can resume
    part = folder / f"{PLAN}.part"
    part.write_text(json.dumps(plan, indent=1) + "\n")
    part.replace(folder / PLAN)


def expect_new(folder: Path) -> None:
    """Raise FileExistsError if the folder has a sweep."""
    if (folder / PLAN).exists():
        raise FileExistsError(f"{folder} already has a sweep; name another folder, or resume it by leaving out the problems")


def resume(folder: Path, setup: TuningSetup, seconds: float = float("inf"), say: Callable = print) -> bool:
    """Do what is left of a plan, for so many seconds at most. Returns whether all is done; raises JournalError."""
    try:
        plan = json.loads((folder / PLAN).read_text())
        jobs = [Job.from_json(job) for job in plan["jobs"]]
        planned = {name: plan[name] for name in ("schema", "gpu", "versions", "source")}
        if set(plan["static"]) != set(plan["doubted"]) or set(plan["static"]) != {job.name for job in jobs}:
            raise ValueError("jobs without verdicts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{folder}: no plan of a sweep can be read: {type(error).__name__}: {error}") from error
    for name, value in conditions(setup).items():
        if planned[name] != value:
            raise JournalError(f"{folder}: planned with {name} {planned[name]}, but this is {value}; begin another sweep")
    with Journal(folder / RESULTS, {"digest": journal.digest(plan)}) as results:
        progress = Progress(jobs, results.entries, say)
        return all(_run_job(job, plan, results, setup, progress, seconds) for job in jobs)


def _run_job(job, plan, results, setup, progress, seconds) -> bool:
    """Do what is left of one job. Return whether there was time for all of it."""
    static, controls = plan["static"][job.name], plan["doubted"][job.name]
    done = {entry["config"] for entry in results.entries if entry["job"] == job.name}
    timed = [name for name in job.configs if _reason(static, name) is None or name in controls or name == job.incumbent]

    def write(trial):
        numbers = {name: value for name, value in static.get(trial.config, {}).items() if name not in ("reason", "note")}
        trial = replace(trial, static=numbers)
        results.append(trial.as_json() | {"time": journal.now()})
        progress.add(job, trial)

    for name in job.configs:
        if name not in timed and name not in done:
            write(Trial(job.name, name, static[name]["reason"], static[name]["note"]))
    # the same groups after every interruption
    groups = [[name for name in timed[i:i + GROUP] if name not in done] for i in range(0, len(timed), GROUP)]
    if not any(groups):
        return True
    with setup.bench(job.kernel, job.problem) as bench:
        search = Search(job, bench)
        for group in filter(None, groups):
            if progress.seconds > seconds:
                return False
            search.time_round(group, plan["rounds"])
            for name in group:
                trial, reason = search.trials[name], _reason(static, name)
                # an excluded config keeps its reason, whatever its time
                excluded = reason is not None and trial.status == "ok"
                write(replace(trial, status=reason, note=static[name]["note"]) if excluded else trial)
    return True


def _reason(static, name) -> str | None:
    return static.get(name, {}).get("reason")


class Progress:
    """The number of configs done, the best of each job, and the time left."""

    def __init__(self, jobs: list[Job], entries: list[dict], say: Callable):
        self._total, self._done, self._timed = sum(len(job.configs) for job in jobs), 0, 0
        self._say, self._start, self._best = say, time.monotonic(), {}
        for entry in entries:
            self._count(Trial.from_json(entry))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def _count(self, trial):
        self._done += 1
        best = self._best.get(trial.job)
        if trial.ratio is not None and (best is None or trial.ratio < best.ratio):
            self._best[trial.job] = trial

    def add(self, job: Job, trial: Trial) -> None:
        """Count a config, and print a line if it was timed or failed."""
        self._count(trial)
        self._timed += bool(trial.samples)
        if trial.samples or trial.status in FAILURES:
            best = self._best.get(job.name)
            leader = f"; best {best.config}, {1 / best.ratio:.2f} times as fast as {job.incumbent}" if best else ""
            left = (self._total - self._done) * self.seconds / max(1, self._timed)
            result = f"{trial.seconds * 1e6:.0f} us" if trial.samples else trial.status
            self._say(f"[{self._done}/{self._total}] {job.name} {trial.config}: {result}{leader}; "
                      f"at most {left / 60:.0f} min left", flush=True)
