"""The aten route: torch's function from C++ and saved references, and the operators of GPUs in the interpreter."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._nn import scaled_dot_product_attention as torch_sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tritonattn
from tests import COMPILED
from tests.integrations.test_sdpa_patch import (
    close,
    counts,
    kernels,
    make,
    outputs,
    plain,
    qkv,
    runs_ours,
    tallied,
    with_gradients,
)
from tritonattn import reference
from tritonattn.integrations import aten_overrides, dispatch_log, sdpa_patch, support
from tritonattn.runtime import arguments, custom_op

pytestmark = [pytest.mark.usefixtures("patch_off"), *(pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (
    "`?torch.jit", "tritonattn does not support", "There is a performance drop", ".*Profiler clears events"))]
# a reference that enable() does not rebind, as in a closure or in C++
KEPT = {"attend": torch_sdpa}


def attend(*args, **options):
    return KEPT["attend"](*args, **options)


def torchs_with_gradients(*args, **options):
    """Return torch's own result and gradients, whatever route is on."""
    with switched_off():
        return with_gradients(attend, *args, **options)


@contextlib.contextmanager
def switched_off():
    claims = sdpa_patch._claims
    tritonattn.disable()
    try:
        yield
    finally:
        with dispatch_log.LOCK:
            sdpa_patch._set(claims)


def rows_first(inputs):
    """Return the same numbers, [B, H, L, D] laid out as [B, L, H, D]."""
    return [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]


# torch's function


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"heads": 4, "kv_heads": 2, "enable_gqa": True}, {"n_q": 4, "is_causal": True},
    {"n_k": 3, "is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"},
], ids=str)
def test_saved_sdpa_reference_is_redirected(options, device):
    dtype = torch.float16 if COMPILED else torch.float32
    sizes = {name: options.pop(name) for name in ("heads", "kv_heads", "n_q", "n_k") if name in options}
    inputs = qkv(device, dtype=dtype, **sizes)
    if kind := options.pop("attn_mask", None):
        scores = torch.randn(6, 6, device=device, dtype=dtype)
        options["attn_mask"] = scores > -1 if kind == "bool" else scores
    for given in (inputs, rows_first(inputs)):
        expected = torchs_with_gradients(given, **options)
        with tritonattn.swapped(route="aten"):
            assert torch_sdpa is torch._C._nn.scaled_dot_product_attention is F.scaled_dot_product_attention
            ours = with_gradients(attend, given, **options)
        close(ours, expected) if dtype == torch.float32 else torch.testing.assert_close(ours, expected, atol=4e-2, rtol=4e-2)
    assert counts() == tallied(handled=2)


@pytest.mark.skipif(COMPILED, reason="the CPU operator is replaced in the interpreter only")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype, device):
    inputs = qkv(device)
    given = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with tritonattn.swapped(route="aten"):
        ours = with_gradients(attend, given)
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(*inputs).dtype == torch.bfloat16
    assert counts() == tallied(handled=2)
    atol = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(ours, torchs_with_gradients(given), atol=atol, rtol=atol)


def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.skipif(COMPILED, reason="float32 with a small head is no flash attention on a GPU")
def test_cpp_callers_are_redirected(device):
    inputs = qkv(device)
    program = torch.jit.script(scripted)
    with tritonattn.swapped(route="aten"):
        close(with_gradients(program, inputs), torchs_with_gradients(inputs, is_causal=True))
        checked = checkpoint(attend, *inputs, use_reentrant=False)
        close(torch.autograd.grad(checked.square().sum(), inputs), torchs_with_gradients(inputs)[1:])
        close(torch.vmap(attend)(*(torch.stack([x, x]) for x in inputs))[1], attend(*inputs))
    assert counts()[0] >= 4 and not counts()[1]


@pytest.mark.parametrize("kind", ["mha", "encoder layer"])
def test_the_cpp_fast_path_is_redirected(kind, device):
    module, x = make(kind, device).eval(), torch.randn(2, 6, 16, device=device)
    args, options = ((x, x, x), {"need_weights": False}) if kind == "mha" else ((x,), {})
    with torch.no_grad():
        theirs = outputs(module, *args, **options)
        with tritonattn.swapped(route="aten"):
            close(outputs(module, *args, **options), theirs)
    assert counts() == tallied(handled=1)


