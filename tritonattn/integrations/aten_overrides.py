"""The aten route: tritonattn's kernels as implementations of torch's operators, so that C++ callers use them too.

    torch._C._nn.scaled_dot_product_attention, from Python or C++
      CUDA   aten::_scaled_dot_product_flash_attention, _efficient_attention, _cudnn_attention, each with its _backward
      CPU    aten::_scaled_dot_product_flash_attention_for_cpu with its _backward (in Triton's interpreter)
    the C++ fast path of torch's multi-head attention (overridden on both routes)
             aten::_native_multi_head_attention

torch chooses among its kernels first: calls for its "math" kernel never come here. The backward operators receive o and lse,
and nothing of tritonattn's own. README.md has the consequences.
"""

import collections
import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..attention import scaled_dot_product_attention as tritonattn_sdpa
from ..runtime.arguments import N_WITH_GRADIENTS, AttentionInputs, statistics_of_lse
from ..runtime.custom_op import backward_op, forward_op
from . import torch_private
from .support import SUPPORTED_DEVICES, accept, supports

# defaults of arguments that some of torch's operators lack, and names that differ in some of them
ABSENT = {"attn_bias": None, "return_debug_mask": False, "grad_input_mask": None}
RENAMED = {"attn_mask": "attn_bias", "grad_out_": "grad_out"}
GRACE = 60.0  # seconds
# (time, kernels) of overrides removed lately: the dispatcher frees a kernel at once, also if a thread is about to call it
_retired = collections.deque()


class Overrides:
    """Python functions that replace torch's kernels of some operators, until `remove`.

    Each is called as function(original, call): `call` has the operator's arguments under the names of its schema, and
    original() is torch's kernel with the same arguments.
    """

    def __init__(self, functions):
        """functions: {name of an operator: its replacement}."""
        self._library, self._kernels = torch.library.Library("aten", "IMPL"), []
        for device in SUPPORTED_DEVICES:
            for name, function in functions.items():
                self._replace(name, function, device.upper())

    def _replace(self, name, function, device):
        try:
            kernel = torch.library.get_kernel(f"aten::{name}", device)
        except RuntimeError:
            kernel = None  # in the interpreter, GPU operators are replaced on the CPU too, where torch has no kernel
        schema = getattr(torch.ops.aten, name).default._schema
        defaults = {argument.name: argument.default_value for argument in schema.arguments}

        def override(keys, *arguments, **options):
            def original():
                if kernel is None:
                    raise NotImplementedError(f"aten::{name}: torch has no kernel of it for {device}")
                return kernel.call_boxed(keys, *arguments, **options)

            call = defaults | dict(zip(defaults, arguments)) | options
            return function(original, SimpleNamespace(**ABSENT | {RENAMED.get(key, key): x for key, x in call.items()}))

        with warnings.catch_warnings():
            # replacing a kernel is the purpose here
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._library.impl(name, override, device, with_keyset=True)
        self._kernels.append(torch.library.get_kernel(f"aten::{name}", device))

    def remove(self):
        """Put torch's kernels back. Calling it again does nothing."""
        now = time.monotonic()
        _retired.append((now, self._kernels))
        while _retired[0][0] < now - GRACE:
            _retired.popleft()
        self._library = None


@contextlib.contextmanager
def fast_path():
    """Context manager: replace the attention of the C++ fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer."""
    overrides = Overrides({"_native_multi_head_attention": _multi_head_attention})
    torch_private.set_fastpath_flag(patched=True)
    yield
    overrides.remove()
    torch_private.set_fastpath_flag(patched=False)


def _multi_head_attention(original, call):
    """Compute self-attention [B, L, E] with its projections. Calls that return the weights keep torch's kernel.

    A floating-point mask is added to the scores, as with gradients on; torch's kernel turns it into booleans.
    """
    if call.need_weights or call.query is not call.key or call.query is not call.value:
        return original()
    qkv = F.linear(call.query, call.qkv_weight, call.qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, call.num_head, -1)).permute(2, 0, 3, 1, 4)
    mask = ~call.mask if call.mask is not None and call.mask.dtype == torch.bool else call.mask  # True hides a key here
    if call.mask_type == 1 and mask is not None:
        mask = mask[:, None, None, :]  # [B, L], by key; mask type 0 is [L, L], 2 is [B, H, L, L]
    if not accept(q, k, v, mask):
        return original()
    out = tritonattn_sdpa(q, k, v, mask).transpose(1, 2).flatten(-2)
    return F.linear(out, call.proj_weight, call.proj_bias), out.new_empty(0)


def fused_kernels() -> Overrides:
    """Replace torch's fused attention kernels and their backward passes."""
    forward = {name: functools.partial(_forward, operator) for name, operator in OPERATORS.items()}
    backward = {f"{name}_backward": functools.partial(_backward, operator) for name, operator in OPERATORS.items()}
    return Overrides(forward | backward)


