"""The SDPA patch against torch's own results and the counts of handled calls and fallbacks."""

import contextlib
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError, checkpoint

import tritonattn
from tritonattn.gpu import Gpu
from tritonattn.integrations import dispatch_log, sdpa_patch, support

pytestmark = [pytest.mark.usefixtures("patch_off"), *(pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (
    ".*torch.jit.script", "There is a performance drop", "The PyTorch API of nested tensors", "Lower right causal bias",
    ".*Profiler clears events", "`?torch.jit", "tritonattn does not support"))]


ROOT = Path(__file__).parents[2]


def kept_by_a_closure():
    kept = imported_before
    return lambda *args, **options: kept(*args, **options)


CLOSURE = kept_by_a_closure()
CALLERS = {
    "attribute": lambda *args, **options: F.scaled_dot_product_attention(*args, **options),
    "imported": lambda *args, **options: imported_before(*args, **options),
    "closure": CLOSURE,
}


def torchs(*args, **options):
    """Call torch's own function; a name of it in this module would be rebound."""
    return sdpa_patch.TORCH_SDPA(*args, **options)


def qkv(device, n_q=6, n_k=6, heads=2, kv_heads=None, d=8, dtype=torch.float32):
    shapes = (1, heads, n_q, d), (1, kv_heads or heads, n_k, d), (1, kv_heads or heads, n_k, d)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(function, inputs, *args, **options):
    out = function(*inputs, *args, **options)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def counts():
    report = tritonattn.fallback_report()
    return report.handled, report.fallbacks


def tallied(handled=0, **fallbacks):
    return handled, fallbacks


def only_handled():
    return counts()[0] and not counts()[1]


# enable and disable


def kernels():
    """Return the dispatcher's table of every operator that a route may replace."""
    names = [f"_scaled_dot_product_{kind}{way}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention",
             "flash_attention_for_cpu") for way in ("", "_backward")]
    return [torch._C._dispatch_dump(f"aten::{name}") for name in [*names, "_native_multi_head_attention"]]


def test_disable_restores_everything():
    before = kernels()
    kept = vars(CausalBias)["__torch_function__"]
    for fast_path in (False, True):
        torch.backends.mha.set_fastpath_enabled(fast_path)
        tritonattn.enable()
        assert F.scaled_dot_product_attention is imported_before is sdpa_patch.scaled_dot_product_attention
        assert torch.backends.mha.get_fastpath_enabled() == fast_path and kernels() != before
        tritonattn.enable()
        tritonattn.disable()
        assert F.scaled_dot_product_attention is imported_before is torch._C._nn.scaled_dot_product_attention
        assert vars(CausalBias)["__torch_function__"] is kept and kernels() == before
        tritonattn.disable()
        assert torch.backends.mha.get_fastpath_enabled() is fast_path


def is_on():
    assert (imported_before is sdpa_patch.TORCH_SDPA) is (F.scaled_dot_product_attention is sdpa_patch.TORCH_SDPA)
    return F.scaled_dot_product_attention is sdpa_patch.scaled_dot_product_attention


def test_blocks_nest_and_restore():
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
    assert not wrong and not is_on()
    assert counts() == tallied(**{"device meta": 400})


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_can_count():
    holds, leave = threading.Event(), threading.Event()

    def hold():
        with dispatch_log.LOCK:
            holds.set()
            leave.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holds.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if dispatch_log.LOCK.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


def test_a_replacement_by_another_library_is_left_alone(device, monkeypatch):
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
        assert F.scaled_dot_product_attention is theirs and imported_before is sdpa_patch.TORCH_SDPA
    assert F.scaled_dot_product_attention is sdpa_patch.scaled_dot_product_attention, "restored by that library"
    q, k, v = qkv(device, 4, 6)
    bias = causal_lower_right(4, 6)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, bias), torchs(q, k, v, bias._materialize(device)))
    assert counts() == tallied()
    with tritonattn.swapped():
        assert is_on()
    assert not is_on()


