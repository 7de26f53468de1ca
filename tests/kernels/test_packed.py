"""Packed sequences: every feature of attention, each sequence by itself, and starts that are wrong.

Every load and store of these tests is checked to lie inside a tensor (helpers/memory_guard.py).
"""

import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
import triton.language as tl
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import memory_guard
from tests.helpers.cases import COVERING, LARGE_TILES, SINGLE, TILES, result_names
from tests.helpers.sequences import SPARE, Sequences, starts_of
from tests.helpers.tiers import slow
from tests.helpers.tolerance import agree
from tritonattn import (
    Config,
    Problem,
    attention,
    attention_varlen,
    block_mask,
    config,
    dropout_mask,
    explain,
    gpu,
    reference,
    warm,
)
from tritonattn.autotune import bench
from tritonattn.configs import lookup
from tritonattn.configs.key import key_of
from tritonattn.kernels import packed
from tritonattn.runtime import custom_op, launch, packed_arguments, plan


def of_case(case, dtype, device):
    """Return four sequences, one as the case has it, two without queries or keys, and rows that belong to none."""
    return Sequences(case, dtype, device, (case.n_q, 0, 5, 18), (case.n_k, 9, 0, 21))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", [*SINGLE])
def test_each_feature(name, device):
    check_exact(SINGLE[name], device, TILES)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", slow(*COVERING))
def test_every_pair_of_features(name, device):
    check_exact(COVERING[name], device, LARGE_TILES)


def check_exact(case, device, tiles):
    sequences = of_case(case, torch.float64, device)
    with config.pinned(tiles):
        ours = sequences.results(**case.options)
    exact = sequences.results(torch.float64, **case.options)
    for name, *pair in zip(result_names(case.options | sequences.given), ours, exact, strict=True):
        agree(name, pair[0], pair[1], pair[1], torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["bottom-right", "gqa", "bias", "split"])
def test_each_dtype_by_the_accuracy_rule(name, dtype, device):
    case = SINGLE[name]
    sequences = Sequences(case, dtype, device, (70, 3, 0, 130), (90, 40, 7, 5))
    ours, torchs, exact = (sequences.results(each, **case.options) for each in (None, dtype, torch.float64))
    for result, *values in zip(result_names(case.options | sequences.given), ours, torchs, exact, strict=True):
        if result != "lse":
            agree(result, *values, dtype)
    wide = sequences.results(torch.float32, **case.options)[1]
    agree("lse", ours[1], wide, exact[1], torch.float32)


@pytest.mark.parametrize("options", [{"key_lengths": torch.tensor([20, 99, 3, -1])}, {"dropout_p": 0.4}],
                         ids=["lengths", "dropout"])
def test_key_lengths_and_dropout(options, device):
    case = SINGLE["two-heads"]
    sequences = Sequences(case, torch.float32, device, (40, 0, 5, 18), (33, 9, 7, 21))
    options = options | {"causal": True, "align": "bottom_right"}
    ours_only, exact_only = {}, {}
    if "dropout_p" in options:
        ours_only["dropout_seed"] = torch.tensor([7], device=device)
        exact_only["keep"] = dropout_mask((4, 2, 40, 33), 0.4, ours_only["dropout_seed"])
    else:
        options["key_lengths"] = options["key_lengths"].to(device)
    ours = sequences.results(**options, **ours_only)
    exact = sequences.results(torch.float64, **options, **exact_only)
    for name, *pair in zip(result_names({}), ours, exact, strict=True):
        torch.testing.assert_close(*pair, check_dtype=False, atol=2e-5, rtol=2e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.interpreted
def test_a_bias_of_rows_beside_a_sink(device):
    """Its gradient is a sum over rows that no kernel computes. More rows are spare than a bias has."""
    sequences = Sequences(SINGLE["sink"], torch.float64, device, (20, 0, 37, 5), (33, 7, 0, 40), spare=50)
    for shape in ((37, 1), (4, 1, 37, 1), (4, 1, 1, 1), (1, 1, 1, 1), (1,)):
        sequences.given["bias"] = torch.randn(shape, dtype=torch.float64, device=device)
        ours, exact = sequences.results(), sequences.results(torch.float64)
        torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)


