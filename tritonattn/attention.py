"""What you call: the two doors. All argument checks live here."""

import itertools
import math
import numbers

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant

from . import gpu
from .block_mask import BlockMask, version_of
from .gpu import INTERPRETED, TRITON
from .problem import Problem
from .runtime import custom_op

NO_MASK = None, None, None  # no mask, and no lists of its tiles
LARGEST_SCALE = 2.3e38  # times log2(e) it is still a float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# asked here once: Dynamo of torch 2.11 cannot trace the question
AUTOCAST = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]


def attention(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None,
              key_lengths=None, softcap=None, sink=None, dropout_p=0.0, dropout_seed=None, return_lse=False, precise_grad=True):
    """O = softmax(scale Q K^T + bias) V over the keys that each query sees, exact, without forming the scores.

    Args:
        q: queries, [..., H, L, D] (or [L, D]).
        k: keys, [..., Hk, S, D] (or [S, D]); Hk divides H, and query head h uses key head h // (H / Hk).
        v: values, [..., Hk, S, DV]. The leading dimensions broadcast. One dtype: float16, bfloat16 or float32
            (float64 too in Triton's interpreter), any strides.
        scale: what QK^T is multiplied by, any finite number; 1/sqrt(D) if None.
        causal: a query sees no later key. The same as window=(None, 0).
        window: (left, right), how many keys before and after its own position a query sees; None is unbounded.
        align: where L and S differ (or key_lengths are given) and a side is bounded, which ends coincide: "top_left" the
            first query and the first key (torch's is_causal), "bottom_right" the last ones (FlashAttention's causal).

                causal, L=2, S=4      top_left  1 0 0 0     bottom_right  1 1 1 0
                                                1 1 0 0                   1 1 1 1

        bias: added to the scores, of any shape that broadcasts to [..., H, L, S], a scalar included; q's dtype or
            float32. -inf hides a pair. It is read through its own strides, and its gradient has its own shape and takes
            no more memory: what is broadcast is summed in the kernel, in the same order every time. Give it in its own
            shape: what `expand` has made larger gets a gradient of that size.
        mask: booleans, of any shape that broadcasts to [..., H, L, S]; False hides a pair. Or a `block_mask` of them: then
            tiles that hide everything are skipped and those that hide nothing read no mask. A window beside a map hides
            pairs but skips no tile: put it into the mask.
        key_lengths: how many keys each sequence has, integers that broadcast to the leading dimensions; the others, up to
            S, are padding that nobody sees, whatever it holds. "bottom_right" then means the last key of each.
        dropout_p: weights are dropped with this probability and the others multiplied by 1 / (1 - dropout_p), always,
            as in torch's function. What is dropped depends on a seed and on the pair's place alone, never on block sizes.
        dropout_seed: one int64 on q's device; drawn from torch's generator if None. See `dropout_mask`.
        return_lse: also return the log-sum-exp of each row's scores.
        precise_grad: where a gradient is needed, keep what rounding took from a 16-bit output, so that dQ is
            exact to rounding also for data with a common mean. Costs one more tensor of the output's size.
        softcap, sink: not served yet; anything but the default raises.

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
    _reject_unsupported(softcap=softcap, sink=sink)
    arguments = _as_given(q, k, v, scale=scale, causal=causal, window=window, align=align, bias=bias, mask=mask,
                          key_lengths=key_lengths, dropout_p=dropout_p, dropout_seed=dropout_seed)
    o, lse = _attend(*arguments, precise_grad=bool(precise_grad))
    return (o, lse) if return_lse else o


def problem_of(q, k, v, **options) -> Problem:
    """The problem that `attention` poses to the kernels with these arguments; nothing runs, no random number is drawn."""
    return prepare(q, k, v, **options).problem


def prepare(q, k, v, *, softcap=None, sink=None, return_lse=False, precise_grad=True, **options):
    """The launch.Inputs that `attention` gives to the kernels with these arguments; without a seed dropout's is 0."""
    from .runtime.launch import AttentionInputs  # it needs Triton, and the checks do not

    _reject_unsupported(softcap=softcap, sink=sink)
    _check_tensors(q=q, k=k, v=v)
    if options.get("dropout_p") and options.get("dropout_seed") is None:
        options["dropout_seed"] = torch.zeros(1, dtype=torch.int64, device=q.device)
    q, k, v, bias, masks, seed, key_lengths, scale, *others = _as_given(q, k, v, **options)
    *tensors, scale = _shaped(q, k, v, bias, masks, scale)
    return AttentionInputs(*tensors, seed, key_lengths, scale, *others)


