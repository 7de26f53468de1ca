"""Statistics of the weights, their gradients, and maps. The pairs with other features are cases of helpers/cases.py."""

import dataclasses
import functools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.cases import SINGLE, assert_exact, result_names, results, tensors
from tests.helpers.memory import noted
from tests.helpers.sequences import Sequences, starts_of
from tests.helpers.tiers import slow
from tests.helpers.tolerance import agree
from tritonattn import (
    Config,
    attention,
    attention_map,
    attention_varlen,
    block_mask,
    config,
    dropout_mask,
    reference,
    scaled_dot_product_attention,
    warm,
)
from tritonattn.runtime import custom_op, plan

TILES = Config(16, 32)
ALL = "max", "head_max", "entropy", "key_mass"


@pytest.mark.interpreted
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("sizes", [(37, 37), (20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (6, 4)], ids=str)
def test_each_sequence_has_its_own_length(window, sizes, align, device):
    """Padding has no mass. Sequences of no key, and of all keys, are among them."""
    n_q, n_k = sizes
    given = tensors(device, batch=(4,), kv_heads=1, n_q=n_q, n_k=n_k)
    lengths = torch.tensor([7, n_k, 0, n_k - 3], device=device)
    assert_exact(given, align=align, key_lengths=lengths, window=window, return_stats=ALL)


@pytest.mark.interpreted
@pytest.mark.parametrize("sinks", [None, torch.tensor([3.0, -math.inf]), torch.tensor([[200.0, 1], [-5, 0]])], ids=str)
def test_rows_without_keys_and_sinks_that_take_all(sinks, device):
    """The maximum is that of the keys, and the sum of their weights may be 0."""
    given = tensors(device, n_q=50, n_k=20)
    sink = None if sinks is None else sinks.to(device, torch.float64)
    assert_exact(given, causal=True, align="bottom_right", sink=sink, return_stats=ALL)
    _, statistics = attention(*given[:3], causal=True, align="bottom_right", sink=sink, return_stats=ALL)
    assert (statistics["max"][..., :30] == -math.inf).all() and (statistics["entropy"][..., :30] == 0).all()


@pytest.mark.interpreted
@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_statistics_do_not_depend_on_dropout(dropout_p, device):
    given, seed = tensors(device), torch.tensor([11], device=device)
    keep = dropout_mask((2, 2, 37, 37), dropout_p, seed)
    assert_exact(given, dropout_p=dropout_p, return_stats=ALL, ours_only={"dropout_seed": seed}, exact_only={"keep": keep})
    ours, plain = (attention(*given[:3], return_stats=ALL, **options)[1]
                   for options in ({"dropout_p": dropout_p, "dropout_seed": seed}, {}))
    assert all(torch.equal(ours[name], plain[name]) for name in ALL)


@pytest.mark.interpreted
@pytest.mark.parametrize("tiles", [Config(32, 64), Config(128, 32)], ids=str)
def test_with_a_block_mask_and_a_softcap(tiles, device):
    given = tensors(device, batch=(1,), n_q=140, n_k=270)
    rows, cols = torch.arange(140, device=device)[:, None], torch.arange(270, device=device)
    mask = (cols < 128) | (cols - rows > 100)
    mask[137] = False
    assert_exact(given, tiles, softcap=2.0, return_stats=ALL, ours_only={"mask": block_mask(mask)}, exact_only={"mask": mask})


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-30, 40.0])
@pytest.mark.parametrize("biased", [False, True])
def test_any_scale(scale, biased, device):
    """With 40, the largest weight of most rows rounds to 1."""
    bias = torch.randn(37, 37, dtype=torch.float64, device=device) if biased else None
    given = tensors(device)
    if scale == 40:
        given[0], given[1] = given[0] / 3, given[1] / 3
    assert_exact(given, scale=scale, bias=bias, return_stats=ALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["equal", "peaked", "large"])
