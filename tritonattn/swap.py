"""One line gives a program's attention to ours, another gives it back.

                                          +-> ours, where it serves the call           counts().served
    F.scaled_dot_product_attention(...) --+
                                          +-> torch's own, for a reason with a name    counts().passed

While the swap is on, torch.nn.functional and every module that has imported the function by name hold ours, and torch's
multi-head attention keeps off its C++ fast path, which calls neither.
"""

import contextlib
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.backends import cuda, mha
from torch.nn.attention.bias import CausalBias
from torch.overrides import get_overridable_functions, handle_torch_function

from . import gpu
from .attention import DTYPES, LARGEST_SCALE, _largest_head
from .attention import scaled_dot_product_attention as serve

TORCHS = torch._C._nn.scaled_dot_product_attention
# the types of plain tensors, and of those that stand for plain ones while a program is traced or exported
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
SERVED_DEVICES = ("cuda", "cpu") if gpu.INTERPRETED else ("cuda",)
SERVED_DTYPES = (*DTYPES, torch.float64) if gpu.INTERPRETED else DTYPES

_lock = threading.Lock()
_on = False
_claims = frozenset()  # who wants the swap: "enable", and a token of each open block
_tally = Counter()     # calls by what sent them to torch; None is served
_before = ()           # what has to be put back: is the fast path allowed, CausalBias's __torch_function__

# a child forked while another thread counts must not wait for that thread
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def enable() -> None:
    """From now on torch's scaled_dot_product_attention is ours, in every thread of this process, wherever ours serves.

    It serves what `tritonattn.scaled_dot_product_attention` serves. All else goes to torch's own function as it came,
    and is counted with its reason: tensor subclasses (nested, DTensor, ...), other devices (the CPU, unless Triton
    interprets), GPUs before sm_80, other dtypes, forward-mode derivatives, `torch.nn.attention.sdpa_kernel` where it
    forbids every fused kernel. No argument is ignored. Calling it twice is calling it once.

    Reached: torch.nn.functional, nn.MultiheadAttention and nn.Transformer's layers, CausalBias, and every module that
    imported the function, under any name, before or while the swap is on. Not reached, and torch's as before: what a
    closure, a default argument or an object keeps of the function; C++; programs exported, traced or scripted before
    (torch.jit.script refuses ours); need_weights=True, which never calls it. torch's own function stays at
    torch._C._nn.scaled_dot_product_attention.

    What torch.compile compiles, before or after, follows the swap on and off: Dynamo guards on the function, and
    compiles once for either; only what it does not look into (allow_in_graph) stays as it was compiled. Like torch,
    a compiled function obeys the sdpa_kernel it was compiled under. An exported program keeps what it was exported with.
    A checkpointed forward pass runs again in the backward pass: keep the swap on until then. Second derivatives raise,
    as in torch's fused kernels; under sdpa_kernel(SDPBackend.MATH) torch's own has them.

    Raises:
        RuntimeError: somebody else has replaced torch's function.
    """
    with _lock:
        _set(_claims | {"enable"})


def disable() -> None:
    """Put back all that `enable` and open `swapped` blocks have replaced, at once. Without them nothing happens."""
    with _lock:
        _set(frozenset())


@contextlib.contextmanager
def swapped():
    """`enable`, for the length of a block; afterwards all is as before, also when the block raises.

    For the whole process, not this thread alone. Blocks nest, and overlap in threads: the last to end switches off.
    A backward pass may stand behind the block, but not that of a checkpointed forward pass.
    """
    claim = object()
    with _lock:
        _set(_claims | {claim})
    try:
        yield
    finally:
        with _lock:
            _set(_claims - {claim})


@dataclass(frozen=True)
class Counts:
    """Calls since the start or `reset`. One in a compiled function counts whenever it is traced, not when it runs."""

    served: int
    passed: dict[str, int]  # by the reason why torch had to do it


def counts() -> Counts:
    """How many calls came while the swap was on: those ours served, and those passed on to torch, by reason."""
    with _lock:
        return Counts(_tally[None], {why: n for why, n in _tally.items() if why is not None})


