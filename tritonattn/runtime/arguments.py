"""Every argument check, and the record in which the checked arguments travel to the kernels.

    attention(q, k, v, ...)                         -> prepare      --+
                                                                      +-> AttentionInputs -> custom_op.py -> launch.py
    scaled_dot_product_attention(query, key, ...)   -> prepare_sdpa --+
"""

import itertools
import math
import numbers
import operator
import reprlib
from typing import NamedTuple

import torch
from torch import SymInt, Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from ..block_mask import BlockMask, is_of_flex
from ..gpu import INTERPRETED, LARGEST_HEAD, TRITON, gpu_of
from ..problem import NORMALIZERS, Problem, UserFunction
from ..score_function import OF_MASKS, ScoreFunction, check_function, check_payload, register

NO_MASK = None, None, None  # mask, kv_blocks, q_blocks
STATISTICS = ("max", "head_max", "entropy", "key_mass")  # of return_stats
NO_DERIVATIVE = "expected one with a derivative, since a gradient of queries or keys is needed"
LARGEST_SCALE = 2.3e38      # and sigmoid_bias; times log2(e) it is still a float32
SMALLEST_SOFTCAP, LARGEST_SOFTCAP = 0.001, 500  # tanh has an absolute error of 3e-7
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NUMBERS = (float, int, numbers.Real, torch.SymFloat, torch.SymInt)
# a constant, since Dynamo of torch 2.11 cannot trace the call
AUTOCAST_DEVICES = [device for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device)]


class AttentionInputs(NamedTuple):
    """The checked arguments of one call: tensors, then numbers. The torch ops take the fields in this order.

    q [*batch, H, L, D], k [*batch, Hk, S, D] and v [*batch, Hk, S, DV]; bias, sink, slopes, table and mask have as many
    dimensions as q, each of the size of the scores [*batch, H, L, S] or 1, but for the last one of the table. Packed sequences
    take the place of a batch (packed_arguments.py): q [1, H, queries of all sequences, D] and so on, and scores
    [sequences, H, longest_q, longest_k].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None         # q's dtype or float32
    sink: Tensor | None = None         # any floating dtype; [..., H, 1, 1]
    alibi: Tensor | None = None        # the same: a slope of each head
    relative: Tensor | None = None     # any floating dtype; [..., H, 1, 2 R + 1], entry R + d for keys d after the query
    mask: Tensor | None = None         # booleans, True takes part
    kv_blocks: Tensor | None = None    # of a BlockMask, broadcast like the mask: [..., query blocks, 2 + kv blocks], int32
    q_blocks: Tensor | None = None     # [..., kv blocks, 2 + query blocks], int32
    q_starts: Tensor | None = None     # [sequences + 1] int32, contiguous: the first query of each, and the end of the last
    k_starts: Tensor | None = None     # the same of keys
    payload: Tensor | None = None      # of the score function, contiguous, any dtype and shape
    mask_payload: Tensor | None = None  # the same of the mask function
    seed: Tensor | None = None         # [1] int64, where dropout_p is not 0
    key_lengths: Tensor | None = None  # [*batch] int32, contiguous
    scale: float = 1.0
    left: int | None = None            # of the window
    right: int | None = None
    bottom_right: bool = False         # the last query is aligned with the last key of each sequence
    dropout_p: float = 0.0
    softcap: float | None = None
    longest_q: SymInt | None = None    # of packed sequences; in compiled code they may be symbols
    longest_k: SymInt | None = None
    row_max: bool = False              # which statistics are computed
    entropy: bool = False
    key_mass: bool = False
    normalizer: str = "softmax"         # one of NORMALIZERS
    sigmoid_bias: float | None = None   # -ln(keys) if None
    score_function: str | None = None   # its name, see score_function.py
    mask_function: str | None = None    # of a BlockMask without a tensor

    @property
    def problem(self) -> Problem:
        """The same without the tensors."""
        packed = None if self.q_starts is None else (self.q_starts.shape[0] - 1, self.longest_q, self.longest_k)
        return Problem.of(self.q, self.k, self.v, (self.left, self.right), self.bottom_right, self.bias, self.mask,
                          self.dropout_p, self.key_lengths, self.kv_blocks, self.softcap, self.sink, packed, self.alibi,
                          self.relative, self.entropy, self.key_mass, self.normalizer,
                          UserFunction.of(self.score_function, self.payload),
                          UserFunction.of(self.mask_function, self.mask_payload))


N_TENSORS = list(AttentionInputs.__annotations__.values()).index(float)  # the first fields
N_WITH_GRADIENTS = AttentionInputs._fields.index("relative") + 1         # the first of them


def prepare(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None, key_lengths=None,
            softcap=None, sink=None, alibi=None, relative=None, score_function=None, normalizer="softmax", sigmoid_bias=None,
            dropout_p=0.0, dropout_seed=None, return_stats=None) -> AttentionInputs:
    """Check the arguments of `attention` and return them as the kernels take them. Draws the seed of dropout if it is None."""
    check_tensors(q=q, k=k, v=v)
    q, k, v = cast_for_autocast(q, k, v)
    check_dtype_and_device(q=q, k=k, v=v)
    check_sizes(("q", "k", "v"), q, k, v)
    shape = scores_shape(q, k, v)
    bias, masks = pairwise_argument("bias", bias, q, shape), mask_argument(mask, q, shape)
    mask_function, mask_payload = (mask.function, mask.payload) if isinstance(mask, BlockMask) else (None, None)
    scale = check_scale(scale, q.shape[-1])
    softcap = check_softcap(softcap, scale)
    left, right = check_window(causal, window)
    positional = needing_positions(left, right, alibi, relative)
    bottom_right = check_align(align, q.shape[-2], k.shape[-2], positional, key_lengths)
    key_lengths = lengths_argument(key_lengths, q, batch_shape(q, k, v), k.shape[-2])
    sigmoid_bias = check_normalizer(normalizer, sigmoid_bias, sink, return_stats)
    dropout_p = check_probability(dropout_p)
    seed = seed_argument(dropout_p, dropout_seed, q.device)
    of_heads = sink_argument(sink, q, k, v), *positions_arguments(alibi, relative, q, k, v)
    function, payload = function_argument(score_function, q, k)
    q, k, v, bias, *masks, scale = with_equal_batches(q, k, v, bias, masks, scale)
    return AttentionInputs(q, k, v, bias, *of_heads, *masks, None, None, payload, mask_payload, seed, key_lengths, scale, left,
                           right, bottom_right, dropout_p, softcap, None, None, *wanted_statistics(return_stats), normalizer,
                           sigmoid_bias, function, mask_function)


def prepare_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> AttentionInputs:
    """Check the arguments of torch's function and return them as the kernels take them. Draws the seed of dropout."""
    check_tensors(query=query, key=key, value=value)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {describe(flag)}")
    query, key, value = cast_for_autocast(query, key, value)
    check_dtype_and_device(query=query, key=key, value=value)
    dropout_p, scale = (x.item() if isinstance(x, Tensor) and x.dim() == 0 and not x.requires_grad else x
                        for x in (dropout_p, scale))
    query, key, value = (repeat_uneven_heads if enable_gqa else broadcast_heads)(query, key, value)
    check_sizes(("query", "key", "value"), query, key, value)
    bias, masks, causal, bottom_right = torch_mask_argument(attn_mask, is_causal, query, key, value)
    scale = check_scale(scale, query.shape[-1])
    if isinstance(dropout_p, NUMBERS) and dropout_p < 0:
        dropout_p = 0.0
    dropout_p = check_probability(dropout_p)
    seed = seed_argument(dropout_p, None, query.device)
    q, k, v, bias, *masks, scale = with_equal_batches(query, key, value, bias, masks, scale)
    right = 0 if causal else None
    return AttentionInputs(q, k, v, bias, None, None, None, *masks, None, None, None, None, seed, None, scale, None, right,
                           bottom_right, dropout_p)


