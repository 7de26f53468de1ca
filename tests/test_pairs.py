"""What is given for each pair of a query and a key: biases, masks, lengths of keys, dropout."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from tritonattn import Config, attention, config, dropout_mask, reference, scaled_dot_product_attention

TILES = Config(16, 32)


def tensors(device, dtype=torch.float32, *, batch=(2,), heads=2, kv_heads=1, n_q=20, n_k=36, d=16, grad=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = (heads, n_q), (kv_heads, n_k), (kv_heads, n_k)
    return [torch.randn(*batch, h, n, d, generator=rng).to(device, dtype).requires_grad_(grad) for h, n in shapes]


def outcome(function, leaves, **options):
    """o, lse and the gradients of the leaves, q, k, v and perhaps a bias; rows that see nothing have none through lse."""
    bias = {"bias": leaves[3]} if len(leaves) > 3 else {}
    o, lse = function(*leaves[:3], return_lse=True, **bias, **options)
    rng = torch.Generator().manual_seed(9)
    do, dlse = (torch.randn(x.shape, generator=rng).to(x) for x in (o, lse))
    return o, lse, *torch.autograd.grad((o, lse), leaves, (do, torch.where(lse.isfinite(), dlse, 0)))


def same(leaves, tolerance=1e-4, **options):
    with config.pinned(TILES):
        ours = outcome(attention, leaves, **options)
    exact = outcome(reference.attention, [x.detach().double().requires_grad_() for x in leaves], **options)
    for name, mine, true in zip(("o", "lse", "dq", "dk", "dv", "dbias"), ours, exact):
        torch.testing.assert_close(mine.double(), true, atol=tolerance, rtol=tolerance, msg=lambda text, of=name: of + text)
    return ours


SHAPES = [(2, 2, 20, 36), (20, 36), (1, 2, 1, 36), (2, 1, 1, 36), (2, 1, 20, 36), (36,), (2, 1, 1), (20, 1), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [(None, None), (5, 3)], ids=["full", "window"])
def test_a_bias_of_any_shape_and_its_gradient(shape, window, device):
    bias = torch.randn(shape, device=device, requires_grad=True)
    ours = same([*tensors(device), bias], window=window, align="top_left")
    assert ours[5].shape == bias.shape


@pytest.mark.parametrize("shape", [(), (36,), (20, 1), (2, 1, 1, 36), (2, 2, 20, 36)], ids=str)
def test_a_mask_of_any_shape(shape, device):
    mask = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(2)) > 0.4
    same(tensors(device), mask=mask)
    same([*tensors(device), torch.randn(36, device=device, requires_grad=True)], mask=mask, causal=True, align="bottom_right")


def test_strides_of_any_kind(device):
    dense = torch.randn(36, 2, 20, device=device)
    bias = dense.permute(1, 2, 0).requires_grad_()
    same([*tensors(device), bias])
    mask = (torch.rand(20, 2, 72, device=device) > 0.3)[:, :, ::2].transpose(0, 1)
    same(tensors(device), mask=mask)


def test_several_batch_dimensions_summed_and_not(device):
    leaves = tensors(device, batch=(2, 3), heads=2, kv_heads=2, n_q=5, n_k=7)
    for shape in ((2, 1, 1, 5, 7), (3, 1, 1, 7), (1, 3, 2, 5, 7)):
        same([*leaves, torch.randn(shape, device=device, requires_grad=True)])


def test_gradcheck_through_a_bias(device):
    if device.type != "cpu":
        pytest.skip("the kernels run in float64 in the interpreter alone")
    leaves = tensors(device, torch.float64, batch=(1,), n_q=3, n_k=4, d=3)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], bias=x[3], causal=True, align="top_left", return_lse=True),
                                    (*leaves, bias))


@pytest.mark.parametrize("hide", ["mask", "bias", "lengths"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_hidden_cannot_leak(hide, value, device):
    q, k, v = tensors(device)
    with torch.no_grad():
        k[:, :, 30:], v[:, :, 30:] = value, value
    seen = torch.arange(36, device=device) < 30
    given = {"mask": {"mask": seen}, "bias": {"bias": torch.where(seen, 0.0, -math.inf)},
             "lengths": {"key_lengths": torch.tensor([30, 30], device=device)}}[hide]
    with config.pinned(TILES):
        ours = outcome(lambda *x, **options: attention(*x, **options, **given), (q, k, v))
    short = [q, *(x[:, :, :30].detach().requires_grad_() for x in (k, v))]
    exact = outcome(reference.attention, short)
    for mine, true in zip(ours, exact):
        torch.testing.assert_close(mine[:, :, :30] if mine.shape[-2] == 36 else mine, true, atol=1e-5, rtol=1e-4)
    assert all((gradient[:, :, 30:] == 0).all() for gradient in ours[3:])


def test_rows_of_the_lowest_finite_number_are_uniform(device):
    """As torch's: a mask of finfo.min that hides a whole row hides nothing of it, forward and backward."""
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


