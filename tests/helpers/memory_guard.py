"""Bounds and race checks of interpreted kernels.

A load or store outside every tensor of the launch is an error, and so are two programs that access one address if one of
them writes it. Limits: the gaps between the rows of a view count as inside it; one launch at a time per process.
"""

import numpy as np
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """An access outside every tensor of the launch, raised in the kernel and wrapped in Triton's InterpreterError."""


class Race(AssertionError):
    """Two programs access one address, and one of them writes it. Raised after the launch."""


extents = []        # [first, last) byte addresses of the tensors of the running launch
reads, writes = [], []  # (addresses, program) of the running launch


def _lanes(ptrs, mask):
    """Return the addresses of the unmasked lanes."""
    return ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel().astype(np.uint64)


def _extents(argument):
    """Return the extents of the tensors in a kernel argument."""
    if isinstance(argument, tuple):
        return [extent for field in argument for extent in _extents(field)]
    tensor = interpreter._unwrap_tensor(argument)
    if not hasattr(tensor, "data_ptr") or not tensor.numel():
        return []
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return [(tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size())]


def _check(log, builder, ptrs, mask, access):
    """Raise if a lane is out of bounds; append the addresses and the program to `log`."""
    addresses = _lanes(ptrs, mask)
    size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
    inside = np.zeros(addresses.shape, bool)
    for first, last in extents:
        inside |= (addresses >= first) & (addresses + size <= last)
    if not inside.all():
        raise OutOfBounds(f"{access}: {(~inside).sum()} lanes outside every tensor of the launch")
    (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
    log.append((np.unique(addresses), x + nx * (y + ny * z)))


def find_race():
    """Raise if two programs of the last launch accessed one address and one of them wrote it."""
    if not writes:
        return
    written = np.concatenate([addresses for addresses, _ in writes])
    owner = np.concatenate([np.full(len(addresses), program) for addresses, program in writes])
    order = np.lexsort((owner, written))
    written, owner = written[order], owner[order]
    if ((written[1:] == written[:-1]) & (owner[1:] != owner[:-1])).any():
        raise Race("two programs write the same address")
    for addresses, program in reads:
        i = np.minimum(np.searchsorted(written, addresses), max(len(written) - 1, 0))
        if len(written) and ((written[i] == addresses) & (owner[i] != program)).any():
            raise Race("a program reads an address that another program writes")


def install():
    """Check every launch of this process from now on."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    prepare, launch = executor._init_args_hst, executor.__call__

    def watched_load(self, ptrs, mask, *rest, **options):
        _check(reads, self, ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **options)

    def watched_store(self, ptrs, value, mask, *rest, **options):
        _check(writes, self, ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest, **options)

    def watched_prepare(self, args, kwargs):
        args, kwargs = prepare(self, args, kwargs)
        extents[:] = [extent for argument in (*args, *kwargs.values()) for extent in _extents(argument)]
        return args, kwargs

    def watched_launch(self, *args, **kwargs):
        reads.clear()
        writes.clear()
        launch(self, *args, **kwargs)
        find_race()

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    executor._init_args_hst, executor.__call__ = watched_prepare, watched_launch