def prepare_map(tile, row_bytes) -> tuple[int, int]:
    """Check the tile of `attention_map`. Return the block of its kernel, and how many blocks a tile has in each direction."""
    try:
        tile = integer(tile)
    except TypeError:
        raise TypeError(f"tile: expected an integer, got {describe(tile)}") from None
    if tile < 16 or tile & (tile - 1):
        raise ValueError(f"tile: expected a power of two of at least 16, got {tile}")
    # blocks of queries and keys fit into the memory of every GPU
    block = min(tile, 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16)
    return block, tile // block


def prepare_dropout(shape, dropout_p, dropout_seed) -> tuple[float, Tensor]:
    """Check the arguments of `dropout_mask` and return the probability and the seed, [1] int64."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: expected four sizes (batch, heads, queries, keys), got {describe(shape)}")
    if len(shape) != 4:
        raise ValueError(f"shape: expected four sizes (batch, heads, queries, keys), got {tuple(shape)}")
    dropout_p = check_probability(dropout_p)
    if not isinstance(dropout_seed, Tensor):
        raise RuntimeError(f"dropout_seed: expected one int64 on the device of the queries, got {describe(dropout_seed)}")
    seed = seed_argument(1.0, dropout_seed, dropout_seed.device)
    check_kernels_run_on(dropout_seed=seed)
    return dropout_p, seed


def as_torch_error(error, arguments, options):
    """Return torch's error for a call that our checks reject, with ours below it; ours alone if torch accepts the call."""
    if any(isinstance(x, Tensor) and (x.layout != torch.strided or x.is_nested or isinstance(x, CausalBias))
           for x in arguments):
        return error
    devices = [x.device for x in arguments[:3] if isinstance(x, Tensor)]
    if len(devices) == 3:
        arguments = (*cast_for_autocast(*arguments[:3]), *arguments[3:])
    if len(devices) == 3 and len(set(devices)) > 1:
        q, k, v = devices
        return RuntimeError(f"Expected query, key, and value to have the same device type, but got query.device: {q} "
                            f"key.device: {k} and value.device: {v} instead.\n{error}")
    try:
        # meta tensors: torch runs its checks and computes nothing
        tensors = (x.detach().to("meta") if isinstance(x, Tensor) else x for x in arguments[:4])
        torch._C._nn.scaled_dot_product_attention(*tensors, *arguments[4:], **options)
    except Exception as torch_error:
        return type(torch_error)(f"{torch_error}\n{error}")
    return error


