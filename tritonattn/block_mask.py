"""Which tiles of a boolean mask are worth a visit: known once, used by every pass.

    tile [TILE queries, TILE keys]  ->  whole: all of its pairs see each other, no mask is read
                                        mixed: some do                          empty: none do, nobody goes there

For each tile of queries a list of keys' tiles, for each tile of keys a list of queries' tiles:

    how many are whole | how many are mixed | the whole ones | the mixed ones | the empty ones
"""

from dataclasses import dataclass

import torch

TILE = 128  # kernels/window.py has the same


@dataclass(frozen=True)
class BlockMask:
    """A mask and the lists of its tiles; `block_mask` makes it, and `attention` takes it in the place of the mask."""

    mask: torch.Tensor         # [..., L, S] booleans
    query_lists: torch.Tensor  # [..., tiles of L, 2 + tiles of S], int32
    key_lists: torch.Tensor    # [..., tiles of S, 2 + tiles of L], int32
    version: int | None        # of the mask's values when they were read; None where nobody counts

    def to(self, device) -> "BlockMask":
        """The same on another device."""
        return block_mask(self.mask.to(device))

    def counts(self) -> dict[str, int]:
        """How many tiles of all matrices of the mask are "whole", "mixed" and "empty" for the loops over keys.

        A tile that reaches past the last key is never whole. Waits for the device.
        """
        whole, mixed = self.query_lists[..., :2].sum(dim=tuple(range(self.query_lists.dim() - 1))).tolist()
        tiles = self.query_lists[..., 2:].numel()
        return {"whole": whole, "mixed": mixed, "empty": tiles - whole - mixed}


def block_mask(mask: torch.Tensor) -> BlockMask:
    """Sort the tiles of a boolean mask [..., L, S] (True: takes part), so that attention skips those that hide everything.

    Worth it where a mask is used more than once and whole tiles are hidden: documents in one sequence, blocks, long windows.
    What broadcasts is given as an expanded view, which takes no memory itself. A window goes into the mask, too, if its
    tiles are to be skipped. The map holds the mask itself, not a copy, and is made again where that changes: `attention`
    refuses a map that is older than its mask, but cannot tell in compiled code, nor of masks made in inference mode.
    Takes one pass over the mask, and eight bytes for each tile of each of its matrices.

    Raises:
        TypeError, RuntimeError: not a tensor of booleans with at least two dimensions.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a tensor, got {mask!r}")
    if mask.dtype != torch.bool or mask.dim() < 2:
        raise RuntimeError(f"mask: expected booleans [..., queries, keys], got {mask.dtype} of shape {tuple(mask.shape)}")
    if mask.layout != torch.strided or mask.is_nested:
        raise RuntimeError(f"mask: expected a dense (strided) tensor, got {'a nested one' if mask.is_nested else mask.layout}")
    n_q, n_k = mask.shape[-2:]
    tiles = -(-n_k // TILE)
    padding = (0, tiles * TILE - n_k)
    seen, whole = [], []
    # row by row of tiles: no copy of the mask is made
    for rows in mask.split(TILE, -2) if n_q else ():
        some, every = rows.any(-2), rows.all(-2)
        seen.append(torch.nn.functional.pad(some, padding).unflatten(-1, (tiles, TILE)).any(-1))
        whole.append(torch.nn.functional.pad(every, padding, value=True).unflatten(-1, (tiles, TILE)).all(-1))
    none = mask.new_empty(*mask.shape[:-2], 0, tiles)
    seen, whole = (torch.stack(found, -2) if found else none for found in (seen, whole))
    # what lies past the end of the loop is tested for where tiles are mixed
    by_query, by_key = whole.clone(), whole.mT.clone()
    if n_k % TILE:
        by_query[..., -1] = False
    if n_q % TILE:
        by_key[..., -1] = False
    return BlockMask(mask, _lists(seen, by_query), _lists(seen.mT, by_key), version_of(mask))


def version_of(mask: torch.Tensor) -> int | None:
    """A number that every change of the values in place raises; tensors of inference mode have none."""
    return None if torch.compiler.is_compiling() or mask.is_inference() else mask._version


def _lists(seen, whole):
    counts = torch.stack((whole.sum(-1), (seen & ~whole).sum(-1)), -1)
    order = torch.argsort(2 - seen.int() - (seen & whole).int(), dim=-1, stable=True)
    return torch.cat((counts, order), -1).to(torch.int32)
