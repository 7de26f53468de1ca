"""The choice of a kernel's config, on the host and before the launch. Nothing is timed here.

`get_config(kernel, problem, gpu)` returns the first of: the pinned config (config.py), the config tuned on this machine
(user_cache.py), the shipped table of this GPU (shipped.py), of its architecture, of the closest architecture.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..block_mask import TILE
from ..config import Config, pinned_config, pins
from ..gpu import Gpu
from ..problem import Problem
from . import user_cache
from .key import key_of, precision, waves
from .shipped import FILLS, WIDTHS, Row, Table, shipped_tables
from .user_cache import Record

# called with (kernel, problem, gpu) before every lookup, in every thread of the process; a repeated call does no lookup
observers: list[Callable[[str, Problem, Gpu], None]] = []
_open_blocks: list = []  # of `observed`
_versions = itertools.count(1)
_version = 0             # of the results; changes whenever a lookup may return another config than before


@contextlib.contextmanager
def observed(observer: Callable[[str, Problem, Gpu], None]):
    """Call `observer` before every lookup within the block, in which repeated calls look up again."""
    observers.append(observer)
    _open_blocks.append(observer)
    try:
        yield
    finally:
        _open_blocks.remove(observer)
        observers.remove(observer)


def version() -> tuple | None:
    """Return a value that equals an earlier one only if lookups give the same results as then; None while they are observed."""
    return None if _open_blocks else (_version, pins())


def new_version() -> None:
    """Make the next call of every kind look up its configs again, even if it repeats an earlier call."""
    global _version
    _version = next(_versions)


def get_config(kernel: str, problem: Problem, gpu: Gpu) -> Config:
    """Return the config for a kernel of a problem on a GPU. Raises RuntimeError for an unsupported GPU."""
    for observer in tuple(observers):
        observer(kernel, problem, gpu)
    if (config := pinned_config(kernel)) is not None:
        return config
    return lookup_config(kernel, problem, gpu).config


@dataclass(frozen=True)
class ConfigChoice:
    """A config and its origin."""

    config: Config
    origin: str                   # one of ORIGINS
    table: str | None = None      # name of a file in configs/data/
    row: Row | None = None
    fill: str | None = None       # which of the row's two entries: one of FILLS
    record: Record | None = None  # of the user cache


SIMILAR = {"key_mass": "dkdv", "mass_delta": "dq"}  # kernels with the loop of another one, and fewer products: its config fits
UNTUNED = ("delta", "diagonals", *SIMILAR)          # kernels that no table holds
ORIGINS = {
    "cache": "tuned on this machine (user cache)",
    "table": "the shipped table of this GPU",
    "architecture": "the shipped table of a GPU of the same architecture",
    "closest architecture": "the shipped table of the closest architecture, where the config fits",
    "formula": "one formula for all GPUs",
    "similar": "that of dK/dV or dQ, whose loop is similar",
    "smallest": "the smallest tiles, because no config of the tables fits",
}


def lookup_config(kernel: str, problem: Problem, gpu: Gpu) -> ConfigChoice:
    """Return the config of the first origin that has one that fits. Pinned configs are not considered.

    The result is cached until this process tunes. Until then, records that other processes write have no effect.
    """
    # TF32 is a global setting, and has keys of its own in the user cache
    return _lookup_config(kernel, problem, gpu, precision(problem))


@functools.lru_cache(maxsize=4096)
def _lookup_config(kernel, problem, gpu, _precision):
    if gpu.arch == "interpreter":
        # an interpreted step costs the same for every tile size
        return ConfigChoice(Config(64, 64), "formula")
    if kernel in SIMILAR:
        return ConfigChoice(_lookup_config(SIMILAR[kernel], problem, gpu, _precision).config, "similar")
    if kernel == "delta":
        width = max(problem.d, problem.dv)
        return ConfigChoice(Config(max(16, 8192 // max(64, 1 << (width - 1).bit_length())), 16, 4, 1), "formula")
    if kernel == "diagonals":
        return ConfigChoice(_diagonals_config(problem.dtype.itemsize, max(problem.d, problem.dv), gpu), "formula")
    if (record := user_cache.current_cache().get(key_of(kernel, problem, gpu), gpu)) is not None:
        return ConfigChoice(record.config, "cache", record=record)
    return lookup_shipped(kernel, problem, gpu)


def _diagonals_config(itemsize, size, gpu):
    """Return the config with the most keys per tile whose binaries do not spill, or hardly."""
    row = itemsize * size
    if gpu.is_amd:
        # smaller tiles would compute products twice
        return Config(64, 128, 8, 1) if row <= 512 else Config(16, 32, 2, 1)
    keys = 16 if row > 1024 else 32 if row > 512 or itemsize > 2 else 64
    return Config(max(16, keys // 2), keys, 4, 1)


def clear_lookup_cache() -> None:
    """Forget all results, so that the next lookup reads the user cache again. Call it after Cache.put."""
    _lookup_config.cache_clear()
    new_version()


def lookup_shipped(kernel: str, problem: Problem, gpu: Gpu) -> ConfigChoice:
    """Return the config that the shipped tables have for a kernel that is not UNTUNED.

    Tries the tables and the row keys in order of preference, and in each row the entry of the other fill last.
    """
    keys, fill = tuple(row_keys(kernel, problem)), gpu_fill(kernel, problem, gpu)
    for origin, table in table_sources(gpu):
        row = next(filter(None, map(table.rows.get, keys)), None)
        for name in sorted(FILLS, key=lambda name: name != fill) if row else ():
            entry = getattr(row, name)
            if entry.fits(gpu):
                return ConfigChoice(entry.config, origin, table.name, row, name)
    return ConfigChoice(Config(16, 16, 4, 1), "smallest")


def row_keys(kernel: str, problem: Problem) -> Iterator[tuple]:
    """Yield the keys of the rows that can serve a problem, best first: its own, one with edges, then those of wider heads."""
    itemsize, mask = min(problem.dtype.itemsize, 4), mask_class(kernel, problem)
    masks = (mask, "edges") if mask in ("full", "window") else (mask,)
    if problem.softcap and mask != "pairs":
        masks = ("softcap", *masks)
    for width in WIDTHS:
        if width >= max(problem.d, problem.dv):
            yield from ((kernel, itemsize, width, each) for each in masks)


def mask_class(kernel: str, problem: Problem) -> str:
    """Return the class of a problem's mask, one of shipped.MASKS."""
    # a block mask leaves most tiles unmasked; at small head sizes the registers of "edges" configs suffice for the others
    light_mask = problem.mapped and max(problem.d, problem.dv) <= 64 and not problem.lengths
    biased = kernel == "dbias" or problem.bias is not None or problem.relative or problem.score_function is not None
    pairwise = biased or problem.dropout or (problem.masked and not light_mask)
    if pairwise or (kernel == "dkdv" and problem.lengths):
        return "pairs"
    if problem.window[0] is not None:
        return "window"
    loop_length = problem.n_q if kernel == "dkdv" else problem.n_k
    ragged = problem.lengths or problem.packed is not None or loop_length % TILE
    edges = problem.window != (None, None) or problem.mapped or ragged
    return "edges" if edges else "full"


