"""Replace torch's scaled_dot_product_attention by tritonattn's, and put it back.

                                          +-> tritonattn, if it supports the call      fallback_report().handled
    F.scaled_dot_product_attention(...) --+
                                          +-> torch's own, with the reason counted     fallback_report().fallbacks

While the patch is on, torch.nn.functional and every module that imported the function hold the replacement, and so does the
C++ fast path of torch's multi-head attention (aten_overrides.py). `enable(route="aten")` replaces the operators beneath
torch's function instead, which C++ code and saved references to the function call too. README.md describes the patch.
"""

import contextlib
import numbers
import sys
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.backends import cuda
from torch.nn import attention as torch_attention
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode, get_overridable_functions, handle_torch_function

from .. import gpu
from ..attention import scaled_dot_product_attention as tritonattn_sdpa
from ..runtime.arguments import DTYPES, LARGEST_SCALE, largest_head
from . import aten_overrides, torch_private
from .dispatch_log import (
    LOCK,
    TRACED,
    FallbackWarning,
    call_signature,
    fallback_message,
    is_first,
    needs_signature,
    record_call,
    strict,
)
from .torch_private import TORCH_SDPA

SUPPORTED_DEVICES = ("cuda", "cpu") if gpu.INTERPRETED else ("cuda",)
SUPPORTED_DTYPES = (*DTYPES, torch.float64) if gpu.INTERPRETED else DTYPES

_on = False
_claims = frozenset()            # (owner, route) of every open request: "enable", or a token for each open block
_causal_bias_function = None     # CausalBias's own __torch_function__, to be put back
_aten = False                    # whether torch's fused kernels are replaced
_previous_flash_impl = None      # the implementation that torch.nn.attention had active before
_fast_path = None                # the overrides of the C++ fast path of torch's multi-head attention


def enable(route: str = "python") -> None:
    """Replace torch's scaled_dot_product_attention by tritonattn's, in every thread of this process.

    Calls that `tritonattn.scaled_dot_product_attention` does not support go to torch's own function unchanged. They are
    counted by reason (`fallback_report`), and the first one of each reason warns; TRITONATTN_STRICT=1 makes them a
    RuntimeError. TORCH_LOGS="+tritonattn" logs each call. No argument is ignored. Enabling twice equals enabling once. A
    forked child inherits the state of the patch, a spawned process starts with the patch off.

    Args:
        route: "python" replaces the function in torch.nn.functional and in every module that imported it, CausalBias, and
            the C++ fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer.
            torch._C._nn.scaled_dot_product_attention stays torch's. Functions saved in a closure, a default argument or an
            object are not reached, nor is C++ code.
            "aten" replaces torch's fused kernels in the dispatcher, and so reaches those too. It falls back for dropout,
            and its dq is less exact in 16 bits (`tritonattn.integrations.aten_overrides`). Both may be on.

    Compiled functions follow the patch on and off: Dynamo guards on the function. Exported programs keep the function that
    they were exported with. A checkpointed forward pass runs again in the backward pass, so keep the patch on until then.
    Second derivatives raise. integrations/README.md has the details.

    Raises:
        RuntimeError: torch's function has been replaced by another library, or tritonattn's has been since.
        ValueError: an unknown route.
    """
    _claim("enable", route)


def disable() -> None:
    """Put back everything that `enable` and open `swapped` blocks have replaced."""
    with LOCK:
        _set(frozenset())


@contextlib.contextmanager
def swapped(route: str = "python"):
    """Context manager: `enable` for the length of a block, then restore the previous state, also after an exception.

    It applies to the whole process, not to this thread alone. Blocks nest, and may overlap in threads: the last to end
    switches the patch off. A backward pass may run after the block, unless the forward pass was checkpointed.
    """
    claim = _claim(object(), route)
    try:
        yield
    finally:
        with LOCK:
            _set(_claims - {claim})


