"""Gradients of ALiBi slopes and of tables of relative positions, from the sums of dS along its diagonals.

    slope:     -sum over the diagonals of |offset| sum
    table[d]:  sum of the diagonal of offset d; at the ends of the table, of all diagonals that are as far away or farther

Every sum has a fixed order, and takes memory for a few times as many numbers as there are diagonals, or entries in the table.
"""

import torch
from torch import Tensor

from .arguments import AttentionInputs


def diagonal_offsets(inputs: AttentionInputs) -> Tensor:
    """Return the offset of each diagonal of kernels/diagonals.py, [n] int64: key position - query position.

    Those of packed sequences lie one after the other; copies nothing to the host.
    """
    n_q, n_k = inputs.q.shape[-2], inputs.k.shape[-2]
    diagonals = torch.arange(n_q + n_k, device=inputs.q.device)
    if inputs.q_starts is None:
        return diagonals - ((n_k if inputs.bottom_right else n_q) - 1)
    starts = inputs.q_starts.long() + inputs.k_starts.long()
    aligned = inputs.k_starts if inputs.bottom_right else inputs.q_starts
    # the diagonals after the last sequence are 0, whatever their offset
    sequence = torch.searchsorted(starts[1:], diagonals, right=True).clamp(max=len(starts) - 2)
    return diagonals - (starts[:-1] + aligned.diff().long() - 1)[sequence]


def slopes_gradient(sums: Tensor, offsets: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of slopes of this shape, [..., H, 1, 1], from sums [..., H, n] and their offsets [n]."""
    return -(sums * offsets.abs()).sum(-1)[..., None, None].sum_to_size(shape)


def table_gradient(sums: Tensor, offsets: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of a table of this shape, [..., H, 1, 2 R + 1], from sums [..., H, n] and their offsets [n]."""
    sums, radius = sums.sum_to_size(*shape[:-2], sums.shape[-1]), shape[-1] // 2
    if radius == 0:
        return sums.sum(-1)[..., None, None]
    before, after = (torch.where(beyond, sums, 0).sum(-1, keepdim=True) for beyond in (offsets <= -radius, offsets >= radius))
    # numbers with one index are added one after the other, so those beyond the ends, which are many, get an index each
    index = torch.where(offsets.abs() < radius, offsets + radius, shape[-1] + torch.arange(len(offsets), device=sums.device))
    entries = sums.new_zeros(shape[-1] + len(offsets), *sums.shape[:-1])
    # index_put_, unlike index_add_, sorts the indices on a GPU, and has no atomics there
    between = entries.index_put_((index,), sums.movedim(-1, 0), accumulate=True)[1:2 * radius].movedim(0, -1)
    return torch.cat((before, between, after), -1).unsqueeze(-2)