def _as_given(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None, key_lengths=None,
              dropout_p=0.0, dropout_seed=None):
    """The arguments of `_attend`."""
    _check_tensors(q=q, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    _check_kind(q=q, k=k, v=v)
    _check_sizes(("q", "k", "v"), q, k, v)
    bias, masks = _as_pairs("bias", bias, q, k, v), _as_masks(mask, q, k, v)
    scale = _check_scale(scale, q.shape[-1])
    left, right = _check_window(causal, window)
    bottom_right = _check_align(align, q.shape[-2], k.shape[-2], left is not None or right is not None, key_lengths)
    key_lengths = _as_lengths(key_lengths, q, k, v)
    seed = _seed(_check_probability(dropout_p), dropout_seed, q.device)
    return q, k, v, bias, masks, seed, key_lengths, scale, left, right, bottom_right, float(dropout_p)


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """torch.nn.functional.scaled_dot_product_attention, argument for argument.

    Shapes: query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev] -> [..., Hq, L, Ev]; attn_mask, of booleans
    (True: takes part) or of numbers to be added, broadcasts to [..., Hq, L, S]. `is_causal` is aligned top-left; a
    CausalBias of torch.nn.attention.bias may be either. Differs from torch where torch is wrong: values of another length
    than the keys are an error, so is a scale that is not finite, and a nan in a key or value that a query must not see does
    not reach it. Under autocast a float32 attn_mask stays what it is. Errors are of torch's types and begin with its words.
    See `attention` for gradients, errors and source.
    """
    try:
        arguments = _prepare_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except Exception as ours:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        raise _as_torch_error(ours, (query, key, value, attn_mask, dropout_p, is_causal), options) from None
    o = _attend(*arguments, precise_grad=True)[0]
    # four dimensions keep the query's order, as in torch's fused kernels; others are contiguous, as in its plain ones
    return o if query.dim() == 4 else o.contiguous()


def _prepare_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """The arguments of `_attend`."""
    _check_tensors(query=query, key=key, value=value)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {_describe(flag)}")
    query, key, value = _autocast(query, key, value)
    _check_kind(query=query, key=key, value=value)
    dropout_p, scale = (x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 and not x.requires_grad else x
                        for x in (dropout_p, scale))
    query, key, value = (_grouped_heads if enable_gqa else _broadcast_heads)(query, key, value)
    _check_sizes(("query", "key", "value"), query, key, value)
    bias, masks, causal, bottom_right = _torchs_mask(attn_mask, is_causal, query, key, value)
    scale = _check_scale(scale, query.shape[-1])
    if isinstance(dropout_p, numbers.Real) and dropout_p < 0:
        dropout_p = 0.0
    dropout_p = _check_probability(dropout_p)
    seed = _seed(dropout_p, None, query.device)
    return query, key, value, bias, masks, seed, None, scale, None, 0 if causal else None, bottom_right, dropout_p


def _as_torch_error(ours, arguments, options):
    """The error that torch raises where ours is raised, ours below it; ours alone where torch has nothing against the call."""
    if any(isinstance(x, torch.Tensor) and (x.layout != torch.strided or x.is_nested or isinstance(x, CausalBias))
           for x in arguments):
        return ours
    devices = [x.device for x in arguments[:3] if isinstance(x, torch.Tensor)]
    if len(devices) == 3:
        arguments = (*_autocast(*arguments[:3]), *arguments[3:])
    if len(devices) == 3 and len(set(devices)) > 1:
        q, k, v = devices
        return RuntimeError(f"Expected query, key, and value to have the same device type, but got query.device: {q} "
                            f"key.device: {k} and value.device: {v} instead.\n{ours}")
    try:
        # without data: torch looks at the same things and computes nothing
        tensors = (x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in arguments[:4])
        torch._C._nn.scaled_dot_product_attention(*tensors, *arguments[4:], **options)
    except Exception as torchs:
        return type(torchs)(f"{torchs}\n{ours}")
    return ours


def dropout_mask(shape, dropout_p, dropout_seed):
    """[batch, H, L, S] booleans: which weights `attention` keeps with this seed. All batch dimensions count as one.

    Bit for bit what every kernel draws (Philox, seven rounds; kernels/dropout.py has the counter); takes memory for each.
    """
    if len(shape) != 4:
        raise ValueError(f"shape: expected four sizes (batch, heads, queries, keys), got {tuple(shape)}")
    p = _check_probability(dropout_p)
    if not isinstance(dropout_seed, torch.Tensor):
        raise RuntimeError(f"dropout_seed: expected one int64 on the device of the queries, got {dropout_seed!r}")
    device = dropout_seed.device
    seed = _seed(1.0, dropout_seed, device)
    _check_place(dropout_seed=seed)
    if p in (0, 1):
        return torch.full(shape, p == 0, dtype=torch.bool, device=device)
    return custom_op.keep_op(list(shape), p, seed)


def _attend(q, k, v, bias, masks, seed, key_lengths, scale, *options, precise_grad):
    """Run the kernels on tensors of one rank, and take off what was added to make them so."""
    bare, dv = max(q.dim(), k.dim(), v.dim()) == 2, v.shape[-1]
    *tensors, scale = _shaped(q, k, v, bias, masks, scale)
    o, lse = custom_op.attention_op(*tensors, seed, key_lengths, scale, *options, precise_grad=precise_grad)
    o = o if dv else o.narrow(-1, 0, 0)
    return (o.squeeze(-3), lse.squeeze(-2)) if bare else (o, lse)


def _shaped(q, k, v, bias, masks, scale):
    """Every tensor has a head dimension, the same batch dimensions and at least one column; the scale goes with it."""
    q, k, v, bias, *masks = (x.unsqueeze(0) if x is not None and x.dim() == 2 else x for x in (q, k, v, bias, *masks))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    heads = max(k.shape[-3], v.shape[-3]) if min(k.shape[-3], v.shape[-3]) else 0
    q = q.expand(*batch, *q.shape[-3:])
    k, v = (x.expand(*batch, heads, *x.shape[-2:]) for x in (k, v))
    if q.shape[-1] == 0:
        # a score of nothing is 0: one column of zeros says the same
        q, k, scale = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    v = v if v.shape[-1] else torch.nn.functional.pad(v, (0, 1))
    return q, k, v, bias, *masks, scale


def _grouped_heads(query, key, value):
    """With GQA keys and values may even differ in their heads: then both are repeated."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise RuntimeError("enable_gqa: expected query, key and value with a head dimension, at least 3-D, "
                           f"got {query.dim()}-D, {key.dim()}-D and {value.dim()}-D")
    heads, of_key, of_value = (x.shape[-3] for x in (query, key, value))
    if of_key != of_value and of_key and of_value and heads % of_key == heads % of_value == 0:
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    return query, key, value


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


def _as_pairs(name, x, q, k, v):
    """A bias or a mask with as many dimensions as the scores, each of their size or 1; None stays None."""
    if x is None:
        return None
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {_describe(x)}")
    kinds = {"mask": (torch.bool,), "bias": (torch.float32, q.dtype), "attn_mask": (torch.bool, torch.float32, q.dtype)}[name]
    if torch.is_autocast_enabled(q.device.type) and x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(q.dtype)
    if x.layout != torch.strided or x.is_nested:
        raise RuntimeError(f"{name}: expected a dense (strided) tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.dtype not in kinds:
        raise RuntimeError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(kinds)))}, got {x.dtype}")
    if x.device != q.device:
        raise RuntimeError(f"{name}: expected {q.device}, where the queries are, got {x.device}")
    heads = () if max(q.dim(), k.dim(), v.dim()) == 2 else (q.shape[-3] if q.dim() > 2 else 1,)
    shape = (*torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]), *heads, q.shape[-2], k.shape[-2])
    fits = x.dim() <= len(shape) and all(mine in (1, size) for mine, size in zip(reversed(x.shape), reversed(shape)))
    if not fits:
        torchs = _misfit(shape, x.shape) + "\n" if name == "attn_mask" else ""
        raise RuntimeError(f"{torchs}{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(x.shape)}")
    return _with_rank(x, len(shape))


def _misfit(shape, given):
    """How torch says of eager tensors that scores of this shape have no place for a mask of the given one."""
    sides = itertools.zip_longest(reversed(shape), reversed(given), fillvalue=1)
    wrong = [(len(shape) - 1 - i, a, b) for i, (a, b) in enumerate(sides) if b != a and 1 not in (a, b)]
    if wrong:
        dimension, a, b = wrong[0]
        return f"The size of tensor a ({a}) must match the size of tensor b ({b}) at non-singleton dimension {dimension}"
    larger = list(given[:max(0, len(given) - len(shape))]) + [max(pair) for pair in zip(shape[::-1], given[::-1])][::-1]
    return f"output with shape {list(shape)} doesn't match the broadcast shape {larger}"


def _with_rank(x, rank):
    """With as many dimensions, new ones of size 1 in front. Not by an index, which fake tensors of a GPU cannot build here."""
    return x.reshape(*(1,) * (rank - x.dim()), *x.shape)


def _as_masks(mask, q, k, v):
    """The mask as `_as_pairs` has it, and the lists of its tiles for queries and for keys; None where nothing is given."""
    if not isinstance(mask, BlockMask):
        return _as_pairs("mask", mask, q, k, v), None, None
    sizes = q.shape[-2], k.shape[-2]
    if mask.mask.shape[-2:] != sizes:
        raise RuntimeError(f"mask: expected a tile map of {sizes[0]} queries and {sizes[1]} keys, both written out, got one of "
                           f"shape {tuple(mask.mask.shape)}")
    if not torch.compiler.is_compiling() and mask.version not in (None, version_of(mask.mask)):
        raise RuntimeError("mask: expected the mask as it was when its tile map was made, got one that was changed since")
    whole = _as_pairs("mask", mask.mask, q, k, v)
    return whole, *(_with_rank(x, whole.dim()) for x in (mask.query_lists, mask.key_lists))


def _as_lengths(lengths, q, k, v):
    """One int32 for each batch, contiguous; None stays None."""
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, torch.Tensor) else _describe(lengths)
        raise TypeError(f"key_lengths: expected a tensor of int32 or int64, got {got}")
    if lengths.device != q.device:
        raise RuntimeError(f"key_lengths: expected {q.device}, where the queries are, got {lengths.device}")
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    try:
        # first into the range: what is too long for 32 bits still means all keys
        return lengths.expand(batch).clamp(0, k.shape[-2]).to(torch.int32).contiguous()
    except RuntimeError:
        shapes = f"{tuple(batch)}, got {tuple(lengths.shape)}"
        raise RuntimeError(f"key_lengths: expected a shape that broadcasts to {shapes}") from None


def _torchs_mask(attn_mask, is_causal, query, key, value):
    """What torch's one argument may mean: bias, masks (as of `_as_masks`), whether it is causal, and aligned bottom-right."""
    if attn_mask is None:
        return None, NO_MASK, is_causal, False
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError("CausalBias should not be used with causal=True\nis_causal: expected False beside a CausalBias, "
                             "got True")
        sizes = attn_mask.seq_len_q, attn_mask.seq_len_kv
        if sizes != (query.shape[-2], key.shape[-2]):
            raise RuntimeError(f"attn_mask: expected a CausalBias of {query.shape[-2]} queries and {key.shape[-2]} keys, "
                               f"got one of {sizes[0]} and {sizes[1]}")
        return None, NO_MASK, True, attn_mask.variant == CausalVariant.LOWER_RIGHT
    if is_causal:
        # some of torch's own backends let it pass
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True\n"
                           "attn_mask: expected None where is_causal=True, got a mask")
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask: expected a tensor or None, got {_describe(attn_mask)}")
    if attn_mask.dtype == torch.bool:
        return None, (_as_pairs("attn_mask", attn_mask, query, key, value), None, None), False, False
    return _as_pairs("attn_mask", attn_mask, query, key, value), NO_MASK, False, False


def _check_probability(p):
    if isinstance(p, torch.Tensor) or not isinstance(p, numbers.Real):
        raise TypeError(f"dropout_p: expected a number, got {_describe(p)}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected a probability, between 0 and 1, got {p}")
    return float(p)


def _seed(p, seed, device):
    """One int64 on the device where something may be dropped, else None. It follows torch's generator: manual_seed,
    checkpointing, graphs and torch.compile treat it as any other random number."""
    if seed is None:
        return torch.randint(2**62, (1,), device=device) if p else None
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}" if isinstance(seed, torch.Tensor) else repr(seed)
        raise RuntimeError(f"dropout_seed: expected one int64 on {device}, got {got}")
    # a copy: the caller may count his own on before the backward pass draws
    return seed.reshape(1).clone() if p else None


def _reject_unsupported(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not served yet, expected it left out, got {_describe(value)}")


def _describe(value):
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
    _check_place(**{first: q})
    if q.dtype not in DTYPES and not (INTERPRETED and q.dtype == torch.float64):
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise RuntimeError(f"{first}: expected dtype {served} (float64 in Triton's interpreter only), got {q.dtype}")


def _check_place(**tensors):
    """Whether kernels run where these tensors are."""
    if not TRITON:
        raise RuntimeError("Triton is not installed: expected it beside torch; on a machine without a GPU, "
                           "pip install 'tritonattn[cpu]'")
    for name, x in tensors.items():
        if x.device.type == "cpu" and not INTERPRETED:
            raise RuntimeError(f"{name}: expected a tensor on a GPU, got one on the CPU; to run the kernels there in Triton's "
                               "interpreter, set TRITON_INTERPRET=1 before Python starts")


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
    return gpu.of(x.device).largest_head(x.dtype) if x.device.type == "cuda" else 512


def _check_scale(scale, d):
    if scale is None:
        return 1.0 / math.sqrt(d) if d else 1.0
    if isinstance(scale, torch.Tensor) or not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale: expected a number or None, got {_describe(scale) if scale is not None else None}; a learned "
                        "scale goes into q, where it gets its gradient")
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale: expected a finite number, at most {LARGEST_SCALE} in magnitude, got {str(scale)[:24]}")
    return float(scale)


def _check_window(causal, window):
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected True or False, got {_describe(causal)}")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {_describe(window)}")
    for side, name in zip(window, ("left", "right")):
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window: expected {name} to be an integer or None, got {_describe(side)}")
        if side is not None and side < 0:
            raise ValueError(f"window: expected {name} to be at least 0, got {side}")
    left, right = window
    return left, 0 if causal else right


def _check_align(align, n_q, n_k, bounded, key_lengths):
    if align not in (None, "top_left", "bottom_right"):
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', got {align!r}")
    if align is None and bounded and key_lengths is not None:
        raise ValueError("align: expected 'top_left' or 'bottom_right', since sequences of their own lengths can be aligned "
                         "both ways, got None")
    if align is None and bounded and n_q != n_k:
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', since {n_q} queries and {n_k} keys can be aligned "
                         "both ways, got None")
    return align == "bottom_right"
