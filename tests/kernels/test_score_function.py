"""Functions of the user's own that change the scores, their derivatives, and the check of these."""

import copy
import dataclasses
import importlib
import linecache
import math
import pickle
import re
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from tests.helpers.cases import SINGLE, assert_exact, check, result_names, results, tensors
from tests.helpers.compile_server import compiled
from tests.helpers.score_functions import (
    CHANGES,
    Both,
    documents,
    one,
    penalty,
    same_document,
    squares,
    squares_slope,
)
from tests.helpers.sequences import Sequences, starts_of
from tests.helpers.tiers import slow
from tritonattn import (
    Config,
    ScoreFunction,
    attention,
    attention_map,
    attention_varlen,
    block_mask,
    check_score_function,
    config,
    create_block_mask,
    explain,
    reference,
    score_function,
    tune,
    warm,
)
from tritonattn.analysis.check_score_function import as_torch, evaluate
from tritonattn.runtime import custom_op, plan

TILES = Config(16, 32)
ALL = pytest.mark.parametrize("name", [*CHANGES])


@triton.jit
def nan_at_key_5(score, batch, head, query, key, payload):
    return tl.where(key == 5, float("nan"), score)


@triton.jit
def constant(score, batch, head, query, key, payload):
    return query * 0.25


@triton.jit
def zero(score, batch, head, query, key, payload):
    return 0.0


@triton.jit
def magnitude(score, batch, head, query, key, payload):
    return tl.abs(score)


@triton.jit
def sign(score, batch, head, query, key, payload):
    return tl.where(score > 0, 1.0, -1.0)


@triton.jit
def added(score, batch, head, query, key, payload):
    return score + tl.where(key == 3, float("-inf"), 0.0)


@triton.jit
def slope_of_rows(score, batch, head, query, key, payload):
    """The slope of `squares` where the rows of a tile are queries, else 1."""
    rows_are_queries = tl.full([], query.shape[1] == 1, tl.int1)
    return tl.where(rows_are_queries, 1.0 + 0.25 * score, 1.0)


@triton.jit
def unchanged(score, batch, head, query, key, payload):
    return score


@triton.jit
def nan_below_zero(score, batch, head, query, key, payload):
    return tl.where(score > 0, 1.0, float("nan"))


@triton.jit
def relative_to_the_row(score, batch, head, query, key, payload):
    return score - tl.max(score, 1)[:, None]


@triton.jit
def masked_by_score(score, batch, head, query, key, payload):
    return tl.where(score > 2.0, float("-inf"), score)


@triton.jit
def root(score, batch, head, query, key, payload):
    return tl.sqrt(score)


@triton.jit
def five(score, batch, head, query, key):
    return score


@ALL
@pytest.mark.interpreted
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (9, 4)}, {"softcap": 2.0}, {"scale": -1.5}, {"scale": 0.0}, {"scale": 40.0},
    {"alibi": torch.tensor([0.5, 0.125])}, {"sink": torch.tensor([1.0, -1.0])}, {"normalizer": "sigmoid"},
    {"normalizer": "relu"}, {"return_stats": ("max", "head_max", "entropy", "key_mass")},
], ids=str)
def test_a_function_is_applied_after_the_softcap_and_before_biases(options, name, device):
    options = {key: x.to(device, torch.float64) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    assert_exact(tensors(device), score_function=Both(name, device), **options)


@ALL
@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", [(20, 50), (50, 20), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_indices_do_not_depend_on_the_alignment(align, sizes, name, device):
    n_q, n_k = sizes
    assert_exact(tensors(device, n_q=n_q, n_k=n_k), causal=True, align=align, score_function=Both(name, device))


@ALL
@pytest.mark.interpreted
def test_grouped_heads_batches_and_lengths(name, device):
    given = tensors(device, batch=(2, 2), heads=4, kv_heads=2, n_k=45)
    lengths = torch.tensor([[45, 1], [0, 30]], device=device)
    assert_exact(given, key_lengths=lengths, causal=True, align="bottom_right", score_function=Both(name, device))


@ALL
@pytest.mark.interpreted
def test_with_a_block_mask(name, device):
    mask = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:150, 128:], mask[200:, :128] = False, True
    mask, change = mask.to(device), Both(name, device)
    given = tensors(device, batch=(1,), heads=1, kv_heads=1, n_q=300, n_k=300)
    assert_exact(given, Config(32, 64), ours_only={"mask": block_mask(mask)}, exact_only={"mask": mask}, score_function=change)


