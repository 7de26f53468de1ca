"""Kernel arguments: batch dimensions, long strides, tensors beyond 2^31 elements."""

import pytest
import torch

from tests.helpers.cases import Case
from tritonattn import Config, Problem, attention, config, reference
from tritonattn.runtime import arguments, custom_op, launch

TILES = Config(16, 16)


def views(*tensors, batch):
    problem = Problem(batch, 1, 1, *tensors[0].shape[-2:], 1, 1, torch.float32)
    *records, shape = launch.kernel_arguments(problem, TILES, *tensors)
    return records, shape.batches


def test_dense_batch_dimensions_are_merged():
    x = torch.empty(2, 3, 4, 1, 5, 8)
    (first, _, missing), batches = views(x, x, None, batch=(2, 3, 4))
    assert batches == (24,) and first.strides.batch == (40,) and missing is None


def test_dimensions_are_merged_only_where_every_tensor_allows_it():
    dense, spread = torch.empty(2, 3, 4, 1, 5, 8), torch.empty(1, 3, 4, 1, 5, 8).expand(2, -1, -1, -1, -1, -1)
    records, batches = views(dense, spread, batch=(2, 3, 4))
    assert batches == (12, 2) and [x.strides.batch for x in records] == [(40, 480), (40, 0)]


def test_no_batch_is_one_batch():
    (x,), batches = views(torch.empty(1, 5, 8), batch=())
    assert batches == (1,) and x.strides.batch == (0,)


def test_a_permuted_batch(device):
    q, k, v = (torch.randn(3, 2, 1, 20, 8, device=device).transpose(0, 1) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), reference.attention(q, k, v))