def _claim(owner, route):
    """Record one more owner of a route, and switch the route on."""
    if route not in ("python", "aten"):
        raise ValueError(f"route: expected 'python' or 'aten', got {route!r}")
    with LOCK:
        current = F.scaled_dot_product_attention
        if route == "python" and current is not scaled_dot_product_attention and (_on or current is not TORCH_SDPA):
            expected = "tritonattn's, since the patch is on" if _on else "torch's own function"
            raise RuntimeError(f"torch.nn.functional.scaled_dot_product_attention: expected {expected}, got {current!r}; undo "
                               "that replacement first")
        before = _claims
        try:
            _set(before | {(owner, route)})
        except BaseException:
            # no half of a patch stays where torch refuses the other half
            _set(before)
            raise
    return owner, route


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """The replacement of torch's function: tritonattn's where it supports the call, otherwise (or when off) torch's own."""
    call, options = (query, key, value, attn_mask, dropout_p, is_causal), {"scale": scale, "enable_gqa": enable_gqa}
    on = _on  # read once: another thread may switch
    if on and not torch_private.only_device_modes():
        return _under_modes(call, options)
    reason = _unsupported_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa) if on else "off"
    if on and reason is not None and strict():
        raise RuntimeError(fallback_message(reason, call_signature(query, key, value, attn_mask, is_causal, enable_gqa)))
    if reason is not None and isinstance(attn_mask, CausalBias):
        return torch_private.causal_bias_dispatch(*call, **options)
    out = tritonattn_sdpa(*call, **options) if reason is None else TORCH_SDPA(*call, **options)
    if on:
        # shapes may be symbols while a program is compiled, and are recorded while one is traced
        traced = torch.compiler.is_compiling() or reason == "torch.jit.trace"
        record_call(reason, TRACED if traced or not needs_signature(reason) else
                    call_signature(query, key, value, attn_mask, is_causal, enable_gqa))
    return out


class _Innermost(TorchFunctionMode):
    """Function mode beneath all others: their calls of torch's function reach tritonattn again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (scaled_dot_product_attention if func is TORCH_SDPA else func)(*args, **(kwargs or {}))


def _under_modes(call, options):
    """Call torch's function under the active modes, as without the patch: their tables hold that function."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo allows no mode beneath the active ones
        out = handle_torch_function(TORCH_SDPA, (), *call, **options)
        record_call("function mode in compiled code", TRACED)
        return out
    modes = torch_private.function_modes()
    if type(modes[0]) is _Innermost:
        return TORCH_SDPA(*call, **options)
    for _ in modes:
        torch_private.pop_mode()
    for mode in (_Innermost(), *modes):
        torch_private.push_mode(mode)
    try:
        return TORCH_SDPA(*call, **options)
    finally:
        for _ in range(len(modes) + 1):
            torch_private.pop_mode()
        for mode in modes:
            torch_private.push_mode(mode)


def _unsupported_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa):
    """Return why this call falls back to torch, or None. A malformed call may take either way: both raise."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if (reason := _unsupported_tensors(query, key, value, attn_mask)) is not None:
        return reason
    if (reason := _unsupported_number(dropout_p, scale, enable_gqa)) is not None:
        return reason
    if torch_private.forward_mode_is_on():
        return "forward-mode derivative"
    return None if _fused_kernels_allowed() else "sdpa_kernel"


def _unsupported_tensors(query, key, value, attn_mask):
    """Return why these tensors are not supported, or None."""
    causal_bias = isinstance(attn_mask, CausalBias)
    for x in (query, key, value) if attn_mask is None or causal_bias else (query, key, value, attn_mask):
        if type(x) not in torch_private.PLAIN_TYPES:
            return f"type {type(x).__name__}"
        if x.is_nested or x.layout != torch.strided:
            return "nested" if x.is_nested else f"layout {x.layout}"
        if x.device.type not in SUPPORTED_DEVICES:
            return f"device {x.device.type}"
    for x in (query, key, value):
        if x.dtype not in SUPPORTED_DTYPES:
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
    """Return the option whose value only torch accepts or rejects by its own rules, or None."""
    if not isinstance(enable_gqa, bool):
        return "enable_gqa"
    # a number that differs from itself is nan; math.isnan cannot be traced with a symbol
    if isinstance(dropout_p, torch.Tensor) or (isinstance(dropout_p, float) and dropout_p != dropout_p):
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
    # without a GPU such a tensor is a fake one, for example in an export
    if gpu.INTERPRETED or not torch.cuda.is_available():
        return False
    device = gpu.gpu_of(torch.device("cuda", index))
    return not device.is_amd and device.capability < 80


def _set(claims):
    """Switch each route on if a claim asks for it, otherwise off. The caller holds the lock."""
    global _claims
    if claims and not _claims:
        _warn_if_nothing_is_supported()
    _set_fast_path(bool(claims))
    _set_aten(any(route == "aten" for _, route in claims))
    _set_python(any(route == "python" for _, route in claims))
    _claims = claims


def _warn_if_nothing_is_supported():
    if (gpu.TRITON and (gpu.INTERPRETED or torch.cuda.is_available())) or not is_first("nothing is supported"):
        return
    reason = "torch finds no GPU, and Triton's interpreter is off" if gpu.TRITON else "Triton is not installed"
    fix = "set TRITON_INTERPRET=1 before Python starts to try it on the CPU" if gpu.TRITON else "pip install triton"
    warnings.warn(f"tritonattn is enabled, but every call will fall back to torch: {reason}; {fix}", FallbackWarning,
                  stacklevel=5)


def _set_fast_path(on):
    """Replace the C++ fast path of torch's multi-head attention, which calls no Python function, or put it back."""
    global _fast_path
    if on and _fast_path is None:
        _fast_path = aten_overrides.fast_path(SUPPORTED_DEVICES, _accept)
        torch_private.set_fastpath_flag(patched=True)
    elif not on and _fast_path is not None:
        _fast_path.remove()
        _fast_path = None
        torch_private.set_fastpath_flag(patched=False)