def test_entropies_from_zero_to_the_largest(kind, dtype, device):
    """Equal weights have ln S, a single one 0; scores of 1e4 lose no digit of the differences that are left.

    In 16 bits a row's only weight is not 1 but within the rounding error of its exponent (kernels/softmax.py, subtracts_first),
    where a fused multiply-add is one: the entropy has the error of the logarithm of a number near 1, whatever its own size.
    """
    q, k, v, *_ = tensors(device, dtype, n_k=50)
    if kind == "equal":
        k[:] = k[..., :1, :]
    elif kind == "peaked":
        q[..., 0], k[..., 0], k[..., 7, 0] = 16, 0, 400
    else:
        q[..., 0], k[..., 0] = 200, 200
    _, lse, ours = attention(q, k, v, return_lse=True, return_stats=ALL)
    wide, exact = (reference.attention(*(x.to(each) for x in (q, k, v)), return_stats=ALL)[1]
                   for each in (torch.float32, torch.float64))
    for name in ALL:
        if (kind, name) != ("peaked", "entropy"):
            agree(name, ours[name], wide[name], exact[name], torch.float32)
    if kind == "equal":
        torch.testing.assert_close(ours["entropy"], torch.full_like(lse, math.log(50)), atol=1e-5, rtol=0)
    if kind == "peaked":
        limit = 1e-15 if dtype == torch.float32 else 2 ** -22
        assert ((exact["entropy"] <= limit) & (ours["entropy"] >= 0) & (ours["entropy"] <= limit)).all()


def test_nan_reaches_what_attends_to_it_and_nothing_else(device):
    q, k, v, do, dlse = tensors(device, torch.float32)
    clean = [x.clone() for x in (q, k, v, do, dlse)]
    k[..., 20, 3] = math.nan
    options = {"causal": True, "return_stats": ("max", "entropy", "key_mass")}
    with config.pinned(TILES):
        ours, expected = (attention(*each[:3], **options)[1] for each in ((q, k, v), clean))
        for name in ("max", "entropy"):
            assert ours[name][..., 20:].isnan().all()
            torch.testing.assert_close(ours[name][..., :20], expected[name][..., :20], atol=1e-5, rtol=1e-5)
        # the queries from 20 on attend to every key before them
        assert ours["key_mass"].isnan().all()
        hidden = attention(q, k, v, mask=torch.arange(37, device=device) != 20, **options)[1]
        shown = reference.attention(*clean[:3], mask=torch.arange(37, device=device) != 20, **options)[1]
    for name in options["return_stats"]:
        torch.testing.assert_close(hidden[name], shown[name], atol=1e-5, rtol=1e-5)


def test_the_largest_score_of_infinite_queries(device):
    """A softmax that is NaN has no statistics."""
    q, k, v, *_ = tensors(device, torch.float32, n_q=3)
    q[..., 0, :], k[..., 0], q[..., 1, :], q[..., 1, 0] = 0, 1, 0, math.inf
    ours = attention(q, k, v, return_stats=("max", "entropy", "key_mass"))[1]
    assert ours["max"][..., 1].isnan().all() and ours["entropy"][..., 1].isnan().all()
    assert ours["max"][..., 0].eq(0).all() and ours["entropy"][..., 2].isfinite().all() and ours["key_mass"].isnan().all()


