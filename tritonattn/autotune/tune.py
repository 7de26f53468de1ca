"""Tune the kernels of some problems on this GPU, and keep the best configs.

    candidates -> compiled and pruned (prune.py) -> checked and timed (search.py, bench.py) -> a record in the user's cache
"""

import datetime
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import triton

from .. import gpu
from ..config import Config
from ..configs import lookup, user_cache
from ..configs import shipped as tables
from ..configs.kernel_hash import kernel_hash
from ..configs.key import key_of, precision
from ..configs.lookup import clear_lookup_cache, lookup_config
from ..configs.shipped import FILLS
from ..configs.user_cache import Cache, Record
from ..gpu import Gpu
from ..measure import environment, journal
from ..measure.timing import quantiles
from ..problem import Problem
from ..runtime.arguments import problem_of
from .bench import IsolatedBench
from .prune import Verdict, candidates, check_report, survey
from .search import STRATEGIES, Bench, Budget, Search, run_search
from .trials import Job
from .worker_pool import Failure, Workers

FORWARD, BACKWARD = ("forward",), ("dq", "dkdv")
MOST_FROM_TABLES = 8  # configs of strategy "table"
NO_BUDGET = Budget()
PATIENCE = datetime.timedelta(hours=12)  # of the other ranks, while rank 0 tunes


