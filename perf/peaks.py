"""python -m perf.peaks --out FILE: what this GPU reaches today, and which backend torch's attention picks on it.

Datasheets are leads. A large matrix product and a large copy, measured in the same minutes as the kernels, say what
clocks, power and cooling leave of them.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from tritonattn.measure import device_timer, environment, journal, timing

from . import baselines, cases
from .measure import draw

MATMUL, COPY = 8192, 4 << 30  # rows and columns; bytes, read and written
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ceilings(stopwatch, device: torch.device, size: int = MATMUL, count: int = COPY // 2) -> dict:
    """{name: seconds and rate} of a bfloat16 product of `size`^2 matrices, and of a copy of `count` 16-bit numbers."""
    with stopwatch.context():
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        source = torch.randn(count, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        found, _ = timing.measure({"matmul": timing.Timed([lambda: a @ b]),
                                   "copy": timing.Timed([lambda: target.copy_(source)])}, stopwatch)
    amounts = {"matmul": (2 * size**3 / 1e12, "TFLOP/s"), "copy": (4 * count / 1e12, "TB/s")}
    return {name: {"seconds": x.seconds, "q20": x.q20, "q80": x.q80, "rate": amounts[name][0] / x.seconds,
                   "unit": amounts[name][1], "throttled": x.mostly_throttled} for name, x in found.items()}


def backends(device: torch.device) -> dict[str, str]:
    """{problem and direction: the backend that torch's attention picks}"""
    found = {}
    for dtype, d, (mask, window) in itertools.product(DTYPES, (64, 128, 192, 256), cases.MASKS.items()):
        problem = cases.problem(1, 8, 1024, d, window, dtype=dtype)
        q, k, v, _ = draw(problem, device, 1)[0]
        for direction in ("inference", "training"):
            leaves = [x.requires_grad_(direction == "training") for x in (q, k, v)]
            found[f"{str(dtype)[6:]} d{d} {mask} {direction}"] = baselines.sdpa_choice(problem, *leaves)
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and write one JSON file."""
    top = argparse.ArgumentParser("python -m perf.peaks", description=__doc__.split(":")[1].split("\n")[0].strip())
    top.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = top.parse_args(argv)
    if not torch.cuda.is_available():
        top.error("expected a GPU that torch sees, got none")
    device = torch.device("cuda")
    found = {"environment": environment.environment_of(device), "date": journal.now(),
             "ceilings": ceilings(device_timer.timer_of(device), device), "backends": backends(device)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    for name, ceiling in found["ceilings"].items():
        print(f"{name}: {ceiling['rate']:.4g} {ceiling['unit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