@pytest.mark.skipif(COMPILED, reason="float32 with a small head is no flash attention on a GPU")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_function_follows_the_route(backend, device):
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for given in (qkv(device), rows_first(qkv(device))):
        expected = torchs_with_gradients(given, is_causal=True)
        for on in (False, True, False):
            with tritonattn.swapped(route="aten") if on else contextlib.nullcontext():
                found = []
                assert runs_ours(lambda: found.extend(with_gradients(compiled, given, is_causal=True))) is on  # noqa: B023
                close(tuple(found), expected)


def test_the_math_kernel_is_not_redirected(device):
    inputs = qkv(device)
    with tritonattn.swapped(route="aten"), sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attend(*inputs), sdpa_patch.TORCH_SDPA(*inputs))
    assert counts() == tallied()


@pytest.mark.skipif(COMPILED, reason="the CPU operator is replaced in the interpreter only")
def test_fallbacks_beneath_torchs_function(device, monkeypatch):
    inputs = qkv(device)
    with tritonattn.swapped(route="aten"):
        ours, theirs = with_gradients(attend, inputs, scale=1e39), torchs_with_gradients(inputs, scale=1e39)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        monkeypatch.setattr(support, "SUPPORTED_DTYPES", (torch.float16,))
        assert torch.equal(attend(*inputs), sdpa_patch.TORCH_SDPA(*inputs))
        monkeypatch.setenv("TRITONATTN_STRICT", "1")
        with pytest.raises(RuntimeError, match="torch computes it: dtype torch.float32"):
            attend(*inputs)
    assert counts() == tallied(scale=1, **{"dtype torch.float32": 2})


# enable and disable


def test_both_routes_nest():
    before = kernels()

    def on():
        return F.scaled_dot_product_attention is sdpa_patch.scaled_dot_product_attention, kernels() != fast_path_alone

    with tritonattn.swapped():
        fast_path_alone = kernels()
    assert kernels() == before
    with tritonattn.swapped():
        with tritonattn.swapped(route="aten"):
            assert on() == (True, True)
        assert on() == (True, False)
    with tritonattn.swapped(route="aten"):
        with tritonattn.swapped():
            assert on() == (True, True)
        assert on() == (False, True)
        tritonattn.enable(route="aten")
    assert on() == (False, True)
    tritonattn.enable()
    assert on() == (True, True)
    tritonattn.disable()
    assert kernels() == before and F.scaled_dot_product_attention is torch_sdpa
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.skipif(COMPILED, reason="float32 with a small head is no flash attention on a GPU")
def test_a_call_counts_once_with_both_routes(device):
    inputs = qkv(device)
    with tritonattn.swapped(), tritonattn.swapped(route="aten"):
        close(F.scaled_dot_product_attention(*inputs), attend(*inputs))
    assert counts() == tallied(handled=2)


def test_threads_call_while_another_switches(monkeypatch):
    """The dispatcher frees a kernel at once, also if a thread is about to call it."""
    x, y, module, wrong, done = torch.randn(1, 2, 4, 8), torch.randn(2, 4, 16), make("mha", "cpu").eval(), [], threading.Event()
    # neither interprets a kernel, which would leave no time to switch
    monkeypatch.setattr(aten_overrides, "tritonattn_sdpa", lambda q, k, v, mask: q)
    monkeypatch.setattr(aten_overrides, "forward_op", lambda q, *others: (q, q[..., 0], q.new_empty(0), q.new_empty(0)))

    def work():
        try:
            with torch.no_grad():
                while not done.is_set():
                    attend(x, x, x)
                    module(y, y, y, need_weights=False)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(1000):
        with tritonattn.swapped(route="aten"):
            pass
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    monkeypatch.setattr(aten_overrides, "GRACE", 0.0)
    with tritonattn.swapped(route="aten"):
        pass
    assert len(aten_overrides._retired) < 10, "kernels removed long ago are freed"


class Handle:
    def remove(self):
        pass


