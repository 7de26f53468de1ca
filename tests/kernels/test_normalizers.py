"""Sigmoid and ReLU attention, with their gradients. The pairs with other features are cases of helpers/cases.py."""

import dataclasses
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.cases import SINGLE, assert_exact, check, results, tensors
from tests.helpers.memory import noted
from tests.helpers.sequences import Sequences, starts_of
from tests.helpers.tiers import slow
from tritonattn import Config, attention, attention_varlen, block_mask, config, dropout_mask, explain, reference, warm
from tritonattn.configs import lookup
from tritonattn.runtime import custom_op, plan

TILES = Config(16, 32)
BOTH = pytest.mark.parametrize("normalizer", ["sigmoid", "relu"])


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("sizes", [(37, 37), (20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (6, 4)], ids=str)
def test_each_sequence_has_its_own_number_of_keys(window, sizes, align, normalizer, device):
    """It decides the bias of a sigmoid and the divisor of ReLU; padding has no part in it, masked keys have."""
    n_q, n_k = sizes
    given = tensors(device, batch=(4,), n_q=n_q, n_k=n_k)
    lengths = torch.tensor([n_k, 1, 0, n_k - 7], device=device)
    assert_exact(given, key_lengths=lengths, window=window, align=align, normalizer=normalizer)


@BOTH
@pytest.mark.parametrize("family", ["randn", "mean-shifted", "saturated", "outliers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "split", "bias", "softcap"])
def test_accuracy(name, dtype, family, normalizer, device):
    check(dataclasses.replace(SINGLE[name], normalizer=normalizer), dtype, device, family, TILES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("normalizer, options", [("sigmoid", {"sigmoid_bias": -13.0}), ("relu", {"scale": 0.025})], ids=str)
def test_small_weights_keep_their_digits(normalizer, options, dtype, device):
    """Weights of 2e-6 are subnormal in float16, and so are those of ReLU, here scores of 0.1 divided by 3000."""
    n_k = 3000 if normalizer == "relu" else 37
    q, k, v, do, _ = tensors(device, dtype, batch=(1,), n_k=n_k)
    # large values and cotangents, so that the results are normal numbers
    leaves, do = [x.requires_grad_() for x in (q, k, v * 4096)], do * 4096
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    options = options | {"normalizer": normalizer}
    ours, exact = attention(*leaves, **options), reference.attention(*exact_leaves, **options)
    dv, exact_dv = torch.autograd.grad(ours, leaves[2], do)[0], torch.autograd.grad(exact, exact_leaves[2], do.double())[0]
    unit = {torch.float16: 2 ** -11, torch.bfloat16: 2 ** -8, torch.float32: 2 ** -20}[dtype]
    for one, other in ((ours, exact), (dv, exact_dv)):
        assert (one.double() - other).abs().max() <= 2 * unit * other.abs().max()


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(37, 37), (37, 1), (1, 37), (1, 1), (), (2, 1, 1), (2, 37, 1), (2, 2, 37, 1), (2, 1, 1, 1)],
                         ids=str)
@pytest.mark.parametrize("window", [(None, None), (9, 0)], ids=str)
def test_biases_of_every_shape(shape, window, normalizer, device):
    """A bias that is the same for all keys has a gradient, unlike with a softmax."""
    bias = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
    assert_exact(tensors(device), bias=bias, window=window, normalizer=normalizer)


@BOTH
def test_a_bias_of_heads_takes_no_memory_of_the_size_of_the_scores(normalizer, device, monkeypatch):
    q, k, v, do, _ = tensors(device, torch.float32, n_q=64, n_k=64, batch=(1,))
    bias, taken = torch.zeros(2, 1, 1, device=device, requires_grad=True), []
    for home, names in ((torch, ("empty", "empty_like", "empty_strided", "zeros_like")),
                        (torch.Tensor, ("new_empty", "new_empty_strided", "contiguous", "clone", "to"))):
        for name in names:
            monkeypatch.setattr(home, name, noted(getattr(home, name), taken))
    gradient, = torch.autograd.grad(attention(q, k, v, bias=bias, normalizer=normalizer), bias, do)
    assert gradient.shape == bias.shape and max(taken) <= q.numel() < 64 * 64 and 2 * 64 in taken


@pytest.mark.interpreted
def test_a_number_equals_a_bias(device):
    given = tensors(device)
    with config.pinned(TILES):
        number = results(attention, *given, normalizer="sigmoid", sigmoid_bias=-1.5)
        both = results(attention, *given, normalizer="sigmoid", sigmoid_bias=0, bias=torch.full((1,), -1.5).to(given[0]))
        default = results(attention, *given, normalizer="sigmoid")
        same = results(attention, *given, normalizer="sigmoid", sigmoid_bias=-math.log(37))
    for one, other in zip(number + default, both[:4] + same, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert_exact(given, normalizer="sigmoid", sigmoid_bias=2)


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-30, 40.0])
@pytest.mark.parametrize("bias", ["none", "zeros", "randn"])
def test_any_scale(scale, bias, normalizer, device):
    """Scores of 0 too, where ReLU's slope is 0 as in torch."""
    bias = None if bias == "none" else getattr(torch, bias)(37, 37, dtype=torch.float64, device=device)
    assert_exact(tensors(device), scale=scale, bias=bias, normalizer=normalizer)


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_dropout(dropout_p, normalizer, device):
    seed = torch.tensor([7], device=device)
    assert_exact(tensors(device), causal=True, dropout_p=dropout_p, normalizer=normalizer, ours_only={"dropout_seed": seed},
                 exact_only={"keep": dropout_mask((2, 2, 37, 37), dropout_p, seed)})


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("tiles", [Config(32, 64), Config(128, 32)], ids=str)
def test_with_a_block_mask(tiles, normalizer, device):
    mask = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:150, 128:], mask[200:, :128] = False, True
    mask = mask.to(device)
    given = tensors(device, batch=(1,), heads=1, kv_heads=1, n_q=300, n_k=300)
    assert_exact(given, tiles, ours_only={"mask": block_mask(mask)}, exact_only={"mask": mask}, normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores_of_thousands(dtype, device):
    """A sigmoid is then 0 or 1, its slope 0; a ReLU is linear."""
    q, k, v, do, _ = tensors(device, dtype)
    q[..., 0], k[..., 0] = 160, 160
    k[..., ::2, 0] = -160
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, normalizer="sigmoid")
    dq, dk, _ = torch.autograd.grad(o, leaves, do)
    expected = v.double()[..., 1::2, :].sum(-2, keepdim=True).expand(o.shape)
    torch.testing.assert_close(o.double(), expected, atol=0.05 if dtype == torch.bfloat16 else 0.01, rtol=0)
    assert (dq == 0).all() and (dk == 0).all()
    o = attention(*leaves, normalizer="relu")
    assert o.isfinite().all()
    expected = reference.attention(*(x.double() for x in leaves), normalizer="relu")
    torch.testing.assert_close(o.double(), expected, rtol=0.01, atol=2)
    # scores of 800,000, which float16 does not hold
    q, k, v = (torch.full((1, 1, 40, 16), x, dtype=dtype, device=device) for x in (448, 448, 0.015625))
    torch.testing.assert_close(attention(q, k, v, normalizer="relu"), torch.full_like(q, 4 * 448**2 * 0.015625))


