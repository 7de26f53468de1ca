"""Replace torch's scaled_dot_product_attention by tritonattn's, and put it back.

                                          +-> tritonattn, if it supports the call      fallback_report().handled
    F.scaled_dot_product_attention(...) --+
                                          +-> torch's own, with the reason counted     fallback_report().fallbacks

While the patch is on, torch.nn.functional and every module that imported the function hold the replacement, and so does the
C++ fast path of torch's multi-head attention (aten_overrides.py). `enable(route="aten")` replaces the operators beneath
torch's function instead, which C++ code and saved references to the function call too. README.md describes the patch.
"""

import contextlib
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.nn import attention as flash_registry
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode, get_overridable_functions

from ..attention import scaled_dot_product_attention as tritonattn_sdpa
from ..runtime import eager
from ..runtime.arguments import as_torch_lays_out
from . import aten_overrides, jagged, torch_private
from .dispatch_log import LOCK, raise_if_strict, record_call
from .support import fused_kernels_allowed, unsupported_reason
from .torch_private import TORCH_SDPA

CAUSAL_BIAS_FUNCTION = vars(CausalBias)["__torch_function__"]

_on = False            # whether the python route is on
_claims = frozenset()  # (owner, route) of every open request: "enable", or a token for each open block
_open = {}             # {name of a patch that is on: the ExitStack that ends it}


def enable(route: str = "python") -> None:
    """Replace torch's scaled_dot_product_attention by tritonattn's, in every thread of this process.

    Calls that neither `tritonattn.scaled_dot_product_attention` nor, for jagged nested tensors, `attention_varlen` supports go
    to torch's own function unchanged. They are
    counted by reason (`fallback_report`), and the first one of each reason warns; TRITONATTN_STRICT=1 makes them a
    RuntimeError. TORCH_LOGS="+tritonattn" logs each call. No argument is ignored. Enabling twice equals enabling once. A
    forked child inherits the state of the patch, a spawned process starts with the patch off.

    Args:
        route: "python" replaces the function in torch.nn.functional and in every module that imported it, CausalBias, and
            the C++ fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer.
            torch._C._nn.scaled_dot_product_attention stays torch's. Functions saved in a closure, a default argument or an
            object are not reached, nor is C++ code.
            "aten" replaces torch's fused kernels in the dispatcher, and so reaches those too. It falls back for dropout,
            and its dq is less exact in 16 bits. Both may be on.

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
        try:
            _set(_claims | {(owner, route)})
        except BaseException:
            _set(_claims)  # undo the part of the patch that was made before the error
            raise
    return owner, route


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """The replacement of torch's function: tritonattn's where it supports the call, otherwise (or when off) torch's own."""
    arguments, options = (query, key, value, attn_mask, dropout_p, is_causal), {"scale": scale, "enable_gqa": enable_gqa}
    torch_attention = torch_private.CAUSAL_BIAS_SDPA if isinstance(attn_mask, CausalBias) else TORCH_SDPA
    if not _on:
        return torch_attention(*arguments, **options)
    call = query, key, value, attn_mask, is_causal
    if not torch.compiler.is_compiling() and fused_kernels_allowed():
        tensors = eager.sdpa_tensors(query, key, value, attn_mask)
        outputs = eager.repeat(eager.call_key(tensors, ("sdpa", dropout_p, is_causal, scale, enable_gqa)), tensors)
        if outputs is not None:
            record_call(None, call)
            return as_torch_lays_out(outputs[0], query, key, value)
    if not torch_private.only_device_modes():
        return _under_modes(arguments, options)
    reason, ours = unsupported_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa), tritonattn_sdpa
    if reason == "nested":
        reason, ours = jagged.unsupported_reason(*arguments, scale, enable_gqa), jagged.attention
    raise_if_strict(reason, call)
    out = (ours if reason is None else torch_attention)(*arguments, **options)
    # a call that raises counts neither way; with a CausalBias, torch's own attention calls this function again, which counts
    if reason is None or torch_attention is TORCH_SDPA:
        record_call(reason, None if torch.compiler.is_compiling() or reason == "torch.jit.trace" else call)
    return out


class _Innermost(TorchFunctionMode):
    """Function mode beneath all others: their calls of torch's function reach tritonattn again."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (scaled_dot_product_attention if func is TORCH_SDPA else func)(*args, **(kwargs or {}))


def _under_modes(arguments, options):
    """Call torch's function under the active modes, as without the patch: their tables hold that function."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo allows no mode beneath the active ones
        out = TORCH_SDPA(*arguments, **options)
        record_call("function mode in compiled code", None)
        return out
    modes = torch_private.function_modes()
    if type(modes[0]) is _Innermost:
        return TORCH_SDPA(*arguments, **options)
    torch_private.restack_modes(len(modes), [_Innermost(), *modes])
    try:
        return TORCH_SDPA(*arguments, **options)
    finally:
        torch_private.restack_modes(len(modes) + 1, modes)


def _set(claims):
    """Switch on the patches that the claims need, and all others off. The caller holds the lock."""
    global _claims
    wanted = {route for _, route in claims} | ({"fast path"} if claims else set())
    for name, patch in PATCHES.items():
        # another implementation of flash attention may have been activated since
        stale = name == "aten" and flash_registry.current_flash_attention_impl() != "tritonattn"
        if name in _open and (stale or name not in wanted):
            _open.pop(name).close()
        if name in wanted and name not in _open:
            stack = contextlib.ExitStack()
            stack.enter_context(patch())
            _open[name] = stack
    _claims = claims


@contextlib.contextmanager
def _patch_aten():
    """Activate tritonattn in torch's registry of flash-attention implementations."""
    flash_registry.register_flash_attention_impl("tritonattn", register_fn=aten_overrides.fused_kernels)
    previous = flash_registry.current_flash_attention_impl()
    flash_registry.activate_flash_attention_impl("tritonattn")
    yield
    if flash_registry.current_flash_attention_impl() == "tritonattn":  # else it has been replaced since
        flash_registry.restore_flash_attention_impl()
        if previous is not None:
            flash_registry.activate_flash_attention_impl(previous)


@contextlib.contextmanager
def _patch_python():
    """Replace torch's function in every module and in CausalBias."""
    global _on
    get_overridable_functions()  # torch builds this list once, and it must hold torch's own function
    CausalBias.__torch_function__ = classmethod(_torch_function)
    _rebind(TORCH_SDPA, scaled_dot_product_attention)
    _on = True
    yield
    _rebind(scaled_dot_product_attention, TORCH_SDPA)
    CausalBias.__torch_function__ = CAUSAL_BIAS_FUNCTION
    _on = False


PATCHES = {"fast path": aten_overrides.fast_path, "aten": _patch_aten, "python": _patch_python}


def _torch_function(cls, func, types, args=(), kwargs=None):
    """CausalBias.__torch_function__ while patched.

    torch's own compares the function with F.scaled_dot_product_attention, now the replacement. It would drop the bias in a
    call through a saved reference to torch's function.
    """
    if func is TORCH_SDPA:
        return scaled_dot_product_attention(*args, **(kwargs or {}))
    return CAUSAL_BIAS_FUNCTION.__func__(cls, func, types, args, kwargs)


def _rebind(old, new):
    """Rebind every module-level name of `old` to `new`; of torch's modules only those in torch.nn.functional."""
    for name, module in list(sys.modules.items()):
        ours = name.startswith(f"{__package__}.")
        if isinstance(module, ModuleType) and not ours and (module is F or not name.startswith("torch.")):
            for key, value in list(vars(module).items()):
                if value is old:
                    vars(module)[key] = new
