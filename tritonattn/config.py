"""How a problem is run: block sizes, warps, stages. A value, chosen before the launch and passed in.

`config.find(kernel, problem, gpu)` is the one place that chooses: what is pinned, else what was tuned on this machine
(cache.py), else what a table has for this GPU (tables.py), for one of its architecture, or for the one most like it.
Nothing is ever timed here.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .block_mask import TILE
from .configs import user_cache
from .configs.key import key_of, precision, waves
from .configs.shipped import FILLS, WIDTHS, Row, Table, shipped
from .configs.user_cache import Record
from .gpu import Gpu
from .problem import Problem

KERNELS = ("forward", "delta", "dq", "dkdv", "dbias")


@dataclass(frozen=True)
class Config:
    """Queries and keys per tile, warps per program, and tiles in flight in the pipelined loop.

    edge_stages=1 leaves the last stretch of a masked loop out of the pipeline (kernels/window.py says why).
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    edge_stages: int | None = None

    def __post_init__(self):
        for name in ("block_m", "block_n", "num_warps", "num_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.edge_stages not in (None, 1):
            raise ValueError(f"edge_stages: expected 1 or None, got {self.edge_stages!r}")
        for name, least in (("block_m", 16), ("block_n", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two of at least {least}, got {value}")

    @staticmethod
    def parse(text: str) -> "Config":
        """The config that prints as `text`: "128x64w8s3" is Config(128, 64, num_warps=8, num_stages=3)."""
        match = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)(?:e(1))?", text)
        if not match:
            raise ValueError(f"config: expected the form 128x64w8s3, got {text!r}")
        return Config(*(int(number) for number in match.groups() if number))

    def __str__(self):
        return f"{self.block_m}x{self.block_n}w{self.num_warps}s{self.num_stages}" + ("e1" if self.edge_stages else "")


_pinned: list[dict[str, Config]] = []  # the innermost last


@contextlib.contextmanager
def pinned(config: Config | None = None, **kernels: Config):
    """Run every kernel with `config`, or those named with their own: `pinned(forward=Config(128, 64))`.

    For bug reports, tests and reproducible bits. Process-wide, since backward passes run in threads of their own;
    keep it open until the backward pass is done.
    """
    unknown = set(kernels) - set(KERNELS)
    if unknown:
        raise TypeError(f"pinned: expected kernels among {', '.join(KERNELS)}, got {', '.join(sorted(unknown))}")
    layer = {kernel: config for kernel in KERNELS if config is not None} | kernels
    for value in layer.values():
        if not isinstance(value, Config):
            raise TypeError(f"pinned: expected a Config, got {value!r}; Config.parse reads the printed form")
    _pinned.append(layer)
    try:
        yield
    finally:
        # by identity: blocks of different threads may overlap
        _pinned[:] = [other for other in _pinned if other is not layer]


_watchers: tuple[Callable, ...] = ()


def watch(watcher: Callable[[str, Problem, Gpu], None]) -> None:
    """Tell `watcher` of every lookup from now on, before it is answered. Process-wide, as pins are."""
    global _watchers
    _watchers += (watcher,)


@contextlib.contextmanager
def watched(watcher: Callable[[str, Problem, Gpu], None]):
    """The same inside the block alone."""
    global _watchers
    watch(watcher)
    try:
        yield
    finally:
        _watchers = tuple(other for other in _watchers if other is not watcher)


def find(kernel: str, problem: Problem, gpu: Gpu) -> Config:
    """The config for this kernel of this problem on this GPU."""
    for watcher in _watchers:
        watcher(kernel, problem, gpu)
    if _pinned and (config := pin(kernel)) is not None:
        return config
    return choose(kernel, problem, gpu).config


def pin(kernel: str) -> Config | None:
    """The config that the innermost `pinned` has for this kernel."""
    return next((layer[kernel] for layer in reversed(_pinned) if kernel in layer), None)


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


def choose(kernel: str, problem: Problem, gpu: Gpu) -> Choice:
    """What is known, from the first of ORIGINS that has a config that fits; what is pinned does not count.

    What other processes tune meanwhile is not seen: within a process the answer stays the same unless this one tunes.
    """
    return _choose(kernel, problem, gpu, precision(problem))


@functools.lru_cache(maxsize=4096)
def _choose(kernel, problem, gpu, _precision):
    """`_precision` decides about records of float32, by way of their key."""
    if gpu.arch == "interpreter":
        # an interpreted step costs the same whatever its size
        return Choice(Config(64, 64), "formula")
    if kernel == "delta":
        width = max(problem.d, problem.dv)
        return Choice(Config(max(16, 8192 // max(64, 1 << (width - 1).bit_length())), 16, 4, 1), "formula")
    if (record := user_cache.current().get(key_of(kernel, problem, gpu), gpu)) is not None:
        return Choice(Config.parse(record.config), "cache", record=record)
    return from_tables(kernel, problem, gpu)


def forget() -> None:
    """Look at the user's cache again: a record was put."""
    _choose.cache_clear()


def from_tables(kernel: str, problem: Problem, gpu: Gpu) -> Choice:
    """What the shipped tables have, for every kernel but delta."""
    return _shipped(tuple(keys(kernel, problem)), fill(kernel, problem, gpu), gpu)


@functools.lru_cache(maxsize=1024)
def _shipped(keys, first, gpu) -> Choice:
    """From the tables, by the keys of rows, the nearest first."""
    for origin, table in sources(gpu):
        row = next(filter(None, map(table.rows.get, keys)), None)
        for name in sorted(FILLS, key=lambda name: name != first) if row else ():
            entry = getattr(row, name)
            if entry.fits(gpu):
                return Choice(Config.parse(entry.config), origin, table.name, row, name)
    return Choice(Config(16, 16, 4, 1), "smallest")


def keys(kernel: str, problem: Problem) -> Iterator[tuple]:
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


def fill(kernel: str, problem: Problem, gpu: Gpu) -> str:
    """Whether blocks of TILE queries, or keys, give every SM something to do ("many") or not ("few")."""
    return "many" if waves(kernel, problem, gpu) >= 1 else "few"


def sources(gpu: Gpu) -> Iterator[tuple[str, Table]]:
    """Tables that may serve this GPU, with their origin, the nearest first."""
    like = family(gpu)
    near = [table for table in shipped() if table.gpu["arch"] == gpu.arch]
    yield from (("table", table) for table in near if table.is_of(gpu))
    yield from (("architecture", table) for table in near if not table.is_of(gpu))
    yield from (("family", table) for table in shipped() if table.gpu["arch"] == like != gpu.arch)


def family(gpu: Gpu) -> str:
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
