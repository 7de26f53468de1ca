"""The accuracy rule: |ours - exact| <= 2 |torch at the same dtype - exact| + rounding, on the largest error of a tensor."""

import math

import torch

TORCH_ERRORS = 2  # times torch's error: both round, each in another order
ULPS = 4          # of the largest number: sums in another order than torch's, then stored


def max_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest |x - exact|; inf if x has a NaN or another infinity. Equal infinities have no error."""
    error = (x.to(exact.dtype) - exact).abs().masked_fill(x == exact, 0)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if x.numel() else 0.0


def tolerance(torch_result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest error that a result of this dtype may have, given torch's result and the exact one.

    inf if torch's result is not finite where the exact one is: it then says nothing about the tolerance.
    """
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return TORCH_ERRORS * max_error(torch_result, exact) + ULPS * torch.finfo(dtype).eps * largest