@ALL
@pytest.mark.interpreted
def test_with_a_bias_that_masks_and_has_a_gradient(name, device):
    bias = torch.randn(2, 37, 37, dtype=torch.float64, device=device)
    bias[:, :, 4] = -math.inf
    assert_exact(tensors(device), bias=bias, score_function=Both(name, device))
    assert_exact(tensors(device), bias=bias[:1, :1], score_function=Both(name, device), normalizer="sigmoid")


@ALL
@pytest.mark.parametrize("family", ["randn", "mean-shifted", "saturated", "outliers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_accuracy(dtype, family, name, device):
    for base in ("plain", "causal", "split"):
        check(dataclasses.replace(SINGLE[base], function=name), dtype, device, family, TILES)


@ALL
@pytest.mark.interpreted
def test_packed(name, device):
    """The batch is the sequence, indices count within it; the rows after the last sequence have none."""
    sequences = Sequences(SINGLE["gqa"], torch.float64, device, (20, 0, 37, 5), (33, 7, 0, 40), spare=50)
    sequences.given["score_function"] = Both(name, device)
    for options in ({}, {"causal": True, "align": "bottom_right"}):
        ours, exact = (sequences.results(dtype, **options) for dtype in (None, torch.float64))
        for tensor, mine, other in zip(result_names(sequences.given), ours, exact, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9, msg=lambda text, tensor=tensor: f"{tensor}: {text}")


@pytest.mark.interpreted
def test_a_result_of_another_shape_is_broadcast(device):
    q, k, v, do, dlse = tensors(device)
    ours = results(attention, q, k, v, do, dlse, score_function=ScoreFunction(constant, zero))
    exact = results(reference.attention, q * 0, k * 0, v, do, dlse)
    torch.testing.assert_close(ours[0], exact[0])
    assert (ours[2] == 0).all() and (ours[3] == 0).all()


def test_no_function_reads_past_its_payload(device):
    """Tiles reach past the lengths, indices do not: the payload ends where the queries and keys do."""
    q, k, v, *_ = tensors(device, torch.float32, n_q=37, n_k=37)
    outer = torch.full((64,), 99, dtype=torch.int32, device=device)
    outer[:37] = torch.arange(37) // 11
    function = ScoreFunction(same_document, one, outer[:37])
    expected = attention(q, k, v, mask=outer[:37, None] == outer[:37])
    with config.pinned(Config(64, 64)):
        torch.testing.assert_close(attention(q, k, v, score_function=function), expected, atol=1e-6, rtol=1e-6)
        places = torch.arange(37, dtype=torch.int32, device=device)
        torch.testing.assert_close(attention(q, k, v, score_function=ScoreFunction(same_document, one, places)), v)


@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_what_a_function_masks_has_no_effect(hidden, device):
    q, k, v, do, dlse = tensors(device, torch.float32)
    change = CHANGES["squares"]
    clean = [x.clone() for x in (q, k, v)]
    # a key that batch 0 masks
    k[0, :, 3], v[0, :, 3, 0] = hidden, hidden
    clean[1][0, :, 3], clean[2][0, :, 3] = 0, 0
    function = ScoreFunction(change.function, change.derivative)
    with config.pinned(TILES):
        ours = results(attention, q, k, v, do, dlse, score_function=function)
        exact = results(attention, *clean, do, dlse, score_function=function)
    for mine, other in zip(ours, exact, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("hidden", ["function", "mask"])
def test_a_cotangent_of_nan_reaches_only_the_keys_that_its_row_sees(hidden, normalizer, device):
    """dK and dV of tiles with a NaN are computed again for the keys that this row does not attend to."""
    q, k, v, do, _ = tensors(device, torch.float32)
    do[..., 10, :] = math.nan
    leaves, payload = [x.requires_grad_() for x in (q, k, v)], torch.arange(37, dtype=torch.int32, device=device) // 15
    if hidden == "function":
        options = {"score_function": ScoreFunction(same_document, one, payload)}
    else:
        options = {"mask": create_block_mask(documents, (1, 1, 37, 37), payload=payload)}
    with config.pinned(TILES):
        dq, dk, dv = torch.autograd.grad(attention(*leaves, normalizer=normalizer, **options), leaves, do)
        do[..., 10, :] = 0
        others = torch.autograd.grad(attention(*leaves, normalizer=normalizer, **options), leaves, do)
    for one_of, other in zip((dq, dk, dv), others, strict=True):
        torch.testing.assert_close(one_of[..., 15:, :], other[..., 15:, :], atol=1e-6, rtol=1e-6)
    assert dk[..., :15, :].isnan().any() and dv[..., :15, :].isnan().all()


@pytest.mark.interpreted
def test_relu_ignores_the_derivative_where_it_cuts_off(device):
    q, k, v, do, _ = tensors(device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours, exact = (torch.autograd.grad(attention(*leaves, normalizer="relu", score_function=each), leaves, do)
                   for each in (ScoreFunction(unchanged, nan_below_zero), None))
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


@pytest.mark.interpreted
@pytest.mark.parametrize("options", [{"bias": torch.zeros(45, dtype=torch.float64)}, {"alibi": torch.zeros(2)}], ids=str)
def test_sequences_without_keys_read_the_payload_within_it(options, device):
    """Indices are 0 where there is no key; the memory guard of the tests sees every other read."""
    given = tensors(device, n_q=37, n_k=45)
    payload = torch.arange(45, dtype=torch.int32, device=device)
    lengths = torch.tensor([0, 45], device=device)
    exact = torch.arange(37, device=device)[:, None] == torch.arange(45, device=device)
    options = {name: x.to(device, torch.float64) for name, x in options.items()} | {"key_lengths": lengths, "align": "top_left"}
    assert_exact(given, ours_only={"score_function": ScoreFunction(same_document, one, payload)}, exact_only={"mask": exact},
                 **options)
    mask = create_block_mask(documents, (1, 1, 37, 45), payload=payload)
    assert_exact(given, ours_only={"mask": mask}, exact_only={"mask": exact}, **options)


def test_another_payload(device):
    q, k, v, *_ = tensors(device, torch.float32)
    first = ScoreFunction(penalty, one, torch.zeros(2, device=device))
    second = first.with_payload(torch.ones(2, device=device))
    assert second.name == first.name and second.derivative is one and (first.payload == 0).all()
    expected = attention(q, k, v, score_function=ScoreFunction(penalty, one, torch.ones(2, device=device)))
    assert torch.equal(attention(q, k, v, score_function=second), expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, w: attention(q, k, v, score_function=first.with_payload(w)), backend="aot_eager",
                             fullgraph=True)
    torch.testing.assert_close(compiled(q, torch.ones(2, device=device)), expected)
    with pytest.raises(TypeError, match="payload: expected a tensor or None, got float"):
        first.with_payload(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.function = squares


def test_a_nan_of_a_function_shows(device):
    q, k, v, do, dlse = tensors(device, torch.float32)
    o, _, dq, *_ = results(attention, q, k, v, do, dlse, score_function=ScoreFunction(nan_at_key_5, one), causal=True)
    assert o[..., 5:, :].isnan().all() and o[..., :5, :].isfinite().all() and dq[..., :5, :].isfinite().all()


@pytest.mark.slow
@ALL
def test_gradcheck(name, device):
    q, k, v, *_ = tensors(device, batch=(1,), n_q=5, n_k=6, d=4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    function = Both(name, device).of(attention)
    torch.autograd.gradcheck(lambda *x: attention(*x, score_function=function, return_lse=True), leaves)


def test_known_calls_compute_what_they_are_asked(device):
    q, k, v, *_ = tensors(device, torch.float32)
    for _ in range(3):
        for name in CHANGES:
            both = Both(name, device)
            ours, exact = (function(q, k, v, score_function=both.of(function)) for function in (attention, reference.attention))
            torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
        # these differ in nothing but the function
        for function, change in ((squares, CHANGES["squares"].in_torch), (magnitude, lambda s, *place: s.abs())):
            expected = reference.attention(q, k, v, score_function=lambda *place, change=change: change(*place, None))
            ours = attention(q, k, v, score_function=ScoreFunction(function))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        for slopes in (torch.zeros(2, device=device), torch.ones(2, device=device)):
            expected = reference.attention(q, k, v, score_function=lambda s, b, h, i, j, w=slopes: s - w[h] * (i - j).abs())
            torch.testing.assert_close(attention(q, k, v, score_function=ScoreFunction(penalty, one, slopes)), expected,
                                       atol=1e-5, rtol=1e-5)


def test_without_heads_and_maps(device):
    q, k, v, *_ = tensors(device, torch.float32)
    both = Both("squares", device)
    exact = reference.attention(q[0, :1], k[0, :1], v[0, :1], score_function=both.of(reference.attention))[0]
    ours = attention(q[0, 0], k[0, 0], v[0, 0], score_function=both.of(attention))
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    weights = reference.attention(q, k, torch.eye(37, device=device).expand(2, 2, 37, 37),
                                  score_function=both.of(reference.attention))
    columns = torch.nn.functional.pad(weights, (0, 11))[..., :32, :].unflatten(-1, (3, 16)).sum(-1)
    pooled = columns.unflatten(-2, (2, 16)).mean(-2)
    ours = attention_map(q, k, tile=16, score_function=both.of(attention))
    torch.testing.assert_close(ours[..., :2, :], pooled, atol=1e-5, rtol=1e-5)


def with_payload(make):
    return lambda device: ScoreFunction(penalty, one, make(torch.zeros(8, 2, device=device)))


@pytest.mark.parametrize("make, error, message", [
    (lambda device: penalty, TypeError, "score_function: expected a tritonattn.ScoreFunction or None, got"),
    (lambda device: "squares", TypeError, "score_function: expected a tritonattn.ScoreFunction or None, got 'squares'"),
    (lambda device: ScoreFunction(squares), RuntimeError, "score_function: expected one with a derivative"),
    (with_payload(lambda x: x[:, 0]), RuntimeError, r"payload: expected a contiguous tensor.* got .* with strides \(2,\)"),
    (with_payload(lambda x: x.to("meta")), RuntimeError, "payload: expected a tensor on .*, got one on meta"),
    (with_payload(lambda x: x.to_sparse()), RuntimeError, "payload: expected a dense"),
    (with_payload(lambda x: x.requires_grad_()), RuntimeError, "payload: expected a tensor that requires no gradient"),
], ids=["function", "name", "derivative", "strides", "device", "sparse", "gradient"])
def test_bad_arguments_raise(make, error, message, device):
    q, k, v = (x.requires_grad_() for x in tensors(device, torch.float32)[:3])
    attention(q, k, v, score_function=ScoreFunction(penalty, one, torch.zeros(8, 2, device=device)))
    function = make(device)
    starts, rows = starts_of((37,), device), [x[0].transpose(0, 1) for x in (q, k, v)]
    for call in (lambda: attention(q, k, v, score_function=function), lambda: warm(q, k, v, score_function=function),
                 lambda: explain(q, k, v, score_function=function),
                 lambda: attention_varlen(*rows, starts, starts, score_function=function)):
        with pytest.raises(error, match=message):
            call()


def captured():
    factor = tl.constexpr(2.0)

    @triton.jit
    def scaled(score, batch, head, query, key, payload):
        return score * factor

    return scaled


@pytest.mark.parametrize("make, error, message", [
    (lambda: ScoreFunction(lambda score, *place: score), TypeError, "function: expected a function decorated with triton.jit"),
    (lambda: ScoreFunction(squares, squares_slope.fn), TypeError, "derivative: expected a function decorated with triton.jit"),
    (lambda: ScoreFunction(None), TypeError, "function: expected a function decorated with triton.jit, got None"),
    (lambda: ScoreFunction(five), TypeError, re.escape("expected the parameters (score, batch, head, query, key, payload), got "
                                                       "(score, batch, head, query, key)")),
    (lambda: ScoreFunction(captured()), ValueError, "function: .* got one that captures factor; pass values in the payload"),
    (lambda: ScoreFunction(penalty, one, [1.0]), TypeError, "payload: expected a tensor or None, got list"),
    (lambda: ScoreFunction.named("tests.helpers.score_functions:missing#0"), RuntimeError, "AttributeError: .*missing"),
    (lambda: ScoreFunction.named("tests.helpers.score_functions:one#00000000"), RuntimeError, "it has changed since"),
    (lambda: ScoreFunction.named("no_such_module:one#00000000"), RuntimeError, "ModuleNotFoundError"),
    (lambda: tune(*[torch.zeros(1, 1, 16, 16)] * 3, score_function=ScoreFunction(captured_nothing())), ValueError,
     "expected those at the top level of a module that the processes which compile and time can import, got .*<locals>"),
], ids=["lambda", "python", "none", "parameters", "closure", "payload", "missing", "changed", "module", "local"])
def test_bad_functions_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def captured_nothing():
    @triton.jit
    def same(score, batch, head, query, key, payload):
        return score

    return same


def test_without_a_derivative_there_is_inference_and_gradients_of_values(device):
    q, k, v, do, _ = tensors(device, torch.float32)
    function, complete = ScoreFunction(squares), ScoreFunction(squares, squares_slope)
    torch.testing.assert_close(attention(q, k, v, score_function=function), attention(q, k, v, score_function=complete))
    with torch.no_grad():
        attention(q.requires_grad_(), k, v, score_function=function)
    q, bias = q.detach(), torch.zeros(37, device=device)
    leaves = v.requires_grad_(), bias.requires_grad_()
    ours, expected = (torch.autograd.grad(attention(q, k, v, bias=bias, score_function=each), leaves, do)
                      for each in (function, complete))
    assert all(torch.equal(x, y) for x, y in zip(ours, expected))
    with pytest.raises(RuntimeError, match="expected one with a derivative, since a gradient of queries or keys is needed"):
        torch.func.grad(lambda q: attention(q, k, v, score_function=function).sum())(q)


def test_names_of_functions():
    first, again = ScoreFunction(squares, squares_slope), ScoreFunction(squares, squares_slope, torch.zeros(1))
    other, without = ScoreFunction(squares, one), ScoreFunction(squares)
    assert first.name == again.name and len({first.name, other.name, without.name}) == 3
    assert re.fullmatch(r"tests\.helpers\.score_functions:squares,tests\.helpers\.score_functions:squares_slope#[0-9a-f]{8}",
                        first.name)
    assert repr(again) == f"ScoreFunction {first.name} with a payload of shape (1,)"
    for copied in (copy.deepcopy(again), ScoreFunction.named(first.name, torch.zeros(1))):
        assert copied.name == first.name and copied.function is squares and copied.payload.shape == (1,)
    assert pickle.loads(pickle.dumps(first)).derivative is squares_slope


def test_another_process_imports_the_functions(monkeypatch):
    name = ScoreFunction(squares, squares_slope).name
    monkeypatch.setattr(score_function, "_functions", {})
    assert score_function.functions_named(name) == (squares, squares_slope)


HELPER = """
import triton
import triton.language as tl
{comment}
FACTOR = tl.constexpr({factor})
@triton.jit
def helper(x):
    return x * {inner}
@triton.jit
def scaled(score, batch, head, query, key, payload):
    return helper(score) * FACTOR
"""


def test_a_name_holds_the_code_and_nothing_else(tmp_path, monkeypatch):
    """Constants and functions of the module count; lines before the function do not."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    for comment, factor, inner in (("", 2, 3), ("# a comment\n", 2, 3), ("", 5, 3), ("", 2, 7)):
        (tmp_path / "of_test.py").write_text(HELPER.format(comment=comment, factor=factor, inner=inner))
        sys.modules.pop("of_test", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        names.append(ScoreFunction(importlib.import_module("of_test").scaled).name)
    sys.modules.pop("of_test", None)
    assert names[0] == names[1] and len(set(names)) == 3


REDEFINED = """
import importlib.util, json, pathlib, sys, tempfile, torch
from perf import null_driver
null_driver.install()
from tritonattn import ScoreFunction, attention, gpu
from tritonattn.configs.key import key_of
from tritonattn.runtime.packed_arguments import problem_of
from tritonattn.kernels.forward import forward_kernel
path, names, binaries = pathlib.Path(tempfile.mkdtemp()) / "mine.py", [], []
q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
for factor in (2.0, 3.0, 2.0):
    path.write_text("import triton\\n@triton.jit\\ndef scaled(score, batch, head, query, key, payload):\\n"
                    f"    return score * {factor}\\n")
    spec = importlib.util.spec_from_file_location("mine", path)
    mine = importlib.util.module_from_spec(spec)
    sys.modules["mine"] = mine
    spec.loader.exec_module(mine)
    function = ScoreFunction(mine.scaled)
    names.append(function.name)
    attention(q, q, q, score_function=function)
    cached, = forward_kernel.device_caches.values()
    binaries.append(list(cached[0].values())[-1].hash)
print(json.dumps([names, binaries, key_of("forward", problem_of(q, q, q, score_function=function), gpu.KNOWN["sm_90"])]))
"""


def test_a_function_that_was_edited_gets_binaries_of_its_own():
    """Triton's keys hold the names of functions in constants, not their code."""
    names, binaries, key = compiled(REDEFINED, fresh=True)
    assert names[0] == names[2] != names[1] and names[0].startswith("mine:scaled#")
    assert binaries[0] != binaries[1] and f"score_function {names[0]}" in key


def loss_of(q, k, v, payload, function=attention, **options):
    return attention(q, k, v, score_function=ScoreFunction(penalty, one, payload), **options).square().sum()


def test_functional_transforms(device):
    """Under vmap, `batch` counts in the mapped function, and every element may have its payload."""
    q, k, v, *_ = tensors(device, torch.float32, batch=(3, 2), n_q=9, n_k=12)
    payload = torch.rand(3, 2, device=device)
    gradient = torch.func.grad(loss_of, (0, 1, 2))
    with config.pinned(TILES):
        mapped = torch.vmap(gradient)(q, k, v, payload)
        alone = [gradient(*each) for each in zip(q, k, v, payload)]
        by_batch = torch.vmap(lambda *x: attention(*x, score_function=ScoreFunction(squares)))(q, k, v)
        expected = [attention(*each, score_function=ScoreFunction(squares)) for each in zip(q, k, v)]
    torch.testing.assert_close(mapped, tuple(map(torch.stack, zip(*alone))), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_batch, torch.stack(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", *slow("inductor")])
def test_compiled_in_one_graph(backend, device):
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in tensors(device, torch.float32, n_q=9, n_k=9)[:3]]
    function = ScoreFunction(penalty, one, torch.rand(2, device=device))

    def loss(*inputs):
        return attention(*inputs, score_function=function).square().sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs))


def test_exported(device):
    function = ScoreFunction(penalty, one, torch.rand(2, device=device))

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, score_function=function)

    given = tensors(device, torch.float32)[:3]
    program = torch.export.export(Layer(), tuple(given)).module()
    torch.testing.assert_close(program(*given), Layer()(*given))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    inputs = [x.requires_grad_() for x in tensors(device, torch.bfloat16)[:3]]
    inputs.append(torch.rand(2, device=device))
    expected = torch.autograd.grad(loss_of(*inputs), inputs[:3])
    plan.clear()  # the first pass is a new call, the recomputed one a known call
    checkpoint(loss_of, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected))


def test_opcheck(device):
    q, k, v, *_ = tensors(device, torch.float16, batch=(1,), n_q=20, n_k=20)
    function = ScoreFunction(penalty, one, torch.rand(2, device=device))
    numbers = 0.25, None, 0, True, 0.0, None, None, None, False, False, False, "softmax", None, function.name, None
    inputs = [q, k, v, *[None] * 9, function.payload, None, None, None]
    inputs[:3] = (x.requires_grad_() for x in inputs[:3])
    torch.library.opcheck(custom_op.forward_op, (*inputs, *numbers, True))
    inputs = [x if x is None else x.detach() for x in inputs]
    o, lse, *left, _, _, _ = custom_op.forward_op(*inputs, *numbers, True)
    torch.library.opcheck(custom_op.backward_op, (torch.randn_like(o), torch.randn_like(lse), o, *left, *inputs, *numbers,
                                                  [True] * 3 + [False] * 4))


@ALL
@pytest.mark.interpreted
def test_values_and_derivatives_of_given_scores(name, device):
    both, scores = Both(name, device), torch.randn(2, 3, 37, 45, dtype=torch.float64, device=device)
    function, leaf = both.of(attention), scores.clone().requires_grad_()
    expected = both.of(reference.attention)(leaf, *reference.indices(leaf.shape, device=device))
    slopes, = torch.autograd.grad(expected[expected > -math.inf].sum(), leaf)
    for transposed in (False, True):
        torch.testing.assert_close(evaluate(function, scores, transposed=transposed), expected.detach())
        ours = evaluate(function, scores, derivative=True, transposed=transposed)
        torch.testing.assert_close(torch.where(expected == -math.inf, 0, ours), slopes)
    ours = as_torch(function)(leaf, None, None, None, None)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours[ours > -math.inf].sum(), leaf)[0], slopes)


@pytest.mark.interpreted
@pytest.mark.parametrize("pair", [(squares, squares_slope), (magnitude, sign), (squares, None)],
                         ids=["squares", "kink", "inference"])
def test_right_functions_pass_the_check(pair, device):
    assert check_score_function(ScoreFunction(*pair), (2, 2, 33, 70), device=device) is None
    payload = torch.rand(2, device=device)
    check_score_function(ScoreFunction(penalty, one, payload), (2, 2, 33, 70))


@pytest.mark.interpreted
@pytest.mark.parametrize("pair, message", [
    ((squares, one), r"expected the derivative of finite differences, \S+, got 1, for a score of \S+ at batch 0, head 0, "
                     "query 0, key 0"),
    ((relative_to_the_row, one), "expected the same in tiles whose rows are keys"),
    ((squares, slope_of_rows), "expected a derivative that is the same in tiles whose rows are keys"),
    ((added, one), "for a score of nan it is nan, got -inf, for a score of .* key 3"),
    ((masked_by_score, one), "expected -inf for every score of a pair or for none .*; for a score of 0 it is 0, got -inf"),
    ((root, one), "expected a number or -inf, got nan, for a score of -"),
    ((nan_at_key_5, one), r"got nan, for a score of \S+ at batch 0, head 0, query 0, key 5"),
    ((magnitude, one), "expected the derivative of finite differences, -1, got 1, for a score of -"),
], ids=["derivative", "row", "slope", "added", "mask", "nan", "place", "kink"])
def test_wrong_functions_are_found(pair, message, device):
    with pytest.raises(ValueError, match=message):
        check_score_function(ScoreFunction(*pair), (2, 2, 33, 40), device=device)


def test_the_check_needs_a_contiguous_payload_on_the_device():
    with pytest.raises(RuntimeError, match="payload: expected a contiguous tensor"):
        check_score_function(ScoreFunction(penalty, one, torch.zeros(4, 2)[:, 0]), (1, 4, 4, 4), device="cpu")


@pytest.mark.parametrize("arguments, message", [
    ((penalty, (1, 1, 4, 4)), "score_function: expected a tritonattn.ScoreFunction, got"),
    ((ScoreFunction(squares), (4, 4)), r"shape: expected four positive sizes .*, got \(4, 4\)"),
    ((ScoreFunction(squares), (1, 1, 0, 4)), r"shape: expected four positive sizes .*, got \(1, 1, 0, 4\)"),
], ids=["function", "rank", "zero"])
def test_bad_arguments_of_the_check_raise(arguments, message):
    with pytest.raises(TypeError, match=message):
        check_score_function(*arguments)
