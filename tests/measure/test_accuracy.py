"""The accuracy rule against values computed by hand."""

import math

import pytest
import torch

from tritonattn.measure import accuracy


def test_max_error_of_infinities_and_nan():
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    assert accuracy.max_error(torch.tensor([1.5, -math.inf]), exact) == 0.5
    assert accuracy.max_error(torch.tensor([1.0, 0.0]), exact) == math.inf
    assert accuracy.max_error(torch.tensor([math.nan, -math.inf]), exact) == math.inf
    assert accuracy.max_error(torch.empty(0), torch.empty(0)) == 0


def test_tolerance_is_twice_torch_result_error_and_rounding():
    exact = torch.tensor([8.0, -1.0, -math.inf], dtype=torch.float64)
    torch_result = torch.tensor([8.25, -1.0, -math.inf])
    assert accuracy.tolerance(torch_result, exact, torch.bfloat16) == pytest.approx(2 * 0.25 + 4 * 2**-7 * 8)
    assert accuracy.tolerance(torch.full((1,), -math.inf), torch.full((1,), -math.inf), torch.float16) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tolerance_is_infinite_where_torch_overflows(value):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert accuracy.tolerance(torch.tensor([1.0, value]), exact, torch.float16) == math.inf
