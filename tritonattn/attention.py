"""What you call: the two doors. All argument checks live here."""

import math
import numbers

import torch

from . import gpu, ops
from .gpu import INTERPRETED, TRITON

LARGEST_SCALE = 2.3e38  # times log2(e) it is still a float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# asked here once: Dynamo of torch 2.11 cannot trace the question
AUTOCAST = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]


def attention(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None,
              softcap=None, sink=None, dropout_p=0.0, return_lse=False, precise_grad=True):
    """O = softmax(scale Q K^T) V over the keys that each query sees, exact, without forming the scores.

    Args:
        q: queries, [..., H, L, D] (or [L, D]).
        k: keys, [..., Hk, S, D] (or [S, D]); Hk divides H, and query head h uses key head h // (H / Hk).
        v: values, [..., Hk, S, DV]. The leading dimensions broadcast. One dtype: float16, bfloat16 or float32
            (float64 too in Triton's interpreter), any strides.
        scale: what QK^T is multiplied by, any finite number; 1/sqrt(D) if None.
        causal: a query sees no later key. The same as window=(None, 0).
        window: (left, right), how many keys before and after its own position a query sees; None is unbounded.
        align: where L and S differ and a side is bounded, which ends coincide: "top_left" the first query and
            the first key (torch's is_causal), "bottom_right" the last ones (FlashAttention's causal).

                causal, L=2, S=4      top_left  1 0 0 0     bottom_right  1 1 1 0
                                                1 1 0 0                   1 1 1 1

        return_lse: also return the log-sum-exp of each row's scores.
        precise_grad: where a gradient is needed, keep what rounding took from a 16-bit output, so that dQ is
            exact to rounding also for data with a common mean. Costs one more tensor of the output's size.
        bias, mask, softcap, sink, dropout_p: not served yet; anything but the default raises.

    Returns:
        o [..., H, L, DV] in q's dtype and order of dimensions; with return_lse also lse [..., H, L], natural
        logarithm, float32. Both are differentiable, once. A row that sees no key gives o = 0, lse = -inf and
        gradients 0. What a query does not see cannot reach it, not even a nan. The same call gives the same bits; with
        and without a gradient to come, 16-bit outputs may differ in the last one, since precise_grad sums otherwise.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: a value out of its range.
        TypeError: a wrong kind of argument. NotImplementedError: what is not served.

    Source: Dao et al., 2022 (arXiv 2205.14135); running softmax, Milakov and Gimelshein, 2018 (arXiv 1805.02867).
    """
    _check_tensors(q=q, k=k, v=v)
    _refuse(bias=bias, mask=mask, softcap=softcap, sink=sink, dropout_p=dropout_p or None)
    q, k, v = _autocast(q, k, v)
    _check_kind(q=q, k=k, v=v)
    _check_sizes(("q", "k", "v"), q, k, v)
    scale = _check_scale(scale, q.shape[-1])
    left, right = _check_window(causal, window)
    bottom_right = _check_align(align, q.shape[-2], k.shape[-2], bounded=left is not None or right is not None)
    o, lse = _attend(q, k, v, scale, left, right, bottom_right, bool(precise_grad))
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """torch.nn.functional.scaled_dot_product_attention, argument for argument.

    Shapes: query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev] -> [..., Hq, L, Ev]. `is_causal` is
    aligned top-left. Differs from torch where torch is wrong: values of another length than the keys are an
    error, and a nan in a key or value that a query must not see does not reach it. Not served yet: attn_mask and
    dropout_p, which raise NotImplementedError. See `attention` for errors and source.
    """
    _check_tensors(query=query, key=key, value=value)
    _refuse(attn_mask=attn_mask, dropout_p=dropout_p or None)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected True or False, got {_brief(is_causal)}")
    query, key, value = _autocast(query, key, value)
    _check_kind(query=query, key=key, value=value)
    if isinstance(scale, torch.Tensor) and scale.dim() == 0 and not scale.requires_grad:
        scale = scale.item()
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise RuntimeError("enable_gqa: expected query, key and value with a head dimension, at least 3-D, "
                               f"got {query.dim()}-D, {key.dim()}-D and {value.dim()}-D")
    else:
        query, key, value = _broadcast_heads(query, key, value)
    _check_sizes(("query", "key", "value"), query, key, value)
    scale = _check_scale(scale, query.shape[-1])
    return _attend(query, key, value, scale, None, 0 if is_causal else None, False, True)[0]


def _attend(q, k, v, scale, left, right, bottom_right, precise_grad):
    """Give every tensor a head dimension, the same batch dimensions and at least one column; take the additions off."""
    bare, dv = max(q.dim(), k.dim(), v.dim()) == 2, v.shape[-1]
    q, k, v = (x.unsqueeze(0) if x.dim() == 2 else x for x in (q, k, v))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    heads = max(k.shape[-3], v.shape[-3]) if min(k.shape[-3], v.shape[-3]) else 0
    q = q.expand(*batch, *q.shape[-3:])
    k, v = (x.expand(*batch, heads, *x.shape[-2:]) for x in (k, v))
    if q.shape[-1] == 0:
        # a score of nothing is 0: one column of zeros says the same
        q, k, scale = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    o, lse = ops.attend(q, k, v if dv else torch.nn.functional.pad(v, (0, 1)), scale, left, right, bottom_right, precise_grad)
    o = o if dv else o[..., :0]
    return (o.squeeze(-3), lse.squeeze(-2)) if bare else (o, lse)


