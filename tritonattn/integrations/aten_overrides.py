"""The aten route: tritonattn's kernels as implementations of torch's operators, so that C++ callers use them too.

    torch._C._nn.scaled_dot_product_attention, from Python or C++
      CUDA   aten::_scaled_dot_product_flash_attention, _efficient_attention, _cudnn_attention, each with its _backward
      CPU    aten::_scaled_dot_product_flash_attention_for_cpu with its _backward (in Triton's interpreter)
    the C++ fast path of torch's multi-head attention (overridden on both routes)
             aten::_native_multi_head_attention

torch chooses among its kernels first, so the route handles calls for which torch has a fused kernel that sdpa_kernel allows.
float64 on a GPU, dropout and masks with gradients on the CPU, and sizes that no fused kernel takes go to torch's "math" kernel
and never come here. Packed sequences (varlen_attn) and nested tensors have operators of their own, which stay torch's.

The backward operators receive o and lse, and nothing else that their schemas do not hold. Hence:
  - Dropout falls back to torch: the schemas have no place for tritonattn's seed. Its backward pass is torch's too.
  - dq of 16-bit inputs is as exact as FlashAttention's, not as with precise_grad, which keeps the rounding error of o.
  - A row whose scores are all near the lowest float gets the gradients of torch's fused kernels, because its lse is rounded.
"""

import collections
import math
import time
import warnings

import torch
import torch.nn.functional as F

from ..attention import scaled_dot_product_attention as tritonattn_sdpa
from ..runtime.arguments import AttentionInputs
from ..runtime.custom_op import backward_op, forward_op
from . import torch_private

MHA_DEFAULTS = None, True, True, None  # mask, need_weights, average_attn_weights, mask_type of _native_multi_head_attention
GRACE = 60.0                           # seconds
# (time, kernels) of overrides removed lately: the dispatcher frees a kernel at once, also if a thread is about to call it
_retired = collections.deque()


class Overrides:
    """Python functions that replace torch's kernels of some operators, until `remove`.

    Each is called as function(original, *arguments); original() is torch's kernel with the same arguments.
    """

    def __init__(self, functions, devices):
        """functions: by the operator's name; devices: the device types whose kernels they replace."""
        self._library, self._kernels = torch.library.Library("aten", "IMPL"), []
        for key in map(str.upper, devices):
            for name, function in functions.items():
                kernel = torch.library.get_kernel(f"aten::{name}", key) if torch_private.has_kernel(name, key) else None
                # in the interpreter, the operators of GPUs exist on the CPU too
                if kernel is not None or key == "CPU":
                    self._replace(name, kernel, function, key)

    def _replace(self, name, kernel, function, key):
        def override(keys, *arguments, **options):
            def original():
                if kernel is None:
                    raise NotImplementedError(f"aten::{name}: torch has no kernel of it for {key}")
                return kernel.call_boxed(keys, *arguments, **options)

            return function(original, *arguments, **options)

        with warnings.catch_warnings():
            # replacing a kernel is the purpose here
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._library.impl(name, override, key, with_keyset=True)
        self._kernels.append(torch.library.get_kernel(f"aten::{name}", key))

    def remove(self):
        """Put torch's kernels back. Calling it again does nothing."""
        now = time.monotonic()
        _retired.append((now, self._kernels))
        while _retired[0][0] < now - GRACE:
            _retired.popleft()
        torch_private.destroy_library(self._library)


def fast_path(devices, accept) -> Overrides:
    """Replace the attention of the C++ fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer.

    Both call one operator: self-attention [B, L, E] with its projections. accept(q, k, v, mask) decides and counts a call.
    Nested tensors and calls that return the weights keep torch's kernel. A floating-point mask is added to the scores, as
    with gradients on; torch's kernel turns it into booleans.
    """
    def attention(original, query, key, value, width, heads, *rest):
        in_weight, in_bias, out_weight, out_bias, mask, need_weights, _, mask_type = (*rest, *MHA_DEFAULTS[len(rest) - 4:])
        if need_weights or query is not key or query is not value:
            return original()
        q, k, v = F.linear(query, in_weight, in_bias).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        mask = ~mask if mask is not None and mask.dtype == torch.bool else mask  # True hides a key here
        if mask_type == 1 and mask is not None:
            mask = mask[:, None, None, :]  # [B, L], by key; mask type 0 is [L, L], 2 is [B, H, L, L]
        if not accept(q, k, v, mask):
            return original()
        out = tritonattn_sdpa(q, k, v, mask).transpose(1, 2).flatten(-2)
        return F.linear(out, out_weight, out_bias), query.new_empty(0)

    return Overrides({"_native_multi_head_attention": attention}, devices)


