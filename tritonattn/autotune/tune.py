"""Tune the kernels of some problems on this GPU, and keep the best configs.

    candidates -> compiled and pruned (prune.py) -> checked and timed (search.py, bench.py) -> a record in the user's cache
"""

import datetime
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import triton

from .. import gpu
from ..config import Config
from ..configs import user_cache
from ..configs.kernel_hash import kernel_hash
from ..configs.key import key_of, precision
from ..configs.lookup import clear_lookup_cache, lookup_config, row_keys, table_sources
from ..configs.shipped import FILLS, gpu_fingerprint
from ..configs.user_cache import Cache, Record
from ..gpu import Gpu
from ..measure import environment, journal
from ..problem import Problem
from ..runtime.arguments import problem_of
from .bench import IsolatedBench
from .prune import Verdict, candidates, check_report, survey
from .search import QUICK_CONFIGS, STRATEGIES, Bench, Budget, Search, run_search
from .trials import Job
from .worker_pool import Failure, Workers

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


def local_setup(device=None, seed: int = 0, command: str = "tune") -> TuningSetup:
    """Return the setup of this machine. Raises RuntimeError, which names the command, if its kernels cannot be timed."""
    if gpu.INTERPRETED or not torch.cuda.is_available():
        reason = "kernels are interpreted (TRITON_INTERPRET=1)" if gpu.INTERPRETED else "torch finds no GPU"
        raise RuntimeError(f"{command} needs a GPU, but {reason}")
    device = torch.device(device or torch.device("cuda", torch.cuda.current_device()))
    on, workers = gpu.gpu_of(device), Workers()

    def bench(kernel, problem):
        return IsolatedBench(kernel, problem, device, seed, compilers=(workers, on))

    return TuningSetup(on, bench, workers, user_cache.current_cache(), environment.environment_of(device), seed)


def kernels_of(problem: Problem, backward: bool = True) -> tuple[str, ...]:
    """Return the kernels of this problem that are worth tuning."""
    if not backward:
        return ("forward",)
    return ("forward", "dq", "dkdv") if problem.bias is None else ("forward", "dq", "dkdv", "dbias")


def candidate_configs(kernel: str, problem: Problem, on: Gpu) -> list[str]:
    """Return the incumbent, and what the shipped tables hold for this problem, best first."""
    configs = {str(lookup_config(kernel, problem, on).config): None}
    for _, table in table_sources(on):
        for row in filter(None, map(table.rows.get, row_keys(kernel, problem))):
            configs |= {str(getattr(row, fill).config): None for fill in FILLS if getattr(row, fill).fits(on)}
    return list(configs)[:QUICK_CONFIGS]


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
    configs = dict.fromkeys([*candidates(kernel, problem, setup.gpu), Config.parse(incumbent)])
    verdicts = {str(verdict.config): verdict for verdict in survey(kernel, problem, setup.gpu, configs, setup.compilers)}
    names = [name for name, verdict in verdicts.items() if verdict.reason is None]
    return Job(kernel, problem, tuple(dict.fromkeys([*names, incumbent])), incumbent), verdicts


def static_of(verdict: Verdict) -> dict:
    """Return what the compiled kernel of a config needs, as JSON; {} if it was not compiled."""
    if verdict.report is None:
        return {}
    names = ("registers", "stack", "shared_memory", "tensor_memory", "occupancy")
    estimate = {name: verdict.estimate and getattr(verdict.estimate, name) for name in ("bound", "cycles")}
    return {name: getattr(verdict.report, name) for name in names} | estimate


