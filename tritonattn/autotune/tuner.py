"""The best config for some kernels of some problems on this GPU: timed once, then kept.

    candidates -> what the lens has against them -> is it right, twice to the bit -> a race -> a record in the user's cache
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
from .isolation import Isolated
from .prune import Verdict, candidates, check_report, survey
from .search import Bench, Budget, Search, run_search
from .trials import Job
from .worker_pool import Failure, Workers

FORWARD, BACKWARD = ("forward",), ("dq", "dkdv")
NEAR = 8  # configs of "table": the incumbent and what tables have for others of its kind
NO_BUDGET = Budget()
PATIENCE = datetime.timedelta(hours=12)


@dataclass
class TuningSetup:
    """Everything that tuning needs from outside, so that tests can bring their own."""

    gpu: Gpu
    bench: Callable[[str, Problem], AbstractContextManager[Bench]]
    compilers: Workers
    store: Cache
    environment: dict = field(default_factory=dict)
    seed: int = 0


def local_setup(device=None, store: Cache | None = None, seed: int = 0) -> TuningSetup:
    """The lab on this machine. RuntimeError: kernels are interpreted, or there is no GPU."""
    if gpu.INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError("tune: expected a GPU and compiled kernels, got "
                           + ("Triton's interpreter" if gpu.INTERPRETED else "no GPU that torch sees"))
    device = torch.device(device or torch.device("cuda", torch.cuda.current_device()))
    return TuningSetup(gpu.gpu_of(device), lambda kernel, problem: Isolated(kernel, problem, device, seed=seed), Workers(),
               store or user_cache.current_cache(), environment.environment_of(device), seed)


def kernels_of(problem: Problem, backward: bool = True) -> tuple[str, ...]:
    """The kernels of this problem that are worth tuning."""
    return FORWARD + (BACKWARD + (("dbias",) if problem.bias is not None else ()) if backward else ())


def candidate_configs(kernel: str, problem: Problem, on: Gpu) -> list[str]:
    """The incumbent, and what the tables of this GPU's like have for this dtype and mask: known to compile and to be right."""
    incumbent = lookup_config(kernel, problem, on)
    found = {str(incumbent.config): None}
    shipped = incumbent.row or lookup.lookup_shipped(kernel, problem, on).row
    for table in tables.shipped_tables() if shipped else ():
        alike = [row for row in table.rows.values() if row.kernel == kernel and row.itemsize == shipped.itemsize
                 and row.mask == shipped.mask and row.width >= shipped.width] if table.gpu["arch"] == on.arch else []
        # what fits a wider head fits a narrower one; the other way round it may not
        for row in sorted(alike, key=lambda row: row.width):
            found |= {getattr(row, fill).config: None for fill in FILLS if getattr(row, fill).fits(on)}
    return list(found)[:NEAR]


def job_of(kernel: str, problem: Problem, lab: TuningSetup, strategy: str) -> tuple[Job, dict[str, Verdict]]:
    """Who is to be timed, in the static order, and what the lens saw of everyone."""
    if precision(problem) == "tf32":
        raise ValueError("tune: expected IEEE products of float32, since the compilers and the bench use them, got TF32 "
                         "(torch.set_float32_matmul_precision)")
    incumbent = str(lookup_config(kernel, problem, lab.gpu).config)
    if strategy == "table":
        return Job(kernel, problem, tuple(candidate_configs(kernel, problem, lab.gpu)), incumbent), {}
    hint = lab.store.hint(key_of(kernel, problem, lab.gpu), lab.gpu)
    configs = dict.fromkeys([*candidates(kernel, problem, lab.gpu), Config.parse(incumbent),
                             *([Config.parse(hint.config)] if hint else [])])
    verdicts = {str(verdict.config): verdict for verdict in survey(kernel, problem, lab.gpu, configs, lab.compilers)}
    able = [name for name, verdict in verdicts.items() if verdict.reason is None]
    return Job(kernel, problem, tuple(dict.fromkeys([*able, incumbent])), incumbent), verdicts


def static_of(verdict: Verdict | None) -> dict:
    """What the lens saw, as JSON knows it."""
    if verdict is None or verdict.report is None:
        return {}
    report, estimate = verdict.report, verdict.estimate
    return {"registers": report.registers, "stack": report.stack, "shared_memory": report.shared_memory,
            "tensor_memory": report.tensor_memory, "occupancy": report.occupancy,
            "bound": estimate and estimate.bound, "cycles": estimate and estimate.cycles}


