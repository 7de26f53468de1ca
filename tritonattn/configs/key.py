"""What a tuned config is for: a kernel, and of its problem everything that may change which config is best.

Sizes that hardly matter by themselves fall into buckets; dtype, head sizes, mask and features never do.
"""

import bisect
import math
from dataclasses import asdict, dataclass, fields

import torch

from ..block_mask import TILE
from ..gpu import Gpu
from ..problem import Problem

QUERIES = (1, 16, 64, 256, 1024, 4096)              # upper ends of the buckets; what is longer has one of its own
KEYS = tuple(128 << i for i in range(10))           # 128 to 65536; what is longer falls into the last
WAVES = (0.5, 1.0, 4.0)                             # of blocks of TILE rows, one on each SM
FILL_BUCKETS = ("under half", "under one", "under four", "more")


@dataclass(frozen=True)
class Key:
    """One kind of launch."""

    kernel: str
    dtype: str
    d: int
    dv: int
    precision: str | None      # of float32 products: "ieee" or "tf32", which need other shared memory
    mask: str                  # "full", "causal" or "window"
    window: tuple              # left and right: None, 0, or the upper end of a bucket
    ragged: bool               # the loop ends within a tile of TILE rows
    features: tuple[str, ...]  # what is given for each pair or batch: "bias float32", "masked", "mapped", ...
    group: int                 # query heads per key head
    queries: int | None        # the upper end of a bucket; None: more than all of them
    keys: int                  # likewise, clamped
    fill: str                  # one of FILLS

    def as_json(self) -> dict:
        return asdict(self) | {"features": list(self.features), "window": list(self.window)}

    @staticmethod
    def from_json(content: dict) -> "Key":
        """The key whose `as_json` this is. TypeError, KeyError: it is of no key."""
        known = {field.name: content[field.name] for field in fields(Key)}
        if len(known) != len(content):
            raise TypeError(f"expected the fields of a key, got {', '.join(sorted(set(content) - set(known)))} besides")
        return Key(**known | {"features": tuple(content["features"]), "window": tuple(content["window"])})

    def __str__(self):
        sizes = f"d{self.d}" if self.d == self.dv else f"d{self.d}/{self.dv}"
        lengths = f"queries {'over 4096' if self.queries is None else self.queries} keys {self.keys}"
        extras = [*self.features, *(["ragged"] if self.ragged else []), *([f"group {self.group}"] if self.group > 1 else [])]
        mask = f"window {self.window[0]},{self.window[1]}" if self.mask == "window" else self.mask
        tf32 = ["tf32"] if self.precision == "tf32" else []
        return " ".join([self.kernel, self.dtype, *tf32, sizes, mask, *extras, lengths, f"fill {self.fill}"])


def key_of(kernel: str, problem: Problem, gpu: Gpu) -> Key:
    """The key of this kernel of this problem on this GPU."""
    walked = problem.n_q if kernel == "dkdv" else problem.n_k
    given = {"masked": problem.masked, "mapped": problem.mapped, "dropout": problem.dropout, "lengths": problem.lengths}
    bias = () if problem.bias is None else (f"bias {_name(problem.bias)}",)
    queries = bisect.bisect_left(QUERIES, problem.n_q)
    return Key(kernel, _name(problem.dtype), problem.d, problem.dv, precision(problem), problem.mask,
               tuple(map(_window_bucket, problem.window)), bool(problem.lengths or walked % TILE),
               (*bias, *(name for name, there in given.items() if there)), problem.group,
               QUERIES[queries] if queries < len(QUERIES) else None,
               KEYS[min(bisect.bisect_left(KEYS, problem.n_k), len(KEYS) - 1)],
               FILL_BUCKETS[bisect.bisect_right(WAVES, waves(kernel, problem, gpu))])


def precision(problem: Problem) -> str | None:
    """What torch.set_float32_matmul_precision allows, for float32."""
    if problem.dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _window_bucket(side):
    return side if side in (None, 0) else KEYS[min(bisect.bisect_left(KEYS, side), len(KEYS) - 1)]


def waves(kernel: str, problem: Problem, gpu: Gpu) -> float:
    """How many blocks of TILE queries, or keys, there are for each SM."""
    heads, rows = (problem.kv_heads, problem.n_k) if kernel == "dkdv" else (problem.heads, problem.n_q)
    return math.prod(problem.batch) * heads * -(-rows // TILE) / gpu.sms


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
