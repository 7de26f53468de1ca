"""Small cases that reach every branch of the kernels: windows, parts of a tile, NaN behind a mask, far strides, score mods.

The order counts: the mutation check (tests/mutation) stops at the first failure, so cheap and sensitive cases come first.
"""

import itertools

import pytest
import torch

from tests.helpers.cases import TILES, Case, check, results
from tests.helpers.tiers import slow
from tests.runtime.test_launch import huge
from tritonattn import Config, attention, block_mask, config, reference
from tritonattn.kernels import backward, forward, tile

pytestmark = pytest.mark.interpreted

FLOAT64 = {
    "window": ((32, 16), {"n_q": 70, "n_k": 70, "window": (7, 4), "d": 24}),
    "gqa, ragged, split": ((16, 32), {"n_q": 37, "n_k": 37, "heads": 2, "d": 40, "dv": 72}),
    "causal, more keys": ((16, 16), {"n_q": 37, "n_k": 70, "causal": True, "align": "bottom_right"}),
    "rows without keys": ((16, 32), {"n_q": 70, "n_k": 37, "causal": True, "align": "bottom_right", "scale": -0.7}),
    "causal, more queries": ((16, 16), {"n_q": 70, "n_k": 33, "causal": True, "dv": 96, "scale": 0.0}),
    "causal, aligned": ((32, 16), {"n_q": 32, "n_k": 64, "causal": True}),
    "left": ((16, 32), {"n_q": 70, "n_k": 64, "window": (9, None), "layout": "strided"}),
    "wide window": ((16, 16), {"n_q": 80, "n_k": 80, "window": (40, 33), "layout": "columns"}),
    "expanded": ((16, 64), {"n_q": 20, "n_k": 20, "heads": 2, "kv_heads": 2, "layout": "expanded"}),
    "bias of a head, window": ((16, 32), {"n_q": 33, "n_k": 33, "heads": 2, "pairs": ("head-bias",), "window": (7, 4)}),
    "bias, causal": ((32, 32), {"n_q": 17, "n_k": 50, "heads": 2, "kv_heads": 2, "batch": (2,), "pairs": ("bias",),
                                "causal": True, "align": "bottom_right", "scale": -0.7}),
    "key bias and mask": ((32, 32), {"n_q": 40, "n_k": 33, "heads": 2, "batch": (2,), "pairs": ("key-bias", "mask")}),
    "statistics": ((16, 32), {"n_q": 40, "n_k": 50, "heads": 2, "stats": ("entropy", "key_mass"), "causal": True}),
}


def test_parts_of_a_tile_are_the_narrowest():
    """The widths are powers of two, at least 16; no choice of at most two is narrower, and none of one part is as narrow."""
    powers = [2**i for i in range(4, 10)]
    for size in range(1, 513):
        parts = [tile.main_width(size)] + [tile.tail_width(size)] * tile.has_two_parts(size)
        assert sum(parts) == min(x for x in (*powers, *map(sum, itertools.combinations(powers, 2))) if x >= size), size
        assert len(parts) == 1 or sum(parts) not in powers, size
        assert set(parts) <= set(powers) and parts == sorted(parts, reverse=True), size


@pytest.mark.parametrize("name", FLOAT64)
def test_float64_matches_the_definition(name, device):
    tiles, case = FLOAT64[name]
    check(Case(**case), torch.float64, device, tiles=Config(*tiles))


AHEAD = ["window", "gqa, ragged, split", "key bias and mask", "statistics"]


@pytest.mark.parametrize("name", [*AHEAD, *slow(*(name for name in FLOAT64 if name not in AHEAD))])
def test_float64_with_products_started_ahead(name, device):
    tiles, case = FLOAT64[name]
    check(Case(**case), torch.float64, device, tiles=Config(*tiles, ahead=True))


TWO_PASSES = ["gqa, ragged, split", "key bias and mask", "statistics"]