@pytest.mark.parametrize("hidden", ["window", "mask", "lengths"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_cotangents_of_keys_that_no_query_attends_to_do_not_matter(hidden, value, device):
    """The logarithm of a mass of 0 has an infinite gradient."""
    q, k, v, *_ = (x.requires_grad_() for x in tensors(device, torch.float32, n_q=30)[:3])
    options = {"window": {"causal": True, "align": "top_left"}, "mask": {"mask": torch.arange(37, device=device) < 30},
               "lengths": {"key_lengths": torch.tensor([30, 20], device=device)}}[hidden]
    found = []
    for last in (0.0, value):
        weights = torch.linspace(-1, 1, 37, device=device)
        weights[30:] = last
        with config.pinned(TILES):
            _, statistics = attention(q, k, v, return_stats=("key_mass",), **options)
            rows = statistics["key_mass"].expand(2, 2, 37)
            cotangent = weights.expand(2, 2, 37).clone()
            if hidden == "lengths":
                cotangent[1, :, 20:] = last
            found.append(torch.autograd.grad(rows, (q, k), cotangent))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("names", [("entropy",), ("key_mass",), ("max", "entropy"), ("key_mass", "max")], ids=str)
def test_a_statistic_alone_has_gradients(names, device):
    """Without a cotangent of the output; the same call three times, of which the later are known ones."""
    q, k, v, *_ = (x.requires_grad_() for x in tensors(device, torch.float32)[:3])
    exact = reference.attention(q.double(), k.double(), v.double(), causal=True, return_stats=names)[1]
    expected = torch.autograd.grad(sum(x.square().sum() for x in exact.values() if x.requires_grad), (q, k))
    for _ in range(3):
        statistics = attention(q, k, v, causal=True, return_stats=names)[1]
        assert list(statistics) == list(names) and not ("max" in names and statistics["max"].requires_grad)
        loss = sum(x.square().sum() for x in statistics.values() if x.requires_grad)
        ours = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
        torch.testing.assert_close(ours[:2], expected, atol=1e-3, rtol=1e-4)
        assert ours[2] is None or (ours[2] == 0).all()


def test_known_calls_compute_what_they_are_asked(device):
    q, k, v, *_ = tensors(device, torch.float32)
    shapes = {"max": (2, 2, 37), "head_max": (2,), "entropy": (2, 2, 37), "key_mass": (2, 2, 37)}
    o, lse = attention(q, k, v, return_lse=True)
    for _ in range(2):
        for names in ((), ("max",), ["entropy"], ("key_mass", "entropy"), ("head_max",), ALL, None):
            result = attention(q, k, v, return_stats=names, return_lse=True)
            torch.testing.assert_close(result[:2], (o, lse), atol=1e-6, rtol=1e-6)
            assert len(result) == 2 + (names is not None)
            if names is not None:
                assert {name: x.shape for name, x in result[2].items()} == {name: shapes[name] for name in names}
                assert all(x.dtype == torch.float32 for x in result[2].values())
    o, statistics = attention(q, k, v, return_stats=("head_max", "max"))
    assert torch.equal(statistics["head_max"], statistics["max"].amax((0, 2)))


@pytest.mark.parametrize("given, error, message", [
    ("entropy", TypeError, "return_stats: expected a tuple of names or None, got 'entropy'"),
    ((1,), TypeError, "return_stats: expected a tuple of names"), ({"max"}, TypeError, "return_stats: expected a tuple"),
    (("max", "mean"), ValueError, "return_stats: expected names among max, head_max, entropy, key_mass, got 'mean'"),
    (torch.ones(2), TypeError, "return_stats: expected a tuple of names"), (True, TypeError, "return_stats: .*got True"),
], ids=str)
def test_bad_names_raise(given, error, message, device):
    q, k, v, *_ = tensors(device, torch.float32)
    starts, rows = starts_of((37,), device), [x[0].transpose(0, 1) for x in (q, k, v)]
    for call in (lambda: attention(q, k, v, return_stats=given), lambda: warm(q, k, v, return_stats=given),
                 lambda: attention_varlen(*rows, starts, starts, return_stats=given)):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", ["entropy", "key_mass"])
@pytest.mark.parametrize("score", [512.0, 65536.0])
def test_gradients_beside_a_sink_of_large_scores(score, name, device):
    """lse has no digits left for the part of the keys."""
    q, k, v = (torch.zeros(1, 1, n, 16, device=device) for n in (5, 12, 12))
    q[..., 0], k[..., 0] = score, 1
    q[..., 1], k[..., 1] = 1, torch.arange(12, device=device) / 16
    sink = torch.tensor([score], device=device)

    def gradients(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, sink)]
        statistics = function(*inputs[:2], v.to(dtype), sink=inputs[2], scale=1.0, return_stats=(name,))[1]
        return torch.autograd.grad((statistics[name] * torch.arange(1, statistics[name].shape[-1] + 1, device=device)).sum(),
                                   inputs)

    ours, torchs, exact = (gradients(*each) for each in (
        (attention, torch.float32), (reference.attention, torch.float32), (reference.attention, torch.float64)))
    for one, other, true in zip(ours, torchs, exact):
        assert (one - true).abs().max() <= 4 * (other - true).abs().max() + 2e-5 * true.abs().max()


@pytest.mark.parametrize("sunk", [False, True])
def test_an_infinite_cotangent_of_the_entropy_of_a_row_without_keys(sunk, device):
    """The root of an entropy of 0 has an infinite gradient."""
    q, k, v, *_ = (x.requires_grad_() for x in tensors(device, torch.float32, n_q=20, n_k=16)[:3])
    inputs = [q, k, *([torch.zeros(2, device=device, requires_grad=True)] if sunk else [])]
    found = []
    for function in (attention, reference.attention):
        entropy = function(q, k, v, causal=True, align="bottom_right", sink=inputs[2] if sunk else None,
                           return_stats=("entropy",))[1]["entropy"]
        # the first four rows attend to no key, the fifth to one
        cotangent = torch.linspace(-1, 1, 20, device=device).expand_as(entropy).clone()
        if function is attention:
            cotangent[..., :4] = math.inf
        found.append(torch.autograd.grad(entropy, inputs, cotangent))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_cotangents_of_any_layout(packed, device):
    inputs = [x.requires_grad_() for x in tensors(device, torch.float32, batch=(2, 2), n_q=20)[:3]]
    call = attention
    if packed:
        inputs = [x.detach()[0, 0].transpose(0, 1).requires_grad_() for x in inputs]

        def call(*rows, **options):
            return attention_varlen(*rows, starts_of((12, 8), device), starts_of((20, 17), device), **options)

    for _ in range(2):
        statistics = list(call(*inputs, return_stats=("entropy", "key_mass"))[1].values())
        for lay in (lambda x: x[..., :1].expand(x.shape), lambda x: x.repeat_interleave(2, -1)[..., ::2],
                    lambda x: x.mT.contiguous().mT, lambda x: x.new_ones(()).expand(x.shape)):
            laid = [lay(torch.cos(x.detach())) for x in statistics]
            ours, plain = (torch.autograd.grad(statistics, inputs[:2], each, retain_graph=True)
                           for each in (laid, [x.contiguous() for x in laid]))
            assert all(torch.equal(one, other) for one, other in zip(ours, plain))


def test_other_ways_to_differentiate(device):
    """Many cotangents at once, tensors saved on the CPU, a second derivative."""
    q, k, v, *_ = (x.requires_grad_() for x in tensors(device, torch.float32, batch=(1,), n_q=6, n_k=9)[:3])
    with torch.autograd.graph.save_on_cpu():
        entropy = attention(q, k, v, return_stats=("entropy",))[1]["entropy"]
    many = torch.eye(12, device=device).view(12, 1, 2, 6)
    rows, = torch.autograd.grad(entropy, q, many, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(rows.sum(0), torch.autograd.grad(entropy.sum(), q, retain_graph=True)[0])
    first, = torch.autograd.grad(entropy.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="at most first derivatives"):
        first.sum().backward()


def test_exported(device):
    class Layer(torch.nn.Module):
        def forward(self, q, k):
            return attention(q, k, k, return_stats=ALL)[1]

    length = torch.export.Dim("length", min=2, max=4096)
    q, k, *_ = tensors(device, torch.float32, n_q=9)
    program = torch.export.export(Layer(), (q, k), dynamic_shapes=({2: length}, None)).module()
    q = torch.randn(2, 2, 33, 16, device=device)
    torch.testing.assert_close(program(q, k), Layer()(q, k))


def test_products_are_counted(device):
    q, k, v, *_ = (x.requires_grad_() for x in tensors(device, torch.float32)[:3])
    one, counts = 2 * 2 * 2 * 37 * 37 * 16, []
    for names in (("entropy",), ("key_mass",)):
        with FlopCounterMode(display=False) as counter:
            statistics = attention(q, k, v, return_stats=names)[1]
            statistics[names[0]].sum().backward()
        counts.append(counter.get_total_flops() // one)
    with FlopCounterMode(display=False) as counter:
        attention_map(q.detach(), k.detach())
    # the values of the forward pass have one column
    assert counts == [7, 9] and counter.get_total_flops() == 2 * 4 * 37 * 37 * (16 + 1 + 16)


def test_the_same_bits_every_time(device):
    given = tensors(device, torch.bfloat16)
    first, second = (results(attention, *given, causal=True, return_stats=ALL) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 2.0, "window": (2, 1)}, {"scale": -0.7}], ids=str)
def test_gradcheck(options, device):
    sink = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [x[..., :5, :3].contiguous().requires_grad_() for x in tensors(device, batch=(1,))[:3]]

    def call(q, k, v, sink):
        o, statistics = attention(q, k, v, sink=sink, return_stats=("entropy", "key_mass"), **options)
        return o, *statistics.values()

    assert torch.autograd.gradcheck(call, (*leaves, sink))


def loss_of(q, k, v, function=attention, **options):
    """Return a number to which the output, the entropy and the key mass contribute."""
    o, statistics = function(q, k, v, return_stats=("entropy", "key_mass"), **options)
    return o.square().sum() + (statistics["entropy"] - 1).square().sum() + statistics["key_mass"].square().sum()


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_functional_transforms(batch, dropped, device):
    q, k, v, *_ = tensors(device, torch.float32, batch=(3, *batch), n_q=9, n_k=12)
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([4], device=device)} if dropped else {}
    with config.pinned(TILES):
        mapped = torch.vmap(torch.func.grad(lambda *x: loss_of(*x, **options), (0, 1, 2)))(q, k, v)
        alone = [torch.func.grad(lambda *x: loss_of(*x, **options), (0, 1, 2))(*each) for each in zip(q, k, v)]
    torch.testing.assert_close(mapped, tuple(map(torch.stack, zip(*alone))), atol=1e-5, rtol=1e-5)
    if not dropped:
        exact = torch.autograd.grad(loss_of(q.requires_grad_(), k, v, reference.attention), q)[0]
        torch.testing.assert_close(mapped[0], exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", *slow("inductor")])
def test_compiled_in_one_graph(backend, device):
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in tensors(device, torch.float32, n_q=9, n_k=9)[:3]]
    compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss_of(*inputs), inputs))
    q, k, _ = (x.detach() for x in inputs)
    pooled = torch.compile(attention_map, backend=backend, fullgraph=True)
    torch.testing.assert_close(pooled(q, k, tile=16), attention_map(q, k, tile=16))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, device):
    inputs = [x.requires_grad_() for x in tensors(device, torch.bfloat16)[:3]]
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    plan.clear()  # the first pass is a new call, the recomputed one a known call
    checkpoint(loss_of, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected))


