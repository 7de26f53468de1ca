"""The rule of accuracy, by hand."""

import math

import pytest
import torch

from tritonattn.measure import accuracy


def test_errors_of_what_is_not_finite():
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    assert accuracy.error(torch.tensor([1.5, -math.inf]), exact) == 0.5
    assert accuracy.error(torch.tensor([1.0, 0.0]), exact) == math.inf
    assert accuracy.error(torch.tensor([math.nan, -math.inf]), exact) == math.inf
    assert accuracy.error(torch.empty(0), torch.empty(0)) == 0


def test_twice_torchs_error_and_some_rounding():
    exact = torch.tensor([8.0, -1.0, -math.inf], dtype=torch.float64)
    torchs = torch.tensor([8.25, -1.0, -math.inf])
    assert accuracy.allowed(torchs, exact, torch.bfloat16) == pytest.approx(2 * 0.25 + 4 * 2**-7 * 8)
    assert accuracy.allowed(torch.full((1,), -math.inf), torch.full((1,), -math.inf), torch.float16) == 0


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_what_torch_cannot_compute_is_no_measure(spoilt):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert accuracy.allowed(torch.tensor([1.0, spoilt]), exact, torch.float16) == math.inf