def test_a_bias_of_float32_for_16_bit_queries(device):
    leaves = [*tensors(device, torch.bfloat16), torch.randn(2, 20, 36, device=device, requires_grad=True)]
    ours = same(leaves, tolerance=0.05)
    assert ours[5].dtype == torch.float32 and ours[2].dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"causal": True, "align": "top_left"}, {"causal": True, "align": "bottom_right"},
                                     {"window": (7, 2), "align": "bottom_right"}], ids=str)
def test_each_sequence_has_its_own_keys(options, device):
    q, k, v = tensors(device, batch=(4,), n_k=50)
    bias, lengths = torch.randn(50, device=device, requires_grad=True), [50, 17, 0, 33]
    with config.pinned(TILES):
        ours = outcome(attention, (q, k, v, bias), key_lengths=torch.tensor(lengths, device=device), **options)

    def one_by_one(q, k, v, bias, return_lse):
        found = [reference.attention(q[i], k[i, :, :n], v[i, :, :n], bias=bias[:n], return_lse=True, **options)
                 for i, n in enumerate(lengths)]
        return tuple(map(torch.stack, zip(*found)))

    for mine, true in zip(ours, outcome(one_by_one, (q, k, v, bias))):
        torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)


def test_lengths_past_the_keys_are_all_of_them(device):
    q, k, v = tensors(device, grad=False)
    ours = attention(q, k, v, key_lengths=torch.tensor([99, -3], device=device))
    assert torch.equal(ours[0], attention(q, k, v)[0]) and (ours[1] == 0).all()


# --- dropout

@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"causal": True, "align": "top_left"}], ids=["full", "causal"])
def test_dropout_is_exact_given_what_is_dropped(p, options, device):
    leaves = [*tensors(device, n_q=40, n_k=33), torch.randn(1, 2, 40, 33, device=device, requires_grad=True)]
    seed = torch.tensor([123456789123], device=device)
    keep = dropout_mask((2, 2, 40, 33), p, seed)

    def definition(q, k, v, bias, return_lse, **options):
        s = q @ k.repeat_interleave(2, 1).mT / 4 + bias
        s = s.masked_fill(~reference.visible(40, 33, device=device, **options), -math.inf)
        gain = 1 / (1 - p) if p < 1 else 0.0
        return s.softmax(-1) * keep * gain @ v.repeat_interleave(2, 1), s.logsumexp(-1)

    exact = outcome(definition, leaves, **options)
    for tiles in (TILES, Config(64, 64)):
        with config.pinned(tiles):
            ours = outcome(attention, leaves, dropout_p=p, dropout_seed=seed, **options)
        for mine, true in zip(ours, exact):
            torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)