@pytest.mark.parametrize("name", [*TWO_PASSES, *slow(*(name for name in FLOAT64 if name not in TWO_PASSES))])
def test_float64_in_two_passes(name, device):
    tiles, case = FLOAT64[name]
    check(Case(**case), torch.float64, device, tiles=Config(*tiles, ahead=True, two_passes=True))


@pytest.mark.parametrize("options", [{"key_lengths": torch.tensor([40, 17]), "dropout_p": 0.3,
                                      "dropout_seed": torch.tensor([5])}, {"window": (9, 3)}], ids=["lengths, dropout", "nan"])
def test_two_passes_give_the_bits_of_one(options, device):
    """With NaN behind a window, tiles of both passes are computed again."""
    tensors = Case(batch=(2,), heads=4, kv_heads=2, n_q=50, n_k=50).tensors(torch.bfloat16, device)
    if "window" in options:
        tensors[1][..., 30, :] = torch.nan
    outcomes = []
    for two_passes in (False, True):
        with config.pinned(Config(16, 32, two_passes=two_passes)):
            outcomes.append(results(attention, *tensors, **options))
    torch.testing.assert_close(*outcomes, atol=0, rtol=0, equal_nan=True)
    # o, lse, dq, dk, dv
    assert "window" not in options or 0 < outcomes[0][3].isnan().sum() < outcomes[0][3].numel()


@pytest.mark.parametrize("options", [{"key_lengths": torch.tensor([40, 17])}, {"causal": True}], ids=["lengths", "causal"])
def test_dropout_with_products_started_ahead(options, device):
    tensors = Case(batch=(2,), n_q=50, n_k=50).tensors(torch.float64, device)
    options = options | {"dropout_p": 0.3, "dropout_seed": torch.tensor([5])}
    outcomes = []
    for ahead in (False, True):
        with config.pinned(Config(16, 16, ahead=ahead)):
            outcomes.append(results(attention, *tensors, **options))
    torch.testing.assert_close(*outcomes, atol=1e-12, rtol=1e-12)


def test_no_keys_with_products_started_ahead(device):
    q, k, v = Case(n_q=5, n_k=5).tensors(torch.float32, device)[:3]
    mask = block_mask(torch.ones(5, 0, dtype=torch.bool, device=device))
    with config.pinned(Config(16, 16, ahead=True)):
        assert torch.all(attention(q, k[:, :, :0], v[:, :, :0], mask=mask) == 0)


