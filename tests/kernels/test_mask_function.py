"""Masks that a function of the user's own computes in the kernels, with lists of their blocks."""

import copy
import io
import math
import pickle

import pytest
import torch
import triton
import triton.language as tl

from tests.helpers.cases import assert_exact, results, tensors
from tests.helpers.memory import noted
from tests.helpers.score_functions import Both
from tests.helpers.tiers import slow
from tritonattn import (
    BlockMask,
    Config,
    Problem,
    attention,
    attention_map,
    attention_varlen,
    block_mask,
    config,
    create_block_mask,
    explain,
    tune,
    warm,
)
from tritonattn.analysis.check_score_function import dense_mask
from tritonattn.block_mask import TILE
from tritonattn.kernels import functions, scores
from tritonattn.runtime import plan

N_Q, N_K = 300, 330
TILES = Config(32, 64)


@triton.jit
def documents(batch, head, query, key, payload):
    return tl.load(payload + query) == tl.load(payload + key)


@triton.jit
def stripes(batch, head, query, key, payload):
    """Depends on the batch and the head, on no payload, and leaves blocks of each kind."""
    return (key < 200 + 64 * head) & ((query >= TILE_OF_TEST) | ((key + batch) % 3 != 0))


@triton.jit
def columns(batch, head, query, key, payload):
    return key % 5 != 0


@triton.jit
def other_columns(batch, head, query, key, payload):
    return key % 5 != 1


@triton.jit
def nothing(batch, head, query, key, payload):
    return key < 0


TILE_OF_TEST = tl.constexpr(128)


def document_of(device):
    return torch.bucketize(torch.arange(N_K, device=device), torch.tensor([130, 260], device=device), right=True).int()


def made(name, device):
    """Return the block mask of a function, and its booleans by torch."""
    batch, head, query, key = torch.meshgrid(*(torch.arange(n, device=device) for n in (2, 2, N_Q, N_K)), indexing="ij")
    if name == "documents":
        payload = document_of(device)
        pairs = payload[query[:1, :1]] == payload[key[:1, :1]]
        return create_block_mask(documents, (1, 1, N_Q, N_K), payload=payload / 8), pairs
    pairs = {"stripes": (key < 200 + 64 * head) & ((query >= 128) | ((key + batch) % 3 != 0)), "columns": key % 5 != 0,
             "nothing": key < 0}[name]
    shape = (2, 2, N_Q, N_K) if name == "stripes" else (1, 1, N_Q, N_K)
    function = {"stripes": stripes, "columns": columns, "nothing": nothing}[name]
    return create_block_mask(function, shape, device=device), pairs if name == "stripes" else pairs[:1, :1]


ALL = pytest.mark.parametrize("name", ["documents", "stripes", *slow("columns", "nothing")])


@pytest.mark.parametrize("name", ["documents", "stripes", "columns", "nothing"])
def test_the_blocks_are_those_of_the_booleans(name, device):
    mask, pairs = made(name, device)
    expected = block_mask(pairs)
    assert torch.equal(mask.kv_blocks, expected.kv_blocks) and torch.equal(mask.q_blocks, expected.q_blocks)
    assert mask.shape == tuple(pairs.shape) and mask.mask is None and mask.counts() == expected.counts()
    assert torch.equal(dense_mask(mask), pairs) and repr(mask) == f"BlockMask of shape {tuple(pairs.shape)}"


@ALL
@pytest.mark.interpreted
@pytest.mark.parametrize("tiles", [TILES, Config(128, 128, edge_stages=1)], ids=str)
def test_matches_the_definition(tiles, name, device):
    mask, pairs = made(name, device)
    given = tensors(device, heads=2, kv_heads=1, n_q=N_Q, n_k=N_K)
    assert_exact(given, tiles, ours_only={"mask": mask}, exact_only={"mask": pairs})


@ALL
@pytest.mark.interpreted
@pytest.mark.parametrize("options", [
    {"causal": True, "align": "bottom_right"}, {"window": (40, 9), "align": "top_left"}, {"normalizer": "relu"},
    {"key_lengths": torch.tensor([300, 100])}, {"bias": torch.linspace(-1, 1, N_K, dtype=torch.float64)},
    {"alibi": torch.tensor([0.5, 0.125]), "align": "top_left"}, {"return_stats": ("max", "entropy", "key_mass")},
], ids=lambda options: next(iter(options)))
def test_with_other_options(options, name, device):
    """Gradients of biases and slopes evaluate the function in blocks of every kind."""
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    mask, pairs = made(name, device)
    given = tensors(device, heads=2, kv_heads=2, n_q=N_Q, n_k=N_K)
    assert_exact(given, TILES, ours_only={"mask": mask}, exact_only={"mask": pairs}, **options)


