"""The rule of accuracy: |ours - exact| <= 2 |torch at the same dtype - exact| + rounding, on the largest error."""

import math

import torch

LIMIT = 2  # times torch's error: both round, each in its own order
ULPS = 4   # sums are taken in another order than torch's, then stored: a few roundings of the largest number


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance; inf where something is nan. -inf is no distance away from -inf."""
    distance = (x.to(exact.dtype) - exact).abs().masked_fill(x == exact, 0)
    return distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if x.numel() else 0.0


def allowed(torchs: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, ulps: float = ULPS, smallest: float = 0.0) -> float:
    """Return the largest error that a tensor of this dtype may have, from torch's result and the exact one.

    `ulps` is the number of roundings, of the largest magnitude but of at least `smallest`. The limit is inf where torch's
    result is not finite but the exact one is: torch's error is then no measure.
    """
    return LIMIT * error(torchs, exact) + ulps * torch.finfo(dtype).eps * max(largest(exact), smallest)


def largest(x: torch.Tensor) -> float:
    """Return the largest finite magnitude of a tensor; 0 if there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
