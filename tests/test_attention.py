"""attention() and scaled_dot_product_attention(): exact in every case, with a clear error for every misuse."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel

import tritonattn
from tests.helpers.cases import COVERING, LARGE_TILES, PAIRWISE, SINGLE, TILES, check, results
from tests.helpers.tiers import slow_rows
from tests.helpers.tolerance import agree
from tritonattn import Problem, attention, config, gpu, reference, scaled_dot_product_attention
from tritonattn.runtime import arguments, packed_arguments


@pytest.mark.interpreted
@pytest.mark.parametrize("name", SINGLE)
def test_each_feature_in_float64_equals_the_definition(name, device):
    check(SINGLE[name], torch.float64, device)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", COVERING)
def test_features_together_in_float64_equal_the_definition(name, device):
    check(COVERING[name], torch.float64, device, tiles=LARGE_TILES)


def test_the_covering_cases_hold_every_pair():
    held = {pair for case in COVERING.values() for pair in itertools.combinations(sorted(case.name.split("+")), 2)}
    assert {tuple(name.split("+")) for name in PAIRWISE} <= held and len(PAIRWISE) > 400 and len(COVERING) < 60


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("name", PAIRWISE)
def test_each_pair_of_features_in_float64_equals_the_definition(name, device):
    check(PAIRWISE[name], torch.float64, device, tiles=LARGE_TILES)


def _low_precision():
    """Yield every feature in bfloat16; in float16 and float32 by default every third, the others as slow tests."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for number, name in enumerate(SINGLE):
            marks = () if dtype == torch.bfloat16 or number % 3 == 0 else pytest.mark.slow
            yield pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize("name, dtype", list(_low_precision()))
def test_low_precision_errs_by_rounding_alone(name, dtype, device):
    check(SINGLE[name], dtype, device, tiles=LARGE_TILES)


