"""Rivals compute what the problem says, or say why not. Packages that are not here are stood in for, signature and all."""

import contextlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias

import tritonattn
from perf import baselines
from perf.baselines import Refused
from perf.cases import CAUSAL, problem
from perf.measure import draw
from tritonattn import reference

CPU = torch.device("cpu")
F32 = torch.float32
PROBLEMS = {
    "full": problem(2, 2, 24, 16, dtype=F32),
    "causal": problem(1, 2, 24, 16, CAUSAL, dtype=F32),
    "causal, more keys": problem(1, 2, (10, 24), 16, CAUSAL, dtype=F32),
    "grouped, bottom right": problem(1, (4, 2), (10, 24), 16, CAUSAL, dtype=F32, bottom_right=True),
    "window": problem(1, (4, 1), 24, 16, (5, 0), dtype=F32),
    "two-sided window": problem(1, 2, (20, 24), 16, (5, 3), dtype=F32, bottom_right=True),
}


def expected(posed, q, k, v):
    align = "bottom_right" if posed.shift else "top_left"
    return reference.attention(q, k, v, window=posed.window, align=align)


def agrees(function, posed, around=contextlib.nullcontext):
    q, k, v, _ = draw(posed, CPU, 1)[0]
    with around():
        torch.testing.assert_close(function(q, k, v), expected(posed, q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("posed", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", ["torch", "math", "eager"])
def test_rivals_of_torch(name, posed):
    rival = baselines.everyone("cpu")[name]
    agrees(rival.build(posed, CPU), posed, rival.around)


def test_a_backend_is_forced_by_what_surrounds_it_not_by_each_call(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.nn.attention, "_sdpa_kernel", lambda backends, *_: entered.append(backends))
    function = baselines.everyone("cpu")["math"].build(PROBLEMS["full"], CPU)
    agrees(function, PROBLEMS["full"])
    assert not entered
    with baselines.everyone("cpu")["math"].around():
        assert entered == [[SDPBackend.MATH]]


@pytest.mark.parametrize(("name", "backend", "causal", "kind"), [
    ("full", None, False, type(None)), ("causal", "cudnn", True, type(None)), ("causal, more keys", None, True, type(None)),
    ("grouped, bottom right", None, False, CausalBias), ("grouped, bottom right", "flash", False, CausalBias),
    ("grouped, bottom right", "efficient", False, CausalBias), ("grouped, bottom right", "cudnn", False, torch.Tensor),
    ("grouped, bottom right", "math", False, torch.Tensor), ("window", None, False, torch.Tensor),
    ("two-sided window", "flash", False, torch.Tensor),
])
def test_torch_is_told_of_a_mask_in_its_own_words(name, backend, causal, kind):
    found, mask = baselines._attn_mask(PROBLEMS[name], CPU, backend)
    assert found == causal and type(mask) is kind
    if kind is torch.Tensor:
        # as the kernels want it: nothing is converted or copied within a call
        assert mask.dtype == F32 and mask.stride(-1) == 1 and mask.stride(0) % 16 == 0
        assert torch.equal(mask == 0, baselines._mask(PROBLEMS[name], CPU)) and mask.unique().tolist() == [-torch.inf, 0]


@pytest.mark.parametrize(("flash", "efficient", "choice"), [(True, True, "flash"), (False, True, "efficient"),
                                                            (False, False, "cudnn")])
def test_the_choice_behind_a_bottom_right_mask(flash, efficient, choice, monkeypatch):
    monkeypatch.setattr(baselines, "can_use_flash_attention", lambda asked: flash)
    monkeypatch.setattr(baselines, "can_use_efficient_attention", lambda asked: efficient)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v, mask, dropout, causal, enable_gqa: (
        SDPBackend.CUDNN_ATTENTION.value if mask.dtype == torch.bool and enable_gqa and not causal else -1))
    posed = PROBLEMS["grouped, bottom right"]
    assert baselines.sdpa_choice(posed, *draw(posed, CPU, 1)[0][:3]) == choice


@pytest.mark.interpreted
@pytest.mark.parametrize("posed", [PROBLEMS["grouped, bottom right"], PROBLEMS["window"]])
def test_ours(posed):
    for name in ("tritonattn", "tritonattn-plain-grad"):
        agrees(baselines.everyone("cpu")[name].build(posed, CPU), posed)


@pytest.mark.parametrize("posed", PROBLEMS.values(), ids=PROBLEMS)
def test_flex_is_given_the_same_mask(posed, monkeypatch):
    # compiled it needs a C++ compiler and a minute; the mask and the arguments are ours, the compiler is not
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    agrees(baselines.flex(posed, CPU), posed)


def stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """What the package documents: [batch, length, heads, size], aligned bottom-right, -1 unbounded."""
    left, right = (None if side < 0 else side for side in window_size)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return reference.attention(q, k, v, causal=causal, window=(left, right), align="bottom_right").transpose(1, 2)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "causal, more keys"])
def test_flash_attn(name, several, monkeypatch):
    function = (lambda *inputs, **options: (flash_attn_func(*inputs, **options), None)) if several else flash_attn_func
    stand_in(monkeypatch, "flash_attn", flash_attn_func=function)
    agrees(baselines.flash_attn(PROBLEMS[name], CPU, "flash_attn"), PROBLEMS[name])


