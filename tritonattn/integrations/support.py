"""The calls of torch's attention function that tritonattn handles, and the reasons why others fall back to torch."""

import numbers

import torch
from torch.backends import cuda
from torch.nn.attention.bias import CausalBias

from .. import gpu
from ..runtime.arguments import DTYPES, LARGEST_SCALE, largest_head
from . import torch_private
from .dispatch_log import raise_if_strict, record_call

SUPPORTED_DEVICES = ("cuda", "cpu") if gpu.INTERPRETED else ("cuda",)
SUPPORTED_DTYPES = (*DTYPES, torch.float64) if gpu.INTERPRETED else DTYPES


def unsupported_reason(query, key, value, attn_mask, dropout_p=0.0, scale=None, enable_gqa=False):
    """Return why this call falls back to torch, or None. A malformed call may go either way: both functions raise."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    reason = _unsupported_tensors(query, key, value, attn_mask) or _unsupported_number(dropout_p, scale, enable_gqa)
    if reason is None and torch_private.forward_mode_is_on():
        return "forward-mode derivative"
    return "sdpa_kernel" if reason is None and not fused_kernels_allowed() else reason


def _unsupported_tensors(query, key, value, attn_mask):
    """Return why these tensors are not supported, or None."""
    causal_bias = isinstance(attn_mask, CausalBias)
    for x in (query, key, value) if attn_mask is None or causal_bias else (query, key, value, attn_mask):
        if type(x) not in torch_private.PLAIN_TYPES:
            return "nested" if isinstance(x, torch.Tensor) and x.is_nested else f"type {type(x).__name__}"
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
    # only NaN differs from itself; math.isnan cannot be traced with a symbol
    if isinstance(dropout_p, torch.Tensor) or (isinstance(dropout_p, float) and dropout_p != dropout_p):
        return "dropout_p"
    if isinstance(scale, torch.Tensor):
        if scale.dim() or scale.requires_grad or type(scale) is not torch.Tensor:
            return "scale"
        scale = None if torch.compiler.is_compiling() else scale.item()
    return "scale" if isinstance(scale, numbers.Real) and not abs(scale) <= LARGEST_SCALE else None


# Dynamo runs the following two when it compiles, and takes their results for constants


@torch.compiler.assume_constant_result
def fused_kernels_allowed():
    """Return whether torch's settings and sdpa_kernel allow at least one fused kernel."""
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()


@torch.compiler.assume_constant_result
def _is_too_old(index):
    # without a GPU such a tensor is a fake one, for example in an export
    if gpu.INTERPRETED or not torch.cuda.is_available():
        return False
    device = gpu.gpu_of(torch.device("cuda", index))
    return not device.is_amd and device.capability < 80


def accept(query, key, value, attn_mask=None, is_causal=False, *, scale=None, unsupported=None):
    """Return whether tritonattn handles this call of one of torch's operators, and count it.

    unsupported: a reason of the operator's own to fall back, or None. A fallback raises under TRITONATTN_STRICT=1.
    """
    reason = unsupported_reason(query, key, value, attn_mask, scale=scale) or unsupported
    call = query, key, value, attn_mask, is_causal
    raise_if_strict(reason, call)
    record_call(reason, call)
    return reason is None


def supports(query, key, value, attn_mask, scale):
    """Return whether the kernels can compute this call, without counting it."""
    return (_unsupported_tensors(query, key, value, attn_mask) or _unsupported_number(0.0, scale, False)) is None
