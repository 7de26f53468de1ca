"""The definition of attention in plain PyTorch. Every kernel is tested against it.

    S = scale Q K^T + bias          P = softmax of S over the keys that a query attends to          O = P V

With a softcap c, S = c tanh(scale Q K^T / c) + bias, with a score function f, S = f(scale Q K^T) + bias. ALiBi and a table of
relative positions are biases that depend on key position - query position. A sink is the score of one more key, whose value is
0. The other normalizers are

    sigmoid    P = 1 / (1 + e^-(S + b)), with b = -ln n unless given            relu    P = max(S, 0) / n

for the n keys of a sequence, masked or not, and P = 0 where a query does not attend to a key.
"""

import itertools
import math

import torch


def attention(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, bias=None, mask=None, key_lengths=None,
              softcap=None, sink=None, alibi=None, relative=None, score_function=None, normalizer="softmax", sigmoid_bias=None,
              keep=None, dropout_p=0.0, return_lse=False, return_stats=None):
    """Compute attention as `tritonattn.attention` defines it, by forming every score. Any floating dtype, any device.

    Shapes: q [..., H, L, D], k [..., Hk, S, D], v [..., Hk, S, DV] with Hk dividing H; the output is [..., H, L, DV],
    the log-sum-exp (natural) [..., H, L]; bias (added to the scores) and mask (booleans, False masks a pair) broadcast to
    [..., H, L, S]; key_lengths has the batch's shape; sink is [H], or [H, n] for n sinks of each head; alibi is [H], relative
    [H, 2 R + 1]. score_function is a function of torch tensors, (score, batch, head, query, key) -> score; the last four are
    integers that broadcast to the scores. normalizer is "softmax", "sigmoid" or "relu", the last two without sinks, log-sum-exp
    and statistics; sigmoid_bias is a number. With dropout_p, `keep` [..., H, L, S] (see `tritonattn.dropout_mask`) is True for
    the weights to keep. return_stats adds a dictionary, as there. Takes O(L S) memory. Inputs are not checked; they must be
    finite, but for -inf in bias, table and sinks.
    """
    group = q.shape[-3] // k.shape[-3]
    if group > 1:
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    inside = visible(q.shape[-2], k.shape[-2], causal=causal, window=window, align=align, key_lengths=key_lengths,
                     device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q @ k.mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s if score_function is None else score_function(s, *indices(s.shape, device=q.device))
    if alibi is not None or relative is not None:
        offset = offsets(q.shape[-2], k.shape[-2], align=align, key_lengths=key_lengths, device=q.device)
        s = s if alibi is None else s - alibi.to(s.dtype)[:, None, None] * offset.abs().to(s.dtype)
        if relative is not None:
            radius = relative.shape[-1] // 2
            index = offset.clamp(-radius, radius) + radius
            # [..., 1, L, S] for the entries of every head
            index = index if index.dim() > 2 else index[None]
            s = s + relative.to(s.dtype)[:, index].movedim(0, -4).squeeze(-3)
    s = s if bias is None else s + bias
    s = of_keys = s.masked_fill(~(inside if mask is None else inside & mask), -torch.inf)
    if sink is not None:
        n_sinks = sink.numel() // len(sink)
        s = torch.cat((s, sink.to(s.dtype).view(-1, 1, n_sinks).expand(*s.shape[:-1], n_sinks)), -1)
    # a fully masked row has no softmax: its output is 0 and its log-sum-exp -inf
    masked_rows = (s == -torch.inf).all(-1, keepdim=True)
    if normalizer == "softmax":
        s = s.masked_fill(masked_rows, 0.0)
        p = s.softmax(-1).masked_fill(masked_rows, 0.0)[..., :k.shape[-2]]
    else:
        n = torch.tensor(k.shape[-2], device=q.device) if key_lengths is None else key_lengths[..., None, None, None]
        p = unnormalized_weights(s, n.clamp(1, max(k.shape[-2], 1)), normalizer, sigmoid_bias)
    weights = p
    if dropout_p:
        p = p * keep / (1 - dropout_p) if dropout_p < 1 else p * 0
    o = p.to(v.dtype) @ v
    outputs = [o]
    if return_lse:
        lse = s.logsumexp(-1) if s.shape[-1] else s.sum(-1)
        outputs.append(lse.masked_fill(masked_rows.squeeze(-1), -torch.inf))
    if return_stats is not None:
        outputs.append(statistics(of_keys, weights, return_stats))
    return tuple(outputs) if len(outputs) > 1 else o


def indices(shape, device=None):
    """Return batch, head, query and key of scores [..., H, L, S], integers that broadcast to them. Several batch dimensions
    count as one."""
    batches = torch.arange(math.prod(shape[:-3]), device=device).view(*shape[:-3], 1, 1, 1)
    head, query, key = (torch.arange(n, device=device) for n in shape[-3:])
    return batches, head[:, None, None], query[:, None], key


def unnormalized_weights(s, n, normalizer, sigmoid_bias):
    """Return the weights of the masked scores s: of each by itself. n: number of keys, which broadcasts to s."""
    # as torch's softmax does: 16-bit numbers are computed in float32, and the weights rounded
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    if normalizer == "relu":
        return (wide.relu() / n).to(s.dtype)
    return (wide + (-n.to(wide.dtype).log() if sigmoid_bias is None else sigmoid_bias)).sigmoid().to(s.dtype)


def statistics(s, p, names) -> dict:
    """Return statistics of the masked scores s and the weights p, both [..., H, L, S], as `tritonattn.attention` names them."""
    # a row without keys has no largest score; a weight of 0 adds nothing to an entropy, nor to its gradient
    largest = torch.nn.functional.pad(s.detach(), (0, 1), value=-torch.inf).amax(-1)
    terms = torch.where(p == 0, 1.0, p)
    values = {
        "max": lambda: largest,
        "head_max": lambda: torch.nn.functional.pad(largest.movedim(-2, 0).flatten(1), (0, 1), value=-torch.inf).amax(-1),
        "entropy": lambda: -(terms * terms.log()).sum(-1),
        "key_mass": lambda: p.sum(-2),
    }
    return {name: values[name]() for name in names}


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, bias=None, mask=None,
                     key_lengths=None, keep=None, score_function=None, return_lse=False, return_stats=None, **options):
    """Compute attention as `tritonattn.attention_varlen` defines it, one sequence after the other.

    Shapes: q [total queries, H, D], k [total keys, Hk, D], v [total keys, Hk, DV] -> [total queries, H, DV] and the log-sum-exp
    [H, total queries]; bias, mask and keep broadcast to [sequences, H, L, S], L and S at least the longest sequence;
    key_lengths is [sequences]; the batch of score_function is the sequence. Other options are those of `attention`;
    max_seqlen_q and max_seqlen_k are not needed. Copies cu_seqlens to the host.
    """
    outputs = []
    starts = [[*x.tolist(), len(rows)] for x, rows in ((cu_seqlens_q, q), (cu_seqlens_k, k))]
    sequences = list(zip(*(itertools.pairwise(each) for each in starts)))
    for i, ((q_start, q_stop), (k_start, k_stop)) in enumerate(sequences):
        # queries after the last sequence attend to no key
        k_stop = k_stop if i < len(sequences) - 1 else k_start

        def own(x, i=i, n_q=q_stop - q_start, n_k=k_stop - k_start):
            """Return the part of a pairwise tensor that belongs to this sequence."""
            if x is None:
                return None
            x = x.reshape(*(1,) * (4 - x.dim()), *x.shape)
            x = x[min(i, len(x) - 1)]
            return x[:, :n_q if x.shape[-2] > 1 and n_k else 1, :n_k if x.shape[-1] > 1 else 1]

        rows = (q[q_start:q_stop], k[k_start:k_stop], v[k_start:k_stop])
        lengths = None if key_lengths is None else key_lengths.expand(len(sequences) - 1)[min(i, len(sequences) - 2)]
        if score_function is not None:
            options["score_function"] = lambda s, batch, *place, i=i: score_function(s, batch + i, *place)
        outputs.append(attention(*(x.transpose(0, 1) for x in rows), bias=own(bias), mask=own(mask), keep=own(keep),
                                 key_lengths=lengths, return_lse=True, return_stats=return_stats or (),
                                 **options))
    o, lse, parts = zip(*outputs)
    results = [torch.cat(o, -2).transpose(0, 1), *(torch.cat(lse, -1),) * return_lse]
    if return_stats is not None:
        values = {name: [part[name] for part in parts] for name in return_stats}
        joined = {name: torch.stack(each).amax(0) if name == "head_max" else torch.cat(each, -1)
                  for name, each in values.items()}
        if "key_mass" in joined:
            # nothing attends to the keys after the last sequence
            joined["key_mass"] = torch.nn.functional.pad(joined["key_mass"], (0, len(k) - joined["key_mass"].shape[-1]))
        results.append(joined)
    return tuple(results) if len(results) > 1 else results[0]


