"""One line gives a program's attention to ours, another gives it back.

                                          +-> ours, where it serves the call           report().served
    F.scaled_dot_product_attention(...) --+
                                          +-> torch's own, for a reason with a name    report().passed

While the swap is on, torch.nn.functional and every module that has imported the function by name hold ours, and the C++
fast path of torch's multi-head attention calls ours (aten.py). The deeper route, `enable(route="aten")`, puts ours
beneath torch's function instead, where C++ and whoever keeps the function itself come by.
"""

import contextlib
import math
import numbers
import sys
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.backends import cuda, mha
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.attention.bias import CausalBias
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
    get_overridable_functions,
    handle_torch_function,
)
from torch.utils._device import DeviceContext

from .. import gpu
from ..attention import scaled_dot_product_attention as serve
from ..runtime.arguments import DTYPES, LARGEST_SCALE, largest_head
from . import aten_overrides
from .dispatch_log import LOCK, TRACED, FallbackWarning, call_signature, fallback_message, first, record_call, strict

TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
# the types of plain tensors, and of those that stand for plain ones while a program is traced or exported
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
SERVED_DEVICES = ("cuda", "cpu") if gpu.INTERPRETED else ("cuda",)
SERVED_DTYPES = (*DTYPES, torch.float64) if gpu.INTERPRETED else DTYPES

_on = False
_claims = frozenset()  # who wants which route: "enable", and a token of each open block
_before = None         # CausalBias's own __torch_function__, to be put back
_aten = False          # whether torch's fused kernels are ours
_impl = None           # which ones torch.nn.attention had active before
_fast_path = None      # what has taken the place of the C++ fast path of torch's multi-head attention


def enable(route: str = "python") -> None:
    """From now on torch's scaled_dot_product_attention is ours, in every thread of this process, wherever ours serves.

    It serves what `tritonattn.scaled_dot_product_attention` serves. All else goes to torch's own function as it came, is
    counted with its reason (`report`) and, the first time, told in a warning; with TRITONATTN_STRICT=1 in the environment
    it is a RuntimeError. TORCH_LOGS="+tritonattn" logs each call. Passed on are: tensor subclasses (nested, DTensor, ...),
    other devices (the CPU, unless Triton interprets), GPUs before sm_80, other dtypes, forward-mode derivatives,
    torch.jit.trace, `torch.nn.attention.sdpa_kernel` where it forbids every fused kernel. No argument is ignored. Calling it
    twice is calling it once; another process, forked or not, has its own switch (one that is spawned starts with it off).

    Route "python" reaches torch.nn.functional, nn.MultiheadAttention and nn.Transformer's layers with their C++ fast path
    (nested tensors stay torch's: nn.TransformerEncoder makes them of padding in inference), CausalBias, and every module
    that imported the function, under any name, before or while the swap is on: a baseline kept on purpose as well, so take
    torch._C._nn.scaled_dot_product_attention for one; that name stays torch's. Not reached, and
    torch's as before: what a closure, a default argument or an object keeps of the function; C++; programs exported,
    traced or scripted before (torch.jit.script refuses ours); need_weights=True, which never calls it.

    Route "aten" reaches those as well, by torch.nn.attention's registry of flash attention: `tritonattn.aten` has what it
    serves, and what torch keeps from it. Both may be on. `disable` puts all back, but once weights were dropped on this route,
    torch's backward operators go on asking whether ours dropped them.

    Subclasses and modes with __torch_function__ are told of torch's function, as without the swap. One that asks
    `func is F.scaled_dot_product_attention` while the swap is on should ask for torch._C._nn's. In compiled code, a call
    under a mode of one's own is torch's.

    What torch.compile compiles, before or after, follows the swap on and off: Dynamo guards on the function, and
    compiles once for either; only what it does not look into (allow_in_graph) stays as it was compiled. Like torch,
    a compiled function obeys the sdpa_kernel it was compiled under. An exported program keeps what it was exported with.
    A checkpointed forward pass runs again in the backward pass: keep the swap on until then. Second derivatives raise,
    as in torch's fused kernels; under sdpa_kernel(SDPBackend.MATH) torch's own has them.

    Raises:
        RuntimeError: somebody else has replaced torch's function, or ours since the swap is on.
        ValueError: a route of another name.
    """
    _claim("enable", route)


def disable() -> None:
    """Put back all that `enable` and open `swapped` blocks have replaced, at once. Without them nothing happens."""
    with LOCK:
        _set(frozenset())


@contextlib.contextmanager
def swapped(route: str = "python"):
    """`enable`, for the length of a block; afterwards all is as before, also when the block raises.

    For the whole process, not this thread alone. Blocks nest, and overlap in threads: the last to end switches off.
    A backward pass may stand behind the block, but not that of a checkpointed forward pass.
    """
    claim = _claim(object(), route)
    try:
        yield
    finally:
        with LOCK:
            _set(_claims - {claim})


