"""The deeper route: torch's own function, wherever it is called from, against itself; and GPUs' operators on the CPU."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._nn import scaled_dot_product_attention as theirs_by_name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tritonattn
from tests import COMPILED
from tests.integrations.test_sdpa_patch import close, counts, kernels, make, outputs, qkv, runs_ours, tallied, with_gradients
from tritonattn import reference
from tritonattn.integrations import aten_overrides, dispatch_log, sdpa_patch

pytestmark = [pytest.mark.usefixtures("off_and_uncounted"), *(pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (
    "`?torch.jit", "tritonattn does not serve", "There is a performance drop", ".*Profiler clears events"))]
# under a name in a class a rebinding does not find it; so is it in a closure, and in C++
KEPT = {"attend": theirs_by_name}


def attend(*args, **options):
    return KEPT["attend"](*args, **options)


def torchs_with_gradients(*args, **options):
    """Torch's own, whatever is on."""
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
    """The same numbers, [B, H, L, D] as [B, L, H, D] lies in memory."""
    return [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]


# torch's function


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"heads": 4, "kv_heads": 2, "enable_gqa": True}, {"n_q": 4, "is_causal": True},
    {"n_k": 3, "is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"},
], ids=str)
def test_whoever_keeps_torchs_function_comes_to_ours(options, device):
    dtype = torch.float16 if COMPILED else torch.float32
    sizes = {name: options.pop(name) for name in ("heads", "kv_heads", "n_q", "n_k") if name in options}
    inputs = qkv(device, dtype=dtype, **sizes)
    if kind := options.pop("attn_mask", None):
        scores = torch.randn(6, 6, device=device, dtype=dtype)
        options["attn_mask"] = scores > -1 if kind == "bool" else scores
    for given in (inputs, rows_first(inputs)):
        expected = torchs_with_gradients(given, **options)
        with tritonattn.swapped(route="aten"):
            assert theirs_by_name is torch._C._nn.scaled_dot_product_attention is F.scaled_dot_product_attention
            ours = with_gradients(attend, given, **options)
        close(ours, expected) if dtype == torch.float32 else torch.testing.assert_close(ours, expected, atol=4e-2, rtol=4e-2)
    assert counts() == tallied(served=2)


@pytest.mark.skipif(COMPILED, reason="the operator for the CPU is ours in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype, device):
    inputs = qkv(device)
    given = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with tritonattn.swapped(route="aten"):
        ours = with_gradients(attend, given)
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(*inputs).dtype == torch.bfloat16
    assert counts() == tallied(served=2)
    atol = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(ours, torchs_with_gradients(given), atol=atol, rtol=atol)


def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.skipif(COMPILED, reason="float32 with a small head is no flash attention on a GPU")
def test_cpp_comes_to_ours(device):
    inputs = qkv(device)
    program = torch.jit.script(scripted)
    with tritonattn.swapped(route="aten"):
        close(with_gradients(program, inputs), torchs_with_gradients(inputs, is_causal=True))
        checked = checkpoint(attend, *inputs, use_reentrant=False)
        close(torch.autograd.grad(checked.square().sum(), inputs), torchs_with_gradients(inputs)[1:])
        close(torch.vmap(attend)(*(torch.stack([x, x]) for x in inputs))[1], attend(*inputs))
    assert counts()[0] >= 4 and not counts()[1]


@pytest.mark.parametrize("kind", ["mha", "encoder layer"])
def test_the_cpp_fast_path_comes_to_ours(kind, device):
    module, x = make(kind, device).eval(), torch.randn(2, 6, 16, device=device)
    args, options = ((x, x, x), {"need_weights": False}) if kind == "mha" else ((x,), {})
    with torch.no_grad():
        theirs = outputs(module, *args, **options)
        with tritonattn.swapped(route="aten"):
            close(outputs(module, *args, **options), theirs)
    assert counts() == tallied(served=1)


@pytest.mark.skipif(COMPILED, reason="float32 with a small head is no flash attention on a GPU")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_function_follows_the_route(backend, device):
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for given in (qkv(device), rows_first(qkv(device))):
        expected = torchs_with_gradients(given, is_causal=True)
        for on in (False, True, False):
            with tritonattn.swapped(route="aten") if on else contextlib.nullcontext():
                found = []
                assert runs_ours(lambda: found.extend(with_gradients(compiled, given, is_causal=True))) is on  # noqa: B023
                close(tuple(found), expected)


def test_what_torch_gives_to_no_fused_kernel_is_not_reached(device):
    inputs = qkv(device)
    with tritonattn.swapped(route="aten"), sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attend(*inputs), sdpa_patch.TORCH_SDPA(*inputs))
    assert counts() == tallied()


@pytest.mark.skipif(COMPILED, reason="the operator for the CPU is ours in the interpreter")
def test_passed_on_from_beneath(device, monkeypatch):
    inputs = qkv(device)
    with tritonattn.swapped(route="aten"):
        ours, theirs = with_gradients(attend, inputs, scale=1e39), torchs_with_gradients(inputs, scale=1e39)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        monkeypatch.setattr(sdpa_patch, "SERVED_DTYPES", (torch.float16,))
        assert torch.equal(attend(*inputs), sdpa_patch.TORCH_SDPA(*inputs))
        monkeypatch.setenv("TRITONATTN_STRICT", "1")
        with pytest.raises(RuntimeError, match="which is torch's: dtype torch.float32"):
            attend(*inputs)
    assert counts() == tallied(scale=1, **{"dtype torch.float32": 2})


# the switch


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
    assert kernels() == before and F.scaled_dot_product_attention is theirs_by_name
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.skipif(COMPILED, reason="float32 with a small head is no flash attention on a GPU")
def test_a_call_counts_once_with_both_routes(device):
    inputs = qkv(device)
    with tritonattn.swapped(), tritonattn.swapped(route="aten"):
        close(F.scaled_dot_product_attention(*inputs), attend(*inputs))
    assert counts() == tallied(served=2)


def test_threads_attend_while_another_switches(monkeypatch):
    """The dispatcher drops a kernel without asking who is about to call it."""
    x, y, module, wrong, done = torch.randn(1, 2, 4, 8), torch.randn(2, 4, 16), make("mha", "cpu").eval(), [], threading.Event()
    # neither interprets a kernel, which would leave no time to switch
    monkeypatch.setattr(aten_overrides, "serve", lambda q, k, v, mask: q)
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
    assert len(aten_overrides._retired) < 10, "what nobody can be about to call any more is let go"


class Handle:
    def remove(self):
        pass


def test_another_implementation_comes_back(monkeypatch):
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
    torch.nn.attention.restore_flash_attention_impl()
    torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("another")


@pytest.mark.skipif(COMPILED, reason="the operator for the CPU is ours in the interpreter")
@pytest.mark.parametrize("first", ["ours", "torch's"])
@pytest.mark.parametrize("kind", [None, "mask", "a row that sees nothing"])
def test_either_backward_pass_takes_up_either_forward_pass(first, kind, device):
    """A row that sees nothing has gradients of 0, made from what the other forward pass left for it."""
    inputs = qkv(device)
    mask = None if kind is None else torch.randn(6, 6, device=device)
    if kind == "a row that sees nothing":
        mask[2] = -torch.inf
    expected = torchs_with_gradients(inputs, mask)
    with tritonattn.swapped(route="aten") if first == "ours" else contextlib.nullcontext():
        out = attend(*inputs, mask)
    with tritonattn.swapped(route="aten") if first != "ours" else contextlib.nullcontext():
        close(torch.autograd.grad(out.square().sum(), inputs), expected[1:])


@pytest.mark.skipif(COMPILED, reason="the operator for the CPU is ours in the interpreter")
def test_after_a_drop_only_what_was_dropped_is_still_ours(device, monkeypatch):
    inputs = qkv(device)
    with tritonattn.swapped(route="aten"):
        OPS["flash"](*inputs, None, 0.5, False)
    asked = []
    monkeypatch.setattr(aten_overrides, "backward_op", lambda *arguments: asked.append(arguments))
    out, *found = torchs_with_gradients(inputs)
    assert not asked and all(x.isfinite().all() for x in (out, *found))


