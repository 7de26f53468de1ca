"""A cost model of compiled kernels, from the instructions of their loops. It is made to rank configs.

    cycles of a unit in one iteration  =  operations of the loop on that unit / operations of an SM per clock
    cycles of an iteration  =  max(tensor, softmax) + (1 - overlap) min(tensor, softmax) + latency / blocks per SM
    cycles of a kernel =  waves of blocks * (iterations of a block * cycles of an iteration * blocks per SM + start and end)
    share of the peak  =  products of unmasked pairs / (cycles of a kernel * rate of the tensor cores)

where softmax stands for the slowest of the other units. The model counts one loop without a mask and one with it, each as
often as the problem visits such tiles. It leaves out the bandwidth of memory (see `perf/limits.py`) and caches, bank
conflicts, and clocks under load. Overlap and latency are estimates, not measurements. Tests compare the ranking, and on Hopper
the share of the peak, with published measurements.

On Hopper a block's warp groups march in step, from barrier to barrier: only other blocks, and instructions that stand
between a product and the wait for it in the machine code, run beside a product.
"""

import functools
import math
import re
from dataclasses import dataclass

from ..config import Config
from ..configs.lookup import closest_architecture
from ..gpu import KNOWN, Gpu, Peaks
from ..problem import Problem
from .compile_report import TENSOR_ROWS, KernelReport, flops
from .sass import Loop, kind

# part of the softmax that overlaps other warps' products, by the groups of four warps on an SM (on Hopper, by the blocks)
OVERLAP = {1: 0.2, 2: 0.6, 3: 0.7}
OVERLAP_OF_MORE = 0.75
LATENCY = {1: 500, 2: 100}    # exposed cycles of an iteration, by the stages of the pipeline
LATENCY_OF_MORE = 60
WGMMA_LATENCY = 450           # on Hopper, more of these where nothing runs beside the products: their start, and two barriers
START = 1500                  # cycles of a block outside the loop, plus one for every 8 numbers of its output tile
REFILL = 2500                 # more of these for each further loop of a block: its pipeline is empty at first
# Measured rates as fractions of the model's, the lowest and the highest. The model assumes the vendor's clock; real clocks are
# lower under load. sm_90: 36 published rates of the Triton tutorial's kernel on H100 (perf/published.csv, lengths from 1k on)
# are 0.64 to 0.80 of the model's for our forward kernel without `ahead`; REFILL was fitted to the same rates. The same range
# is assumed for other 16-bit kernels. No other GPU was compared with measurements.
REACHED = {"sm_90": (0.6, 0.8)}
# lanes of an SM that compare, select, convert, shift and add integers: half of Hopper's fp32 lanes
LANES_OF_ALU = 64
BYTES_OF_SHARED = 128         # per clock
# part of the peak that HMMA reaches on GPUs with a faster MMA instruction. H100: measured by Luo et al. (2024),
# arXiv:2402.13499; two thirds according to FlashAttention-3. Blackwell: inferred, the same rate per clock as H100
HMMA_SHARE = {"sm_90": 0.63, "sm_100": 0.315}
# single conversions go through the unit of the exponentials (Nsight Compute's XU); packed ones, F2FP and I2FP, do not
SINGLE = re.compile(r"(F2F|F2I|I2F|FRND)\b")
PACKED = ("FADD2", "FMUL2", "FFMA2")  # AMD's are named v_pk_*
# warp instructions per clock: one for each of an SM's four schedulers
ISSUED = 4
# a warp-group MMA 64 x N x 16 reads 32 N bytes of B from shared memory, and 2 KB of A if A is not in registers
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x\d+\S*\s+R\d+,\s*(gdesc)?")


