"""Gradients that need one number of each query, and no kernel: of a sink, of a bias that is the same for all keys, and the part
of the entropy's that is the same for all keys.

    sink:  dsink = sum over the rows of dS of the sink, whose value is 0:  dS = P (0 - delta), P the weight of the sink
    bias:  dbias = sum over the keys of dS = dLSE - dS of the sink, since the sum of P (dP - delta) over all keys is dLSE
"""

import math

import torch
from torch import Tensor


def sink_ds(sink: Tensor, statistics: Tensor, delta: Tensor, unit: float) -> Tensor:
    """Return dS [..., H, L] of the sink [..., H, 1, 1].

    statistics [..., H, 2, L] are -m, in `unit` of natural logarithms, and log2 l, delta [..., H, L]: see kernels/softmax.py.
    """
    return -sink_weight(sink, *statistics.unbind(-2), unit) * delta


def sink_weight(sink: Tensor, minus_m: Tensor, log2_l: Tensor, unit: float) -> Tensor:
    """Return P [..., H, L] of the sink [..., H, 1, 1], from the statistics -m and log2 l [..., H, L]; see `sink_ds`."""
    sink = sink[..., 0]
    # where no key takes part the sink has the whole weight, unless it is -inf
    return torch.where(log2_l == torch.inf, (sink > -torch.inf).to(log2_l.dtype),
                       torch.exp(sink + minus_m * unit - log2_l * math.log(2)))


def entropy_terms(d_entropy: Tensor, entropy: Tensor, log2_l: Tensor, of_sink: Tensor | None) -> Tensor:
    """Return dH (sum of P over the keys - H), what delta subtracts for the entropy (kernels/backward.py).

    All are [..., H, L]; of_sink is the `sink_weight`, or None.
    """
    of_keys = 1.0 if of_sink is None else 1 - of_sink
    # a row that attends to no key has no gradient, not even from an infinite cotangent
    return torch.where(log2_l == torch.inf, 0, d_entropy * (of_keys - entropy))


def dbias_of_rows(log2_l: Tensor, dlse: Tensor | None, ds: Tensor | None) -> Tensor:
    """Return dbias [..., H, L], before the sum over axes of size 1, from the cotangent of lse and `sink_ds`, or None."""
    # NaN where a score is, and 0 in a row that attends to no key
    rows = log2_l * 0 + (0 if dlse is None else dlse) - (0 if ds is None else ds)
    return torch.where(log2_l == torch.inf, 0, rows)


def sum_of_packed(log2_l: Tensor, dlse: Tensor | None, ds: Tensor | None, starts: Tensor, total: int, longest: int,
                  shape: tuple) -> Tensor:
    """Return the sum of `dbias_of_rows` of packed sequences with `total` rows to the scores [sequences, H, longest, 1].

    shape: that of the bias, in which the sequences, H and longest may be 1. log2_l and ds [1, H, ...] lie as kernels/packed.py
    describes, dlse [1, H, total] row by row. If one of the sequences and longest is 1 in it, and not both, all pairs of them
    are formed, since a sum in the order of the rows would need atomics.
    """
    n, (sequence, row, slots) = starts.shape[0] - 1, rows_of_packed(starts, total, log2_l.shape[-1])
    gradient = dbias_of_rows(log2_l[..., slots], dlse, None if ds is None else ds[..., slots])
    if shape[1] == 1:
        gradient = gradient.sum(-2, keepdim=True)
    if shape[0] == shape[2] == 1:
        return gradient.sum(-1).view(1, -1, 1, 1)
    pairs = gradient.new_zeros(n + 1, gradient.shape[-2], longest)
    pairs[sequence, :, row.clamp(0, longest - 1)] = gradient[0].mT
    return pairs[:n].unsqueeze(-1).sum_to_size(shape)


def rows_of_packed(starts: Tensor, total: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of `total` rows its sequence, its place in the sequence, and that of its statistic among `count`.

    The sequence of the rows after the last one is the number of sequences.
    """
    starts, rows = starts.long(), torch.arange(total, device=starts.device)
    sequence = torch.searchsorted(starts[1:], rows, right=True)
    first = starts.index_select(0, sequence)
    # starts that are wrong must not lead out of a tensor
    return sequence, rows - first, ((first // 16 + sequence) * 16 + rows - first).clamp(0, count - 1)
