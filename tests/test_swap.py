"""The swap: every known trap of taking torch's place, each held against torch's own result and against the counts."""

import contextlib
import os
import pickle
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError, checkpoint

import tritonattn
from tritonattn import swap
from tritonattn.gpu import Gpu

pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (
    ".*torch.jit.script", "There is a performance drop", "The PyTorch API of nested tensors", "Lower right causal bias",
    ".*Profiler clears events")]


def kept_by_a_closure():
    kept = imported_before
    return lambda *args, **options: kept(*args, **options)


CLOSURE = kept_by_a_closure()
CALLERS = {
    "attribute": lambda *args, **options: F.scaled_dot_product_attention(*args, **options),
    "imported": lambda *args, **options: imported_before(*args, **options),
    "closure": CLOSURE,
}


@pytest.fixture(autouse=True)
def off_and_uncounted():
    torch._dynamo.reset()
    swap.reset()
    # a warning is enough: on a GPU torch's own gradients of float32 are not deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    tritonattn.disable()


def torchs(*args, **options):
    """torch's own; under a name in this module it would be swapped too."""
    return swap.TORCHS(*args, **options)


def qkv(device, n_q=6, n_k=6, heads=2, kv_heads=None, d=8, dtype=torch.float32):
    shapes = (1, heads, n_q, d), (1, kv_heads or heads, n_k, d), (1, kv_heads or heads, n_k, d)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(function, inputs, *args, **options):
    out = function(*inputs, *args, **options)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def tally(served=0, **passed):
    return swap.Counts(served, passed)


# on and off


def test_everything_is_put_back():
    kept = vars(CausalBias)["__torch_function__"]
    for fast_path in (False, True):
        torch.backends.mha.set_fastpath_enabled(fast_path)
        tritonattn.enable()
        assert F.scaled_dot_product_attention is imported_before is swap.scaled_dot_product_attention
        assert not torch.backends.mha.get_fastpath_enabled()
        tritonattn.enable()
        tritonattn.disable()
        assert F.scaled_dot_product_attention is imported_before is torch._C._nn.scaled_dot_product_attention
        assert torch.backends.mha.get_fastpath_enabled() is fast_path and vars(CausalBias)["__torch_function__"] is kept
        tritonattn.disable()
        assert torch.backends.mha.get_fastpath_enabled() is fast_path


def is_on():
    assert (imported_before is swap.TORCHS) is (F.scaled_dot_product_attention is swap.TORCHS)
    return F.scaled_dot_product_attention is swap.scaled_dot_product_attention


def test_blocks_nest_and_restore_what_was():
    with pytest.raises(KeyError), tritonattn.swapped():
        with tritonattn.swapped():
            assert is_on()
        assert is_on()
        raise KeyError
    assert not is_on()
    tritonattn.enable()
    with tritonattn.swapped():
        pass
    assert is_on()
    with tritonattn.swapped():
        tritonattn.disable()
        assert not is_on()
    assert not is_on()
    with tritonattn.swapped():
        tritonattn.enable()
    assert is_on()


def test_blocks_overlap_in_threads():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with tritonattn.swapped():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with tritonattn.swapped():
        thread.start()
        assert entered.wait(10)
    assert is_on(), "the other thread's block is still open"
    leave.set()
    thread.join()
    assert not is_on()


def test_threads_that_call_and_switch():
    x = torch.empty(1, 1, 4, 8, device="meta")
    wrong = []

    def work():
        for _ in range(50):
            with tritonattn.swapped():
                F.scaled_dot_product_attention(x, x, x)
                if not is_on():
                    wrong.append("off inside a block")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not is_on() and torch.backends.mha.get_fastpath_enabled()
    assert swap.counts() == tally(**{"device meta": 400})


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_can_count():
    holds, leave = threading.Event(), threading.Event()

    def hold():
        with swap._lock:
            holds.set()
            leave.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if swap._lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