def with_equal_batches(q, k, v, bias, masks, scale):
    """Add a head dimension to 2-D tensors, broadcast the batches of q, k and v, pad heads of size 0 with a column of zeros."""
    q, k, v, bias, *masks = (x.unsqueeze(0) if x is not None and x.dim() == 2 else x for x in (q, k, v, bias, *masks))
    batch = batch_shape(q, k, v)
    heads = max(k.shape[-3], v.shape[-3]) if min(k.shape[-3], v.shape[-3]) else 0
    q = q.expand(*batch, *q.shape[-3:])
    k, v = (x.expand(*batch, heads, *x.shape[-2:]) for x in (k, v))
    if q.shape[-1] == 0:
        # an empty product is 0, and so is that of one column of zeros
        q, k, scale = torch.nn.functional.pad(q, (0, 1)), torch.nn.functional.pad(k, (0, 1)), 1.0
    v = v if v.shape[-1] else torch.nn.functional.pad(v, (0, 1))
    return q, k, v, bias, *masks, scale


def batch_shape(q, k, v):
    """Return the batch dimensions of q, k and v, broadcast. Raises RuntimeError where they do not."""
    shapes = [x.shape[:-3] for x in (q, k, v)]
    # broadcast_shapes is slow, but also takes sizes that are symbols without a value
    equal = not torch.compiler.is_compiling() and shapes[0] == shapes[1] == shapes[2]
    return shapes[0] if equal else torch.broadcast_shapes(*shapes)


def scores_shape(q, k, v) -> tuple:
    """Return the shape of the scores, [..., H, L, S], or [L, S] without heads."""
    heads = () if max(q.dim(), k.dim(), v.dim()) == 2 else (q.shape[-3] if q.dim() > 2 else 1,)
    return *batch_shape(q, k, v), *heads, q.shape[-2], k.shape[-2]