def test_opcheck(device):
    q, k, v, *_ = tensors(device, torch.float16, batch=(1,), n_q=20, n_k=20)
    numbers = 0.25, None, 0, True, 0.0, None, None, None, True, True, True, "softmax", None, None, None
    tensors_of = (q, k, v, *[None] * (custom_op.N_TENSORS - 3))
    torch.library.opcheck(custom_op.forward_op, (*(x if x is None else x.requires_grad_() for x in tensors_of), *numbers, True))
    tensors_of = [x if x is None else x.detach() for x in tensors_of]
    o, lse, statistics, residual, _, entropy, mass = custom_op.forward_op(*tensors_of, *numbers, True)
    of_statistics = torch.randn_like(entropy), torch.randn_like(mass), entropy
    torch.library.opcheck(custom_op.backward_op, (torch.randn_like(o), torch.randn_like(lse), o, statistics, residual,
                                                  *tensors_of, *numbers, [True] * 3 + [False] * 4, *of_statistics))
    torch.library.opcheck(custom_op.map_op, (*tensors_of, *numbers, statistics, 16))


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(37, 1), (4, 1, 37, 1), (4, 1, 1, 1), (1, 1, 1, 1)], ids=str)
def test_packed_with_a_bias_of_rows_and_a_sink(shape, device):
    """The gradients of both are sums over rows, to which the entropy contributes and between which nothing may lie."""
    case = dataclasses.replace(SINGLE["sink"], stats=("entropy", "key_mass"))
    sequences = Sequences(case, torch.float64, device, (20, 0, 37, 5), (33, 7, 0, 40), spare=50)
    sequences.given["bias"] = torch.randn(shape, dtype=torch.float64, device=device)
    ours, exact = sequences.results(), sequences.results(torch.float64)
    torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)


