"""Tune the kernels of some problems on this GPU, and keep the best configs.

    candidates -> compiled and pruned (prune.py) -> checked and timed (search.py, bench.py) -> a record in the user cache

Several problems can share one config for each kernel: then a config's time is the sum over the problems (bench.JointBench),
and each problem keeps a record of its own.
"""

import contextlib
import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from ..runtime.packed_arguments import problem_of
from ..score_function import check_importable, functions_named
from .bench import IsolatedBench, JointBench
from .prune import Verdict, candidates, check_report, survey
from .search import QUICK_CONFIGS, STRATEGIES, Bench, Budget, Search, run_search
from .trials import Job
from .worker_pool import Failure, Workers

NO_BUDGET = Budget()
RANK_TIMEOUT = datetime.timedelta(hours=12)  # of the other ranks, while rank 0 tunes


def tune(q, k, v, *, together: Sequence[tuple] | None = None, backward: bool = True, strategy: str = "halving",
         trials: int | None = None, seconds: float = float("inf"), again: bool = False, **options) -> list:
    """Find the best configs for `attention(q, k, v, **options)` on the GPU of the tensors, and use them in later calls.

    Takes the options of `attention` and raises the same errors. With cu_seqlens_q, the options are those of `attention_varlen`;
    its calls use the configs of a padded batch, which is tuned. Only shapes, dtypes and options matter: the inputs are drawn.
    Each kernel takes minutes (less with strategy="table"), most of them to compile, and prints a line. Every config is checked
    against the definition before it is timed, in a child process. The fastest four are then timed under continuous load, for
    about half a minute per problem (not with strategy="table"): the GPU's clock falls more for configs that need more power.
    The best config goes to the user cache (`python -m tritonattn cache path`), which every call looks at first.

    Under torch.distributed every process must call this: rank 0 tunes, and all ranks get the same configs.

    Args:
        q, k, v: [..., heads, length, head size], as for `attention`.
        together: further calls, each (q, k, v, options), that must use the same config as this one; a kernel that only some
            calls need is tuned for these. The config with the least time for all calls wins, so long calls weigh more; list a
            call twice to double its weight.
        backward: tune the kernels of the backward pass too.
        strategy: "halving", "static", "table", "random" or "exhaustive"; see autotune/search.py.
        trials: at most this many configs for each kernel. None: no limit.
        seconds: at most this long to check and time each kernel.
        again: try again the configs of earlier runs. By default only new candidates are timed, against the earlier best.

    Returns:
        list of user_cache.Record, one for each kernel that could be timed; with `together` one for each kernel and key.

    Raises:
        RuntimeError: there is no GPU, or kernels are interpreted.
        ValueError: the strategy, the budget or `together` is invalid, float32 dots use TF32, or the processes that compile and
            time cannot import a score function.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if trials is not None and not (isinstance(trials, int) and trials > 0):
        raise ValueError(f"trials: expected a positive integer or None, got {trials!r}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds!r}")
    problems = [problem_of(q, k, v, **options), *problems_together(together, q.device)]
    check_functions(problems)
    jobs, setup = [(problem, kernels_of(problem, backward)) for problem in problems], local_setup(q.device)
    with setup.compilers:
        return on_rank0(lambda: tune_all(jobs, setup, strategy, Budget(trials, seconds), again, together is not None)[0], setup)


def check_functions(problems: Iterable[Problem]) -> None:
    """Raise ValueError unless other processes can import the functions of these problems."""
    for function in {each for problem in problems for each in (problem.score_function, problem.mask_function)} - {None}:
        check_importable(function.name)


def problems_together(calls: Sequence[tuple] | None, device: torch.device) -> list[Problem]:
    """Return the problems of these calls, each (q, k, v, options); [] for None. Raises ValueError, or as `attention` does."""
    if calls is None:
        return []
    if not (isinstance(calls, (list, tuple)) and calls):
        raise ValueError(f"together: expected a list of at least one call (q, k, v, options), got {calls!r:.60}")
    problems = []
    for number, call in enumerate(calls):
        if not (isinstance(call, (list, tuple)) and len(call) == 4 and isinstance(call[3], Mapping)):
            kinds = [type(each).__name__ for each in call] if isinstance(call, (list, tuple)) else type(call).__name__
            raise ValueError(f"together[{number}]: expected (q, k, v, options) with a dict of options, got {kinds}")
        q, k, v, options = call
        problems.append(problem_of(q, k, v, **options))
        if q.device != device:
            raise ValueError(f"together[{number}]: expected tensors on {device} like the first call's, got {q.device}")
    return problems


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
    inference = problem.score_function is not None and functions_named(problem.score_function.name)[1] is None
    if not backward or inference:
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


def joint_job(kernel: str, problems: Iterable[Problem], setup: TuningSetup, strategy: str
              ) -> tuple[Job, dict[Problem, str], list[dict[str, Verdict]]]:
    """Return the job of one config for all problems, the incumbent of each, and the verdicts on the configs for each.

    The job has the name of the first problem, and the configs that no problem excludes, all incumbents first. The first of
    them is its incumbent. Raises ValueError if there are none. The job of one problem is that of `job_of`.
    """
    jobs, verdicts = zip(*(job_of(kernel, problem, setup, strategy) for problem in problems))
    incumbents = {job.problem: job.incumbent for job in jobs}
    if len(jobs) == 1:
        return jobs[0], incumbents, list(verdicts)
    excluded = {name for each in verdicts for name, verdict in each.items() if verdict.reason}
    names = dict.fromkeys([*incumbents.values(), *(name for job in jobs for name in job.configs)])
    configs = tuple(name for name in names if name not in excluded)
    if not configs:
        raise ValueError(f"tune: expected a config of {kernel} that suits all of {len(jobs)} problems, but each is excluded "
                         "for one of them; tune them apart")
    return replace(jobs[0], configs=configs, incumbent=configs[0]), incumbents, list(verdicts)


def tune_kernel(kernel: str, problem: Problem, setup: TuningSetup, strategy: str = "halving",
                budget: Budget = NO_BUDGET, again: bool = False) -> Record | None:
    """Tune one kernel of one problem and keep the best config. Returns None if nothing could be timed.

    Configs that were tried with the same kernels and the same Triton are not tried again, unless `again`: only new
    candidates are timed, against the earlier best.
    """
    records = tune_together(kernel, {problem: 1}, setup, strategy, budget, again)
    return records[0] if records else None


def tune_together(kernel: str, problems: Mapping[Problem, int], setup: TuningSetup, strategy: str = "halving",
                  budget: Budget = NO_BUDGET, again: bool = False) -> list[Record]:
    """Tune one kernel of several problems, each with a number of calls, for one config, as `tune_kernel` does.

    Keeps and returns a record for each key, [] if nothing could be timed. Raises ValueError as `check_functions` does.
    """
    check_functions(problems)
    start = time.monotonic()
    keys, calls = {}, {}  # {key: its first problem}, {key: calls}
    for problem, count in problems.items():
        key = key_of(kernel, problem, setup.gpu)
        keys.setdefault(key, problem)
        calls[key] = calls.get(key, 0) + count
    shared = sorted(keys) if len(keys) > 1 else []
    group = {"together": shared, "calls": [calls[key] for key in shared]}
    job, incumbents, verdicts = joint_job(kernel, problems, setup, strategy)
    known = [] if again else [setup.store.get(key, setup.gpu) for key in keys]
    # what another group of problems tried, or the same with other numbers of calls, does not count: its best may be another
    if not all(record and all(record.run.get(name, []) == value for name, value in group.items()) for record in known):
        known = []
    tried = known[0].run.get("tried", []) if known else []
    if known and set(job.configs) <= {*tried, job.incumbent}:
        return known
    job = replace(job, configs=tuple(name for name in job.configs if name not in tried))
    static = {problem: {name: static_of(verdict) for name, verdict in each.items()}
              for problem, each in zip(problems, verdicts)}
    with contextlib.ExitStack() as benches:
        bench = JointBench({problem: benches.enter_context(setup.bench(kernel, problem)) for problem in problems}, problems)
        search = Search(job, bench, budget, static[job.problem], problems=len(problems))
        run_search(search, strategy, setup.seed)
    if (winner := search.winner()) is None:
        return []
    run = {"time": journal.now(), "strategy": strategy, "trials": len(search.trials), "seed": setup.seed,
           "seconds": round(time.monotonic() - start, 3), "tried": sorted({*tried, *search.trials})} | group
    records = []
    for key, problem in keys.items():
        figures = static[problem].get(winner) or compiled_static(kernel, problem, winner, setup)
        records.append(record_of(key, problem, incumbents[problem], search, bench, figures, setup, run))
    # an error in one record must not leave others of the group in the cache
    for record in records:
        keep(record, setup)
    return records


def record_of(key: str, problem: Problem, default: str, search: Search, bench: JointBench, static: dict, setup: TuningSetup,
              run: dict) -> Record:
    """Return the record of the winner of a search for one of its problems, whose config so far is `default`."""
    winner = search.winner()
    trial, default_trial, timed = search.trials[winner], search.trials.get(default), bench.timings[winner][problem]
    default_seconds = None
    # the configs of the other problems so far may not have come to the last round
    if default_trial and len(default_trial.decisive) == len(trial.decisive):
        default_seconds = statistics.median(bench.timings[default][problem].seconds)
    check = {name: list(pair) for name, pair in bench.checks[winner][problem].items()}
    return Record(key, Config.parse(winner), statistics.median(timed.seconds), len(timed.seconds), bool(trial.windows),
                  timed.clock, Config.parse(default), default_seconds, check, static,
                  {"name": setup.gpu.name} | gpu_fingerprint(setup.gpu), setup.environment | {"triton": triton.__version__},
                  kernel_hash(), run)


def compiled_static(kernel: str, problem: Problem, config: str, setup: TuningSetup) -> dict:
    """Return the `static_of` of a config that was not compiled before, as strategy "table" does not."""
    result, = setup.compilers.map([(kernel, problem, Config.parse(config), setup.gpu)])
    if isinstance(result, Failure):
        raise RuntimeError(f"{config} was the fastest, but did not compile again: {result.message}")
    return static_of(check_report(result))


def keep(record: Record, setup: TuningSetup) -> None:
    """Store a record in the cache, for the next call of this process too."""
    setup.store.put(record)
    clear_lookup_cache()


def tune_all(problems: Iterable[tuple[Problem, Iterable[str] | Mapping[str, int]]], setup: TuningSetup,
             strategy: str = "halving", budget: Budget = NO_BUDGET, again: bool = False, together: bool = False,
             say: Callable = print) -> tuple[list[Record], int]:
    """Tune the kernels of each problem; the budget is for each kernel. Problems with equal keys are tuned once.

    With `together` all problems share one config for each kernel; kernels are then {kernel: calls}, or each is called once.
    Returns the records, and the number of kernels that could not be tuned; an error does not stop the others.
    """
    jobs, records, failed = {}, [], 0  # {(kernel, key)}: {problem: calls}
    for problem, kernels in problems:
        for kernel in kernels:
            calls = jobs.setdefault((kernel, "" if together else key_of(kernel, problem, setup.gpu)), {})
            if together or not calls:
                calls[problem] = calls.get(problem, 0) + (kernels[kernel] if isinstance(kernels, Mapping) else 1)
    for (kernel, _), calls in jobs.items():
        name = f"{kernel:8} {next(iter(calls))}" + f" and {len(calls) - 1} more" * (len(calls) > 1)
        try:
            found = tune_together(kernel, calls, setup, strategy, budget, again)
            message = summarize(found)
        except (RuntimeError, ValueError, OSError) as error:
            found, message = [], f"not tuned: {error}"
        say(f"{name}: {message}", flush=True)
        records += found
        failed += not found
    return records, failed


def summarize(records: Sequence[Record]) -> str:
    """Describe the records of one config in a few words."""
    if not records:
        return "not tuned: no config could be timed"
    run, parts = records[0].run, []
    for record in records:
        clock = f" at {record.clock:.0f} MHz" if record.clock else ""
        default = record.default_seconds
        speedup = f", {default / record.seconds:.2f} times as fast as {record.default}" if default else ""
        parts.append(f"{record.seconds * 1e6:.0f} us{clock}{speedup}")
    return f"{records[0].config}, {'; '.join(parts)}; {run['trials']} tried in {run['seconds']:.0f} s"


def on_rank0(tuned: Callable[[], list[Record]], setup: TuningSetup) -> list[Record]:
    """Call `tuned` on rank 0 alone, and return and keep its records on every rank. Every rank must call this."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tuned()
    # gloo has a timeout of its own, NCCL does not wait for hours
    group = dist.new_group(backend="gloo", timeout=RANK_TIMEOUT)
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
