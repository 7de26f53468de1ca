"""A sweep: check and time every config of some kernels and problems, and record each (trials.py).

    begin     the candidates of every job and the verdicts on them: frozen in the first line of the journal
    resume    groups of configs, interleaved with the incumbent; each config is a line of the journal when its group is done;
              then the fastest configs of the job and the incumbent under continuous load (search.py), each with a second line

A kill at any moment loses at most one group, or the windows of one job. A sweep resumes only with the same plan, GPU and
versions. One in ten of the configs that static pruning excludes is timed as well, to measure how good the pruning is, and so
is one in ten of those that it excludes before compiling, if the compiled kernel can run.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import triton

from .. import __version__
from ..config import Config
from ..configs.kernel_hash import kernel_hash
from ..configs.shipped import gpu_fingerprint
from ..measure.journal import Journal, JournalError
from ..problem import Problem
from .prune import survey
from .search import EXHAUSTIVE_SAMPLES, FAILURES, SUSTAINED_CONFIGS, Search
from .trials import JOURNAL, SCHEMA, Trial, read, sampled_times
from .tune import TuningSetup, job_of, static_of

GROUP = 8        # configs that are timed together
CONTROLS = 0.1   # share of the excluded configs that is timed
WOULD_RUN = ("spill", "duplicate work", "serialized", "wrong tensor path", "unclear")  # reasons of configs that would run


def begin(folder: Path, problems: Iterable[tuple[Problem, Iterable[str]]], setup: TuningSetup, rounds: int = EXHAUSTIVE_SAMPLES,
          say: Callable = print) -> None:
    """Compile all candidates, which takes about a minute for each job, and write the plan of a new sweep.

    Raises FileExistsError, before it compiles, if the folder has a sweep.
    """
    if (folder / JOURNAL).exists():
        raise FileExistsError(f"{folder} already has a sweep; name another folder, or resume it by leaving out the problems")
    jobs, excluded, static, controls, rng = [], {}, {}, {}, random.Random(setup.seed)
    for kernel, problem in ((kernel, problem) for problem, kernels in problems for kernel in kernels):
        job, verdicts = job_of(kernel, problem, setup, "exhaustive")
        say(f"{job.name}: {len(verdicts)} candidates, {len(job.configs)} to be timed", flush=True)
        excluded[job.name] = {name: [verdict.reason, verdict.note] for name, verdict in verdicts.items() if verdict.reason}
        static[job.name] = {name: static_of(verdict) for name, verdict in verdicts.items()}
        sampled = {reasons: _sample(rng, job, excluded[job.name], reasons) for reasons in (WOULD_RUN, ("prefilter",))}
        # the survey did not compile these
        for verdict in survey(kernel, problem, setup.gpu, map(Config.parse, sampled[("prefilter",)]), setup.compilers,
                              check_first=False):
            static[job.name][str(verdict.config)] = static_of(verdict)
            if verdict.reason not in (None, *WOULD_RUN):
                excluded[job.name][str(verdict.config)] = [verdict.reason, verdict.note]
                sampled[("prefilter",)].remove(str(verdict.config))
        controls[job.name] = sorted(itertools.chain(*sampled.values()))
        # by modelled time, excluded ones last
        jobs.append(replace(job, configs=tuple(dict.fromkeys([*job.configs, *verdicts]))))
    plan = {"jobs": [job.as_json() for job in jobs], "excluded": excluded, "static": static, "controls": controls,
            "rounds": rounds, "seed": setup.seed, "environment": setup.environment}
    with Journal(folder / JOURNAL, plan | conditions(setup)):
        say(f"planned in {folder / JOURNAL}", flush=True)


def _sample(rng, job, excluded, reasons) -> list[str]:
    """Return one in ten of the configs that were excluded for these reasons."""
    names = [name for name, (reason, _) in excluded.items() if reason in reasons and name != job.incumbent]
    return rng.sample(names, round(CONTROLS * len(names)))


def conditions(setup: TuningSetup) -> dict:
    """Return the part of a plan that must be the same for a sweep to resume."""
    versions = {"tritonattn": __version__, "triton": triton.__version__, "torch": torch.__version__}
    return {"schema": SCHEMA, "gpu": {"name": setup.gpu.name} | gpu_fingerprint(setup.gpu), "versions": versions,
            "source": kernel_hash()}


def resume(folder: Path, setup: TuningSetup, seconds: float = float("inf"), say: Callable = print) -> bool:
    """Do what is left of a plan, for so many seconds at most. Returns whether all is done; raises JournalError."""
    run = read(folder)
    for name, value in conditions(setup).items():
        if (planned := run.plan.get(name)) != value:
            raise JournalError(f"{folder}: planned with {name} {planned}, but this is {value}; begin another sweep")
    total, start, timed = sum(len(job.configs) for job in run.jobs), time.monotonic(), itertools.count(1)
    done = {(trial.job, trial.config) for trial in run.trials}
    with Journal(folder / JOURNAL, run.plan) as results:
        def record(trial):
            results.append(vars(trial))
            done.add((trial.job, trial.config))
            if trial.samples or trial.status in FAILURES:
                left = (total - len(done)) * (time.monotonic() - start) / next(timed)
                result = f"{trial.seconds * 1e6:.0f} us{' sustained' * bool(trial.windows)}" if trial.samples else trial.status
                say(f"[{len(done)}/{total}] {trial.job} {trial.config}: {result}; at most {left / 60:.0f} min left", flush=True)

        return all(_run_job(job, run, setup, record, start + seconds) for job in run.jobs)


def _run_job(job, run, setup, record, deadline) -> bool:
    """Do what is left of one job and record each trial. Return whether there was time for all of it."""
    excluded, static, done = run.plan["excluded"][job.name], run.plan["static"][job.name], run.of(job)
    chosen = {job.incumbent, *run.plan["controls"][job.name]}
    timed = [name for name in job.configs if name in chosen or name not in excluded]
    for name in job.configs:
        if name not in timed and name not in done:
            record(Trial(job.name, name, *excluded[name], static=static[name]))
    # the same groups after every interruption
    groups = [[name for name in timed[i:i + GROUP] if name not in done] for i in range(0, len(timed), GROUP)]
    # an excluded incumbent is timed like any other config
    earlier = {name: replace(trial, status="ok") if name == job.incumbent and trial.samples else trial
               for name, trial in done.items()}
    if not any(groups) and not _last_configs(job, earlier, excluded):
        return True
    with setup.bench(job.kernel, job.problem) as bench:
        search = Search(job, bench, static=static, trials=earlier)

        def record_all(names):
            for name in names:
                trial, (reason, note) = search.trials[name], excluded.get(name, (None, ""))
                # an excluded config keeps its reason, whatever its time
                record(replace(trial, status=reason, note=note) if reason and trial.status == "ok" else trial)

        for group in filter(None, groups):
            if time.monotonic() > deadline:
                return False
            search.time_round(group, run.plan["rounds"])
            record_all(group)
        # again with the next config if one of the last fails
        while last := _last_configs(job, search.trials, excluded):
            if time.monotonic() > deadline:
                return False
            search.time_windows(last)
            record_all(last)
    return True


def _last_configs(job, trials, excluded) -> list[str]:
    """Return the configs of a job to be timed under continuous load; none if all of them have windows."""
    ok = {name: trial for name, trial in trials.items()
          if trial.status == "ok" and trial.samples and (name not in excluded or name == job.incumbent)}
    last = dict.fromkeys([job.incumbent, *list(sampled_times(ok))[:SUSTAINED_CONFIGS]])
    return list(last) if any(name in ok and not ok[name].windows for name in last) else []
