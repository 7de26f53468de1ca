"""Baselines compute the problem or raise Unsupported. Packages that are not installed are replaced by fakes."""

import contextlib
import functools
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias

import tritonattn
from perf import baselines
from perf.baselines import Unsupported
from perf.cases import CAUSAL, Case, packed
from perf.cases import problem as make_problem
from perf.measure import call_of, draw_inputs, expected_tensors
from tritonattn import reference

CPU = torch.device("cpu")
F32 = torch.float32
PROBLEMS = {
    "full": make_problem(2, 2, 24, 16, dtype=F32),
    "causal": make_problem(1, 2, 24, 16, CAUSAL, dtype=F32),
    "causal, more keys": make_problem(1, 2, (10, 24), 16, CAUSAL, dtype=F32),
    "grouped, bottom right": make_problem(1, (4, 2), (10, 24), 16, CAUSAL, dtype=F32, bottom_right=True),
    "window": make_problem(1, (4, 1), 24, 16, (5, 0), dtype=F32),
    "two-sided window": make_problem(1, 2, (20, 24), 16, (5, 3), dtype=F32, bottom_right=True),
}
VARIANTS = {name: replace(PROBLEMS["grouped, bottom right"], **{name: True}) for name in ("softcap", "sink")}
OFFSETS = {name: replace(PROBLEMS["grouped, bottom right"], **dict.fromkeys(name.split(" and "), True))
           for name in ("alibi", "relative", "alibi and relative")}


def expected(problem, q, k, v):
    variant = baselines.variants(problem, problem.heads, q.device)
    return reference.attention(q, k, v, window=problem.window, align=baselines.align(problem), **variant)