def tune_kernel(kernel: str, problem: Problem, lab: TuningSetup, strategy: str = "halving",
                budget: Budget = NO_BUDGET, again: bool = False) -> Record | None:
    """Tune one kernel of one problem and keep what wins. None: nothing could be timed.

    What was tried before with the same kernels and Triton is not tried again, unless `again`: new candidates race against
    the one that won then.
    """
    began = time.monotonic()
    job, verdicts = job_of(kernel, problem, lab, strategy)
    known = None if again else lab.store.get(key_of(kernel, problem, lab.gpu), lab.gpu)
    tried = known.run.get("tried", []) if known else []
    if known and set(job.configs) <= {*tried, job.incumbent}:
        return known
    job = replace(job, configs=tuple(name for name in job.configs if name not in tried))
    with lab.bench(kernel, problem) as bench:
        race = run_search(Search(job, bench, budget), strategy, lab.seed)
    winner = race.winner(lambda name: static_of(verdicts.get(name)).get("shared_memory", 0))
    if winner is None:
        return None
    static = static_of(verdicts.get(winner)) or _measured_before(kernel, problem, winner, lab)
    if not static:
        return None
    about = {"id": uuid.uuid4().hex[:12], "time": journal.now(), "strategy": strategy, "trials": len(race.trials),
             "seconds": round(time.monotonic() - began, 3), "seed": lab.seed, "tried": sorted({*tried, *race.trials})}
    record = record_of(race, winner, static, lab, about)
    keep(record, lab)
    return record


def _measured_before(kernel, problem, config, lab) -> dict:
    """What the lens sees of a config that no survey looked at; nothing where it cannot."""
    found, = lab.compilers.map([(kernel, problem, Config.parse(config), lab.gpu)])
    return {} if isinstance(found, Failure) else static_of(check_report(found))


def keep(record: Record, lab: TuningSetup) -> None:
    """In the cache, and for the next call in this process."""
    lab.store.put(record, lab.gpu)
    clear_lookup_cache()


def record_of(race: Search, winner: str, static: dict, lab: TuningSetup, about: dict) -> Record:
    """What the cache keeps of a winner."""
    job, trial = race.job, race.trials[winner]
    incumbent = race.trials.get(job.incumbent)
    q20, median, q80 = quantiles(trial.samples)
    versions = {name: lab.environment.get(name) for name in ("tritonattn", "torch", "triton", "cuda", "driver")}
    return Record(key_of(job.kernel, job.problem, lab.gpu), trial.config, median, q20, q80, len(trial.samples), job.incumbent,
                  incumbent and incumbent.seconds, {name: list(pair) for name, pair in trial.check.items()}, static,
                  {"name": lab.gpu.name} | tables.gpu_fingerprint(lab.gpu), versions | {"triton": triton.__version__},
                  kernel_hash(), about)


def tune_all(problems: Iterable[tuple[Problem, Iterable[str]]], lab: TuningSetup, strategy: str = "halving",
             budget: Budget = NO_BUDGET, again: bool = False, say: Callable = print) -> tuple[list[Record], int]:
    """Tune the kernels of each problem, one after the other; the budget is for each. Keys that are alike are tuned once.

    What was found, and how many kernels could not be tuned: the others go on.
    """
    found, seen, missed = [], set(), 0
    for problem, kernels in problems:
        for kernel in kernels:
            key = key_of(kernel, problem, lab.gpu)
            if key in seen:
                continue
            seen.add(key)
            try:
                record = tune_kernel(kernel, problem, lab, strategy, budget, again)
                said = summarize(record)
            except (RuntimeError, ValueError, OSError) as error:
                record, said = None, f"not tuned: {error}"
            say(f"{kernel:8} {problem}: {said}", flush=True)
            found, missed = found + ([record] if record else []), missed + (record is None)
    return found, missed


def summarize(record: Record | None) -> str:
    """A record in a few words."""
    if record is None:
        return "nothing could be timed"
    default = record.default_seconds
    than = f", {default / record.seconds:.2f} times as fast as {record.default}" if default else ""
    run = record.run
    return f"{record.config}, {record.seconds * 1e6:.0f} us{than}; {run['trials']} tried in {run['seconds']:.0f} s"


def on_rank0(tuned: Callable[[], list[Record]], lab: TuningSetup) -> list[Record]:
    """What `tuned` gives, the same in every process: of several under torch.distributed the first tunes, the others take it.

    Every process must come here. A record of another kind of GPU than a process's own is not kept there.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tuned()
    first = dist.get_rank() == 0
    # the others wait for as long as it takes, which NCCL would not
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        sent = [[record.as_json() for record in tuned()] if first else None]
    except BaseException:
        # the others must not wait for ever
        dist.broadcast_object_list([[]], src=0, group=group)
        raise
    dist.broadcast_object_list(sent, src=0, group=group)
    found = [Record.from_json(content) for content in sent[0]]
    for record in found if not first else ():
        if user_cache.gpu_dirname(record.gpu) == user_cache.gpu_dirname(tables.gpu_fingerprint(lab.gpu)):
            keep(record, lab)
    return found