# GPUs' operators; in the interpreter on the CPU, where torch has no kernel of them

OPS = {
    "flash": lambda q, k, v, bias, p, causal: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, causal),
    "efficient": lambda *args: torch.ops.aten._scaled_dot_product_efficient_attention(*args[:4], True, *args[4:]),
    "cudnn": lambda *args: torch.ops.aten._scaled_dot_product_cudnn_attention(*args[:4], True, *args[4:]),
}
interpreted = pytest.mark.skipif(COMPILED, reason="compared in float32; a GPU's own kernels are compared above")


def exactly(q, k, v, bias=None, keep=None, p=0.0, causal=False, align="top_left"):
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    if causal:
        s = s.masked_fill(~reference.visible(*s.shape[-2:], causal=True, align=align, device=s.device), -torch.inf)
    s = s if bias is None else s + bias
    weights = torch.nan_to_num(s.softmax(-1)) * (1 if keep is None else keep / (1 - p))
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), s.logsumexp(-1)


@interpreted
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_gpus_operators(name, p, causal, device):
    inputs = qkv(device, n_q=4, heads=4, kv_heads=2)
    with tritonattn.swapped(route="aten"):
        out, lse, *rest = OPS[name](*inputs, None, p, causal)
        found = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        assert counts() == tallied(served=1)
    seed = next(x for x in rest if isinstance(x, torch.Tensor) and x.dtype in (torch.int64, torch.uint64))
    keep = tritonattn.dropout_mask((1, 4, 4, 6), p, seed.view(torch.int64).reshape(-1)[:1])
    o, expected_lse = exactly(*inputs, None, keep, p, causal, "bottom_right" if name == "flash" else "top_left")
    close(out, o)
    close(lse.reshape(*lse.shape[:3])[..., :4], expected_lse)
    expected = torch.autograd.grad(o.square().sum(), inputs)
    close(found, expected)
    if p:
        # the swap is off, and still it is ours that knows what was dropped
        close(torch.autograd.grad(out.square().sum(), inputs), expected)


@pytest.fixture(autouse=True)
def nothing_dropped():
    """A backward pass that may still come keeps ours in place; here none does, once a test is over."""
    yield
    tritonattn.disable()
    aten_overrides.Fused._dropped = False
    if aten_overrides.Fused._backward is not None:
        aten_overrides.Fused._backward.remove()
        aten_overrides.Fused._backward = None


@interpreted
@pytest.mark.parametrize("name", ["efficient", "cudnn"])
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_bias_and_its_gradient(name, lowest, device):
    inputs, bias = qkv(device), torch.randn(1, 2, 6, 6, device=device, requires_grad=name == "efficient")
    hidden = torch.rand(6, 6, device=device) < 0.3
    hidden[2] = True  # of a row that sees nothing the weights are 0, or all alike
    leaves = [*inputs, bias] if bias.requires_grad else inputs
    with tritonattn.swapped(route="aten"):
        given = bias.masked_fill(hidden, lowest)
        found = torch.autograd.grad(OPS[name](*inputs, given, 0.0, False)[0].square().sum(), leaves)
        broadcast = torch.randn(6, device=device)
        close(OPS[name](*inputs, broadcast.expand(1, 2, 6, 6), 0.0, False)[0], exactly(*inputs, broadcast)[0])
    out, _ = tritonattn.attention(*inputs, bias=bias.masked_fill(hidden, lowest), return_lse=True)
    close(found, torch.autograd.grad(out.square().sum(), leaves))
    assert counts() == tallied(served=2)