def assert_correct(function, problem, context=contextlib.nullcontext):
    q, k, v, _ = draw_inputs(problem, CPU, 1)[0]
    with context():
        torch.testing.assert_close(function(q, k, v), expected(problem, q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", ["torch", "math", "eager"])
def test_torch_baselines_are_correct(name, problem):
    baseline = baselines.implementations("cpu")[name]
    assert_correct(baseline.build(problem, CPU), problem, baseline.context)


@pytest.mark.parametrize("name", VARIANTS)
def test_softcap_and_sink(name):
    for baseline in ("tritonattn", "eager"):
        assert_correct(baselines.implementations("cpu")[baseline].build(VARIANTS[name], CPU), VARIANTS[name])
    with pytest.raises(Unsupported, match="no softcap and no sinks"):
        baselines.implementations("cpu")["torch"].build(VARIANTS[name], CPU)


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
def test_normalizers(name):
    problem = replace(PROBLEMS["grouped, bottom right"], normalizer=name)
    ours, eager = (baselines.implementations("cpu")[baseline].build(problem, CPU) for baseline in ("tritonattn", "eager"))
    inputs = draw_inputs(problem, CPU, 1)[0][:3]
    torch.testing.assert_close(ours(*inputs), eager(*inputs), atol=1e-5, rtol=1e-5)
    for build in (baselines.sdpa, baselines.flex, functools.partial(baselines.flash_attn, module="flash_attn")):
        with pytest.raises(Unsupported, match="computes a softmax only"):
            build(problem, CPU)


@pytest.mark.parametrize("name", ["entropy", "key_mass"])
def test_statistics(name, monkeypatch):
    """They are computed beside the output; no other baseline has them."""
    problem, asked, formed, entr = replace(PROBLEMS["causal"], **{name: True}), [], [], torch.special.entr
    monkeypatch.setattr(torch.special, "entr", lambda p: (formed.append(p), entr(p))[1])
    attention = tritonattn.attention
    monkeypatch.setattr(tritonattn, "attention", lambda *x, **options: (asked.append(options), attention(*x, **options))[1])
    for baseline in ("tritonattn", "eager"):
        assert_correct(baselines.implementations("cpu")[baseline].build(problem, CPU), problem)
    assert [options["return_stats"] for options in asked] == [[name]] and len(formed) == (name == "entropy")
    varlen = tritonattn.attention_varlen
    monkeypatch.setattr(tritonattn, "attention_varlen", lambda *x, **options: (asked.append(options), varlen(*x, **options))[1])
    rows = draw_inputs(packed(problem), CPU, 1)[0][:3]
    assert baselines.ours(packed(problem), CPU)(*rows).shape == rows[0].shape and asked[-1]["return_stats"] == [name]
    for build in (baselines.sdpa, baselines.flex, functools.partial(baselines.flash_attn, module="flash_attn")):
        with pytest.raises(Unsupported, match="returns no statistics"):
            build(problem, CPU)
    with pytest.raises(Unsupported, match="returns no statistics"):
        baselines.varlen(packed(problem), CPU)


@pytest.mark.parametrize("problem", OFFSETS.values(), ids=OFFSETS)
def test_biases_by_offset(problem, monkeypatch):
    """torch's SDPA takes them formed; FlexAttention, here uncompiled, as a score function."""
    for baseline in ("tritonattn", "torch", "eager"):
        assert_correct(baselines.implementations("cpu")[baseline].build(problem, CPU), problem)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for each in (problem, replace(problem, window=(None, None))):
        for build in (baselines.flex, baselines.sdpa, baselines.eager):
            assert_correct(build(each, CPU), each)
    with pytest.raises(Unsupported, match="no biases"):
        baselines.varlen(packed(replace(problem, shift=0, n_q=problem.n_k)), CPU)
    with pytest.raises(Unsupported, match="aligns masks bottom-right"):
        baselines.flash_attn(replace(OFFSETS["alibi"], window=(None, None), shift=0), CPU, "flash_attn")
    with pytest.raises(Unsupported, match="ALiBi in version 2 alone"):
        baselines.flash_attn(problem, CPU, "flash_attn_interface")


def test_backend_is_forced_by_the_context_not_by_each_call(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.nn.attention, "_sdpa_kernel", lambda backends, *_: entered.append(backends))
    function = baselines.implementations("cpu")["math"].build(PROBLEMS["full"], CPU)
    assert_correct(function, PROBLEMS["full"])
    assert not entered
    with baselines.implementations("cpu")["math"].context():
        assert entered == [[SDPBackend.MATH]]


@pytest.mark.parametrize(("name", "backend", "causal", "kind"), [
    ("full", None, False, type(None)), ("causal", "cudnn", True, type(None)), ("causal, more keys", None, True, type(None)),
    ("grouped, bottom right", None, False, CausalBias), ("grouped, bottom right", "flash", False, CausalBias),
    ("grouped, bottom right", "efficient", False, CausalBias), ("grouped, bottom right", "cudnn", False, torch.Tensor),
    ("grouped, bottom right", "math", False, torch.Tensor), ("window", None, False, torch.Tensor),
    ("two-sided window", "flash", False, torch.Tensor),
])
def test_mask_for_sdpa(name, backend, causal, kind):
    is_causal, mask = baselines.sdpa_mask(PROBLEMS[name], CPU, backend)
    assert is_causal == causal and type(mask) is kind
    if kind is torch.Tensor:
        # nothing is converted or copied within a call
        assert mask.dtype == F32 and mask.stride(-1) == 1 and mask.stride(0) % 16 == 0
        assert torch.equal(mask == 0, baselines.boolean_mask(PROBLEMS[name], CPU)) and mask.unique().tolist() == [-torch.inf, 0]


def test_sdpa_choice_is_unknown_where_a_causal_bias_makes_it():
    problem = PROBLEMS["grouped, bottom right"]
    assert baselines.sdpa_choice(problem, *draw_inputs(problem, CPU, 1)[0][:3]) is None


@pytest.mark.interpreted
@pytest.mark.parametrize("problem", [PROBLEMS["grouped, bottom right"], PROBLEMS["window"]])
def test_tritonattn_is_correct(problem):
    for name in ("tritonattn", "tritonattn-plain-grad"):
        assert_correct(baselines.implementations("cpu")[name].build(problem, CPU), problem)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_flex_gets_the_same_mask(problem, monkeypatch):
    # compiling takes a minute, and only the mask and the arguments are tested here
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert_correct(baselines.flex(problem, CPU), problem)


def fake_module(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """The documented contract: [batch, length, heads, size], aligned bottom-right, -1 is unbounded."""
    left, right = (None if side < 0 else side for side in window_size)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return reference.attention(q, k, v, causal=causal, window=(left, right), align="bottom_right").transpose(1, 2)


@pytest.mark.parametrize("returns_tuple", [False, True])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "causal, more keys"])
def test_flash_attn_is_correct(name, returns_tuple, monkeypatch):
    function = (lambda *inputs, **options: (flash_attn_func(*inputs, **options), None)) if returns_tuple else flash_attn_func
    fake_module(monkeypatch, "flash_attn", flash_attn_func=function)
    assert_correct(baselines.flash_attn(PROBLEMS[name], CPU, "flash_attn"), PROBLEMS[name])


def test_flash_attn_does_not_support_top_left_masks(monkeypatch):
    fake_module(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    with pytest.raises(Unsupported, match="bottom-right"):
        baselines.flash_attn(PROBLEMS["causal, more keys"], CPU, "flash_attn")


def varlen_of_flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(-1, -1)):
    left, right = (None if side < 0 else side for side in window_size)
    assert (max_seqlen_q, max_seqlen_k) == (24, 24)
    return reference.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, window=(left, right),
                                      align="bottom_right"), None


