"""Whether the kernels are right on this machine: small problems against float64, in a few seconds.

The rule, on the largest error of each tensor: |ours - exact| <= 2 |torch - exact| + rounding, where `exact` is
tritonattn.reference.attention in float64 and `torch` is the same function in the dtype of the problem. A wrong o or
lse points to the forward kernel, dq alone to the dq kernel, dk or dv alone to dkdv, dq and dk together to delta.
The first run on a GPU compiles the kernels too, and that takes longer than all the rest.
"""

import math
import warnings
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from .. import reference
from ..attention import attention
from ..gpu import INTERPRETED
from ..measure import accuracy
from ..problem import Problem, Window

TENSORS = ("o", "lse", "dq", "dk", "dv")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CAUSAL = (None, 0)
LONGER = 5  # a GPU's tiles are larger and its steps cheap: lengths grow, so that there too a loop takes several steps


class Case(NamedTuple):
    """A problem, the dtypes it is posed in, its sizes (heads, kv_heads, n_q, n_k, d, dv) and who sees whom."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    window: Window = (None, None)
    align: str | None = None
    shifted: bool = False


# no tile divides these lengths; sizes repeat and shifts are multiples of 16, which saves a GPU compilations
CASES = (
    Case("full, sizes 40 and 24", (F32, F16, BF16), (1, 1, 37, 90, 40, 24)),
    Case("scores shifted far down", (F32, BF16), (1, 1, 37, 90, 40, 24), shifted=True),
    Case("causal, grouped heads", (F32, BF16), (2, 1, 75, 75, 32, 32), CAUSAL),
    Case("causal, more keys", (F32, F16), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right"),
    Case("rows that see no key", (F32, BF16), (2, 1, 69, 37, 32, 32), CAUSAL, "bottom_right"),
    Case("sliding window", (F32, F16), (1, 1, 100, 100, 32, 32), (70, 64)),
    Case("causal, size 128", (F16,), (1, 1, 75, 75, 128, 128), CAUSAL),
)
TWICE = Case("the same twice, in bytes", (F16,), (2, 1, 37, 69, 32, 32), CAUSAL, "bottom_right")


@dataclass(frozen=True)
class Result:
    """How far one tensor of one problem is from exact, and how far it may be."""

    problem: str
    dtype: str
    tensor: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed and self.error < math.inf

    @property
    def ratio(self) -> float:
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0


def run(device: torch.device) -> list[Result]:
    """A result for every tensor of every problem, and of one problem run twice."""
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    tasks = [(_check, case, dtype) for case in CASES for dtype in case.dtypes] + [(_repeat, TWICE, F16)]
    with warnings.catch_warnings():
        # what a GPU computes past the end of a tensor, and drops, may overflow; numpy warns of it in the interpreter
        warnings.simplefilter("ignore", RuntimeWarning)
        return [result for check, case, dtype in tasks if bf16 or dtype != BF16
                for result in check(case if INTERPRETED else _longer(case), dtype, device)]


def table(results: list[Result]) -> str:
    """A line for each problem, with its worst tensor, and a verdict on all."""
    lines = [f"{'problem':26}{'dtype':10}{'worst':7}{'error':>9}{'allowed':>9}"]
    for _, group in groupby(results, lambda result: (result.problem, result.dtype)):
        worst = max(group, key=lambda result: result.ratio)
        lines.append(f"{worst.problem:26}{worst.dtype:10}{worst.tensor:7}{worst.error:9.1e}{worst.allowed:9.1e}  "
                     + ("ok" if worst.agrees else "WRONG"))
    wrong = [result.tensor for result in results if not result.agrees]
    names = ", ".join(name for name in TENSORS if name in wrong)
    return "\n".join([*lines, f"{len(wrong)} of {len(results)} tensors are wrong: {names}" if wrong
                      else f"all {len(results)} tensors agree"])


def as_json(results: list[Result]) -> list[dict]:
    """Every tensor; an error that is not finite is null, as JSON has no word for it."""
    def finite(x):
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return [{name: finite(x) for name, x in asdict(result).items()} | {"agrees": result.agrees} for result in results]


def _check(case: Case, dtype: torch.dtype, device: torch.device) -> list[Result]:
    """One problem, held against float64."""
    inputs = _inputs(case, dtype, device)
    exact = _outcome(reference.attention, case, [x.double() for x in inputs])
    torchs, ours = _outcome(reference.attention, case, inputs), _outcome(attention, case, inputs)
    # lse is float32 whatever the inputs are: float32 arithmetic is its measure
    torchs["lse"] = _outcome(reference.attention, case, [x.float() for x in inputs])["lse"]
    results = []
    for name in TENSORS:
        allowed = accuracy.allowed(torchs[name], exact[name], ours[name].dtype)
        results.append(Result(case.name, _name(dtype), name, accuracy.error(ours[name], exact[name]), allowed))
    return results


def _repeat(case: Case, dtype: torch.dtype, device: torch.device) -> list[Result]:
    """One problem run twice; the error is the number of bytes that differ, and none may."""
    inputs = _inputs(case, dtype, device)
    first, second = (_outcome(attention, case, inputs) for _ in range(2))
    differ = {name: (first[name].view(torch.uint8) != second[name].view(torch.uint8)).sum().item() for name in TENSORS}
    return [Result(case.name, _name(dtype), name, float(differ[name]), 0.0) for name in TENSORS]


def _longer(case: Case) -> Case:
    """The same problem with lengths for a GPU."""
    heads, kv_heads, n_q, n_k, *widths = case.sizes
    window = tuple(side and side * LONGER for side in case.window)
    return case._replace(sizes=(heads, kv_heads, n_q * LONGER, n_k * LONGER, *widths), window=window)


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, do, dlse: random normal, the same numbers on every device."""
    heads, _, n_q, _, d, dv = case.sizes
    q, k, v = Problem((1,), *case.sizes, dtype).tensors()
    # do has the shape of queries as wide as v, and dlse that of values one wide
    do, _, dlse = Problem((1,), heads, heads, n_q, n_q, dv, 1, dtype).tensors(seed=1)
    if case.shifted:
        # softmax does not mind, but a running maximum that starts at a finite number does; at 16 bits torch would
        # round scores of -1e4 to steps of several units, and that would allow anything
        q[..., 0], k[..., 0] = (-1e4 if dtype == F32 else -128) * math.sqrt(d), 1
    return [x.to(device) for x in (q, k, v, do, dlse.squeeze(-1))]


def _outcome(attend, case: Case, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp and gradients of one kind of attention, by name."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    o, lse = attend(q, k, v, window=case.window, align=case.align, return_lse=True)
    do, dlse = (x.to(out.dtype) for x, out in zip(inputs[3:], (o, lse)))
    return dict(zip(TENSORS, (o, lse, *torch.autograd.grad((o, lse), (q, k, v), (do, dlse)))))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