def empty_statistics(inputs: AttentionInputs, count=()):
    """Return an empty tensor [..., H, *count, padded L] for numbers of each query, in float32 (or q's dtype, if wider)."""
    *leading, n = inputs.q.shape[:-1]
    # packed sequences: see kernels/packed.py
    padded = -(-n // 16) * 16 if inputs.q_starts is None else (n // 16 + inputs.q_starts.shape[0]) * 16
    return inputs.q.new_empty((*leading, *count, padded), dtype=torch.promote_types(inputs.q.dtype, torch.float32))


def statistics_of_lse(lse, inputs: AttentionInputs):
    """Return statistics (kernels/softmax.py) that give the same weights as lse does: m = lse, log2 l = the rest."""
    statistics = empty_statistics(inputs, (2,)).zero_()
    minus_m, log2_l = statistics[..., :lse.shape[-1]].unbind(-2)
    unit = largest_score_unit(inputs)
    # where the scale is tiny, lse / unit may overflow
    minus_m.copy_(torch.where((lse / unit).isinf(), 0, -lse / unit))
    log2_l.copy_(torch.where(lse.isinf(), torch.inf, (lse.double() + minus_m.double() * unit) / math.log(2)))
    return statistics


def largest_score_unit(inputs: AttentionInputs) -> float:
    """Return the unit of m (kernels/softmax.py), in natural units: of scores; of Q K^T; of exponents."""
    if inputs.bias is not None or inputs.relative is not None or inputs.score_function is not None:
        return 1.0
    if (inputs.softcap is not None or inputs.alibi is not None) and inputs.q.dtype.itemsize > 2:
        return 1.0
    return abs(score_scale(inputs.scale)) or 1.0 if inputs.q.dtype.itemsize > 2 else math.log(2)


def score_scale(scale: float) -> float:
    """Return the scale as the kernels use it: one that is subnormal in float32 may be flushed to 0, and -inf * 0 is NaN."""
    return scale if abs(scale) >= 2.0**-126 else 0.0


def restore_shape(o, rows, q, k, v):
    """Remove the column and the head dimension that `with_equal_batches` added to q, k and v from o, and from `rows`, the lse
    and the statistics."""
    o = o if v.shape[-1] else o.narrow(-1, 0, 0)
    if max(q.dim(), k.dim(), v.dim()) > 2:
        return o, *rows
    # a statistic that was not asked for is an empty tensor
    return o.squeeze(-3), *(x.squeeze(-2) if x.dim() > 1 else x for x in rows)


def wanted_statistics(return_stats) -> tuple[bool, bool, bool]:
    """Check return_stats, names out of STATISTICS or None. Return whether row_max, entropy and key_mass are computed for it."""
    if return_stats is None:
        return False, False, False
    if not isinstance(return_stats, (tuple, list)) or not all(isinstance(name, str) for name in return_stats):
        raise TypeError(f"return_stats: expected a tuple of names or None, got {describe(return_stats)}")
    if unknown := [name for name in return_stats if name not in STATISTICS]:
        raise ValueError(f"return_stats: expected names among {', '.join(STATISTICS)}, got {unknown[0]!r}")
    return "max" in return_stats or "head_max" in return_stats, "entropy" in return_stats, "key_mass" in return_stats


def results(o, lse, computed, return_lse, return_stats):
    """Return what `attention` returns. `computed` are row_max, entropy and key_mass, those that were asked for."""
    if return_stats is None:
        return (o, lse) if return_lse else o
    row_max, entropy, key_mass = computed
    statistics = {"max": row_max, "entropy": entropy, "key_mass": key_mass}
    if "head_max" in return_stats:
        rows = row_max.movedim(-2, 0).flatten(1) if row_max.dim() > 1 else row_max
        # one more number, since amax of an empty row raises
        statistics["head_max"] = torch.nn.functional.pad(rows, (0, 1), value=-torch.inf).amax(-1)
    statistics = {name: statistics[name] for name in return_stats}
    return (o, lse, statistics) if return_lse else (o, statistics)


def as_torch_lays_out(o, query, key, value):
    """Return o in the query's order of dimensions where all inputs are 4-D, as torch's fused kernels do, else contiguous."""
    return o if query.dim() == key.dim() == value.dim() == 4 else o.contiguous()


def repeat_uneven_heads(query, key, value):
    """If key and value differ in head count, repeat both to the query's count, as torch's GQA allows."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise RuntimeError("enable_gqa: expected query, key and value with a head dimension, at least 3-D, "
                           f"got {query.dim()}-D, {key.dim()}-D and {value.dim()}-D")
    heads, key_heads, value_heads = (x.shape[-3] for x in (query, key, value))
    if key_heads != value_heads and key_heads and value_heads and heads % key_heads == heads % value_heads == 0:
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    return query, key, value


def broadcast_heads(query, key, value):
    """Broadcast the query's head dimension like a batch dimension: torch's rule without GQA."""
    if max(query.dim(), key.dim(), value.dim()) < 3:
        return query, key, value
    query, key, value = (x.unsqueeze(0) if x.dim() == 2 else x for x in (query, key, value))
    heads = query.shape[-3]
    for x in (key, value):
        if heads == 1:
            heads = x.shape[-3]
        elif x.shape[-3] not in (1, heads):
            raise RuntimeError(f"key and value: expected as many heads as query or one, {query.shape[-3]} or 1, got "
                               f"{key.shape[-3]} and {value.shape[-3]}; for grouped heads pass enable_gqa=True")
    # a single key head stays single: the kernels share it
    return query.expand(*query.shape[:-3], heads, *query.shape[-2:]), key, value


def cast_for_autocast(*tensors):
    """Cast floating-point tensors, but not float64, to the dtype of autocast, as torch does for its own attention."""
    device = tensors[0].device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def pairwise_argument(name, x, q, shape):
    """Return a bias or mask with as many dimensions as the scores, of this shape, each of their size or 1; None stays None."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {describe(x)}")
    dtypes = {"mask": (torch.bool,), "bias": (torch.float32, q.dtype), "attn_mask": (torch.bool, torch.float32, q.dtype)}[name]
    if torch.is_autocast_enabled(q.device.type) and x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(q.dtype)
    if x.layout != torch.strided or x.is_nested:
        raise RuntimeError(layout_message(name, x))
    if x.dtype not in dtypes:
        raise RuntimeError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
    if x.device != q.device:
        raise RuntimeError(f"{name}: expected {q.device}, where the queries are, got {x.device}")
    try:
        # not by comparing sizes, which may be symbols without a value while a program is exported
        x.expand(shape)
    except RuntimeError:
        torch_message = broadcast_message(shape, x.shape) + "\n" if name == "attn_mask" else ""
        raise RuntimeError(f"{torch_message}{name}: expected a shape that broadcasts to {tuple(shape)}, got "
                           f"{tuple(x.shape)}") from None
    return with_rank(x, len(shape))


def broadcast_message(shape, mask_shape):
    """Return torch's message, in eager mode, for a mask of `mask_shape` that does not broadcast to scores of `shape`."""
    sides = itertools.zip_longest(reversed(shape), reversed(mask_shape), fillvalue=1)
    wrong = [(len(shape) - 1 - i, a, b) for i, (a, b) in enumerate(sides) if b != a and 1 not in (a, b)]
    if wrong:
        dimension, a, b = wrong[0]
        return f"The size of tensor a ({a}) must match the size of tensor b ({b}) at non-singleton dimension {dimension}"
    extra = mask_shape[:max(0, len(mask_shape) - len(shape))]
    larger = [*extra, *reversed([max(pair) for pair in zip(reversed(shape), reversed(mask_shape))])]
    return f"output with shape {list(shape)} doesn't match the broadcast shape {larger}"