@pytest.mark.parametrize("n_q, n_k", [(0, 5), (5, 0), (0, 0), (1, 1), (17, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length(n_q, n_k, causal, device):
    q, k, v = (torch.randn(2, 3, n, 8, device=device, requires_grad=True) for n in (n_q, n_k, n_k))
    o, lse = attention(q, k, v, causal=causal, align="bottom_right", return_lse=True)
    exact, exact_lse = reference.attention(q, k, v, causal=causal, align="bottom_right", return_lse=True)
    torch.testing.assert_close(o, exact)
    torch.testing.assert_close(lse, exact_lse)
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    for ours, x, theirs in zip(gradients, (q, k, v), torch.autograd.grad(exact.sum(), (q, k, v))):
        assert ours.shape == x.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_thousand_keys(device):
    q, k, v = (torch.randn(1, 1, n, 8, device=device, dtype=torch.float32) for n in (17, 1000, 1000))
    with config.pinned(tritonattn.Config(32, 128)):
        agree("o", attention(q, k, v), reference.attention(q, k, v), reference.attention(q.double(), k.double(), v.double()),
              torch.float32)


@pytest.mark.parametrize("d, dv", [(1, 1), (8, 8), (17, 33), (48, 80), (96, 96), (127, 129), (160, 24), (256, 256), (512, 512)])
def test_any_head_size(d, dv, device):
    limit = arguments.largest_head(torch.empty(0, device=device))
    if max(d, dv) > limit:
        pytest.skip(f"this GPU's limit of the head size in float32 is {limit}")
    q, k, v = (torch.randn(1, 1, 20, width, device=device, requires_grad=True) for width in (d, d, dv))
    do = torch.randn(1, 1, 20, dv, device=device)
    ours, theirs, exact = (
        (o := function(*inputs, causal=True), *torch.autograd.grad(o, inputs, do.to(o.dtype)))
        for function, inputs in ((attention, (q, k, v)), (reference.attention, (q, k, v)),
                                 (reference.attention, tuple(x.detach().double().requires_grad_() for x in (q, k, v)))))
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), ours, theirs, exact):
        agree(name, a, b, c, torch.float32)


def test_rows_without_keys_give_zero_and_lse_minus_infinity(device):
    q, k, v = (torch.randn(1, 1, n, 16, device=device, requires_grad=True) for n in (40, 10, 10))
    o, lse = attention(q, k, v, causal=True, align="bottom_right", return_lse=True)
    assert (o[0, 0, :30] == 0).all() and (lse[0, 0, :30] == -torch.inf).all() and lse[0, 0, 30:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert (dq[0, 0, :30] == 0).all() and all(x.isfinite().all() for x in (dq, dk, dv))


def test_nan_in_masked_keys_does_not_reach_the_output(device):
    q, k, v = (torch.randn(1, 2, 50, 24, device=device) for _ in range(3))
    clean = attention(q[..., :30, :], k[..., :30, :], v[..., :30, :], causal=True)
    k[..., 30, 2], v[..., 31, 1], v[..., 32, 0] = torch.nan, torch.inf, -torch.inf
    for x in (q, k, v):
        x.requires_grad_()
    o = attention(q, k, v, causal=True)
    torch.testing.assert_close(o[..., :30, :], clean)
    assert o[..., 30:, :].isnan().all(), "a nan in live data must spread"
    dq, = torch.autograd.grad(o[..., :30, :].sum(), q)
    assert dq[..., :30, :].isfinite().all() and dq[..., :30, :].abs().sum() > 0


@pytest.mark.parametrize("n_q, options", [
    (30, {"causal": True, "align": "bottom_right"}), (70, {"causal": True, "align": "bottom_right"}),
    (50, {"window": (9, 4)}), *slow_rows((50, {"window": (9, None)}), (50, {"window": (None, 4)})),
], ids=["more keys", "more queries", "both", "left", "right"])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_spreads_only_along_visible_pairs_for_every_window(where, n_q, options, device):
    """A query or a key is not finite: all that does not depend on it is as if it were."""
    q, k, v = (torch.randn(1, 1, n, 16, device=device) for n in (n_q, 50, 50))
    do, dlse = torch.randn(1, 1, n_q, 16, device=device), torch.zeros(1, 1, n_q, device=device)
    seen = reference.visible(n_q, 50, **options)
    with config.pinned(TILES):
        clean = results(attention, q, k, v, do, dlse, **options)
        if where == "query":
            q[..., 25, 1], do[..., 25, 4] = torch.nan, torch.inf
            rows = torch.arange(n_q) == 25
        else:
            k[..., 25, 2], v[..., 25, 3] = torch.inf, torch.nan
            rows = seen[:, 25]
        ours = results(attention, q, k, v, do, dlse, **options)
    columns = seen[rows].any(0)
    for name, one, other, touched in zip(("o", "lse", "dq", "dk", "dv"), ours, clean, (rows, rows, rows, columns, columns)):
        torch.testing.assert_close(one[0, 0, ~touched], other[0, 0, ~touched], msg=lambda text, name=name: f"{name}: {text}")
    assert ours[0][0, 0, rows].isnan().any() and ours[4][0, 0, columns].isnan().any()
    assert (~rows).any() and (where == "key" or (~columns).any())


def test_nan_in_the_second_part_of_a_head_stays_in_its_column(device):
    q, k, v = (torch.randn(1, 1, 50, 40, device=device) for _ in range(3))
    with config.pinned(TILES):
        clean = attention(q, k, v, causal=True)
        v[..., 25, 38] = torch.nan
        o = attention(q, k, v, causal=True)
    torch.testing.assert_close(o[..., :25, :], clean[..., :25, :])
    assert o[..., 25:, 38].isnan().all() and o[..., :38].isfinite().all()


@pytest.mark.parametrize("asked", ["k", "v"])
def test_nan_safe_with_a_single_gradient(asked, device):
    tensors = {name: torch.randn(1, 1, 50, 16, device=device) for name in "qkv"}
    tensors["q"][..., 25, 1] = torch.nan
    with config.pinned(TILES):
        o = attention(**tensors | {asked: tensors[asked].requires_grad_()}, causal=True)
        gradient, = torch.autograd.grad(o, tensors[asked], torch.ones_like(o))
    assert gradient[..., 26:, :].isfinite().all() and gradient[..., :26, :].isnan().all()


def test_row_of_minus_infinity_scores_gives_zero(device):
    q, (k, v) = torch.rand(1, 1, 20, 8, device=device), torch.randn(2, 1, 1, 32, 8, device=device)
    k[..., 0] = -torch.inf
    for x in (q, k, v):
        x.requires_grad_()
    with config.pinned(TILES):
        o, lse = attention(q, k, v, return_lse=True)
        dv, = torch.autograd.grad(o.sum(), v)
    assert (o == 0).all() and (lse == -torch.inf).all() and (dv == 0).all()


def test_infinity_in_unmasked_values_matches_the_definition(device):
    q, k, v = (torch.randn(1, 1, 50, 16, device=device) for _ in range(3))
    v[..., 20, 3], v[..., 30, 5], v[..., 31, 5] = torch.inf, torch.inf, -torch.inf
    o = attention(q, k, v, causal=True)[0, 0]
    assert o[:20, 3].isfinite().all() and (o[20:, 3] == torch.inf).all()
    assert (o[30, 5] == torch.inf) and o[31:, 5].isnan().all() and o[:, :3].isfinite().all()


def test_scores_of_minus_infinity_in_a_whole_tile(device):
    q, (k, v) = torch.rand(1, 1, 20, 8, device=device), torch.randn(2, 1, 1, 100, 8, device=device)
    k[..., :40, 0] = -torch.inf
    with config.pinned(TILES):
        torch.testing.assert_close(attention(q, k, v), attention(q, k[..., 40:, :], v[..., 40:, :]))


@pytest.mark.parametrize("causal", [False, True])
def test_subnormal_scale_counts_as_zero(causal, device):
    q, k, v = (torch.randn(1, 1, 40, 8, device=device) for _ in range(3))
    expected = attention(q, k, v, causal=causal, scale=0.0)
    torch.testing.assert_close(attention(q, k, v, causal=causal, scale=1e-45), expected)
    torch.testing.assert_close(attention(q, k, v, causal=causal, scale=-1e-300), expected)


def test_nan_in_a_later_query_does_not_reach_the_keys_it_cannot_see(device):
    q, k, v = (torch.randn(1, 1, 50, 16, device=device) for _ in range(3))
    q[..., 40, :] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    o = attention(q, k, v, causal=True)
    _, dk, dv = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert dk[..., 41:, :].isfinite().all() and dv[..., 41:, :].isfinite().all()
    assert dk[..., :41, :].isnan().all() and dv[..., :41, :].isnan().all()


def test_gradient_through_lse_alone_is_zero_for_v(device):
    q, k, v = (torch.randn(1, 1, 20, 16, device=device, requires_grad=True) for _ in range(3))
    _, lse = attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    _, exact = reference.attention(q, k, v, return_lse=True)
    expected = torch.autograd.grad(exact.sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected)
    assert (dv == 0).all()


@pytest.mark.parametrize("shapes", [
    ((5, 8), (7, 8), (7, 8)), ((3, 5, 8), (3, 7, 8), (3, 7, 8)), ((2, 3, 5, 8), (1, 3, 7, 8), (3, 7, 8)),
    ((4, 1, 2, 5, 8), (3, 2, 7, 8), (2, 7, 8)), ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8)), ((2, 5, 8), (7, 8), (7, 8)),
], ids=str)
def test_leading_dimensions_broadcast(shapes, device):
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    o, lse = attention(q, k, v, return_lse=True)
    wide = [x.unsqueeze(0) if x.dim() == 2 else x for x in (q, k, v)]
    wide[1:] = [x.expand(*x.shape[:-3], max(wide[1].shape[-3], wide[2].shape[-3]), *x.shape[-2:]) for x in wide[1:]]
    exact, exact_lse = reference.attention(*wide, return_lse=True)
    if q.dim() == 2:
        exact, exact_lse = exact.squeeze(0), exact_lse.squeeze(0)
    torch.testing.assert_close(o, exact)
    torch.testing.assert_close(lse, exact_lse)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(exact.sum(), (q, k, v)),
                               atol=1e-5, rtol=1e-4)