def test_somebody_elses_function_is_left_alone(device, monkeypatch):
    def theirs(*args, **options):
        return torchs(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", theirs)
        with pytest.raises(RuntimeError, match="expected torch's own function, got <function .*theirs"):
            tritonattn.enable()
        with pytest.raises(RuntimeError), tritonattn.swapped():
            pass
        assert F.scaled_dot_product_attention is theirs and torch.backends.mha.get_fastpath_enabled()
    tritonattn.enable()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", theirs)
        tritonattn.disable()
        assert F.scaled_dot_product_attention is theirs and imported_before is swap.TORCHS
    assert F.scaled_dot_product_attention is swap.scaled_dot_product_attention, "put back by them, after we were gone"
    q, k, v = qkv(device, 4, 6)
    bias = causal_lower_right(4, 6)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, bias), torchs(q, k, v, bias._materialize(device)))
    assert swap.counts() == tally()
    with tritonattn.swapped():
        assert is_on()
    assert not is_on()


def test_a_name_imported_while_on_goes_back_and_a_kept_function_passes_on(device):
    q, k, v = qkv(device)
    module = types.ModuleType("imported_while_on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        with tritonattn.swapped():
            exec("from torch.nn.functional import scaled_dot_product_attention as mine", vars(module))
            kept = module.mine
            assert pickle.loads(pickle.dumps(kept)) is kept is swap.scaled_dot_product_attention
        assert module.mine is swap.TORCHS
    assert torch.equal(kept(q, k, v), torchs(q, k, v)) and swap.counts() == tally()


# served


@pytest.mark.parametrize("caller", ["attribute", "imported"])
@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"kv_heads": 1}, {"kv_heads": 2, "heads": 4, "enable_gqa": True},
    {"n_q": 4, "is_causal": True}, {"n_k": 3, "is_causal": True},
], ids=str)
def test_served_as_torch_would(caller, options, device):
    inputs = qkv(device, **{name: options.pop(name) for name in ("heads", "kv_heads", "n_q", "n_k") if name in options})
    with tritonattn.swapped():
        ours = with_gradients(CALLERS[caller], inputs, **options)
    assert swap.counts() == tally(served=1)
    close(ours, with_gradients(torchs, inputs, **options))