def test_a_name_imported_while_patched_is_restored(device):
    q, k, v = qkv(device)
    module = types.ModuleType("imported_while_on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        with tritonattn.swapped():
            exec("from torch.nn.functional import scaled_dot_product_attention as mine", vars(module))
            kept = module.mine
            assert pickle.loads(pickle.dumps(kept)) is kept is sdpa_patch.scaled_dot_product_attention
        assert module.mine is sdpa_patch.TORCH_SDPA
    assert torch.equal(kept(q, k, v), torchs(q, k, v)) and counts() == tallied()


# handled


@pytest.mark.parametrize("caller", ["attribute", "imported"])
@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"kv_heads": 1}, {"kv_heads": 2, "heads": 4, "enable_gqa": True},
    {"n_q": 4, "is_causal": True}, {"n_k": 3, "is_causal": True},
], ids=str)
def test_handled_calls_agree_with_torch(caller, options, device):
    inputs = qkv(device, **{name: options.pop(name) for name in ("heads", "kv_heads", "n_q", "n_k") if name in options})
    with tritonattn.swapped():
        ours = with_gradients(CALLERS[caller], inputs, **options)
    assert counts() == tallied(handled=1)
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
    assert counts() == tallied(handled=1)
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
    assert counts() == tallied(handled=3) and not torch.equal(once, torchs(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    q, k, v = qkv(device)
    with tritonattn.swapped(), torch.autocast(device.type, dtype):
        ours = F.scaled_dot_product_attention(q, k.to(dtype), v)
    assert ours.dtype == dtype and counts() == tallied(handled=1)
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
    assert counts() == tallied(handled=2)
    close(ours, gradients(torchs))


# fallbacks


class Mine(torch.Tensor):
    pass


def plain(device, *lengths, **options):
    return [x.detach() for x in qkv(device, *lengths, **options)]


CALLS = {
    "type Mine": lambda device: ([x.as_subclass(Mine) for x in plain(device)], {}),
    "nested": lambda device: ([torch.nested.nested_tensor([*x], layout=torch.jagged).transpose(1, 2) for x in (
        x.transpose(1, 2) for x in plain(device))], {}),
    "nested, strided": lambda device: ([torch.nested.nested_tensor([*x]) for x in plain(device)], {}),
    "device meta": lambda device: (plain("meta"), {}),
    "dtype torch.float64": lambda device: (plain(device, dtype=torch.float64), {}),
    "head size": lambda device: (plain(device, d=520), {}),
    "scale": lambda device: (plain(device), {"scale": torch.inf}),
}


@pytest.mark.parametrize("why", CALLS)
def test_fallbacks_are_counted_by_reason(why, device, monkeypatch):
    monkeypatch.setattr(support, "SUPPORTED_DTYPES", (torch.float16, torch.bfloat16, torch.float32))
    inputs, options = CALLS[why](device)
    with tritonattn.swapped():
        ours = F.scaled_dot_product_attention(*inputs, **options)
    theirs = torchs(*inputs, **options)
    assert counts() == tallied(**{why.split(",")[0]: 1}) and type(ours) is type(theirs)
    if not ours.is_meta:
        for one, other in zip(ours.unbind(), theirs.unbind()):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def mesh():
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_dtensors_fall_back_with_their_gradients(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(function):
        inputs = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in given]
        out = function(*inputs, scale=0.3)
        assert out.placements == (Shard(1),)
        return out.to_local(), *(x.to_local() for x in torch.autograd.grad(out.sum(), inputs))

    given = plain("cpu")
    with tritonattn.swapped(), sdpa_kernel(SDPBackend.MATH):
        ours = sharded(F.scaled_dot_product_attention)
    assert counts() == tallied(**{"type DTensor": 1})
    with sdpa_kernel(SDPBackend.MATH):
        theirs = sharded(torchs)
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_fall_back_with_their_gradients(layout, device):
    # a strided nested tensor must be contiguous, a jagged one has its lengths in the second dimension
    given = [[torch.randn(2, n, 8, device=device) for n in (3, 5)] for _ in range(3)]
    given = [[x.transpose(0, 1).contiguous() if layout == torch.jagged else x for x in xs] for xs in given]

    def nested(function):
        inputs = [torch.nested.nested_tensor(x, layout=layout, requires_grad=True) for x in given]
        out = function(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2) if layout == torch.jagged else function(*inputs)
        total = sum(x.square().sum() for x in out.unbind())
        return [*out.unbind(), *(x for gradient in torch.autograd.grad(total, inputs) for x in gradient.unbind())]

    with tritonattn.swapped():
        ours = nested(F.scaled_dot_product_attention)
    assert counts() == tallied(nested=1)
    for one, other in zip(ours, nested(torchs)):
        assert torch.equal(one, other)


def test_unsupported_devices(monkeypatch):
    x = torch.ones(1, 1, 2, 8)
    monkeypatch.setattr(support, "SUPPORTED_DEVICES", ("cuda",))
    with tritonattn.swapped():
        F.scaled_dot_product_attention(x, x, x)
    assert counts() == tallied(**{"device cpu": 1})
    monkeypatch.setattr(support.gpu, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, old in (("sm_75", True), ("sm_80", False), ("sm_120", False), ("gfx942", False)):
        monkeypatch.setattr(support.gpu, "gpu_of", lambda device, arch=arch: Gpu("some", arch, 1, 1))
        assert support._is_too_old(0) is old


def test_sdpa_kernel_is_obeyed(device):
    inputs = qkv(device)
    compiled = torch.compile(CALLERS["attribute"], backend="aot_eager", fullgraph=True)
    with tritonattn.swapped():
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(F.scaled_dot_product_attention(*inputs), torchs(*inputs))
            compiled(*inputs)
        assert counts() == tallied(sdpa_kernel=2)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            F.scaled_dot_product_attention(*inputs)
    assert counts() == tallied(handled=1, sdpa_kernel=2)


def test_forward_mode_and_second_derivatives(device):
    q, k, v = qkv(device)
    with tritonattn.swapped(), sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (q,))
        first, = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
        assert torch.autograd.grad(first.sum(), q)[0].isfinite().all() and tangent.shape == out.shape
    assert counts() == tallied(**{"sdpa_kernel": 1, "forward-mode derivative": 1})
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
    # torch's CPU kernel accepts a mask together with is_causal
    with pytest.raises(Exception) as theirs, sdpa_kernel(SDPBackend.MATH):
        torchs(*args, **options)
    with tritonattn.swapped(), pytest.raises(theirs.type):
        F.scaled_dot_product_attention(*args, **options)
    assert counts() == tallied()


def test_a_block_mask_raises_a_short_error(device):
    """torch's function takes no BlockMask; the error does not print its lists."""
    q, k, v = plain(device, 256, 256)
    mask = tritonattn.block_mask(torch.ones(256, 256, dtype=torch.bool, device=device).tril())
    with tritonattn.swapped(), pytest.raises(TypeError, match="BlockMask") as error:
        F.scaled_dot_product_attention(q, k, v, mask)
    assert len(str(error.value)) < 300 and counts() == tallied()


# torch's own users of the function


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("n_q, n_k", [(4, 6), (6, 6), (6, 4)])
def test_causal_bias(bias, n_q, n_k, caller, device):
    inputs, bias = qkv(device, n_q, n_k), bias(n_q, n_k)
    with tritonattn.swapped():
        ours = with_gradients(CALLERS[caller], inputs, bias)
    assert counts() == tallied(handled=1)
    close(ours, with_gradients(torchs, inputs, bias._materialize(device)))


def test_causal_bias_with_options_and_errors(device):
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
        # torch treats the upper-left one as is_causal, whatever its size
        upper_left = F.scaled_dot_product_attention(q, k, v, causal_upper_left(3, 3), enable_gqa=True)
        assert (F.scaled_dot_product_attention(q, k, v, bias, 1.0, enable_gqa=True) == 0).all()
    assert counts() == tallied(handled=3, sdpa_kernel=1)
    for out in (ours, passed):
        close(out, torchs(q, k, v, bias._materialize(device), scale=0.3, enable_gqa=True))
    close(upper_left, torchs(q, k, v, is_causal=True, enable_gqa=True))


def outputs(module, *args, **options):
    """Return a module's first result, and the gradients of its parameters if gradients are on."""
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
    assert counts() == tallied(handled=1)
    close(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_weights_are_computed_by_torch(training, device):
    module, x = make("mha", device).train(training), torch.randn(2, 6, 16, device=device)
    with torch.no_grad():
        theirs = module(x, x, x, need_weights=True)
        with tritonattn.swapped():
            ours = module(x, x, x, need_weights=True)
    assert counts() == tallied()
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
    assert counts() == tallied(handled=1)
    close(ours, theirs)


MASKS_OF_LAYERS = {
    "none": (False, False), "padding": (True, False), "future": (False, True), "both": (True, True),
}


@pytest.mark.parametrize("masks", MASKS_OF_LAYERS)
@pytest.mark.parametrize("norm_first, activation", [(False, "relu"), (True, "gelu")])
def test_the_fast_path_of_a_layer_is_handled(norm_first, activation, masks, device):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, norm_first=norm_first, batch_first=True, device=device)
    x, layer = torch.randn(2, 6, 16, device=device), layer.eval()
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
    padded, future = MASKS_OF_LAYERS[masks]
    padding = torch.arange(6, device=device) >= torch.tensor([[4], [6]], device=device) if padded else None
    mask = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1) if future else None
    with torch.no_grad():
        theirs = layer(x, mask, padding)
        with tritonattn.swapped():
            close(layer(x, mask, padding), theirs)
            assert counts() == tallied(handled=1)
            with sdpa_kernel(SDPBackend.MATH):
                assert torch.equal(layer(x, mask, padding), theirs)
    assert counts() == tallied(handled=1, sdpa_kernel=1)


def alibi(n, device):
    return -0.3 * (torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)).abs()


