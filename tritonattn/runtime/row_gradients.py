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


def dbias_of_rows(log2_l: Tensor, dlse: Tensor | None, ds: Tensor | None) -> Tensor:
    """Return dbias [..., H, L], before the sum over axes of size 1, from the cotangent of lse and `sink_ds`, or None."""
    # NaN where a score is, and 0 in a row that attends to no key
    rows = log2_l * 0 + (0 if dlse is None else dlse) - (0 if ds is None else ds)
    return torch.where(log2_l == torch.inf, 0, rows)


def by_sequence(log2_l: Tensor, dlse: Tensor | None, ds: Tensor | None, starts: Tensor, longest: int) -> list[Tensor | None]:
    """Return the arguments of `dbias_of_rows` as [sequences, H, longest], from those of packed sequences [1, H, ...].

    log2_l and ds lie as kernels/packed.py describes, dlse row by row. Rows past the end of a sequence attend to no key.
    """
    first, rows = starts[:-1].long(), torch.arange(longest, device=starts.device)
    inside = rows < starts.diff()[:, None]
    padded = (first // 16 + torch.arange(len(first), device=starts.device)) * 16

    def gather(x, begin, outside):
        if x is None:
            return None
        # starts that are wrong must not lead out of the tensor
        index = (begin[:, None] + rows).clamp(0, x.shape[-1] - 1)
        return torch.where(inside, x[0][:, index], outside).movedim(1, 0)

    return [gather(log2_l, padded, torch.inf), gather(dlse, first, 0.0), gather(ds, padded, 0.0)]
