"""ALiBi and tables of relative positions, with their gradients: key lengths, dropout, masks, and every way to call them.

The pairs with other features are cases of helpers/cases.py.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.cases import TILES, assert_exact, results, tensors
from tests.helpers.tiers import slow
from tritonattn import (
    Config,
    alibi_slopes,
    attention,
    attention_varlen,
    block_mask,
    config,
    dropout_mask,
    reference,
    t5_table,
    warm,
)


def by_offset(device, dtype=torch.float64, heads=2, radius=5):
    """Return slopes and a table, as arguments of attention."""
    rng = torch.Generator().manual_seed(3)
    return {"alibi": torch.rand(heads, generator=rng).to(device, dtype),
            "relative": torch.randn(heads, 2 * radius + 1, generator=rng).to(device, dtype)}


@pytest.mark.interpreted
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("sizes", [(37, 37), (20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (6, 4)], ids=str)
def test_each_sequence_has_its_own_length(window, sizes, align, device):
    """Bottom-right, the positions of the queries depend on it; sequences of no key, and of all keys, are among them."""
    n_q, n_k = sizes
    given = tensors(device, batch=(4,), heads=2, kv_heads=1, n_q=n_q, n_k=n_k)
    lengths = torch.tensor([7, n_k, 0, n_k - 3], device=device)
    assert_exact(given, align=align, key_lengths=lengths, window=window, **by_offset(device))


@pytest.mark.interpreted
@pytest.mark.parametrize("radius", [0, 1, 16, 36, 37, 200])
def test_tables_of_any_radius(radius, device):
    assert_exact(tensors(device), **by_offset(device, radius=radius))


@pytest.mark.interpreted
@pytest.mark.parametrize("tiles", [Config(16, 16), Config(16, 64), Config(64, 128)], ids=str)
def test_tiles_of_any_size(tiles, device):
    assert_exact(tensors(device, n_q=29, n_k=70), tiles, align="bottom_right", **by_offset(device))


@pytest.mark.interpreted
@pytest.mark.parametrize("n_q, n_k, align", [(37, 37, None), (9, 50, "bottom_right"), (50, 9, "top_left"),
                                             (50, 30, "bottom_right")])
def test_dropped_weights_have_no_gradient(n_q, n_k, align, device):
    """Tiles of diagonals begin at any key, and dropout draws for four keys together."""
    given, seed = tensors(device, n_q=n_q, n_k=n_k), torch.tensor([11], device=device)
    options = {"align": align, "dropout_p": 0.4, **by_offset(device)}
    keep = dropout_mask((2, 2, n_q, n_k), 0.4, seed)
    for tiles in (TILES, Config(16, 16)):
        with config.pinned(tiles):
            ours = results(attention, *given, dropout_seed=seed, **options)
        exact = results(reference.attention, *given, keep=keep, **options)
        torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)


@pytest.mark.interpreted
def test_with_a_block_mask_and_a_softcap(device):
    given = tensors(device, batch=(1,), n_q=140, n_k=270)
    rows, cols = torch.arange(140, device=device)[:, None], torch.arange(270, device=device)
    mask = (cols < 128) | (cols - rows > 100)
    options = {"align": "bottom_right", "softcap": 2.0, **by_offset(device, radius=100)}
    exact = results(reference.attention, *given, mask=mask, **options)
    with config.pinned(Config(32, 64)):
        ours = results(attention, *given, mask=block_mask(mask), **options)
    torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_of_minus_infinity_masks_pairs(dtype, device):
    """A table of 0 whose ends are -inf is a window; what is behind it may be NaN."""
    q, k, v, do, dlse = tensors(device, dtype)
    table = torch.zeros(2, 11, device=device, dtype=dtype)
    table[:, 0] = table[:, -1] = -math.inf
    with config.pinned(TILES):
        ours = results(attention, q, k, v, do, dlse, relative=table)
        plain = results(attention, q, k, v, do, dlse, window=(4, 4))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours[:-1], plain, atol=tolerance, rtol=tolerance)
        assert (ours[-1][:, [0, -1]] == 0).all() and ours[-1].abs().sum() > 0
        k[..., 30, 3], v[..., 30, 2] = math.nan, math.inf
        spoiled = results(attention, q, k, v, do, dlse, relative=table)
    for one, other in zip(spoiled[:3], ours):
        # rows before the NaN, recomputed in another order
        torch.testing.assert_close(one[:, :, :26], other[:, :, :26], atol=tolerance, rtol=tolerance)
    assert spoiled[0][:, :, 26:35].isnan().any(), "rows that attend to the NaN have it"


@pytest.mark.parametrize("hidden", ["window", "mask", "lengths"])
def test_nan_behind_a_mask_does_not_reach_the_gradients(hidden, device):
    q, k, v, do, dlse = tensors(device, torch.float32, n_q=30)
    clean = [x.clone() for x in (q, k, v, do, dlse)]
    k[..., 36, :], v[..., 36, 1] = math.nan, math.inf
    mask = torch.arange(37, device=device) < 36
    options = {"align": "top_left", **by_offset(device, torch.float32)}
    options |= {"window": {"causal": True}, "mask": {"mask": mask},
                "lengths": {"key_lengths": torch.tensor([36, 20], device=device)}}[hidden]
    with config.pinned(TILES):
        ours, expected = (results(attention, *given, **options)[-2:] for given in ((q, k, v, do, dlse), clean))
    for one, other in zip(ours, expected):
        # rows with a NaN in the tile of their output are recomputed in another order
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_slopes_and_distances(dtype, device):
    """Scores of -1e5 leave the range of float16; a tiny scale changes nothing."""
    q, k, v, do, dlse = tensors(device, dtype)
    slopes = torch.tensor([3000.0, 0.0], device=device)
    for scale in (None, 1e-30):
        ours = results(attention, q, k, v, do, dlse, alibi=slopes, scale=scale)
        exact = results(reference.attention, *(x.double() for x in (q, k, v, do, dlse)), alibi=slopes.double(), scale=scale)
        for name, one, other in zip(("o", "lse", "dq", "dk", "dv"), ours, exact):
            torch.testing.assert_close(one.double(), other, atol=0.03, rtol=0.03, msg=lambda text, name=name: f"{name}: {text}")
        # each query of the first head attends to the key at its own position
        torch.testing.assert_close(ours[0][:, 0], v[:, 0])


def test_both_count_as_biases(device):
    """With the bias that they stand for, formed, attention gives the same."""
    q, k, v, do, dlse = tensors(device, torch.float32, n_q=20, n_k=30)
    options = by_offset(device, torch.float32)
    offset = reference.offsets(20, 30, align="bottom_right", device=device)
    formed = (options["relative"][:, offset.clamp(-5, 5) + 5] - options["alibi"][:, None, None] * offset.abs())
    ours = results(attention, q, k, v, do, dlse, align="bottom_right", **options)
    *others, dbias = results(attention, q, k, v, do, dlse, bias=formed)
    torch.testing.assert_close(ours[:5], tuple(others), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[5], -(dbias * offset.abs()).sum((-2, -1)), atol=1e-4, rtol=1e-4)
    for d in (-5, 0, 3, 5):
        there = offset <= d if d == -5 else offset >= d if d == 5 else offset == d
        torch.testing.assert_close(ours[6][:, d + 5], (dbias * there).sum((-2, -1)), atol=1e-4, rtol=1e-4)


def test_gradients_have_the_same_bits_every_time(device):
    given = tensors(device, torch.bfloat16)
    first, second = (results(attention, *given, **by_offset(device, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_tables_and_slopes_in_any_layout(layout, device):
    q, k, v, do, dlse = tensors(device, torch.float32)
    plain = by_offset(device, torch.float32)
    lay = {"transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x, "expanded": lambda x: x[:1].expand(x.shape),
           "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2]}[layout]
    given = {name: lay(x) for name, x in plain.items()}
    for _ in range(2):  # the second call is a known one
        ours = results(attention, q, k, v, do, dlse, **given)
        expected = results(attention, q, k, v, do, dlse, **{name: x.contiguous() for name, x in given.items()})
        assert all(torch.equal(one, other) for one, other in zip(ours, expected))


def test_known_calls_read_the_tensors_that_they_get(device):
    q, k, v, *_ = tensors(device, torch.float32)
    first, second = by_offset(device, torch.float32), {name: -x for name, x in by_offset(device, torch.float32).items()}
    for options in (first, second, first, second):
        torch.testing.assert_close(attention(q, k, v, **options), reference.attention(q, k, v, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["alibi", "relative"])
def test_one_of_them_is_learned_alone(name, device):
    q, k, v, *_ = tensors(device, torch.float32)
    options = by_offset(device, torch.float32)
    options[name].requires_grad_()
    warm(q, k, v, causal=True, **options)
    assert options[name].grad is None
    ours, exact = (torch.autograd.grad(function(q, k, v, causal=True, **options).square().sum(), options[name])[0]
                   for function in (attention, reference.attention))
    torch.testing.assert_close(ours, exact, atol=1e-3, rtol=1e-3)


def test_any_dtype_and_autocast(device):
    q, k, v, *_ = tensors(device, torch.float32)
    expected = attention(q, k, v, **by_offset(device, torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):
        given = {name: x.bfloat16().to(dtype).requires_grad_() for name, x in by_offset(device).items()}
        for _ in range(2):
            o = attention(q, k, v, **given)
            assert torch.equal(o, expected)
            gradients = torch.autograd.grad(o.square().sum(), list(given.values()))
            assert all(x.dtype == dtype and x.abs().sum() > 0 for x in gradients)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                torch.testing.assert_close(attention(q, k, v, **given).float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.slow
@pytest.mark.interpreted
def test_gradcheck(device):
    leaves = [x[..., :5, :3].contiguous().requires_grad_() for x in tensors(device, batch=(1,))[:3]]
    learned = [x.requires_grad_() for x in by_offset(device, radius=2).values()]
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], alibi=x[3], relative=x[4], causal=True, return_lse=True),
                                    (*leaves, *learned))


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_functional_transforms_over_a_table(batch, device):
    q, k, v, *_ = tensors(device, torch.float32, batch=batch, n_q=9, n_k=9)
    tables, slopes = torch.randn(3, 2, 7, device=device), torch.rand(3, 2, device=device)

    def loss(table, slope, function=attention):
        return function(q, k, v, relative=table, alibi=slope).square().sum()

    exact = [torch.func.grad(lambda *x: loss(*x, reference.attention), (0, 1))(*each) for each in zip(tables, slopes)]
    mapped = torch.vmap(torch.func.grad(loss, (0, 1)))(tables, slopes)
    for ours, expected in zip(mapped, zip(*exact)):
        torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_without_heads(device):
    q, k, v, *_ = (x[0, 0] for x in tensors(device, torch.float32, batch=(1,)))
    options = by_offset(device, torch.float32, heads=1)
    torch.testing.assert_close(attention(q, k, v, **options),
                               reference.attention(q[None], k[None], v[None], **options)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (1, 1)], ids=str)
def test_empty_and_single(sizes, device):
    n_q, n_k = sizes
    given = tensors(device, torch.float32, n_q=n_q, n_k=n_k)
    ours, expected = (results(function, *given, align="bottom_right", **by_offset(device, torch.float32))
                      for function in (attention, reference.attention))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert ours[-1].shape == (2, 11) and ours[-2].shape == (2,)


@pytest.mark.parametrize("backend", ["aot_eager", *slow("inductor")])
def test_compiled_in_one_graph(backend, device):
    torch._dynamo.reset()
    q, k, v, *_ = tensors(device, torch.float32, n_q=9, n_k=9)
    options = {name: x.requires_grad_() for name, x in by_offset(device, torch.float32).items()}

    def step(q, alibi, relative):
        return attention(q * 2, k, v, causal=True, alibi=alibi, relative=relative).square().sum()

    inputs = q.requires_grad_(), *options.values()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, device):
    inputs = [*tensors(device, torch.bfloat16)[:3], *by_offset(device, torch.bfloat16).values()]
    inputs = [x.requires_grad_() for x in inputs]

    def step(q, k, v, alibi, relative):
        return attention(q, k, v, alibi=alibi, relative=relative).float().square().sum()

    expected = torch.autograd.grad(step(*inputs), inputs)
    checkpoint(step, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected))


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0**-(i / 2) for i in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(twelve))
    assert alibi_slopes(1).tolist() == [2.0**-8] and alibi_slopes(3).dtype == torch.float32


@pytest.mark.parametrize("make, error, message", [
    (lambda: alibi_slopes(0), ValueError, "heads: expected a positive integer, got 0"),
    (lambda: alibi_slopes(8.0), ValueError, "heads: expected a positive integer, got 8.0"),
    (lambda: t5_table([1.0], bidirectional=True), RuntimeError, "weight: expected a tensor, .*got list"),
    (lambda: t5_table(torch.zeros(8), bidirectional=True), RuntimeError, r"weight: .*\[buckets, H\], got shape \(8,\)"),
    (lambda: t5_table(torch.zeros(3, 2), bidirectional=True), ValueError, "weight: expected at least 4 buckets, got 3"),
    (lambda: t5_table(torch.zeros(8, 2), bidirectional=False, max_distance=4), ValueError,
     "max_distance: expected an integer above the 4 buckets that hold one distance, got 4"),
    (lambda: t5_table(torch.zeros(8, 2), bidirectional=False, max_distance=8.0), ValueError, "max_distance: .*got 8.0"),
])
def test_bad_values_of_tables_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("options, error, message", [
    ({"alibi": 0.5}, TypeError, "alibi: expected a tensor or None, got 0.5"),
    ({"alibi": torch.zeros(3)}, RuntimeError, r"alibi: expected one slope for each of 2 heads, \[2\], got .*shape \(3,\)"),
    ({"alibi": torch.zeros(2, 2)}, RuntimeError, "alibi: expected one slope for each of 2 heads"),
    ({"alibi": torch.zeros(2, dtype=torch.int64)}, RuntimeError, "alibi: expected torch.float16, .*got torch.int64"),
    ({"alibi": torch.zeros(2, device="meta")}, RuntimeError, "alibi: expected .*, where the queries are, got meta"),
    ({"relative": [1.0]}, TypeError, "relative: expected a tensor or None, got"),
    ({"relative": torch.zeros(2, 4)}, RuntimeError, r"relative: expected a table .*\[2, 2 R \+ 1\], got .*shape \(2, 4\)"),
    ({"relative": torch.zeros(2, 0)}, RuntimeError, "relative: expected a table"),
    ({"relative": torch.zeros(1, 5)}, RuntimeError, "relative: expected a table"),
    ({"relative": torch.zeros(5)}, RuntimeError, "relative: expected a table"),
    ({"relative": torch.zeros(2, 5).to_sparse()}, RuntimeError, "relative: expected a dense"),
], ids=str)
def test_bad_arguments_raise(options, error, message, device):
    q, k, v, *_ = tensors(device, torch.float32)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
               for name, x in options.items()}
    for _ in range(2):
        with pytest.raises(error, match=message):
            attention(q, k, v, **options)


@pytest.mark.parametrize("name", ["alibi", "relative"])
def test_positions_that_are_not_known_raise(name, device):
    q, k, v, *_ = tensors(device, torch.float32, n_q=5, n_k=9)
    given = {name: by_offset(device, torch.float32)[name]}
    with pytest.raises(ValueError, match="align: expected 'top_left' or 'bottom_right', since 5 queries and 9 keys"):
        attention(q, k, v, **given)
    with pytest.raises(ValueError, match=f"since {name} with key_lengths can be aligned both ways"):
        attention(k, k, v, key_lengths=torch.tensor([3, 9], device=device), **given)
    starts = torch.tensor([0, 5], dtype=torch.int32, device=device)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    with pytest.raises(ValueError, match="align: expected .*since cu_seqlens_q and cu_seqlens_k are two tensors"):
        attention_varlen(q, k, v, starts, starts.clone(), **given)
