"""Online softmax equals softmax, for any split of the row."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonattn.kernels.scores import ScoreMods, ScoreParams
from tritonattn.kernels.softmax import round_p, softmax_finish, softmax_start, softmax_step
from tritonattn.kernels.tile import Constexprs
from tritonattn.kernels.window import Window
from tritonattn.runtime import interpreter

pytestmark = pytest.mark.interpreted


@triton.jit
def probe(s, v, o, statistics, scoring, static, STEPS: tl.constexpr):
    rows, dims = tl.arange(0, static.BLOCK_M), tl.arange(0, static.DV)
    state = softmax_start(static.BLOCK_M, static)
    for i in tl.static_range(STEPS):
        cols = i * static.BLOCK_N + tl.arange(0, static.BLOCK_N)
        s_tile = tl.load(s + rows[:, None] * (STEPS * static.BLOCK_N) + cols[None, :])
        v_tile = tl.load(v + cols[:, None] * static.DV + dims[None, :])
        state = softmax_step(state, s_tile, (v_tile,), 0, i * static.BLOCK_N, scoring, static, "masked")
    o_tile, lse, minus_m, log2_l = softmax_finish(state, scoring, static, tl.float64)
    tl.store(o + rows[:, None] * static.DV + dims[None, :], o_tile[0])
    tl.store(statistics + rows, lse)
    tl.store(statistics + 16 + rows, minus_m)
    tl.store(statistics + 32 + rows, log2_l)


def online_softmax(s, v, exp2_scale, size, biased=False):
    """Return o, lse, -m and log2 l of each row of scores s, with values v, `size` keys per step."""
    static = Constexprs(*map(tl.constexpr, (16, 16, 1, 16, size, False, (), tl.float64, "ieee", False, False)))
    o, statistics = (torch.full((n, 16), torch.nan, dtype=torch.float64) for n in (16, 3))
    scoring = ScoreParams(exp2_scale, None, None, None, Window(), ScoreMods((0,) if biased else ()))
    probe[(1,)](s, v, o, statistics, scoring, static, s.shape[1] // size)
    return o, *statistics


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([16, 32, 64]), spread=st.sampled_from([0.0, 1.0, 100.0, 1e6]),
       shift=st.sampled_from([0.0, -1e4, 1e4, 1e30]), hidden=st.floats(0, 1), biased=st.booleans())
def test_online_softmax_equals_softmax(seed, size, spread, shift, hidden, biased):
    rng = torch.Generator().manual_seed(seed)
    s = spread * torch.randn(16, 64, generator=rng, dtype=torch.float64) + shift
    s[torch.rand(16, 64, generator=rng) < hidden] = -torch.inf
    v = torch.randn(64, 16, generator=rng, dtype=torch.float64)
    o, lse, minus_m, log2_l = online_softmax(s, v, math.log2(math.e), size, biased)
    masked = (s == -torch.inf).all(1)
    assert (o[masked] == 0).all() and (lse[masked] == -torch.inf).all() and (log2_l[masked] == torch.inf).all()
    torch.testing.assert_close(o[~masked], s[~masked].softmax(1) @ v, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(lse[~masked], s[~masked].logsumexp(1), atol=1e-9, rtol=1e-12)
    assert torch.equal(-minus_m[~masked], s[~masked].amax(1))
    sums = (s - s.amax(1, keepdim=True)).exp().sum(1)
    torch.testing.assert_close(log2_l[~masked], sums[~masked].log2(), atol=1e-9, rtol=1e-9)


@triton.jit
def round_kernel(x, y, dtype: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(y + at, round_p(tl.load(x + at), dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_truncated_to_bfloat16_and_rounded_to_float16(dtype):
    x = torch.tensor([0.0, 1.0, 1 + 2**-8, 1 + 2**-7 - 2**-20, 1 + 2**-11 + 2**-20, 0.3, 1e-3, 0.999, torch.nan] + [0.1] * 7)
    y = torch.empty_like(x)
    with interpreter.patched():
        round_kernel[(1,)](x, y, getattr(tl, dtype))
    truncated = (x.view(torch.int32) & -65536).view(torch.float32)
    expected = truncated if dtype == "bfloat16" else x.half().float()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
