"""The rule of accuracy: |ours - exact| <= 2 |torch at the same dtype - exact| + rounding, on the largest error."""

import math

import torch

LIMIT = 2  # times torch's error: both round, each in its own order
ULPS = 4   # sums are taken in another order than torch's, then stored: a few roundings of the largest number


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance; inf where something is nan. -inf is no distance away from -inf."""
    distance = (x.to(exact.dtype) - exact).abs().masked_fill(x == exact, 0)
    return distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if x.numel() else 0.0


def allowed(torchs: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    """The error that a tensor of this dtype may have, from what torch makes of it and what it is.

    inf where torch's is not finite though the exact one is: then nothing can be measured by it.
    """
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return LIMIT * error(torchs, exact) + ULPS * torch.finfo(dtype).eps * largest