@pytest.mark.interpreted
def test_a_bias_of_rows_and_a_sink(device):
    bias = torch.randn(2, 1, 37, 1, dtype=torch.float64, device=device)
    assert_exact(tensors(device), bias=bias, sink=torch.randn(2, dtype=torch.float64, device=device), return_stats=ALL)


def test_without_the_residual(device):
    """precise_grad=False: the same statistics, and nearly the same gradients."""
    q, k, v, do, dlse = tensors(device, torch.bfloat16)
    ours, precise = (results(functools.partial(attention, precise_grad=each), q, k, v, do, dlse, return_stats=ALL)
                     for each in (False, True))
    for name, one, other in zip(result_names({"return_stats": ALL}), ours, precise):
        assert torch.equal(one, other) if name in ("o", "lse", "dv", *ALL) else torch.allclose(one, other, atol=0.1, rtol=0.1)


def test_packed_sequences_have_the_maximum_of_all(device):
    q, k, v, *_ = (x[0].transpose(0, 1) for x in tensors(device, torch.float32))
    starts = starts_of((12, 0, 20), device)
    for _ in range(2):
        *_, ours = attention_varlen(q, k, v, starts, starts, causal=True, return_lse=True, return_stats=ALL)
        exact = reference.attention_varlen(q, k, v, starts, starts, causal=True, return_stats=ALL)[1]
        assert list(ours) == list(ALL)
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    assert ours["key_mass"].shape == (2, 37) and (ours["key_mass"][:, 32:] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=str)
def test_empty_and_single(sizes, device):
    n_q, n_k = sizes
    given = tensors(device, torch.float32, n_q=n_q, n_k=n_k)
    ours, exact = (results(function, *given, return_stats=ALL) for function in (attention, reference.attention))
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_heads_and_with_broadcast_batches(device):
    q, k, v, *_ = tensors(device, torch.float32, batch=(3,))
    for _ in range(2):
        ours = attention(q[0, 0], k[0, 0], v[0, 0], return_stats=ALL)[1]
        exact = reference.attention(q[0, :1], k[0, :1], v[0, :1], return_stats=ALL)[1]
        torch.testing.assert_close(ours, {name: x[0] for name, x in exact.items()}, atol=1e-5, rtol=1e-5)
        ours = attention(q[:1], k, v, return_stats=ALL)[1]
        exact = reference.attention(q[:1].expand(q.shape), k, v, return_stats=ALL)[1]
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_warm_draws_and_accumulates_nothing(device):
    q, k, v, *_ = (x.requires_grad_() for x in tensors(device, torch.float32)[:3])
    state = torch.get_rng_state()
    warm(q, k, v, return_stats=("max", "key_mass"), dropout_p=0.1)
    warm(q, k, v, return_lse=True, return_stats=("entropy",))
    assert torch.equal(state, torch.get_rng_state()) and q.grad is None


