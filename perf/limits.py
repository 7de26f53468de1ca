"""Least time of a problem on a GPU, by unit, and the best published rates: python -m perf.limits --gpu h200 --suite paper

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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tritonattn import Problem, gpu
from tritonattn.cli.format import columns

from . import cases

PUBLISHED = Path(__file__).parent / "published.csv"
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DIRECTIONS = ("forward", "backward")
SAME_CHIP = {"H200": ("H200", "H100")}  # the same chip with other memory: the numbers of both are comparable

# fp32 instructions per unmasked pair. Forward: one FMA for scale and maximum, the row maximum, the row sum. Backward: one FMA
# for scale and lse, minus delta, times P. Rescaling O is not counted: it is rarely needed
SOFTMAX = 3
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
    flops = problem.flops(direction)
    if problem.dtype in SIXTEEN_BIT:
        products, instructions, clock = flops, (SOFTMAX + CONVERSIONS[direction]) * pairs, peaks.clock
    else:
        products, instructions, clock = 0, SOFTMAX * pairs + flops / 2, peaks.fp32_clock or peaks.clock
    cycles = device.sms * clock
    return Floor(flops, products / (cycles * peaks.tensor), pairs / (cycles * peaks.exponentials),
                 instructions / (cycles * peaks.fp32), problem.bytes(direction) / peaks.bandwidth)


class Published(NamedTuple):
    """A published rate of an implementation, for equal lengths and equal numbers of query and key heads.

    TFLOP/s by the usual count: a causal mask halves the pairs, the forward pass has two products, the backward pass five.
    """

    gpu: str
    implementation: str
    dtype: str      # fp16, bf16, or 16-bit if the source does not say which
    direction: str
    mask: str
    d: int
    heads: int
    batch: int
    n: int
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
    known = gpu.find_gpu(gpu_name)
    square = problem.n_q == problem.n_k and problem.d == problem.dv and problem.heads == problem.kv_heads
    if known is None or not square or problem.dtype not in SIXTEEN_BIT:
        return None
    key = (direction, problem.mask, problem.d, problem.heads, math.prod(problem.batch), problem.n_q)
    rows = [row for row in published() if row.gpu in SAME_CHIP.get(known.name, (known.name,))
            and (row.direction, row.mask, row.d, row.heads, row.batch, row.n) == key]
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


def main(argv: list[str] | None = None) -> int:
    """Print the least times of a suite and return the exit code."""
    parser = argparse.ArgumentParser("python -m perf.limits", description="Print the least time that each unit of a GPU "
                                     "needs for the cases of a suite, and the best published rates. Needs no GPU.")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="a known GPU, such as h200")
    parser.add_argument("--suite", choices=cases.SUITES, required=True)
    arguments = parser.parse_args(argv)
    try:
        device = gpu.named(arguments.gpu)
    except ValueError as error:
        parser.error(f"--gpu: {error}")
    print(f"{device.name}, {arguments.suite}: least microseconds per unit; TFLOP/s with all units overlapped (ceiling),\n"
          "with products and exponentials in turn (serial), and as published\n")
    print(*columns([HEADS, *(line.cells() for line in lines(arguments.suite, device))], left=LEFT), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