def _claim(who, route):
    """One more that wants this route, and what the claims have of it."""
    if route not in ("python", "aten"):
        raise ValueError(f"route: expected 'python' or 'aten', got {route!r}")
    with LOCK:
        found = F.scaled_dot_product_attention
        if route == "python" and found is not scaled_dot_product_attention and (_on or found is not TORCH_SDPA):
            expected = "ours, since the swap is on" if _on else "torch's own function"
            raise RuntimeError(f"torch.nn.functional.scaled_dot_product_attention: expected {expected}, got {found!r}; whoever "
                               "put it there must take it back first")
        _set(_claims | {(who, route)})
    return who, route


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """What stands in torch's place: ours where it serves the call, torch's own where not, or when the swap is off."""
    call, options = (query, key, value, attn_mask, dropout_p, is_causal), {"scale": scale, "enable_gqa": enable_gqa}
    on = _on  # another thread may switch
    if on and torch._C._is_torch_function_mode_enabled() and not _only_devices():
        return _under_modes(call, options)
    why = _unsupported_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa) if on else "off"
    if on and why is not None and strict():
        raise RuntimeError(fallback_message(why, call_signature(query, key, value, attn_mask, is_causal, enable_gqa)))
    if why is not None and isinstance(attn_mask, CausalBias):
        # this is torch's own way with it, and comes back here without it
        return CausalBias._dispatch(*call, **options)
    out = serve(*call, **options) if why is None else TORCH_SDPA(*call, **options)
    if on:
        # shapes may be symbols while a program is compiled, and are recorded while one is traced
        traced = torch.compiler.is_compiling() or why == "torch.jit.trace"
        record_call(why, TRACED if traced else call_signature(query, key, value, attn_mask, is_causal, enable_gqa))
    return out


def _only_devices():
    """Whether torch.device and torch.set_default_device alone are asked before torch's functions; they leave ours alone."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


class _Last(TorchFunctionMode):
    """Beneath all other modes: what they call, having had their say, is ours again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # no mode is left here, and ours asks for none
        return (scaled_dot_product_attention if func is TORCH_SDPA else func)(*args, **(kwargs or {}))


def _under_modes(call, options):
    """Modes are told of torch's own function, as they are without the swap: their tables hold that one."""
    if torch.compiler.is_dynamo_compiling():
        # nothing can be put beneath the modes that Dynamo knows
        out = handle_torch_function(TORCH_SDPA, (), *call, **options)
        record_call("function mode in compiled code", TRACED)
        return out
    modes = _get_current_function_mode_stack()
    if type(modes[0]) is _Last:
        return TORCH_SDPA(*call, **options)
    for _ in modes:
        _pop_mode()
    for mode in (_Last(), *modes):
        _push_mode(mode)
    try:
        return TORCH_SDPA(*call, **options)
    finally:
        for _ in range(len(modes) + 1):
            _pop_mode()
        for mode in modes:
            _push_mode(mode)