@dataclass(frozen=True)
class Estimate:
    """The model's estimate for one report. Cycles are those of an SM."""

    units: dict[str, float]          # cycles of each unit in one iteration without a mask
    iteration: tuple[float, float]   # cycles of one iteration, without and with a mask
    iterations: tuple[float, float]  # of an average block, without and with a mask
    blocks: int
    waves: int                       # how many times the blocks fill the GPU
    cycles: float                    # of the kernel
    share: float                     # fraction of the peak at the vendor's clock; only unmasked (query, key) pairs count
    likely: tuple[float, float] | None  # the share to expect from a measurement, by `reached`; None: unknown

    @property
    def bound(self) -> str:
        """The unit with the most cycles in the loop without a mask."""
        return max(self.units, key=self.units.get)


def estimate(report: KernelReport) -> Estimate | None:
    """Estimate the time of a compiled kernel; None if it has no loop over tiles (delta) or does not fit on an SM."""
    if not report.loops or not report.occupancy:
        return None
    if len(report.passes) == 1:
        return _estimate(report, 1)
    # the blocks of both passes are in one grid, those of dV first
    first, second = (_estimate(each, 2) for each in report.passes)
    longest = max(first.cycles, second.cycles)
    cycles = longest if first.waves == 1 else (first.cycles + second.cycles) / 2
    return Estimate({unit: first.units[unit] + second.units[unit] for unit in first.units},
                    tuple(map(sum, zip(first.iteration, second.iteration))), first.iterations, first.blocks, first.waves,
                    cycles, *_shares(report, cycles))


def _estimate(report: KernelReport, passes: int) -> Estimate:
    """Estimate a kernel all of whose blocks are like those of this report; a grid of several passes has more of them."""
    problem, config, gpu = report.problem, report.config, report.gpu
    peaks = peaks_of(gpu)
    blocks, *tiles = visits(report.kernel, problem, config.block_m, config.block_n)
    iterations = tuple(count / max(blocks, 1) for count in tiles)
    blocks *= passes
    # a GPU that is not full has fewer blocks per SM than its occupancy allows
    resident = max(1, min(report.occupancy, math.ceil(blocks / gpu.sms)))
    waves = math.ceil(blocks / (gpu.sms * resident))
    loops = report.loops[0], report.loops[-1]
    of_units = [units(report, loop, peaks) for loop in loops]
    iteration = tuple(_iteration(cycles, loop, config, resident) for cycles, loop in zip(of_units, loops))
    width = {"forward": problem.dv, "dq": problem.d, "dkdv": problem.d + problem.dv, "dk": problem.d, "dv": problem.dv,
             "dbias": config.block_n}.get(report.part or report.kernel, 0)
    rows = config.block_n if report.kernel == "dkdv" else config.block_m
    outside = START + REFILL * (_loops_of_a_block(report, iterations) - 1) + rows * width / 8
    block = sum(n * cycles for n, cycles in zip(iterations, iteration)) * resident + outside
    cycles = max(waves * block, 1.0)
    return Estimate(of_units[0], iteration, iterations, blocks, waves, cycles, *_shares(report, cycles))


def _loops_of_a_block(report: KernelReport, iterations: tuple[float, float]) -> int:
    """Return the pipelined loops that a block starts: each stretch of tiles, in dK/dV for every query head of the group."""
    if report.config.num_stages == 1:
        return 1
    stretches = sum(count > 0 for count in iterations)
    if None not in report.problem.window and iterations[1]:
        stretches += 1  # masked at both ends
    return max(1, stretches * (report.problem.group if report.kernel == "dkdv" else 1))


def reached(report: KernelReport) -> tuple[float, float] | None:
    """Return REACHED of a report, None where it is unknown."""
    return REACHED.get(report.gpu.arch) if report.problem.dtype.itemsize == 2 else None


def _shares(report: KernelReport, cycles: float) -> tuple[float, tuple[float, float] | None]:
    """Return `share` and `likely` of an Estimate. Work that the second pass repeats does not count."""
    problem, config, gpu = report.problem, report.config, report.gpu
    pairs = math.prod(problem.batch) * problem.heads * problem.pairs()
    useful = report.useful / (config.block_m * config.block_n) * pairs
    share = useful / (cycles * gpu.sms * rate(report, peaks_of(gpu)))
    between = reached(report)
    return share, between and (between[0] * share, between[1] * share)