def tune(q, k, v, *, backward: bool = True, strategy: str = "halving", trials: int | None = None,
         seconds: float = float("inf"), again: bool = False, **options) -> list:
    """Find the best configs for `attention(q, k, v, **options)` on the GPU of the tensors, and use them in later calls.

    Takes the options of `attention` and raises the same errors. Only shapes, dtypes and options matter: the inputs are
    drawn. Each kernel takes minutes (less with strategy="table"), most of them to compile, and prints a line. Every config
    is checked against the definition before it is timed, in a child process. The best config goes to the user's cache
    (`python -m tritonattn cache path`), which every call looks at first.

    Under torch.distributed every process must call this: rank 0 tunes, and all ranks get the same configs.

    Args:
        q, k, v: [..., heads, length, head size], as for `attention`.
        backward: tune the kernels of the backward pass too.
        strategy: "halving", "static", "table", "random" or "exhaustive"; see autotune/search.py.
        trials: at most this many configs for each kernel. None: no limit.
        seconds: at most this long to check and time each kernel.
        again: try again the configs of earlier runs. By default only new candidates are timed, against the earlier best.

    Returns:
        list of user_cache.Record, one for each kernel that could be timed.

    Raises:
        RuntimeError: there is no GPU, or kernels are interpreted.
        ValueError: the strategy or the budget is invalid, or float32 dots use TF32.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if trials is not None and not (isinstance(trials, int) and trials > 0):
        raise ValueError(f"trials: expected a positive integer or None, got {trials!r}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds!r}")
    problem, setup = problem_of(q, k, v, **options), local_setup(q.device)
    jobs = [(problem, kernels_of(problem, backward))]
    with setup.compilers:
        return on_rank0(lambda: tune_all(jobs, setup, strategy, Budget(trials, seconds), again)[0], setup)


@dataclass
class TuningSetup:
    """A GPU, and the tools to tune for it."""

    gpu: Gpu
    bench: Callable[[str, Problem], AbstractContextManager[Bench]]
    compilers: Workers
    store: Cache
    environment: dict = field(default_factory=dict)
    seed: int = 0


def local_setup(device=None, store: Cache | None = None, seed: int = 0, command: str = "tune") -> TuningSetup:
    """Return the setup of this machine. Raises RuntimeError, which names the command, if its kernels cannot be timed."""
    if gpu.INTERPRETED or not torch.cuda.is_available():
        reason = "kernels are interpreted (TRITON_INTERPRET=1)" if gpu.INTERPRETED else "torch finds no GPU"
        raise RuntimeError(f"{command} needs a GPU, but {reason}")
    device = torch.device(device or torch.device("cuda", torch.cuda.current_device()))
    return TuningSetup(gpu.gpu_of(device), lambda kernel, problem: IsolatedBench(kernel, problem, device, seed), Workers(),
                       store or user_cache.current_cache(), environment.environment_of(device), seed)


def kernels_of(problem: Problem, backward: bool = True) -> tuple[str, ...]:
    """Return the kernels of this problem that are worth tuning."""
    return FORWARD + (BACKWARD + (("dbias",) if problem.bias is not None else ()) if backward else ())


def candidate_configs(kernel: str, problem: Problem, on: Gpu) -> list[str]:
    """Return the incumbent, and what the shipped tables of this architecture hold for the same dtype and kind of mask."""
    incumbent = lookup_config(kernel, problem, on)
    configs = {str(incumbent.config): None}
    shipped = incumbent.row or lookup.lookup_shipped(kernel, problem, on).row
    for table in tables.shipped_tables() if shipped else ():
        similar = [row for row in table.rows.values() if row.kernel == kernel and row.itemsize == shipped.itemsize
                   and row.mask == shipped.mask and row.width >= shipped.width] if table.gpu["arch"] == on.arch else []
        # what fits a wider head fits a narrower one, but not the reverse
        for row in sorted(similar, key=lambda row: row.width):
            configs |= {str(getattr(row, fill).config): None for fill in FILLS if getattr(row, fill).fits(on)}
    return list(configs)[:MOST_FROM_TABLES]


def job_of(kernel: str, problem: Problem, setup: TuningSetup, strategy: str) -> tuple[Job, dict[str, Verdict]]:
    """Return the configs to be timed, by their modelled time, and the verdict on every candidate.

    The incumbent, which calls use so far, is timed even if its verdict is bad.
    """
    if precision(problem) == "tf32":
        raise ValueError("tune: float32 dots use TF32, but tuning compiles and checks with IEEE dots; "
                         'call torch.set_float32_matmul_precision("highest") first')
    incumbent = str(lookup_config(kernel, problem, setup.gpu).config)
    if strategy == "table":
        return Job(kernel, problem, tuple(candidate_configs(kernel, problem, setup.gpu)), incumbent), {}
    stale = setup.store.get_stale(key_of(kernel, problem, setup.gpu), setup.gpu)
    configs = dict.fromkeys([*candidates(kernel, problem, setup.gpu), Config.parse(incumbent),
                             *([stale.config] if stale else [])])
    verdicts = {str(verdict.config): verdict for verdict in survey(kernel, problem, setup.gpu, configs, setup.compilers)}
    names = [name for name, verdict in verdicts.items() if verdict.reason is None]
    return Job(kernel, problem, tuple(dict.fromkeys([*names, incumbent])), incumbent), verdicts


def static_of(verdict: Verdict | None) -> dict:
    """Return what the compiled kernel of a config needs, as JSON; {} if it was not compiled."""
    if verdict is None or verdict.report is None:
        return {}
    report, estimate = verdict.report, verdict.estimate
    return {"registers": report.registers, "stack": report.stack, "shared_memory": report.shared_memory,
            "tensor_memory": report.tensor_memory, "occupancy": report.occupancy,
            "bound": estimate and estimate.bound, "cycles": estimate and estimate.cycles}


def tune_kernel(kernel: str, problem: Problem, setup: TuningSetup, strategy: str = "halving",
                budget: Budget = NO_BUDGET, again: bool = False) -> Record | None:
    """Tune one kernel of one problem and keep the best config. Returns None if nothing could be timed.

    Configs that were tried with the same kernels and the same Triton are not tried again, unless `again`: only new
    candidates are timed, against the earlier best.
    """
    start = time.monotonic()
    job, verdicts = job_of(kernel, problem, setup, strategy)
    known = None if again else setup.store.get(key_of(kernel, problem, setup.gpu), setup.gpu)
    tried = known.run.get("tried", []) if known else []
    if known and set(job.configs) <= {*tried, job.incumbent}:
        return known
    job = replace(job, configs=tuple(name for name in job.configs if name not in tried))
    with setup.bench(kernel, problem) as bench:
        search = run_search(Search(job, bench, budget), strategy, setup.seed)
    winner = search.winner(lambda name: static_of(verdicts.get(name)).get("shared_memory", 0))
    if winner is None:
        return None
    static = static_of(verdicts.get(winner)) or _compiled(kernel, problem, winner, setup)
    if not static:
        return None
    run = {"id": uuid.uuid4().hex[:12], "time": journal.now(), "strategy": strategy, "trials": len(search.trials),
           "seconds": round(time.monotonic() - start, 3), "seed": setup.seed, "tried": sorted({*tried, *search.trials})}
    record = record_of(search, winner, static, setup, run)
    keep(record, setup)
    return record


def _compiled(kernel, problem, config, setup) -> dict:
    """Return `static_of` a config that was not surveyed."""
    result, = setup.compilers.map([(kernel, problem, Config.parse(config), setup.gpu)])
    return {} if isinstance(result, Failure) else static_of(check_report(result))


def keep(record: Record, setup: TuningSetup) -> None:
    """Store a record in the cache, for the next call of this process too."""
    setup.store.put(record)
    clear_lookup_cache()


def record_of(search: Search, winner: str, static: dict, setup: TuningSetup, run: dict) -> Record:
    """Return the cache's record of the best config."""
    job, trial = search.job, search.trials[winner]
    incumbent = search.trials.get(job.incumbent)
    q20, median, q80 = quantiles(trial.samples)
    versions = {name: setup.environment.get(name) for name in ("tritonattn", "torch", "triton", "cuda", "driver")}
    return Record(key_of(job.kernel, job.problem, setup.gpu), Config.parse(trial.config), median, q20, q80, len(trial.samples),
                  Config.parse(job.incumbent), incumbent and incumbent.seconds,
                  {name: list(pair) for name, pair in trial.check.items()}, static,
                  {"name": setup.gpu.name} | tables.gpu_fingerprint(setup.gpu), versions | {"triton": triton.__version__},
                  kernel_hash(), run)


