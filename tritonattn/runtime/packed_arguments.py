"""The argument checks of packed sequences. What they have in common with other calls is in arguments.py."""

import itertools

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..problem import Problem
from .arguments import (
    AttentionInputs,
    cast_for_autocast,
    check_align,
    check_dtype_and_device,
    check_normalizer,
    check_probability,
    check_return_lse,
    check_scale,
    check_sizes,
    check_softcap,
    check_tensors,
    check_window,
    describe,
    function_argument,
    integer,
    layout_message,
    lengths_argument,
    needing_positions,
    pairwise_argument,
    positions_arguments,
    prepare,
    seed_argument,
    sink_argument,
    wanted_statistics,
    with_equal_batches,
)

INTEGERS = torch.int32, torch.int64
MOST_ROWS = 2**30 - 2  # of all sequences: kernels/packed.py encodes the number in 32 bits


def one_batch(x, name):
    """Return the rows of all sequences, [total, heads, size], as [1, heads, total, size], a view."""
    if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_nested):
        raise RuntimeError(layout_message(name, x))
    if not isinstance(x, Tensor) or x.dim() != 3:
        raise RuntimeError(f"{name}: expected the rows of all sequences, [total, heads, size], got {describe(x)}")
    return x.unsqueeze(0).transpose(1, 2)


def prepare_packed(q, k, v, starts, longest, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None,
                   key_lengths=None, softcap=None, sink=None, alibi=None, relative=None, score_function=None,
                   normalizer="softmax", sigmoid_bias=None, dropout_p=0.0, dropout_seed=None,
                   return_stats=None) -> AttentionInputs:
    """Check the arguments of `attention_varlen` and return them as the kernels take them.

    q, k and v are those of `one_batch`; starts and longest hold the cu_seqlens and max_seqlen of queries and of keys.
    """
    check_tensors(q=q, k=k, v=v)
    q, k, v = cast_for_autocast(q, k, v)
    check_dtype_and_device(q=q, k=k, v=v)
    check_sizes(("q", "k", "v"), q, k, v)
    totals, shared = (q.shape[-2], k.shape[-2]), are_same(*starts)
    longest_q, longest_k = (longest_argument(f"max_seqlen_{x}", n, total) for x, n, total in zip("qk", longest, totals))
    q_starts = starts_argument("cu_seqlens_q", starts[0], q.device)
    k_starts = q_starts if shared else starts_argument("cu_seqlens_k", starts[1], q.device)
    if q_starts.shape != k_starts.shape:
        raise RuntimeError(f"cu_seqlens_k: expected as many numbers as in cu_seqlens_q, {len(q_starts)}, got {len(k_starts)}")
    batch = (q_starts.shape[0] - 1,)
    if isinstance(mask, BlockMask):
        raise RuntimeError("mask: expected booleans, since a block_mask does not combine with packed sequences (cu_seqlens_q), "
                           "got a block_mask")
    shape = (*batch, q.shape[-3], longest_q, longest_k)
    bias, mask = pairwise_argument("bias", bias, q, shape), pairwise_argument("mask", mask, q, shape)
    scale = check_scale(scale, q.shape[-1])
    softcap = check_softcap(softcap, scale)
    left, right = check_window(causal, window)
    positional = needing_positions(left, right, alibi, relative)
    if align is None and positional and not shared:
        raise ValueError("align: expected 'top_left' or 'bottom_right', since cu_seqlens_q and cu_seqlens_k are two tensors, "
                         "and sequences of different lengths can be aligned both ways, got None")
    bottom_right = check_align(align, 0, 0, positional, key_lengths)
    key_lengths = lengths_argument(key_lengths, q, batch, longest_k)
    sigmoid_bias = check_normalizer(normalizer, sigmoid_bias, sink, return_stats)
    dropout_p = check_probability(dropout_p)
    seed = seed_argument(dropout_p, dropout_seed, q.device)
    of_heads = sink_argument(sink, q, k, v), *positions_arguments(alibi, relative, q, k, v)
    function, payload = function_argument(score_function, q, k)
    q, k, v, _, scale = with_equal_batches(q, k, v, None, (), scale)
    return AttentionInputs(q, k, v, bias, *of_heads, mask, None, None, q_starts, k_starts, payload, None, seed, key_lengths,
                           scale, left, right, bottom_right, dropout_p, softcap, longest_q, longest_k,
                           *wanted_statistics(return_stats), normalizer, sigmoid_bias, function)


