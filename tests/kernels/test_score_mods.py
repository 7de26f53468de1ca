"""Bias, mask, key lengths and dropout, with their gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from tests.helpers.tiers import slow, slow_rows
from tritonattn import Config, attention, config, dropout_mask, reference, scaled_dot_product_attention
from tritonattn.runtime import launch

TILES = Config(16, 32)


def tensors(device, dtype=torch.float32, *, batch=(2,), heads=2, kv_heads=1, n_q=20, n_k=36, d=16, grad=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = (heads, n_q), (kv_heads, n_k), (kv_heads, n_k)
    return [torch.randn(*batch, h, n, d, generator=rng).to(device, dtype).requires_grad_(grad) for h, n in shapes]


def outcome(function, leaves, **options):
    """Return o, lse and the gradients of the leaves: q, k, v, optionally a bias. Rows without keys have none through lse."""
    bias = {"bias": leaves[3]} if len(leaves) > 3 else {}
    o, lse = function(*leaves[:3], return_lse=True, **bias, **options)
    rng = torch.Generator().manual_seed(9)
    do, dlse = (torch.randn(x.shape, generator=rng).to(x) for x in (o, lse))
    return o, lse, *torch.autograd.grad((o, lse), leaves, (do, torch.where(lse.isfinite(), dlse, 0)))


def assert_same(leaves, tolerance=1e-4, **options):
    with config.pinned(TILES):
        ours = outcome(attention, leaves, **options)
    exact = outcome(reference.attention, [x.detach().double().requires_grad_() for x in leaves], **options)
    for name, actual, expected in zip(("o", "lse", "dq", "dk", "dv", "dbias"), ours, exact):
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")
    return ours


SHAPES = [(2, 2, 20, 36), (20, 36), (1, 2, 1, 36), (2, 1, 1, 36), (2, 1, 20, 36), (36,), (2, 1, 1), (20, 1), ()]


@pytest.mark.parametrize(("shape", "window"), [
    *(((*shape,), (None, None)) for shape in SHAPES[:5]), ((2, 2, 20, 36), (5, 3)),
    *slow_rows(*((shape, (None, None)) for shape in SHAPES[5:]), ((36,), (5, 3)), ((20, 1), (5, 3))),
], ids=str)
def test_bias_of_any_shape_and_its_gradient(shape, window, device):
    bias = torch.randn(shape, device=device, requires_grad=True)
    ours = assert_same([*tensors(device), bias], window=window, align="top_left")
    assert ours[5].shape == bias.shape


@pytest.mark.parametrize("shape", [(20, 1), (2, 1, 1, 36), *slow((), (36,), (2, 2, 20, 36))], ids=str)
def test_mask_of_any_shape(shape, device):
    mask = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(2)) > 0.4
    assert_same(tensors(device), mask=mask)
    bias = torch.randn(36, device=device, requires_grad=True)
    assert_same([*tensors(device), bias], mask=mask, causal=True, align="bottom_right")


@pytest.mark.slow
def test_bias_and_mask_with_any_strides(device):
    dense = torch.randn(36, 2, 20, device=device)
    bias = dense.permute(1, 2, 0).requires_grad_()
    assert_same([*tensors(device), bias])
    mask = (torch.rand(20, 2, 72, device=device) > 0.3)[:, :, ::2].transpose(0, 1)
    assert_same(tensors(device), mask=mask)


@pytest.mark.slow
def test_bias_gradient_over_several_batch_dimensions(device):
    leaves = tensors(device, batch=(2, 3), heads=2, kv_heads=2, n_q=5, n_k=7)
    for shape in ((2, 1, 1, 5, 7), (3, 1, 1, 7), (1, 3, 2, 5, 7)):
        assert_same([*leaves, torch.randn(shape, device=device, requires_grad=True)])


@pytest.mark.slow
def test_gradcheck_through_a_bias(device):
    if device.type != "cpu":
        pytest.skip("the kernels run in float64 in the interpreter alone")
    leaves = tensors(device, torch.float64, batch=(1,), n_q=3, n_k=4, d=3)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], bias=x[3], causal=True, align="top_left", return_lse=True),
                                    (*leaves, bias))


@pytest.mark.parametrize("hide", ["mask", "bias"])
def test_nan_of_a_query_reaches_no_key_that_is_masked_from_it(hide, device):
    """dK and dV of the other keys are those without this query."""
    q, k, v = tensors(device, batch=(1,), heads=1)
    mask = torch.rand(20, 36, generator=torch.Generator().manual_seed(0)).to(device) < 0.9
    mask[3, :10], mask[3, 10:] = True, False
    with torch.no_grad():
        q[..., 3, :] = math.nan
    given = {"mask": mask} if hide == "mask" else {"bias": torch.zeros(20, 36, device=device).masked_fill(~mask, -math.inf)}
    with config.pinned(TILES):
        o = attention(q, k, v, causal=True, align="bottom_right", **given)
        dk, dv = torch.autograd.grad(o.square().sum(), (k, v))
    others = [i for i in range(20) if i != 3]
    mask &= reference.visible(20, 36, causal=True, align="bottom_right", device=device)
    exact = torch.autograd.grad(reference.attention(q[..., others, :], k, v, mask=mask[others]).square().sum(), (k, v))
    for ours, expected in zip((dk, dv), exact):
        torch.testing.assert_close(ours[..., 10:, :], expected[..., 10:, :], atol=1e-4, rtol=1e-4)
        assert ours[..., :10, :].isnan().all()


@pytest.mark.parametrize("hide", ["mask", "bias", "lengths"])
@pytest.mark.parametrize("value", [math.nan, *slow(math.inf)])
def test_nan_at_masked_keys_does_not_spread(hide, value, device):
    q, k, v = tensors(device, d=40)  # held in two parts
    with torch.no_grad():
        k[:, :, 30:], v[:, :, 30:] = value, value
    keep = torch.arange(36, device=device) < 30
    given = {"mask": {"mask": keep}, "bias": {"bias": torch.where(keep, 0.0, -math.inf)},
             "lengths": {"key_lengths": torch.tensor([30, 30], device=device)}}[hide]
    with config.pinned(TILES):
        ours = outcome(lambda *x, **options: attention(*x, **options, **given), (q, k, v))
    short = [q, *(x[:, :, :30].detach().requires_grad_() for x in (k, v))]
    exact = outcome(reference.attention, short)
    for actual, expected in zip(ours, exact):
        actual = actual[:, :, :30] if actual.shape[-2] == 36 else actual
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert all((gradient[:, :, 30:] == 0).all() for gradient in ours[3:])


def test_nan_at_masked_keys_does_not_spread_to_a_shared_bias(device):
    """The gradient sums over all rows of a tile; those past the last query are loaded as 0, and 0 * NaN is NaN."""
    q, k, v = tensors(device)
    bias = torch.zeros(36, device=device, requires_grad=True)
    with torch.no_grad():
        v[:, :, 20:] = math.nan
    with config.pinned(TILES):
        dbias, = torch.autograd.grad(attention(q, k, v, bias=bias, causal=True, align="top_left").sum(), bias)
    assert dbias.isfinite().all() and (dbias[20:] == 0).all() and (dbias[:20] != 0).any()


@pytest.mark.parametrize("given", ["mask", "nothing"])
def test_infinity_times_a_dropped_weight_is_nan(given, device):
    """As in torch; an all-true mask changes nothing."""
    q, k, v = tensors(device, batch=(1,), heads=1, n_q=5, n_k=7, grad=False)
    v[..., 2, :] = math.inf
    seed = torch.tensor([3], device=device)
    keep = dropout_mask((1, 1, 5, 7), 0.5, seed)[0, 0]
    mask = torch.ones(7, dtype=torch.bool, device=device) if given == "mask" else None
    o = attention(q, k, v, mask=mask, dropout_p=0.5, dropout_seed=seed)[0, 0]
    assert keep[:, 2].any() and not keep[:, 2].all()
    assert (o[keep[:, 2]] == math.inf).all() and o[~keep[:, 2]].isnan().all()


def test_rows_of_bias_and_mask_beyond_32_bit_offsets(device):
    """In decoding the one query has the last position: position times row stride exceeds 32 bits."""
    q, k, v = tensors(device, batch=(1,), heads=1, kv_heads=1, n_q=1, n_k=70, grad=False)
    numbers = torch.rand(70, device=device)
    mask = (numbers > 0.5).as_strided((1, 1, 1, 70), (70, 70, 2**31 // 64, 1))
    ours = attention(q, k, v, mask=mask, causal=True, align="bottom_right")
    torch.testing.assert_close(ours, reference.attention(q, k, v, mask=numbers > 0.5), atol=1e-5, rtol=1e-4)
    bias = numbers.as_strided((1, 1, 1, 70), (70, 70, 3 * 2**31 // 64, 1))
    ours = attention(q, k, v, bias=bias, causal=True, align="bottom_right")
    torch.testing.assert_close(ours, reference.attention(q, k, v, bias=numbers), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("shape", ["full", "rows", "keys", "one"])
def test_empty_tensors_with_a_bias(sizes, shape, device):
    batch, heads, n_q, n_k = sizes
    q, k, v = tensors(device, batch=(batch,), heads=heads, kv_heads=heads, n_q=n_q, n_k=n_k, d=4)
    shape = {"full": sizes, "rows": (n_q, 1), "keys": (1, n_k), "one": ()}[shape]
    bias = torch.randn(shape, device=device, requires_grad=True)
    o = attention(q, k, v, bias=bias, mask=torch.ones(n_k, dtype=torch.bool, device=device))
    assert o.shape == q.shape and not o.any()
    for leaf, gradient in zip((q, k, v, bias), torch.autograd.grad(o.sum(), (q, k, v, bias))):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_gradient_through_lse_of_a_bias_per_row(device):
    """A bias that a whole row shares moves its lse only; NaN in it reaches its gradient."""
    q, k, v = tensors(device, batch=(1,), heads=1, n_q=5, grad=False)
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0], device=device)[:, None]
    gradients = []
    for function in (attention, reference.attention):
        bias = values.clone().requires_grad_()
        _, lse = function(q, k, v, bias=bias, return_lse=True)
        gradients.append(torch.autograd.grad(lse.sum(), bias)[0])
    ours, expected = gradients
    assert ours[:2].isnan().all() and torch.equal(ours[2:].flatten(), torch.tensor([0.0, 1, 1], device=device))
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_rows_with_a_bias_of_the_lowest_finite_number_are_uniform(device):
    """As in torch: a whole row of finfo.min masks nothing, forward and backward."""
    q, k, v = tensors(device, kv_heads=2)
    bias = torch.zeros(2, 1, 20, 36, device=device)
    bias[0, :, 3:7], bias[1, :, :, 30:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    do = torch.randn(2, 2, 20, 16, device=device)
    ours = attention(q, k, v, bias=bias)
    torchs = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[0, :, 3:7], v[0].mean(1, keepdim=True).expand(-1, 4, -1), atol=1e-5, rtol=1e-4)
    exact = reference.attention(q.double(), k.double(), v.double(), bias=bias.double())
    torch.testing.assert_close([x.double() for x in torch.autograd.grad(ours, (q, k, v), do)],
                               [x.double() for x in torch.autograd.grad(exact, (q, k, v), do.double())], atol=1e-4, rtol=1e-4)


def test_float32_bias_for_16_bit_queries(device):
    leaves = [*tensors(device, torch.bfloat16), torch.randn(2, 20, 36, device=device, requires_grad=True)]
    ours = assert_same(leaves, tolerance=0.05)
    assert ours[5].dtype == torch.float32 and ours[2].dtype == torch.bfloat16


@pytest.mark.parametrize("options, d", [({"causal": True, "align": "top_left"}, 16),
                                        ({"window": (7, 2), "align": "bottom_right"}, 40),  # held in two parts
                                        *slow_rows(({}, 40), ({"causal": True, "align": "bottom_right"}, 40))], ids=str)
def test_key_lengths_per_sequence(options, d, device):
    q, k, v = tensors(device, batch=(4,), n_k=50, d=d)
    bias, lengths = torch.randn(50, device=device, requires_grad=True), [50, 17, 0, 33]
    with config.pinned(TILES):
        ours = outcome(attention, (q, k, v, bias), key_lengths=torch.tensor(lengths, device=device), **options)

    def one_by_one(q, k, v, bias, return_lse):
        results = [reference.attention(q[i], k[i, :, :n], v[i, :, :n], bias=bias[:n], return_lse=True, **options)
                   for i, n in enumerate(lengths)]
        return tuple(map(torch.stack, zip(*results)))

    for actual, expected in zip(ours, outcome(one_by_one, (q, k, v, bias))):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_key_lengths_are_clamped(device):
    q, k, v = tensors(device, grad=False)
    ours = attention(q, k, v, key_lengths=torch.tensor([99, -3], device=device))
    assert torch.equal(ours[0], attention(q, k, v)[0]) and (ours[1] == 0).all()
    longest = torch.tensor([torch.iinfo(torch.int64).max, 2**31], device=device)
    assert torch.equal(attention(q, k, v, key_lengths=longest), attention(q, k, v))


def looped(function, *given):
    return torch.stack([function(*(x[i] for x in given)) for i in range(len(given[0]))])


def test_vmap_with_lengths(device):
    q, k, v = tensors(device, batch=(3, 2), grad=False)
    lengths = torch.tensor([[36, 5], [7, 0], [20, 33]], device=device)
    for given, shared in ((lengths[0], True), (torch.tensor(9, device=device), True), (lengths, False)):
        if shared:
            ours = torch.vmap(lambda q, k, v, n=given: attention(q, k, v, key_lengths=n))(q, k, v)
            loop = looped(lambda q, k, v, n=given: attention(q, k, v, key_lengths=n), q, k, v)
        else:
            ours = torch.vmap(lambda q, k, v, n: attention(q, k, v, key_lengths=n))(q, k, v, given)
            loop = looped(lambda q, k, v, n: attention(q, k, v, key_lengths=n), q, k, v, given)
        torch.testing.assert_close(ours, loop, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["mask", "bias", "lengths", "dropout", "all"])
def test_jacrev_matches_the_definition(given, device):
    """A vmap over the backward pass: all rows of the Jacobian share one forward pass and its dropout."""
    q, k, v = tensors(device, n_q=3, n_k=3, d=1, grad=False)
    options = {"mask": {"mask": torch.rand(3, 3, device=device) > 0.3}, "bias": {"bias": torch.randn(2, 1, 3, device=device)},
               "lengths": {"key_lengths": torch.tensor([2, 3], device=device)},
               "dropout": {"dropout_p": 0.5, "dropout_seed": torch.tensor([3], device=device)}}
    options = {name: x for group in options.values() for name, x in group.items()} if given == "all" else options[given]
    exact = dict(options)
    if "dropout_seed" in exact:
        exact["keep"] = dropout_mask((2, 2, 3, 3), 0.5, exact.pop("dropout_seed"))
    ours = torch.func.jacrev(lambda *x: attention(*x, **options), (0, 1, 2))(q, k, v)
    true = torch.func.jacrev(lambda *x: reference.attention(*x, **exact), (0, 1, 2))(q, k, v)
    torch.testing.assert_close(ours, true, atol=1e-4, rtol=1e-4)


def test_vmap_with_dropout(device):
    q, k, v = tensors(device, batch=(3, 2), heads=1, grad=False)
    seeds = torch.arange(3, device=device)[:, None]
    step = {"dropout_p": 0.5}
    ours = torch.vmap(lambda q, k, v, seed: attention(q, k, v, dropout_seed=seed, **step))(q, k, v, seeds)
    assert torch.equal(ours, looped(lambda q, k, v, seed: attention(q, k, v, dropout_seed=seed, **step), q, k, v, seeds))
    for randomness, alike in (("same", True), ("different", False)):
        ones = torch.vmap(lambda q: attention(q, k[0], v[0], **step), randomness=randomness)(q[:1].expand(3, *q.shape[1:]))
        assert torch.equal(ones[0], ones[1]) == alike


@pytest.mark.parametrize("p", [0.3, *slow(1.0)])
@pytest.mark.parametrize("options", [{"causal": True, "align": "bottom_right"}, *slow({})], ids=["causal", "full"])
def test_dropout_is_exact_for_its_keep_mask(p, options, device):
    leaves = [*tensors(device, n_q=33, n_k=40), torch.randn(1, 2, 33, 40, device=device, requires_grad=True)]
    seed = torch.tensor([123456789123], device=device)
    keep = dropout_mask((2, 2, 33, 40), p, seed)

    def definition(q, k, v, bias, return_lse, **options):
        s = q @ k.repeat_interleave(2, 1).mT / 4 + bias
        s = s.masked_fill(~reference.visible(33, 40, device=device, **options), -math.inf)
        keep_scale = 1 / (1 - p) if p < 1 else 0.0
        return s.softmax(-1) * keep * keep_scale @ v.repeat_interleave(2, 1), s.logsumexp(-1)

    exact = outcome(definition, leaves, **options)
    for tiles in (TILES, Config(64, 64)):
        with config.pinned(tiles):
            ours = outcome(attention, leaves, dropout_p=p, dropout_seed=seed, **options)
        for actual, expected in zip(ours, exact):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def philox(counter, key, rounds=7):
    """Return the four numbers of Philox4x32 (Salmon et al., 2011), in plain integers."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(rounds):
        ac, bd = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (bd >> 32) ^ b ^ low, bd & 0xFFFFFFFF, (ac >> 32) ^ d ^ high, ac & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def test_dropped_weights_are_those_of_philox(device):
    seed, p = 2**40 + 12345, 0.4
    keep = dropout_mask((2, 3, 5, 9), p, torch.tensor([seed], device=device)).cpu()
    for batch, head, query, key in itertools.product(range(2), range(3), range(5), range(9)):
        # the four numbers of one draw belong to four neighbouring keys, in order
        bits = philox((query, key // 4, head, batch), seed)[key % 4]
        assert keep[batch, head, query, key] == (bits >= round(p * 2**32)), (batch, head, query, key)


def test_a_weight_at_the_threshold_is_kept(device):
    bits = philox((0, 0, 0, 0), 7)[2]
    keep = [dropout_mask((1, 1, 1, 4), x * 2.0**-32, torch.tensor([7], device=device))[0, 0, 0, 2] for x in (bits, bits + 1)]
    assert keep == [True, False]


def test_dropout_mask_does_not_depend_on_the_sizes(device):
    seed = torch.tensor([7], device=device)
    whole = dropout_mask((3, 4, 50, 70), 0.5, seed)
    assert torch.equal(whole[:2, :3, :20, :33], dropout_mask((2, 3, 20, 33), 0.5, seed))


def test_dropout_frequency_and_independence(device):
    seeds = [torch.tensor([seed], device=device) for seed in (1, 2)]
    p = 0.2
    first, second = (dropout_mask((4, 4, 64, 64), p, seed).double().cpu() for seed in seeds)
    count = first.numel()
    assert abs(first.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    pairs = {"calls": (first, second), "batches": (first[:2], first[2:]), "heads": (first[:, :2], first[:, 2:]),
             "queries": (first[:, :, :-1], first[:, :, 1:]), "keys": (first[..., :-1], first[..., 1:]),
             "fours": (first[..., :-4], first[..., 4:])}
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(a.numel()), name


def test_dropout_follows_torchs_generator(device):
    q, k, v = tensors(device, heads=1)

    def run(seed):
        torch.manual_seed(seed)
        return [scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2)]

    first, repeated, other = run(1), run(1), run(2)
    assert all(map(torch.equal, first, repeated)) and not torch.equal(*first) and not torch.equal(first[0], other[0])
    # without dropout, scaled_dot_product_attention draws no random number
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    scaled_dot_product_attention(q, k, v)
    assert torch.equal(torch.rand(3), expected)


def test_changing_the_seed_tensor_after_the_forward_pass(device):
    leaves, seed = tensors(device, heads=1), torch.tensor([5], device=device)
    first, = torch.autograd.grad(attention(*leaves, dropout_p=0.5, dropout_seed=seed).sum(), leaves[2])
    o = attention(*leaves, dropout_p=0.5, dropout_seed=seed)
    seed.add_(1)
    assert torch.equal(torch.autograd.grad(o.sum(), leaves[2])[0], first)


def test_keep_scale_of_extreme_probabilities(device):
    """keep_scale compensates for the probability as rounded to steps of 2^-32; p = 1 drops every weight."""
    p = 1 - 3.4 * 2**-32
    dropout = launch.dropout_record(p, None)
    assert dropout.keep_scale * (2**32 - dropout.threshold) == 2**32
    seed = torch.tensor([1], device=device)
    assert not dropout_mask((1, 1, 64, 64), 1.0, seed).any() and dropout_mask((1, 1, 2, 2), 0.0, seed).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_checkpointing(reentrant, device):
    leaves = tensors(device, heads=1)

    def gradients(run):
        torch.manual_seed(3)
        return torch.autograd.grad(run(*leaves).sum(), leaves) if not reentrant else backward(run(*leaves))

    def backward(o):
        o.sum().backward()
        gradients = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        return gradients

    def step(q, k, v):
        return attention(q, k, v, dropout_p=0.4).square()

    plain = gradients(step)
    checkpointed = gradients(lambda *x: checkpoint(step, *x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, checkpointed))


def test_fullgraph_compile_with_all_score_mods(device):
    torch._dynamo.reset()
    leaves = [*tensors(device, n_q=36, heads=1), torch.randn(36, device=device, requires_grad=True)]
    mask = torch.rand(36, 36, device=device) > 0.2
    seed = torch.tensor([5], device=device)

    def step(q, k, v, bias):
        return attention(q * 2, k, v, bias=bias, mask=mask, dropout_p=0.2, dropout_seed=seed, causal=True).sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(*(torch.autograd.grad(run(*leaves).sum(), leaves) for run in (compiled, step))):
        torch.testing.assert_close(ours, expected)


def test_results_are_bitwise_repeatable(device):
    leaves = [*tensors(device, torch.bfloat16), torch.randn(2, 1, 36, device=device, requires_grad=True)]
    seed = torch.tensor([5], device=device)
    first, second = (outcome(attention, leaves, dropout_p=0.3, dropout_seed=seed) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [(2, 2, 20, 36), (20, 36), (2, 1, 1, 36), (1, 2, 20, 36)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_matches_torch(kind, shape, device):
    q, k, v = tensors(device, kv_heads=2)
    mask = torch.randn(shape, device=device)
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_()
    leaves = [q, k, v] + [mask] * (kind == "float")
    ours, torchs = (run(q, k, v, mask) for run in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-4)
    for actual, expected in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (ours, torchs))):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("lengths", [(20, 36), (36, 20), (24, 24)], ids=str)
def test_causal_bias_objects_of_torch(kind, lengths, device):
    q, k, v = tensors(device, kv_heads=2, n_q=lengths[0], n_k=lengths[1], grad=False)
    align = "top_left" if kind is causal_upper_left else "bottom_right"
    expected = reference.attention(q, k, v, causal=True, align=align)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, kind(*lengths)), expected, atol=1e-5, rtol=1e-4)