def gpu_fill(kernel: str, problem: Problem, gpu: Gpu) -> str:
    """Return "filled" if there is at least one block of TILE queries (of keys for dK/dV) per SM, else "underfilled"."""
    return "filled" if waves(kernel, problem, gpu) >= 1 else "underfilled"


def table_sources(gpu: Gpu) -> Iterator[tuple[str, Table]]:
    """Yield (origin, table) for the tables that may serve a GPU, best first."""
    closest = closest_architecture(gpu)
    same = [table for table in shipped_tables() if table.gpu["arch"] == gpu.arch]
    yield from (("table", table) for table in same if table.matches(gpu))
    yield from (("architecture", table) for table in same if not table.matches(gpu))
    yield from (("closest architecture", table) for table in shipped_tables() if table.gpu["arch"] == closest != gpu.arch)


def closest_architecture(gpu: Gpu) -> str:
    """Return the architecture with a table that has the same tensor cores and at most the shared memory of this GPU.

    Raises RuntimeError if the kernels do not support the GPU.
    """
    if (gpu.is_amd and not gpu.arch.startswith(("gfx94", "gfx95"))) or (not gpu.is_amd and gpu.capability < 80):
        raise RuntimeError(f"GPU: expected NVIDIA from sm_80 on or AMD CDNA 3 or later, got {gpu.name} ({gpu.arch})")
    if gpu.is_amd:
        return "gfx942"
    if gpu.capability < 89:
        return "sm_80" if gpu.shared_memory >= 163 * 1024 else "sm_86"
    return next(f"sm_{known}" for known in (120, 100, 90, 89) if gpu.capability >= known)