def tune_all(problems: Iterable[tuple[Problem, Iterable[str]]], setup: TuningSetup, strategy: str = "halving",
             budget: Budget = NO_BUDGET, again: bool = False, say: Callable = print) -> tuple[list[Record], int]:
    """Tune the kernels of each problem; the budget is for each kernel. Problems with equal keys are tuned once.

    Returns the records, and the number of kernels that could not be tuned; an error does not stop the others.
    """
    records, seen, failed = [], set(), 0
    for problem, kernels in problems:
        for kernel in kernels:
            key = key_of(kernel, problem, setup.gpu)
            if key in seen:
                continue
            seen.add(key)
            try:
                record = tune_kernel(kernel, problem, setup, strategy, budget, again)
                message = summarize(record)
            except (RuntimeError, ValueError, OSError) as error:
                record, message = None, f"not tuned: {error}"
            say(f"{kernel:8} {problem}: {message}", flush=True)
            records, failed = records + ([record] if record else []), failed + (record is None)
    return records, failed


def summarize(record: Record | None) -> str:
    """Describe a record in a few words."""
    if record is None:
        return "not tuned: no config could be timed"
    default = record.default_seconds
    speedup = f", {default / record.seconds:.2f} times as fast as {record.default}" if default else ""
    run = record.run
    return f"{record.config}, {record.seconds * 1e6:.0f} us{speedup}; {run['trials']} tried in {run['seconds']:.0f} s"


def on_rank0(tuned: Callable[[], list[Record]], setup: TuningSetup) -> list[Record]:
    """Call `tuned` on rank 0 alone, and return its records on every rank. Every rank must call this.

    A rank with another kind of GPU does not keep them.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tuned()
    first = dist.get_rank() == 0
    # gloo has a timeout of its own, NCCL does not wait for hours
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        content = [[record.as_json() for record in tuned()] if first else None]
    except BaseException:
        # release the other ranks
        dist.broadcast_object_list([[]], src=0, group=group)
        raise
    dist.broadcast_object_list(content, src=0, group=group)
    records = [Record.from_json(entry) for entry in content[0]]
    for record in records if not first else ():
        if user_cache.gpu_dirname(record.gpu) == user_cache.gpu_dirname(tables.gpu_fingerprint(setup.gpu)):
            keep(record, setup)
    return records