def reset() -> None:
    """Count from nothing."""
    with _lock:
        _tally.clear()


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """What stands in torch's place: ours where it serves the call, torch's own where not, or when the swap is off."""
    call, options = (query, key, value, attn_mask, dropout_p, is_causal), {"scale": scale, "enable_gqa": enable_gqa}
    on = _on  # another thread may switch
    if on and torch._C._is_torch_function_mode_enabled():
        # it is told of this call, as of any function of torch's, and most call it in turn
        return handle_torch_function(scaled_dot_product_attention, (), *call, **options)
    why = _obstacle(query, key, value, attn_mask, scale, enable_gqa) if on else "off"
    if why is not None and isinstance(attn_mask, CausalBias):
        # this is torch's own way with it, and comes back here without it
        return CausalBias._dispatch(*call, **options)
    out = serve(*call, **options) if why is None else TORCHS(*call, **options)
    if on:
        _count(why)
    return out


def _obstacle(query, key, value, attn_mask, scale, enable_gqa):
    """Why this call is torch's; None if it is ours. A malformed call may pass either way: both raise."""
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
        if x.shape[-1] > 256 and x.shape[-1] > _largest_head(x):
            return "head size"
    if not gpu.TRITON:
        return "Triton is not installed"
    if query.device.type == "cuda" and _is_too_old(query.device.index):
        return "GPU before sm_80"
    if causal_bias and (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        return "CausalBias of another size"
    if enable_gqa and min(x.dim() for x in (query, key, value)) > 2 and key.shape[-3] != value.shape[-3]:
        return "key and value differ in heads"
    if isinstance(scale, (int, float)) and not abs(scale) <= LARGEST_SCALE:
        return "scale"
    if forward_ad._current_level >= 0:
        return "forward-mode derivative"
    return None if _fused_kernels_allowed() else "sdpa_kernel"


# Dynamo runs the following three when it compiles, and takes their results for constants


@torch.compiler.assume_constant_result
def _count(why):
    with _lock:
        _tally[why] += 1


@torch.compiler.assume_constant_result
def _fused_kernels_allowed():
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()


@torch.compiler.assume_constant_result
def _is_too_old(index):
    # without a GPU such a tensor is only thought of, in an export say
    if gpu.INTERPRETED or not torch.cuda.is_available():
        return False
    found = gpu.of(torch.device("cuda", index))
    return not found.is_amd and found.capability < 80


def _set(claims):
    """Let these claims be all there are, and the swap on if there is one. The caller holds the lock."""
    global _claims, _on, _before
    if claims and not _on:
        if F.scaled_dot_product_attention not in (TORCHS, scaled_dot_product_attention):
            raise RuntimeError("torch.nn.functional.scaled_dot_product_attention: expected torch's own function, got "
                               f"{F.scaled_dot_product_attention!r}; whoever put it there must take it back first")
        get_overridable_functions()  # a list that torch makes once: torch's own function has to be in it
        _before = mha.get_fastpath_enabled(), vars(CausalBias)["__torch_function__"]
        mha.set_fastpath_enabled(False)
        CausalBias.__torch_function__ = classmethod(_torch_function)
        _rebind(TORCHS, scaled_dot_product_attention)
    elif _on and not claims:
        _rebind(scaled_dot_product_attention, TORCHS)
        fast_path, CausalBias.__torch_function__ = _before
        mha.set_fastpath_enabled(fast_path)
    _claims, _on = claims, bool(claims)


def _torch_function(cls, func, types, args=(), kwargs=None):
    """CausalBias's own would not know torch's function, which some still hold, and would leave out its bias."""
    if func is TORCHS:
        return scaled_dot_product_attention(*args, **(kwargs or {}))
    return _before[1].__func__(cls, func, types, args, kwargs)


def _rebind(one, other):
    """What modules call `one` from now on is `other`; but of torch's modules only torch.nn.functional."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name != __name__ and (module is F or not name.startswith("torch.")):
            for key, value in list(vars(module).items()):
                if value is one:
                    vars(module)[key] = other