@pytest.mark.parametrize("two_passes", [False, *slow(True)])
def test_block_mask_with_products_started_ahead(two_passes, device):
    q, k, v, do, dlse = Case(n_q=300, n_k=280).tensors(torch.float64, device)
    i, j = torch.arange(300, device=device)[:, None], torch.arange(280, device=device)
    mask = (i // 150 == j // 140) | (j < 128)
    with config.pinned(Config(64, 32, ahead=True, two_passes=two_passes)):
        ours = results(attention, q, k, v, do, dlse, mask=block_mask(mask))
    torch.testing.assert_close(ours, results(reference.attention, q, k, v, do, dlse, mask=mask), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [{"dropout_p": 0.4, "dropout_seed": torch.tensor([3])}, {"causal": True},
                                  {"bias": torch.randn(50, generator=torch.Generator().manual_seed(2))}],
                         ids=["dropout", "causal", "bias"])
def test_sums_by_tensor_cores_are_those_by_additions(case, dtype, device):
    q, k, v = Case(n_q=50, n_k=50, dv=40).tensors(dtype, device)[:3]
    outputs = []
    for mma_sum in (False, True):
        with config.pinned(Config(32, 32, mma_sum=mma_sum)):
            outputs.append(attention(q, k, v, return_lse=True, **case))
    # bfloat16 weights are truncated for additions and rounded for the tensor cores: half a unit in the last place
    torch.testing.assert_close(*outputs, atol=2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


def assert_same(tensors, tolerance=1e-9, **options):
    ours, expected = (results(function, *tensors, **options) for function in (attention, reference.attention))
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=1e-9)


def test_three_batch_dimensions_that_do_not_merge(device):
    q, k, v, do, dlse = Case(batch=(2, 2, 2), n_q=5, n_k=5).tensors(torch.float64, device)
    q = q.permute(2, 1, 0, 3, 4, 5).contiguous().permute(2, 1, 0, 3, 4, 5)
    assert_same((q, k[:, :1].expand(k.shape), v, do, dlse))


@pytest.mark.parametrize("batch", [(2, 1), (1, 3)], ids=str)
def test_bias_of_some_batches(batch, device):
    """The bias is broadcast over one batch dimension, so that the two do not merge, and its gradient is summed over it."""
    tensors = Case(batch=(2, 3), n_q=5, n_k=5).tensors(torch.float64, device)
    assert_same(tensors, bias=torch.randn(*batch, 1, 5, 5, dtype=torch.float64, device=device))


def test_scores_far_below_zero(device):
    """Scores near -1e4: the score 0 of a key past the end would outweigh all others."""
    q, k, v, do, dlse = Case(n_q=37, n_k=37).tensors(torch.float64, device)
    q[..., 0], k[..., 0] = 1, -1e4 * 4
    with config.pinned(TILES):
        assert_same((q, k, v, do, dlse), tolerance=1e-6)


def test_row_whose_scores_are_all_minus_infinity(device):
    """Like a row that attends to no key: its weights are 0, also where the kernel evaluates no mask."""
    q, k, v, do, _ = Case(n_q=32, n_k=32).tensors(torch.float64, device)
    q[..., 0], k[..., 0] = -1, torch.inf
    with config.pinned(TILES):
        o, lse = attention(q, k, v.requires_grad_(), return_lse=True)
        dv, = torch.autograd.grad(o, v, do)
    assert torch.all(o == 0) and torch.all(lse == -torch.inf) and torch.all(dv == 0)


def attend_row_by_row(q, k, v, *, window, align, return_lse):
    """The definition on the keys that each row attends to: NaN in other keys cannot take part."""
    visible, group = reference.visible(q.shape[2], k.shape[2], window=window, align=align), q.shape[1] // k.shape[1]
    o, lse = [], []
    for head, i in itertools.product(range(q.shape[1]), range(q.shape[2])):
        s = k[0, head // group, visible[i]] @ q[0, head, i] * q.shape[-1] ** -0.5
        o.append(s.softmax(0) @ v[0, head // group, visible[i]])
        lse.append(s.logsumexp(0))
    return torch.stack(o).view(*q.shape[:3], -1), torch.stack(lse).view(q.shape[:3])


def spoiled(first_rows, dtype=torch.float64, **case):
    """Tensors of a case with NaN or infinities in those that `first_rows` names, from that row on, each in another head."""
    q, k, v, do, _ = tensors = Case(**case).tensors(dtype, "cpu")
    v.abs_()  # an infinity in do then makes dP one infinity, and dP - delta NaN in whatever order delta is summed
    for i, (name, x) in enumerate({"k": k, "v": v, "q": q, "do": do}.items()):
        if name in first_rows:
            rows = x[0, i % x.shape[1], first_rows[name]:]
            rows[0, -1] = torch.nan if name in "kq" else torch.inf
            if name == "v":
                rows[1, 0], rows[0, 1], rows[1, 1] = -torch.inf, torch.inf, -torch.inf
    return tensors


NON_FINITE = {
    "causal": ((32, 16), (None, 0), "top_left", {"k": 30, "v": 30, "q": 8, "do": 8},
              {"n_q": 32, "n_k": 32, "heads": 4, "kv_heads": 2}),
    "left": ((32, 16), (12, None), "top_left", {"k": 3, "v": 3, "q": 28, "do": 28},
            {"n_q": 32, "n_k": 32, "heads": 4, "kv_heads": 4}),
    "window": ((16, 32), (7, 4), "top_left", {"k": 6, "v": 6, "q": 29, "do": 29},
               {"n_q": 37, "n_k": 37, "heads": 2, "kv_heads": 2, "d": 40, "dv": 72}),
    "bottom right": ((32, 16), (None, 0), "bottom_right", {"k": 36, "v": 36, "q": 6, "do": 6},
                     {"n_q": 24, "n_k": 47, "heads": 4, "kv_heads": 4}),
    "bfloat16": ((32, 16), (None, 0), "top_left", {"k": 30, "v": 30},
                 {"n_q": 32, "n_k": 32, "heads": 2, "kv_heads": 2, "dv": 40, "dtype": torch.bfloat16}),
    "float16": ((16, 32), (None, 0), "top_left", {"q": 20, "do": 20},
                {"n_q": 32, "n_k": 32, "heads": 4, "kv_heads": 4, "d": 64, "dtype": torch.float16}),
}


@pytest.mark.parametrize("name", NON_FINITE)
def test_nan_and_infinity_reach_unmasked_pairs_only(name):
    tiles, window, align, first_rows, case = NON_FINITE[name]
    tensors, options = spoiled(first_rows, **case), {"window": window, "align": align}
    with config.pinned(Config(*tiles)):
        ours = results(attention, *tensors, **options)
    expected = results(attend_row_by_row, *(x.double() for x in tensors), **options)
    tolerance = 0.1 if "dtype" in case else 1e-9
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance, equal_nan=True, check_dtype=False)


def test_weight_that_rounds_to_zero_times_infinity_is_nan(device):
    """With a mask as without: the NaN-safe loop also counts weights that are 0 only in the dtype of the values."""
    q, k, v = (torch.zeros(1, 1, 16, 16, dtype=torch.float16, device=device) for _ in range(3))
    q[..., 0], k[..., 0, 0], v[..., 0, :] = 1, -80, torch.inf  # a weight of e^-20, 2e-9
    with config.pinned(Config(16, 16)):
        assert attention(q, k, v).isnan().all()
        assert attention(q, k, v, mask=torch.ones(16, dtype=torch.bool, device=device)).isnan().all()


def test_one_gradient_alone_is_nan_safe():
    *inputs, do, dlse = spoiled({"q": 8, "do": 8}, n_q=24, n_k=24, heads=2, kv_heads=2, d=40)
    options = {"window": (None, 0), "align": "top_left"}
    exact = results(attend_row_by_row, *inputs, do, dlse, **options)[2:]
    for x, expected in zip(inputs, exact):
        x.requires_grad_()
        with config.pinned(Config(32, 16)):
            ours, = torch.autograd.grad(attention(*inputs, **options, return_lse=True), x, (do, dlse))
        x.requires_grad_(False)
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9, equal_nan=True)


I, J = torch.arange(48)[:, None], torch.arange(48)
OVERFLOWS = {  # options, and the pairs that they leave unmasked
    "causal": ({"causal": True}, J <= I),
    "window": ({"window": (9, 4)}, (J >= I - 9) & (J <= I + 4)),
    "padding": ({"mask": J < 29}, (J < 29) & (I >= 0)),
    "padding as bias": ({"bias": torch.where(J < 29, 0.0, -torch.inf)}, (J < 29) & (I >= 0)),
    "block mask": ({"mask": block_mask(I // 20 == J // 20)}, I // 20 == J // 20),
}


@pytest.fixture
def count_steps(monkeypatch):
    """Return a function that calls another; it returns the result, and the steps of all loops and of those in mode nan_safe."""
    steps = []

    def counted(function):
        def call(*arguments):
            steps.append(getattr(arguments[-1], "value", arguments[-1]))  # the mode, but for `attended`
            return function(*arguments)
        return call

    for module, name in ((forward, "modify"), (backward, "scores"), (backward, "attended")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))

    def count(function, *arguments, **options):
        steps.clear()
        return function(*arguments, **options), len(steps), steps.count("nan_safe")

    return count


@pytest.mark.parametrize("name", OVERFLOWS)
@pytest.mark.parametrize("rows", [slice(None), slice(40, 41)], ids=["all rows", "one row"])
def test_overflow_is_cheap(name, rows, count_steps):
    """A step whose cotangent overflows, as it may with a gradient scaler, takes at most twice as many steps of loops.

    Gradients are not finite exactly where an unmasked pair makes them so.
    """
    options, pairs = OVERFLOWS[name]
    q, k, v, do, dlse = Case(n_q=48, n_k=48, heads=2, kv_heads=1).tensors(torch.float64, "cpu")
    exact = results(reference.attention, q, k, v, do.index_fill(-2, I[rows, 0], 0), dlse, mask=pairs)
    with config.pinned(Config(32, 16)):
        usual = count_steps(results, attention, q, k, v, do, dlse, **options)[1]
        do[..., rows, :], do[..., rows, ::2] = torch.inf, torch.nan
        ours, steps, nan_safe = count_steps(results, attention, q, k, v, do, dlse, **options)
    # one row that overflows makes a few others of its tile NaN, which are recomputed
    assert steps <= 2 * usual and nan_safe <= (0 if rows == slice(None) else usual)
    finite, bad_keys = J < 0, pairs[rows].any(0)
    bad_rows = torch.zeros(48, dtype=torch.bool).index_fill(0, I[rows, 0], pairs.any())
    for x, expected, bad in zip(ours, exact, (finite, finite, bad_rows, bad_keys, bad_keys)):
        assert torch.equal(x[0, 0].view(48, -1).isfinite().all(-1), ~bad)
        torch.testing.assert_close(x[0, 0][~bad], expected[0, 0][~bad])


@pytest.mark.parametrize("case, dtype", [({"dv": 64}, torch.bfloat16), ({"dv": 72, "causal": True}, torch.bfloat16),
                                         ({"dv": 64}, torch.float16)], ids=["one part", "two parts", "float16"])
def test_dq_of_uniform_data_is_precise(case, dtype, device):
    """dS is a small difference there: the rounding error of o must be added back."""
    q, k, v, do, dlse = Case(n_q=64, n_k=64, d=64, **case).tensors(dtype, device, family="uniform")
    ours = results(attention, q, k, v, do, 0 * dlse)[2].double()
    exact = results(reference.attention, *(x.double() for x in (q, k, v, do, 0 * dlse)))[2]
    assert (ours - exact).norm() < 0.01 * exact.norm()


def test_a_bias_with_far_columns():
    """Columns of one tile are near enough for 32-bit offsets, those of different tiles are not."""
    q, k, v = Case(n_q=4, n_k=56).tensors(torch.float16, "cpu")[:3]
    bias = huge((4, 56), (1, 2**26 - 64))
    with config.pinned(Config(16, 16)):
        ours = attention(q, k, v, bias=bias)
    torch.testing.assert_close(ours, reference.attention(q, k, v, bias=bias), atol=2e-3, rtol=2e-3)


def test_a_cotangent_of_lse_with_far_strides():
    """All statistics of rows are dense tensors of our own, except the cotangent of lse."""
    q, k, v = (x.requires_grad_() for x in Case().tensors(torch.float32, "cpu")[:3])
    dlse = huge((1, 1, 40), (8, 8, 2**26), torch.float32)
    with config.pinned(Config(16, 16)):
        ours = torch.autograd.grad(attention(q, k, v, return_lse=True)[1], (q, k), dlse)
    torch.testing.assert_close(ours, torch.autograd.grad(reference.attention(q, k, v, return_lse=True)[1], (q, k), dlse))