def with_rank(x, rank):
    """Add dimensions of size 1 in front. Indexing with None would fail for fake CUDA tensors on a machine without a GPU."""
    return x.reshape(*(1,) * (rank - x.dim()), *x.shape)


def mask_argument(mask, q, shape):
    """Return the mask as `pairwise_argument` does, and kv_blocks and q_blocks, which are None without a BlockMask."""
    if is_of_flex(mask):
        raise TypeError("mask: expected booleans or a block_mask, got a BlockMask of FlexAttention; convert it once, with "
                        "tritonattn.block_mask(mask)")
    if not isinstance(mask, BlockMask):
        return pairwise_argument("mask", mask, q, shape), None, None
    sizes = shape[-2:]
    if mask.shape[-2:] != sizes:
        raise RuntimeError(f"mask: expected a block mask of {sizes[0]} queries and {sizes[1]} keys, got one of shape "
                           f"{tuple(mask.shape)}; its last two dimensions do not broadcast")
    if not mask.is_current():
        maker, what = ("block_mask", "mask") if mask.function is None else ("create_block_mask", "payload")
        raise RuntimeError(f"mask: expected the {what} as it was when {maker}() read it, got one that was changed since; call "
                           f"{maker}() again")
    if mask.function is None:
        pairwise = pairwise_argument("mask", mask.mask, q, shape)
        return pairwise, *(with_rank(x, pairwise.dim()) for x in (mask.kv_blocks, mask.q_blocks))
    if mask.kv_blocks.device != q.device:
        raise RuntimeError(f"mask: expected {q.device}, where the queries are, got a block mask on {mask.kv_blocks.device}")
    *batch, heads = mask.shape[:-2]
    if heads not in (1, *shape[-3:-2]) or (tuple(batch) != tuple(shape[:-3]) and set(batch) - {1}):
        raise RuntimeError(f"mask: expected a mask function of shape {tuple(shape)}, with 1 in place of the heads or of all "
                           f"batches where it does not depend on them, got {mask.shape}")
    return None, *(with_rank(x, len(shape)) for x in (mask.kv_blocks, mask.q_blocks))


def sink_argument(sink, q, k, v):
    """Return the sink as a column of scores, [..., H, 1, 1] with as many dimensions as they have; None stays None."""
    if sink is None:
        return None
    check_of_heads("sink", sink, q)
    heads = q.shape[-3] if q.dim() > 2 else 1
    if sink.dim() not in (1, 2) or sink.shape[0] != heads or 0 in sink.shape[1:]:
        raise RuntimeError(f"sink: expected one score for each of {heads} heads, [{heads}], or several, [{heads}, n], got a "
                           f"tensor of shape {tuple(sink.shape)}")
    return sink_column(sink, len(batch_shape(q, k, v)) + 3)


