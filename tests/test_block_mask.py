"""Block masks: the same numbers as from the mask alone, from fewer blocks."""

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  what the interpreter runs must see it
from torch.nn.attention import flex_attention as flex

from tests.helpers.tiers import slow, slow_rows
from tests.kernels.test_score_mods import tensors
from tritonattn import BlockMask, Config, Problem, attention, block_mask, config, reference, scaled_dot_product_attention
from tritonattn.block_mask import TILE
from tritonattn.kernels import forward, scores, window
from tritonattn.runtime import launch

N_Q, N_K = 300, 330
TILES = Config(128, 128, edge_stages=1)  # an interpreted step is slow whatever its size


VISITS = []
LOAD = scores.load_modifiers.fn


@triton.jit
def counted(row, col, n, M, N, scoring, MODE):
    """Record the tile and the mode, then load bias and mask. At module level, since the interpreter rewrites it."""
    VISITS.append((int(row.handle.data.item()) // TILE, int(col.handle.data.item()) // TILE, getattr(MODE, "value", MODE)))
    return LOAD(row, col, n, M, N, scoring, MODE)


def documents(n_q=N_Q, n_k=N_K, ends=(130, 260), device="cpu"):
    """Return booleans: queries attend to the keys of their own document."""
    rows, cols = torch.arange(n_q, device=device), torch.arange(n_k, device=device)
    of = torch.tensor(ends, device=device)
    return torch.bucketize(rows, of, right=True)[:, None] == torch.bucketize(cols, of, right=True)[None, :]


def masks(device):
    """Return masks of every kind: with empty, full and partial blocks; one per head; broadcast; of one kind of block alone."""
    block = torch.ones(N_Q, N_K, dtype=torch.bool, device=device)
    block[:, :TILE], block[:TILE, 200:] = False, False
    random = torch.rand(2, 2, N_Q, N_K, device=device, generator=torch.Generator(device).manual_seed(1)) > 0.5
    random[0, :, TILE:2 * TILE, :2 * TILE], random[1, 0, :, TILE:] = True, False
    return {
        "documents": documents(device=device), "block": block, "heads": random, "batches": random[:, :1],
        "columns": block[-1].expand(N_Q, N_K), "none": torch.zeros_like(block), "all": torch.ones_like(block),
    }


def test_kernels_use_the_same_block_size():
    assert window.TILE.value == TILE


@pytest.mark.parametrize("name", ["documents", "heads", "none", *slow("block", "batches", "columns", "all")])
def test_matches_the_reference(name, device):
    mask = masks(device)[name]
    leaves = tensors(device, batch=(2 if mask.dim() == 4 else 1,), n_q=N_Q, n_k=N_K)
    with config.pinned(Config(64, 32) if name == "documents" else TILES):
        o, lse = attention(*leaves, mask=block_mask(mask), return_lse=True)
        ours = torch.autograd.grad((o, lse), leaves, (torch.ones_like(o), lse.isfinite().float()))
        plain = attention(*leaves, mask=mask)
    torch.testing.assert_close(o, plain, atol=1e-5, rtol=1e-5)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o, lse = reference.attention(*exact, mask=mask, return_lse=True)
    true = torch.autograd.grad((o, lse), exact, (torch.ones_like(o), lse.isfinite().double()))
    for name, a, b in zip("qkv", ours, true):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4, msg=lambda text, of=name: f"d{of}: {text}")


@pytest.mark.parametrize("given", ["bias", *slow("window", "lengths", "dropout")])
def test_with_other_options(given, device):
    leaves = tensors(device, n_q=N_Q, n_k=N_K)
    others = {"window": {"window": (150, 20), "align": "top_left"}, "bias": {}, "dropout": {},
              "lengths": {"key_lengths": torch.tensor([0, 201], device=device), "causal": True, "align": "bottom_right"}}[given]
    if given == "bias":
        leaves.append(torch.randn(2, 1, N_K, device=device, requires_grad=True))
    if given == "dropout":
        others = {"dropout_p": 0.3, "dropout_seed": torch.tensor([5], device=device)}
    mask = masks(device)["heads" if given == "window" else "documents"]
    with config.pinned(TILES):
        found, plain = ([*torch.autograd.grad(attention(*leaves[:3], mask=given_mask, bias=(leaves[3:] or [None])[0],
                                                        **others).square().sum(), leaves)]
                        for given_mask in (block_mask(mask), mask))
    for a, b in zip(found, plain):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_grouped_heads_with_a_mask_per_head(device):
    leaves = tensors(device, batch=(1,), heads=4, kv_heads=2, n_q=N_Q, n_k=N_K)
    mask = torch.stack([documents(ends=ends, device=device) for ends in ((1, 2), (130, 260), (299,), ())])
    with config.pinned(TILES):
        ours, plain = (torch.autograd.grad(attention(*leaves, mask=given).square().sum(), leaves)
                       for given in (block_mask(mask), mask))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value, n_q", [(math.nan, 20), *slow_rows((math.nan, 132), (math.inf, 132))])
def test_masked_values_do_not_leak(value, n_q, device):
    # the nan_safe loop takes a few rows at a time, which is slow to interpret
    q, k, v = tensors(device, batch=(1,), heads=1, n_q=n_q, n_k=140)
    mask = documents(n_q, 140, (130,), device=device)
    with torch.no_grad():
        k[..., 130:, :], v[..., 130:, :] = value, value
    with config.pinned(TILES):
        o = attention(q, k, v, mask=block_mask(mask))
        gradients = torch.autograd.grad(o[:, :, :130].square().sum(), (q, k, v))
    first = reference.attention(*(x[:, :, :130] for x in (q, k, v)))
    torch.testing.assert_close(o[:, :, :130], first, atol=1e-5, rtol=1e-4)
    assert all(x[:, :, :130].isfinite().all() for x in gradients)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["documents", "block"])