@pytest.mark.interpreted
@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_many_short_sequences(count, monkeypatch, device):
    """Fewer and more than a program loads at a time."""
    monkeypatch.setattr(packed, "SEARCH", tl.constexpr(4))
    lengths = [(3 * i) % 5 for i in range(count)]
    sequences = Sequences(SINGLE["plain"], torch.float64, device, lengths, lengths[::-1])
    with config.pinned(LARGE_TILES):
        ours = sequences.results()
    torch.testing.assert_close(ours, sequences.results(torch.float64), atol=1e-9, rtol=1e-9)


def test_a_sequence_has_the_same_bits_wherever_it_lies(device):
    lengths, tiles = (5, 33, 0, 64, 17), Config(32, 32)
    rng = torch.Generator().manual_seed(0)
    parts = [[torch.randn(n, 2, 16, generator=rng).to(device) for n in (n, n, n, n)] for n in lengths]

    def in_order(order):
        q, k, v, do = (torch.cat([parts[i][j] for i in order]).requires_grad_() for j in range(4))
        starts = starts_of([lengths[i] for i in order], device)
        with config.pinned(tiles):
            o = attention_varlen(q, k, v, starts, starts, causal=True)
            each = o, *torch.autograd.grad(o, (q, k, v), do)
        return {i: [x[start:stop] for x in each] for i, (start, stop) in zip(order, itertools.pairwise(starts.tolist()))}

    first, second = in_order((0, 1, 2, 3, 4)), in_order((3, 0, 4, 2, 1))
    for i in range(len(lengths)):
        assert all(torch.equal(one, other) for one, other in zip(first[i], second[i], strict=True))


@pytest.mark.interpreted  # a compiler makes other code of a loop that never ends within a tile
def test_a_sequence_has_the_bits_of_a_batch(device):
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(64, 2, 16, generator=rng).to(device).requires_grad_() for _ in range(4)]
    starts = starts_of((40, 24), device)
    with config.pinned(Config(32, 32)):
        o = attention_varlen(*tensors[:3], starts, starts, causal=True)
        packed_results = [o, *torch.autograd.grad(o, tensors[:3], tensors[3])]
        for rows in (slice(0, 40), slice(40, 64)):
            q, k, v, do = (x.detach()[rows].transpose(0, 1)[None].requires_grad_() for x in tensors)
            o = attention(q, k, v, causal=True)
            for one, other in zip(packed_results, (o, *torch.autograd.grad(o, (q, k, v), do)), strict=True):
                assert torch.equal(one[rows], other[0].transpose(0, 1))


