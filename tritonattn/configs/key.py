"""The key of a tuned config: a kernel, and the properties of its problem that may change which config is best.

Lengths and the number of tiles fall into buckets. Dtype, head sizes, mask and features are kept exactly.
"""

import bisect
import math
from dataclasses import asdict, dataclass

import torch

from ..block_mask import TILE
from ..gpu import Gpu
from ..problem import Problem

QUERY_BUCKETS = (1, 16, 64, 256, 1024, 4096)        # upper ends; longer problems share a bucket of their own
KEY_BUCKETS = tuple(128 << i for i in range(10))    # upper ends, 128 to 65536; longer problems fall into the last
WAVES = (0.5, 1.0, 4.0)                             # bounds between FILL_BUCKETS: blocks of TILE rows per SM
FILL_BUCKETS = ("under half", "under one", "under four", "more")


@dataclass(frozen=True)
class Key:
    """One kind of kernel launch."""

    kernel: str
    dtype: str
    d: int
    dv: int
    precision: str | None      # of float32 products: "ieee" or "tf32", which need different amounts of shared memory
    mask: str                  # "full" (no structural mask), "causal" or "window"
    window: tuple              # left and right: None, 0, or the upper end of a bucket
    ragged: bool               # the loop ends within a tile of TILE rows
    features: tuple[str, ...]  # "bias float32", "masked", "mapped", "dropout", "lengths"
    group: int                 # query heads per key head
    queries: int | None        # upper end of a bucket of QUERY_BUCKETS; None: above the last
    keys: int                  # upper end of a bucket of KEY_BUCKETS
    fill: str                  # one of FILL_BUCKETS

    def as_json(self) -> dict:
        return asdict(self) | {"features": list(self.features), "window": list(self.window)}

    @staticmethod
    def from_json(content: dict) -> "Key":
        """Return the key with this `as_json`. Raise TypeError or KeyError where fields are missing or unknown."""
        return Key(**content | {"features": tuple(content["features"]), "window": tuple(content["window"])})

    def __str__(self):
        sizes = f"d{self.d}" if self.d == self.dv else f"d{self.d}/{self.dv}"
        lengths = f"queries {'over 4096' if self.queries is None else self.queries} keys {self.keys}"
        extras = [*self.features, *(["ragged"] if self.ragged else []), *([f"group {self.group}"] if self.group > 1 else [])]
        mask = f"window {self.window[0]},{self.window[1]}" if self.mask == "window" else self.mask
        tf32 = ["tf32"] if self.precision == "tf32" else []
        return " ".join([self.kernel, self.dtype, *tf32, sizes, mask, *extras, lengths, f"fill {self.fill}"])


def key_of(kernel: str, problem: Problem, gpu: Gpu) -> Key:
    """Return the key of a kernel for a problem on a GPU."""
    loop_length = problem.n_q if kernel == "dkdv" else problem.n_k
    flags = {"masked": problem.masked, "mapped": problem.mapped, "dropout": problem.dropout, "lengths": problem.lengths}
    bias = () if problem.bias is None else (f"bias {_name(problem.bias)}",)
    queries = bisect.bisect_left(QUERY_BUCKETS, problem.n_q)
    return Key(kernel, _name(problem.dtype), problem.d, problem.dv, precision(problem), problem.mask,
               tuple(map(_window_bucket, problem.window)), bool(problem.lengths or loop_length % TILE),
               (*bias, *(name for name, is_set in flags.items() if is_set)), problem.group,
               QUERY_BUCKETS[queries] if queries < len(QUERY_BUCKETS) else None, _key_bucket(problem.n_k),
               FILL_BUCKETS[bisect.bisect_right(WAVES, waves(kernel, problem, gpu))])


def precision(problem: Problem) -> str | None:
    """Return the precision of float32 products that torch.set_float32_matmul_precision allows; None for other dtypes."""
    if problem.dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def waves(kernel: str, problem: Problem, gpu: Gpu) -> float:
    """Return the number of blocks of TILE queries (of TILE keys for dK/dV) per SM."""
    heads, rows = (problem.kv_heads, problem.n_k) if kernel == "dkdv" else (problem.heads, problem.n_q)
    return math.prod(problem.batch) * heads * -(-rows // TILE) / gpu.sms


def _key_bucket(length):
    return KEY_BUCKETS[min(bisect.bisect_left(KEY_BUCKETS, length), len(KEY_BUCKETS) - 1)]


def _window_bucket(side):
    return side if side in (None, 0) else _key_bucket(side)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
