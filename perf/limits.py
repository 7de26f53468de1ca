"""The least time a problem takes on a GPU, unit by unit, and the best that others have published: python -m perf.limits

    tensor     products of 16-bit numbers, on the tensor cores        flop / rate
    special    the exponentials                                       visible pairs / rate
    fp32       what else a score needs; all products of float32       instructions / lanes
    memory     each input read, each result written, once             bytes / rate

The units can work side by side, so the longest binds. Launch, latency and uneven tiles are not counted; what lies in the
cache already needs no memory; and the clock is the vendor's: a GPU that runs above it is faster by that ratio.
"""

import argparse
import csv
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tritonattn import Problem, gpu

from . import cases

PUBLISHED = Path(__file__).parent / "published.csv"
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DIRECTIONS = ("forward", "backward")
ALIKE = {"H200": ("H200", "H100")}  # one chip, with other memory: what is published for either is a mark for the first

# fp32 instructions per visible pair. Forward: scale less maximum in one, the maximum, the sum of the row. Backward: scale
# less lse in one, less delta, times P. Rescaling O comes on top, but seldom has to be done
SOFTMAX = 3
# two numbers are converted at once: P forward, P and dS backward
CONVERSIONS = {"forward": 0.5, "backward": 1.0}


@dataclass(frozen=True)
class Floor:
    """Seconds that each unit is busy at the least, and the floating-point operations of the visible pairs."""

    flops: int
    tensor: float   # 0 for float32, whose products are IEEE's and not TF32's
    special: float  # less only with polynomials on the fp32 lanes instead, as in FlashAttention-4 on B200
    fp32: float
    memory: float

    @property
    def units(self) -> dict[str, float]:
        """Seconds by the unit's name."""
        return {name: getattr(self, name) for name in ("tensor", "special", "fp32", "memory")}

    @property
    def bound(self) -> str:
        """The unit that takes longest."""
        return max(self.units, key=self.units.get)

    @property
    def seconds(self) -> float:
        """The least time, with all units side by side."""
        return max(self.units.values())

    @property
    def serial(self) -> float:
        """The least time where products and exponentials take turns: about where FlashAttention-3 stands. Seconds."""
        return max(self.seconds, (self.tensor or self.fp32) + self.special)

    @property
    def tflops(self) -> float:
        """The ceiling: 1e12 floating-point operations per second when the least time is met."""
        return self._rate(self.seconds)

    @property
    def serial_tflops(self) -> float:
        """The ceiling where products and exponentials take turns, in 1e12 floating-point operations per second."""
        return self._rate(self.serial)

    def _rate(self, seconds):
        return self.flops / seconds / 1e12 if seconds else 0.0


def floor(problem: Problem, direction: str, device: gpu.Gpu) -> Floor:
    """The floor of a problem in one direction; a ValueError for a GPU or a dtype of which no peak is known.

    The backward computes each score once more and takes its exponential once, though ours does both twice.
    """
    if (peaks := device.peaks) is None:
        raise ValueError(f"expected a GPU whose peaks are known, got {device.name}")
    if problem.dtype not in (*SIXTEEN_BIT, torch.float32):
        raise ValueError(f"expected float16, bfloat16 or float32, got {problem.dtype}")
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
    """What somebody says an implementation reaches on a square problem with as many key heads as query heads.

    TFLOP/s as everybody counts them: a causal mask halves the pairs, the backward is five products to the forward's two.
    """

    gpu: str
    implementation: str
    dtype: str      # fp16, bf16; 16-bit where the source leaves open which
    direction: str
    mask: str
    d: int
    heads: int
    batch: int
    n: int
    tflops: float
    evidence: str   # published; computed, from a published time; transcribed, from a figure by somebody else
    source: str

    def __str__(self):
        doubt = "" if self.evidence == "published" else f", {self.evidence}"
        return f"{self.tflops:.0f} {self.implementation} on {self.gpu}{doubt}"


@functools.cache
def published() -> tuple[Published, ...]:
    """All published numbers on file."""
    kinds = Published.__annotations__
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return tuple(Published(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file))


def best_published(problem: Problem, direction: str, gpu_name: str) -> Published | None:
    """The fastest published for this very problem in any 16-bit type, on a GPU of this name or one that computes alike."""
    known = gpu.find_gpu(gpu_name)
    alike = ALIKE.get(known.name, (known.name,)) if known else ()
    rows = [row for row in published() if row.gpu in alike and row.direction == direction and _same(row, problem)]
    return max(rows, key=lambda row: row.tflops, default=None)


def _same(row, problem):
    square = problem.n_q == problem.n_k and problem.d == problem.dv and problem.heads == problem.kv_heads
    mine = (problem.mask, problem.d, problem.heads, math.prod(problem.batch), problem.n_q)
    return square and problem.dtype in SIXTEEN_BIT and mine == (row.mask, row.d, row.heads, row.batch, row.n)


class Line(NamedTuple):
    """One case in one direction on one GPU."""

    gpu: str
    case: cases.Case
    direction: str
    floor: Floor
    best: Published | None

    def cells(self) -> list[str]:
        """The line as a table shows it: microseconds, then TFLOP/s."""
        times = [_digits(seconds * 1e6) for seconds in self.floor.units.values()]
        ceilings = [_digits(self.floor.tflops), _digits(self.floor.serial_tflops)]
        return [self.case.name, self.direction, *times, self.floor.bound, *ceilings, str(self.best or "")]

    def as_json(self) -> dict:
        """The line as JSON knows it."""
        return {
            "gpu": self.gpu, "case": self.case.name, "direction": self.direction, "problem": self.case.problem.as_json(),
            "microseconds": {name: seconds * 1e6 for name, seconds in self.floor.units.items()}, "bound": self.floor.bound,
            "tflops": self.floor.tflops, "serial_tflops": self.floor.serial_tflops,
            "published": self.best and self.best._asdict(),
        }


def _digits(number):
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


HEADS = ("case", "direction", "tensor", "special", "fp32", "memory", "bound", "ceiling", "serial", "published")
TEXT = ("case", "direction", "bound", "published")  # flush left


def lines(suite: str, device: gpu.Gpu) -> Iterator[Line]:
    """Every case of a suite, in each direction but both at once."""
    for case in cases.SUITES[suite]:
        for direction in DIRECTIONS:
            if direction in case.directions:
                best = best_published(case.problem, direction, device.name)
                yield Line(device.name, case, direction, floor(case.problem, direction, device), best)


def table(found: list[Line]) -> str:
    """Lines under a heading, in columns."""
    rows = [list(HEADS), *(line.cells() for line in found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    formats = [f"{'<' if head in TEXT else '>'}{width}" for head, width in zip(HEADS, widths)]
    return "\n".join("  ".join(map(format, row, formats)).rstrip() for row in rows)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m perf.limits", description="The least time each unit of a GPU needs for "
                                      "the cases of a suite, and the best that others have published for them.")
    options.add_argument("--gpu", type=_gpu, required=True, metavar="NAME",
                         help="a known GPU, such as h200; it need not be here")
    options.add_argument("--suite", choices=cases.SUITES, required=True, help="which cases")
    options.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return options


def _gpu(name):
    try:
        return gpu.named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Print the floors of a suite and return the exit code."""
    arguments = parser().parse_args(argv)
    found = list(lines(arguments.suite, arguments.gpu))
    if arguments.json:
        print(json.dumps([line.as_json() for line in found], indent=2))
    else:
        print(f"{arguments.gpu.name}, {arguments.suite}: microseconds that each unit needs; TFLOP/s with all side by side "
              f"(ceiling),\nwith products and exponentials in turns (serial), and as published\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
