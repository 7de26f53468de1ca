"""A check of the kernels on this machine: small problems against float64, in a few seconds.

Every tensor follows the rule of measure/accuracy.py, where `exact` is tritonattn.reference.attention in float64 and `torch`
the same function in the problem's dtype. A wrong o, lse, max or entropy points to the forward kernel, key_mass to its own, dq
alone to the dq kernel, dk or dv alone to dkdv, dq and dk together to delta. The first run on a GPU also compiles the kernels,
which takes longer.
"""

import math
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from .. import reference
from ..attention import attention, attention_varlen
from ..gpu import INTERPRETED
from ..measure import accuracy
from ..problem import Window
from .format import columns

TENSORS = ("o", "lse", "dq", "dk", "dv", "drelative")
STATISTICS = ("max", "entropy", "key_mass")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CAUSAL = (None, 0)
LENGTH_FACTOR = 5  # of the lengths on a GPU, whose tiles are larger, so that its loops take several steps too


class Case(NamedTuple):
    """A problem: its dtypes, sizes (heads, kv_heads, n_q, n_k, d, dv) and mask."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    window: Window = (None, None)
    align: str | None = None
    shifted: bool = False
    capped: bool = False      # with a softcap and sinks
    placed: bool = False      # with ALiBi and a table of relative positions
    packed: bool = False      # as `_packed` cuts it into sequences
    statistics: bool = False  # with STATISTICS
    normalizer: str = "softmax"
    repeated: bool = False    # compare two runs instead: the error is the number of bytes that differ


# no tile divides these lengths; repeated sizes, and shifts that are multiples of 16, save compilations on a GPU
CASES = (
    Case("full, sizes 40 and 24", (F32, F16, BF16), (1, 1, 37, 90, 40, 24)),
    Case("scores shifted down", (F32, BF16), (1, 1, 37, 90, 40, 24), shifted=True),
    Case("causal, grouped heads", (F32, BF16), (2, 1, 75, 75, 32, 32), CAUSAL),
    Case("causal, more keys", (F32, F16), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right"),
    Case("rows without keys", (F32, BF16), (2, 1, 69, 37, 32, 32), CAUSAL, "bottom_right"),
    Case("sliding window", (F32, F16), (1, 1, 100, 100, 32, 32), (70, 64)),
    Case("causal, size 128", (F16,), (1, 1, 75, 75, 128, 128), CAUSAL),
    Case("softcap and sinks", (F32, BF16), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right", capped=True),
    Case("relative positions", (F32, BF16), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right", placed=True),
    Case("statistics", (F32, BF16), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right", statistics=True),
    *(Case(f"{name}, causal", (F32, F16), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right", normalizer=name)
      for name in ("sigmoid", "relu")),
    Case("packed sequences", (F32, BF16), (2, 1, 75, 90, 32, 32), CAUSAL, "bottom_right", packed=True),
    Case("repeated, in bytes", (F16,), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right", repeated=True),
)


@dataclass(frozen=True)
class Result:
    """The error of one tensor of one problem, and its tolerance."""

    problem: str
    dtype: str
    tensor: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed and self.error < math.inf


def run(device: torch.device) -> list[Result]:
    """Check every tensor of every problem."""
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return [result for case in CASES for dtype in case.dtypes if bf16 or dtype != BF16
            for result in _check(case if INTERPRETED else _longer(case), dtype, device)]


def table(results: list[Result]) -> str:
    """Format one line per problem, with its worst tensor, and a verdict."""
    rows = [("problem", "dtype", "worst", "error", "allowed", "")]
    for _, group in groupby(results, lambda result: (result.problem, result.dtype)):
        worst = max(group, key=lambda result: (not result.agrees, result.error / (result.allowed or 1)))
        rows.append((worst.problem, worst.dtype, worst.tensor, f"{worst.error:.1e}", f"{worst.allowed:.1e}",
                     "ok" if worst.agrees else "WRONG"))
    wrong = [result.tensor for result in results if not result.agrees]
    names = ", ".join(name for name in (*TENSORS, *STATISTICS) if name in wrong)
    return "\n".join([*columns(rows, left=(0, 1, 2, 5)), f"{len(wrong)} of {len(results)} tensors are wrong: {names}" if wrong
                      else f"all {len(results)} tensors agree"])


def as_json(results: list[Result]) -> list[dict]:
    """Return every tensor's result as plain data; an infinite error or tolerance becomes None, since JSON has no infinity."""
    return [{name: None if x == math.inf else x for name, x in asdict(result).items()} | {"agrees": result.agrees}
            for result in results]