@BOTH
def test_nan_and_infinities_reach_what_attends_to_them_and_nothing_else(normalizer, device):
    q, k, v, do, dlse = tensors(device, torch.float32)
    clean = [x.clone() for x in (q, k, v)]
    k[..., 20, 3], v[..., 25, 0], v[..., 30, 1] = math.nan, math.inf, math.nan
    options = {"causal": True, "normalizer": normalizer}
    with config.pinned(TILES):
        o, *gradients = results(attention, q, k, v, do, dlse, **options)
        expected = attention(*clean, **options)
        shown = torch.ones(37, dtype=torch.bool, device=device)
        shown[[20, 25, 30]] = False
        hidden = results(attention, q, k, v, do, dlse, mask=shown, **options)
        exact = results(reference.attention, *clean, do, dlse, mask=shown, **options)
    torch.testing.assert_close(o[..., :20, :], expected[..., :20, :], atol=1e-6, rtol=1e-6)
    assert o[..., 20:, :].isnan().all() and gradients[0][..., 20:, :].isnan().any(-1).all()
    assert gradients[0][..., :20, :].isfinite().all()
    for one, other in zip(hidden, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_cotangent_does_not_reach_what_relu_cut_off(value, device):
    """Scores of key 3 are negative for all queries: its gradient, and that of the queries from it, are finite."""
    q, k, v, do, dlse = tensors(device, torch.float32)
    q, k = q.abs(), k.abs()
    k[..., 3, :] *= -1
    do[..., 5, :] = value
    with config.pinned(TILES):
        ours = results(attention, q, k, v, do, dlse, normalizer="relu")
    exact = results(reference.attention, q, k, v, do, dlse, normalizer="relu")
    assert ours[2][..., 3, :].isfinite().all() and not ours[2][..., 4, :].isfinite().any()
    for one, other in zip(ours[:3], exact[:3], strict=True):
        finite = other.isfinite()
        assert torch.equal(one.isfinite(), finite)
        torch.testing.assert_close(one[finite], other[finite], atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", [(37, 37), (20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("options", [{"causal": True, "align": "bottom_right"}, {"window": (9, 4), "align": "top_left"},
                                     {"softcap": 2.0}, {"key_lengths": torch.tensor([13, 0])}], ids=str)