def test_loops_visit_nonempty_blocks_only(name, monkeypatch):
    """Forward, dQ and dK/dV visit full blocks without a mask, partial ones with it, and empty ones never."""
    mask = masks("cpu")[name]
    given = block_mask(mask)
    q, k, v = tensors("cpu", batch=(1,), heads=1, n_q=N_Q, n_k=N_K, grad=False)
    for module in (forward, scores):
        monkeypatch.setattr(module, "load_modifiers", counted)
    found = {}
    with config.pinned(TILES):
        for kernel, leaf in (("dq", q), ("dkdv", k)):
            VISITS.clear()
            leaf.requires_grad_()
            o = attention(q, k, v, mask=given)
            found["forward"] = sorted(VISITS)
            VISITS.clear()
            torch.autograd.grad(o.sum(), leaf)
            found[kernel] = sorted(VISITS)
            leaf.requires_grad_(False)

    def expected(ragged_rows, ragged_cols):
        for i, rows in enumerate(mask.split(TILE, 0)):
            for j, tile in enumerate(rows.split(TILE, 1)):
                short = (ragged_rows and tile.shape[0] < TILE) or (ragged_cols and tile.shape[1] < TILE)
                if tile.any():
                    yield i, j, "unmasked" if tile.all() and not short else "masked_tail"

    assert found["forward"] == found["dq"] == list(expected(False, True))
    assert [(col, row, mode) for row, col, mode in found["dkdv"]] == sorted(expected(True, False), key=lambda at: at[1::-1])
    counts, modes = given.counts(), [mode for *_, mode in found["forward"]]
    assert counts == {"full": modes.count("unmasked"), "partial": modes.count("masked_tail"), "empty": 9 - len(modes)}
    assert counts["empty"] > 0