def units(report: KernelReport, loop: Loop, peaks: Peaks) -> dict[str, float]:
    """Return the cycles that each unit of an SM needs for one iteration of this loop by one block."""
    counts, warps, lanes = loop.counts, report.config.num_warps, report.gpu.multiprocessor.lanes
    threads = warps * lanes
    # packed instructions process two numbers per lane
    floats = counts.get("float", 0) + sum(name.startswith(PACKED) for name in loop.instructions)
    singles = sum(bool(SINGLE.match(name)) for name in loop.instructions)
    alu = counts.get("select", 0) + counts.get("conversion", 0) - singles + counts.get("integer", 0)
    if report.gpu.is_amd:
        # on AMD the same lanes do both
        alu, floats = alu + floats, 0
    else:
        # IMAD, which the compiler also uses as a move, runs on the floating-point lanes
        products = sum(name.startswith("IMAD") for name in loop.instructions)
        alu, floats = alu - products, floats + products
    words = sum(_words(name) for name in loop.instructions if kind(name) == "shared")
    return {
        "tensor": _mma_cycles(report, loop, peaks) if report.mma_instruction else 0.0,
        "special": (counts.get("special", 0) + singles) * threads / peaks.exponentials,
        "fp32": floats * threads / peaks.fp32,
        "alu": alu * threads / LANES_OF_ALU,
        "issue": 0.0 if report.gpu.is_amd else len(loop.instructions) * warps / ISSUED,
        "shared": (words * lanes * 4 / BYTES_OF_SHARED + counts.get("shuffle", 0) + 4 * loop.spills) * warps,
    }


def _mma_cycles(report, loop, peaks):
    """Return the cycles of the tensor cores; HMMA reaches only a part of the peak on some GPUs."""
    by_hmma = sum(flops(name) * count for name, count in loop.products.items() if name.startswith("HMMA"))
    work = report.needed * report.duplicated
    share = min(1.0, by_hmma * report.config.num_warps / work) if work else 0.0
    slowdown = 1 - share + share / HMMA_SHARE.get(closest_architecture(report.gpu), 1.0)
    if "UTCHMMA" in loop.products:
        # an instruction of 64 rows takes as long as one of 128
        slowdown *= max(1.0, TENSOR_ROWS / min(m for m, _, _ in report.products))
    return work * slowdown / rate(report, peaks) + _operand_stall(report, loop, peaks)


def _operand_stall(report, loop, peaks):
    """Return the cycles in which Hopper's tensor cores wait for operands from shared memory."""
    stall = 0.0
    for columns, a_in_shared in _HGMMA.findall(loop.text):
        n = int(columns)
        read = (32 * n + (2048 if a_in_shared else 0)) / BYTES_OF_SHARED
        stall += max(0.0, read - 2 * 64 * n * 16 / peaks.tensor)
    return stall * report.config.num_warps / 4


def _words(name):
    """Return the words of four bytes that an access to shared memory moves for each lane."""
    if name.startswith("ds_"):
        bits = re.search(r"_[bu](\d+)", name)
        return max(int(bits[1]) if bits else 32, 32) // 32 * (2 if re.match(r"ds_(read|write)2", name) else 1)
    if name.startswith(("LDSM", "STSM")):
        matrices = re.search(r"\.([124])$", name)
        return int(matrices[1]) if matrices else 1
    return 4 if "128" in name else 2 if "64" in name else 1


