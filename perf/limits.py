"""Least time of a problem on a GPU, by unit, and the best published rates.

    python -m perf.limits --gpu h200 --suite paper            the least time of each unit
    python -m perf.limits --gpu h200 --suite paper --model    what the cost model expects of our kernels: inferred, not measured

    tensor     matrix products of 16-bit numbers on the tensor cores         flop / rate
    special    exponentials on the special-function units                    unmasked pairs / rate
    fp32       the other instructions per score; all products of float32     instructions / lanes
    memory     each input read once, each result written once                bytes / rate

The units can overlap, so the least time is that of the slowest unit. Not counted: launch, latency, uneven tiles, and data
that is already in the cache. Clocks are the vendor's: a GPU that runs faster lowers all times by that ratio.
"""

import argparse
import csv
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from tritonattn import Config, Problem, gpu
from tritonattn.analysis.compile_report import KernelReport
from tritonattn.analysis.cost_model import estimate, reached
from tritonattn.autotune.worker_pool import Failure, Workers
from tritonattn.block_mask import TILE
from tritonattn.cli.format import columns
from tritonattn.configs import lookup

from . import cases

PUBLISHED = Path(__file__).parent / "published.csv"
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DIRECTIONS = ("forward", "backward")
SAME_CHIP = {"H200": ("H200", "H100")}  # the same chip with other memory: the numbers of both are comparable

# fp32 instructions per unmasked pair. Forward: one FMA for scale and maximum, the row maximum, the row sum. Backward: one FMA
# for scale and lse, minus delta, times P. Rescaling O is not counted: it is rarely needed
SOFTMAX = 3
RELU = 2  # in their place: times the scale, and the maximum; backward, the choice of 0 and times dP
# conversions to 16 bits, two numbers per instruction: P in the forward pass, P and dS in the backward pass
CONVERSIONS = {"forward": 0.5, "backward": 1.0}


@dataclass(frozen=True)
class Floor:
    """The least seconds that each unit is busy, and the floating-point operations of the unmasked pairs."""

    flops: int
    tensor: float   # 0 for float32, whose products are IEEE float32 on the fp32 lanes, not TF32
    special: float  # could be less with polynomials on the fp32 lanes, as in FlashAttention-4 on B200
    fp32: float
    memory: float

    @property
    def units(self) -> dict[str, float]:
        """Seconds by name of the unit."""
        return {name: getattr(self, name) for name in ("tensor", "special", "fp32", "memory")}

    @property
    def bound(self) -> str:
        """The slowest unit."""
        return max(self.units, key=self.units.get)

    @property
    def seconds(self) -> float:
        """The least time, with all units overlapped."""
        return max(self.units.values())

    @property
    def serial(self) -> float:
        """The least time without overlap of products and exponentials, close to FlashAttention-3. Seconds."""
        return max(self.seconds, (self.tensor or self.fp32) + self.special)

    @property
    def tflops(self) -> float:
        """The roofline ceiling in TFLOP/s: the rate at the least time; 0 without work."""
        return self.flops / self.seconds / 1e12 if self.flops else 0.0

    @property
    def serial_tflops(self) -> float:
        """The ceiling in TFLOP/s without overlap of products and exponentials."""
        return self.flops / self.serial / 1e12 if self.flops else 0.0