def test_empty_sizes(device):
    for n_q, n_k in ((0, 5), (5, 0), (0, 0)):
        given = block_mask(torch.ones(n_q, n_k, dtype=torch.bool, device=device))
        q, k, v = tensors(device, n_q=n_q, n_k=n_k)
        o = attention(q, k, v, mask=given)
        assert o.shape == q.shape and not o.any() and sum(given.counts().values()) == 0
        assert all(not x.any() for x in torch.autograd.grad(o.sum(), (q, k, v)))


def test_block_lists():
    full, partial, *blocks = block_mask(documents()).kv_blocks[1].tolist()
    # queries 128 and 129 are of the first document, the others up to 255 of the second, which ends with key 259
    assert (full, partial, blocks) == (0, 3, [0, 1, 2])
    # the last block of keys, 256 to 329, has no full block of queries: their last block is short
    assert block_mask(documents(ends=(128, 256))).q_blocks.tolist() == [[1, 0, 0, 1, 2], [1, 0, 1, 0, 2], [0, 1, 2, 0, 1]]


@pytest.mark.slow
def test_compiled_and_under_vmap(device):
    mask = documents(device=device)
    given = block_mask(mask)
    q, k, v = tensors(device, n_q=N_Q, n_k=N_K, heads=1, grad=False)
    plain = attention(q, k, v, mask=mask)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask=given), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), plain, atol=1e-5, rtol=1e-5)
    batched = torch.vmap(lambda q, k, v: attention(q, k, v, mask=given))(q, k, v)
    torch.testing.assert_close(batched, plain, atol=1e-5, rtol=1e-5)


def test_errors(device):
    q, k, v = tensors(device, n_q=20, n_k=36)
    mask = torch.ones(20, 36, dtype=torch.bool, device=device)
    given = block_mask(mask)
    with pytest.raises(TypeError, match="mask: expected a tensor, got NoneType"):
        block_mask(None)
    with pytest.raises(RuntimeError, match=r"expected booleans .*, got torch.float32 of shape \(20, 36\)"):
        block_mask(mask.float())
    with pytest.raises(RuntimeError, match="mask: expected a dense .* tensor, got torch.sparse_coo"):
        block_mask(mask.to_sparse())
    with pytest.raises(RuntimeError, match="a block mask of 20 queries and 36 keys, got one of shape"):
        attention(q, k, v, mask=block_mask(mask[:1]))
    with pytest.raises(RuntimeError, match="that broadcasts to"):
        attention(q, k, v, mask=block_mask(mask.expand(3, 1, 20, 36)))
    with config.pinned(Config(256, 64)), pytest.raises(ValueError, match="blocks of at most 128.*got 256x64w4s2"):
        attention(q, k, v, mask=given)
    mask[0] = False
    with pytest.raises(RuntimeError, match="got one that was changed since"):
        attention(q, k, v, mask=given)
    with torch.inference_mode():
        made_here = block_mask(torch.ones(20, 36, dtype=torch.bool, device=device))
        assert attention(q, k, v, mask=made_here).shape == q.shape


def test_made_in_compiled_code_and_moved(device):
    q, k, v = tensors(device, batch=(1,), heads=1, n_q=N_Q, n_k=N_K, grad=False)
    mask = torch.zeros(N_Q, N_K, dtype=torch.bool, device=device)
    mask |= documents(device=device)
    step = torch.compile(lambda mask, *x: attention(*x, mask=block_mask(mask)), backend="aot_eager", fullgraph=True)
    expected = attention(q, k, v, mask=mask)
    torch.testing.assert_close(step(mask, q, k, v), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(q, k, v, mask=block_mask(mask).to("cpu").to(device)), expected, atol=1e-5, rtol=1e-5)


class Holder(torch.nn.Module):
    """A module that holds a block mask, or takes it as an argument."""

    def __init__(self, held=None):
        super().__init__()
        self.held = held

    def forward(self, x, given=None):
        return attention(x, x, x, mask=self.held if given is None else given)


