"""The definition of attention, in plain PyTorch: what every kernel is measured against.

    S = scale Q K^T          P = softmax of S over the keys a query sees          O = P V
"""

import torch


def attention(q, k, v, *, scale=None, causal=False, window=(None, None), align=None, return_lse=False):
    """Attention as `tritonattn.attention` defines it, by forming every score. Any floating dtype, any device.

    Shapes: q [..., H, L, D], k [..., Hk, S, D], v [..., Hk, S, DV] with Hk dividing H; the output is [..., H, L, DV],
    the log-sum-exp (natural) [..., H, L]. Memory grows with L x S. Inputs are taken to be finite and well formed.
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    seen = visible(q.shape[-2], k.shape[-2], causal=causal, window=window, align=align, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    # a row that sees nothing has no softmax: its output is 0 and its log-sum-exp -inf
    blind = ~seen.any(-1, keepdim=True)
    s = s.masked_fill(blind, 0.0)
    o = s.softmax(-1).masked_fill(blind, 0.0) @ v
    if not return_lse:
        return o
    lse = s.logsumexp(-1) if s.shape[-1] else s.sum(-1)
    return o, lse.masked_fill(blind.squeeze(-1), -torch.inf)


def visible(n_q, n_k, *, causal=False, window=(None, None), align=None, device=None):
    """[n_q, n_k] booleans: query i sees key j if -left <= j - (i + shift) <= right.

    shift is 0 for align="top_left", n_k - n_q for "bottom_right"; causal bounds right by 0.
    """
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    shift = n_k - n_q if align == "bottom_right" else 0
    distance = torch.arange(n_k, device=device) - torch.arange(n_q, device=device)[:, None] - shift
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen
