"""A boolean mask whose blocks are sorted once into full, partial and empty ones, for all forward and backward passes.

    block [TILE queries, TILE keys]  ->  full: every pair takes part, no mask is read
                                         partial: some do                          empty: none do, the block is skipped

Each block of queries has a list of kv blocks, and each block of keys a list of query blocks:

    number of full blocks | number of partial blocks | the full ones | the partial ones | the empty ones
"""

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TILE = 128  # the same in kernels/window.py


class BlockMask(torch.nn.Module):
    """A boolean mask with the lists of its blocks. `block_mask` makes one; `attention` takes it in place of the mask.

    It can be copied, pickled, loaded by torch.load(weights_only=True) and passed through torch.export. As an attribute of a
    module it moves with that module, but is not in its state_dict, and `to` moves it in place, as for any module.
    `attention` rejects one whose mask was changed in place; compiled code and masks of inference mode are not checked. The
    one that `create_block_mask` makes holds the payload of a mask function in place of the mask, and the function's name: where
    it is loaded, the first call imports the function's module.
    """

    def __init__(self, mask: Tensor | None, kv_blocks: Tensor, q_blocks: Tensor, current: bool = True,
                 function: tuple[str, int, int] | None = None):
        """mask [..., L, S], kv_blocks [..., query blocks, 2 + kv blocks], q_blocks [..., kv blocks, 2 + query blocks]; int32.

        current: whether the lists match the mask. function: the name of a mask function, L and S; then `mask` is its payload.
        """
        super().__init__()
        self.function, *self._lengths = function or (None,)
        self._hold((mask, kv_blocks, q_blocks), current)

    def _hold(self, tensors, current):
        # no buffers: DDP would write to them, which counts as a change
        source, self.kv_blocks, self.q_blocks = tensors
        self.mask, self.payload = (source, None) if self.function is None else (None, source)
        # the counter belongs to this tensor: a copy starts its own
        self._source_version = _version_of(source) if current else -1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mask, [..., L, S]."""
        return tuple(self.mask.shape) if self.function is None else (*self.kv_blocks.shape[:-2], *self._lengths)

    def is_current(self) -> bool:
        """Return whether the mask, or the payload, is unchanged since the blocks were sorted, as far as that is known."""
        version = _version_of(self._tensors()[0])
        return self._source_version is None or version is None or self._source_version == version

    def counts(self) -> dict[str, int]:
        """Return how many blocks of all matrices of the mask are "full", "partial" and "empty" for the loops over keys.

        A block that reaches past the last key is never full. Waits for the device.
        """
        full, partial = self.kv_blocks[..., :2].sum(dim=tuple(range(self.kv_blocks.dim() - 1))).tolist()
        blocks = self.kv_blocks[..., 2:].numel()
        return {"full": full, "partial": partial, "empty": blocks - full - partial}

    def _apply(self, fn, recurse=True):
        """Move the tensors: `to`, `cuda` and the like of this module and of the one that holds it."""
        current, (source, *lists) = self.is_current(), self._tensors()
        moved = source if source is None else fn(source)
        if moved is not None and moved.dtype != source.dtype:
            # a payload keeps its dtype: the function reads it
            moved = source.to(moved.device)
        self._hold((moved, *map(fn, lists)), current)
        return self

    def _tensors(self):
        return self.mask if self.function is None else self.payload, self.kv_blocks, self.q_blocks

    def _context(self):
        """Return the arguments of the constructor that are no tensors."""
        return self.is_current(), None if self.function is None else (self.function, *self._lengths)

    def __reduce__(self):
        return BlockMask, (*self._tensors(), *self._context())

    def __repr__(self):
        return f"BlockMask of shape {self.shape}"


def block_mask(mask: Tensor) -> BlockMask:
    """Sort the blocks of a boolean mask [..., L, S] (True: takes part), so that attention skips the empty ones.

    Worth it where a mask is used more than once and has empty blocks: documents in one sequence, block patterns, long
    windows. Pass a mask that broadcasts over queries or keys as an expanded view, which takes no memory. Combine a window
    into the mask, so that its blocks are skipped, too. The result holds the mask itself, not a copy: call this again after
    a change. Takes one pass over the mask, and eight bytes for each block of each of its matrices.

    A BlockMask of FlexAttention (torch.nn.attention.flex_attention) is converted: its mask function is evaluated once for every
    pair, so that the result no longer depends on it, and takes a byte for each. Its blocks may have any size.

    Raises:
        TypeError, RuntimeError: not a dense tensor of booleans with at least two dimensions.
    """
    if is_of_flex(mask):
        mask = _pairs_of_flex(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.dim() < 2:
        raise RuntimeError(f"mask: expected booleans [..., queries, keys], got {mask.dtype} of shape {tuple(mask.shape)}")
    if mask.layout != torch.strided or mask.is_nested:
        raise RuntimeError(f"mask: expected a dense (strided) tensor, got {'a nested one' if mask.is_nested else mask.layout}")
    # one row of blocks at a time, so that the mask is not copied
    return BlockMask(mask, *sorted_blocks(mask.split(TILE, -2) if mask.shape[-2] else (), mask.shape, mask.device))


def sorted_blocks(strips: Iterable[Tensor], shape: Sequence[int], device) -> tuple[Tensor, Tensor]:
    """Return kv_blocks and q_blocks of a mask of this shape from its rows, booleans [..., at most TILE, S]."""
    n_q, n_k = shape[-2:]
    n_blocks = -(-n_k // TILE)
    padding = (0, n_blocks * TILE - n_k)
    nonempty, full = [], []
    for rows in strips:
        any_row, every_row = rows.any(-2), rows.all(-2)
        nonempty.append(torch.nn.functional.pad(any_row, padding).unflatten(-1, (n_blocks, TILE)).any(-1))
        full.append(torch.nn.functional.pad(every_row, padding, value=True).unflatten(-1, (n_blocks, TILE)).all(-1))
    none = torch.empty(*shape[:-2], 0, n_blocks, dtype=torch.bool, device=device)
    nonempty, full = (torch.stack(rows, -2) if rows else none for rows in (nonempty, full))
    # a block that reaches past the last row or column counts as partial: full blocks are not tested for the end
    full_of_query, full_of_key = full.clone(), full.mT.clone()
    if n_k % TILE:
        full_of_query[..., -1] = False
    if n_q % TILE:
        full_of_key[..., -1] = False
    return _block_lists(nonempty, full_of_query), _block_lists(nonempty.mT, full_of_key)


def _block_lists(nonempty, full):
    """Return the lists of the rows of a matrix of blocks (see the top of this file), int32."""
    counts = torch.stack((full.sum(-1), (nonempty & ~full).sum(-1)), -1)
    order = torch.argsort(2 - nonempty.int() - (nonempty & full).int(), dim=-1, stable=True)
    return torch.cat((counts, order), -1).to(torch.int32)


def is_of_flex(mask) -> bool:
    """Return whether this is a BlockMask of FlexAttention. Does not import it, which takes long."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and isinstance(mask, flex.BlockMask)


def _pairs_of_flex(mask) -> Tensor:
    """Return the pairs [batch, heads, L, S] of the blocks in its lists: of a full block all, of another those that the mask
    function allows. Blocks in no list have none, whatever the function is."""
    from torch.nn.attention.flex_attention import create_mask

    sizes, rows = mask.seq_lengths, mask.kv_indices.reshape(*(1,) * (4 - mask.kv_indices.dim()), *mask.kv_indices.shape)
    allowed = create_mask(mask.mask_mod, *rows.shape[:2], *sizes, device=rows.device)
    pairs = _listed_pairs(mask.kv_num_blocks, mask.kv_indices, mask.BLOCK_SIZE, sizes) & allowed
    if mask.full_kv_num_blocks is None:
        return pairs
    return pairs | _listed_pairs(mask.full_kv_num_blocks, mask.full_kv_indices, mask.BLOCK_SIZE, sizes)


def _listed_pairs(counts, indices, block_size, sizes) -> Tensor:
    """Return booleans [..., L, S]: the pairs of the listed blocks, of each row of blocks the first `counts` of `indices`."""
    n_blocks = -(-sizes[1] // block_size[1])
    # those that do not count go to one more column
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    blocks = torch.zeros(*indices.shape[:-1], n_blocks + 1, dtype=torch.bool, device=indices.device)
    blocks.scatter_(-1, torch.where(listed, indices, n_blocks).long(), True)
    rows = blocks[..., :n_blocks].repeat_interleave(block_size[0], -2)[..., :sizes[0], :]
    return rows.repeat_interleave(block_size[1], -1)[..., :sizes[1]]


def _version_of(mask) -> int | None:
    """Return the counter that every in-place change of the mask raises; None where there is none: in compiled code, for
    tensors of inference mode, and for what stands in for a tensor in a pytree."""
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.is_inference():
        return None
    return mask._version


NAMES = ("mask", "kv_blocks", "q_blocks")
pytree.register_pytree_node(
    BlockMask, lambda block_mask: (list(block_mask._tensors()), block_mask._context()),
    lambda tensors, context: BlockMask(*tensors, *context),
    flatten_with_keys_fn=lambda block_mask: (
        [(pytree.GetAttrKey(name), x) for name, x in zip(NAMES, block_mask._tensors())], block_mask._context()),
    serialized_type_name="tritonattn.BlockMask", to_dumpable_context=list,
    from_dumpable_context=lambda context: (context[0], context[1] and tuple(context[1])))
torch.serialization.add_safe_globals([BlockMask])