def varlen_of_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    assert enable_gqa == (query.shape[1] > key.shape[1])
    return varlen_of_flash_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)[0]


@pytest.mark.interpreted
@pytest.mark.parametrize("of_batch", [PROBLEMS["full"], make_problem(3, (4, 2), 24, 16, CAUSAL, dtype=F32),
                                      make_problem(2, 2, 24, 16, (5, 0), dtype=F32)], ids=["full", "grouped", "window"])
def test_packed_sequences(of_batch, monkeypatch):
    from torch.nn.attention import varlen

    fake_module(monkeypatch, "flash_attn", flash_attn_varlen_func=varlen_of_flash_attn)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_torch)
    problem = packed(of_batch)
    q, k, v, do = draw_inputs(problem, CPU, 1)[0]
    expected = expected_tensors(Case("packed", problem, ("both",)), (q, k, v, do))
    for build in (baselines.ours, baselines.varlen, functools.partial(baselines.flash_attn, module="flash_attn")):
        results = call_of("both", build(problem, CPU), q, k, v, do)()
        for (name, (exact, allowed)), x in zip(expected.items(), results, strict=True):
            assert x.shape == exact.shape and (x - exact).abs().max() <= allowed, name
    for refused in (baselines.sdpa, baselines.flex, baselines.eager):
        with pytest.raises(Unsupported, match="no packed sequences"):
            refused(problem, CPU)
    with pytest.raises(Unsupported, match="packed sequences only"):
        baselines.varlen(of_batch, CPU)
    with pytest.raises(Unsupported, match="no softcap"):
        baselines.varlen(replace(problem, softcap=True), CPU)


def test_missing_implementations_have_a_reason():
    known = baselines.implementations("cpu")
    assert known["cudnn"].missing == known["flex"].missing == "needs a GPU" and known["torch"].missing is None
    assert baselines.import_error("no_such_package") == "ModuleNotFoundError: No module named 'no_such_package'"


def test_version_names_the_distributions_of_a_module():
    assert f"pytest {pytest.__version__}" in baselines.package_version("pytest.fixtures")
    assert baselines.package_version("no_such") == "unknown"
    known = baselines.implementations("cpu")
    assert known["torch"].identity == torch.__version__ and known["tritonattn"].identity == tritonattn.__version__
    assert known["cudnn"].identity == known["flash_attn"].identity == "missing"


def test_implementations_are_selected_by_name():
    assert [each.name for each in baselines.select("torch,eager", "cpu")] == ["tritonattn", "torch", "eager"]
    assert [each.name for each in baselines.select("all", "cpu")] == list(baselines.implementations("cpu"))
    with pytest.raises(ValueError, match="unknown cutlass, x; known are tritonattn, tritonattn-plain-grad, torch, "):
        baselines.select("cutlass,torch,x", "cpu")


@pytest.fixture
def nondeterministic(unwritten_memory_is_nan):
    """Turn off deterministic algorithms, which cuDNN does not have."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_sdpa_choice_is_the_forced_backend(backend, device):
    problem, baseline = make_problem(2, 8, 512, 64, CAUSAL), baselines.implementations("cuda")[backend]
    q, k, v, _ = draw_inputs(problem, device, 1)[0]
    with baseline.context():
        assert baselines.sdpa_choice(problem, q, k, v) == backend
        o = baseline.build(problem, device)(q, k, v)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("backend", ["torch", "flash", "efficient", "cudnn", "math"])
def test_bottom_right_masks_are_correct_on_a_gpu(backend, device):
    problem = make_problem(2, 4, (300, 515), 64, CAUSAL, bottom_right=True)
    baseline = baselines.implementations("cuda")[backend]
    q, k, v, _ = draw_inputs(problem, device, 1)[0]
    with baseline.context():
        o = baseline.build(problem, device)(q, k, v)
    torch.testing.assert_close(o, expected(problem, q, k, v), atol=2e-2, rtol=2e-2)