def check_of_heads(name, x, q):
    """Raise TypeError or RuntimeError unless x is a dense floating-point tensor on the device of q."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {describe(x)}")
    if x.layout != torch.strided or x.is_nested:
        raise RuntimeError(layout_message(name, x))
    if x.dtype not in (*DTYPES, q.dtype):
        raise RuntimeError(f"{name}: expected {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.device != q.device:
        raise RuntimeError(f"{name}: expected {q.device}, where the queries are, got {x.device}")


def positions_arguments(alibi, relative, q, k, v):
    """Return the slopes as [..., H, 1, 1] and the table as [..., H, 1, 2 R + 1], with as many dimensions as the scores."""
    heads, rank = q.shape[-3] if q.dim() > 2 else 1, len(batch_shape(q, k, v)) + 3
    if alibi is not None:
        check_of_heads("alibi", alibi, q)
        if alibi.dim() != 1 or alibi.shape[0] != heads:
            raise RuntimeError(f"alibi: expected one slope for each of {heads} heads, [{heads}], got a tensor of shape "
                               f"{tuple(alibi.shape)}")
    if relative is not None:
        check_of_heads("relative", relative, q)
        if relative.dim() != 2 or relative.shape[0] != heads or relative.shape[1] % 2 == 0:
            raise RuntimeError(f"relative: expected a table with an entry for each of {heads} heads and each offset from -R to "
                               f"R, [{heads}, 2 R + 1], got a tensor of shape {tuple(relative.shape)}")
    return tuple(None if x is None else row_of_heads(x, rank) for x in (alibi, relative))


def row_of_heads(x, rank):
    """Return slopes [H] or a table [H, n] as [..., H, 1, n] of this rank."""
    return with_rank(x.view(-1, 1, 1) if x.dim() == 1 else x.unsqueeze(1), rank)


def function_argument(score_function, q, k) -> tuple[str | None, Tensor | None]:
    """Return the name and the payload of a ScoreFunction; None stays None."""
    if score_function is None:
        return None, None
    if not isinstance(score_function, ScoreFunction):
        raise TypeError(f"score_function: expected a tritonattn.ScoreFunction or None, got {describe(score_function)}")
    if score_function.derivative is None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError(f"score_function: {NO_DERIVATIVE}, got {score_function}")
    payload = score_function.payload
    check_payload_memory(payload, q.device)
    return score_function.name, payload


def check_payload_memory(payload: Tensor | None, device: torch.device) -> None:
    """Raise RuntimeError unless this is None, or a dense, contiguous tensor on this device that needs no gradient."""
    if payload is None:
        return
    if payload.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("payload: expected a tensor that requires no gradient, since it gets none (bias, alibi and relative "
                           "do), got one that does")
    if payload.layout != torch.strided or payload.is_nested:
        raise RuntimeError(layout_message("payload", payload))
    if payload.device != device:
        raise RuntimeError(f"payload: expected a tensor on {device}, where the function runs, got one on {payload.device}")
    if not payload.is_contiguous():
        raise RuntimeError(f"payload: expected a contiguous tensor, since the function gets no strides, got shape "
                           f"{tuple(payload.shape)} with strides {payload.stride()}")


def prepare_mask_function(function, shape, payload, device) -> tuple[str, torch.device]:
    """Check the arguments of `create_block_mask`. Return the name of the function and the device on which it runs."""
    check_function("function", function, OF_MASKS)
    check_payload(payload)
    if not isinstance(shape, (tuple, list)) or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"shape: expected sizes (..., heads, queries, keys), got {describe(shape)}")
    if len(shape) < 3:
        raise ValueError(f"shape: expected at least three sizes (..., heads, queries, keys), got {tuple(shape)}")
    device = device_of_function(payload, device)
    check_payload_memory(payload, device)
    return register(function), device


def device_of_function(payload: Tensor | None, device) -> torch.device:
    """Return the device on which to evaluate a function: this one; that of its payload; a GPU, in the interpreter the CPU.

    Raises RuntimeError if kernels do not run there.
    """
    if device is None:
        gpu = torch.cuda.is_available() and not INTERPRETED
        device = payload.device if payload is not None else "cuda" if gpu else "cpu"
    example = torch.empty(0, device=device)
    check_kernels_run_on(device=example)
    return example.device


def needing_positions(left, right, alibi, relative) -> str | None:
    """Return the argument that needs the positions of the queries among the keys, in words; None without one."""
    if left is not None or right is not None:
        return "a causal mask or window"
    return "alibi" if alibi is not None else "relative" if relative is not None else None


def sink_column(sink, rank):
    """Return a sink [H] or [H, n] as [..., H, 1, 1] of this rank. Several of one head become their log-sum-exp."""
    if sink.dim() == 2:
        sink = sink.to(torch.promote_types(sink.dtype, torch.float32)).logsumexp(-1)
    return with_rank(sink.reshape(-1, 1, 1), rank)


def lengths_argument(lengths, q, batch, n_k):
    """Return one int32 for each batch, contiguous, at most n_k; None stays None."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, Tensor) else describe(lengths)
        raise TypeError(f"key_lengths: expected a tensor of int32 or int64, got {got}")
    if lengths.device != q.device:
        raise RuntimeError(f"key_lengths: expected {q.device}, where the queries are, got {lengths.device}")
    try:
        lengths = lengths.expand(batch)
    except RuntimeError:
        shapes = f"{tuple(batch)}, got {tuple(lengths.shape)}"
        raise RuntimeError(f"key_lengths: expected a shape that broadcasts to {shapes}") from None
    # clamp before the cast: a length beyond 32 bits still means all keys
    return lengths.clamp(0, n_k).to(torch.int32).contiguous()


def torch_mask_argument(attn_mask, is_causal, query, key, value):
    """Return (bias, masks as in `mask_argument`, causal, bottom_right) for torch's attn_mask and is_causal."""
    if attn_mask is None:
        return None, NO_MASK, is_causal, False
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError("CausalBias should not be used with causal=True\nis_causal: expected False with a CausalBias, "
                             "got True")
        sizes = attn_mask.seq_len_q, attn_mask.seq_len_kv
        if sizes != (query.shape[-2], key.shape[-2]):
            raise RuntimeError(f"attn_mask: expected a CausalBias of {query.shape[-2]} queries and {key.shape[-2]} keys, "
                               f"got one of {sizes[0]} and {sizes[1]}")
        return None, NO_MASK, True, attn_mask.variant == CausalVariant.LOWER_RIGHT
    if is_causal:
        # some of torch's backends accept both
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True\n"
                           "attn_mask: expected None where is_causal=True, got a mask")
    pairwise = pairwise_argument("attn_mask", attn_mask, query, scores_shape(query, key, value))
    if pairwise.dtype == torch.bool:
        return None, (pairwise, None, None), False, False
    return pairwise, NO_MASK, False, False


