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


@pytest.mark.parametrize("dtype, largest", [(torch.bfloat16, 1e3), (torch.float16, 1e2), (torch.float32, 1e5),
                                            pytest.param(torch.float64, 1e9, marks=pytest.mark.interpreted)], ids=str)
@pytest.mark.parametrize("pairs", [{}, {"bias": True}], ids=["plain", "bias"])
def test_weights_are_exact_at_any_score(pairs, dtype, largest, device):
    """Every entry of q and k is the same: the weights of n keys are 1 / n, whatever the scores, in both passes."""
    for n in (1, 4):
        q, k = (torch.full((1, 1, rows, 128), largest, dtype=dtype, device=device) for rows in (3, n))
        v, do = torch.randn(1, 1, n, 16, dtype=dtype, device=device), torch.randn(1, 1, 3, 16, dtype=dtype, device=device)
        options = {"bias": torch.zeros(n, dtype=dtype, device=device)} if pairs else {}
        with config.pinned(Config(16, 16)):
            ours = results(attention, q, k, v, do, torch.zeros(q.shape[:-1], device=device), **options)
        o, dv = ours[0].double(), ours[4].double()
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(o, v.double().mean(-2, keepdim=True).expand(o.shape), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(dv, do.double().sum(-2, keepdim=True).expand(dv.shape) / n, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_large_scores_that_rise_from_tile_to_tile(step, dtype, device):
    """The largest score of a later tile is larger by `step` or by 1: the sums of earlier tiles are scaled down by as much."""
    q, k = (torch.zeros(1, 1, 32, 16, dtype=dtype, device=device) for _ in range(2))
    q[..., 0], q[..., 1], k[..., 0] = 2048, 1, 512
    k[..., 16:, 1] = step
    k[..., 31, 1] = 1
    v, do = torch.randn(2, 1, 1, 32, 16, dtype=dtype, device=device)
    with config.pinned(Config(16, 16)):
        o, _, *gradients = results(attention, q, k, v, do, torch.zeros(q.shape[:-1], device=device), scale=1.0)
    exact = results(reference.attention, q.double(), k.double(), v.double(), do.double(),
                    torch.zeros(q.shape[:-1], device=device).double(), scale=1.0)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(o.double(), exact[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradients[2].double(), exact[4], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [1024.0, 1e-4, -1.0])
def test_float16_gradients_at_other_scales(scale, device):
    """The factor on dS is between 1/16 and 1: with the scale itself, dS would overflow or vanish."""
    q, k, v, do, dlse = Case(n_q=20, n_k=20).tensors(torch.float16, device)
    inputs = q / 64, k / 64, v * 16, do * 16, 0 * dlse
    exact = results(reference.attention, *(x.double() for x in inputs), scale=scale)[2:5]
    with config.pinned(Config(16, 32)):
        for x, expected in zip(results(attention, *inputs, scale=scale)[2:5], exact):
            torch.testing.assert_close(x.double(), expected, rtol=2e-2, atol=5e-3 * expected.abs().max().item() + 1e-7)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3, 6e4])
@pytest.mark.parametrize("options", [{}, {"scale": -0.3}, {"bias": torch.zeros(20, dtype=torch.float16)}],
                         ids=["plain", "scale", "bias"])
def test_float16_gradients_that_fit_do_not_overflow(size, options, device):
    """dS before the scale may exceed float16 where dQ and dK do not: a gradient scaler multiplies cotangents by 2^16."""
    q, k, v, do, _ = Case(n_q=20, n_k=20, d=64, dv=64).tensors(torch.float16, device)
    q, k, v, do = q / 4, k / 4, 2 * v, torch.sign(do) * size
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    dlse = torch.zeros(q.shape[:-1], device=device)
    exact = results(reference.attention, *(x.double() for x in (q, k, v, do, dlse)),
                    **{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()})[2:5]
    with config.pinned(Config(16, 32)):
        ours = results(attention, q, k, v, do, dlse, **options)[2:5]
    for name, x, expected in zip(("dq", "dk", "dv"), ours, exact):
        fits = expected.abs() < 65504
        assert fits.any() and x[fits].isfinite().all(), name
        # float16 numbers below 6e-5 have an absolute precision of 3e-8
        torch.testing.assert_close(x.double()[fits], expected[fits], rtol=5e-3, atol=3e-3 * expected.abs().max().item() + 2e-7)


def test_same_bits_with_and_without_gradients(device):
    q, k, v = Case(n_q=50, n_k=50).tensors(torch.bfloat16, device)[:3]
    plain = attention(q, k, v, causal=True)
    for precise_grad in (False, True):
        assert torch.equal(attention(q.requires_grad_(), k, v, causal=True, precise_grad=precise_grad), plain)


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
