"""The accuracy rule of tritonattn/measure/accuracy.py, as an assertion. In float64 the limit is 1e-9."""

import math

import torch

from tritonattn.measure import accuracy

# roundings of the largest magnitude: for 16-bit numbers stricter than the rule; float32 sums have another order than torch's
ULPS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 64}


def agree(name, ours, torchs, exact, dtype):
    """Assert that `ours` is accurate; `torchs` is the same tensor by plain PyTorch at `dtype`, `exact` in float64."""
    assert ours.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}"
    ours, torchs, exact = (x.detach().double().cpu() for x in (ours, torchs, exact))
    if dtype == torch.float64:
        limit = 1e-9 * max(1.0, accuracy.largest(exact))
    else:
        limit = accuracy.tolerance(torchs, exact, dtype, ulps=ULPS[dtype], smallest=1e-3)
    error = accuracy.max_error(ours, exact)
    assert error <= limit < math.inf, f"{name}: expected an error of at most {limit:.2e}, got {error:.2e}"