def test_flash_attn_has_no_top_left(monkeypatch):
    stand_in(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    with pytest.raises(Refused, match="bottom-right"):
        baselines.flash_attn(PROBLEMS["causal, more keys"], CPU, "flash_attn")


def xformers_attention(q, k, v, attn_bias=None):
    """[batch, length, heads, size], or [batch, length, groups, heads, size]; queries, keys and values of the same heads."""
    assert q.shape[2:-1] == k.shape[2:-1] == v.shape[2:-1]
    shape = q.shape
    q, k, v = (x.flatten(2, -2).transpose(1, 2) for x in (q, k, v))
    causal = attn_bias is not None
    return reference.attention(q, k, v, causal=causal, align=attn_bias).transpose(1, 2).reshape(*shape[:-1], -1)


@pytest.mark.parametrize("name", ["full", "causal", "causal, more keys", "grouped, bottom right"])
def test_xformers(name, monkeypatch):
    package = stand_in(monkeypatch, "xformers")
    package.ops = stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=xformers_attention,
                           LowerTriangularMask=lambda: "top_left")
    package.ops.fmha = stand_in(monkeypatch, "xformers.ops.fmha", attn_bias=types.SimpleNamespace(
        LowerTriangularFromBottomRightMask=lambda: "bottom_right"))
    agrees(baselines.xformers(PROBLEMS[name], CPU), PROBLEMS[name])


def test_what_is_missing_says_why(monkeypatch):
    here = baselines.everyone("cpu")
    assert here["cudnn"].missing == here["flex"].missing == "needs a GPU" and here["torch"].missing is None
    assert baselines._imported("no_such_package") == "ModuleNotFoundError: No module named 'no_such_package'"


def test_matrices_of_scores_that_do_not_fit_are_refused():
    with pytest.raises(Refused, match=r"4 matrices of scores, and copies, are 1024 GiB, of 8 GiB"):
        baselines.eager(problem(1, 8, 131072, 64), CPU)
    # in float32, with keys and values in float32 too
    with pytest.raises(Refused, match=r"6 matrices of scores, and copies, are 3072 GiB, of 8 GiB"):
        baselines.everyone("cpu")["math"].build(problem(1, 8, 131072, 64), CPU)


@pytest.mark.parametrize(("heads", "dtype", "needed"), [
    (8, F32, 4 * 8 * 4 * 2**20), ((8, 1), F32, (4 * 2**20 + 2**20 * 128) * 8 * 4),
    (8, torch.bfloat16, (4 * 2**20 + 2**20 * 128) * 8 * 4),
])
def test_copied_keys_and_values_count(heads, dtype, needed, monkeypatch):
    posed, device = problem(1, heads, (1, 2**20), 64, dtype=dtype), torch.device("cuda")
    for total, refused in ((needed / 0.36, True), (needed / 0.34, False)):
        properties = types.SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        with pytest.raises(Refused) if refused else contextlib.nullcontext():
            baselines._room(posed, device, 4, F32)


def test_a_version_is_of_the_packages_that_provide_a_module():
    assert f"pytest {pytest.__version__}" in baselines._version("pytest.fixtures") and baselines._version("no_such") == "unknown"
    here = baselines.everyone("cpu")
    assert here["torch"].identity == torch.__version__ and here["tritonattn"].identity == tritonattn.__version__
    assert here["cudnn"].identity == here["flash_attn"].identity == "missing"


def test_names_are_chosen():
    assert [rival.name for rival in baselines.chosen("torch,eager", "cpu")] == ["tritonattn", "torch", "eager"]
    assert [rival.name for rival in baselines.chosen("all", "cpu")] == list(baselines.everyone("cpu"))
    with pytest.raises(ValueError, match="expected some of tritonattn, .*, got cutlass, x"):
        baselines.chosen("cutlass,torch,x", "cpu")


@pytest.fixture
def as_users_run(unwritten_memory_is_nan):
    """Without the deterministic algorithms that tests ask for, which cuDNN has not."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_the_backend_that_is_chosen_is_the_one_that_runs(backend, device):
    posed, rival = problem(2, 8, 512, 64, CAUSAL), baselines.everyone("cuda")[backend]
    q, k, v, _ = draw(posed, device, 1)[0]
    with rival.around():
        assert baselines.sdpa_choice(posed, q, k, v) == backend
        o = rival.build(posed, device)(q, k, v)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("backend", ["torch", "flash", "efficient", "cudnn", "math"])
def test_bottom_right_masks_on_a_gpu(backend, device):
    posed, rival = problem(2, 4, (300, 515), 64, CAUSAL, bottom_right=True), baselines.everyone("cuda")[backend]
    q, k, v, _ = draw(posed, device, 1)[0]
    with rival.around():
        o = rival.build(posed, device)(q, k, v)
    torch.testing.assert_close(o, expected(posed, q, k, v), atol=2e-2, rtol=2e-2)
    if backend == "torch":
        assert baselines.sdpa_choice(posed, q, k, v) == "flash"
