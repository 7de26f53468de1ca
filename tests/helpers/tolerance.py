"""The rule of accuracy: |ours - exact| <= 2 |torch at the same dtype - exact| + rounding, exact in float64.

Kernels that run in float64 match the definition to 1e-9: there is no rounding to hide behind.
"""

import torch

# of the largest magnitude: sums of products in another order than torch's differ by as much
ULPS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 64}


def agree(name, ours, torchs, exact, dtype):
    """Assert the rule for one tensor; `torchs` is the same tensor by plain PyTorch at `dtype`."""
    assert ours.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}"
    ours, torchs, exact = (x.detach().double().cpu() for x in (ours, torchs, exact))
    special = ~exact.isfinite()
    assert torch.equal(ours[special], exact[special]), f"{name}: expected {exact[special]}, got {ours[special]}"
    ours, torchs, exact = (x[~special] for x in (ours, torchs, exact))
    if exact.numel() == 0:
        return
    error, largest = (ours - exact).abs(), exact.abs().max().item()
    if dtype == torch.float64:
        allowed = 1e-9 * max(1.0, largest)
    else:
        allowed = 2 * (torchs - exact).abs().max().item() + ULPS[dtype] * torch.finfo(dtype).eps * max(largest, 1e-3)
    worst = error.argmax().item()
    assert error[worst] <= allowed, (f"{name}: element {worst} is {ours[worst]:.8g}, exactly {exact[worst]:.8g}: "
                                     f"error {error[worst]:.2e}, allowed {allowed:.2e}")
