"""The functions that a program calls: signatures and contracts. Every check of their arguments is in runtime/arguments.py."""

import torch

from .block_mask import BlockMask, sorted_blocks
from .runtime import arguments, custom_op, eager, packed_arguments


def attention(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None,
              key_lengths=None, softcap=None, sink=None, alibi=None, relative=None, score_function=None, normalizer="softmax",
              sigmoid_bias=None, dropout_p=0.0, dropout_seed=None, return_lse=False, return_stats=None, precise_grad=True):
    """Compute O = softmax(scale Q K^T + bias) V over the keys that each query attends to, exactly, in O(L) memory.

    With `normalizer`, sigmoid or ReLU attention.

    Args:
        q: queries, [..., H, L, D] (or [L, D]).
        k: keys, [..., Hk, S, D] (or [S, D]); Hk divides H, and query head h uses key head h // (H / Hk).
        v: values, [..., Hk, S, DV]. The leading dimensions broadcast. One dtype: float16, bfloat16 or float32
            (float64 too in Triton's interpreter), any strides.
        scale: factor of QK^T, any finite number; 1/sqrt(D) if None.
        causal: a query attends to no later key. The same as window=(None, 0).
        window: (left, right), how many keys before and after its own position a query attends to; None is unbounded.
        align: required where a side is bounded, or alibi or relative is given, unless L equals S and there are no key_lengths.
            "top_left" puts the first query at the first key (torch's is_causal), "bottom_right" the last query at the last key
            (FlashAttention's causal).

                causal, L=2, S=4      top_left  1 0 0 0     bottom_right  1 1 1 0
                                                1 1 0 0                   1 1 1 1

        bias: added to the scores, of any shape that broadcasts to [..., H, L, S], in q's dtype or float32. -inf masks a
            (query, key) pair. The kernels read it through its own strides. Its gradient has its own shape and takes no
            more memory: the kernel sums over broadcast dimensions, in a fixed order. (With another normalizer than softmax,
            that of a bias which is the same for all keys takes memory for one number of each query and head.) A bias enlarged
            by `expand` gets a gradient of the enlarged size, so pass it unexpanded.
        mask: booleans of any shape that broadcasts to [..., H, L, S]; False masks a pair. Or a `block_mask` of them, or of a
            function (`create_block_mask`): its empty blocks are skipped and its full blocks read no mask. A window in addition
            to a block mask masks pairs but skips no block: combine it into the mask instead.
        key_lengths: number of keys of each sequence: int32 or int64, broadcasting to the leading dimensions without H. The
            keys from that number to S are padding; their values do not matter. "bottom_right" then aligns to the last key
            of each sequence.
        dropout_p: each weight is dropped with this probability and the others are multiplied by 1 / (1 - dropout_p). As in
            torch's function, this applies to every call: there is no training mode. Which weights are dropped depends only
            on the seed and the pair's position, never on block sizes.
        dropout_seed: int64 tensor of one element on q's device; drawn from torch's generator if None. See `dropout_mask`.
        return_lse: also return the log-sum-exp of each row's scores.
        return_stats: names of statistics of the weights p of the keys, before dropout; NaN where p is. A sink takes its share:
            with one, the p of a row sum to less than 1.
            "max"       [..., H, L]  the largest score of each row, after scale, softcap and biases; -inf without keys. It has
                                     no gradient.
            "head_max"  [H]          the largest of these in all batches, as QK-Clip uses it (Kimi Team, 2025, arXiv 2507.20534)
            "entropy"   [..., H, L]  -sum p ln p over the keys of each row (Shannon, 1948); 0 without keys
            "key_mass"  [..., H, S]  the sum of p over the rows, for each key; takes one more product QK^T
        precise_grad: where a gradient is needed, keep the rounding error of a 16-bit output, so that dQ is exact to
            rounding also for data with a common mean. Costs one more tensor of the output's size. The output has the same
            bits with and without it, and with and without gradients.
        softcap: a number c from 0.001 to 500: scores become c tanh(scale QK^T / c), before bias and masks (Gemma Team, 2024,
            arXiv 2408.00118).
        sink: one score for each head, [H], or several, [H, n], in any dtype that q may have. They take part in the softmax as
            further keys with values of 0 (OpenAI, 2025, arXiv 2508.10925) and count in lse; scale, softcap and masks do not
            apply to them. The gradient has the shape of the sink and is summed in a fixed order.
        alibi: a slope for each head, [H], finite, in any dtype that q may have: slope |key position - query position| is
            subtracted from the scores, after the softcap (Press et al., 2022, arXiv 2108.12409). See `alibi_slopes`.
        relative: a table of biases for each head, [H, 2 R + 1], in any dtype that q may have: entry R + d is added to the
            scores of the keys d positions after the query, the first or last entry to those farther away. -inf masks a pair.
            With R of at least L and S no pair is farther away. `t5_table` makes T5's. The gradients of alibi and relative have
            their shapes, are summed in a fixed order and take memory for a few times [..., H, L + S] numbers.
        score_function: a `ScoreFunction`: a function of your own of each score and its place, applied after the softcap, before
            biases and masks. Its payload gets no gradient.
        normalizer: how weights follow from the scores s, after softcap, biases and masks: "softmax", or for each key by itself
            "sigmoid"   1 / (1 + e^-(s + sigmoid_bias))   (Ramapuram et al., 2024, arXiv 2409.04431)
            "relu"      max(s, 0) / n                     (Wortsman et al., 2023, arXiv 2309.08586), in float16 for s < 2^20
            where n is the number of keys: S, or that of key_lengths, whether or not a query attends to all of them. These two
            have no lse, sinks or statistics, and precise_grad has no effect on them.
        sigmoid_bias: any finite number; -ln n if None. A learned one is a `bias`, for instance [H, 1, 1], with sigmoid_bias=0.

    Returns:
        o [..., H, L, DV] in q's dtype and order of dimensions; with return_lse also lse [..., H, L], natural logarithm,
        float32; with return_stats also a dictionary, from the names to tensors in float32. o, lse, entropy and key_mass have
        first derivatives. A row that attends to no key gives o = 0, lse = -inf (that of the sinks, if there are any) and zero
        gradients for q, k, v and biases. Masked keys and values do not affect a row, not even by a NaN. The same call gives the
        same bits, on sm_100 from Triton 3.7.1 on.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit. ValueError: a value out of its range.
        TypeError: an argument of the wrong type.

    Source: Dao et al., 2022 (arXiv 2205.14135); running softmax, Milakov and Gimelshein, 2018 (arXiv 1805.02867).
    """
    wanted = arguments.wanted_statistics(return_stats)
    arguments.check_return_lse(normalizer, return_lse)
    tensors, functions = eager.call_tensors((q, k, v), bias, (sink, alibi, relative), mask, (None, None), score_function,
                                            dropout_seed, key_lengths)
    sides = window if type(window) is tuple else (window,)
    key = eager.call_key(tensors, ("attention", scale, causal, align, softcap, normalizer, sigmoid_bias, dropout_p,
                                   precise_grad, *wanted, *sides, *functions))
    outputs = eager.repeat(key, tensors)
    if outputs is None:
        inputs = arguments.prepare(q, k, v, scale=scale, causal=causal, window=window, align=align, bias=bias, mask=mask,
                                   key_lengths=key_lengths, softcap=softcap, sink=sink, alibi=alibi, relative=relative,
                                   score_function=score_function, normalizer=normalizer, sigmoid_bias=sigmoid_bias,
                                   dropout_p=dropout_p, dropout_seed=dropout_seed, return_stats=return_stats)
        outputs = eager.first_call(key, tensors, inputs, bool(precise_grad))
    o, lse, *computed = outputs
    return arguments.results(o, lse, computed, return_lse, return_stats)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, scale=None, causal=False,
                     window=(None, None), align=None, bias=None, mask=None, key_lengths=None, softcap=None, sink=None,
                     alibi=None, relative=None, score_function=None, normalizer="softmax", sigmoid_bias=None, dropout_p=0.0,
                     dropout_seed=None, return_lse=False, return_stats=None, precise_grad=True):
    """Compute `attention` of each of several sequences that lie one after the other in memory, without padding.

    Args:
        q: queries of all sequences, [total queries, H, D].
        k, v: keys and values of all sequences, [total keys, Hk, D] and [total keys, Hk, DV].
        cu_seqlens_q: the first query of each sequence and the end of the last one, [sequences + 1], int32 (or int64, which
            every call copies). Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] - 1; it may be empty. Queries
            after the last sequence attend to no key.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence. They choose the block sizes and are the size
            of bias and mask; None, the number of all queries or keys, may choose slower ones.
        window, causal, align: positions are counted within each sequence. A causal mask or a window needs `align`, unless the
            two cu_seqlens are the same tensor. flash_attn_varlen_func's causal is align="bottom_right".
        bias, mask: broadcast to [sequences, H, max_seqlen_q, max_seqlen_k], indexed by the positions in a sequence. No
            `block_mask`. The gradient of a bias that is the same for all keys takes memory for [sequences, H, max_seqlen_q].
        key_lengths: [sequences], if not all keys of a sequence take part: the others, at its end, are padding.
        dropout_seed: as in `attention`; `dropout_mask` with the shape (sequences, H, max_seqlen_q, max_seqlen_k) tells which
            weights are dropped.
        alibi, relative: by positions within each sequence. Like a window, they need `align` unless the two cu_seqlens are the
            same tensor.
        score_function: its `batch` is the index of the sequence, `query` and `key` count within it.
        normalizer, sigmoid_bias: n is the number of keys of each sequence.
        scale, softcap, sink, dropout_p, return_lse, return_stats, precise_grad: see `attention`.

    Returns:
        o [total queries, H, DV]; with return_lse also lse [H, total queries], float32, with first derivatives as o has; with
        return_stats also the dictionary of `attention`: max and entropy [H, total queries], head_max [H] of all sequences,
        key_mass [H, total keys], 0 after the last sequence. Nothing is copied from the device to the host. The result of a
        sequence has the same bits wherever it lies, for equal block sizes.

    Raises:
        The errors of `attention`. On the CPU also RuntimeError where cu_seqlens fall or exceed the tensors, or a sequence is
        longer than max_seqlen. On a GPU, that would need a copy to the host: the results are then undefined, but nothing
        outside of the tensors is read or written.

    Source: cu_seqlens as in FlashAttention-2 (Dao, 2023, arXiv 2307.08691).
    """
    q, k, v = (packed_arguments.one_batch(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    packed_arguments.check_starts(starts, (q.shape[-2], k.shape[-2]), longest)
    tensors, functions = eager.call_tensors((q, k, v), bias, (sink, alibi, relative), mask, starts, score_function,
                                            dropout_seed, key_lengths)
    sides = window if type(window) is tuple else (window,)
    wanted = arguments.wanted_statistics(return_stats)
    arguments.check_return_lse(normalizer, return_lse)
    key = eager.call_key(tensors, ("varlen", scale, causal, align, softcap, normalizer, sigmoid_bias, dropout_p, precise_grad,
                                   *wanted, packed_arguments.are_same(*starts), *longest, *sides, *functions))
    outputs = eager.repeat(key, tensors)
    if outputs is None:
        inputs = packed_arguments.prepare_packed(
            q, k, v, starts, longest, scale=scale, causal=causal, window=window, align=align, bias=bias, mask=mask,
            key_lengths=key_lengths, softcap=softcap, sink=sink, alibi=alibi, relative=relative, score_function=score_function,
            normalizer=normalizer, sigmoid_bias=sigmoid_bias, dropout_p=dropout_p, dropout_seed=dropout_seed,
            return_stats=return_stats)
        outputs = eager.first_call(key, tensors, inputs, bool(precise_grad))
    o, *rows = outputs
    lse, *computed = (x if x is None or x.dim() < 3 else x.squeeze(0) for x in rows)
    return arguments.results(o.transpose(1, 2).squeeze(0), lse, computed, return_lse, return_stats)


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
                                 enable_gqa=False):
    """Compute attention with the signature and contract of torch.nn.functional.scaled_dot_product_attention.

    Shapes: query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev] -> [..., Hq, L, Ev]. attn_mask broadcasts to
    [..., Hq, L, S]: booleans (True takes part), numbers to be added, or a CausalBias of torch.nn.attention.bias.
    `is_causal` is aligned top-left. Deliberate differences from torch: values of another length than the keys and a scale
    that is not finite raise, and a NaN in a masked key or value does not leak. Under autocast a float32 attn_mask keeps its
    dtype. Errors have torch's types and begin with torch's messages. See `attention` for gradients, errors and source.
    """
    tensors = eager.sdpa_tensors(query, key, value, attn_mask)
    call_key = eager.call_key(tensors, ("sdpa", dropout_p, is_causal, scale, enable_gqa))  # `key` holds the keys
    outputs = eager.repeat(call_key, tensors)
    if outputs is None:
        try:
            inputs = arguments.prepare_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        except Exception as error:
            options = {"scale": scale, "enable_gqa": enable_gqa}
            raise arguments.as_torch_error(error, (query, key, value, attn_mask, dropout_p, is_causal), options) from None
        outputs = eager.first_call(call_key, tensors, inputs, precise_grad=True)
    return arguments.as_torch_lays_out(outputs[0], query, key, value)


def warm(q, k, v, *, backward=True, **options) -> None:
    """Compile and load the kernels of `attention(q, k, v, **options)` now, so that the first call does not wait for them.

    Runs the call once, and with `backward` its backward pass where a tensor requires a gradient. With cu_seqlens_q and the
    other arguments of `attention_varlen`, it calls that function. No gradient is accumulated and no random number drawn.
    Shapes, strides, dtypes, alignment, options, grad mode, and which tensors require a gradient must be those of the later
    calls; the data does not matter, nor do the numbers of packed rows and sequences. The backward pass differentiates all
    results of the call that have a gradient; to differentiate fewer of them takes other kernels. A kernel is compiled for
    whether each length is 1, a multiple of 16, or a multiple of the block size: warm one length of each kind that will occur.

    Raises the errors of `attention`.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in (q, k, v)]
    for name in ("bias", "sink", "alibi", "relative"):
        if isinstance(given := options.get(name), torch.Tensor):
            options[name] = given.detach().requires_grad_(given.requires_grad)
            leaves.append(options[name])
    if options.get("dropout_p") and options.get("dropout_seed") is None:
        options["dropout_seed"] = torch.zeros(1, dtype=torch.int64, device=q.device)
    outputs = (attention_varlen if packed_arguments.is_packed(options) else attention)(*leaves[:3], **options)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if options.get("return_stats") is not None:
        statistics = outputs.pop()
        outputs.extend(statistics.values())
    outputs, inputs = ([x for x in each if x.requires_grad] for each in (outputs, leaves))
    if backward and outputs:
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs])


def attention_map(q, k, *, tile=64, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None,
                  key_lengths=None, softcap=None, sink=None, alibi=None, relative=None, score_function=None):
    """Compute how much the queries of each tile attend to the keys of each tile, without forming the weights.

    Args:
        q: queries, [..., H, L, D] (or [L, D]).
        k: keys, [..., Hk, S, D] (or [S, D]).
        tile: queries and keys per entry, a power of two of at least 16.
        Others as in `attention`. There is no dropout.

    Returns:
        [..., H, ceil(L / tile), ceil(S / tile)], float32, without a gradient. The entry of a tile of queries and a tile of keys
        is the mean over these queries of the sum of their weights for these keys. A row sums to 1 if all its queries attend to
        keys and there is no sink. Takes two products QK^T, and memory for the sums over tiles of at most 64 x 64 pairs (32 x 32
        where a query has more than 256 bytes, 16 x 16 where more than 512); larger tiles are sums of these. Under torch.vmap it
        loops over the mapped dimension.

    Raises the errors of `attention`; ValueError or TypeError for another tile.
    """
    arguments.check_tensors(q=q, k=k)
    with torch.no_grad():
        # one column of values: the forward pass computes the statistics of the weights
        inputs = arguments.prepare(q, k, k[..., :1], scale=scale, causal=causal, window=window, align=align, bias=bias,
                                   mask=mask, key_lengths=key_lengths, softcap=softcap, sink=sink, alibi=alibi,
                                   relative=relative, score_function=score_function)
        block, blocks = arguments.prepare_map(tile, inputs.q.dtype.itemsize * inputs.q.shape[-1])
        statistics = custom_op.forward_op(*inputs, False)[2]
        sums = custom_op.map_op(*inputs, statistics, block)
        # one tile may be much larger than the lengths
        blocks = min(blocks, max(1, *sums.shape[-2:]))
        tile = block * blocks
        if blocks > 1:
            rows, cols = (-size % blocks for size in sums.shape[-2:])
            sums = torch.nn.functional.pad(sums, (0, cols, 0, rows)).unflatten(-1, (-1, blocks)).sum(-1)
            sums = sums.unflatten(-2, (-1, blocks)).sum(-2)
        queries = (q.shape[-2] - tile * torch.arange(sums.shape[-2], device=q.device)).clamp(max=tile)
        sums /= queries[:, None]
    return sums.squeeze(-3) if max(q.dim(), k.dim()) == 2 else sums


def create_block_mask(function, shape, *, payload=None, device=None) -> BlockMask:
    """Make a `block_mask` of a mask function, without a tensor of the size of the scores.

    The function is evaluated once for every pair, to sort the blocks of 128 x 128 pairs; `attention` then skips the empty
    ones, and evaluates the function in those that are neither empty nor full. Takes memory for 128 rows of the mask, a byte for
    each pair, and eight bytes for each block.

    Args:
        function: a `triton.jit` function (batch, head, query, key, payload) -> booleans, True takes part. As in a
            `ScoreFunction`, its parameters are numbers, indices that broadcast, and the address of the payload or None.
        shape: of the mask, [..., H, L, S]; 1 in place of H, or of all batch dimensions, for a mask that is the same for all:
            the function then gets 0. Several batch dimensions count as one.
        payload: a contiguous tensor. After a change of it, make a new mask.
        device: that of the payload if None; without one a GPU, in Triton's interpreter the CPU.

    Call it outside of compiled code; the mask can be used inside.

    Example, for documents that lie one after the other in each sequence:

        @triton.jit
        def same_document(batch, head, query, key, payload):
            return tl.load(payload + query) == tl.load(payload + key)

        mask = tritonattn.create_block_mask(same_document, (1, 1, 65536, 65536), payload=document_of_each_token)

    Raises:
        TypeError, ValueError: as `ScoreFunction`; or the shape has fewer than three sizes. RuntimeError: the payload is not
        contiguous, lies on another device or requires a gradient, or kernels do not run on the device.

    Source: the mask_mod of FlexAttention (Dong et al., 2024, arXiv 2412.05496).
    """
    name, device = arguments.prepare_mask_function(function, shape, payload, device)
    lists = sorted_blocks(custom_op.mask_strips(name, payload, shape, device), shape, device)
    return BlockMask(payload, *lists, function=(name, *shape[-2:]))


def dropout_mask(shape, dropout_p, dropout_seed):
    """Return booleans of `shape` (batch, H, L, S): True where `attention` keeps a weight with this seed.

    Several batch dimensions count as one. The result equals what every kernel draws, bit for bit (Philox, seven rounds;
    kernels/dropout.py has the counter). Takes one byte per weight.

    Raises:
        ValueError: `shape` does not have four sizes, or dropout_p is outside [0, 1]. TypeError: dropout_p is not a number.
        RuntimeError: dropout_seed is not an int64 tensor of one element, or kernels cannot run on its device.
    """
    dropout_p, seed = arguments.prepare_dropout(shape, dropout_p, dropout_seed)
    if dropout_p in (0, 1):
        return torch.full(shape, dropout_p == 0, dtype=torch.bool, device=seed.device)
    return custom_op.keep_op(list(shape), dropout_p, seed)