@pytest.mark.parametrize("sink", [None, 0.5])
def test_rows_after_the_last_sequence_attend_to_nothing(sink, device):
    """A NaN in them does not spread, whatever block of memory they lie in."""
    sequences = Sequences(SINGLE["two-heads"], torch.float32, device, (20, 7), (12, 30), spare=50)
    q, k, v = sequences.qkv
    q[27:], k[42:], v[42:] = math.nan, math.nan, math.nan
    if sink is not None:
        sequences.given["sink"] = torch.full((2,), sink, device=device)
    o, lse, dq, dk, dv, *dsink = sequences.results(causal=True, align="bottom_right")
    assert (o[27:] == 0).all() and (lse[:, 27:] == (-math.inf if sink is None else sink)).all()
    assert (dq[27:] == 0).all() and (dk[42:] == 0).all() and (dv[42:] == 0).all()
    sequences.qkv = [x.nan_to_num() for x in sequences.qkv]
    clean = sequences.results(causal=True, align="bottom_right")
    for one, other in zip((o, lse, dq, dk, dv, *dsink), clean, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.interpreted
@pytest.mark.parametrize("starts", [
    (0, 30, 20, 40), (0, -5, 99, 40), (7, 7, 7, 7), (40, 30, 20, 0), (0, 2**31 - 1, -2**31, 5),
], ids=str)
@pytest.mark.parametrize("bias", [(3, 1, 25, 1), (1, 1, 25, 25)], ids=["of rows", "of pairs"])
def test_wrong_starts_lead_to_no_access_outside(starts, bias, monkeypatch, device):
    """On a GPU nobody sees them in time. Two sequences may then share rows, which the guard would call a race."""
    starts = torch.tensor(starts, dtype=torch.int32, device=device)
    q = torch.randn(1, 1, 40, 16, device=device)
    mask, lengths = (torch.ones(shape, dtype=dtype, device=device)
                     for shape, dtype in (((1, 1, 25, 25), torch.bool), ((3,), torch.int32)))
    inputs = launch.AttentionInputs(q, q, q, torch.zeros(bias, device=device), *torch.zeros(2, 1, 1, 1, 1, device=device),
                                    torch.zeros(1, 1, 1, 9, device=device), mask,
                                    q_starts=starts, k_starts=starts.flip(0).contiguous(), longest_q=25, longest_k=25, right=0,
                                    bottom_right=True, key_lengths=50 * lengths, row_max=True, entropy=True, key_mass=True)
    monkeypatch.setattr(memory_guard, "find_race", lambda: None)
    with config.pinned(TILES):
        o, _, statistics, residual, _, entropy, mass = custom_op.forward_op(*inputs, False)
        gradients = custom_op.backward_op(q, None, o, statistics, residual, *inputs, [True] * 7, entropy, mass, entropy)
    assert [x.shape for x in (o, *gradients)] == [q.shape] * 4 + [torch.Size(bias), *[(1, 1, 1, 1)] * 2, (1, 1, 1, 9)]


def test_no_program_for_padding():
    """One long sequence among many short ones: the number of programs follows the rows, not sequences times the longest."""
    rows = 8192 + 255 * 10
    problem = Problem((256,), 4, 2, 8192, 8192, 64, 64, torch.bfloat16, packed=(rows, rows))
    q, k = (torch.empty(1, heads, rows, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    starts = torch.empty(257, dtype=torch.int32, device="meta")
    inputs = launch.AttentionInputs(q, k, k, q_starts=starts, k_starts=starts, longest_q=8192, longest_k=8192)
    outputs = plan.empty_outputs(inputs, False)
    call = launch.forward_launch(problem, Config(64, 64), inputs, launch.Outputs(*outputs[:3]))
    assert call.programs == 4 * (rows // 64 + 257)
    statistics, delta = outputs[2], launch.empty_statistics(inputs)
    assert statistics.shape == (1, 4, 2, (rows // 16 + 257) * 16) and delta.shape == (1, 4, (rows // 16 + 257) * 16)
    queries = launch.Queries(q, outputs[0], statistics, delta)
    assert launch.dq_launch(problem, Config(64, 64), inputs, queries, q).programs == call.programs
    assert launch.dkdv_launch(problem, Config(64, 32), inputs, queries, k, k).programs == 2 * (rows // 32 + 257)


@pytest.mark.parametrize("n", [0, 1, 6, 14, 15, packed_arguments.MOST_ROWS])
def test_totals_are_never_specialized(n):
    """Triton compiles anew for integers of 1 and for multiples of 16."""
    number = packed.encoded(n)
    assert number % 2 == 1 and number != 1 and number < 2**31 and number // 2 - 1 == n


@pytest.mark.parametrize("known", [False, True], ids=["first call", "known call"])
def test_other_sequences_with_the_same_shapes(known, device):
    """A known call takes its plan by shapes; starts, key lengths and seeds are read anew."""
    shapes = SINGLE["two-heads"]
    for i, (queries, keys) in enumerate((((20, 0, 16), (9, 9, 9)), ((1, 30, 5), (20, 5, 2)), ((36, 0, 0), (0, 0, 27)))):
        if not known:
            plan.clear()
        sequences = Sequences(shapes, torch.float32, device, queries, keys)
        sequences.longest = 36, 27
        options = {"causal": True, "align": "bottom_right", "key_lengths": torch.tensor([7 + i, 9, 11], device=device)}
        ours, exact = sequences.results(**options), sequences.results(torch.float64, **options)
        torch.testing.assert_close(ours, exact, check_dtype=False, atol=2e-5, rtol=2e-5)


def test_known_calls_are_kept(device):
    plan.clear()
    sequences = Sequences(SINGLE["plain"], torch.float32, device, (9, 4), (9, 4))
    sizes = []
    for _ in range(3):
        sequences.results()
        sizes.append(len(plan._entries))
    assert sizes[0] == 3 and sizes[1] == sizes[2], "a call, a forward and a backward plan"


def test_int64_starts_and_one_tensor_for_both(device):
    q = torch.randn(20, 2, 16, device=device)
    starts = starts_of((12, 8), device)
    expected = attention_varlen(q, q, q, starts, starts.clone(), causal=True, align="top_left")
    assert torch.equal(attention_varlen(q, q, q, starts, starts, causal=True), expected)
    wide = starts.long()
    assert torch.equal(attention_varlen(q, q, q, wide, wide, 12, 12, causal=True), expected)
    spread = wide.repeat_interleave(2)[::2]
    assert torch.equal(attention_varlen(q, q, q, spread, wide), attention_varlen(q, q, q, starts, starts))
    # the same memory, as after detach()
    assert torch.equal(attention_varlen(q, q, q, starts.view(3), starts.detach(), causal=True), expected)
    x = q.clone().requires_grad_()
    dx, = torch.autograd.grad(attention_varlen(x, x, x, wide, wide).sum(), x)
    assert torch.equal(dx, torch.autograd.grad(attention_varlen(x, x, x, starts, starts).sum(), x)[0])


@pytest.mark.parametrize("most", ["a number", "other numbers", "none"])
@pytest.mark.parametrize("backend", ["aot_eager", *slow("inductor")])
def test_compile_in_few_graphs(backend, most, device):
    """One graph, or two where a number of rows or sequences varies, which the second call shows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def step(q, k, v, starts, longest):
        o, lse = attention_varlen(q * 2, k, v, starts, starts, longest, longest, causal=True, return_lse=True)
        return o.sum() + torch.where(lse.isfinite(), lse, 0).sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for lengths in ((12, 8), (3, 11, 9), (17, 1, 5, 4), (2, 2)):
        longest = {"a number": 17, "other numbers": max(lengths), "none": None}[most]
        given = [torch.randn(sum(lengths), 2, 16, device=device, requires_grad=True) for _ in range(3)]
        totals = [function(*given, starts_of(lengths, device), longest) for function in (step, compiled)]
        expected, ours = (torch.autograd.grad(total, given) for total in totals)
        torch.testing.assert_close(ours, expected)
    assert counter.frame_count == 2


def test_export_with_any_number_of_rows(device):
    class Layer(torch.nn.Module):
        def forward(self, q, starts):
            return attention_varlen(q, q, q, starts, starts, causal=True)

    rows, count = torch.export.Dim("rows", min=2, max=4096), torch.export.Dim("count", min=3, max=64)
    given = torch.randn(20, 2, 16, device=device), starts_of((12, 8), device)
    program = torch.export.export(Layer(), given, dynamic_shapes=({0: rows}, {0: count})).module()
    q, starts = torch.randn(31, 2, 16, device=device), starts_of((3, 20, 5), device)
    torch.testing.assert_close(program(q, starts), Layer()(q, starts))


def test_opcheck(device):
    sequences = Sequences(SINGLE["gqa"], torch.float16, device, (12, 3), (9, 20))
    rows = [packed_arguments.one_batch(x, "x").requires_grad_() for x in sequences.qkv]
    inputs = packed_arguments.prepare_packed(*rows, sequences.starts, sequences.longest, causal=True, align="top_left")
    torch.library.opcheck(custom_op.forward_op, (*inputs, True))
    with torch.no_grad():
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        o, lse, *left, _, _, _ = custom_op.forward_op(*plain, True)
    torch.library.opcheck(custom_op.backward_op, (torch.randn_like(o), torch.randn_like(lse), o, *left, *plain,
                                                  [True, True, True, *[False] * 4]))


def test_vmap_and_checkpoint(device):
    starts = starts_of((12, 8), device)
    stacked = torch.randn(3, 20, 2, 16, device=device)
    call = functools.partial(attention_varlen, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    ours = torch.vmap(lambda x: call(x, x, x))(stacked)
    torch.testing.assert_close(ours, torch.stack([call(x, x, x) for x in stacked]))
    q = stacked[0].requires_grad_()
    plain, = torch.autograd.grad(call(q, q, q).sum(), q)
    for reentrant in (True, False):
        def again(x, first, second):
            return attention_varlen(x, x, x, first, second, causal=True)

        out = checkpoint(again, q, starts, starts, use_reentrant=reentrant)
        q.grad = None
        out.sum().backward()
        assert torch.equal(plain, q.grad)
    given = torch.stack((starts, starts_of((3, 17), device)))
    ours = torch.vmap(lambda starts: attention_varlen(q, q, q, starts, starts, causal=True))(given)
    torch.testing.assert_close(ours, torch.stack([attention_varlen(q, q, q, x, x, causal=True) for x in given]))


def test_autocast(device):
    q, starts = torch.randn(20, 2, 16, device=device), starts_of((12, 8), device)
    with torch.autocast(device.type, torch.bfloat16):
        o = attention_varlen(q, q, q, starts, starts)
    half = q.bfloat16()
    assert torch.equal(o, attention_varlen(half, half, half, starts, starts))


def test_empty_tensors(device):
    """No rows, no sequence with rows, heads of size 0."""
    for rows, d, dv in ((0, 16, 16), (5, 0, 16), (5, 16, 0)):
        q, v = torch.randn(rows, 2, d, device=device, requires_grad=True), torch.randn(rows, 2, dv, device=device)
        starts = starts_of((0, rows, 0), device)
        o, lse = attention_varlen(q, q, v, starts, starts, scale=1.0, return_lse=True)
        dq, = torch.autograd.grad(o.sum() + lse.sum(), q)
        expected, exact_lse = reference.attention_varlen(q, q, v, starts, starts, scale=1.0, return_lse=True)
        exact_dq, = torch.autograd.grad(expected.sum() + exact_lse.sum(), q)
        assert o.shape == (rows, 2, dv) and lse.shape == (2, rows)
        torch.testing.assert_close((o, lse, dq), (expected, exact_lse, exact_dq))


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 1), (1,)], ids=str)
def test_a_bias_without_pairs_has_a_gradient_of_zero(shape, device):
    q, starts = torch.randn(4, 2, 16, device=device), starts_of((0, 0), device)
    bias = torch.zeros(shape, device=device, requires_grad=True)
    o, lse = attention_varlen(q, q, q, starts, starts, 0, 0, bias=bias, return_lse=True)
    assert (torch.autograd.grad(o.sum() + lse.sum(), bias)[0] == 0).all()


def test_flops_count_the_most_keys_for_each_query(device):
    sequences = Sequences(SINGLE["gqa"], torch.float32, device, (12, 3), (9, 20))
    with FlopCounterMode(display=False) as counter:
        sequences.results()
    assert counter.get_total_flops() == 7 * 2 * (4 * (15 + SPARE) * 20) * 16  # two products forward, five backward


def test_explain_and_warm_take_packed_sequences(device):
    q, starts = torch.randn(20, 2, 16, device=device, requires_grad=True), starts_of((12, 8), device)
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 12, "max_seqlen_k": 12, "causal": True}
    problem = explain(q, q, q, **options).problem
    assert problem == Problem((2,), 2, 2, 12, 12, 16, 16, torch.float32, (None, 0), packed=(20, 20))
    assert str(problem).endswith("float32 causal packed 20")
    assert Problem.from_json(json.loads(json.dumps(problem.as_json()))) == problem
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="max_seqlen_q: expected at least 12"):
            explain(q, q, q, **options | {"max_seqlen_q": 11})
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        warm(q, q, q, cu_seqlens_k=starts)
    warm(q, q, q, **options)
    assert q.grad is None


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_packed_sequences_share_the_tuned_configs_of_a_padded_batch(kernel):
    problem = Problem((256,), 8, 2, 1024, 1024, 64, 64, torch.bfloat16, packed=(5000, 4000))
    padded = problem.padded()
    assert padded == dataclasses.replace(problem, packed=None, lengths=True, batch=(5,)) and padded.padded() is padded
    assert problem.flops() == padded.flops() and problem.bytes() == 2 * 64 * (8 * 5000 * 2 + 2 * 4000 * 2) + 4 * 8 * 5000
    assert [x.shape for x in problem.tensors("meta")] == [(1, 8, 5000, 64), (1, 2, 4000, 64), (1, 2, 4000, 64)]
    on = gpu.KNOWN["sm_90"]
    assert key_of(kernel, problem, on) == key_of(kernel, padded, on)
    # any tile may be the last one, and partial
    assert lookup.mask_class(kernel, problem) == "edges"
    assert bench.Bench(kernel, problem, "cpu").problem == padded
    few, alike = (bench.cases_to_compile(dataclasses.replace(each, n_q=64, n_k=64)) for each in (problem, padded))
    assert [x.shape for x in few[-1][0][:4]] == [(79, 8, 64, 64), *[(79, 2, 64, 64)] * 2, (79, 8, 64, 64)]
    assert len(few) == len(alike) and all("key_lengths" in options for _, options in few)


ROWS, STARTS = torch.zeros(20, 2, 16), starts_of((12, 8))
GOOD = {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 12, "max_seqlen_k": 12}


@pytest.mark.parametrize("changes, error, message", [
    ({"q": ROWS[None]}, RuntimeError, r"q: expected the rows of all sequences, \[total, heads, size\], got .*\(1, 20, 2, 16\)"),
    ({"k": None}, RuntimeError, "k: expected the rows of all sequences"),
    ({"v": ROWS.to_sparse()}, RuntimeError, "v: expected a dense .* got layout torch.sparse_coo"),
    ({"cu_seqlens_q": [0, 20]}, TypeError, r"cu_seqlens_q: expected a tensor of int32 or int64, got \[0, 20\]"),
    ({"cu_seqlens_k": STARTS.float()}, TypeError, "cu_seqlens_k: .*got torch.float32"),
    ({"cu_seqlens_k": STARTS.to(torch.complex64)}, TypeError, "cu_seqlens_k: .*got torch.complex64"),
    ({"cu_seqlens_q": STARTS[:1]}, RuntimeError, r"cu_seqlens_q: .*\[sequences \+ 1\], got shape \(1,\)"),
    ({"cu_seqlens_q": STARTS[None]}, RuntimeError, r"cu_seqlens_q: .*got shape \(1, 3\)"),
    ({"cu_seqlens_k": STARTS[:2]}, RuntimeError, "cu_seqlens_k: expected as many numbers as in cu_seqlens_q, 3, got 2"),
    ({"cu_seqlens_q": STARTS.to("meta")}, RuntimeError, "cu_seqlens_q: expected cpu, where the queries are, got meta"),
    ({"cu_seqlens_q": STARTS + 1}, RuntimeError, r"cu_seqlens_q: expected numbers that begin with 0.*got \[1, 13, 21\]"),
    ({"cu_seqlens_k": torch.tensor([0, 12, 9])}, RuntimeError, r"cu_seqlens_k: .*do not fall.*got \[0, 12, 9\]"),
    ({"cu_seqlens_k": torch.tensor([0, 12, 21])}, RuntimeError, r"cu_seqlens_k: .*end with at most 20, .*got \[0, 12, 21\]"),
    ({"max_seqlen_q": 11}, RuntimeError, "max_seqlen_q: expected at least 12, the longest of cu_seqlens_q, got 11"),
    ({"max_seqlen_k": 12.0}, TypeError, "max_seqlen_k: expected an integer or None, got 12.0"),
    ({"max_seqlen_k": True}, TypeError, "max_seqlen_k: expected an integer or None, got True"),
    ({"max_seqlen_k": torch.tensor(12)}, TypeError, "max_seqlen_k: expected an integer or None, got a tensor"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected at least 0, got -1"),
    ({"causal": True, "cu_seqlens_k": STARTS.clone()}, ValueError, "align: .*two tensors.*got None"),
    ({"causal": True, "key_lengths": torch.tensor([3, 4])}, ValueError, "align: .*key_lengths"),
    ({"key_lengths": torch.ones(3, dtype=torch.int32)}, RuntimeError, r"key_lengths: .*broadcasts to \(2,\), got \(3,\)"),
    ({"mask": torch.ones(20, 20, dtype=torch.bool)}, RuntimeError, r"mask: .*broadcasts to \(2, 2, 12, 12\), got \(20, 20\)"),
    ({"mask": block_mask(torch.ones(12, 12, dtype=torch.bool))}, RuntimeError, "mask: .*cu_seqlens_q.*got a block_mask"),
    ({"bias": torch.ones(3, 1, 12, 12)}, RuntimeError, r"bias: .*broadcasts to \(2, 2, 12, 12\)"),
    ({"v": ROWS[:19]}, RuntimeError, "v: expected the length of k, 20, got 19"),
    ({"k": ROWS.half()}, RuntimeError, "k: expected the dtype of q"),
    ({"sink": torch.zeros(3)}, RuntimeError, "sink: .*each of 2 heads"),
    ({"softcap": -1.0}, ValueError, "softcap: expected"), ({"scale": "1"}, TypeError, "scale: expected"),
    ({"window": (-1, None)}, ValueError, "window: expected left"), ({"dropout_p": 2}, ValueError, "dropout_p: expected"),
])
def test_errors(changes, error, message, device):
    if device.type != "cpu":
        pytest.skip("the values of the tensors are checked on the CPU only")
    attention_varlen(**GOOD | {"max_seqlen_q": np.int64(12)})
    with pytest.raises(error, match=message):
        attention_varlen(**GOOD | changes)


def test_too_many_rows():
    with pytest.raises(RuntimeError, match="max_seqlen_q: expected at most 1073741822 rows in all sequences, got 1073741823"):
        packed_arguments.longest_argument("max_seqlen_q", 5, 2**30 - 1)
