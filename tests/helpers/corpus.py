"""A synthetic sweep: a smooth surface of times with jitter and drift, determined by a seed. Nothing is timed."""

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path

import torch

from tritonattn import Config, Problem
from tritonattn.autotune import search
from tritonattn.autotune import trials as runs
from tritonattn.autotune.trials import Job, Run, Trial
from tritonattn.measure import journal

JOBS = tuple(itertools.product(("forward", "dq", "dkdv"), (64, 128), ("causal", "full")))  # kernel, head size, mask
SPACE = [Config(*each) for each in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))]
INCUMBENT, CONFIGS, ROUNDS = Config(64, 64, 4, 2), 25, 9
RATE = {"forward": 500e12, "dq": 350e12, "dkdv": 400e12}     # floating-point operations a second, of the best config
BEST = {"forward": (7, 6), "dq": (6, 6.5), "dkdv": (6.5, 7)}  # log2 of the best block_m and block_n at head size 64
ROOM = 200 << 10  # bytes of shared memory


def made_up(jobs: Iterable[tuple[str, int, str]] = JOBS, seed: int = 0) -> Run:
    """Return a finished run. The trials of a job depend on its name and the seed only."""
    planned, trials = [], []
    for kernel, d, mask in jobs:
        problem = Problem((4,), 32, 32, 4096, 4096, d, d, torch.bfloat16, (None, 0) if mask == "causal" else (None, None))
        rng = random.Random(f"{seed} {kernel} {problem}")
        configs = [INCUMBENT, *rng.sample([config for config in SPACE if config != INCUMBENT], CONFIGS - 1)]
        outcomes = {str(config): _outcome(kernel, problem, config, rng) for config in configs}
        # rejected configs last, the others by predicted cycles
        order = sorted(outcomes, key=lambda name: (outcomes[name][0] != "ok", outcomes[name][2]["cycles"]))
        job = Job(kernel, problem, tuple(order), str(INCUMBENT))
        planned.append(job)
        base = _seconds(kernel, problem, INCUMBENT)
        trials += _ended([_trial(job, name, *outcomes[name], base, rng) for name in order], job, rng)
    environment = {"gpu": "a made-up GPU", "arch": "sm_90", "sms": 132, "torch": "2.11.0", "triton": "3.6.0", "commit": None}
    # through JSON, as a plan is read from a file: JSON has no tuples
    plan = json.loads(json.dumps({"schema": runs.SCHEMA, "synthetic": True, "seed": seed, "environment": environment,
                                  "jobs": [job.as_json() for job in planned]}))
    return Run(plan, tuple(planned), tuple(trials))


def write_to(folder: Path, run: Run | None = None) -> Run:
    """Write a run, by default made_up(), as a sweep does; replace the file of an earlier run."""
    run = made_up() if run is None else run
    (folder / runs.JOURNAL).unlink(missing_ok=True)
    with journal.Journal(folder / runs.JOURNAL, run.plan) as book:
        for trial in run.trials:
            book.append(vars(trial))
    return run


def _seconds(kernel, problem, config) -> float:
    """Return the time of a config: a bowl around the best tile of the kernel, which is smaller for wide heads."""
    m, n = BEST[kernel]
    shrunk = 0.5 * (problem.d == 128)
    bowl = 0.09 * (math.log2(config.block_m) - m + shrunk) ** 2 + 0.07 * (math.log2(config.block_n) - n + shrunk) ** 2
    # large tiles need more warps, small tiles fewer
    crowded = abs(math.log2(config.block_m * config.block_n / config.num_warps / 1024))
    direction = "forward" if kernel == "forward" else "backward"
    return problem.flops(direction) / RATE[kernel] * (1 + bowl + 0.06 * crowded + 0.04 * (config.num_stages == 2))


def _outcome(kernel, problem, config, rng) -> tuple[str, float, dict]:
    """Return (status, seconds, properties of the binary)."""
    seconds = _seconds(kernel, problem, config)
    rows = config.block_m + 2 * config.block_n * config.num_stages
    accumulators = 2 if kernel == "dkdv" else 1
    registers = config.block_m * (accumulators * problem.d + config.block_n) // (32 * config.num_warps) + 40
    static = {"registers": min(registers, 255), "stack": 0, "shared_memory": rows * problem.d * 2, "tensor_memory": 0,
              "occupancy": max(1, ROOM // (rows * problem.d * 2)), "bound": rng.choice(("tensor", "special")),
              "cycles": round(seconds * 1.7e9 * rng.lognormvariate(0, 0.12))}
    if config == INCUMBENT:
        return "ok", seconds, static
    if static["shared_memory"] > ROOM:
        return "shared memory", seconds, static
    if registers > 255:
        return "spill", seconds * rng.uniform(0.95, 1.5), static
    if config.num_warps == 8 and config.block_m == 32:
        return "duplicate work", 1.4 * seconds, static
    return rng.choices(("ok", "incorrect", "hang"), (20, 1, 1))[0], seconds, static


def _ended(trials, job, rng) -> list[Trial]:
    """Return the trials that are timed under continuous load, with windows, each at its own clock."""
    ok = {trial.config: trial for trial in trials if trial.status == "ok"}
    last = list(dict.fromkeys([job.incumbent, *list(runs.sampled_times(ok))[:search.SUSTAINED_CONFIGS]]))
    clocks = {name: rng.uniform(1650, 1750) for name in last}
    # half of a kernel's time depends on the clock
    windows = {name: tuple(ok[name].seconds * (0.5 + 0.5 * 1980 / clocks[name]) * rng.gauss(1, 0.001)
                           for _ in range(search.WINDOWS)) for name in last}
    changes = {name: {"windows": windows[name], "windows_beside": windows[job.incumbent], "clock": clocks[name]}
               for name in last}
    return [dataclasses.replace(trial, **changes.get(trial.config, {})) for trial in trials]


def _trial(job, name, status, seconds, static, base, rng) -> Trial:
    """Return the trial of a config. Half of the configs that spill are timed too, to rate that rule."""
    notes = {"spill": "12 in the loop", "incorrect": "dq: error 0.31 of 0.02", "hang": "no answer in 30 s",
             "shared memory": f"{static['shared_memory']} of {ROOM} bytes", "duplicate work": "products x 2.00"}
    samples, base_samples = (), ()
    if status == "ok" or (status == "spill" and rng.random() < 0.5):
        # a GPU that warms up slows both
        drift = [1 + 0.03 * i / ROUNDS for i in range(ROUNDS)]
        samples, base_samples = (tuple(mean * factor * rng.gauss(1, 0.004) for factor in drift)
                                 for mean in (seconds, base))
    if name == job.incumbent:
        base_samples = samples
    check = {"o": [1e-3, 2e-2]} if status == "ok" else {"o": [0.31, 0.02]} if status == "incorrect" else {}
    return Trial(job.name, name, status, notes.get(status, ""), samples, base_samples, check, static,
                 round(rng.uniform(0.3, 2), 3))