def test_another_implementation_is_restored(monkeypatch):
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, register_flash_attention_impl

    register_flash_attention_impl("another", register_fn=Handle)
    activate_flash_attention_impl("another")
    before = kernels()
    with tritonattn.swapped(route="aten"):
        assert current_flash_attention_impl() == "tritonattn"
    assert current_flash_attention_impl() == "another" and kernels() == before
    with tritonattn.swapped(route="aten"):
        activate_flash_attention_impl("another")
    assert current_flash_attention_impl() == "another" and kernels() == before
    with tritonattn.swapped(route="aten"):
        activate_flash_attention_impl("another")
        with tritonattn.swapped(route="aten"):
            assert current_flash_attention_impl() == "tritonattn"
    assert current_flash_attention_impl() == "another" and kernels() == before
    torch.nn.attention.restore_flash_attention_impl()
    torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("another")


@pytest.mark.skipif(COMPILED, reason="the CPU operator is replaced in the interpreter only")
@pytest.mark.parametrize("first", ["ours", "torch's"])
@pytest.mark.parametrize("kind", [None, "mask", "a row without keys"])
def test_forward_and_backward_of_torch_and_tritonattn_mix(first, kind, device):
    """A row that attends to no key gets gradients of 0 from the lse of either forward pass."""
    inputs = qkv(device)
    mask = None if kind is None else torch.randn(6, 6, device=device)
    if kind == "a row without keys":
        mask[2] = -torch.inf
    expected = torchs_with_gradients(inputs, mask)
    with tritonattn.swapped(route="aten") if first == "ours" else contextlib.nullcontext():
        out = attend(*inputs, mask)
    with tritonattn.swapped(route="aten") if first != "ours" else contextlib.nullcontext():
        close(torch.autograd.grad(out.square().sum(), inputs), expected[1:])


# operators of GPUs, in the interpreter on the CPU, where torch has no kernel of them

OPS = {
    "flash": lambda q, k, v, bias, p, causal: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, causal),
    "efficient": lambda *args: torch.ops.aten._scaled_dot_product_efficient_attention(*args[:4], True, *args[4:]),
    "cudnn": lambda *args: torch.ops.aten._scaled_dot_product_cudnn_attention(*args[:4], True, *args[4:]),
}
interpreted = pytest.mark.skipif(COMPILED, reason="compared in float32; a GPU's own kernels are compared above")


def exactly(q, k, v, bias=None, causal=False, align="top_left"):
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    if causal:
        s = s.masked_fill(~reference.visible(*s.shape[-2:], causal=True, align=align, device=s.device), -torch.inf)
    s = s if bias is None else s + bias
    return torch.nan_to_num(s.softmax(-1)) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), s.logsumexp(-1)