def _unsupported_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa):
    """Why this call is torch's; None if it is ours. A malformed call may pass either way: both raise."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if (unfit := _unsupported_tensors(query, key, value, attn_mask)) is not None:
        return unfit
    if (odd := _unsupported_number(dropout_p, scale, enable_gqa)) is not None:
        return odd
    if forward_ad._current_level >= 0:
        return "forward-mode derivative"
    return None if _fused_kernels_allowed() else "sdpa_kernel"


def _unsupported_tensors(query, key, value, attn_mask):
    """Why these tensors are torch's; None if ours takes them."""
    causal_bias = isinstance(attn_mask, CausalBias)
    for x in (query, key, value) if attn_mask is None or causal_bias else (query, key, value, attn_mask):
        if type(x) not in PLAIN:
            return f"type {type(x).__name__}"
        if x.is_nested or x.layout != torch.strided:
            return "nested" if x.is_nested else f"layout {x.layout}"
        if x.device.type not in SERVED_DEVICES:
            return f"device {x.device.type}"
    for x in (query, key, value):
        if x.dtype not in SERVED_DTYPES:
            return f"dtype {x.dtype}"
        if x.dim() < 2:
            return "fewer than two dimensions"
        if x.shape[-1] > 256 and x.shape[-1] > largest_head(x):
            return "head size"
    if not gpu.TRITON:
        return "Triton is not installed"
    if query.device.type == "cuda" and _is_too_old(query.device.index):
        return "GPU before sm_80"
    if causal_bias and (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        return "CausalBias of another size"
    return None


def _unsupported_number(dropout_p, scale, enable_gqa):
    """Which option is none that ours takes; torch knows what to make of it, or what to say."""
    if not isinstance(enable_gqa, bool):
        return "enable_gqa"
    if isinstance(dropout_p, torch.Tensor) or (isinstance(dropout_p, float) and math.isnan(dropout_p)):
        return "dropout_p"
    if scale is None:
        return None
    if isinstance(scale, torch.Tensor):
        if scale.dim() or scale.requires_grad or type(scale) is not torch.Tensor:
            return "scale"
        scale = None if torch.compiler.is_compiling() else scale.item()
    return "scale" if isinstance(scale, numbers.Real) and not abs(scale) <= LARGEST_SCALE else None


# Dynamo runs the following when it compiles, and takes their results for constants


@torch.compiler.assume_constant_result
def _fused_kernels_allowed():
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()


@torch.compiler.assume_constant_result
def _is_too_old(index):
    # without a GPU such a tensor is only thought of, in an export say
    if gpu.INTERPRETED or not torch.cuda.is_available():
        return False
    found = gpu.gpu_of(torch.device("cuda", index))
    return not found.is_amd and found.capability < 80


def _set(claims):
    """Let these claims be all there are, and each route on if one of them asks for it. The caller holds the lock."""
    global _claims
    if claims and not _claims:
        _warn_where_nothing_is_served()
    _set_fast_path(bool(claims))
    _set_aten(any(route == "aten" for _, route in claims))
    _set_python(any(route == "python" for _, route in claims))
    _claims = claims


def _warn_where_nothing_is_served():
    if (gpu.TRITON and (gpu.INTERPRETED or torch.cuda.is_available())) or not first("nothing is served"):
        return
    why = "torch sees no GPU, and the kernels are not interpreted" if gpu.TRITON else "Triton is not installed"
    helps = "set TRITON_INTERPRET=1 before Python starts to try it on the CPU" if gpu.TRITON else "pip install triton"
    warnings.warn(f"tritonattn is on, but every call will be torch's: {why}; {helps}", FallbackWarning, stacklevel=5)


def _set_fast_path(on):
    """The C++ fast path of torch's multi-head attention calls no function of torch's: ours takes its place, or leaves it."""
    global _fast_path
    if on and _fast_path is None:
        _fast_path = aten_overrides.fast_path(SERVED_DEVICES, _accept)
        # Dynamo does not look into nn.MultiheadAttention, but guards on this flag: as a number, which says the same, it is
        # another, so that what was compiled before is compiled again
        mha._is_fastpath_enabled = int(mha._is_fastpath_enabled)
    elif not on and _fast_path is not None:
        _fast_path.remove()
        _fast_path, mha._is_fastpath_enabled = None, bool(mha._is_fastpath_enabled)


def _set_aten(on):
    """Let torch's fused kernels be ours, through torch's own registry of such, or its own again."""
    global _aten, _impl
    if on and current_flash_attention_impl() != "tritonattn":
        _impl, _aten = current_flash_attention_impl(), True
        activate_flash_attention_impl("tritonattn")
    elif _aten and not on:
        _aten = False
        if current_flash_attention_impl() == "tritonattn":  # or somebody has put another there
            restore_flash_attention_impl()
            if _impl is not None:
                activate_flash_attention_impl(_impl)


def _accept(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, possible=True):
    """Whether ours serves this call of one of torch's operators, counted; with TRITONATTN_STRICT=1 it has to."""
    why = _unsupported_reason(query, key, value, attn_mask, dropout_p, scale, False)
    why = "arguments of the operator" if why is None and not possible else why
    gqa = possible and query.shape[-3] != key.shape[-3]
    kind = call_signature(query, key, value, attn_mask, is_causal, gqa)
    if why is not None and strict():
        raise RuntimeError(fallback_message(why, kind))
    record_call(why, kind)
    return why is None


def _set_python(on):
    """Let modules hold ours, or torch's own."""
    global _on, _before
    if on and not _on:
        get_overridable_functions()  # a list that torch makes once: torch's own function has to be in it
        _before = vars(CausalBias)["__torch_function__"]
        CausalBias.__torch_function__ = classmethod(_torch_function)
        _rebind(TORCH_SDPA, scaled_dot_product_attention)
    elif _on and not on:
        _rebind(scaled_dot_product_attention, TORCH_SDPA)
        CausalBias.__torch_function__ = _before
    _on = on


def _torch_function(cls, func, types, args=(), kwargs=None):
    """CausalBias's own would not know torch's function, which some still hold, and would leave out its bias."""
    if func is TORCH_SDPA:
        return scaled_dot_product_attention(*args, **(kwargs or {}))
    return _before.__func__(cls, func, types, args, kwargs)


def _rebind(one, other):
    """What modules call `one` from now on is `other`; but of torch's modules only torch.nn.functional."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name != __name__ and (module is F or not name.startswith("torch.")):
            for key, value in list(vars(module).items()):
                if value is one:
                    vars(module)[key] = other


register_flash_attention_impl("tritonattn", register_fn=lambda: aten_overrides.Fused(SERVED_DEVICES, _accept, _unsupported_tensors))
