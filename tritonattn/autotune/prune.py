"""Static pruning: exclude configs for what the compiler makes of them, and rank the others by the cost model.

    candidates -> constraint, prefilter     before compiling
               -> all other REASONS         from the binary; the first that holds. A note tells of spills besides
               -> a ranking by modelled time
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..analysis.compile_report import KernelReport, padded
from ..analysis.cost_model import Estimate, estimate
from ..block_mask import TILE
from ..config import Config
from ..configs.key import precision
from ..gpu import Gpu
from ..problem import Problem
from .worker_pool import Failure, Workers

REASONS = {
    "constraint": "not compiled: the tile is larger than a block mask's, or has too few rows for its warps",
    "prefilter": "not compiled, unless a sweep draws it as a sample: its accumulators take nearly all registers of a thread",
    "compile error": "the compiler reports an error",
    "compile timeout": "the compiler did not finish in time",
    "shared memory": "a block needs more shared memory than the GPU allows",
    "tensor memory": "a block needs more tensor memory than there is (Blackwell)",
    "race": "a register or a tile of a running product is overwritten (Hopper)",
    "register collapse": "the compiler uses few registers and keeps everything on the stack",
    "wrong tensor path": "the loop does not use the best tensor-core instruction of this GPU",
    "duplicate work": "several warps compute the same dots or exponentials",
    "serialized": "the compiler waits for each dot before it starts the next (Hopper)",
    "spill": "registers are spilled in the loop over tiles",
    "unclear": "no loop was found, or its dots are fewer than the tile needs",
    "slower": "nothing is wrong, but the model expects it to be slower",
}
# block sizes, warps, stages
SPACE = {"block_m": (16, 32, 64, 128, 256), "block_n": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
# float32 registers per thread that accumulators and scores may take before everything spills; Blackwell's are in tensor memory
REGISTER_BUDGET = {"sm_90": 200, "sm_100": 288, "gfx942": 400}
DEFAULT_REGISTER_BUDGET = 160
DUPLICATE_PRODUCTS, DUPLICATE_EXPONENTIALS, MIN_PRODUCTS = 1.3, 1.6, 0.95
COLLAPSED_REGISTERS, COLLAPSED_STACK = 40, 1024
# factors on the modelled time, chosen by judgement: the model does not know these costs
PENALTY = 1.5        # for any reason but spills
SPILL_PENALTY = 0.1  # added to 1 for each doubling of the spill instructions


@dataclass(frozen=True)
class Verdict:
    """One config: the reason to exclude it (None: it may run), and what was measured in its binary."""

    config: Config
    reason: str | None
    note: str = ""
    report: KernelReport | None = None
    estimate: Estimate | None = None


def candidates(kernel: str, problem: Problem, gpu: Gpu, stages: Iterable[int] = SPACE["num_stages"]) -> list[Config]:
    """Return all configs for a kernel, without extreme tiles such as 16 x 128."""
    configs = []
    for m, n, warps, depth in itertools.product(*SPACE.values()):
        owner, other = (n, m) if kernel == "dkdv" else (m, n)
        if depth in stages and other <= owner * 2 and owner <= other * 8:
            configs += forms(kernel, problem, Config(m, n, warps, depth), gpu)
    return configs


def forms(kernel: str, problem: Problem, config: Config, gpu: Gpu) -> list[Config]:
    """Return a config with the fields that its GPU always sets, with and without `ahead` and `two_passes`.

    Two passes are tried only where the accumulators of dK and dV together leave few registers: for wide heads, and tiles of
    at least 64 keys.
    """
    pipelined, dtype = config.num_stages > 1, problem.dtype
    # only Hopper leaves the edges out of its pipeline. AMD's compiler fails at some kernels with `ahead`, and its layouts
    # make mma_sum slower than additions
    fixed = replace(config, edge_stages=1 if gpu.arch == "sm_90" and pipelined else None,
                    mma_sum=kernel == "forward" and dtype.itemsize == 2 and not gpu.is_amd)
    starts_ahead = kernel in ("forward", "dkdv") and pipelined and dtype.itemsize == 2 and not gpu.is_amd
    wide = kernel == "dkdv" and config.block_n >= 64 and padded(problem.d) + padded(problem.dv) > 256 and dtype.itemsize == 2
    return [replace(fixed, ahead=ahead, two_passes=two_passes)
            for two_passes in ((False, True) if wide else (False,)) for ahead in ((False, True) if starts_ahead else (False,))]


def check_config(kernel: str, problem: Problem, config: Config, gpu: Gpu) -> Verdict | None:
    """Return a verdict that needs no compiler, or None."""
    owner, other = (config.block_n, config.block_m) if kernel == "dkdv" else (config.block_m, config.block_n)
    # warps split the rows of a tile for the tensor cores; for NVIDIA's float32, without tensor cores, also its columns
    ieee = problem.dtype.itemsize == 4 and not gpu.is_amd
    if owner < 8 * config.num_warps and not (ieee and owner * other >= 64 * config.num_warps):
        return Verdict(config, "constraint", f"{owner} rows for {config.num_warps} warps")
    if problem.mapped and max(owner, other) > TILE:
        return Verdict(config, "constraint", f"the blocks of a block mask have {TILE} rows")
    d, dv = padded(problem.d), padded(problem.dv)
    accumulators = {"forward": dv, "dq": d, "dkdv": max(d, dv) if config.two_passes else d + dv, "dbias": other}.get(kernel, 0)
    scores = other * (1 if kernel == "forward" else 2)
    registers = owner * (accumulators + scores) / (config.num_warps * gpu.multiprocessor.lanes)
    room = REGISTER_BUDGET.get(gpu.arch, DEFAULT_REGISTER_BUDGET)
    if registers > room:
        return Verdict(config, "prefilter", f"{registers:.0f} registers for accumulators and scores, {room} allowed")
    return None


def check_report(report: KernelReport) -> Verdict:
    """Return the verdict on a compiled config."""
    return Verdict(report.config, *_reason(report), report, estimate(report) if report.fits else None)


def _reason(report) -> tuple[str | None, str]:
    """Return the first of REASONS that holds, or None, and a note."""
    gpu = report.gpu
    if report.shared_memory > gpu.shared_memory:
        return "shared memory", f"{report.shared_memory} bytes, {gpu.shared_memory} allowed"
    if report.tensor_memory > gpu.tensor_memory:
        return "tensor memory", f"{report.tensor_memory} columns, {gpu.tensor_memory} allowed"
    if report.race:
        return "race", report.race
    if report.registers <= COLLAPSED_REGISTERS and report.stack >= COLLAPSED_STACK:
        return "register collapse", f"{report.registers} registers, {report.stack} bytes of stack"
    if not report.loops:
        return "unclear", "no loop over tiles was found"
    spills = f"{report.loop_spills} in the loop" if report.loop_spills else ""
    also = f", and spills {spills}" if spills else ""
    if report.mma_instruction != report.best_mma_instruction:
        expected = report.best_mma_instruction or "none"
        return "wrong tensor path", f"{report.mma_instruction or 'none'} instead of {expected}{also}"
    # without tensor cores a dot has no instruction of its own to count
    duplicated = report.duplicated if report.mma_instruction else 1.0
    if duplicated >= DUPLICATE_PRODUCTS or report.redone >= DUPLICATE_EXPONENTIALS:
        return "duplicate work", f"products x {duplicated:.2f}, exponentials x {report.redone:.2f}{also}"
    if report.serialized:
        return "serialized", also.removeprefix(", and ")
    if spills:
        return "spill", spills
    least = min(each.duplicated for each in report.passes) if report.mma_instruction else 1.0
    if least < MIN_PRODUCTS:
        return "unclear", f"products x {least:.2f}"
    return None, ""


def survey(kernel: str, problem: Problem, gpu: Gpu, configs: Iterable[Config], workers: Workers,
           check_first: bool = True) -> list[Verdict]:
    """Compile configs and return the ranked verdicts on them. check_first: only those that `check_config` does not exclude."""
    verdicts = {config: check_config(kernel, problem, config, gpu) if check_first else None for config in configs}
    compiled = [config for config, verdict in verdicts.items() if verdict is None]
    results = workers.map([(kernel, problem, config, gpu, precision(problem) or "ieee") for config in compiled])
    for config, result in zip(compiled, results):
        verdicts[config] = (Verdict(config, result.code, result.message) if isinstance(result, Failure) else
                            check_report(result))
    return ranked(verdicts.values())


def ranked(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Sort by modelled time, then shared memory, then name. Excluded configs come last, by their penalized time, and those
    that cannot run at the very end."""
    def key(verdict):
        if verdict.estimate is None:
            return 2, 0.0, 0, str(verdict.config)
        cycles = verdict.estimate.cycles * time_penalty(verdict.reason, verdict.report.loop_spills)
        return int(verdict.reason is not None), cycles, verdict.report.shared_memory, str(verdict.config)

    return sorted(verdicts, key=key)


def time_penalty(reason: str | None, spills: int) -> float:
    """Return the factor on the modelled time of a config with this reason and so many spill instructions."""
    if reason is None:
        return 1.0
    if reason == "register collapse":
        return math.inf
    return max(1 + SPILL_PENALTY * math.log2(1 + spills), 1.0 if reason == "spill" else PENALTY)