def test_dropout_mask_rejects_bad_arguments():
    with pytest.raises(ValueError, match="shape: expected four sizes"):
        dropout_mask((2, 3), 0.5, torch.tensor([3]))
    for seed in (3, None):
        with pytest.raises(RuntimeError, match=f"dropout_seed: expected one int64 on the device of the queries, got {seed}"):
            dropout_mask((1, 1, 2, 2), 0.5, seed)


def test_autocast_casts_a_16_bit_bias(device):
    q, k, v = tensors(device, torch.float16, grad=False)
    bias = torch.randn(36, device=device, dtype=torch.float16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = attention(q, k, v, bias=bias)
    exact = reference.attention(q.float(), k.float(), v.float(), bias=bias.float())
    torch.testing.assert_close(o.float(), exact, atol=0.05, rtol=0.05)


def test_autocast_keeps_a_float32_attn_mask(device):
    q, k, v = tensors(device, kv_heads=2, grad=False)
    mask = torch.full((20, 36), torch.finfo(torch.float32).min, device=device).triu(1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = scaled_dot_product_attention(q, k, v, mask)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.float(), reference.attention(q, k, v, causal=True, align="top_left"), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("arguments", "options", "error", "message"), [
    ((torch.ones(20, 36, dtype=torch.int64),), {}, RuntimeError, "attn_mask: expected torch.bool or .*, got torch.int64"),
    ((torch.ones(20, 36).double(),), {}, RuntimeError, "attn_mask: expected .*got torch.float64"),
    ((torch.ones(3, 1, 20, 36),), {}, RuntimeError, r"that broadcasts to \(2, 2, 20, 36\), got \(3, 1, 20, 36\)"),
    ((torch.ones(1, 1, 1, 1, 36),), {}, RuntimeError, "expected a shape that broadcasts"),
    ((torch.ones(20, 36), 0.0, True), {}, RuntimeError, "Explicit attn_mask should not be set when is_causal=True"),
    ((causal_upper_left(20, 36), 0.0, True), {}, ValueError, "CausalBias"),
    ((causal_upper_left(20, 35),), {}, RuntimeError, "expected a CausalBias of 20 queries and 36 keys"),
    ((None, 1.5), {}, RuntimeError, "dropout_p: expected a probability"),
    ((None, math.nan), {}, ValueError, "dropout_p: expected a probability.*got nan"),
    (("no",), {}, TypeError, "attn_mask: expected a tensor"),
])
def test_sdpa_rejects_bad_arguments(arguments, options, error, message, device):
    q, k, v = tensors(device, kv_heads=2, grad=False)
    arguments = [x.to(device) if type(x) is torch.Tensor else x for x in arguments]
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(q, k, v, *arguments, **options)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"bias": torch.ones(36, dtype=torch.bool)}, RuntimeError, "bias: expected torch.float32, got torch.bool"),
    ({"mask": torch.ones(36)}, RuntimeError, "mask: expected torch.bool, got torch.float32"),
    ({"mask": torch.ones(35, dtype=torch.bool)}, RuntimeError, r"mask: expected a shape .* \(2, 2, 20, 36\), got \(35,\)"),
    ({"bias": 1.0}, TypeError, "bias: expected a tensor or None, got 1.0"),
    ({"key_lengths": [3, 4]}, TypeError, "key_lengths: expected a tensor of int32 or int64"),
    ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths: .*got torch.float32"),
    ({"key_lengths": torch.ones(3, dtype=torch.int32)}, RuntimeError, r"key_lengths: .*broadcasts to \(2,\), got \(3,\)"),
    ({"key_lengths": torch.ones(2, dtype=torch.int32), "causal": True}, ValueError, "align: .*key_lengths"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability"), ({"dropout_p": "0"}, TypeError, "dropout_p"),
    ({"dropout_p": 0.5, "dropout_seed": 3}, RuntimeError, "dropout_seed: expected one int64 on .*got 3"),
    ({"bias": torch.randn(20, 36).to_sparse()}, RuntimeError, "bias: expected a dense .* tensor, got layout torch.sparse_coo"),
])
def test_attention_rejects_bad_arguments(options, error, message, device):
    q, k, v = tensors(device, grad=False)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(error, match=message):
        attention(q, k, v, **options)