def test_a_bias_of_heads_beside_others(options, sizes, normalizer, device):
    n_q, n_k = sizes
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if "key_lengths" in options:
        options |= {"alibi": torch.rand(4, dtype=torch.float64, device=device), "align": "bottom_right",
                    "relative": torch.randn(4, 9, dtype=torch.float64, device=device)}
    for shape in ((4, 1, 1), (n_q, 1)):
        bias = torch.randn(shape, dtype=torch.float64, device=device)
        assert_exact(tensors(device, heads=4, n_q=n_q, n_k=n_k), bias=bias, normalizer=normalizer, **options)


@BOTH
def test_a_cotangent_of_nan_reaches_only_the_keys_of_its_row(normalizer, device):
    q, k, v, do, dlse = tensors(device, torch.float32)
    do[..., 10, :] = math.nan
    with config.pinned(TILES):
        dq, dk, dv = results(attention, q, k, v, do, dlse, causal=True, normalizer=normalizer)[1:]
    # in the definition, a masked weight of 0 times a NaN makes dV a NaN
    exact = results(reference.attention, q, k, v, do, dlse, causal=True, normalizer=normalizer)[1:3]
    assert all(torch.equal(one.isfinite(), other.isfinite()) for one, other in zip((dq, dk), exact, strict=True))
    assert dq[..., 10, :].isnan().any() and dk[..., :11, :].isnan().any() and dv[..., :11, :].isnan().all()
    assert all(x[..., 11:, :].isfinite().all() for x in (dq, dk, dv))


@BOTH
def test_no_statistics_are_stored_and_no_delta_is_computed(normalizer, device, monkeypatch):
    kernels = []
    get_config = lookup.get_config
    monkeypatch.setattr(lookup, "get_config", lambda kernel, *rest: kernels.append(kernel) or get_config(kernel, *rest))
    leaves = [x.requires_grad_() for x in tensors(device, torch.bfloat16, n_q=33, n_k=31)[:3]]
    bias = torch.zeros(2, 1, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    o = attention(*leaves, bias=bias, normalizer=normalizer)
    saved = [x for x in o.grad_fn.saved_tensors if x is not None and x.numel()]
    torch.autograd.grad(o.sum(), (*leaves, bias))
    assert kernels == ["forward", "dq", "dkdv", "dbias"]
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in (*leaves, bias)), "the inputs alone"


@BOTH
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=str)
def test_empty_and_single(sizes, normalizer, device):
    n_q, n_k = sizes
    given, bias = tensors(device, torch.float32, n_q=n_q, n_k=n_k), torch.ones(2, 1, 1, device=device)
    ours, exact = (results(function, *given, bias=bias, normalizer=normalizer) for function in (attention, reference.attention))
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(37, 1), (4, 1, 37, 1), (4, 1, 1, 1), (1, 1, 1, 1)], ids=str)
def test_packed_with_biases_of_rows(shape, normalizer, device):
    sequences = Sequences(SINGLE[normalizer], torch.float64, device, (20, 0, 37, 5), (33, 7, 0, 40), spare=50)
    sequences.given["bias"] = torch.randn(shape, dtype=torch.float64, device=device)
    ours, exact = (sequences.results(dtype, normalizer=normalizer) for dtype in (None, torch.float64))
    torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)