def floor(problem: Problem, direction: str, device: gpu.Gpu) -> Floor:
    """Return the least times of a problem in one direction. Raises ValueError for a GPU or a dtype without known peaks.

    The backward pass is counted with five products and one exponential per score, the minimum; ours computes more.
    """
    if (peaks := device.peaks) is None:
        raise ValueError(f"the peak rates of {device.name} are not known")
    if problem.dtype not in (*SIXTEEN_BIT, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {problem.dtype}")
    pairs = math.prod(problem.batch) * problem.heads * problem.pairs()
    flops, weights = problem.flops(direction), RELU if problem.normalizer == "relu" else SOFTMAX
    if problem.dtype in SIXTEEN_BIT:
        products, instructions, clock = flops, (weights + CONVERSIONS[direction]) * pairs, peaks.clock
    else:
        products, instructions, clock = 0, weights * pairs + flops / 2, peaks.fp32_clock or peaks.clock
    cycles = device.sms * clock
    # at least one instruction of the special-function units for softmax or sigmoid, and one for tanh
    special = pairs * ((problem.normalizer != "relu") + problem.softcap)
    return Floor(flops, products / (cycles * peaks.tensor), special / (cycles * peaks.exponentials),
                 instructions / (cycles * peaks.fp32), problem.bytes(direction) / peaks.bandwidth)


class Published(NamedTuple):
    """A published rate of an implementation.

    TFLOP/s by the usual count: only unmasked pairs, half of them under a causal mask; the forward pass has two products, the
    backward pass five.
    """

    gpu: str
    implementation: str
    dtype: str      # fp16, bf16, or 16-bit if the source does not say which
    direction: str
    mask: str       # full, causal, or window: causal and bounded on the left
    window: str     # how many keys before its own a query attends to, for the mask "window"
    d: int
    dv: int
    heads: int
    kv_heads: int
    batch: int
    n: int          # queries
    n_k: int
    tflops: float
    evidence: str   # published; computed from a published time; transcribed from a figure by a third party
    source: str

    def __str__(self):
        evidence = "" if self.evidence == "published" else f", {self.evidence}"
        return f"{self.tflops:.0f} {self.implementation} on {self.gpu}{evidence}"


@functools.cache
def published() -> tuple[Published, ...]:
    """Return the rows of published.csv."""
    types = Published.__annotations__
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return tuple(Published(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(file))


def best_published(problem: Problem, direction: str, gpu_name: str) -> Published | None:
    """Return the highest published rate for this problem, in any 16-bit dtype, on this GPU or one with the same chip."""
    known, (left, right) = gpu.find_gpu(gpu_name), problem.window
    if known is None or problem.dtype not in SIXTEEN_BIT or problem.shift or (problem.mask == "window" and right != 0):
        return None
    wanted = {"direction": direction, "mask": problem.mask, "window": str(left) if problem.mask == "window" else "",
              "d": problem.d, "dv": problem.dv, "heads": problem.heads, "kv_heads": problem.kv_heads,
              "batch": math.prod(problem.batch), "n": problem.n_q, "n_k": problem.n_k}
    rows = [row for row in published() if row.gpu in SAME_CHIP.get(known.name, (known.name,))
            and all(getattr(row, name) == value for name, value in wanted.items())]
    return max(rows, key=lambda row: row.tflops, default=None)


class Line(NamedTuple):
    """One case in one direction on one GPU."""

    case: cases.Case
    direction: str
    floor: Floor
    best: Published | None

    def cells(self) -> list[str]:
        """Return the cells of the table: microseconds, then TFLOP/s."""
        times = [_digits(seconds * 1e6) for seconds in self.floor.units.values()]
        ceilings = [_digits(self.floor.tflops), _digits(self.floor.serial_tflops)]
        return [self.case.name, self.direction, *times, self.floor.bound, *ceilings, str(self.best or "")]


def _digits(number):
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


HEADS = ("case", "direction", "tensor", "special", "fp32", "memory", "bound", "ceiling", "serial", "published")
LEFT = (0, 1, 6, 9)  # left-aligned columns


def lines(suite: str, device: gpu.Gpu) -> Iterator[Line]:
    """Yield a line for each case of a suite, forward and backward."""
    for case in cases.SUITES[suite]:
        for direction in DIRECTIONS:
            if direction in case.directions:
                best = best_published(case.problem, direction, device.name)
                yield Line(case, direction, floor(case.problem, direction, device), best)


KERNELS = {"forward": ("forward",), "backward": ("dq", "dkdv")}


def job_of(kernel: str, problem: Problem, device: gpu.Gpu) -> tuple[str, Problem, Config, gpu.Gpu]:
    """Return what to compile for a kernel of a call. All lengths of whole tiles share one binary."""
    example = problem
    if problem.n_q % TILE == problem.n_k % TILE == 0:
        # no size of 1, which Triton would specialize
        example = replace(problem, batch=(2,), heads=2 * problem.group, kv_heads=2, n_q=32 * TILE, n_k=32 * TILE)
    return kernel, example, lookup.get_config(kernel, problem, device), device


class Expected(NamedTuple):
    """The rate of one case in one direction that the cost model expects, in TFLOP/s: inferred from binaries, not measured."""

    line: Line
    configs: tuple[Config, ...]
    bounds: tuple[str, ...]  # the slowest unit of each kernel
    least: float
    most: float

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        shown = f"{_digits(self.least)}-{_digits(self.most)}" if self.least < self.most else f"model {_digits(self.most)}"
        return [self.line.case.name, self.line.direction, ", ".join(map(str, self.configs)), ", ".join(self.bounds), shown,
                _digits(self.line.floor.serial_tflops), _digits(self.line.floor.tflops), str(self.line.best or "")]


MODEL_HEADS = ("case", "direction", "configs", "bound", "inferred", "serial", "ceiling", "published")
MODEL_LEFT = (0, 1, 2, 3, 7)


def expected(line: Line, reports: list[KernelReport], device: gpu.Gpu) -> Expected:
    """Return what the cost model expects of the kernels of a line; no rate exceeds the ceiling.

    The backward pass also has delta, bound by memory: it reads o and do, and in 16 bits the rounding error of o. The gradient
    of a bias is not counted. Raises ValueError for a kernel that the model cannot judge.
    """
    problem = line.case.problem
    models = [estimate(replace(report, problem=problem)) for report in reports]
    if None in models:
        raise ValueError(f"{line.case.name}: expected kernels with a loop that fit on {device.name}")
    seconds = sum(model.cycles for model in models) / device.peaks.clock
    rows = math.prod(problem.batch) * problem.heads * problem.n_q
    read = rows * problem.dv * problem.dtype.itemsize * (3 if problem.dtype.itemsize == 2 else 2)
    delta = read / device.peaks.bandwidth if line.direction == "backward" else 0.0
    rates = [min(line.floor.tflops, line.floor.flops / (seconds / fraction + delta) / 1e12)
             for fraction in reached(reports[0]) or (1.0, 1.0)]
    return Expected(line, tuple(report.config for report in reports), tuple(model.bound for model in models), *rates)


def model_lines(suite: str, device: gpu.Gpu) -> Iterator[Expected]:
    """Compile the kernels of a suite for a GPU and yield a line for each case and direction.

    Raises ValueError if one does not compile.
    """
    found = list(lines(suite, device))
    jobs = [[job_of(kernel, line.case.problem, device) for kernel in KERNELS[line.direction]] for line in found]
    unique = list(dict.fromkeys(job for group in jobs for job in group))
    with Workers() as workers:
        reports = dict(zip(unique, workers.map(unique)))
    for (kernel, _, config, _), report in zip(unique, reports.values()):
        if isinstance(report, Failure):
            raise ValueError(f"{kernel} {config}: {report.message}")
    for line, group in zip(found, jobs):
        yield expected(line, [reports[job] for job in group], device)


def main(argv: list[str] | None = None) -> int:
    """Print the least times of a suite and return the exit code."""
    parser = argparse.ArgumentParser("python -m perf.limits", description="Print the least time that each unit of a GPU "
                                     "needs for the cases of a suite, and the best published rates. Needs no GPU.")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="a known GPU, such as h200")
    parser.add_argument("--suite", choices=cases.SUITES, required=True)
    parser.add_argument("--model", action="store_true", help="compile our kernels; print the rates that the model expects")
    arguments = parser.parse_args(argv)
    try:
        device = gpu.named(arguments.gpu)
    except ValueError as error:
        parser.error(f"--gpu: {error}")
    heads, left, rows = HEADS, LEFT, lines(arguments.suite, device)
    title = ("least microseconds per unit; TFLOP/s with all units overlapped (ceiling),\n"
             "with products and exponentials in turn (serial), and as published")
    if arguments.model:
        heads, left, rows = MODEL_HEADS, MODEL_LEFT, model_lines(arguments.suite, device)
        title = ("TFLOP/s of our kernels, inferred from their binaries by the cost model, not measured;\n"
                 "with products and exponentials in turn (serial), with all units overlapped (ceiling), and as published")
    try:
        table = columns([heads, *(row.cells() for row in rows)], left=left)
    except ValueError as error:
        parser.error(f"{error}")
    print(f"{device.name}, {arguments.suite}: {title}\n", *table, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
