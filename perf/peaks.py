"""Measure the peak rates of this GPU and the backends torch's SDPA selects: python -m perf.peaks --out FILE

The rates of a large matrix product and a large copy show how much of the datasheet's peak this GPU reaches under its
clocks, power limit and cooling.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from tritonattn.measure import device_timer, environment, journal, timing

from . import baselines, cases
from .measure import draw_inputs

MATMUL, COPY = 8192, 4 << 30  # rows and columns; bytes, read and written
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def peaks(timer, device: torch.device, size: int = MATMUL, count: int = COPY // 2) -> dict:
    """Return {name: seconds and rate} of a bfloat16 product of `size`^2 matrices and a copy of `count` 16-bit numbers."""
    with timer.context():
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        source = torch.randn(count, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        timings, _ = timing.measure({"matmul": timing.Timed([lambda: a @ b]),
                                     "copy": timing.Timed([lambda: target.copy_(source)])}, timer)
    amounts = {"matmul": (2 * size**3 / 1e12, "TFLOP/s"), "copy": (4 * count / 1e12, "TB/s")}
    return {name: {"seconds": x.seconds, "q20": x.q20, "q80": x.q80, "rate": amounts[name][0] / x.seconds,
                   "unit": amounts[name][1], "throttled": x.mostly_throttled} for name, x in timings.items()}


def backends(device: torch.device) -> dict[str, str]:
    """Return {problem and direction: the backend that torch's SDPA selects}."""
    choices = {}
    for dtype, d, (mask, window) in itertools.product(DTYPES, (64, 128, 192, 256), cases.MASKS.items()):
        problem = cases.problem(1, 8, 1024, d, window, dtype=dtype)
        q, k, v, _ = draw_inputs(problem, device, 1)[0]
        for direction in ("inference", "training"):
            leaves = [x.requires_grad_(direction == "training") for x in (q, k, v)]
            choices[f"{str(dtype)[6:]} d{d} {mask} {direction}"] = baselines.sdpa_choice(problem, *leaves)
    return choices


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rates and write one JSON file."""
    parser = argparse.ArgumentParser("python -m perf.peaks", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("perf.peaks needs a GPU, and torch detects none")
    device = torch.device("cuda")
    rates = peaks(device_timer.timer_of(device), device)
    content = {"environment": environment.environment_of(device), "date": journal.now(), "peaks": rates,
               "backends": backends(device)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1))
    for name, peak in rates.items():
        print(f"{name}: {peak['rate']:.4g} {peak['unit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
