"""The patched interpreter computes the numbers that a GPU computes."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.helpers import memory_guard
from tritonattn.kernels import backward, forward, scores
from tritonattn.runtime import interpreter

pytestmark = pytest.mark.interpreted


@triton.jit
def convert(x, y, dtype: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(dtype))


@triton.jit
def product(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def copy(x, y, n, bound, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at < bound, other=0.0), mask=at < n)


@triton.jit
def total(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(y + at) + tl.load(x + tl.program_id(0) * N + at))


def test_casts_to_bfloat16_round_to_nearest_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    convert[(1,)](x, y, tl.bfloat16, x.numel())
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y[~x.isnan()], x.bfloat16()[~x.isnan()])


def test_products_of_bfloat16():
    a, b = torch.randn(2, 32, 32).bfloat16()
    c = torch.empty(32, 32)
    product[(1,)](a, b, c, 32, "ieee")
    torch.testing.assert_close(c, a.float() @ b.float())


def test_tf32_rounds_its_inputs():
    a, b = torch.randn(2, 32, 32)
    c = torch.empty(32, 32)
    product[(1,)](a, b, c, 32, "tf32")
    rounded = [torch.from_numpy(interpreter.to_tf32(x.numpy())) for x in (a, b)]
    torch.testing.assert_close(c, rounded[0] @ rounded[1])
    assert 1e-4 < (c - a @ b).abs().max() < 1e-1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_a_product_is_the_same_wherever_it_stands(dtype):
    """As on a GPU. NumPy's own products differ in the last bit on some processors, by the row and by the processor."""
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    c, rows, exact = torch.empty(32, 32), torch.empty(32, 32), a.double() @ b.double()
    product[(1,)](a, b, c, 32, "ieee")
    product[(1,)](a[order].contiguous(), b, rows, 32, "ieee")
    assert torch.equal(rows, c[order]) and torch.equal(c, exact.float())


def test_kernels_are_called_without_patching_again():
    """The module prefix of the kernels is right; a wrong one would only cost time."""
    kernels = [value for module in (forward, backward, scores) for value in vars(module).values()
               if isinstance(value, InterpretedFunction) and value.fn.__module__ != "triton.language.standard"]
    assert len(kernels) > 10 and all(kernel.fn.__module__.startswith(interpreter.KERNELS) for kernel in kernels)
    assert not convert.fn.__module__.startswith(interpreter.KERNELS)


def test_an_old_triton_with_a_new_numpy_is_refused(monkeypatch):
    monkeypatch.setattr(interpreter.triton, "__version__", "3.6.0")
    monkeypatch.setattr(interpreter.np, "__version__", "2.4.1")
    assert "needs NumPy below 2.4, found 2.4.1" in interpreter.problem()
    with pytest.raises(RuntimeError, match="numpy<2.4"):
        interpreter.patch.__wrapped__()
    monkeypatch.setattr(interpreter.triton, "__version__", "3.7.0")
    assert interpreter.problem() is None


def test_the_guard_catches_a_lane_out_of_bounds():
    x, y = torch.randn(20), torch.zeros(20)
    copy[(2,)](x, y, 20, 20, 16)
    with pytest.raises(Exception, match="outside every tensor"):
        copy[(2,)](torch.randn(20), torch.zeros(20), 20, 32, 16)


def test_the_guard_catches_two_programs_at_one_address():
    with pytest.raises(memory_guard.Race, match="two programs write"):
        total[(2,)](torch.randn(32), torch.zeros(16), 16)
