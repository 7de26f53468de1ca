"""torch's nested tensors of layout torch.jagged at scaled_dot_product_attention, as packed sequences.

    [B, H, lengths, D], a transposed view of rows [total, H, D]     -> attention_varlen -> the same of the output
"""

import torch

from ..attention import attention_varlen
from . import support, torch_private


def unsupported_reason(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Return why a call with nested tensors falls back to torch, or None."""
    tensors = query, key, value
    # Dynamo cannot compare the sizes of nested tensors here
    if torch.compiler.is_compiling() or attn_mask is not None or not all(map(_has_rows, tensors)):
        return "nested"
    heads = [x.shape[1] for x in tensors]
    fit = heads[1] == heads[2] and (heads[0] == heads[1] or (enable_gqa is True and heads[1] and heads[0] % heads[1] == 0))
    same = key.offsets() is value.offsets() and len(query.offsets()) == len(key.offsets())
    # torch's kernels do not agree on how sequences of two lengths are aligned
    aligned = is_causal is False or query.offsets() is key.offsets()
    if not (fit and same and aligned and query.shape[-1] == key.shape[-1]):
        return "nested"
    return support.unsupported_reason(*map(_rows, tensors), None, dropout_p, scale, enable_gqa)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """Compute what torch's function does with nested tensors for which there is no `unsupported_reason`."""
    (least, most), (_, most_keys) = torch_private.known_lengths(query), torch_private.known_lengths(key)
    o = attention_varlen(*map(_rows, (query, key, value)), query.offsets(), key.offsets(), most, most_keys, scale=scale,
                         causal=is_causal, align="top_left", dropout_p=max(dropout_p, 0.0))
    return torch.nested.nested_tensor_from_jagged(o.transpose(0, 1), query.offsets(), jagged_dim=2, min_seqlen=least,
                                                  max_seqlen=most)


def _has_rows(x):
    """Return whether x is a nested tensor [B, H, lengths, D] without rows between its sequences."""
    return torch_private.ragged_dimension(x) == 2 and x.dim() == 4 and x.lengths() is None and len(x.offsets()) > 1


def _rows(x):
    """Return the rows of all sequences, [total, H, D]."""
    return x.values().transpose(0, 1)