@interpreted
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("causal", [False, True])
def test_operators_of_gpus(name, causal, device):
    inputs = qkv(device, n_q=4, heads=4, kv_heads=2)
    with tritonattn.swapped(route="aten"):
        out, lse, *_ = OPS[name](*inputs, None, 0.0, causal)
        gradients = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        assert counts() == tallied(handled=1)
    o, expected_lse = exactly(*inputs, None, causal, "bottom_right" if name == "flash" else "top_left")
    close(out, o)
    close(lse.reshape(*lse.shape[:3])[..., :4], expected_lse)
    close(gradients, torch.autograd.grad(o.square().sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", [{"scale": -0.7}, {"scale": 0.0}, {"scale": 1e-40}, {"bias": True}], ids=str)
def test_statistics_of_lse_give_the_same_gradients(options, dtype, device):
    """The backward operators of torch receive only lse; rows without keys have lse = inf there."""
    q, k, v, do = (torch.randn(1, 2, 20, 16, device=device).to(dtype) for _ in range(4))
    bias = torch.zeros(20, 20, device=device).index_fill_(0, torch.tensor([3], device=device), -torch.inf)
    inputs = arguments.prepare(q, k, v, **({"bias": bias.to(dtype)} if "bias" in options else options))
    o, lse, statistics, residual, *_ = custom_op.forward_op(*inputs, False)
    wanted = [*[True] * 3, *[False] * 4]
    ours = custom_op.backward_op(do, None, o, statistics, residual, *inputs, wanted)
    again = arguments.statistics_of_lse(lse.masked_fill(lse == -torch.inf, torch.inf), inputs)
    torch.testing.assert_close(custom_op.backward_op(do, None, o, again, residual, *inputs, wanted)[:3], ours[:3],
                               atol=1e-3 if dtype == torch.float16 else 1e-6, rtol=1e-3 if dtype == torch.float16 else 1e-5)


@interpreted
@pytest.mark.parametrize("name", OPS)
def test_dropout_falls_back(name, device):
    """Their schemas have no place for the seed; on the CPU torch has no kernel of them."""
    inputs = qkv(device)
    with tritonattn.swapped(route="aten"), pytest.raises(NotImplementedError, match="torch has no kernel"):
        OPS[name](*inputs, None, 0.5, False)
    assert counts() == tallied(**{"dropout on the aten route": 1})


@interpreted
def test_the_backward_pass_of_dropout_is_torchs(device, monkeypatch):
    monkeypatch.setattr(aten_overrides, "backward_op", lambda *_: pytest.fail("torch's dropout has another seed"))
    q, k, v = plain(device)
    with tritonattn.swapped(route="aten"):
        o, lse, *_ = OPS["flash"](q, k, v, None, 0.0, False)
        state = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
        with pytest.raises(NotImplementedError, match="torch has no kernel"):
            torch.ops.aten._scaled_dot_product_flash_attention_backward(
                o, q, k, v, o, lse, None, None, 6, 6, 0.5, False, *state)


@interpreted
@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_a_bias_and_its_gradient(name, device):
    inputs, bias = qkv(device), torch.randn(1, 2, 6, 6, device=device, requires_grad=name == "efficient")
    hidden = torch.rand(6, 6, device=device) < 0.3
    hidden[2] = True  # a row that attends to no key
    leaves = [*inputs, bias] if bias.requires_grad else inputs
    with tritonattn.swapped(route="aten"):
        masked = bias.masked_fill(hidden, -torch.inf)
        gradients = torch.autograd.grad(OPS[name](*inputs, masked, 0.0, False)[0].square().sum(), leaves)
        broadcast = torch.randn(6, device=device)
        close(OPS[name](*inputs, broadcast.expand(1, 2, 6, 6), 0.0, False)[0], exactly(*inputs, broadcast)[0])
    out = tritonattn.attention(*inputs, bias=bias.masked_fill(hidden, -torch.inf))
    close(gradients, torch.autograd.grad(out.square().sum(), leaves))
    assert counts() == tallied(handled=2)


@interpreted
def test_a_bias_of_the_lowest_number(device):
    """Other rows than those wholly at the lowest number have exact gradients."""
    inputs, bias = qkv(device), torch.randn(1, 2, 6, 6, device=device)
    bias = bias.masked_fill(torch.ones(6, 6, device=device).bool().triu(1), torch.finfo(torch.float32).min)
    with tritonattn.swapped(route="aten"):
        results = with_gradients(lambda *qkv: OPS["efficient"](*qkv, bias, 0.0, False)[0], inputs)
    close(results, with_gradients(lambda *qkv: tritonattn.attention(*qkv, bias=bias), inputs))


@interpreted
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("n", [6, 33])
def test_results_have_the_strides_of_torchs_meta_functions(name, graded, n, device):
    """Inductor relies on the strides of the meta functions."""
    def described(x):
        return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

    inputs = [x.detach().requires_grad_(graded) for x in qkv(device, n, n, dtype=torch.float16)]
    bias = None if name == "flash" else torch.randn(1, 2, n, n, device=device, dtype=torch.float16)
    if name == "efficient":
        bias.requires_grad_(graded)
    leaves = [x for x in (*inputs, bias) if x is not None and x.requires_grad]
    with tritonattn.swapped(route="aten"):
        for given in (inputs, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]):
            ours = OPS[name](*given, bias, 0.0, False)
            theirs = OPS[name](*(x.to("meta") for x in given), None if bias is None else bias.to("meta"), 0.0, False)
            assert [*map(described, ours)] == [*map(described, theirs)]
            if leaves:
                assert all(x.isfinite().all() for x in torch.autograd.grad(ours[0].square().sum(), leaves))


@interpreted
def test_gradients_have_the_strides_of_torchs_meta_functions(device):
    q, k, v = (x.detach() for x in qkv(device, 6, 5))
    bias = torch.randn(1, 2, 6, 5, device=device)
    with tritonattn.swapped(route="aten"):
        o, lse, *random = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
        backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        for wanted in ([True] * 4, [False, True, False, False]):
            ours = backward(o, q, k, v, bias, o, lse, *random, 0.0, wanted)
            theirs = backward(*(x.to("meta") for x in (o, q, k, v, bias, o, lse, *random)), 0.0, wanted)
            for one, other, want in zip(ours, theirs, wanted):
                assert one is None if not want else (one.shape, one.stride()) == (other.shape, other.stride())


@interpreted
def test_malformed_calls_of_operators(device):
    q, k, v = (x.detach() for x in qkv(device))
    with tritonattn.swapped(route="aten"):
        for tensors in ((q, k, v.half()), (q, k.double(), v), (q[0], k[0], v[0]), (q[0, 0], k[0, 0], v[0, 0]),
                        (q[:, :0], k[:, :0], v[:, :0]), (q, k[..., :4], v)):
            with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention: torch has no kernel"):
                OPS["flash"](*tensors, None, 0.0, False)
        with pytest.raises(NotImplementedError):
            OPS["efficient"](q, k, v, torch.ones(1, 2, 6, 6, device=device), 0.0, True)
        with pytest.raises(NotImplementedError):
            OPS["efficient"](q, k, v, torch.ones(1, 2, 6, 6, device=device, dtype=torch.float64), 0.0, False)
    assert counts()[0] == 0


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [
    SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, None])