def huge(shape, strides, dtype=torch.float16):
    """Return a tensor over lazily committed memory: only touched pages exist."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    x = torch.empty(0, dtype=dtype).set_(torch.UntypedStorage(span * dtype.itemsize), 0, shape, strides)
    return x.copy_(torch.randn(shape))


@pytest.mark.interpreted
@pytest.mark.parametrize("shape, strides", [
    ((3, 1, 5, 8), (2**30, 8, 8, 1)),       # a stride fits into 32 bits, its multiple does not
    ((1, 3, 5, 8), (8, 2**30, 8, 1)),
    ((1, 1, 40, 8), (8, 8, 2**26, 1)),      # from tile to tile
    ((1, 1, 24, 8), (8, 8, 2**28 + 8, 1)),  # within a tile
    ((1, 1, 5, 16), (8, 8, 1, 2**28 + 64)),
    ((2, 1, 5, 8), (2**31 + 8, 8, 8, 1)),
], ids=["batch", "head", "tile", "row", "column", "stride"])
def test_strides_beyond_32_bits(shape, strides, device):
    q, k, v = (huge(shape, strides).requires_grad_() for _ in range(3))
    with config.pinned(Config(16, 16)):
        o = attention(q, k, v, causal=True)
        gradients = torch.autograd.grad(o.sum(), (q, k, v))
    near = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*near, causal=True)
    torch.testing.assert_close(o, exact, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(gradients, torch.autograd.grad(exact.sum(), near), atol=5e-3, rtol=5e-3)


@pytest.mark.interpreted
def test_mask_with_far_rows_and_more_keys_than_queries(device):
    """The rows of a mask are indexed by position: the kernel starts more than 2^31 bytes before the mask."""
    q, k, v = (torch.randn(1, 1, n, 8, device=device) for n in (4, 140, 140))
    mask = torch.rand(1, 1, 4, 140) < 0.7
    far = torch.empty(0, dtype=torch.bool).set_(torch.UntypedStorage(3 * 2**24 + 140), 0, mask.shape, (8, 8, 2**24, 1))
    far.copy_(mask)
    options = {"causal": True, "align": "bottom_right"}
    with config.pinned(Config(16, 64)):
        ours = attention(q, k, v, mask=far, **options)
    torch.testing.assert_close(ours, reference.attention(q, k, v, mask=mask, **options))


@pytest.mark.interpreted
def test_gradient_of_a_bias_with_far_rows(device):
    q, k, v, do = torch.randn(4, 1, 1, 40, 8, dtype=torch.float16, device=device)
    bias = torch.randn(1, 1, 40, 40, dtype=torch.float16, device=device, requires_grad=True)
    dbias, = torch.autograd.grad(attention(q, k, v, bias=bias), bias, do)
    inputs = arguments.prepare(q, k, v, bias=bias.detach())
    o, _, statistics, *_ = custom_op.forward_op(*inputs, False)
    delta = torch.nn.functional.pad((o.float() * do.float()).sum(-1), (0, 8))  # to a multiple of 16
    far = huge(dbias.shape, (8, 8, 2**26, 1))
    call = launch.dbias_launch(inputs.problem, TILES, inputs, launch.Queries(q, do, statistics, delta), far)
    launch.run(call, far.device)
    torch.testing.assert_close(far, dbias, atol=2e-3, rtol=2e-3)


def test_only_tensors_with_wide_tiles_use_64_bit_offsets():
    near, far = torch.empty(1, 1, 5, 8), torch.empty(1, 1, 5, 8, device="meta").as_strided((1, 1, 5, 8), (8, 8, 2**28, 1))
    assert [x.wide.value for x in views(near, far, batch=(1,))[0]] == [False, True]


@pytest.mark.parametrize("dtype, scale, unit, factor, ds_scale", [
    (torch.float32, 2.0, 2.0, None, None), (torch.bfloat16, -0.5, 0.5, -1.0, None), (torch.float16, 0.0, 1.0, 0.0, 1.0),
    (torch.float16, -0.3, 0.3, -1.0, 0.25), (torch.float16, 100.0, 100.0, None, 1.0), (torch.float16, 1e-3, 1e-3, None, 1 / 16),
    (torch.float16, 1e-40, 1.0, 0.0, 1.0),
])
def test_exp2_scale_is_positive(dtype, scale, unit, factor, ds_scale):
    inputs = launch.AttentionInputs(torch.empty(0, dtype=dtype), None, None, scale=scale)
    scoring = launch._score_params(inputs, (None, None), launch.ScoreMods())
    assert scoring.exp2_scale == pytest.approx(unit * 1.4426950408889634) and scoring.qk_scale == factor
    assert scoring.ds_scale == ds_scale


@pytest.mark.parametrize("dtype, n_k, expected", [(torch.bfloat16, 8, (True, True)), (torch.float32, 8, (True, False)),
                                                  (torch.bfloat16, 0, (False, True))])
def test_flags_of_a_config_reach_the_kernel(dtype, n_k, expected):
    problem = Problem((1,), 1, 1, 8, n_k, 16, 16, dtype)
    static = launch.example_launch("forward", problem, Config(16, 16, ahead=True, mma_sum=True)).arguments[-1]
    assert (static.AHEAD.value, static.MMA_SUM.value) == expected


@pytest.mark.parametrize("missing, two_passes, parts", [
    ((), False, ["both"]), ((), True, ["dv", "dk"]), (("dk",), True, ["dv"]), (("dv",), True, ["dk"]),
])
def test_passes_of_dk_and_dv(missing, two_passes, parts):
    """Two passes are the second axis of the grid; a single gradient needs one."""
    problem, chosen = Problem((1,), 2, 1, 40, 40, 16, 16, torch.bfloat16), Config(16, 16, two_passes=two_passes)
    q, k, v = problem.tensors("meta")
    queries = launch.Queries(q, q, q[..., 0], q[..., 0])
    call = launch.dkdv_launch(problem, chosen, launch.AttentionInputs(q, k, v), queries,
                              *(None if name in missing else x for name, x in (("dk", k), ("dv", v))))
    *_, passes, static_dk, static = call.arguments
    assert (call.programs, call.passes) == (3, len(parts)) == (3, passes)
    assert [each.GRADS.value for each in (static, static_dk) if each] == parts


def test_a_mask_uses_64_bit_offsets_where_a_block_needs_them():
    near, far = (torch.empty(1, 1, 5, 8, device="meta").as_strided((1, 1, n, n), (0, 0, n, 1)) for n in (2**18, 2**27))
    problem = Problem((1,), 1, 1, 5, 8, 1, 1, torch.float32)
    for x, wide in ((near, False), (far, True)):
        for seen in (x, x.mT):
            pairs, _ = launch.kernel_arguments(problem, TILES, launch.ScoreMods((seen,)))
            assert pairs.bias[0].wide.value == wide


@pytest.mark.parametrize("set_up, dtype, expected", [
    (lambda: None, torch.float32, "ieee"), (lambda: torch.set_float32_matmul_precision("high"), torch.float32, "tf32"),
    (lambda: torch.set_float32_matmul_precision("high"), torch.bfloat16, "ieee"),
], ids=["highest", "high", "high-bf16"])
def test_tf32_only_where_torch_allows_it(set_up, dtype, expected):
    try:
        set_up()
        call = launch.example_launch("forward", Problem((1,), 1, 1, 16, 16, 16, 16, dtype), TILES)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert call.arguments[-1].PRECISION.value == expected


@pytest.mark.interpreted
def test_float32_products_are_not_rounded_to_tf32_by_default(device):
    """The patched interpreter rounds TF32 inputs, so a product without a stated precision would differ."""
    q, k, v, *_ = Case().tensors(torch.float32, device)
    exact = reference.attention(q.double(), k.double(), v.double())
    ieee = (attention(q, k, v) - exact).abs().max()
    try:
        torch.set_float32_matmul_precision("high")
        tf32 = (attention(q, k, v) - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ieee < 2e-6 < 1e-5 < tf32 < 1e-2


def test_empty_problem_launches_nothing():
    call = launch.example_launch("forward", Problem((0,), 1, 1, 16, 16, 16, 16, torch.float16), TILES)
    assert call.programs == 0
    launch.run(call._replace(kernel=None), torch.device("cpu"))
