"""Spans and visible agree: nobody is left out, nothing is visited twice, the full stretch needs no mask."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonattn import Config, Problem
from tritonattn.kernels.window import Window, transpose_window, window_bounds, window_mask
from tritonattn.runtime import launch

pytestmark = pytest.mark.interpreted


@triton.jit
def probe(bounds_out, seen_out, window, first, n, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    bounds = window_bounds(window, first, n, ROWS, COLS)
    for i in tl.static_range(4):
        tl.store(bounds_out + i, bounds[i])
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDE)
    seen = window_mask(window, first + rows, cols, n)
    tl.store(seen_out + rows[:, None] * WIDE + cols[None, :], seen.to(tl.int8))


def walk(window, first, n, rows, cols):
    """(bounds, [rows, 64] booleans) as the kernels compute them."""
    bounds, seen = torch.zeros(4, dtype=torch.int32), torch.zeros(rows, 64, dtype=torch.int8)
    probe[(1,)](bounds, seen, Window(*window), first, n, rows, cols, 64)
    return bounds.tolist(), seen.bool()


sides = st.none() | st.integers(0, 70)


@settings(max_examples=400)
@given(left=sides, right=sides, first=st.integers(-60, 60), n=st.integers(0, 60), rows=st.sampled_from([4, 8, 16]),
       cols=st.sampled_from([4, 8, 16]))
def test_spans_cover_exactly_what_is_visible(left, right, first, n, rows, cols):
    (start, inner, outer, stop), seen = walk((left, right), first, n, rows, cols)
    distance = torch.arange(64)[None, :] - (first + torch.arange(rows))[:, None]
    expected = (torch.arange(64) < n)[None, :].expand(rows, 64)
    expected = expected if left is None else expected & (distance >= -left)
    expected = expected if right is None else expected & (distance <= right)
    assert torch.equal(seen, expected)

    problem = Problem((1,), 1, 1, rows, n, 16, 16, torch.float32)
    modes = launch.loop_modes(problem, Config(16, 16, edge_stages=1), (left, right), n % cols != 0)
    visits = torch.zeros(64 + cols, dtype=torch.int32)
    for part, (begin, end) in enumerate(((start, inner), (inner, outer), (outer, stop))):
        if modes[part] is None:
            assert begin >= end, f"stretch {part} holds tiles but is not compiled"
            continue
        for tile in range(begin, end, cols):
            assert tile % cols == 0
            visits[tile:tile + cols] += 1
            assert modes[part] == ("masked", "unmasked", "masked_tail")[part]
            if part == 1:
                assert tile + cols <= n and seen[:, tile:tile + cols].all(), "a mask is missing in the full stretch"
    assert visits.max() <= 1, "a tile is visited twice"
    assert (visits[:64] > 0)[seen.any(0)].all(), "a visible key is not visited"
    # two edges may meet in tiles of their own; a last tile may hold keys for nobody and end before the window begins
    spare = 2 * (left is not None and right is not None) + (left is not None and n % cols != 0)
    worth = sum(seen[:, tile:tile + cols].any().item() for tile in range(0, 64, cols))
    assert (visits[::cols] > 0).sum() <= worth + spare, "tiles nobody sees are visited"


def test_a_mirrored_window_is_the_same_pairs():
    _, seen = walk((5, 2), 3, 16, 16, 4)
    _, mirrored = walk(transpose_window(Window(5, 2)), -3, 16, 16, 4)
    assert torch.equal(seen[:, :16], mirrored[:, :16].T)
