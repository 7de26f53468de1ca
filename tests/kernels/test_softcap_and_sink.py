"""Softcap and sinks, with their gradients: extreme values, rows without keys, and every way to call them.

The pairs with other features are cases of helpers/cases.py.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.cases import Case, check, results
from tests.helpers.tolerance import agree
from tritonattn import Config, attention, config, reference, warm
from tritonattn.kernels import scores

TILES = Config(16, 32)


def tensors(device, dtype=torch.float64, *, heads=2, n_q=20, n_k=36, d=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = (heads, n_q), (heads, n_k), (heads, n_k), (heads, n_q)
    return [torch.randn(1, h, n, d, generator=rng).to(device, dtype) for h, n in shapes]


def outcome(function, device, dtype, sink, **options):
    """Return o, lse and the gradients of q, k, v and the sink."""
    q, k, v, do = tensors(device, dtype)
    dlse = torch.randn(q.shape[:-1], generator=torch.Generator().manual_seed(5))
    dlse = dlse.to(device, torch.promote_types(dtype, torch.float32))
    return results(function, q, k, v, do, dlse, sink=sink, **options)


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [None, -0.7])
@pytest.mark.parametrize("level", [-3000.0, -40.0, 40.0, 3000.0])
def test_sinks_far_from_the_scores(level, scale, device):
    """Both sums of a row keep their digits: they are divided by the larger of the two terms."""
    sink = level + torch.randn(2, device=device, dtype=torch.float64)
    ours, exact = (outcome(function, device, torch.float64, sink, scale=scale) for function in (attention, reference.attention))
    for name, one, other in zip(("o", "lse", "dq", "dk", "dv", "dsink"), ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lowest", ["finfo.min", -1e30, -1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_bias_is_the_lowest_number_leave_all_weight_to_the_sink(lowest, dtype, device):
    q, k, v, do = tensors(device, dtype)
    bias = torch.zeros(20, 36, device=device)
    bias[:10] = torch.finfo(dtype).min if lowest == "finfo.min" else lowest
    bias, sink, dlse = bias.to(dtype), torch.tensor([1.3, -2.0], device=device), torch.ones(q.shape[:-1], device=device)
    names = ("max", "entropy", "key_mass")
    ours, exact = (results(function, *(x.to(wide or x.dtype) for x in (q, k, v, do, dlse)), bias=bias.to(wide or dtype),
                           sink=sink.to(wide or sink.dtype), return_stats=names)
                   for function, wide in ((attention, None), (reference.attention, torch.float64)))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for name, one, other in zip(("o", "lse", "dq", "dk", "dv", "dbias", "dsink", *names), ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")
    assert (ours[0][:, :, :10] == 0).all() and torch.equal(ours[1][0, :, 0].double(), sink.double())


@pytest.mark.interpreted
def test_a_sink_biases_no_16_bit_output(device):
    """The weights of bfloat16 are truncated: their sum must not be added to the exact weight of the sink."""
    q, k, v, _ = tensors(device, torch.bfloat16, n_k=1024)
    v = v.abs() + 1
    sink = torch.tensor([7.5, 10.0], device=device)
    exact = reference.attention(q.double(), k.double(), v.double(), sink=sink.double())
    error = (attention(q, k, v, sink=sink).double() / exact - 1).mean()
    assert abs(error) < 3e-4, f"mean relative error {error:.1e}"


@pytest.mark.interpreted  # a compiler may fuse other operations after the loop
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sink_of_minus_infinity_gives_the_bits_of_none(dtype, device):
    sink = torch.full((2,), -math.inf, device=device)
    with config.pinned(TILES):
        *ours, dsink = outcome(attention, device, dtype, sink, causal=True, align="bottom_right")
        plain = outcome(attention, device, dtype, None, causal=True, align="bottom_right")
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    assert (dsink == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_keys_give_the_sink_all_weight(dtype, device):
    """Their output is 0, their lse is the sink, and so is its gradient through lse."""
    q, k, v, do = tensors(device, dtype, n_q=36, n_k=20)
    sink = torch.tensor([0.5, -math.inf], device=device)
    dlse = torch.ones(q.shape[:-1], device=device)
    options = {"causal": True, "align": "bottom_right"}
    o, lse, dq, *_, dsink = results(attention, q, k, v, do, dlse, sink=sink, **options)
    assert (o[..., :16, :] == 0).all() and (dq[..., :16, :] == 0).all()
    assert (lse[:, 0, :16] == 0.5).all() and (lse[:, 1, :16] == -math.inf).all()
    wide = (x.double() for x in (q, k, v, do, dlse))
    exact = results(reference.attention, *wide, sink=sink.double(), **options)[-1]
    agree("dsink", dsink[:1], exact[:1].to(dtype), exact[:1], dtype)
    assert dsink[1] == 0


def test_several_sinks_count_as_their_log_sum_exp(device):
    q, k, v, _ = tensors(device, torch.float32)
    sinks = torch.randn(2, 3, device=device, requires_grad=True)
    merged = sinks.detach().logsumexp(-1).requires_grad_()
    ours, one = attention(q, k, v, sink=sinks), attention(q, k, v, sink=merged)
    assert torch.equal(ours, one)
    dsinks, = torch.autograd.grad(ours.sum(), sinks)
    dmerged, = torch.autograd.grad(one.sum(), merged)
    torch.testing.assert_close(dsinks, dmerged[:, None] * sinks.detach().softmax(-1))


@pytest.mark.interpreted
def test_a_bias_of_rows_moves_the_keys_against_the_sink(device):
    """Without a sink such a bias changes nothing but lse; with one it has a gradient through the output."""
    q, k, v, do = tensors(device)
    bias, sink = (torch.randn(shape, dtype=torch.float64, device=device) for shape in ((2, 20, 1), (2,)))
    dlse = torch.zeros(q.shape[:-1], dtype=torch.float64, device=device)
    sink += 3  # about half of the weight
    ours, exact = (results(function, q, k, v, do, dlse, bias=bias, sink=sink) for function in (attention, reference.attention))
    torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)
    assert ours[-2].abs().max() > 0.1


def test_nan_in_a_sink_stays_in_its_head(device):
    q, k, v, do = tensors(device, torch.float32)
    dlse = torch.zeros(q.shape[:-1], device=device)
    sinks = [torch.tensor([x, 1.0], device=device) for x in (math.nan, 0.0)]
    spoiled, clean = (results(attention, q, k, v, do, dlse, causal=True, align="bottom_right", sink=sink) for sink in sinks)
    for one, other in zip(spoiled[:-1], clean):
        assert one[:, 0].isnan().any() and torch.equal(one[:, 1], other[:, 1])
    assert spoiled[-1][0].isnan() and spoiled[-1][1] == clean[-1][1]


def test_nan_behind_a_mask_does_not_pass_the_softcap(device):
    """Key 15 is seen by queries 15 to 18, and keys before 12 by none of these."""
    q, k, v, do = tensors(device, torch.float32, n_k=20)
    dlse = torch.zeros(q.shape[:-1], device=device)
    options = {"window": (3, 0), "softcap": 2.0, "sink": torch.zeros(2, device=device)}
    with config.pinned(TILES):
        clean = results(attention, q, k, v, do, dlse, **options)
        k[..., 15, 3], v[..., 15, 2] = math.nan, math.inf
        ours = results(attention, q, k, v, do, dlse, **options)
    for one, other, n in zip(ours[:5], clean, (15, 15, 15, 12, 12)):
        torch.testing.assert_close(one[:, :, :n], other[:, :, :n])
        torch.testing.assert_close(one[:, :, 19:], other[:, :, 19:])
    assert ours[0][:, :, 15:19].isnan().any() and ours[4][:, :, 12:19].isnan().any()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_has_small_errors_everywhere(dtype, device):
    """Relative ones in float32, also where 1 - 2 / (e^2x + 1) has lost all digits."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, scores.tanh(tl.load(x + i), y.dtype.element_ty))

    from tritonattn.runtime import interpreter

    size = torch.logspace(-6, 2, 1024, dtype=torch.float64, device=device)
    x = torch.cat((size, -size))[::2].to(dtype).contiguous()
    x[:4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    y = torch.empty_like(x)
    with interpreter.patched():
        kernel[(1,)](x, y, 1024)
    exact = torch.tanh(x.double())
    error = (y.double() - exact).abs()
    assert error.max() < (5e-7 if dtype == torch.float32 else 1e-15)
    if dtype == torch.float32:
        assert (error <= 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("softcap", [0.01, 30.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcaps_of_any_size(softcap, dtype, device):
    check(Case(heads=2, kv_heads=2, causal=True, softcap=softcap, sinks=1), dtype, device)


def test_softcap_bounds_the_scores(device):
    """Scores of 1e4 become 5, and a bias is added after that."""
    q = torch.full((1, 1, 1, 4), 100.0, device=device)
    k = torch.stack([q, -q], -2)[0]
    v = torch.eye(2, device=device)[None, None]
    o, lse = attention(q, k, v, softcap=5.0, return_lse=True)
    torch.testing.assert_close(o[0, 0, 0], torch.tensor([5.0, -5.0], device=device).softmax(-1))
    torch.testing.assert_close(lse[0, 0, 0], torch.tensor([5.0, -5.0], device=device).logsumexp(-1))
    biased = attention(q, k, v, softcap=5.0, bias=torch.tensor([0.0, 10.0], device=device))
    torch.testing.assert_close(biased[0, 0, 0], torch.full((2,), 0.5, device=device))


@pytest.mark.parametrize("scale", [6e4, 1e-3])
def test_float16_gradients_through_a_softcap_that_fit_do_not_overflow(scale, device):
    q, k, v, do = tensors(device, torch.float16)
    dlse = torch.zeros(q.shape[:-1], device=device)
    do = (do / do.abs().max() * scale).half()
    ours = results(attention, q, k, v, do, dlse, softcap=20.0)
    exact = results(reference.attention, *(x.double() for x in (q, k, v, do, dlse)), softcap=20.0)
    for name, one, other in zip(("dq", "dk", "dv"), ours[2:], exact[2:]):
        assert one.isfinite().all() and (one.double() - other).abs().max() < 5e-3 * other.abs().max() + 1e-7, name


@pytest.mark.slow
def test_gradcheck(device):
    if device.type != "cpu":
        pytest.skip("the kernels run in float64 in the interpreter alone")
    leaves = [x[..., :4, :3].contiguous().requires_grad_() for x in tensors(device)[:3]]
    sink = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    options = {"softcap": 1.5, "causal": True, "return_lse": True}
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], sink=x[3], **options), (*leaves, sink))


def test_functional_transforms_over_a_sink(device):
    q, k, v, _ = tensors(device, torch.float32, n_q=5, n_k=5)
    sinks = torch.randn(3, 2, device=device)

    def loss(sink, function=attention):
        return function(q, k, v, sink=sink, softcap=3.0).square().sum()

    exact = torch.stack([torch.func.grad(lambda x: loss(x, reference.attention))(sink) for sink in sinks])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(sinks), exact, atol=1e-5, rtol=1e-4)


