"""Usual values of the arguments `alibi` and `relative` of attention: ALiBi's slopes, and T5's buckets as a table."""

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int, device=None) -> Tensor:
    """Return the slopes [heads] of ALiBi, float32, falling geometrically: 2^(-8 / heads), 2^(-16 / heads), ..., 2^-8.

    Where `heads` is no power of two, they are those of the largest power of two below, and then every other one of twice as
    many. Raises ValueError unless heads is a positive integer. Source: Press et al., 2022 (arXiv 2108.12409).
    """
    if type(heads) is not int or heads < 1:
        raise ValueError(f"heads: expected a positive integer, got {heads!r}")
    most = 1 << (heads.bit_length() - 1)

    def slopes(n, step=1):
        return 2.0 ** (torch.arange(1, n + 1, step, dtype=torch.float64) * (-8 / n))

    return torch.cat((slopes(most), slopes(2 * most, 2)[:heads - most])).to(device, torch.float32)


def t5_table(weight: Tensor, *, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """Return a table [H, 2 max_distance + 1] for `relative` from the bias of each bucket and head, [buckets, H], as T5 has it.

    Half of the buckets (of either side, if bidirectional: the later keys have the second half) hold one distance each, the
    others grow logarithmically up to max_distance. Without `bidirectional` all later keys share the bucket of distance 0. The
    table's gradient flows back to `weight`.

    Raises:
        RuntimeError: `weight` is no tensor with two dimensions. ValueError: there are fewer than 2 buckets on a side, or
        max_distance does not exceed the number of buckets that hold one distance.
    Source: Raffel et al., 2020 (arXiv 1910.10683), section 2.1; the bounds of the buckets as in its code.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise RuntimeError(f"weight: expected a tensor, the bias of each bucket and head, [buckets, H], got {got}")
    buckets = weight.shape[0] // 2 if bidirectional else weight.shape[0]
    exact = buckets // 2
    if exact < 1:
        raise ValueError(f"weight: expected at least {4 if bidirectional else 2} buckets, got {weight.shape[0]}")
    if type(max_distance) is not int or max_distance <= exact:
        raise ValueError(f"max_distance: expected an integer above the {exact} buckets that hold one distance, got "
                         f"{max_distance!r}")
    offsets = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    distance = offsets.abs() if bidirectional else (-offsets).clamp(min=0)
    # in float32, in which models compute it, since a bound may fall on an integer
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = torch.where(distance < exact, distance, (exact + growth.long()).clamp(max=buckets - 1))
    if bidirectional:
        bucket = bucket + (offsets > 0) * buckets
    return weight[bucket].T.contiguous()