def longest_argument(name, n, total) -> int:
    """Return the most rows of one sequence; `total`, which is never too few, for None."""
    if total > MOST_ROWS:
        raise RuntimeError(f"{name}: expected at most {MOST_ROWS} rows in all sequences, got {total}")
    if n is None:
        return total
    try:
        if isinstance(n, Tensor):
            # reading it would wait for the device
            raise TypeError
        n = integer(n)
    except TypeError:
        raise TypeError(f"{name}: expected an integer or None, got {describe(n)}") from None
    if n < 0:
        raise ValueError(f"{name}: expected at least 0, got {n}")
    return n


def starts_argument(name, starts, device) -> Tensor:
    """Return the first rows of the sequences and the end of the last as contiguous int32."""
    if not isinstance(starts, Tensor) or starts.dtype not in INTEGERS:
        got = starts.dtype if isinstance(starts, Tensor) else describe(starts)
        raise TypeError(f"{name}: expected a tensor of int32 or int64, got {got}")
    if starts.dim() != 1 or starts.shape[0] < 2:
        raise RuntimeError(f"{name}: expected the first row of each sequence and the end of the last one, [sequences + 1], got "
                           f"shape {tuple(starts.shape)}")
    if starts.device != device:
        raise RuntimeError(f"{name}: expected {device}, where the queries are, got {starts.device}")
    # clamp before the cast: a number beyond 32 bits must not become a small one
    starts = starts if starts.dtype == torch.int32 else starts.clamp(0, MOST_ROWS).to(torch.int32)
    return starts.contiguous()


def are_same(first, second) -> bool:
    """Return whether two tensors surely hold the same numbers: they are one, or they lie at one address."""
    if first is second:
        return True
    if not (_is_readable(first) and _is_readable(second)):
        return False
    layouts = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (first, second)]
    return layouts[0] == layouts[1] and layouts[0][0] != 0


def _is_readable(x):
    """Return whether x is a tensor whose address and, on the CPU, values can be read."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def check_starts(starts, rows, longest):
    """Raise RuntimeError unless the sequences lie one after the other in the rows of q and k. On a GPU, check nothing.

    starts and longest are those of `prepare_packed`, rows are the numbers of rows.
    """
    for name, given, total, most in zip("qk", starts, rows, longest):
        if not _is_readable(given) or given.device.type != "cpu" or given.dtype not in INTEGERS or given.dim() != 1:
            continue
        values = given.tolist()
        if len(values) > 1 and (values[0] != 0 or values != sorted(values) or values[-1] > total):
            raise RuntimeError(f"cu_seqlens_{name}: expected numbers that begin with 0, do not fall, and end with at most "
                               f"{total}, the number of rows, got {describe(values)}")
        length = max((stop - start for start, stop in itertools.pairwise(values)), default=0)
        if type(most) is int and 0 <= most < length:
            raise RuntimeError(f"max_seqlen_{name}: expected at least {length}, the longest of cu_seqlens_{name}, got {most}")


def problem_of(q, k, v, *, return_lse=False, precise_grad=True, **options) -> Problem:
    """Return the Problem of `attention` with these arguments, or with cu_seqlens of `attention_varlen`.

    Launches nothing and draws no random number.
    """
    check_tensors(q=q, k=k, v=v)
    check_return_lse(options.get("normalizer", "softmax"), return_lse)
    if options.get("dropout_p") and options.get("dropout_seed") is None:
        options["dropout_seed"] = torch.zeros(1, dtype=torch.int64, device=q.device)
    if not is_packed(options):
        return prepare(q, k, v, **options).problem
    starts, longest = ([options.pop(f"{name}_{x}", None) for x in "qk"] for name in ("cu_seqlens", "max_seqlen"))
    check_starts(starts, (len(q), len(k)), longest)
    rows = (one_batch(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    return prepare_packed(*rows, starts, longest, **options).problem


def is_packed(options: dict) -> bool:
    """Return whether these are options of `attention_varlen`."""
    return any(f"{name}_{x}" in options for name in ("cu_seqlens", "max_seqlen") for x in "qk")