def tune_kernel(kernel: str, problem: Problem, setup: TuningSetup, strategy: str = "halving",
                budget: Budget = NO_BUDGET, again: bool = False) -> Record | None:
    """Tune one kernel of one problem and keep the best config. Returns None if nothing could be timed.

    Configs that were tried with the same kernels and the same Triton are not tried again, unless `again`: only new
    candidates are timed, against the earlier best.
    """
    start, key = time.monotonic(), key_of(kernel, problem, setup.gpu)
    job, verdicts = job_of(kernel, problem, setup, strategy)
    known = None if again else setup.store.get(key, setup.gpu)
    tried = known.run.get("tried", []) if known else []
    if known and set(job.configs) <= {*tried, job.incumbent}:
        return known
    job = replace(job, configs=tuple(name for name in job.configs if name not in tried))
    static = {name: static_of(verdict) for name, verdict in verdicts.items()}
    with setup.bench(kernel, problem) as bench:
        search = run_search(Search(job, bench, budget, static), strategy, setup.seed)
    if (winner := search.winner()) is None:
        return None
    if winner not in static:
        # strategy "table" compiles nothing before
        result, = setup.compilers.map([(kernel, problem, Config.parse(winner), setup.gpu)])
        if isinstance(result, Failure):
            raise RuntimeError(f"{winner} was the fastest, but did not compile again: {result.message}")
        static[winner] = static_of(check_report(result))
    run = {"time": journal.now(), "strategy": strategy, "trials": len(search.trials), "seed": setup.seed,
           "seconds": round(time.monotonic() - start, 3), "tried": sorted({*tried, *search.trials})}
    trial, incumbent = search.trials[winner], search.trials.get(job.incumbent)
    record = Record(key, Config.parse(winner), trial.seconds, len(trial.samples), Config.parse(job.incumbent),
                    incumbent and incumbent.seconds, {name: list(pair) for name, pair in trial.check.items()}, static[winner],
                    {"name": setup.gpu.name} | gpu_fingerprint(setup.gpu), setup.environment | {"triton": triton.__version__},
                    kernel_hash(), run)
    keep(record, setup)
    return record


def keep(record: Record, setup: TuningSetup) -> None:
    """Store a record in the cache, for the next call of this process too."""
    setup.store.put(record)
    clear_lookup_cache()


def tune_all(problems: Iterable[tuple[Problem, Iterable[str]]], setup: TuningSetup, strategy: str = "halving",
             budget: Budget = NO_BUDGET, again: bool = False, say: Callable = print) -> tuple[list[Record], int]:
    """Tune the kernels of each problem; the budget is for each kernel. Problems with equal keys are tuned once.

    Returns the records, and the number of kernels that could not be tuned; an error does not stop the others.
    """
    jobs, records = {}, []
    for problem, kernels in problems:
        for kernel in kernels:
            jobs.setdefault(key_of(kernel, problem, setup.gpu), (kernel, problem))
    for kernel, problem in jobs.values():
        try:
            record = tune_kernel(kernel, problem, setup, strategy, budget, again)
            message = summarize(record)
        except (RuntimeError, ValueError, OSError) as error:
            record, message = None, f"not tuned: {error}"
        say(f"{kernel:8} {problem}: {message}", flush=True)
        records.append(record)
    return [record for record in records if record], records.count(None)


def summarize(record: Record | None) -> str:
    """Describe a record in a few words."""
    if record is None:
        return "not tuned: no config could be timed"
    default, run = record.default_seconds, record.run
    speedup = f", {default / record.seconds:.2f} times as fast as {record.default}" if default else ""
    return f"{record.config}, {record.seconds * 1e6:.0f} us{speedup}; {run['trials']} tried in {run['seconds']:.0f} s"


def on_rank0(tuned: Callable[[], list[Record]], setup: TuningSetup) -> list[Record]:
    """Call `tuned` on rank 0 alone, and return and keep its records on every rank. Every rank must call this."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tuned()
    # gloo has a timeout of its own, NCCL does not wait for hours
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    records = [[]]
    try:
        if dist.get_rank() == 0:
            records = [tuned()]
    finally:
        # after an error too, so that the other ranks do not wait
        dist.broadcast_object_list(records, src=0, group=group)
    for record in records[0] if dist.get_rank() else ():
        keep(record, setup)
    return records[0]
