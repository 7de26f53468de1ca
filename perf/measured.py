"""Rows of a shipped table from sweeps: for each row the config that does best over all problems that it serves.

    slowdown of a config on a problem = its time / the best time there;  best of a row = least geometric mean of these
"""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tritonattn.autotune.replay import comparable
from tritonattn.autotune.trials import Run, Trial
from tritonattn.config import Config
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.lookup import gpu_fill, row_keys
from tritonattn.configs.shipped import Entry, Row, Table, read_table, write_table
from tritonattn.gpu import Gpu

from .config_table import allowed


def slowdowns(runs: list[Run], gpu: Gpu) -> dict:
    """{(row's key, fill): {config: [slowdown on each problem, None where it was not timed]}}"""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for job in run.jobs:
            # the narrowest row that serves it; others have their own
            key, which = next(iter(row_keys(job.kernel, job.problem))), gpu_fill(job.kernel, job.problem, gpu)
            timed = {name: trial for name, trial in comparable(run.of(job)).items()
                     if (trial.status == "ok" or name == job.incumbent) and allowed(Config.parse(name))}
            if not timed:
                continue
            best = min(trial.ratio for trial in timed.values())
            for name in job.configs:
                found[key, which][name].append(timed[name].ratio / best if name in timed else None)
    return {at: dict(by_config) for at, by_config in found.items()}


def build(runs: list[Run], gpu: Gpu, path: Path, folder: Path) -> Path:
    """Write the table at `path` to a folder, with what was measured in place of what stands there; other rows stay.

    Raises ValueError: a run is synthetic, of another GPU, or of other kernels than the table.
    """
    table = read_table(path)
    for run in runs:
        if run.synthetic:
            raise ValueError("table: expected sweeps that were timed, got a synthetic one")
        there = Gpu(tensor_memory=0, **run.plan["gpu"])
        if run.plan["source"] != kernel_hash() or not table.is_of(gpu) or not table.is_of(there):
            raise ValueError(f"{path}: expected a sweep of the kernels and the GPU of this table, got one of {run.plan['gpu']}")
    rows = dict(table.rows)
    for (key, which), by_config in slowdowns(runs, gpu).items():
        best = _best(by_config)
        trial = _seen(runs, key, best)
        entry = Entry(best, "measured", trial.static.get("registers"), trial.static.get("shared_memory", 0),
                      trial.static.get("tensor_memory", 0), trial.static.get("occupancy"), trial.static.get("bound"))
        row = rows.get(key) or Row(*key, many=entry, few=entry)
        lost = {name: reason for name, reason in row.lost.items() if name != best}
        rows[key] = replace(row, **{which: entry}, lost=lost)
    return write_table(Table(table.name, table.gpu, table.made, rows), folder)


def _best(by_config: dict) -> str:
    """The config with the least geometric mean of its slowdowns, out of those that were timed on most problems."""
    times = {name: [x for x in found if x is not None] for name, found in by_config.items()}
    most = max(map(len, times.values()))
    return min((name for name, found in times.items() if len(found) == most),
               key=lambda name: (math.fsum(map(math.log, times[name])), name))


def _seen(runs, key, config) -> Trial:
    """A trial of this config for this row, for what its binary takes: the one that takes the most shared memory."""
    trials = [run.of(job)[config] for run in runs for job in run.jobs
              if next(iter(row_keys(job.kernel, job.problem))) == key and config in run.of(job)]
    return max(trials, key=lambda trial: trial.static.get("shared_memory", 0))