BIASES = {"ones": lambda device: torch.ones(6, 6, device=device), "alibi": lambda device: alibi(6, device),
          "by head": lambda device: torch.randn(4, 6, 6, device=device),
          "with -inf": lambda device: alibi(6, device).masked_fill(torch.eye(6, device=device).bool(), -torch.inf)}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("bias", BIASES)
def test_a_float_mask_of_a_layer_is_added_in_inference(bias, padded, device):
    """torch's own fast path turns the mask into booleans."""
    layer, x = make("encoder layer", device).eval(), torch.randn(2, 6, 16, device=device)
    padding = torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6], device=device).bool() if padded else None
    mask = BIASES[bias](device)
    expected = layer(x, mask, padding)
    with torch.no_grad(), tritonattn.swapped():
        close(layer(x, mask, padding), expected)
    assert counts() == tallied(handled=1)


def test_the_fast_path_operator_called_directly(device):
    """Calls with arguments that nn.MultiheadAttention never passes."""
    module, x = make("mha", device).eval().requires_grad_(False), torch.randn(2, 6, 16, device=device)
    weights = module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias
    future = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)

    def outcomes():
        return [torch._native_multi_head_attention(x, x, x, 16, 2, *weights)[1],
                torch._native_multi_head_attention(x, x.clone(), x, 16, 2, *weights, None, False)[0],
                torch._native_multi_head_attention(x, x, x, 16, 2, *weights, future, False, True, 0)[0]]

    theirs = outcomes()
    with tritonattn.swapped():
        ours = outcomes()
    assert counts() == tallied(handled=1)
    close(ours, theirs)