@interpreted
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("n", [6, 33])
def test_results_lie_as_torch_says(name, graded, n, device):
    """What Inductor believes of them is what torch's meta functions say."""
    def described(x):
        return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

    inputs = [x.detach().requires_grad_(graded) for x in qkv(device, n, n, dtype=torch.float16)]
    bias = None if name == "flash" else torch.randn(1, 2, n, n, device=device, dtype=torch.float16)
    if name == "efficient":
        bias.requires_grad_(graded)
    leaves = [x for x in (*inputs, bias) if x is not None and x.requires_grad]
    with tritonattn.swapped(route="aten"):
        for given in (inputs, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]):
            ours = OPS[name](*given, bias, 0.5, False)
            theirs = OPS[name](*(x.to("meta") for x in given), None if bias is None else bias.to("meta"), 0.5, False)
            assert [*map(described, ours)] == [*map(described, theirs)]
            if leaves:
                assert all(x.isfinite().all() for x in torch.autograd.grad(ours[0].square().sum(), leaves))


@interpreted
def test_gradients_lie_as_torch_says(device):
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
@pytest.mark.parametrize("name", OPS)
def test_what_was_saved_may_be_copied(name, device):
    """As save_on_cpu does: what lies behind lse is lost, the seed is not."""
    torch.manual_seed(0)
    inputs = qkv(device, dtype=torch.float16)
    bias = None if name == "flash" else torch.randn(1, 2, 6, 6, device=device)
    gradients = []
    for unpack in (lambda x: x, torch.clone):
        torch.manual_seed(1)
        with tritonattn.swapped(route="aten"), torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out = OPS[name](*inputs, bias, 0.5, False)[0]
            gradients.append(torch.autograd.grad(out.float().square().sum(), inputs))
    torch.testing.assert_close(*gradients, atol=2e-2, rtol=2e-2)


@interpreted
@pytest.mark.parametrize("name", OPS)
def test_compiled_operators_drop_the_same(name, device):
    inputs, bias = qkv(device, 33, 33), None if name == "flash" else torch.randn(1, 2, 33, 33, device=device)
    compiled = torch.compile(lambda *inputs: OPS[name](*inputs, bias, 0.5, False)[0], fullgraph=True)
    results = []
    with tritonattn.swapped(route="aten"):
        for function in (compiled, lambda *inputs: OPS[name](*inputs, bias, 0.5, False)[0]):
            torch.manual_seed(0)
            results.append(with_gradients(function, inputs))
    close(*results)


@interpreted
def test_the_residual_makes_dq_exact(device):
    """A common mean of the values, which a rounded output would let into dQ."""
    q, k, v = qkv(device, 16, 16, d=16, dtype=torch.float16)
    with torch.no_grad():
        v += 30
    do = torch.randn_like(q)
    expected, = torch.autograd.grad(tritonattn.attention(q, k, v), q, do)
    with tritonattn.swapped(route="aten"):
        found, = torch.autograd.grad(attend(q, k, v), q, do)
    assert torch.equal(found, expected)


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
def test_every_fused_kernel_of_a_gpu_is_ours(backend, causal, device):
    inputs = qkv(device, 96, 96, heads=4, d=64, dtype=torch.float16)
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        expected = torchs_with_gradients(inputs, is_causal=causal)
        with tritonattn.swapped(route="aten"):
            assert runs_ours(lambda: torch.testing.assert_close(
                with_gradients(attend, inputs, is_causal=causal), expected, atol=4e-2, rtol=4e-2))
    assert counts() == tallied(served=1)


@pytest.mark.gpu
def test_a_learned_bias_and_dropout_on_a_gpu(device):
    inputs, bias = qkv(device, 64, 64, heads=4, d=64, dtype=torch.float16), torch.randn(4, 64, 64, device=device).half()
    leaves = [*inputs, bias.requires_grad_()]
    with tritonattn.swapped(route="aten"):
        out = attend(*inputs, bias)
        found = torch.autograd.grad(out.square().sum(), leaves)
        torch.manual_seed(0)
        once = attend(*inputs, bias, 0.5)
        torch.manual_seed(0)
        assert torch.equal(attend(*inputs, bias, 0.5), once)
    assert counts() == tallied(served=3)
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
    assert counts() == tallied(served=1)