def test_a_sink_where_keys_have_more_batch_dimensions_than_queries(device):
    q, k, v = (torch.randn(shape, device=device) for shape in ((2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)))
    sinks = torch.randn(2, 2, device=device)
    mapped = torch.vmap(lambda sink: attention(q, k, v, sink=sink))(sinks)
    for one, sink in zip(mapped, sinks):
        torch.testing.assert_close(one, reference.attention(q, k, v, sink=sink), atol=1e-5, rtol=1e-5)


def test_vmap_over_a_sink_with_dropout(device):
    q, k, v, _ = tensors(device, torch.float32, n_q=5, n_k=5)
    sinks, options = torch.randn(2, 2, device=device), {"dropout_p": 0.4, "dropout_seed": torch.tensor([3], device=device)}
    mapped = torch.vmap(lambda sink: attention(q, k, v, sink=sink, **options))(sinks)
    torch.testing.assert_close(mapped, torch.stack([attention(q, k, v, sink=sink, **options) for sink in sinks]))


def test_only_the_sink_is_learned(device):
    q, k, v, _ = tensors(device, torch.float32)
    sink = torch.randn(2, device=device, requires_grad=True)
    warm(q, k, v, sink=sink)
    assert sink.grad is None
    dsink, = torch.autograd.grad(attention(q, k, v, sink=sink).sum(), sink)
    exact, = torch.autograd.grad(reference.attention(q, k, v, sink=sink).sum(), sink)
    torch.testing.assert_close(dsink, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=str)