@BOTH
def test_without_heads_and_with_broadcast_batches(normalizer, device):
    q, k, v, *_ = tensors(device, torch.float32, batch=(3,))
    for _ in range(2):
        ours, exact = attention(q[0, 0], k[0, 0], v[0, 0], normalizer=normalizer), None
        exact = reference.attention(q[0, :1], k[0, :1], v[0, :1], normalizer=normalizer)[0]
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
        ours = attention(q[:1], k, v, normalizer=normalizer)
        torch.testing.assert_close(ours, reference.attention(q[:1].expand(q.shape), k, v, normalizer=normalizer),
                                   atol=1e-5, rtol=1e-5)


def test_known_calls_compute_what_they_are_asked(device):
    q, k, v, *_ = tensors(device, torch.float32)
    for _ in range(2):
        for options in ({}, {"normalizer": "sigmoid"}, {"normalizer": "relu"}, {"normalizer": "sigmoid", "sigmoid_bias": -1.0},
                        {"normalizer": "sigmoid", "sigmoid_bias": -2.0}):
            torch.testing.assert_close(attention(q, k, v, **options), reference.attention(q, k, v, **options),
                                       atol=1e-5, rtol=1e-5)


SINK = torch.zeros(2)


@pytest.mark.parametrize("options, error, message", [
    ({"normalizer": "softmin"}, ValueError, "normalizer: expected one of 'softmax', 'sigmoid', 'relu', got 'softmin'"),
    ({"normalizer": None}, ValueError, "normalizer: expected one of .*, got None"),
    ({"normalizer": ["relu"]}, ValueError, "normalizer: expected one of"),
    ({"normalizer": "relu", "sink": SINK}, ValueError, "sink: expected None with normalizer='relu'"),
    ({"normalizer": "sigmoid", "return_stats": ("max",)}, ValueError, "return_stats: expected None with normalizer='sigmoid'"),
    ({"normalizer": "relu", "sigmoid_bias": 1.0}, ValueError, "sigmoid_bias: expected None with normalizer='relu', got 1.0"),
    ({"sigmoid_bias": 1.0}, ValueError, "sigmoid_bias: expected None with normalizer='softmax'"),
    ({"normalizer": "sigmoid", "sigmoid_bias": SINK}, TypeError, "sigmoid_bias: .*pass a learned one as `bias`"),
    ({"normalizer": "sigmoid", "sigmoid_bias": math.nan}, ValueError, "sigmoid_bias: .* a finite number, .* got nan"),
    ({"normalizer": "sigmoid", "sigmoid_bias": -math.inf}, ValueError, "sigmoid_bias: expected .*, got -inf"),
    ({"normalizer": "sigmoid", "return_lse": True}, ValueError, "return_lse: expected False with normalizer='sigmoid'"),
], ids=str)
def test_bad_arguments_raise(options, error, message, device):
    q, k, v, *_ = tensors(device, torch.float32)
    attention(q, k, v, normalizer="sigmoid")
    options = {name: x.to(device) if x is SINK else x for name, x in options.items()}
    starts, rows = starts_of((37,), device), [x[0].transpose(0, 1) for x in (q, k, v)]
    for call in (lambda: attention(q, k, v, **options), lambda: warm(q, k, v, **options),
                 lambda: explain(q, k, v, **options), lambda: attention_varlen(*rows, starts, starts, **options)):
        with pytest.raises(error, match=message):
            call()


def loss_of(q, k, v, bias, function=attention, normalizer="sigmoid", **options):
    return function(q, k, v, bias=bias, normalizer=normalizer, **options).square().sum()