def fused_kernels(devices, accept, supports) -> Overrides:
    """Replace torch's fused attention kernels and their backward passes.

    accept(q, k, v, bias, is_causal, scale=, unsupported=) decides and counts a forward call; supports(q, k, v, bias, scale)
    says whether the kernels can compute a call, for the backward pass.
    """
    operators = {"_scaled_dot_product_flash_attention": Flash, "_scaled_dot_product_efficient_attention": Efficient,
                 "_scaled_dot_product_cudnn_attention": Cudnn, "_scaled_dot_product_flash_attention_for_cpu": Cpu}
    operators = {name: operator(accept, supports) for name, operator in operators.items()}
    functions = {name: operator.forward for name, operator in operators.items()}
    return Overrides(functions | {f"{name}_backward": operator.backward for name, operator in operators.items()}, devices)


class Operator:
    """One of torch's attention operators and its backward pass."""

    bottom_right = False     # whether is_causal aligns the last query with the last key
    empty_row_lse = math.inf  # lse of a row that attends to no key, from which torch's backward pass makes gradients of 0

    def __init__(self, accept, supports):
        self._accept, self._supports = accept, supports

    def _unsupported(self, q, k, v, bias, dropout_p, causal):
        """Return why the kernels cannot compute a call with these arguments, or None; the backward pass has the same ones."""
        if dropout_p:
            return "dropout on the aten route"
        fits = (
            all((x.dtype, x.device) == (q.dtype, q.device) and x.dim() == 4 and x.numel() for x in (q, k, v))
            and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[:3] == v.shape[:3]
            and q.shape[1] % k.shape[1] == 0 and q.shape[3] == k.shape[3]
            # AMD's kernel aligns is_causal in a way of its own
            and not (torch.version.hip and self.bottom_right and causal and q.shape[2] != k.shape[2]))
        if fits and bias is not None:
            fits = not causal and bias.device == q.device and bias.dtype in (torch.float32, q.dtype) and bias.dim() in (2, 4)
        return None if fits else "arguments of the operator"

    def _inputs(self, q, k, v, bias, causal, scale):
        bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return AttentionInputs(q, k, v, bias, scale=scale, right=0 if causal else None, bottom_right=self.bottom_right)

    def attend(self, q, k, v, bias, dropout_p, causal, scale):
        """Return o and lse [B, H, L], or None where the call falls back to torch."""
        unsupported = self._unsupported(q, k, v, bias, dropout_p, causal)
        if not self._accept(q, k, v, bias, causal, scale=scale, unsupported=unsupported):
            return None
        o, lse, *_ = forward_op(*self._inputs(q, k, v, bias, causal, scale), False)
        return o, lse.masked_fill(lse == -math.inf, self.empty_row_lse)

    def gradients(self, do, q, k, v, bias, o, lse, dropout_p, causal, scale, wanted=(True, True, True, False)):
        """Return dq, dk, dv, dbias, or None where the backward pass is torch's."""
        if self._unsupported(q, k, v, bias, dropout_p, causal) or not self._supports(q, k, v, bias, scale):
            return None
        lse = lse.reshape(*lse.shape[:3])[..., :q.shape[2]]
        lse_minus_max = q.new_empty(0) if bias is None else torch.zeros_like(lse)
        inputs = self._inputs(q, k, v, bias, causal, scale)
        return backward_op(do, None, o, lse, q.new_empty(0), lse_minus_max, *inputs, list(wanted))


