"""The key of a tuned config: a kernel, and the properties of its problem that may change which config is best.

Lengths and the number of tiles fall into buckets. Dtype, head sizes, mask and features are kept exactly. A sink does not count,
because no loop contains it.
"""

import bisect
import math

import torch

from ..block_mask import TILE
from ..gpu import Gpu
from ..problem import Problem

QUERY_BUCKETS = (1, 16, 64, 256, 1024, 4096)        # upper ends; longer problems share a bucket of their own
KEY_BUCKETS = tuple(128 << i for i in range(10))    # upper ends, 128 to 65536; longer problems fall into the last
WAVES = (0.5, 1.0, 4.0)                             # bounds between FILL_BUCKETS: blocks of TILE rows per SM
FILL_BUCKETS = ("under half", "under one", "under four", "more")


def key_of(kernel: str, problem: Problem, gpu: Gpu) -> str:
    """Return the key of a kernel for a problem on a GPU: "forward bfloat16 d128 causal queries 4096 keys 4096 fill more".

    TF32 is named, since its products need other amounts of shared memory. A problem is ragged if the loop over its keys (dK/dV:
    over its queries) ends within a tile.
    """
    # the loops of packed sequences are nearly those of a padded batch
    problem = problem.padded()
    loop_length = problem.n_q if kernel == "dkdv" else problem.n_k
    sides = ",".join(str(side if side in (None, 0) else _key_bucket(side)) for side in problem.window)
    queries = bisect.bisect_left(QUERY_BUCKETS, problem.n_q)
    flags = {
        "tf32": precision(problem) == "tf32",
        f"d{problem.d}": problem.d == problem.dv,
        f"d{problem.d}/{problem.dv}": problem.d != problem.dv,
        f"window {sides}": problem.mask == "window",
        problem.mask: problem.mask != "window",
        f"bias {_name(problem.bias)}": problem.bias is not None,
        "masked": problem.masked,
        "mapped": problem.mapped,
        "dropout": problem.dropout,
        "softcap": problem.softcap,
        "alibi": problem.alibi,
        "relative": problem.relative,
        "entropy": problem.entropy,
        "key_mass": problem.key_mass and kernel != "forward",
        problem.normalizer: problem.normalizer != "softmax",
        f"score_function {problem.score_function and problem.score_function.name}": problem.score_function is not None,
        f"mask_function {problem.mask_function and problem.mask_function.name}": problem.mask_function is not None,
        "lengths": problem.lengths,
        "ragged": problem.lengths or loop_length % TILE,
        f"group {problem.group}": problem.group > 1,
    }
    return " ".join([
        kernel, _name(problem.dtype), *(words for words, holds in flags.items() if holds),
        f"queries {QUERY_BUCKETS[queries] if queries < len(QUERY_BUCKETS) else 'over 4096'}",
        f"keys {_key_bucket(problem.n_k)}", f"fill {FILL_BUCKETS[bisect.bisect_right(WAVES, waves(kernel, problem, gpu))]}"])


def precision(problem: Problem) -> str | None:
    """Return the precision of float32 products that torch.set_float32_matmul_precision allows; None for other dtypes."""
    if problem.dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def waves(kernel: str, problem: Problem, gpu: Gpu) -> float:
    """Return the number of blocks of TILE queries (of TILE keys for dK/dV) per SM."""
    problem = problem.padded()
    heads, rows = (problem.kv_heads, problem.n_k) if kernel == "dkdv" else (problem.heads, problem.n_q)
    return math.prod(problem.batch) * heads * -(-rows // TILE) / gpu.sms


def _key_bucket(length):
    return KEY_BUCKETS[min(bisect.bisect_left(KEY_BUCKETS, length), len(KEY_BUCKETS) - 1)]


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