def _broadcast_heads(query, key, value):
    """Without GQA the head dimension is one more batch dimension."""
    if max(query.dim(), key.dim(), value.dim()) < 3:
        return query, key, value
    query, key, value = (x.unsqueeze(0) if x.dim() == 2 else x for x in (query, key, value))
    heads = query.shape[-3]
    for x in (key, value):
        if heads == 1:
            heads = x.shape[-3]
        elif x.shape[-3] not in (1, heads):
            raise RuntimeError(f"key and value: expected as many heads as query or one, {query.shape[-3]} or 1, got "
                               f"{key.shape[-3]} and {value.shape[-3]}; for grouped heads say enable_gqa=True")
    # one head of keys for all is served as it is
    return query.expand(*query.shape[:-3], heads, *query.shape[-2:]), key, value


def _autocast(*tensors):
    """What torch does to the arguments of its own attention under autocast: the lower precision, but not of float64."""
    device = tensors[0].device.type
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _refuse(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not served yet, expected it left out, got {_brief(value)}")


def _brief(value):
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _check_tensors(**tensors):
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            kind = "a nested one" if x.is_nested else f"layout {x.layout}"
            raise RuntimeError(f"{name}: expected a dense (strided) tensor, got {kind}")
        if x.dim() < 2:
            raise RuntimeError(f"{name}: expected at least 2 dimensions, [..., length, size], got {x.dim()}")


def _check_kind(**tensors):
    (first, q), *_ = tensors.items()
    for name, x in tensors.items():
        if x.dtype != q.dtype:
            raise RuntimeError(f"{name}: expected the dtype of {first}, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise RuntimeError(f"{name}: expected the device of {first}, {q.device}, got {x.device}")
    if not TRITON:
        raise RuntimeError("Triton is not installed: expected it beside torch; on a machine without a GPU, "
                           "pip install 'tritonattn[cpu]'")
    if q.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(f"{first}: expected a tensor on a GPU, got one on the CPU; to run the kernels there in Triton's "
                           "interpreter, set TRITON_INTERPRET=1 before Python starts")
    if q.dtype not in DTYPES and not (INTERPRETED and q.dtype == torch.float64):
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise RuntimeError(f"{first}: expected dtype {served} (float64 in Triton's interpreter only), got {q.dtype}")


def _check_sizes(names, q, k, v):
    q_name, k_name, v_name = names
    if k.shape[-1] != q.shape[-1]:
        raise RuntimeError(f"{k_name}: expected the head size of {q_name}, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise RuntimeError(f"{v_name}: expected the length of {k_name}, {k.shape[-2]}, got {v.shape[-2]}")
    for name, x in zip(names, (q, k, v)):
        if x.shape[-1] > 256 and x.shape[-1] > (most := _largest_head(x)):
            raise RuntimeError(f"{name}: expected a head size of at most {most} in {x.dtype} here, got {x.shape[-1]}")
    heads = [1 if x.dim() == 2 else x.shape[-3] for x in (q, k, v)]
    if heads[1] != heads[2] and 1 not in heads[1:]:
        raise RuntimeError(f"{v_name}: expected the head count of {k_name}, {heads[1]}, or 1, got {heads[2]}")
    for name, count in zip((k_name, v_name), heads[1:]):
        if heads[0] % count if count else heads[0]:
            raise RuntimeError(f"{name}: expected a head count dividing {heads[0]}, got {count}")
    try:
        torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape[:-3])) for x in (q, k, v))
        raise RuntimeError(f"{q_name}, {k_name}, {v_name}: expected batch dimensions that broadcast, got {shapes}") from None


def _largest_head(x):
    """512, but 256 where a float32 tile of 512 does not fit into shared memory."""
    narrow = x.dtype == torch.float32 and x.device.type == "cuda" and gpu.of(x.device).shared_memory < 160 * 1024
    return 256 if narrow and not gpu.of(x.device).is_amd else 512


def _check_scale(scale, d):
    if scale is None:
        return 1.0 / math.sqrt(d) if d else 1.0
    if isinstance(scale, torch.Tensor) or not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale: expected a number or None, got {_brief(scale) if scale is not None else None}; a learned "
                        "scale goes into q, where it gets its gradient")
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale: expected a finite number, at most {LARGEST_SCALE} in magnitude, got {str(scale)[:24]}")
    return float(scale)


def _check_window(causal, window):
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected True or False, got {_brief(causal)}")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {_brief(window)}")
    for side, name in zip(window, ("left", "right")):
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window: expected {name} to be an integer or None, got {_brief(side)}")
        if side is not None and side < 0:
            raise ValueError(f"window: expected {name} to be at least 0, got {side}")
    left, right = window
    return left, 0 if causal else right


def _check_align(align, n_q, n_k, bounded):
    if align not in (None, "top_left", "bottom_right"):
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', got {align!r}")
    if align is None and bounded and n_q != n_k:
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', since {n_q} queries and {n_k} keys can be aligned "
                         "both ways, got None")
    return align == "bottom_right"