@pytest.mark.interpreted
def test_beside_a_score_function(device):
    """Each has a payload of its own."""
    mask, pairs = made("documents", device)
    given = tensors(device, n_q=N_Q, n_k=N_K)
    assert_exact(given, TILES, ours_only={"mask": mask}, exact_only={"mask": pairs}, score_function=Both("penalty", device))


VISITED = []
CALL = functions.call_mask_function.fn


@triton.jit
def counted(FUNCTION, row, col, n, M, N, view, TRANSPOSED):
    """Record the tile, then call the function. At module level, since the interpreter rewrites it."""
    VISITED.append((int(row.handle.data.item()) // TILE, int(col.handle.data.item()) // TILE))
    return CALL(FUNCTION, row, col, n, M, N, view, TRANSPOSED)


@pytest.mark.interpreted
def test_the_function_is_evaluated_in_partial_blocks_alone(device, monkeypatch):
    mask, _ = made("documents", device)
    leaves = [x.requires_grad_() for x in tensors(device, torch.float32, batch=(1,), heads=1, kv_heads=1, n_q=N_Q, n_k=N_K)[:3]]
    monkeypatch.setattr(scores, "call_mask_function", counted)
    VISITED.clear()
    with config.pinned(Config(128, 128, edge_stages=1)):
        o = attention(*leaves, mask=mask)
        # the first document ends in block 1, the second one in block 2; the block (2, 2) ends with the lengths
        partial = [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
        assert sorted(VISITED) == partial
        VISITED.clear()
        torch.autograd.grad(o.sum(), leaves)
    assert sorted(VISITED) == sorted(partial * 2), "dQ and dK/dV"


@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_what_the_function_masks_has_no_effect(hidden, device):
    mask, _ = made("documents", device)
    q, k, v, do, dlse = tensors(device, torch.float32, n_q=N_Q, n_k=N_K)
    clean = [x.clone() for x in (q, k, v)]
    # keys that only the last document sees, which begins in the middle of a block
    k[..., 265, :], v[..., 270, 0] = hidden, hidden
    with config.pinned(TILES):
        ours = results(attention, q, k, v, do, dlse, mask=mask)
        exact = results(attention, *clean, do, dlse, mask=mask)
    for mine, other in zip(ours[:3], exact[:3], strict=True):
        torch.testing.assert_close(mine[:, :, :260], other[:, :, :260], atol=1e-6, rtol=1e-6)
    for mine, other in zip(ours[3:], exact[3:], strict=True):
        torch.testing.assert_close(mine[:, :, :260], other[:, :, :260], atol=1e-6, rtol=1e-6)
    assert not ours[0][:, :, 260:].isfinite().all()


def test_no_memory_of_the_size_of_the_scores(device, monkeypatch):
    taken, n = [], 1024
    for home, names in ((torch, ("empty", "zeros", "empty_like")), (torch.Tensor, ("new_empty", "new_zeros", "clone", "to"))):
        for name in names:
            monkeypatch.setattr(home, name, noted(getattr(home, name), taken))
    mask = create_block_mask(columns, (1, 1, n, n), device=device)
    assert max(taken) == TILE * n and sum(x.numel() for x in mask._tensors() if x is not None) < n


def test_known_calls_take_the_function_that_is_given(device):
    q, k, v, *_ = tensors(device, torch.float32, heads=2, n_q=N_Q, n_k=N_K)
    for _ in range(2):
        for name in ("documents", "stripes", "columns", "nothing"):
            mask, pairs = made(name, device)
            torch.testing.assert_close(attention(q, k, v, mask=mask), attention(q, k, v, mask=pairs), atol=1e-5, rtol=1e-5)
    # masks without payloads and of one shape differ in their functions alone, these two in their blocks too
    first, second = (create_block_mask(function, (1, 1, 300, 330), device=device) for function in (columns, other_columns))
    assert torch.equal(first.kv_blocks, second.kv_blocks)
    assert not torch.equal(attention(q, k, v, mask=first), attention(q, k, v, mask=second))
    # a mask of other lengths
    other = create_block_mask(columns, (1, 1, N_Q + 1, N_K), device=device)
    with pytest.raises(RuntimeError, match="expected a block mask of 300 queries and 330 keys, got one of shape"):
        attention(q, k, v, mask=other)


def test_a_change_of_the_payload_is_noticed(device):
    mask, _ = made("documents", device)
    q, k, v, *_ = tensors(device, torch.float32, n_q=N_Q, n_k=N_K)
    attention(q, k, v, mask=mask)
    assert mask.is_current()
    mask.payload.add_(1)
    assert not mask.is_current()
    with pytest.raises(RuntimeError, match=r"the payload as it was when create_block_mask\(\) read it"):
        attention(q, k, v, mask=mask)


def loaded(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {"deepcopy": copy.deepcopy, "load": loaded, "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
          "to": lambda mask: mask.to("cpu", torch.float16)}


@pytest.mark.interpreted
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", ["documents", "columns"])
def test_copies_keep_the_function(name, copied):
    mask, pairs = made(name, "cpu")
    again, stale = COPIES[copied](mask), made(name, "cpu")[0]
    assert (again.function, again.shape) == (mask.function, mask.shape) and again.is_current()
    # `to` moves the mask itself
    assert again.payload is None or again.payload.dtype == torch.float32
    q, k, v, *_ = tensors("cpu", torch.float32, heads=1, kv_heads=1, n_q=N_Q, n_k=N_K)
    torch.testing.assert_close(attention(q, k, v, mask=again), attention(q, k, v, mask=pairs), atol=1e-5, rtol=1e-5)
    if stale.payload is not None:
        stale.payload.add_(1)
        assert not COPIES[copied](stale).is_current()


@pytest.mark.parametrize("name", ["documents", "columns"])
def test_compiled_and_exported(name, device):
    torch._dynamo.reset()
    mask, _ = made(name, device)
    q, k, v, *_ = tensors(device, torch.float32, heads=1, kv_heads=1, batch=(1,), n_q=N_Q, n_k=N_K)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return attention(q, k, v, mask=mask)

    expected = Layer()(q, k, v, mask)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), expected)
    program = torch.export.export(Layer(), (q, k, v, mask))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(q, k, v, mask), expected)


def test_maps_and_vmap(device):
    mask, pairs = made("documents", device)
    q, k, v, *_ = tensors(device, torch.float32, batch=(2, 1), heads=1, kv_heads=1, n_q=N_Q, n_k=N_K)
    ours, exact = (attention_map(q[0], k[0], mask=each) for each in (mask, pairs))
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    mapped = torch.vmap(lambda q, k, v: attention(q, k, v, mask=mask))(q, k, v)
    torch.testing.assert_close(mapped, attention(q, k, v, mask=pairs), atol=1e-5, rtol=1e-5)
    # batches count in the mapped function
    q, k, v, *_ = tensors(device, torch.float32, batch=(2, 2), n_q=N_Q, n_k=N_K)
    mask, pairs = made("stripes", device)
    mapped = torch.vmap(lambda q, k, v: attention(q, k, v, mask=mask))(q, k, v)
    torch.testing.assert_close(mapped, attention(q, k, v, mask=pairs), atol=1e-5, rtol=1e-5)


def test_the_problem_names_the_function(device):
    mask, _ = made("documents", device)
    q, k, v, *_ = tensors(device, torch.float32, n_q=N_Q, n_k=N_K)
    problem = explain(q, k, v, mask=mask).problem
    assert problem.masked and problem.mapped and problem.mask_function == (mask.function, ("float32", N_K))
    assert f"mask_function {mask.function}" in str(problem) and Problem.from_json(problem.as_json()) == problem
    warm(q, k, v, mask=mask)
    plan.clear()


@triton.jit
def with_score(score, batch, head, query, key, payload):
    return score > 0


@pytest.mark.parametrize("arguments, options, error, message", [
    ((lambda *place: True, (1, 1, 4, 4)), {}, TypeError, "function: expected a function decorated with triton.jit"),
    ((with_score, (1, 1, 4, 4)), {}, TypeError, r"expected the parameters \(batch, head, query, key, payload\), got \(score"),
    ((columns, (4, 4)), {}, ValueError, r"shape: expected at least three sizes .*, got \(4, 4\)"),
    ((columns, (1, -1, 4)), {}, TypeError, r"shape: expected sizes .*, got \(1, -1, 4\)"),
    ((columns, 4), {}, TypeError, "shape: expected sizes .*, got 4"),
    ((columns, (1, 4, 4)), {"payload": 3}, TypeError, "payload: expected a tensor or None, got int"),
    ((columns, (1, 4, 4)), {"payload": torch.zeros(4, 2)[:, 0]}, RuntimeError, "payload: expected a contiguous tensor"),
    ((columns, (1, 4, 4)), {"payload": torch.zeros(4), "device": "meta"}, RuntimeError, "payload: expected a tensor on meta"),
    ((columns, (1, 4, 4)), {"payload": torch.zeros(4, requires_grad=True)}, RuntimeError, "payload: .* requires no gradient"),
], ids=["python", "parameters", "rank", "negative", "number", "payload", "strides", "device", "gradient"])
def test_bad_arguments_raise(arguments, options, error, message):
    with pytest.raises(error, match=message):
        create_block_mask(*arguments, **options)


def test_a_mask_that_is_the_same_for_all_gets_batch_and_head_0(device):
    """So the kernels and the lists of blocks agree, whatever the function does with them."""
    q, k, v, *_ = tensors(device, torch.float32, n_q=N_Q, n_k=N_K)
    for shape in ((1, 1, N_Q, N_K), (1, 2, N_Q, N_K), (2, 1, N_Q, N_K)):
        mask = create_block_mask(stripes, shape, device=device)
        pairs = made("stripes", device)[1][:shape[0], :shape[1]]
        assert torch.equal(dense_mask(mask), pairs)
        torch.testing.assert_close(attention(q, k, v, mask=mask), attention(q, k, v, mask=pairs), atol=1e-5, rtol=1e-5)
    q = q.expand(3, *q.shape)
    with pytest.raises(RuntimeError, match="1 in place of the heads or of all batches"):
        attention(q, k, v, mask=create_block_mask(stripes, (3, 1, 1, N_Q, N_K), device=device))


def test_a_mask_in_a_module_leaves_its_metadata(device):
    layer = torch.nn.Module()
    layer.mask = made("documents", "cpu")[0]
    assert layer.state_dict()._metadata["mask"] == torch.nn.Module().state_dict()._metadata[""]
    assert layer.to("meta").to_empty(device="cpu").mask.payload.shape == (N_K,)


def test_masks_that_do_not_fit_raise(device):
    q, k, v, *_ = tensors(device, torch.float32, heads=3, kv_heads=3, n_q=N_Q, n_k=N_K)
    with pytest.raises(RuntimeError, match=r"mask: expected a mask function of shape \(2, 3, 300, 330\).* got \(2, 2, 300"):
        attention(q, k, v, mask=made("stripes", device)[0])
    elsewhere = BlockMask(None, *(x.to("meta") for x in made("columns", device)[0]._tensors()[1:]),
                          function=(made("columns", device)[0].function, N_Q, N_K))
    with pytest.raises(RuntimeError, match="mask: expected .*, where the queries are, got a block mask on meta"):
        attention(q, k, v, mask=elsewhere)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, N_Q], dtype=torch.int32, device=device), torch.tensor([0, N_K], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="a block_mask does not combine with packed sequences"):
        attention_varlen(*rows, *starts, mask=made("documents", device)[0])


def test_empty_lengths(device):
    for n_q, n_k in ((0, 5), (5, 0), (0, 0)):
        q, k, v, *_ = tensors(device, torch.float32, n_q=n_q, n_k=n_k)
        mask = create_block_mask(columns, (1, 1, n_q, n_k), device=device)
        torch.testing.assert_close(attention(q, k, v, mask=mask), attention(q, k, v))


@pytest.mark.interpreted
def test_tune_needs_functions_that_can_be_imported():
    @triton.jit
    def local(batch, head, query, key, payload):
        return key >= 0

    q = torch.zeros(1, 1, 16, 16)
    with pytest.raises(ValueError, match="functions: expected those at the top level of a module"):
        tune(q, q, q, mask=create_block_mask(local, (1, 1, 16, 16), device="cpu"))