@pytest.mark.parametrize("kind", ["mha", "encoder layer"])
def test_modules_take_nested_tensors(kind, device):
    module = make(kind, device).eval()
    x = torch.nested.nested_tensor([torch.randn(n, 16, device=device) for n in (3, 5)])
    args, options = ((x, x, x), {"need_weights": False}) if kind == "mha" else ((x,), {})
    with torch.no_grad():
        theirs = outputs(module, *args, **options)[0]
        with tritonattn.swapped():
            ours = outputs(module, *args, **options)[0]
    for one, other in zip(ours.unbind(), theirs.unbind()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_an_encoder_with_padding(grad, device):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(make("encoder layer", device), 2, nn.LayerNorm(16, device=device)).eval()
    x = torch.randn(2, 6, 16, device=device)
    padding = torch.arange(6, device=device) >= torch.tensor([[4], [6]], device=device)
    with torch.set_grad_enabled(grad):
        theirs = outputs(encoder, x, src_key_padding_mask=padding)
        with tritonattn.swapped():
            ours = outputs(encoder, x, src_key_padding_mask=padding)
    # without gradients, torch makes a nested tensor of the input
    assert counts() == tallied(handled=2 if grad else 0)
    close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    inputs = qkv(device)
    with tritonattn.swapped():
        out = checkpoint(CALLERS["attribute"], *inputs, use_reentrant=reentrant)
        out.square().sum().backward()
    # the other kind leaves the recomputed function early, by an exception
    assert counts() == tallied(handled=2 if reentrant else 1)
    close([x.grad for x in inputs], with_gradients(torchs, inputs)[1:])


def test_a_checkpointed_backward_after_the_patch_raises(device):
    with tritonattn.swapped():
        out = checkpoint(CALLERS["attribute"], *qkv(device), use_reentrant=False)
    with pytest.raises(CheckpointError):
        out.sum().backward()


# compiled


@pytest.mark.parametrize("caller, first", [("attribute", "on"), ("attribute", "off"), ("imported", "off")])
def test_a_compiled_function_follows_the_patch(caller, first, device):
    inputs, seen = qkv(device), []
    compiled = torch.compile(CALLERS[caller], backend="aot_eager", fullgraph=True)
    expected = with_gradients(torchs, inputs)
    for on in [first == "on", first != "on"] * 2:
        with tritonattn.swapped() if on else contextlib.nullcontext():
            seen.append(runs_ours(lambda: close(with_gradients(compiled, inputs), expected)))
    assert seen == [first == "on", first != "on"] * 2 and counts() == tallied(handled=1), "compiled once, then found again"


@pytest.mark.slow
def test_inductor_follows_the_patch(device):
    inputs, compiled = plain(device), torch.compile(CALLERS["attribute"], fullgraph=True)
    for on in (False, True, False):
        with tritonattn.swapped() if on else contextlib.nullcontext():
            assert runs_ours(lambda: close(compiled(*inputs), torchs(*inputs))) is on


def runs_ours(function):
    """Return whether tritonattn's op runs in a function."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any(event.key.startswith("tritonattn::") for event in profile.key_averages())


class Rates(nn.Module):
    """Attention layers with dropout rates of their own."""

    def __init__(self):
        super().__init__()
        self.rates = nn.ModuleList(nn.Dropout(p) for p in (0.1, 0.2, 0.3))

    def forward(self, q, k, v):
        for layer in self.rates:
            q = F.scaled_dot_product_attention(q, k, v, dropout_p=layer.p)
        return q


def graphs(function, calls, **options):
    """Return the number of graphs that calls of a compiled function take."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, **options)
    for arguments in calls:
        compiled(*arguments)
    return counter.frame_count


@pytest.mark.parametrize("case, dynamic", [("sizes", True), ("changing rate", True), ("changing rate", None),
                                           ("changing scale", True), ("rates of layers", True)])
def test_compiled_code_takes_as_many_graphs_as_torchs(case, dynamic, device):
    short, long = plain(device, 4, 4), plain(device, 6, 6)
    function, calls = {
        "sizes": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [short, long]),
        "changing rate": (lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, dropout_p=p),
                          [(*short, p) for p in (0.1, 0.2, 0.3)]),
        "changing scale": (lambda q, k, v, s: F.scaled_dot_product_attention(q, k, v, scale=s),
                           [(*short, s) for s in (0.1, 0.2, 0.3)]),
        "rates of layers": (Rates(), [short, long]),
    }[case]
    expected = graphs(function, calls, dynamic=dynamic, fullgraph=True)
    with tritonattn.swapped():
        assert graphs(function, calls, dynamic=dynamic, fullgraph=True) <= expected
    assert only_handled()