@pytest.mark.parametrize("causal", [False, True])
def test_every_fused_kernel_of_a_gpu_is_redirected(backend, causal, device):
    inputs = qkv(device, 96, 96, heads=4, d=64, dtype=torch.float16)
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        expected = torchs_with_gradients(inputs, is_causal=causal)
        with tritonattn.swapped(route="aten"):
            assert runs_ours(lambda: torch.testing.assert_close(
                with_gradients(attend, inputs, is_causal=causal), expected, atol=4e-2, rtol=4e-2))
    assert counts() == tallied(handled=1)


@pytest.mark.gpu
def test_a_learned_bias_on_a_gpu(device):
    inputs, bias = qkv(device, 64, 64, heads=4, d=64, dtype=torch.float16), torch.randn(4, 64, 64, device=device).half()
    leaves = [*inputs, bias.requires_grad_()]
    with tritonattn.swapped(route="aten"):
        out = attend(*inputs, bias)
        found = torch.autograd.grad(out.square().sum(), leaves)
        assert attend(*inputs, dropout_p=0.5).isfinite().all()
    assert counts() == tallied(handled=1, **{"dropout on the aten route": 1})
    torch.testing.assert_close((out, *found), (lambda o: (o, *torch.autograd.grad(o.square().sum(), leaves)))(
        attend(*inputs, bias)), atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
def test_compiled_for_a_gpu(device):
    inputs = qkv(device, 96, 96, heads=4, d=64, dtype=torch.float16)
    compiled = torch.compile(attend, fullgraph=True)
    expected = torchs_with_gradients(inputs, is_causal=True)
    for on in (False, True, False):
        with tritonattn.swapped(route="aten") if on else contextlib.nullcontext():
            assert runs_ours(lambda: torch.testing.assert_close(
                with_gradients(compiled, inputs, is_causal=True), expected, atol=4e-2, rtol=4e-2)) is on


@pytest.mark.gpu
def test_a_layer_on_a_gpu(device):
    layer, x = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True, device=device).eval().half(), torch.randn(2, 32, 64)
    x = x.to(device).half()
    with torch.no_grad():
        theirs = layer(x)
        with tritonattn.swapped(route="aten"):
            torch.testing.assert_close(layer(x), theirs, atol=2e-2, rtol=2e-2)
    assert counts() == tallied(handled=1)