def seed_argument(p, seed, device):
    """Return one int64 on the device where weights may be dropped, else None. A drawn seed comes from torch's generator:
    manual_seed, checkpointing, graphs and torch.compile treat it as any other random number."""
    if seed is None:
        return torch.randint(2**62, (1,), device=device) if p else None
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}" if isinstance(seed, Tensor) else describe(seed)
        raise RuntimeError(f"dropout_seed: expected one int64 on {device}, got {got}")
    # a copy: the caller may increment the original before the backward pass reads it
    return seed.reshape(1).clone() if p else None


def describe(value) -> str:
    """Return a value in a few words: a tensor's shape, or a short repr."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else reprlib.repr(value)


def layout_message(name, x) -> str:
    """Return the message for a sparse or nested tensor."""
    return f"{name}: expected a dense (strided) tensor, got {'a nested one' if x.is_nested else f'layout {x.layout}'}"


def check_tensors(**tensors):
    """Raise unless each is a dense tensor with at least two dimensions."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise RuntimeError(layout_message(name, x))
        if x.dim() < 2:
            raise RuntimeError(f"{name}: expected at least 2 dimensions, [..., length, size], got {x.dim()}")


def check_dtype_and_device(**tensors):
    """Raise RuntimeError unless all have one supported dtype and one device that runs kernels."""
    (first, q), *_ = tensors.items()
    for name, x in tensors.items():
        if x.dtype != q.dtype:
            raise RuntimeError(f"{name}: expected the dtype of {first}, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise RuntimeError(f"{name}: expected the device of {first}, {q.device}, got {x.device}")
    check_kernels_run_on(**{first: q})
    if q.dtype not in DTYPES and not (INTERPRETED and q.dtype == torch.float64):
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise RuntimeError(f"{first}: expected dtype {supported} (float64 in Triton's interpreter only), got {q.dtype}")


def check_kernels_run_on(**tensors):
    """Raise RuntimeError unless kernels run on the device of these tensors."""
    if not TRITON:
        raise RuntimeError("Triton is not installed: install it next to torch; on a machine without a GPU, "
                           "pip install 'tritonattn[cpu]'")
    for name, x in tensors.items():
        if x.device.type == "cpu" and not INTERPRETED:
            raise RuntimeError(f"{name}: expected a tensor on a GPU, got one on the CPU; to run the kernels there in Triton's "
                               "interpreter, set TRITON_INTERPRET=1 before Python starts")


def check_sizes(names, q, k, v):
    """Raise RuntimeError unless lengths, head sizes, head counts and batch dimensions of q, k and v fit."""
    q_name, k_name, v_name = names
    if k.shape[-1] != q.shape[-1]:
        raise RuntimeError(f"{k_name}: expected the head size of {q_name}, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise RuntimeError(f"{v_name}: expected the length of {k_name}, {k.shape[-2]}, got {v.shape[-2]}")
    for name, x in zip(names, (q, k, v)):
        if x.shape[-1] > 256 and x.shape[-1] > largest_head(x):
            raise RuntimeError(head_size_message(name, x))
    heads = [1 if x.dim() == 2 else x.shape[-3] for x in (q, k, v)]
    if heads[1] != heads[2] and 1 not in heads[1:]:
        raise RuntimeError(f"{v_name}: expected the head count of {k_name}, {heads[1]}, or 1, got {heads[2]}")
    for name, count in zip((k_name, v_name), heads[1:]):
        if heads[0] % count if count else heads[0]:
            raise RuntimeError(f"{name}: expected a head count dividing {heads[0]}, got {count}")
    try:
        batch_shape(q, k, v)
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape[:-3])) for x in (q, k, v))
        raise RuntimeError(f"{q_name}, {k_name}, {v_name}: expected batch dimensions that broadcast, got {shapes}") from None


def largest_head(x) -> int:
    """Return the largest head size that kernels take in this tensor's dtype on its device."""
    return gpu_of(x.device).largest_head(x.dtype) if x.device.type == "cuda" else LARGEST_HEAD


def head_size_message(name, x) -> str:
    """Return the limit of the head size, its cause and the remedy."""
    limit, dtype = largest_head(x), str(x.dtype).removeprefix("torch.")
    if limit == LARGEST_HEAD:
        why, fix = "in every dtype", "larger heads, such as 576 with values of 512 (MLA), are not supported yet"
    else:
        gpu = gpu_of(x.device)
        why = f"in {dtype} with the {gpu.shared_memory} bytes of shared memory of {gpu.name}"
        fix = f"float16 and bfloat16 take up to {LARGEST_HEAD}"
    return f"{name}: expected a head size of at most {limit} {why}, got {x.shape[-1]}; {fix}"


def check_scale(scale, d) -> float:
    """Return the scale, 1/sqrt(d) for None. Raises TypeError or ValueError."""
    if scale is None:
        return 1.0 / math.sqrt(d) if d else 1.0
    if not isinstance(scale, NUMBERS):
        raise TypeError(f"scale: expected a number or None, got {describe(scale)}; multiply q by a learned scale, so that it "
                        "gets a gradient")
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale: expected a finite number, at most {LARGEST_SCALE} in magnitude, got {str(scale)[:24]}")
    return scale if isinstance(scale, torch.SymFloat) else float(scale)


