"""Which configs are worth running, by what the compiler makes of them: candidates -> reasons against -> a ranking.

    constraint, prefilter     seen before compiling
    all other REASONS         seen in the binary, the first that holds; what spills besides says so in its note
    what is left              ranked by the model (model.py), the fastest first
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..analysis.compile_report import KernelReport, padded
from ..analysis.cost_model import Estimate, estimate
from ..block_mask import TILE
from ..config import Config
from ..configs.key import precision
from ..gpu import Gpu
from ..problem import Problem
from .worker_pool import Failure, Workers

REASONS = {
    "constraint": "not tried: tiles larger than a map's, or with too few rows for the warps",
    "prefilter": "the sums of a tile alone leave a thread too few registers",
    "compile error": "the compiler refuses it",
    "compile timeout": "the compiler did not finish",
    "shared memory": "a block needs more than it may have",
    "tensor memory": "a block needs more than there is",
    "register collapse": "the compiler gave up: a few registers, and everything on the stack",
    "wrong tensor path": "the loop does not use the tensor cores' own instructions of this GPU",
    "duplicate work": "several warps make the same products or exponentials",
    "serialized": "each product waits by itself (Hopper)",
    "spill": "registers are spilled and refilled in the loop over tiles",
    "unclear": "no loop was found, or one with fewer products than the tile needs: not whole, or some are made another way",
    "slower": "the model expects it to take longer",
}
# block sizes, warps, stages
SPACE = {"block_m": (16, 32, 64, 128, 256), "block_n": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
# fp32 registers per thread that a tile's sums and scores may take before all is lost; Blackwell's lie in tensor memory
ROOM = {"sm_90": 176, "sm_100": 288, "gfx942": 400}
ROOM_ELSEWHERE = 160
DUPLICATE_PRODUCTS, DUPLICATE_EXPONENTIALS, WHOLE = 1.3, 1.6, 0.95
COLLAPSED_REGISTERS, COLLAPSED_STACK = 40, 1024
PENALTIES = 1.5  # what something else than spills speaks against may take so much longer than the model expects: judgement
SPILL_PENALTY = 0.1  # added to 1 for each doubling of the instructions that spill, whose waits it does not know: judgement


@dataclass(frozen=True)
class Verdict:
    """One config: why it is out (None: it is not), and what was seen of it."""

    config: Config
    reason: str | None
    note: str = ""
    report: KernelReport | None = None
    estimate: Estimate | None = None


def candidates(kernel: str, problem: Problem, gpu: Gpu, stages: Iterable[int] = SPACE["num_stages"]) -> list[Config]:
    """The whole space for a kernel: tiles that nobody would try (16 rows beside 128) are not in it."""
    edge = 1 if gpu.arch == "sm_90" else None
    found = []
    for m, n, warps, depth in itertools.product(*SPACE.values()):
        owner, other = (n, m) if kernel == "dkdv" else (m, n)
        if depth in stages and other <= owner * 2 and owner <= other * 8:
            found.append(Config(m, n, warps, depth, edge if depth > 1 else None))
    return found


def check_config(kernel: str, problem: Problem, config: Config, gpu: Gpu) -> Verdict | None:
    """Out by arithmetic alone, or None."""
    owner, other = (config.block_n, config.block_m) if kernel == "dkdv" else (config.block_m, config.block_n)
    # warps share the rows of a tile for the tensor cores; without these, for NVIDIA's float32, they share its columns as well
    exact = problem.dtype.itemsize == 4 and not gpu.is_amd
    if owner < 8 * config.num_warps and not (exact and owner * other >= 64 * config.num_warps):
        return Verdict(config, "constraint", f"{owner} rows for {config.num_warps} warps")
    if problem.mapped and max(owner, other) > TILE:
        return Verdict(config, "constraint", f"a map's tiles have {TILE} rows")
    d, dv = padded(problem.d), padded(problem.dv)
    sums = {"forward": dv, "dq": d, "dkdv": d + dv, "dbias": other}.get(kernel, 0)
    scores = other * (1 if kernel == "forward" else 2)
    taken = owner * (sums + scores) / (config.num_warps * gpu.multiprocessor.lanes)
    room = ROOM.get(gpu.arch, ROOM_ELSEWHERE)
    if taken > room:
        return Verdict(config, "prefilter", f"{taken:.0f} of {room} registers for sums and scores")
    return None


def check_report(report: KernelReport) -> Verdict:
    """What speaks against a config that was compiled."""
    reason, note = _against(report) or (None, "")
    return Verdict(report.config, reason, note, report, estimate(report) if report.fits else None)


def _against(report):
    gpu = report.gpu
    if report.shared_memory > gpu.shared_memory:
        return "shared memory", f"{report.shared_memory} of {gpu.shared_memory} bytes"
    if report.tensor_memory > gpu.tensor_memory:
        return "tensor memory", f"{report.tensor_memory} of {gpu.tensor_memory} columns"
    if report.loops is None:
        return None
    if report.registers <= COLLAPSED_REGISTERS and report.stack >= COLLAPSED_STACK:
        return "register collapse", f"{report.registers} registers, {report.stack} bytes of stack"
    if not report.loops:
        return "unclear", "no loop with exponentials"
    spilled = f"{report.loop_spills} in the loop" if report.loop_spills else ""
    besides = f", and spills {spilled}" if spilled else ""
    if report.mma_instruction != report.best_mma_instruction:
        expected = report.best_mma_instruction or "none"
        return "wrong tensor path", f"{report.mma_instruction or 'none'} instead of {expected}{besides}"
    # without tensor cores a product has no instruction of its own to count
    duplicated = report.duplicated if report.mma_instruction else 1.0
    if duplicated >= DUPLICATE_PRODUCTS or report.redone >= DUPLICATE_EXPONENTIALS:
        return "duplicate work", f"products x {duplicated:.2f}, exponentials x {report.redone:.2f}{besides}"
    if report.serialized:
        return "serialized", besides.removeprefix(", and ")
    if spilled:
        return "spill", spilled
    if duplicated < WHOLE:
        return "unclear", f"products x {duplicated:.2f}"
    return None


def survey(kernel: str, problem: Problem, gpu: Gpu, configs: Iterable[Config], workers: Workers) -> list[Verdict]:
    """A verdict on each config: those to run first, the fastest expected one at the head; then those that are out."""
    verdicts, jobs = [], []
    for config in configs:
        if (verdict := check_config(kernel, problem, config, gpu)) is not None:
            verdicts.append(verdict)
        else:
            jobs.append((kernel, problem, config, gpu, precision(problem) or "ieee"))
    for found, job in zip(workers.map(jobs), jobs):
        verdicts.append(Verdict(job[2], found.code, found.message) if isinstance(found, Failure) else check_report(found))
    return ranked(verdicts)


def ranked(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """By the expected time; of equals, what takes less shared memory; then by name, so that the order is always the same.

    What is out stands behind, first what would at least run, its time taken with doubt.
    """
    def key(verdict):
        if verdict.estimate is None:
            return 2, 0.0, 0, str(verdict.config)
        cycles = verdict.estimate.cycles * time_penalty(verdict.reason, verdict.report.loop_spills)
        return int(verdict.reason is not None), cycles, verdict.report.shared_memory, str(verdict.config)

    return sorted(verdicts, key=key)


def time_penalty(reason: str | None, spills: int) -> float:
    """How many times as long as the model expects a config may take: 1 where nothing speaks against it."""
    if reason is None:
        return 1.0
    if reason == "register collapse":
        return math.inf
    of_spills = 1 + SPILL_PENALTY * math.log2(1 + spills)
    return of_spills if reason == "spill" else max(of_spills, PENALTIES)
