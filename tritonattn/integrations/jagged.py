"""torch's nested tensors of layout torch.jagged at scaled_dot_product_attention, as packed sequences.

    [B, H, lengths, D], a transposed view of rows [total, H, D]     -> attention_varlen -> the same of the output
"""

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from ..attention import attention_varlen
from . import support

NOT_SUPPORTED = "type NestedTensor"


def unsupported_reason(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Return why a call with nested tensors falls back to torch, or None."""
    tensors = query, key, value
    # Dynamo cannot compare the sizes of nested tensors here
    if torch.compiler.is_compiling() or attn_mask is not None or not all(map(_has_rows, tensors)):
        return NOT_SUPPORTED
    heads = [x.shape[1] for x in tensors]
    fit = heads[1] == heads[2] and (heads[0] == heads[1] or (enable_gqa is True and heads[1] and heads[0] % heads[1] == 0))
    same = key.offsets() is value.offsets() and len(query.offsets()) == len(key.offsets())
    # torch's kernels do not agree on how sequences of two lengths are aligned
    aligned = is_causal is False or query.offsets() is key.offsets()
    if not (fit and same and aligned and query.shape[-1] == key.shape[-1]):
        return NOT_SUPPORTED
    return support.unsupported_reason(*map(_rows, tensors), None, dropout_p, scale, enable_gqa)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Compute what torch's function does with nested tensors for which there is no `unsupported_reason`."""
    starts, longest = ([get(x) for x in (query, key)] for get in (lambda x: x.offsets(), lambda x: x._maybe_max_seqlen))
    o = attention_varlen(*map(_rows, (query, key, value)), *starts, *longest, scale=scale, causal=is_causal, align="top_left",
                         dropout_p=max(dropout_p, 0.0))
    return torch.nested.nested_tensor_from_jagged(o.transpose(0, 1), query.offsets(), jagged_dim=2,
                                                  min_seqlen=query._maybe_min_seqlen, max_seqlen=query._maybe_max_seqlen)


def _has_rows(x):
    """Return whether x is a nested tensor [B, H, lengths, D] without rows between its sequences."""
    return (isinstance(x, NestedTensor) and x.layout == torch.jagged and x.dim() == 4 and x._ragged_idx == 2
            and x.lengths() is None and x.shape[1] > 0)


def _rows(x):
    """Return the rows of all sequences, [total, H, D]."""
    return x.values().transpose(0, 1)