@BOTH
@pytest.mark.parametrize("dropped", [False, True])
def test_functional_transforms(dropped, normalizer, device):
    q, k, v, *_ = tensors(device, torch.float32, batch=(3, 2), n_q=9, n_k=12)
    bias = torch.randn(3, 2, 1, 1, device=device)
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([4], device=device)} if dropped else {}
    gradient = torch.func.grad(lambda *x: loss_of(*x, normalizer=normalizer, **options), (0, 1, 2, 3))
    with config.pinned(TILES):
        mapped = torch.vmap(gradient)(q, k, v, bias)
        alone = [gradient(*each) for each in zip(q, k, v, bias)]
    torch.testing.assert_close(mapped, tuple(map(torch.stack, zip(*alone))), atol=1e-5, rtol=1e-5)
    if not dropped:
        leaves = [x.requires_grad_() for x in (q[0], k[0], v[0], bias[0])]
        exact = torch.autograd.grad(loss_of(*leaves, reference.attention, normalizer), leaves)
        torch.testing.assert_close(tuple(x[0] for x in mapped), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", *slow("inductor")])
def test_compiled_in_one_graph(backend, device):
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in tensors(device, torch.float32, n_q=9, n_k=9)[:3]]
    inputs.append(torch.zeros(2, 1, 1, device=device, requires_grad=True))

    def both(*inputs):
        return loss_of(*inputs) + loss_of(*inputs, normalizer="relu", causal=True)

    compiled = torch.compile(both, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(both(*inputs), inputs))


@BOTH
def test_exported_with_a_length_that_changes(normalizer, device):
    """The number of keys is read where the program runs."""
    class Layer(torch.nn.Module):
        def forward(self, q, k):
            return attention(q, k, k, normalizer=normalizer)

    length = torch.export.Dim("length", min=2, max=4096)
    q, k, *_ = tensors(device, torch.float32, n_k=9)
    program = torch.export.export(Layer(), (q, k), dynamic_shapes=(None, {2: length})).module()
    k = torch.randn(2, 2, 33, 16, device=device)
    torch.testing.assert_close(program(q, k), reference.attention(q, k, k, normalizer=normalizer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, device):
    inputs = [x.requires_grad_() for x in tensors(device, torch.bfloat16)[:3]]
    inputs.append(torch.zeros(2, 1, 1, dtype=torch.bfloat16, device=device, requires_grad=True))
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    plan.clear()  # the first pass is a new call, the recomputed one a known call
    checkpoint(loss_of, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected))


@BOTH
def test_opcheck(normalizer, device):
    q, k, v, *_ = tensors(device, torch.float16, batch=(1,), n_q=20, n_k=20)
    bias = torch.zeros(1, 2, 1, 1, dtype=torch.float16, device=device)
    numbers = 0.25, None, 0, True, 0.0, None, None, None, False, False, False, normalizer, None, None, None
    inputs = (q, k, v, bias, *[None] * (custom_op.N_TENSORS - 4))
    torch.library.opcheck(custom_op.forward_op, (*(x if x is None else x.requires_grad_() for x in inputs), *numbers, True))
    inputs = [x if x is None else x.detach() for x in inputs]
    o, _, statistics, residual, *_ = custom_op.forward_op(*inputs, *numbers, True)
    assert statistics.numel() == residual.numel() == 0
    torch.library.opcheck(custom_op.backward_op, (torch.randn_like(o), None, o, statistics, residual, *inputs, *numbers,
                                                  [True] * 4 + [False] * 3))


@BOTH
def test_products_and_bits(normalizer, device):
    given = tensors(device, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in given[:3])
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, normalizer=normalizer).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * 2 * 37 * 37 * 16
    first, second = (results(attention, *given, causal=True, normalizer=normalizer) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@BOTH
@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 2.0, "window": (2, 1)}, {"scale": -0.7}], ids=str)
def test_gradcheck(options, normalizer, device):
    bias = torch.randn(2, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [x[..., :5, :3].contiguous().requires_grad_() for x in tensors(device, batch=(1,))[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], bias=x[3], normalizer=normalizer, **options), (*leaves, bias))


def test_under_autocast(device):
    q, k, v, *_ = tensors(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        o = attention(q, k, v, normalizer="relu")
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o, attention(*(x.bfloat16() for x in (q, k, v)), normalizer="relu"))