def of_tiles(q, k, tile, **options):
    """Return the definition of `attention_map`: attention to values that tell to which tile a key belongs."""
    rows, cols = (-(-x.shape[-2] // tile) for x in (q, k))
    tiles = torch.arange(k.shape[-2], device=k.device)[:, None] // tile == torch.arange(cols, device=k.device)
    o = reference.attention(q, k, tiles.to(k.dtype).expand(*k.shape[:-1], cols), **options)
    return torch.stack([o[..., i * tile:(i + 1) * tile, :].mean(-2) for i in range(rows)], -2)


@pytest.mark.interpreted
@pytest.mark.parametrize("tile", [16, 32, 64, 128, 512, 2**40])
@pytest.mark.parametrize("options", [{}, {"causal": True, "align": "bottom_right"}, {"window": (20, 30), "align": "top_left"},
                                     {"key_lengths": torch.tensor([100, 0])}, {"softcap": 2.0, "scale": -0.4}], ids=str)
def test_maps_of_any_tile(tile, options, device):
    q, k, *_ = tensors(device, heads=4, n_q=150, n_k=170)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    torch.testing.assert_close(attention_map(q, k, tile=tile, **options), of_tiles(q, k, tile, **options))


@pytest.mark.interpreted
def test_maps_with_masks_biases_and_sinks(device):
    q, k, *_ = tensors(device, batch=(1,), n_q=150, n_k=170)
    mask = torch.rand(150, 170, device=device) > 0.5
    mask[:128, :128], mask[128:, 128:] = True, False
    given = {"bias": torch.randn(150, 170, dtype=torch.float64, device=device), "sink": torch.randn(2, device=device).double(),
             "alibi": torch.rand(2, device=device).double(), "relative": torch.randn(2, 9, device=device).double()}
    options = given | {"align": "top_left"}
    exact = of_tiles(q, k, 32, mask=mask, **options)
    for each in (mask, block_mask(mask)):
        torch.testing.assert_close(attention_map(q.requires_grad_(), k, tile=32, mask=each, **options), exact)
    assert not attention_map(q, k).requires_grad and (exact.sum(-1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [16, 200, 512])
def test_maps_of_any_head_size_sum_to_one(d, dtype, device):
    q, k, *_ = tensors(device, dtype, n_q=70, n_k=100, d=d)
    ours = attention_map(q, k)
    assert ours.dtype == torch.float32 and ours.shape == (2, 2, 2, 2)
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_map(q[0, 0], k[0, 0]), ours[0, 0])
    assert attention_map(q[..., :0, :], k).shape == (2, 2, 0, 2) and attention_map(q, k[..., :0, :]).shape == (2, 2, 2, 0)


@pytest.mark.parametrize("options, error, message", [
    ({"tile": 48}, ValueError, "tile: expected a power of two of at least 16, got 48"),
    ({"tile": 8}, ValueError, "tile: .*got 8"),
    ({"tile": 16.0}, TypeError, "tile: expected an integer, got 16.0"), ({"softcap": -1.0}, ValueError, "softcap"),
])
def test_bad_arguments_of_maps_raise(options, error, message, device):
    q, k, *_ = tensors(device, torch.float32)
    with pytest.raises(error, match=message):
        attention_map(q, k, **options)


def test_maps_take_no_memory_of_the_size_of_the_scores(device, monkeypatch):
    q, k, *_ = tensors(device, torch.bfloat16, batch=(1,), heads=1, kv_heads=1, n_q=256, n_k=256)
    taken = []
    for home, names in ((torch, ("empty", "empty_like", "zeros_like", "empty_strided")),
                        (torch.Tensor, ("new_empty", "new_empty_strided", "new_zeros", "contiguous", "to", "sum"))):
        for name in names:
            monkeypatch.setattr(home, name, noted(getattr(home, name), taken))
    assert attention_map(q, k).shape == (1, 1, 4, 4) and 16 in taken and max(taken) <= 2 * 256
    scaled_dot_product_attention(q, k, k)
    assert max(taken) == 256 * 16