def by_heads(q, k, v, do=None, *, dtype=torch.float64, scores=2**27, **options):
    """Return `attention`'s o in `dtype`, and with do also dq, dk and dv, a few heads at a time, so that any size fits.

    Shapes as in `attention`, with equal batch dimensions; options are those of `attention` that are the same for every head.
    At most `scores` scores (or one head's) are formed at once, and at most as many elements of keys and values are copied.
    """
    heads, kv_heads = q.shape[-3], k.shape[-3]
    (n_q, n_k), wide = (q.shape[-2], k.shape[-2]), torch.promote_types(dtype, torch.float32)
    flat_q, flat_k, flat_v, flat_do = (x if x is None else x.flatten(0, -3) for x in (q, k, v, do))
    o = q.new_empty(flat_q.shape[0], n_q, v.shape[-1], dtype=dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (flat_q, flat_k, flat_v)) if do is not None else (None,) * 3
    n_heads = max(1, scores // max(1, n_q * n_k, n_k * (k.shape[-1] + v.shape[-1])))
    for rows in torch.arange(len(flat_q), device=q.device).split(n_heads):
        kv_rows = rows // heads * kv_heads + rows % heads // (heads // kv_heads)
        leaves = [x[i].to(dtype).unsqueeze(1).requires_grad_(do is not None)
                  for x, i in ((flat_q, rows), (flat_k, kv_rows), (flat_v, kv_rows))]
        chunk = attention(*leaves, **options)
        o[rows] = chunk.detach().squeeze(1)
        if do is not None:
            gradients = torch.autograd.grad(chunk, leaves, flat_do[rows].to(dtype).unsqueeze(1))
            for total, i, gradient in zip((dq, dk, dv), (rows, kv_rows, kv_rows), gradients):
                total.index_add_(0, i, gradient.squeeze(1).to(wide))
    o = o.view(*q.shape[:-1], -1)
    return o if do is None else (o, dq.view_as(q), dk.view_as(k), dv.view_as(v))


def visible(n_q, n_k, *, causal=False, window=(None, None), align=None, key_lengths=None, device=None):
    """Return [n_q, n_k] booleans: True where query i may attend to key j, -left <= j - (i + shift) <= right.

    shift is 0 for align="top_left", n_k - n_q for "bottom_right"; causal bounds right by 0. With key_lengths [...] the result
    is [..., 1, n_q, n_k], and each sequence's length takes the place of n_k.
    """
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    n = n_k if key_lengths is None else key_lengths.clamp(0, n_k)[..., None, None, None]
    distance = offsets(n_q, n_k, align=align, key_lengths=key_lengths, device=device)
    inside = torch.ones_like(distance, dtype=torch.bool) & (torch.arange(n_k, device=device) < n)
    if left is not None:
        inside &= distance >= -left
    if right is not None:
        inside &= distance <= right
    return inside


def offsets(n_q, n_k, *, align=None, key_lengths=None, device=None):
    """Return [n_q, n_k] integers: the position of key j minus that of query i, j - (i + shift), with the shift of `visible`.

    With key_lengths [...] the result is [..., 1, n_q, n_k].
    """
    n = n_k if key_lengths is None else key_lengths.clamp(0, n_k)[..., None, None, None]
    shift = n - n_q if align == "bottom_right" else 0
    return torch.arange(n_k, device=device) - torch.arange(n_q, device=device)[:, None] - shift
