"""The accuracy rule: |ours - exact| <= 2 |torch at the same dtype - exact| + rounding, on the largest error of a tensor."""

import math

import torch

TORCH_ERRORS = 2  # allowed multiple of torch's error: both round, in different orders
ULPS = 4          # roundings of the largest number: sums in another order than torch's, then a store


def max_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest |x - exact|; inf if x has a NaN or another infinity. Equal infinities have no error."""
    error = (x.to(exact.dtype) - exact).abs().masked_fill(x == exact, 0)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if x.numel() else 0.0


def tolerance(torch_result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, ulps: float = ULPS,
              smallest: float = 0.0) -> float:
    """Return the largest error that a result of this dtype may have, given torch's result and the exact one.

    `ulps` is the number of roundings, relative to the largest magnitude but at least to `smallest`. The tolerance is inf if
    torch's result is not finite where the exact one is: torch's error is then no measure.
    """
    return TORCH_ERRORS * max_error(torch_result, exact) + ulps * torch.finfo(dtype).eps * max(largest(exact), smallest)


def largest(x: torch.Tensor) -> float:
    """Return the largest finite magnitude of a tensor; 0 if there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