class Operator(NamedTuple):
    """The form of the results of one of torch's attention operators and of its backward pass."""

    results: Callable                # (call, o, lse [B, H, L]) -> the results of the operator
    rows_first: bool = False         # whether gradients [B, H, L, D] are laid out in memory as [B, L, H, D]
    bottom_right: bool = False       # whether is_causal aligns the last query with the last key
    empty_row_lse: float = math.inf  # of a row that attends to no key, from which torch's backward pass makes gradients of 0


def _forward(operator, original, call):
    """Compute an operator in place of `original`."""
    unsupported = _unsupported(operator, call)
    if not accept(call.query, call.key, call.value, call.attn_bias, call.is_causal, scale=call.scale, unsupported=unsupported):
        return original()
    o, lse, *_ = forward_op(*_inputs(operator, call), False)
    return operator.results(call, o, lse.masked_fill(lse == -math.inf, operator.empty_row_lse))


def _backward(operator, original, call):
    """Compute the gradients of an operator in place of `original`."""
    tensors = call.query, call.key, call.value, call.attn_bias
    if _unsupported(operator, call) or not supports(*tensors, call.scale):
        return original()
    lse = call.logsumexp.reshape(*call.logsumexp.shape[:3])[..., :call.query.shape[2]]
    wanted = [want and x is not None for want, x in zip(call.grad_input_mask or (True, True, True, False), tensors)]
    inputs = _inputs(operator, call)
    gradients = backward_op(call.grad_out, None, call.out, statistics_of_lse(lse, inputs), call.query.new_empty(0), *inputs,
                            wanted + [False] * (N_WITH_GRADIENTS - len(wanted)))
    dq, dk, dv, dbias = (x if want else None for x, want in zip(gradients, wanted))
    if operator.rows_first:
        dq, dk, dv = map(_rows_first, (dq, dk, dv))
    if dbias is not None and (missing := -dbias.shape[-1] % 16):
        # torch lays its rows out in groups of sixteen
        dbias = F.pad(dbias, (0, missing))[..., :-missing]
    return (dq, dk, dv) if call.grad_input_mask is None else (dq, dk, dv, dbias)


def _unsupported(operator, call):
    """Return why the kernels cannot compute an operator with these arguments, or None; its backward pass has the same ones."""
    q, k, v, bias = call.query, call.key, call.value, call.attn_bias
    if call.dropout_p:
        return "dropout on the aten route"
    fits = (
        not call.return_debug_mask and (bias is None or not call.is_causal)
        and all((x.dtype, x.device) == (q.dtype, q.device) and x.dim() == 4 and x.numel() for x in (q, k, v))
        and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[:3] == v.shape[:3]
        and q.shape[1] % k.shape[1] == 0 and q.shape[3] == k.shape[3]
        # AMD's kernel aligns is_causal in a way of its own
        and not (torch.version.hip and operator.bottom_right and call.is_causal and q.shape[2] != k.shape[2]))
    if fits and bias is not None:
        fits = bias.device == q.device and bias.dtype in (torch.float32, q.dtype) and bias.dim() in (2, 4)
    return None if fits else "arguments of the operator"


def _inputs(operator, call):
    q, bias = call.query, call.attn_bias
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
    return AttentionInputs(q, call.key, call.value, bias, scale=scale, right=0 if call.is_causal else None,
                           bottom_right=operator.bottom_right)


def _rows_first(x):
    """Return [B, H, L] or [B, H, L, D] laid out in memory as [B, L, H, ...]."""
    return None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2)


def _flash_results(call, o, lse):
    shape, dtype = ((), torch.int64) if torch.version.hip else ((2,), torch.uint64)
    random_state = o.new_empty(shape, dtype=dtype), o.new_empty((), dtype=dtype)
    return o, lse, None, None, call.query.shape[2], call.key.shape[2], *random_state, o.new_empty(0)


def _efficient_results(call, o, lse):
    """Round the length of lse up to a multiple of 32, or to 0 where no gradient is needed."""
    missing = 0 if torch.version.hip else -lse.shape[2] % 32
    lse = F.pad(lse, (0, missing), value=math.inf) if call.compute_log_sumexp else lse[..., :0]
    return _rows_first(o), lse, *(o.new_empty((), dtype=torch.int64) for _ in range(2))


def _cudnn_results(call, o, lse):
    random_state = (o.new_empty((), dtype=torch.int64) for _ in range(2))
    return o, lse.unsqueeze(-1), None, None, call.query.shape[2], call.key.shape[2], *random_state, None


def _cpu_results(call, o, lse):
    return o, _rows_first(lse)


OPERATORS = {
    "_scaled_dot_product_flash_attention": Operator(_flash_results, bottom_right=True),
    "_scaled_dot_product_efficient_attention": Operator(_efficient_results, rows_first=True),
    "_scaled_dot_product_cudnn_attention": Operator(_cudnn_results),
    "_scaled_dot_product_flash_attention_for_cpu": Operator(_cpu_results, rows_first=True, empty_row_lse=0.0),
}