@pytest.mark.parametrize("kind", ["mha", "encoder layer"])
def test_a_compiled_module_follows_the_patch(kind, device):
    module, x = make(kind, device).eval(), torch.randn(2, 6, 16, device=device)
    args, options = ((x, x, x), {"need_weights": False}) if kind == "mha" else ((x,), {})
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        expected = outputs(module, *args, **options)
        for on in (False, True, False, True):
            with tritonattn.swapped() if on else contextlib.nullcontext():
                assert runs_ours(lambda: close(outputs(compiled, *args, **options), expected)) is on
    assert only_handled()


def test_compiled_causal_bias(device):
    inputs = plain(device, 4, 6)
    compiled = torch.compile(CALLERS["attribute"], backend="aot_eager", fullgraph=True)
    with tritonattn.swapped():
        for bias in (causal_lower_right(4, 6), causal_upper_left(4, 6)):
            close(compiled(*inputs, bias), torchs(*inputs, bias._materialize(device)))
    assert counts() == tallied(handled=2)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_keeps_its_function(strict, device):
    class Module(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = plain(device)
    theirs = torch.export.export(Module(), tuple(inputs), strict=strict)
    with tritonattn.swapped():
        ours = torch.export.export(Module(), tuple(inputs), strict=strict)
        assert not runs_ours(lambda: theirs.module()(*inputs))
    assert runs_ours(lambda: close(ours.module()(*inputs), torchs(*inputs, is_causal=True)))
    assert only_handled()


def test_make_fx_records_the_op(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = plain(device)
    with tritonattn.swapped():
        graphs = [make_fx(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tracing_mode=mode)(*inputs)
                  for mode in ("real", "symbolic")]
    for graph in graphs:
        assert torch.ops.tritonattn.forward.default in {node.target for node in graph.graph.nodes}
        close(graph(*inputs), torchs(*inputs, is_causal=True))
    assert only_handled()


def test_compiled_autograd(device):
    inputs = qkv(device)

    @torch.compile(backend="aot_eager")
    def step(*inputs):
        loss = F.scaled_dot_product_attention(*inputs, is_causal=True).square().sum()
        loss.backward()
        return loss

    with tritonattn.swapped(), torch._dynamo.config.patch(compiled_autograd=True):
        assert runs_ours(lambda: step(*inputs))
    close([x.grad for x in inputs], with_gradients(torchs, inputs, is_causal=True)[1:])


def is_off_and_patches(queue):
    start = F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    with tritonattn.swapped():
        queue.put((start, F.scaled_dot_product_attention is sdpa_patch.scaled_dot_product_attention))


@pytest.mark.slow
def test_a_spawned_process_starts_unpatched():
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tritonattn.swapped():
        child = context.Process(target=is_off_and_patches, args=(queue,))
        child.start()
        child.join(120)
    assert child.exitcode == 0 and queue.get() == (True, True)


class Causal(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aotinductor(device, tmp_path):
    inputs = tuple(plain(device))
    with tritonattn.swapped():
        exported = torch.export.export(Causal(), inputs)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "causal.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    assert runs_ours(lambda: close(packaged(*inputs), torchs(*inputs, is_causal=True)))


@pytest.mark.gpu
def test_a_cuda_graph_of_forward_and_backward(device):
    q, k, v = qkv(device, 128, 128, heads=4, d=64, dtype=torch.float16)
    mask = torch.randn(128, 128, device=device, dtype=torch.float16, requires_grad=True)
    inputs = q, k, v, mask

    def step():
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.25)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    with tritonattn.swapped():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (0, 1):
            with torch.no_grad():
                q.copy_(torch.randn_like(q))
            torch.manual_seed(seed)
            graph.replay()
            found = [x.clone() for x in captured]
            torch.manual_seed(seed)
            for one, other in zip(found, step()):
                assert torch.equal(one, other)
    assert only_handled()


class Zeros(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] * 0 if func is sdpa_patch.TORCH_SDPA else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_function_modes_are_called(compiled, device):
    inputs = plain(device)
    function = torch.compile(CALLERS["attribute"], backend="aot_eager", fullgraph=True) if compiled else CALLERS["attribute"]
    with tritonattn.swapped():
        with torch.device("cpu"):  # a mode too
            close(function(*inputs), torchs(*inputs))
        assert counts() == tallied(handled=1)
        with Zeros():
            assert (function(*inputs) == 0).all()
    with Zeros():
        assert (function(*inputs) == 0).all()
    assert counts() == (tallied(handled=1, **{"function mode in compiled code": 1}) if compiled else tallied(handled=1))


TABLE = {F.scaled_dot_product_attention: "attention"}  # built before patching, keyed by torch's function


class Recorder(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(TABLE.get(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_subclasses_receive_torchs_function(device):
    inputs, outer, inner = plain(device), [], []

    class Handled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return TABLE[func] if func in TABLE else super().__torch_function__(func, types, args, kwargs)

    with tritonattn.swapped():
        with Recorder(outer), torch.device(device), Recorder(inner):
            close(F.scaled_dot_product_attention(*inputs, is_causal=True), torchs(*inputs, is_causal=True))
            bias = causal_lower_right(6, 6)
            close(F.scaled_dot_product_attention(*inputs, bias), torchs(*inputs, is_causal=True))
            assert torch.overrides._len_torch_function_stack() == 3
            with pytest.raises(RuntimeError):
                F.scaled_dot_product_attention(*inputs, is_causal=True, dropout_p=2.0)
            assert [type(mode) for mode in torch.overrides._get_current_function_mode_stack()][::2] == [Recorder, Recorder]
        assert F.scaled_dot_product_attention(*(x.as_subclass(Handled) for x in inputs)) == "attention"
    assert outer.count("attention") >= 4 and inner.count("attention") >= 4 and counts()[0] == 2


def test_scripting_raises_while_patched():
    def function(q: torch.Tensor):
        return F.scaled_dot_product_attention(q, q, q)

    with tritonattn.swapped(), pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(function)
    torch.jit.script(function)


def test_a_traced_program_keeps_torchs_function(tmp_path, device):
    q, k, v = plain(device)
    with tritonattn.swapped():
        traced = torch.jit.trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    assert set(counts()[1]) == {"torch.jit.trace"}
    close(torch.jit.load(str(tmp_path / "traced.pt"))(q, k, v), torchs(q, k, v, is_causal=True))


# reports


def test_the_report_counts_by_reason(device):
    q, k, v = plain(device, 4, 6, heads=4, kv_heads=2)
    with tritonattn.swapped():
        for _ in range(2):
            F.scaled_dot_product_attention(q, k, v, torch.ones(4, 6, dtype=torch.bool, device=device), enable_gqa=True)
        F.scaled_dot_product_attention(q, k, v, causal_lower_right(4, 6), enable_gqa=True)
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=torch.inf)
    report = tritonattn.fallback_report()
    assert report == dispatch_log.FallbackReport(3, {"scale": 1})
    assert str(report).splitlines() == ["attention calls while patched: 3 handled by tritonattn, 1 by torch", "       1  scale"]
    assert tritonattn.fallback_report(clear=True) == report and counts() == tallied()
    assert "0 handled" in str(tritonattn.fallback_report())


def test_a_signature_has_shapes_and_options(device):
    q, k, v = plain(device, 4, 6, heads=4, kv_heads=2)
    described = dispatch_log.call_signature((q, k, v, causal_lower_right(4, 6), True))
    assert described == "query 1x4x4x8, key 1x2x6x8, value 1x2x6x8, mask lower right, float32, causal"
    assert dispatch_log.call_signature((q, [1], v[0, 0, 0, 0], None, 1)) == (
        "query 1x4x4x8, key list, value scalar, mask None, float32")


@pytest.mark.filterwarnings("error::tritonattn.integrations.dispatch_log.FallbackWarning")
def test_the_first_fallback_for_a_reason_warns():
    x = torch.empty(1, 4, 8, device="meta")
    with tritonattn.swapped():
        message = "device meta: .*Got query 1x4x8, key .* float32.*TRITONATTN_STRICT=1"
        with pytest.warns(dispatch_log.FallbackWarning, match=message) as warned:
            F.scaled_dot_product_attention(x, x, x)
        assert warned[0].filename == __file__
        F.scaled_dot_product_attention(x, x, x)
        tritonattn.fallback_report(clear=True)
        with pytest.warns(dispatch_log.FallbackWarning, match="device meta"):
            F.scaled_dot_product_attention(x, x, x)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(x, x[..., :4], x)
    assert counts() == tallied(**{"device meta": 1})


def test_strict_mode_raises_instead_of_falling_back(device, monkeypatch):
    monkeypatch.setenv("TRITONATTN_STRICT", "1")
    q, k, v = qkv(device)
    compiled = torch.compile(CALLERS["attribute"], backend="aot_eager")
    x = torch.empty(1, 4, 8, device="meta")
    with tritonattn.swapped():
        monkeypatch.setattr(sdpa_patch, "TORCH_SDPA", lambda *args, **options: pytest.fail("torch's function was called"))
        with pytest.raises(RuntimeError, match="torch computes it: device meta: "):
            sdpa_patch.scaled_dot_product_attention(x, x, x)
        with pytest.raises(RuntimeError, match="torch computes it: scale"):
            compiled(q, k, v, scale=torch.inf)
        sdpa_patch.scaled_dot_product_attention(q, k, v)
        monkeypatch.undo()
    assert counts() == tallied(handled=1)


def python(code, **environment):
    """Run a program in another process, and return its result with stdout and stderr."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_torch_logs_show_each_call():
    done = python("import torch, tritonattn, torch.nn.functional as F; x = torch.ones(1, 4, 8)\n"
                  "with tritonattn.swapped(): [F.scaled_dot_product_attention(y, y, y) for y in (x, x.to('meta'))]",
                  TORCH_LOGS="+tritonattn", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert "tritonattn/integrations/dispatch_log.py" in done.stderr and "] handled: query 1x4x8" in done.stderr
    assert "] fallback to torch, device meta: query 1x4x8" in done.stderr


def test_the_debug_log_shows_each_call(device, caplog):
    """Under the logger `tritonattn`, which TORCH_LOGS="+tritonattn" switches on."""
    x = torch.ones(1, 4, 8, device=device)
    with caplog.at_level("DEBUG", logger="tritonattn"), tritonattn.swapped():
        F.scaled_dot_product_attention(x, x, x)
        F.scaled_dot_product_attention(x.to("meta"), x.to("meta"), x.to("meta"))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tritonattn.")]
    assert messages == [f"{start}: query 1x4x8, key 1x4x8, value 1x4x8, mask None, float32"
                        for start in ("handled", "fallback to torch, device meta")]


# arguments with rules of torch's own

ODD = {
    "dropout nan": ("dropout_p", {"dropout_p": math.nan}),
    "dropout tensor": ("dropout_p", {"dropout_p": torch.tensor(0.0)}),
    "learned dropout": ("dropout_p", {"dropout_p": torch.tensor(0.0, requires_grad=True)}),
    "scale tensor inf": ("scale", {"scale": torch.tensor(torch.inf)}),
    "scale numpy inf": ("scale", {"scale": np.float32("inf")}),
    "scale numpy nan": ("scale", {"scale": np.float64("nan")}),
    "gqa number": ("enable_gqa", {"enable_gqa": 1}),
    "gqa none": ("enable_gqa", {"enable_gqa": None}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_fall_back(name, device):
    why, options = ODD[name]
    q, k, v = plain(device)

    def outcome(function):
        try:
            return function(q, k, v, **options)
        except Exception as error:
            return type(error), str(error).replace(" (position 5)", "")

    theirs = outcome(torchs)
    with tritonattn.swapped():
        ours = outcome(F.scaled_dot_product_attention)
    if isinstance(theirs, tuple):
        assert ours == theirs and counts() == tallied()
    else:
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()) and counts() == tallied(**{why: 1})


def test_a_scale_tensor_is_handled(device):
    q, k, v = plain(device)
    with tritonattn.swapped():
        close(F.scaled_dot_product_attention(q, k, v, scale=torch.tensor(0.3)), torchs(q, k, v, scale=0.3))
    assert counts() == tallied(handled=1)


# state


def test_the_users_fast_path_flag_is_kept():
    tritonattn.enable()
    torch.backends.mha.set_fastpath_enabled(False)
    tritonattn.disable()
    assert torch.backends.mha.get_fastpath_enabled() is False
    tritonattn.enable()
    torch.backends.mha.set_fastpath_enabled(True)
    tritonattn.disable()
    assert torch.backends.mha.get_fastpath_enabled() is True


def test_enabling_again_detects_another_replacement(monkeypatch):
    tritonattn.enable()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", sdpa_patch.TORCH_SDPA)
        with pytest.raises(RuntimeError, match="expected tritonattn's"):
            tritonattn.enable()
    tritonattn.enable()


def test_a_call_from_inside_the_counter_does_not_deadlock(monkeypatch):
    x = torch.empty(1, 4, 8, device="meta")

    class Interrupting(dict):
        def __missing__(self, key):
            if not self:
                self["once"] = 0
                F.scaled_dot_product_attention(x, x, x)
            return self.get(key, 0)

    monkeypatch.setattr(dispatch_log, "_calls", Interrupting())
    with tritonattn.swapped():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(x, x, x), daemon=True)
        thread.start()
        thread.join(20)
    assert not thread.is_alive()
    dispatch_log._calls.pop("once")
    assert counts() == tallied(**{"device meta": 2})


def test_unknown_routes_raise():
    for call in (tritonattn.enable, tritonattn.swapped("cuda").__enter__):
        with pytest.raises(ValueError, match="route: expected 'python' or 'aten', got"):
            call(*["cuda"] * (call is tritonattn.enable))
    assert not is_on()


def test_failed_enable_leaves_nothing_patched(monkeypatch):
    def fail(name):
        raise RuntimeError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(sdpa_patch.flash_registry, "activate_flash_attention_impl", fail)
        with pytest.raises(RuntimeError, match="refused"):
            tritonattn.enable(route="aten")
    assert not sdpa_patch._open and not sdpa_patch._claims
    with tritonattn.swapped(route="aten"):
        assert set(sdpa_patch._open) == {"fast path", "aten"}
    assert not sdpa_patch._open
