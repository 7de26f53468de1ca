"""The config of a kernel: looked up on the host, before the launch.

`get_config(kernel, problem, gpu)` is the one place that chooses: what is pinned, else what was tuned on this machine
(user_cache.py), else what a table has for this GPU (shipped.py), for one of its architecture, or for the one most like it.
Nothing is ever timed here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..block_mask import TILE
from ..config import Config, pinned_config
from ..gpu import Gpu
from ..problem import Problem
from . import user_cache
from .key import key_of, precision, waves
from .shipped import FILLS, WIDTHS, Row, Table, shipped_tables
from .user_cache import Record

_observers: tuple[Callable, ...] = ()


def add_observer(watcher: Callable[[str, Problem, Gpu], None]) -> None:
    """Tell `watcher` of every lookup from now on, before it is answered. Process-wide, as pins are."""
    global _observers
    _observers += (watcher,)


@contextlib.contextmanager
def observed(watcher: Callable[[str, Problem, Gpu], None]):
    """The same inside the block alone."""
    global _observers
    add_observer(watcher)
    try:
        yield
    finally:
        _observers = tuple(other for other in _observers if other is not watcher)


def get_config(kernel: str, problem: Problem, gpu: Gpu) -> Config:
    """The config for this kernel of this problem on this GPU."""
    for watcher in _observers:
        watcher(kernel, problem, gpu)
    if (config := pinned_config(kernel)) is not None:
        return config
    return lookup_config(kernel, problem, gpu).config


@dataclass(frozen=True)
class Choice:
    """A config and where it comes from."""

    config: Config
    origin: str               # one of ORIGINS
    table: str | None = None  # the file in configs/
    row: Row | None = None
    fill: str | None = None   # which of the row's two: "many" or "few"
    record: Record | None = None  # of the user's cache


ORIGINS = {
    "cache": "tuned: the cache of this user",
    "table": "a shipped table of this very GPU",
    "architecture": "a shipped table of a GPU of this architecture",
    "family": "the shipped table of the architecture most like this one, as far as it fits",
    "formula": "one formula for all GPUs",
    "smallest": "the smallest tiles: nothing in the tables fits",
}


def lookup_config(kernel: str, problem: Problem, gpu: Gpu) -> Choice:
    """What is known, from the first of ORIGINS that has a config that fits; what is pinned does not count.

    What other processes tune meanwhile is not seen: within a process the answer stays the same unless this one tunes.
    """
    return _lookup_config(kernel, problem, gpu, precision(problem))


@functools.lru_cache(maxsize=4096)
def _lookup_config(kernel, problem, gpu, _precision):
    """`_precision` decides about records of float32, by way of their key."""
    if gpu.arch == "interpreter":
        # an interpreted step costs the same whatever its size
        return Choice(Config(64, 64), "formula")
    if kernel == "delta":
        width = max(problem.d, problem.dv)
        return Choice(Config(max(16, 8192 // max(64, 1 << (width - 1).bit_length())), 16, 4, 1), "formula")
    if (record := user_cache.current_cache().get(key_of(kernel, problem, gpu), gpu)) is not None:
        return Choice(Config.parse(record.config), "cache", record=record)
    return lookup_shipped(kernel, problem, gpu)


def clear_lookup_cache() -> None:
    """Look at the user's cache again: a record was put."""
    _lookup_config.cache_clear()


def lookup_shipped(kernel: str, problem: Problem, gpu: Gpu) -> Choice:
    """What the shipped tables have, for every kernel but delta."""
    return _lookup_shipped(tuple(row_keys(kernel, problem)), gpu_fill(kernel, problem, gpu), gpu)


@functools.lru_cache(maxsize=1024)
def _lookup_shipped(keys, first, gpu) -> Choice:
    """From the tables, by the keys of rows, the nearest first."""
    for origin, table in table_sources(gpu):
        row = next(filter(None, map(table.rows.get, keys)), None)
        for name in sorted(FILLS, key=lambda name: name != first) if row else ():
            entry = getattr(row, name)
            if entry.fits(gpu):
                return Choice(Config.parse(entry.config), origin, table.name, row, name)
    return Choice(Config(16, 16, 4, 1), "smallest")


def row_keys(kernel: str, problem: Problem) -> Iterator[tuple]:
    """The rows that serve this kernel of this problem: its own, or where a table has none a wider one, or one with edges."""
    size, mask = min(problem.dtype.itemsize, 4), mask_class(kernel, problem)
    for width in WIDTHS:
        if width >= max(problem.d, problem.dv):
            yield from ((kernel, size, width, other) for other in ((mask, "edges") if mask in ("full", "window") else (mask,)))


def mask_class(kernel: str, problem: Problem) -> str:
    """One of the tables' MASKS."""
    # with a map most tiles are walked without the mask; at small head sizes the plain tiles hold what that takes
    plain = problem.mapped and max(problem.d, problem.dv) <= 64 and not problem.lengths
    pairs = kernel == "dbias" or problem.bias is not None or problem.dropout or (problem.masked and not plain)
    if pairs or (kernel == "dkdv" and problem.lengths):
        return "pairs"
    if problem.window[0] is not None:
        return "window"
    walked = problem.n_q if kernel == "dkdv" else problem.n_k
    edges = problem.window != (None, None) or problem.lengths or problem.mapped or walked % TILE
    return "edges" if edges else "full"


def gpu_fill(kernel: str, problem: Problem, gpu: Gpu) -> str:
    """Whether blocks of TILE queries, or keys, give every SM something to do ("many") or not ("few")."""
    return "many" if waves(kernel, problem, gpu) >= 1 else "few"


def table_sources(gpu: Gpu) -> Iterator[tuple[str, Table]]:
    """Tables that may serve this GPU, with their origin, the nearest first."""
    like = closest_architecture(gpu)
    near = [table for table in shipped_tables() if table.gpu["arch"] == gpu.arch]
    yield from (("table", table) for table in near if table.is_of(gpu))
    yield from (("architecture", table) for table in near if not table.is_of(gpu))
    yield from (("family", table) for table in shipped_tables() if table.gpu["arch"] == like != gpu.arch)


def closest_architecture(gpu: Gpu) -> str:
    """The architecture that this one is like, of those with tables: the same tensor cores, at most its shared memory.

    RuntimeError: its tensor cores cannot do what the kernels ask.
    """
    if (gpu.is_amd and not gpu.arch.startswith(("gfx94", "gfx95"))) or (not gpu.is_amd and gpu.capability < 80):
        raise RuntimeError(f"GPU: expected NVIDIA from sm_80 on or AMD CDNA 3 or later, got {gpu.name} ({gpu.arch})")
    if gpu.is_amd:
        return "gfx942"
    if gpu.capability < 89:
        return "sm_80" if gpu.shared_memory >= 163 * 1024 else "sm_86"
    return next(f"sm_{known}" for known in (120, 100, 90, 89) if gpu.capability >= known)
