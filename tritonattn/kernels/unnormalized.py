"""Weights of sigmoid and ReLU attention. None depends on another pair: there is no running maximum, and no sum of a row.

    sigmoid    P = 1 / (1 + e^-(S + b))     dP/dS = P (1 - P)           Ramapuram et al., 2024, arXiv 2409.04431
    relu       P = max(S, 0) / n            dP/dS = 1/n where S > 0     Wortsman et al., 2023, arXiv 2309.08586

n is the number of keys of the sequence, whether or not a query attends to them; b is -ln n unless it is given. The weights of
O = P V and dV = P^T dO are computed in units in which float16 keeps the digits of small ones.
"""

import triton
import triton.language as tl

from .scores import LN2, normalizer_number
from .tile import scale_tile


@triton.constexpr_function
def log2_unit(normalizer, dtype):
    """Return the binary logarithm of the unit of P (sigmoid) or of n P (relu), for queries of this dtype."""
    if dtype != tl.float16:
        return 0.0
    # float16 then holds sigmoids from 2^-38 to 1, those below 2^-28 with fewer digits, and scores up to 2^20
    return -14.0 if normalizer == "sigmoid" else 4.0


@triton.constexpr_function
def unit(normalizer, dtype):
    """Return the unit itself."""
    return 2.0 ** log2_unit(normalizer, dtype)


@triton.jit
def weights(s, scoring, static, dtype: tl.constexpr):
    """Return P of a sigmoid, n P of relu, in their unit, for queries of this dtype: 0 where S is -inf, NaN where it is NaN."""
    if static.NORMALIZER == "relu":
        return tl.maximum(s * (scoring.exp2_scale * (LN2 / unit("relu", dtype))), 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        # 1 / (unit + unit 2^-x); a division takes three more instructions
        minus_x = s * -scoring.exp2_scale - (scoring.mods.normalizer[0] - log2_unit("sigmoid", dtype))
        root = tl.rsqrt(tl.exp2(minus_x) + unit("sigmoid", dtype))
        return root * root


@triton.jit
def slope(s, p, scoring, static, dtype: tl.constexpr):
    """Return dP/dS from S and P in its unit."""
    if static.NORMALIZER == "relu":
        return tl.where(s <= 0.0, 0.0, scoring.mods.normalizer[0])
    else:
        p = p * unit("sigmoid", dtype)
        return p * (1.0 - p)


@triton.jit
def from_unit(tile, n, static, dtype: tl.constexpr):
    """Return P V or P^T dO of a sequence of n keys, from weights in their unit; with a softmax the tile as it is."""
    if static.NORMALIZER == "relu":
        tile = scale_tile(tile, unit("relu", dtype) * normalizer_number((), n, static))
    elif static.NORMALIZER == "sigmoid":
        tile = scale_tile(tile, unit("sigmoid", dtype))
    return tile