def save_and_load(x, save=torch.save, load=torch.load, **options):
    buffer = io.BytesIO()
    save(x, buffer)
    buffer.seek(0)
    return load(buffer, **options)


COPIES = {
    "deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.load, weights only": lambda x: save_and_load(x, weights_only=True),
    "torch.load": lambda x: save_and_load(x, weights_only=False), "to": lambda x: x.to(x.mask.device),
    "tree_map": lambda x: torch.utils._pytree.tree_map(torch.clone, x),
    "deepcopy of its module": lambda x: copy.deepcopy(Holder(x)).held,
    "pickle of its module": lambda x: pickle.loads(pickle.dumps(Holder(x))).held,
    "its module moved": lambda x: Holder(x)._apply(torch.clone).held,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_accepted_and_notices_changes(name, device):
    q, k, v = tensors(device, batch=(1,), heads=1, n_q=20, n_k=36, grad=False)
    mask = torch.ones(20, 36, dtype=torch.bool, device=device)
    mask[:, 30:] = False  # so that its version is not 0
    mine = COPIES[name](block_mask(mask))
    assert isinstance(mine, BlockMask) and torch.equal(mine.mask, mask)
    torch.testing.assert_close(attention(q, k, v, mask=mine), attention(q, k, v, mask=mask))
    mine.mask[0] = False
    with pytest.raises(RuntimeError, match="changed since; call block_mask.. again"):
        attention(q, k, v, mask=mine)
    with pytest.raises(RuntimeError, match="changed since"):
        attention(q, k, v, mask=COPIES[name](mine))


def test_a_module_moves_its_block_mask_and_keeps_it_out_of_its_state():
    held = Holder(block_mask(torch.ones(4, 4, dtype=torch.bool)))
    assert held.to("meta").held.kv_blocks.device.type == "meta" and not held.state_dict() and not list(held.buffers())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("held", [False, True], ids=["argument", "held"])
def test_export(held, strict, device):
    x = torch.randn(1, 1, N_Q, 16, device=device)
    given, other = (block_mask(documents(N_Q, N_Q, ends=ends, device=device)) for ends in ((130, 260), (128,)))
    arguments = (x,) if held else (x, given)
    program = torch.export.export(Holder(given if held else None), arguments, strict=strict)
    program = save_and_load(program, torch.export.save, torch.export.load)
    torch.testing.assert_close(program.module()(*arguments), attention(x, x, x, mask=given.mask), atol=1e-5, rtol=1e-5)
    if not held:
        torch.testing.assert_close(program.module()(x, other), attention(x, x, x, mask=other.mask), atol=1e-5, rtol=1e-5)


def test_errors_name_its_shape_and_not_its_values(device):
    q, k, v = tensors(device, n_q=20, n_k=36)
    with pytest.raises(TypeError, match="must be Tensor, not BlockMask\n.*got BlockMask of shape .20, 36.$") as error:
        scaled_dot_product_attention(q, k, v, block_mask(torch.ones(20, 36, dtype=torch.bool, device=device)))
    assert len(str(error.value)) < 300


def test_modes_of_the_loops():
    def problem(**given):
        return Problem((1,), 1, 1, 8, 8, 8, 8, torch.float16, **given)

    free = None, None
    assert launch.loop_modes(problem(), TILES, free, False) == (None, "unmasked", None)
    assert launch.loop_modes(problem(), TILES, (3, None), True) == ("masked", "unmasked", "masked_tail")
    assert launch.loop_modes(problem(masked=True), TILES, free, False) == (None, "neg_inf", None)
    listed = {"masked": True, "mapped": True}
    assert launch.loop_modes(problem(**listed), TILES, free, False) == (None, "unmasked", "masked_tail")
    assert launch.loop_modes(problem(bias=torch.float16, **listed), TILES, free, False) == (None, "neg_inf", "masked_tail")
    assert launch.loop_modes(problem(lengths=True, **listed), TILES, free, False) == (None, "masked", "masked_tail")
    assert launch.loop_modes(problem(**listed), TILES, (None, 0), False) == (None, "masked", "masked_tail")
    assert launch.loop_modes(problem(), Config(64, 64), (3, 0), False) == ("masked", "unmasked", "masked")


def flex_masks(device):
    """Return BlockMasks of FlexAttention with blocks of several sizes."""
    of = torch.bucketize(torch.arange(N_K), torch.tensor([130, 260]), right=True).to(device)
    sizes = {"B": None, "H": None, "Q_LEN": N_Q, "KV_LEN": N_K, "device": device}
    return {
        "documents": flex.create_block_mask(lambda b, h, i, j: of[i] == of[j], **sizes),
        "causal": flex.create_block_mask(lambda b, h, i, j: i >= j, **sizes, BLOCK_SIZE=64),
        "heads": flex.create_block_mask(lambda b, h, i, j: (i + h * 60 >= j) & (b < 1), **sizes | {"B": 2, "H": 2},
                                        BLOCK_SIZE=(128, 256)),
    }


@pytest.mark.parametrize("name", ["documents", "causal", "heads"])
def test_masks_of_flex_attention(name, device):
    given = flex_masks(device)[name]
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (N_Q, N_K, N_K))
    converted = block_mask(given)
    assert converted.mask.shape == (*((2, 2) if name == "heads" else (1, 1)), N_Q, N_K)
    assert name == "heads" or converted.counts()["empty"] > 0
    with config.pinned(TILES):
        ours = attention(q, k, v, mask=converted)
    torch.testing.assert_close(ours, flex.flex_attention(q, k, v, block_mask=given), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="a BlockMask of FlexAttention; convert it once, with tritonattn.block_mask"):
        attention(q, k, v, mask=given)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_lists_of_flex_attention(causal, full):
    """A block that no list holds is skipped, whatever the function is; in a full one it does not count."""
    rng, size = torch.Generator().manual_seed(0), (64, 32)
    order = torch.rand(2, 3, 5, 11, generator=rng).argsort(-1).int()
    counts, full_counts = torch.randint(0, 5, (2, 2, 3, 5), generator=rng, dtype=torch.int32)
    lists = [(counts, order), *([(full_counts, order.flip(-1))] if full else [])]
    given = flex.BlockMask.from_kv_blocks(*(x for each in lists for x in each), BLOCK_SIZE=size, seq_lengths=(N_Q, N_K),
                                          mask_mod=(lambda b, h, i, j: i >= j) if causal else None)
    expected = torch.zeros(2, 3, N_Q, N_K, dtype=torch.bool)
    allowed = torch.ones(N_Q, N_K, dtype=torch.bool).tril() if causal else torch.ones(N_Q, N_K, dtype=torch.bool)
    for (numbers, indices), pairs in zip(lists, (allowed, torch.ones_like(allowed))):
        for batch, head, row in itertools.product(range(2), range(3), range(5)):
            for column in indices[batch, head, row, :numbers[batch, head, row]].tolist():
                block = slice(row * size[0], (row + 1) * size[0]), slice(column * size[1], (column + 1) * size[1])
                expected[batch, head][block] |= pairs[block]
    assert torch.equal(block_mask(given).mask, expected) and 0 < expected.sum() < expected.numel()


def test_flex_attention_is_not_imported_for_a_mask():
    """Its import takes longer than ours."""
    code = "import sys, torch, tritonattn; tritonattn.block_mask(torch.ones(3, 3, dtype=torch.bool)); " \
           "print('torch.nn.attention.flex_attention' in sys.modules)"
    plain = "import sys, torch; print('torch.nn.attention.flex_attention' in sys.modules)"
    ours, torchs = (subprocess.run([sys.executable, "-c", each], capture_output=True, text=True, check=True).stdout
                    for each in (code, plain))
    assert ours == torchs