def test_compiled_in_one_graph(shape, device):
    torch._dynamo.reset()
    q, k, v, _ = tensors(device, torch.float32, n_q=9, n_k=9)
    sink = torch.randn(shape, device=device, requires_grad=True)

    def step(q, sink):
        return attention(q * 2, k, v, causal=True, softcap=4.0, sink=sink).square().sum()

    inputs = q.requires_grad_(), sink
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, device):
    q, k, v, _ = (x.requires_grad_() for x in tensors(device, torch.bfloat16))
    sink = torch.randn(2, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step(*inputs):
        return attention(*inputs[:3], sink=inputs[3], softcap=4.0).float().square().sum()

    inputs = q, k, v, sink
    expected = torch.autograd.grad(step(*inputs), inputs)
    checkpoint(step, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected))


def test_sinks_of_any_dtype_and_under_autocast(device):
    q, k, v, _ = tensors(device, torch.float32)
    sink = torch.tensor([0.5, -1.0], device=device)
    expected = attention(q, k, v, sink=sink)
    for dtype in (torch.float16, torch.bfloat16):
        learned = sink.to(dtype).requires_grad_()
        for _ in range(2):
            o = attention(q, k, v, sink=learned)
            assert torch.equal(o, expected)
        dsink, = torch.autograd.grad(o.sum(), learned)
        assert dsink.dtype == dtype and dsink.abs().sum() > 0
        with torch.autocast(device.type, dtype=torch.bfloat16):
            for _ in range(2):
                torch.testing.assert_close(attention(q, k, v, sink=learned).float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("options, error, message", [
    ({"softcap": 0.0}, ValueError, r"softcap: expected a number from 0.001 to 500, got 0.0; None is no cap"),
    ({"softcap": 0.01, "scale": 1e37}, ValueError, r"softcap: expected at least 4.3e-02 with scale 1e\+37, got 0.01"),
    ({"softcap": -2}, ValueError, "softcap: expected .*got -2"), ({"softcap": math.nan}, ValueError, "softcap: .*got nan"),
    ({"softcap": 501.0}, ValueError, "softcap: expected .*got 501.0"),
    ({"softcap": "30"}, TypeError, "softcap: expected a number or None, got '30'"),
    ({"softcap": torch.tensor(30.0)}, TypeError, "softcap: expected a number or None, got a tensor"),
    ({"sink": 0.0}, TypeError, "sink: expected a tensor or None, got 0.0"),
    ({"sink": torch.zeros(3)}, RuntimeError, r"sink: expected one score for each of 2 heads, \[2\], or .*shape \(3,\)"),
    ({"sink": torch.zeros(1, 2)}, RuntimeError, r"sink: expected one score .*shape \(1, 2\)"),
    ({"sink": torch.zeros(2, 1, 1)}, RuntimeError, "sink: expected one score"),
    ({"sink": torch.tensor(0.0)}, RuntimeError, "sink: expected one score"),
    ({"sink": torch.zeros(2, 0)}, RuntimeError, "sink: expected one score"),
    ({"sink": torch.zeros(2, dtype=torch.int64)}, RuntimeError, "sink: expected torch.float16, .*got torch.int64"),
    ({"sink": torch.zeros(2, device="meta")}, RuntimeError, "sink: expected .*, where the queries are, got meta"),
    ({"sink": torch.zeros(2).to_sparse()}, RuntimeError, "sink: expected a dense"),
], ids=str)
def test_bad_arguments_raise(options, error, message, device):
    q, k, v, _ = tensors(device, torch.float32)
    for name, x in options.items():
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            options = options | {name: x.to(device)}
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(q, k, v, **options)