def _rows_first(x):
    """Return [B, H, L, D] laid out in memory as [B, L, H, D]."""
    return None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2)


class Cpu(Operator):
    """aten::_scaled_dot_product_flash_attention_for_cpu; lse is [B, H, L] laid out as [B, L, H]."""

    empty_row_lse = 0.0

    def forward(self, original, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        if (results := self.attend(q, k, v, attn_mask, dropout_p, is_causal, scale)) is None:
            return original()
        o, lse = results
        return o, lse.transpose(1, 2).contiguous().transpose(1, 2)

    def backward(self, original, do, q, k, v, o, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
        gradients = self.gradients(do, q, k, v, attn_mask, o, lse, dropout_p, is_causal, scale)
        return original() if gradients is None else tuple(map(_rows_first, gradients[:3]))


class Flash(Operator):
    """aten::_scaled_dot_product_flash_attention; lse is [B, H, L], is_causal aligned bottom-right."""

    bottom_right = True

    def forward(self, original, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        results = None if return_debug_mask else self.attend(q, k, v, None, dropout_p, is_causal, scale)
        if results is None:
            return original()
        shape, dtype = ((), torch.int64) if torch.version.hip else ((2,), torch.uint64)
        random_state = q.new_empty(shape, dtype=dtype), q.new_empty((), dtype=dtype)
        return *results, None, None, q.shape[2], k.shape[2], *random_state, q.new_empty(0)

    def backward(self, original, do, q, k, v, o, lse, *rest, scale=None):
        dropout_p, is_causal, *_ = rest[4:]  # after cum_seq_q, cum_seq_k, max_q and max_k
        gradients = self.gradients(do, q, k, v, None, o, lse, dropout_p, is_causal, scale)
        return original() if gradients is None else tuple(gradients[:3])


class Efficient(Operator):
    """aten::_scaled_dot_product_efficient_attention; lse is [B, H, L rounded up to a multiple of 32], or [B, H, 0]."""

    def forward(self, original, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        if (results := self.attend(q, k, v, attn_bias, dropout_p, is_causal, scale)) is None:
            return original()
        o, lse = results
        missing = 0 if torch.version.hip else -lse.shape[2] % 32
        lse = F.pad(lse, (0, missing), value=math.inf) if compute_log_sumexp else lse[..., :0]
        return _rows_first(o), lse, *(q.new_empty((), dtype=torch.int64) for _ in range(2))

    def backward(self, original, do, q, k, v, attn_bias, o, lse, *rest, scale=None):
        _, _, dropout_p, wanted, is_causal = (*rest, False)[:5]
        wanted = [want and (x is not None) for want, x in zip(wanted, (q, k, v, attn_bias))]
        gradients = self.gradients(do, q, k, v, attn_bias, o, lse, dropout_p, is_causal, scale, wanted)
        if gradients is None:
            return original()
        *gradients, dbias = (x if want and x.numel() else None for x, want in zip(gradients, wanted))
        if dbias is not None and dbias.shape[-1] % 16:
            # torch lays its rows out in groups of sixteen
            wide = dbias.new_empty(*dbias.shape[:-1], dbias.shape[-1] + -dbias.shape[-1] % 16)
            dbias = wide[..., :dbias.shape[-1]].copy_(dbias)
        return *map(_rows_first, gradients), dbias


class Cudnn(Operator):
    """aten::_scaled_dot_product_cudnn_attention; lse is [B, H, L, 1]."""

    def forward(self, original, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                return_debug_mask=False, *, scale=None):
        results = None if return_debug_mask else self.attend(q, k, v, attn_bias, dropout_p, is_causal, scale)
        if results is None:
            return original()
        o, lse = results
        random_state = (q.new_empty((), dtype=torch.int64) for _ in range(2))
        return o, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], *random_state, None

    def backward(self, original, do, q, k, v, o, lse, *rest, scale=None):
        _, _, attn_bias, _, _, _, _, dropout_p, is_causal = rest
        gradients = self.gradients(do, q, k, v, attn_bias, o, lse, dropout_p, is_causal, scale)
        return original() if gradients is None else tuple(gradients[:3])
