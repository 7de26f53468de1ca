"""Values of a score function for given scores, and the check of its derivative."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..runtime import custom_op, launch
from ..runtime.arguments import check_kernels_run_on, check_payload_memory, device_of_function
from ..score_function import ScoreFunction

SPREAD = 4.0     # standard deviation of the scores
STEP = 1e-4      # of finite differences, times the size of the score
TOLERANCE = 1e-5  # of a derivative, absolute or relative


def check_score_function(score_function: ScoreFunction, shape: tuple[int, int, int, int], *, device=None, seed: int = 0):
    """Check a score function in float64, for a random score at every place of `shape` (batch, heads, queries, keys).

    Its values must be numbers or -inf; -inf for every score of a pair, even a NaN, or for none. The derivative, if there is
    one, must agree to five digits with finite differences, at a kink with those of one side. A function that casts its scores
    to float32 fails. Both must be the same where the rows of a tile are keys. Takes about 15 tensors of this shape in float64:
    choose a small one. device: if None, that of the payload; without one a GPU, in Triton's interpreter the CPU.

    Raises:
        ValueError: names the first place at which a check fails, the score there, and the values.
        TypeError: not a ScoreFunction, or not four sizes. RuntimeError: kernels do not run on the device.
    """
    if not isinstance(score_function, ScoreFunction):
        raise TypeError(f"score_function: expected a tritonattn.ScoreFunction, got {score_function!r}")
    if not isinstance(shape, (tuple, list)) or len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise TypeError(f"shape: expected four positive sizes (batch, heads, queries, keys), got {shape!r}")
    device = device_of_function(score_function.payload, device)
    check_payload_memory(score_function.payload, device)
    generator = torch.Generator(device).manual_seed(seed)
    scores = SPREAD * torch.randn(shape, dtype=torch.float64, device=device, generator=generator)
    name, value = score_function.name, evaluate(score_function, scores)
    masked = value == -torch.inf
    _raise_at(value.isnan() | (value == torch.inf), scores, f"{name}: expected a number or -inf", value)
    elementwise = "the same in tiles whose rows are keys as in those whose rows are queries: each element by itself"
    by_keys = evaluate(score_function, scores, transposed=True)
    _raise_at(value != by_keys, scores, f"{name}: expected {elementwise}", value, by_keys)
    for score in (0.0, torch.nan):
        other = evaluate(score_function, torch.full_like(scores, score))
        _raise_at(masked != (other == -torch.inf), scores, f"{name}: expected -inf for every score of a pair or for none (mask "
                                                           f"with tl.where); for a score of {score:g} it is", other, value)
    if score_function.derivative is not None:
        derivative = evaluate(score_function, scores, derivative=True)
        by_keys = evaluate(score_function, scores, derivative=True, transposed=True)
        # of a masked pair it may be anything
        _raise_at((derivative != by_keys) & ~masked, scores, f"{name}: expected a derivative that is {elementwise}", derivative,
                  by_keys)
        differences = _differences(score_function, scores, value)
        close = [(derivative - each).abs() <= TOLERANCE * each.abs().clamp(min=1) for each in differences]
        _raise_at(~(close[0] | close[1] | close[2] | masked), scores, f"{name}: expected the derivative of finite differences,",
                  differences[0], derivative)


def evaluate(score_function: ScoreFunction, scores: Tensor, *, derivative: bool = False, transposed: bool = False) -> Tensor:
    """Return the function of scores [..., H, L, S], float32 or float64, or its derivative.

    transposed: compute tiles in which keys are the rows. Raises RuntimeError: kernels do not run on the device of the scores.
    """
    check_kernels_run_on(scores=scores)
    flat = scores.detach().reshape(math.prod(scores.shape[:-3]), *scores.shape[-3:])
    values = flat.clone(memory_format=torch.contiguous_format)
    function = score_function.derivative if derivative else score_function.function
    launch.run(launch.evaluate_launch(function, score_function.name, score_function.payload, values, transposed), scores.device)
    return values.view(scores.shape)


def as_torch(score_function: ScoreFunction) -> Callable:
    """Return the function as `reference.attention` takes it. It ignores the indices: the scores must be those of all places."""
    def changed(scores, batch, head, query, key):
        # the kernels compute 16-bit scores in float32
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        value = evaluate(score_function, wide)
        if wide.requires_grad and score_function.derivative is not None:
            slope = evaluate(score_function, wide, derivative=True)
            # adds 0, whose gradient is the slope
            value += torch.where(value == -torch.inf, 0, slope) * (wide - wide.detach())
        return value.to(scores.dtype)

    return changed


def dense_mask(mask: BlockMask) -> Tensor:
    """Return the booleans [..., L, S] of a block mask."""
    if mask.function is None:
        return mask.mask
    # each strip is overwritten by the next
    strips = custom_op.mask_strips(mask.function, mask.payload, mask.shape, mask.kv_blocks.device)
    return torch.cat([strip.clone() for strip in strips], -2)


def _differences(score_function, scores, value) -> tuple[Tensor, Tensor, Tensor]:
    """Return the finite differences of fourth order, and those of the left and of the right side, of second order."""
    step = STEP * scores.abs().clamp(min=1)
    left2, left, right, right2 = (evaluate(score_function, scores + i * step) for i in (-2, -1, 1, 2))
    return ((8 * (right - left) - (right2 - left2)) / (12 * step), (3 * value - 4 * left + left2) / (2 * step),
            (4 * right - 3 * value - right2) / (2 * step))


def _raise_at(wrong, scores, expected, *values):
    """Raise ValueError for the first element that is wrong. values: the right ones, if they are numbers, and the wrong ones."""
    if not wrong.any():
        return
    place = tuple(wrong.nonzero()[0].tolist())
    batch, head, query, key = place
    *right, got = (f"{x[place].item():.7g}" for x in values)
    raise ValueError(f"{' '.join([expected, *right])}, got {got}, for a score of {scores[place].item():.7g} at batch {batch}, "
                     f"head {head}, query {query}, key {key}")