def _check(case: Case, dtype: torch.dtype, device: torch.device) -> list[Result]:
    """Compare one problem with float64, or with a second run."""
    inputs = _inputs(case, dtype, device)
    ours = _results(attention, case, inputs)
    if case.repeated:
        again = _results(attention, case, inputs)
        errors = {name: (float((ours[name].view(torch.uint8) != again[name].view(torch.uint8)).sum()), 0.0) for name in ours}
    else:
        exact = _results(reference.attention, case, [x.double() for x in inputs])
        torch_results = _results(reference.attention, case, inputs)
        # lse and statistics are float32 for every dtype, so their tolerances come from float32 arithmetic
        wide = _results(reference.attention, case, [x.float() for x in inputs])
        torch_results |= {name: x for name, x in wide.items() if name in ("lse", *STATISTICS)}
        errors = {name: (accuracy.max_error(x, exact[name]), accuracy.tolerance(torch_results[name], exact[name], x.dtype))
                  for name, x in ours.items()}
    return [Result(case.name, str(dtype).removeprefix("torch."), name, *pair) for name, pair in errors.items()]


def _longer(case: Case) -> Case:
    """Return the same problem with LENGTH_FACTOR times the lengths."""
    heads, kv_heads, n_q, n_k, *widths = case.sizes
    window = tuple(side and side * LENGTH_FACTOR for side in case.window)
    return case._replace(sizes=(heads, kv_heads, n_q * LENGTH_FACTOR, n_k * LENGTH_FACTOR, *widths), window=window)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return random normal q, k, v, do, dlse, the same on every device."""
    heads, kv_heads, n_q, n_k, d, dv = case.sizes
    rng = torch.Generator().manual_seed(0)
    shapes = (heads, n_q, d), (kv_heads, n_k, d), (kv_heads, n_k, dv), (heads, n_q, dv), (heads, n_q)
    q, k, *others = (torch.randn(1, *shape, generator=rng, dtype=dtype) for shape in shapes)
    if case.shifted:
        # softmax is invariant, but a running maximum that starts at a finite number would be wrong; at 16 bits torch
        # rounds scores of -1e4 to multiples of several units, which would make the tolerance useless
        q[..., 0], k[..., 0] = (-1e4 if dtype == F32 else -128) * math.sqrt(d), 1
    return [x.to(device) for x in (q, k, *others)]


def _packed(function, q, k, v, **options):
    """Return o and lse of the rows as three sequences, the second one empty. The last rows belong to none."""
    varlen = {attention: attention_varlen, reference.attention: reference.attention_varlen}[function]
    starts = (torch.tensor((0, n // 3, n // 3, n - 2), dtype=torch.int32, device=q.device) for n in (q.shape[-2], k.shape[-2]))
    o, lse = varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), *starts, **options)
    return o.transpose(0, 1)[None], lse[None]


def _results(function, case: Case, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return output, log-sum-exp and gradients of an attention function, by name."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    variant = {"softcap": 5.0, "sink": torch.linspace(-1, 3, q.shape[-3], device=q.device)} if case.capped else {}
    if case.placed:
        variant = {"alibi": torch.linspace(0, 0.5, q.shape[-3], device=q.device),
                   "relative": (torch.arange(-6, 7, device=q.device) / 8).repeat(q.shape[-3], 1).to(q.dtype)}
    # not the slopes: the error of so few numbers is often small by chance, and torch's would be no measure
    learned = [variant["relative"].requires_grad_()] if case.placed else []
    options = variant | {"window": case.window, "align": case.align}
    if case.normalizer != "softmax":
        o = function(q, k, v, normalizer=case.normalizer, **options)
        gradients = torch.autograd.grad(o, (q, k, v), inputs[3].to(o.dtype))
        return dict(zip(("o", "dq", "dk", "dv"), (o, *gradients)))
    options["return_lse"] = True
    options |= {"return_stats": STATISTICS} if case.statistics else {}
    o, lse, *statistics = _packed(function, q, k, v, **options) if case.packed else function(q, k, v, **options)
    computed = {name: x for each in statistics for name, x in each.items()}
    do, dlse = (x.to(out.dtype) for x, out in zip(inputs[3:], (o, lse)))
    outputs = (o, lse, *(x for x in computed.values() if x.requires_grad))
    cotangents = (do, dlse, *(torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
                              for x in outputs[2:]))
    return computed | dict(zip(TENSORS, (o, lse, *torch.autograd.grad(outputs, (q, k, v, *learned), cotangents))))