def test_causal_and_a_window_bound_both_sides(device):
    q, k, v = (torch.randn(1, 1, 30, 16, device=device) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, causal=True, window=(4, 9)), attention(q, k, v, window=(4, 0)))


def test_the_result_does_not_depend_on_the_tiles(device):
    q, k, v = (torch.randn(1, 2, 70, 24, device=device) for _ in range(3))
    do, dlse = torch.randn_like(q), torch.randn(1, 2, 70, device=device)
    outcomes = []
    for tiles in (tritonattn.Config(16, 16), tritonattn.Config(64, 32), tritonattn.Config(32, 128)):
        with config.pinned(tiles):
            outcomes.append(results(attention, q, k, v, do, dlse, window=(20, 9)))
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], atol=2e-5, rtol=1e-4)


def test_permuting_keys_and_values_together_changes_nothing(device):
    q, k, v = (torch.randn(1, 2, 45, 16, device=device) for _ in range(3))
    order = torch.randperm(45)
    torch.testing.assert_close(attention(q, k[..., order, :], v[..., order, :]), attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_batch_and_prefill_do_not_change_the_bits(device):
    q, k, v = (torch.randn(3, 2, 45, 16, device=device) for _ in range(3))
    with config.pinned(TILES):
        whole = attention(q, k, v, causal=True)
        assert torch.equal(attention(q[1:2], k[1:2], v[1:2], causal=True), whole[1:2])
        last = attention(q[..., -1:, :], k, v, causal=True, align="bottom_right")
    assert torch.equal(last, whole[..., -1:, :])


def test_twice_the_same_bits(device):
    q, k, v = (torch.randn(2, 4, 50, 16, device=device) for _ in range(3))
    do, dlse = torch.randn_like(q), torch.randn(2, 4, 50, device=device)
    for first, second in zip(*(results(attention, q, k[:, :2], v[:, :2], do, dlse, causal=True) for _ in range(2))):
        assert torch.equal(first, second)


# --- misuse

def good(device, **changes):
    tensors = {name: torch.randn(1, 2, 6, 8, device=device) for name in "qkv"}
    return tensors | changes


@pytest.mark.parametrize("changes, error, message", [
    ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    ({"k": torch.randn(1, 2, 6, 8).half()}, RuntimeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    ({"v": torch.randn(1, 2, 6, 8, device="meta")}, RuntimeError, "v: expected the device of q"),
    ({name: torch.ones(1, 2, 6, 8, dtype=torch.int64) for name in "qkv"}, RuntimeError, "q: expected dtype float16, bfloat16"),
    ({name: torch.ones(1, 2, 6, 8, dtype=torch.complex64) for name in "qkv"}, RuntimeError, "got torch.complex64"),
    ({"q": torch.ones(6, 8).to_sparse()}, RuntimeError, "q: expected a dense"),
    ({"k": torch.randn(8)}, RuntimeError, "k: expected at least 2 dimensions"),
    ({"k": torch.randn(1, 2, 6, 9)}, RuntimeError, "k: expected the head size of q, 8, got 9"),
    ({"v": torch.randn(1, 2, 7, 8)}, RuntimeError, "v: expected the length of k, 6, got 7"),
    ({"v": torch.randn(1, 2, 6, 513)}, RuntimeError, "v: expected a head size of at most 512 in every dtype, got 513; larger"),
    ({"k": torch.randn(1, 3, 6, 8), "v": torch.randn(1, 3, 6, 8)}, RuntimeError, "k: expected a head count dividing 2, got 3"),
    ({"q": torch.randn(1, 6, 6, 8), "v": torch.randn(1, 3, 6, 8)}, RuntimeError, "v: expected the head count of k, 2, or 1"),
    ({"q": torch.randn(2, 2, 6, 8), "k": torch.randn(3, 2, 6, 8)}, RuntimeError, "expected batch dimensions that broadcast"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number.*got nan"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number.*got inf"),
    ({"scale": 1e39}, ValueError, "scale: expected a finite number, at most 2.3e"),
    ({"scale": 10**400}, ValueError, "scale: expected a finite number"),
    ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a number or None"),
    ({"scale": "1"}, TypeError, "scale: expected a number or None, got '1'"),
    ({"causal": "yes"}, TypeError, "causal: expected True or False"),
    ({"window": 5}, TypeError, r"window: expected a pair \(left, right\), got 5"),
    ({"window": (1, 2, 3)}, TypeError, "window: expected a pair"),
    ({"window": (-1, None)}, ValueError, "window: expected left to be at least 0, got -1; None is unbounded"),
    ({"window": (None, -2)}, ValueError, "window: expected right to be at least 0, got -2"),
    ({"window": (1.5, None)}, TypeError, "window: expected left to be an integer or None, got 1.5"),
    ({"window": (True, None)}, TypeError, "window: expected left to be an integer or None, got True"),
    ({"window": (torch.tensor([1]), None)}, TypeError, "window: expected left .* got a tensor of shape"),
    ({"window": (None, torch.tensor(1.0))}, TypeError, "window: expected right .* got a tensor of shape"),
    ({"window": [list(range(99))]}, TypeError, r"window: expected a pair .*, got \[\[0, 1, 2, 3, 4, 5, \.\.\.\]\]$"),
    ({"align": "left"}, ValueError, "align: expected 'top_left' or 'bottom_right', got 'left'"),
    ({"q": torch.randn(1, 2, 5, 8), "causal": True}, ValueError, "align: .* 5 queries and 6 keys"),
    ({"q": torch.randn(1, 2, 5, 8), "window": (3, None)}, ValueError, "align: expected"),
    ({"is_causal": True}, TypeError, "is_causal"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_attention_arguments_raise(changes, error, message, device):
    for name, x in changes.items():
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            changes = changes | {name: x.to(device)}
    with pytest.raises(error, match=message):
        attention(**good(device, **changes))


def test_window_takes_any_integer(device):
    tensors, expected = good(device), Problem((1,), 2, 2, 6, 6, 8, 8, torch.float32, (3, 0))
    for side in (np.int32(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8, device=device)):
        problem = packed_arguments.problem_of(**tensors, window=(side, np.int64(0)))
        assert problem == expected and type(problem.window[0]) is int


@pytest.mark.parametrize("name, dtype, gpu_name, message", [
    ("value", torch.float32, "RTX 4090", "value: expected a head size of at most 256 in float32 with the 101376 bytes of "
     "shared memory of RTX 4090, got 300; float16 and bfloat16 take up to 512"),
    ("query", torch.float16, "RTX 4090", "query: expected a head size of at most 512 in every dtype, got 600; larger heads, "
     "such as 576 with values of 512 (MLA), are not supported yet"),
])
def test_head_size_message_names_limit_and_remedy(name, dtype, gpu_name, message, monkeypatch):
    monkeypatch.setattr(arguments, "gpu_of", lambda device: gpu.named(gpu_name))
    x = SimpleNamespace(shape=(1, 1, 4, int(message.split("got ")[1][:3])), dtype=dtype, device=torch.device("cuda"))
    assert arguments.head_size_message(name, x) == message


def test_symbolic_floats_stay_symbols():
    env = ShapeEnv()
    symbol = env.create_unspecified_symbol(0.3, ConstantSource("p"), dynamic_dim=DimDynamic.DYNAMIC)
    p = env.create_symfloatnode(symbol, hint=0.3, source=ConstantSource("p"))
    assert arguments.check_probability(p) is p and arguments.check_scale(p, 8) is p
    assert not env.specializations and symbol in env.var_to_range


def test_nothing_but_q_k_v_may_be_positional(device):
    with pytest.raises(TypeError, match="positional"):
        attention(*good(device).values(), 0.5)


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="q: expected a tensor on a GPU.*TRITON_INTERPRET=1"):
        attention(**good("cpu"))


def test_float64_is_for_the_interpreter(monkeypatch, device):
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    tensors = {name: x.to("meta", torch.float64) for name, x in good("cpu").items()}
    with pytest.raises(RuntimeError, match="float64 in Triton's interpreter only"):
        attention(**tensors)


def test_without_triton(monkeypatch, device):
    monkeypatch.setattr(arguments, "TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        attention(**good(device))


# --- torch's door

@pytest.mark.parametrize("shapes, options", [
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)), {}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)), {"is_causal": True}),
    (((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 4)), {"is_causal": True, "scale": 0.3}),
    (((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)), {"enable_gqa": True}),
    (((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {}),
    (((2, 3, 5, 8), (1, 1, 7, 8), (2, 1, 7, 8)), {}),
    (((5, 8), (7, 8), (7, 8)), {"is_causal": True}),
    (((5, 8), (7, 8), (7, 0)), {}),
    (((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {}),
    (((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)), {}),
    (((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {}),
    (((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 8)), {}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)), {}),
    (((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)), {}),
    (((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)), {}),
], ids=str)
def test_as_torch_does(shapes, options, device):
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    ours = scaled_dot_product_attention(q, k, v, **options)
    # the fused kernels of torch 2.11 crash where there are no heads
    with sdpa_kernel(SDPBackend.MATH):
        torchs = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), (q, k, v), allow_unused=True, materialize_grads=True),
                               torch.autograd.grad(torchs.sum(), (q, k, v), allow_unused=True, materialize_grads=True),
                               atol=1e-5, rtol=1e-4)


def test_a_tensor_scale_as_torch_takes_it(device):
    q, k, v = good(device).values()
    expected = scaled_dot_product_attention(q, k, v, scale=0.5)
    assert torch.equal(scaled_dot_product_attention(q, k, v, scale=torch.tensor(0.5)), expected)
    with pytest.raises(TypeError, match="scale"):
        scaled_dot_product_attention(q, k, v, scale=torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("arguments, options, error, message", [
    ((None, 0.0, False, 0.5), {}, TypeError, "positional"),
    ((), {"causal": True}, TypeError, "causal"),
    ((None, 0.0, "no"), {}, TypeError, "is_causal: expected True or False, got 'no'"),
    ((), {"value": torch.randn(1, 2, 7, 8)}, RuntimeError, "value: expected the length of key, 6, got 7"),
    ((), {"query": torch.randn(1, 4, 6, 8)}, RuntimeError, "expected as many heads as query or one.*enable_gqa=True"),
    ((), {"query": torch.randn(1, 5, 6, 8), "enable_gqa": True}, RuntimeError, "key: expected a head count dividing 5, got 2"),
    ((), {"query": torch.randn(6, 8), "enable_gqa": True}, IndexError, "enable_gqa: expected query, key and value"),
])
def test_wrong_sdpa_arguments_raise(arguments, options, error, message, device):
    tensors = dict(zip(("query", "key", "value"), good(device).values()))
    tensors |= {name: x.to(device) for name, x in options.items() if isinstance(x, torch.Tensor)}
    options = {name: x for name, x in options.items() if not isinstance(x, torch.Tensor)}
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*tensors.values(), *arguments, **options)