MASKS = {
    "bool": lambda: torch.rand(6, 6) > 0.3,
    "padding": lambda: (torch.arange(6) < 4)[None, None, None],
    "bias": lambda: torch.randn(1, 2, 6, 6),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_not_ignored(mask, device):
    inputs, mask = qkv(device), MASKS[mask]().to(device)
    if mask.is_floating_point():
        mask.requires_grad_()
    with tritonattn.swapped():
        ours = F.scaled_dot_product_attention(*inputs, mask)
    assert swap.counts() == tally(served=1)
    theirs = torchs(*inputs, mask)
    close(ours, theirs)
    inputs = [x for x in (*inputs, mask) if x.requires_grad]
    close(torch.autograd.grad(ours.square().sum(), inputs), torch.autograd.grad(theirs.square().sum(), inputs))


def test_dropout_is_not_ignored(device):
    inputs = qkv(device)
    with tritonattn.swapped():
        assert (F.scaled_dot_product_attention(*inputs, None, 1.0) == 0).all()
        torch.manual_seed(0)
        once = F.scaled_dot_product_attention(*inputs, None, 0.5)
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(*inputs, dropout_p=0.5), once)
    assert swap.counts() == tally(served=3) and not torch.equal(once, torchs(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    q, k, v = qkv(device)
    with tritonattn.swapped(), torch.autocast(device.type, dtype):
        ours = F.scaled_dot_product_attention(q, k.to(dtype), v)
    assert ours.dtype == dtype and swap.counts() == tally(served=1)
    with torch.autocast(device.type, dtype):
        torch.testing.assert_close(ours, torchs(q, k, v), atol=3e-2, rtol=3e-2)
    ours.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_vmap_over_forward_and_backward(device):
    inputs = [torch.randn(3, 2, n, 8, device=device) for n in (4, 6, 6)]

    def gradients(function):
        return torch.vmap(torch.func.grad(lambda *qkv: function(*qkv).square().sum(), argnums=(0, 1, 2)))(*inputs)

    with tritonattn.swapped():
        close(torch.vmap(F.scaled_dot_product_attention)(*inputs), torchs(*inputs))
        ours = gradients(F.scaled_dot_product_attention)
    assert swap.counts() == tally(served=2)
    close(ours, gradients(torchs))


# passed on


class Mine(torch.Tensor):
    pass


def plain(device, *lengths, **options):
    return [x.detach() for x in qkv(device, *lengths, **options)]


CALLS = {
    "type Mine": lambda device: ([x.as_subclass(Mine) for x in plain(device)], {}),
    "type NestedTensor": lambda device: ([torch.nested.nested_tensor([*x], layout=torch.jagged).transpose(1, 2) for x in (
        x.transpose(1, 2) for x in plain(device))], {}),
    "nested": lambda device: ([torch.nested.nested_tensor([*x]) for x in plain(device)], {}),
    "device meta": lambda device: (plain("meta"), {}),
    "dtype torch.float64": lambda device: (plain(device, dtype=torch.float64), {}),
    "head size": lambda device: (plain(device, d=520), {}),
    "key and value differ in heads": lambda device: (
        [*plain(device, heads=4, kv_heads=2)[:2], plain(device, heads=4)[2]], {"enable_gqa": True}),
    "scale": lambda device: (plain(device), {"scale": torch.inf}),
}


@pytest.mark.parametrize("why", CALLS)
def test_passed_on_with_its_reason(why, device, monkeypatch):
    monkeypatch.setattr(swap, "SERVED_DTYPES", tuple(dtype for dtype in swap.SERVED_DTYPES if dtype != torch.float64))
    inputs, options = CALLS[why](device)
    with tritonattn.swapped():
        ours = F.scaled_dot_product_attention(*inputs, **options)
    theirs = torchs(*inputs, **options)
    assert swap.counts() == swap.Counts(0, {why: 1}) and type(ours) is type(theirs)
    if not ours.is_meta:
        for one, other in zip(ours.unbind(), theirs.unbind()):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_dtensor_is_passed_on(monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    inputs = [distribute_tensor(x, mesh, [Shard(1)]) for x in plain("cpu")]
    with tritonattn.swapped():
        # torch's own takes ten seconds for its first one
        monkeypatch.setattr(swap, "TORCHS", lambda *args, **options: args)
        got = F.scaled_dot_product_attention(*inputs, is_causal=True)
        monkeypatch.undo()
    torch.distributed.destroy_process_group()
    assert swap.counts() == tally(**{"type DTensor": 1})
    assert all(one is other for one, other in zip(got, inputs)) and got[3:] == (None, 0.0, True)


def test_devices_are_judged(monkeypatch):
    x = torch.ones(1, 1, 2, 8)
    monkeypatch.setattr(swap, "SERVED_DEVICES", ("cuda",))
    with tritonattn.swapped():
        F.scaled_dot_product_attention(x, x, x)
    assert swap.counts() == tally(**{"device cpu": 1})
    monkeypatch.setattr(swap.gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, old in (("sm_75", True), ("sm_80", False), ("sm_120", False), ("gfx942", False)):
        monkeypatch.setattr(swap.gpu, "of", lambda device, arch=arch: Gpu("some", arch, 1, 1))
        assert swap._is_too_old(0) is old


def test_sdpa_kernel_is_obeyed(device):
    inputs = qkv(device)
    compiled = torch.compile(CALLERS["attribute"], backend="aot_eager", fullgraph=True)
    with tritonattn.swapped():
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(F.scaled_dot_product_attention(*inputs), torchs(*inputs))
            compiled(*inputs)
        assert swap.counts() == tally(sdpa_kernel=2)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            F.scaled_dot_product_attention(*inputs)
    assert swap.counts() == tally(served=1, sdpa_kernel=2)


def test_derivatives_that_only_torch_has(device):
    q, k, v = qkv(device)
    with tritonattn.swapped(), sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (q,))
        first, = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
        assert torch.autograd.grad(first.sum(), q)[0].isfinite().all() and tangent.shape == out.shape
    assert swap.counts() == tally(**{"sdpa_kernel": 1, "forward-mode derivative": 1})
    with tritonattn.swapped():
        first, = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="at most first derivatives"):
            first.sum().backward()


MALFORMED = {
    "no dimension": lambda q: ((q[0, 0, 0, 0],) * 3, {}),
    "one dimension": lambda q: ((q[0, 0, 0],) * 3, {}),
    "a missing tensor": lambda q: ((q, q, None), {}),
    "dtypes": lambda q: ((q, q.half(), q), {}),
    "head sizes": lambda q: ((q, q[..., :4], q), {}),
    "heads": lambda q: ((q, q.repeat(1, 2, 1, 1), q.repeat(1, 2, 1, 1)), {}),
    "positions": lambda q: ((q, q, q, None, 0.0, False, 0.5), {}),
    "a learned scale": lambda q: ((q, q, q), {"scale": torch.tensor(1.0, requires_grad=True)}),
    "an unknown argument": lambda q: ((q, q, q), {"window": 3}),
    "mask and is_causal": lambda q: ((q, q, q, torch.ones(6, 6, dtype=torch.bool, device=q.device), 0.0, True), {}),
    "dtype of the mask": lambda q: ((q, q, q, torch.ones(6, 6, dtype=torch.long, device=q.device)), {}),
    "dropout": lambda q: ((q, q, q, None, 1.5), {}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_errors_are_of_torchs_type(name, device):
    args, options = MALFORMED[name](torch.randn(2, 2, 6, 8, device=device))
    # torch's kernel for the CPU lets a mask and is_causal pass
    with pytest.raises(Exception) as theirs, sdpa_kernel(SDPBackend.MATH):
        torchs(*args, **options)
    with tritonattn.swapped(), pytest.raises(theirs.type):
        F.scaled_dot_product_attention(*args, **options)
    assert swap.counts() == tally()


# torch's own users of the function


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("n_q, n_k", [(4, 6), (6, 6), (6, 4)])
def test_causal_bias(bias, n_q, n_k, caller, device):
    inputs, bias = qkv(device, n_q, n_k), bias(n_q, n_k)
    with tritonattn.swapped():
        ours = with_gradients(CALLERS[caller], inputs, bias)
    assert swap.counts() == tally(served=1)
    close(ours, with_gradients(torchs, inputs, bias._materialize(device)))


def test_causal_bias_that_is_no_plain_bottom_right(device):
    q, k, v = plain(device, 4, 6, heads=4, kv_heads=2)
    bias = causal_lower_right(4, 6)
    with tritonattn.swapped():
        with pytest.raises(ValueError):
            F.scaled_dot_product_attention(q, k, v, bias, is_causal=True, enable_gqa=True)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, bias)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, causal_lower_right(3, 6), enable_gqa=True)
        ours = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True)
        with sdpa_kernel(SDPBackend.MATH):
            passed = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True)
        # to torch the upper-left one is is_causal, whatever its size
        upper_left = F.scaled_dot_product_attention(q, k, v, causal_upper_left(3, 3), enable_gqa=True)
        assert (F.scaled_dot_product_attention(q, k, v, bias, 1.0, enable_gqa=True) == 0).all()
    assert swap.counts() == tally(served=3, sdpa_kernel=1)
    for out in (ours, passed):
        close(out, torchs(q, k, v, bias._materialize(device), scale=0.3, enable_gqa=True))
    close(upper_left, torchs(q, k, v, is_causal=True, enable_gqa=True))


