"""Accuracy on five families of data, under shifted scores, and of dQ with and without precise_grad.

`python -m tests.kernels.test_precision` prints the README's table of dQ errors.
"""

import pytest
import torch

from tests import DEVICE
from tests.helpers.cases import DRAW, Case, check, results
from tests.helpers.tiers import slow
from tritonattn import Config, attention, config, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("family", DRAW)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_accuracy_on_every_family_of_data(family, dtype, causal, device):
    check(Case(n_q=96, n_k=96, d=32, dv=32, causal=causal), dtype, device, family=family, tiles=Config(32, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shift", [-120.0, -1e4, 1e4])
@pytest.mark.parametrize("n", [40, 64])
def test_adding_a_constant_to_all_scores_changes_nothing(shift, n, dtype, device):
    """With q[..., 0] = 1 and k[..., 0] = shift sqrt(D) every score of a row is `shift` larger."""
    q, k, v, do, _ = Case(n_q=n, n_k=n).tensors(dtype, device)
    q[..., 0], k[..., 0] = 1, 0
    with config.pinned(Config(32, 32)):
        plain = results(attention, q, k, v, do, torch.zeros(q.shape[:-1], device=device), causal=True)
        k[..., 0] = shift * 4
        shift = k[0, 0, 0, 0].item() / 4  # as rounded to the dtype
        moved = results(attention, q, k, v, do, torch.zeros(q.shape[:-1], device=device), causal=True)
    # the shift takes digits from the scores: |shift| roundings of float32
    digits = max(abs(shift) * 2e-7, torch.finfo(dtype).eps) * 8
    for name, ours, expected in zip(("o", "dk", "dv"), (moved[0], moved[3], moved[4]), (plain[0], plain[3], plain[4])):
        assert ours.isfinite().all(), name
        torch.testing.assert_close(ours.float(), expected.float(), atol=digits * 4, rtol=digits)
    torch.testing.assert_close(moved[1], plain[1] + shift, rtol=1e-6, atol=1e-4)
    # the first column of dq, sum(ds) * shift, is only the rounding error of dS times the shift
    torch.testing.assert_close(moved[2][..., 1:].float(), plain[2][..., 1:].float(), atol=digits * 4, rtol=digits)


def dq_errors(dtype, family, n=512, device=DEVICE):
    """Return the relative RMS errors of dQ against float64: (with precise_grad, without, eager torch)."""
    q, k, v, do, dlse = Case(n_q=n, n_k=n, heads=1, kv_heads=1, d=64, dv=64).tensors(dtype, device, family=family)
    if family in ("uniform", "mean-shifted"):
        do = (do.float() * 0.5 + 0.5).to(dtype)
    exact = results(reference.attention, q.double(), k.double(), v.double(), do.double(), 0 * dlse.double())[2]
    outcomes = []
    for function, options in ((attention, {"precise_grad": True}), (attention, {"precise_grad": False}),
                              (reference.attention, {})):
        with config.pinned(Config(128, 128)):
            dq = results(function, q, k, v, do, 0 * dlse, **options)[2]
        outcomes.append(((dq.double() - exact).norm() / exact.norm()).item())
    return outcomes


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)], ids=lambda dtype: str(dtype)[6:])
def test_precise_grad_reduces_the_error_of_dq(dtype, device):
    precise, rounded, eager = dq_errors(dtype, "uniform")
    assert precise < 0.01 and precise < rounded / 5 and precise < eager / 2
    precise, rounded, eager = dq_errors(dtype, "randn", n=256)
    assert precise < 0.005 and precise <= 1.1 * rounded and precise < eager


def print_table():
    print(f"{'data':14}{'dtype':10}{'precise_grad':>14}{'without':>10}{'eager torch':>13}   (relative RMS error of dQ, "
          f"512 x 512, D 64, {'GPU' if DEVICE.type == 'cuda' else 'interpreted'})")
    for family in DRAW:
        for dtype in (torch.bfloat16, torch.float16):
            precise, rounded, eager = dq_errors(dtype, family)
            print(f"{family:14}{str(dtype)[6:]:10}{precise:14.2%}{rounded:10.2%}{eager:13.2%}")


if __name__ == "__main__":
    print_table()
