"""window_bounds agrees with window_mask: no pair is missed, no tile is visited twice, the unmasked stretch needs no mask."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritonattn import Config, Problem
from tritonattn.kernels.window import Window, transpose_window, window_bounds, window_mask
from tritonattn.runtime import launch

pytestmark = pytest.mark.interpreted


@triton.jit
def probe(bounds_out, mask_out, window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    bounds = window_bounds(window, first, n, ROWS, COLS)
    for i in tl.static_range(4):
        tl.store(bounds_out + i, bounds[i])
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDE)
    mask = window_mask(window, first + rows, cols, n)
    tl.store(mask_out + rows[:, None] * WIDE + cols[None, :], mask.to(tl.int8))


def bounds_and_mask(window, first, n, rows, cols):
    """Return (bounds, [rows, 64] booleans) as the kernels compute them."""
    bounds, mask = torch.zeros(4, dtype=torch.int32), torch.zeros(rows, 64, dtype=torch.int8)
    probe[(1,)](bounds, mask, Window(*window), first, n, rows, cols, 64)
    return bounds.tolist(), mask.bool()


sides = st.none() | st.integers(0, 70)


# tiles and windows that end together
@example(left=None, right=0, first=0, n=60, rows=4, cols=4)
@example(left=0, right=None, first=8, n=60, rows=4, cols=4)
@settings(max_examples=400)
@given(left=sides, right=sides, first=st.integers(-60, 60), n=st.integers(0, 60), rows=st.sampled_from([4, 8, 16]),
       cols=st.sampled_from([4, 8, 16]))
def test_window_bounds_cover_exactly_the_window(left, right, first, n, rows, cols):
    bounds, mask = bounds_and_mask((left, right), first, n, rows, cols)
    distance = torch.arange(64)[None, :] - (first + torch.arange(rows))[:, None]
    expected = (torch.arange(64) < n)[None, :].expand(rows, 64)
    expected = expected if left is None else expected & (distance >= -left)
    expected = expected if right is None else expected & (distance <= right)
    assert torch.equal(mask, expected)

    problem = Problem((1,), 1, 1, rows, n, 16, 16, torch.float32)
    modes = launch.loop_modes(problem, Config(16, 16, edge_stages=1), (left, right), n % cols != 0)
    visits = torch.zeros(64 + cols, dtype=torch.int32)
    for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if modes[part] is None:
            assert begin >= end, f"stretch {part} has tiles but no mode"
            continue
        for tile in range(begin, end, cols):
            assert tile % cols == 0
            visits[tile:tile + cols] += 1
            assert modes[part] == ("masked", "unmasked", "masked_tail")[part]
            if part == 1:
                assert tile + cols <= n and mask[:, tile:tile + cols].all(), "the unmasked stretch needs a mask"
    assert visits.max() <= 1, "a tile is visited twice"
    assert (visits[:64] > 0)[mask.any(0)].all(), "a key inside the window is not visited"
    for tile in range(0, n // cols * cols, cols):
        unmasked = bounds[1] <= tile < bounds[2]
        assert unmasked == mask[:, tile:tile + cols].all(), "a tile without masked pairs is in a masked stretch"
    # the two masked stretches may add a tile each, and the last tile may end before the window begins
    spare = 2 * (left is not None and right is not None) + (left is not None and n % cols != 0)
    needed = sum(mask[:, tile:tile + cols].any().item() for tile in range(0, 64, cols))
    assert (visits[::cols] > 0).sum() <= needed + spare, "tiles outside the window are visited"


def test_a_transposed_window_has_the_transposed_mask():
    _, mask = bounds_and_mask((5, 2), 3, 16, 16, 4)
    _, transposed = bounds_and_mask(transpose_window(Window(5, 2)), -3, 16, 16, 4)
    assert torch.equal(mask[:, :16], transposed[:, :16].T)