def outputs(module, *args, **options):
    """A module's first result, and the gradients of its parameters where it has any now."""
    out = module(*args, **options)
    out = out[0] if isinstance(out, tuple) else out
    return (out, *torch.autograd.grad(out.square().sum(), tuple(module.parameters()))) if out.requires_grad else (out,)


def make(kind, device):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "device": device}
    return nn.MultiheadAttention(16, 2, **options) if kind == "mha" else nn.TransformerEncoderLayer(16, 2, 32, **options)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["mha", "encoder layer"])
def test_multi_head_attention(kind, training, grad, device):
    module, x = make(kind, device).train(training), torch.randn(2, 6, 16, device=device)
    args, options = ((x, x, x), {"need_weights": False}) if kind == "mha" else ((x,), {})
    with torch.set_grad_enabled(grad):
        theirs = outputs(module, *args, **options)
        with tritonattn.swapped():
            ours = outputs(module, *args, **options)
    assert swap.counts() == tally(served=1)
    close(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_weights_are_torchs(training, device):
    module, x = make("mha", device).train(training), torch.randn(2, 6, 16, device=device)
    with torch.no_grad():
        theirs = module(x, x, x, need_weights=True)
        with tritonattn.swapped():
            ours = module(x, x, x, need_weights=True)
    assert swap.counts() == tally()
    close(ours, theirs)


def test_multi_head_attention_with_masks(device):
    module, x = make("mha", device).eval(), torch.randn(2, 6, 16, device=device)
    padding = torch.arange(6, device=device) >= torch.tensor([[4], [6]], device=device)
    future = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    options = {"need_weights": False, "key_padding_mask": padding, "attn_mask": future}
    with torch.no_grad():
        theirs = module(x, x, x, **options)[0]
        with tritonattn.swapped():
            ours = module(x, x, x, **options)[0]
    assert swap.counts() == tally(served=1)
    close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    inputs = qkv(device)
    with tritonattn.swapped():
        out = checkpoint(CALLERS["attribute"], *inputs, use_reentrant=reentrant)
        out.square().sum().backward()
    # the other kind leaves the function, by an exception, once it has what it wants
    assert swap.counts() == tally(served=2 if reentrant else 1)
    close([x.grad for x in inputs], with_gradients(torchs, inputs)[1:])


def test_a_checkpoint_whose_backward_comes_too_late_is_an_error(device):
    with tritonattn.swapped():
        out = checkpoint(CALLERS["attribute"], *qkv(device), use_reentrant=False)
    with pytest.raises(CheckpointError):
        out.sum().backward()


# compiled


@pytest.mark.parametrize("caller, first", [("attribute", "on"), ("attribute", "off"), ("imported", "off")])
def test_a_compiled_function_follows_the_swap(caller, first, device):
    inputs, seen = qkv(device), []
    compiled = torch.compile(CALLERS[caller], backend="aot_eager", fullgraph=True)
    expected = with_gradients(torchs, inputs)
    for on in [first == "on", first != "on"] * 2:
        with tritonattn.swapped() if on else contextlib.nullcontext():
            seen.append(runs_ours(lambda: close(with_gradients(compiled, inputs), expected)))
    assert seen == [first == "on", first != "on"] * 2 and swap.counts() == tally(served=1), "compiled once, then found again"


def test_inductor_follows_the_swap(device):
    inputs, compiled = plain(device), torch.compile(CALLERS["attribute"], fullgraph=True)
    for on in (False, True, False):
        with tritonattn.swapped() if on else contextlib.nullcontext():
            assert runs_ours(lambda: close(compiled(*inputs), torchs(*inputs))) is on


def runs_ours(function):
    """Whether our op runs in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any(event.key.startswith("tritonattn::") for event in profile.key_averages())


@pytest.mark.parametrize("kind", ["mha", "encoder layer"])
def test_a_compiled_module_follows_the_swap(kind, device):
    module, x = make(kind, device).eval(), torch.randn(2, 6, 16, device=device)
    args, options = ((x, x, x), {"need_weights": False}) if kind == "mha" else ((x,), {})
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        expected = outputs(module, *args, **options)
        for on in (False, True, False, True):
            with tritonattn.swapped() if on else contextlib.nullcontext():
                assert runs_ours(lambda: close(outputs(compiled, *args, **options), expected)) is on
    assert swap.counts().served and not swap.counts().passed


def test_compiled_causal_bias(device):
    inputs = plain(device, 4, 6)
    compiled = torch.compile(CALLERS["attribute"], backend="aot_eager", fullgraph=True)
    with tritonattn.swapped():
        for bias in (causal_lower_right(4, 6), causal_upper_left(4, 6)):
            close(compiled(*inputs, bias), torchs(*inputs, bias._materialize(device)))
    assert swap.counts() == tally(served=2)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_what_it_was_exported_with(strict, device):
    class Module(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = plain(device)
    theirs = torch.export.export(Module(), tuple(inputs), strict=strict)
    with tritonattn.swapped():
        ours = torch.export.export(Module(), tuple(inputs), strict=strict)
        assert not runs_ours(lambda: theirs.module()(*inputs))
    assert runs_ours(lambda: close(ours.module()(*inputs), torchs(*inputs, is_causal=True)))
    assert swap.counts().served and not swap.counts().passed


class Zeros(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] * 0 if func is F.scaled_dot_product_attention else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_function_mode_has_its_say(compiled, device):
    inputs = plain(device)
    function = torch.compile(CALLERS["attribute"], backend="aot_eager", fullgraph=True) if compiled else CALLERS["attribute"]
    with tritonattn.swapped():
        with torch.device("cpu"):  # a mode too
            close(function(*inputs), torchs(*inputs))
        assert swap.counts() == tally(served=1)
        with Zeros():
            assert (function(*inputs) == 0).all()
    with Zeros():
        assert (function(*inputs) == 0).all()
    assert swap.counts() == tally(served=1)


def test_scripting_is_refused_aloud_and_works_when_off():
    def function(q: torch.Tensor):
        return F.scaled_dot_product_attention(q, q, q)

    with tritonattn.swapped(), pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(function)
    torch.jit.script(function)