def _iteration(cycles: dict, loop: Loop, config: Config, resident: int) -> float:
    """Return the cycles of one iteration by one block, with `resident` blocks on an SM."""
    softmax = max(value for unit, value in cycles.items() if unit != "tensor")
    slow, fast = max(cycles["tensor"], softmax), min(cycles["tensor"], softmax)
    latency = LATENCY.get(config.num_stages, LATENCY_OF_MORE)
    if any(name.startswith("HGMMA") for name in loop.products):
        beside = loop.beside_products()
        hidden = 1 - (1 - beside) * (1 - OVERLAP.get(resident, OVERLAP_OF_MORE))
        latency += WGMMA_LATENCY * (1 - beside)
    else:
        hidden = OVERLAP.get(resident * max(1, config.num_warps // 4), OVERLAP_OF_MORE)
    return slow + (1 - hidden) * fast + latency / resident


@functools.lru_cache(maxsize=4096)
def visits(kernel: str, problem: Problem, block_m: int, block_n: int) -> tuple[int, int, int]:
    """Return the blocks of a kernel, and the tiles that all of them visit without and with a mask."""
    if kernel == "diagonals":
        return _visits_of_diagonals(problem, block_n // 2)
    transposed = kernel in ("dkdv", "key_mass")
    rows, cols, row, col = ((problem.n_k, problem.n_q, block_n, block_m) if transposed else
                            (problem.n_q, problem.n_k, block_m, block_n))
    left, right = problem.window[::-1] if transposed else problem.window
    shift, unmasked, masked = -problem.shift if transposed else problem.shift, 0, 0

    def columns_up_to(index: int) -> int:
        """Return the number of columns up to the end of the window of a row."""
        return cols if right is None else max(min(cols, index + right + 1), 0)

    for first in range(shift, rows + shift, row):
        last = first + row - 1
        start = 0 if left is None else max(first - left, 0) // col
        stop = math.ceil(columns_up_to(last) / col)
        unmasked_start = 0 if left is None else math.ceil(max(last - left, 0) / col)
        inside = max(min(columns_up_to(first) // col, stop) - max(unmasked_start, start), 0)
        unmasked += inside
        masked += max(stop - start, 0) - inside
    # a block of dK/dV loops over the query heads of its key head
    heads = math.prod(problem.batch) * (problem.kv_heads if kernel == "dkdv" else problem.heads)
    repeated = problem.group if kernel == "dkdv" else 1
    # dbias has one block per tile of the bias
    blocks = math.ceil(rows / row) * (math.ceil(cols / col) if kernel == "dbias" else 1)
    return heads * blocks, heads * repeated * unmasked, heads * repeated * masked


def _visits_of_diagonals(problem: Problem, width: int) -> tuple[int, int, int]:
    """Return `visits` for tiles of `width` diagonals and queries, all of which are masked."""
    left, right = problem.window
    # kernels/diagonals.py takes fewer queries at a time with dropout
    tiles, step, steps = math.ceil((problem.n_q + problem.n_k) / width), width - 3 * problem.dropout, 0
    for tile in range(tiles):
        offset = tile * width - (problem.n_q - 1 + problem.shift)
        inside = (left is None or offset + width > -left) and (right is None or offset <= right)
        start, stop = max(1 - width - offset - problem.shift, 0), min(problem.n_q, problem.n_k - offset - problem.shift)
        steps += math.ceil(max(stop - start, 0) / step) if inside else 0
    heads = math.prod(problem.batch) * problem.heads
    return heads * tiles, 0, heads * steps


def peaks_of(gpu: Gpu) -> Peaks:
    """Return a GPU's peaks; those of a model of the closest architecture if the model is unknown."""
    return gpu.peaks or KNOWN[closest_architecture(gpu)].peaks


def rate(report: KernelReport, peaks: Peaks) -> float:
    """Return the MMA rate of this dtype, in floating-point operations per clock and SM.

    TF32 has half the rate of 16-bit numbers, AMD's float32 an eighth; without tensor cores a lane does two per clock.
    """
    if report.problem.dtype.itemsize == 2:
        return peaks.tensor
    return 2 * peaks.fp32 if not report.mma_instruction else peaks.tensor / (8 if report.gpu.is_amd else 2)