def _set_aten(on):
    """Activate tritonattn in torch's registry of flash-attention implementations, or put the previous one back."""
    global _aten, _previous_flash_impl
    if on and torch_attention.current_flash_attention_impl() != "tritonattn":
        torch_attention.register_flash_attention_impl(
            "tritonattn", register_fn=lambda: aten_overrides.fused_kernels(SUPPORTED_DEVICES, _accept, _supports))
        _previous_flash_impl = torch_attention.current_flash_attention_impl()
        torch_attention.activate_flash_attention_impl("tritonattn")
        _aten = True
    elif _aten and not on:
        _aten = False
        if torch_attention.current_flash_attention_impl() == "tritonattn":  # else it has been replaced since
            torch_attention.restore_flash_attention_impl()
            if _previous_flash_impl is not None:
                torch_attention.activate_flash_attention_impl(_previous_flash_impl)


def _accept(query, key, value, attn_mask=None, is_causal=False, *, scale=None, unsupported=None):
    """Return whether tritonattn handles this call of one of torch's operators, and count it.

    unsupported: a reason of the operator's own to fall back, or None. A fallback raises under TRITONATTN_STRICT=1.
    """
    reason = _unsupported_reason(query, key, value, attn_mask, 0.0, scale, False) or unsupported
    signature = ""
    if needs_signature(reason):
        gqa = query.dim() > 2 and key.dim() > 2 and query.shape[-3] != key.shape[-3]
        signature = call_signature(query, key, value, attn_mask, is_causal, gqa)
    if reason is not None and strict():
        raise RuntimeError(fallback_message(reason, signature))
    record_call(reason, signature)
    return reason is None


def _supports(query, key, value, attn_mask, scale):
    """Return whether the kernels can compute this call, without counting it."""
    return (_unsupported_tensors(query, key, value, attn_mask) or _unsupported_number(0.0, scale, False)) is None


def _set_python(on):
    """Replace torch's function in every module, or put it back."""
    global _on, _causal_bias_function
    if on and not _on:
        get_overridable_functions()  # torch builds this list once, and it must hold torch's own function
        _causal_bias_function = vars(CausalBias)["__torch_function__"]
        CausalBias.__torch_function__ = classmethod(_torch_function)
        _rebind(TORCH_SDPA, scaled_dot_product_attention)
    elif _on and not on:
        _rebind(scaled_dot_product_attention, TORCH_SDPA)
        CausalBias.__torch_function__ = _causal_bias_function
    _on = on


def _torch_function(cls, func, types, args=(), kwargs=None):
    """CausalBias.__torch_function__ while patched: torch's compares with F.scaled_dot_product_attention, and would drop the
    bias of a saved reference to torch's function."""
    if func is TORCH_SDPA:
        return scaled_dot_product_attention(*args, **(kwargs or {}))
    return _causal_bias_function.__func__(cls, func, types, args, kwargs)


def _rebind(old, new):
    """Rebind every module-level name of `old` to `new`; of torch's modules only those in torch.nn.functional."""
    for name, module in list(sys.modules.items()):
        ours = name.startswith(f"{__package__}.")
        if isinstance(module, ModuleType) and not ours and (module is F or not name.startswith("torch.")):
            for key, value in list(vars(module).items()):
                if value is old:
                    vars(module)[key] = new