def philox(counter, key, rounds=7):
    """Philox4x32 as Salmon et al. define it, in plain integers."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(rounds):
        ac, bd = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (bd >> 32) ^ b ^ low, bd & 0xFFFFFFFF, (ac >> 32) ^ d ^ high, ac & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def test_what_is_dropped_is_what_philox_draws(device):
    seed, p = 2**40 + 12345, 0.4
    keep = dropout_mask((2, 3, 5, 9), p, torch.tensor([seed], device=device)).cpu()
    for batch, head, query, key in itertools.product(range(2), range(3), range(5), range(9)):
        # of the four numbers a draw gives, the keys take them in the order 0, 1, 2, 3 of the four they share
        bits = philox((query, key // 4, head, batch), seed)[key % 4]
        assert keep[batch, head, query, key] == (bits >= round(p * 2**32)), (batch, head, query, key)


def test_what_is_dropped_follows_from_the_place_alone(device):
    seed = torch.tensor([7], device=device)
    whole = dropout_mask((3, 4, 50, 70), 0.5, seed)
    assert torch.equal(whole[:2, :3, :20, :33], dropout_mask((2, 3, 20, 33), 0.5, seed))


def test_dropping_is_as_frequent_as_asked_and_independent(device):
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

    first, again, other = run(1), run(1), run(2)
    assert all(map(torch.equal, first, again)) and not torch.equal(*first) and not torch.equal(first[0], other[0])
    # torch's own door draws nothing where nothing is dropped
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    scaled_dot_product_attention(q, k, v)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_checkpointing(reentrant, device):
    leaves = tensors(device, heads=1)

    def gradients(run):
        torch.manual_seed(3)
        return torch.autograd.grad(run(*leaves).sum(), leaves) if not reentrant else backward(run(*leaves))

    def backward(o):
        o.sum().backward()
        found = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        return found

    def step(q, k, v):
        return attention(q, k, v, dropout_p=0.4).square()

    plain = gradients(step)
    again = gradients(lambda *x: checkpoint(step, *x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))


def test_compiled_in_one_graph_with_everything(device):
    torch._dynamo.reset()
    leaves = [*tensors(device, n_q=36, heads=1), torch.randn(36, device=device, requires_grad=True)]
    mask = torch.rand(36, 36, device=device) > 0.2
    seed = torch.tensor([5], device=device)

    def step(q, k, v, bias):
        return attention(q * 2, k, v, bias=bias, mask=mask, dropout_p=0.2, dropout_seed=seed, causal=True).sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(*(torch.autograd.grad(run(*leaves).sum(), leaves) for run in (compiled, step))):
        torch.testing.assert_close(ours, expected)


def test_twice_the_same_bits(device):
    leaves = [*tensors(device, torch.bfloat16), torch.randn(2, 1, 36, device=device, requires_grad=True)]
    seed = torch.tensor([5], device=device)
    first, second = (outcome(attention, leaves, dropout_p=0.3, dropout_seed=seed) for _ in range(2))
    assert all(map(torch.equal, first, second))


# --- torch's door

@pytest.mark.parametrize("shape", [(2, 2, 20, 36), (20, 36), (2, 1, 1, 36), (1, 2, 20, 36)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_as_torch_takes_it(kind, shape, device):
    q, k, v = tensors(device, kv_heads=2)
    mask = torch.randn(shape, device=device)
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_()
    leaves = [q, k, v] + [mask] * (kind == "float")
    ours, torchs = (run(q, k, v, mask) for run in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (ours, torchs))):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("lengths", [(20, 36), (36, 20), (24, 24)], ids=str)
def test_causal_biases(kind, lengths, device):
    q, k, v = tensors(device, kv_heads=2, n_q=lengths[0], n_k=lengths[1], grad=False)
    align = "top_left" if kind is causal_upper_left else "bottom_right"
    expected = reference.attention(q, k, v, causal=True, align=align)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, kind(*lengths)), expected, atol=1e-5, rtol=1e-4)


def test_autocast_keeps_a_float32_mask(device):
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
    (("no",), {}, TypeError, "attn_mask: expected a tensor"),
])
def test_misuse_of_torchs_door(arguments, options, error, message, device):
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
    ({"key_lengths": torch.ones(2, dtype=torch.int32), "causal": True}, ValueError, "align: .*their own lengths"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability"), ({"dropout_p": "0"}, TypeError, "dropout_p"),
    ({"dropout_p": 0.5, "dropout_seed": 3}, RuntimeError, "dropout_seed: expected one int64 on .*got 3"),
])
def test_misuse_of_the_native_door(options, error, message, device):
    q, k, v = tensors(device, grad=False)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(error, match=message):
        attention(q, k, v, **options)
