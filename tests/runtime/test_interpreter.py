"""The patched interpreter computes the numbers that a GPU computes."""

import inspect

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.helpers import memory_guard
from tritonattn.kernels import forward
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


def test_the_language_is_patched_once_for_a_module(monkeypatch):
    patched = []
    patch_once = interpreter.patch_language_once(lambda function: patched.append(function.__module__))
    for function in (forward.attend_loop.fn, forward.store_outputs.fn, convert.fn):
        patch_once(function).restore()
    assert patched == [forward.__name__, __name__]


def test_integers_overflow_as_on_a_gpu():
    x, y = torch.full((16,), 2**31 - 1, dtype=torch.int32), torch.ones(16, dtype=torch.int32)
    total[(1,)](x, y, 16)
    assert y.tolist() == [-(2**31)] * 16


def test_types_of_blocks_are_as_triton_makes_them():
    unpatched = inspect.getclosurevars(tl.block_type.__init__).nonlocals["construct"]
    construct = interpreter.construct_once(unpatched)
    for element, shape in ((tl.float32, [16, tl.constexpr(32)]), (tl.float32, [16, 32]), (tl.float16, [16, 32]),
                           (tl.pointer_type(tl.float32), [16])):
        shared, own = (tl.block_type.__new__(tl.block_type) for _ in range(2))
        construct(shared, element, shape)
        unpatched(own, element, shape)
        assert str(vars(shared)) == str(vars(own)) and shared == own
    with pytest.raises(TypeError, match="0d"):
        construct(shared, tl.float32, [])


@pytest.mark.parametrize("dtype, held_as", [
    (tl.bfloat16, np.uint16), (tl.float32, np.float32), (tl.int1, bool), (tl.pointer_type(tl.float32), np.uint64),
    (tl.block_type(tl.float16, [16]), np.float16), (tl.block_type(tl.pointer_type(tl.int8), [16]), np.uint64)], ids=str)
def test_dtype_of_the_array_behind_a_tensor(dtype, held_as):
    assert interpreter.numpy_dtype(dtype) == np.dtype(held_as)


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
