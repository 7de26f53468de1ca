"""Gradients that need one number of each query, and no kernel: of a sink, and of a bias that is the same for all keys.

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
    minus_m, log2_l = statistics.unbind(-2)
    sink = sink[..., 0]
    # where no key takes part the sink has the whole weight, unless it is -inf
    weight = torch.where(log2_l == torch.inf, (sink > -torch.inf).to(log2_l.dtype),
                         torch.exp(sink + minus_m * unit - log2_l * math.log(2)))
    return -weight * delta


def dbias_of_rows(statistics: Tensor, dlse: Tensor | None, ds: Tensor | None) -> Tensor:
    """Return dbias [..., H, L], before the sum over axes of size 1, from the cotangent of lse and `sink_ds`, or None."""
    log2_l = statistics[..., 1, :]
    # NaN where a score is, and 0 in a row that attends to no key
    rows = log2_l * 0 + (0 if dlse is None else dlse) - (0 if ds is None else ds)
    return torch.where(log2_l == torch.inf, 0, rows)