def check_softcap(softcap, scale) -> float | None:
    """Return the bound of the scores, or None. Raises TypeError or ValueError."""
    if softcap is None:
        return None
    if not isinstance(softcap, NUMBERS):
        raise TypeError(f"softcap: expected a number or None, got {describe(softcap)}")
    if not SMALLEST_SOFTCAP <= softcap <= LARGEST_SOFTCAP:
        raise ValueError(f"softcap: expected a number from {SMALLEST_SOFTCAP} to {LARGEST_SOFTCAP}, got {softcap}; None is no "
                         "cap (FlashAttention's 0.0)")
    if abs(scale) > LARGEST_SCALE * softcap:
        raise ValueError(f"softcap: expected at least {abs(scale) / LARGEST_SCALE:.1e} with scale {scale}, got {softcap}")
    return softcap if isinstance(softcap, torch.SymFloat) else float(softcap)


def check_normalizer(normalizer, sigmoid_bias, sink, return_stats) -> float | None:
    """Return the bias of a sigmoid, or None. Raises TypeError; ValueError for arguments that do not apply."""
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer: expected one of {', '.join(map(repr, NORMALIZERS))}, got {describe(normalizer)}")
    if normalizer != "softmax":
        if sink is not None:
            raise ValueError(f"sink: expected None with normalizer={normalizer!r}, since only a softmax depends on other keys, "
                             f"got {describe(sink)}")
        if return_stats is not None:
            raise ValueError(f"return_stats: expected None with normalizer={normalizer!r}, since only a softmax has them, got "
                             f"{describe(return_stats)}")
    if sigmoid_bias is None:
        return None
    if normalizer != "sigmoid":
        raise ValueError(f"sigmoid_bias: expected None with normalizer={normalizer!r}, got {describe(sigmoid_bias)}")
    if not isinstance(sigmoid_bias, NUMBERS):
        raise TypeError(f"sigmoid_bias: expected a number or None, got {describe(sigmoid_bias)}; pass a learned one as `bias`, "
                        "and a sigmoid_bias of 0")
    if not -LARGEST_SCALE <= sigmoid_bias <= LARGEST_SCALE:
        raise ValueError(f"sigmoid_bias: expected a finite number, at most {LARGEST_SCALE} in magnitude, got {sigmoid_bias}")
    return sigmoid_bias if isinstance(sigmoid_bias, torch.SymFloat) else float(sigmoid_bias)


def check_return_lse(normalizer, return_lse):
    """Raise ValueError where there is no log-sum-exp."""
    if return_lse and normalizer in NORMALIZERS[1:]:
        raise ValueError(f"return_lse: expected False with normalizer={normalizer!r}, since only a softmax has a log-sum-exp, "
                         f"got {describe(return_lse)}")


def check_probability(p) -> float:
    """Return the probability of dropout. Raises TypeError, or ValueError outside [0, 1]."""
    if not isinstance(p, NUMBERS):
        raise TypeError(f"dropout_p: expected a number, got {describe(p)}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected a probability, between 0 and 1, got {p}")
    return p if isinstance(p, torch.SymFloat) else float(p)


def check_window(causal, window):
    """Return the sides (left, right), None where unbounded. Raises TypeError or ValueError."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected True or False, got {describe(causal)}")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {describe(window)}")
    left, right = window
    left = left if left is None else check_side("left", left)
    right = right if right is None else check_side("right", right)
    return left, 0 if causal else right


def integer(value):
    """Return any kind of integer, but no bool, as an int or a symbol. Raises TypeError for other values."""
    if isinstance(value, bool):
        raise TypeError
    return value if isinstance(value, (int, SymInt)) else operator.index(value)


def check_side(name, side):
    """Return one side of a window as an integer."""
    try:
        if isinstance(side, Tensor) and (side.dim() or side.dtype == torch.bool):
            raise TypeError
        side = integer(side)
    except TypeError:
        raise TypeError(f"window: expected {name} to be an integer or None, got {describe(side)}") from None
    if side < 0:
        raise ValueError(f"window: expected {name} to be at least 0, got {side}; None is unbounded (FlashAttention's -1)")
    return side


def check_align(align, n_q, n_k, positional, key_lengths) -> bool:
    """Return whether the last query is aligned with the last key. Raises ValueError where `align` must be given.

    positional: what `needing_positions` returns.
    """
    if align not in (None, "top_left", "bottom_right"):
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', got {align!r}")
    if align is None and positional and key_lengths is not None:
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', since {positional} with key_lengths can be aligned "
                         "both ways, got None")
    if align is None and positional and n_q != n_k:
        raise ValueError(f"align: expected 'top_left' or 'bottom_right', since {n_q} queries and {n_k} keys can be aligned "
                         "both ways, got None")
    return align == "bottom_right"
