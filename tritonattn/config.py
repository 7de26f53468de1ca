"""How a problem is run: block sizes, warps, stages. A value, chosen before the launch and passed in.

`config.find(kernel, problem, gpu)` is the one place that chooses: what is pinned, else the rule.
"""

import contextlib
from dataclasses import dataclass

from .gpu import Gpu
from .problem import Problem

KERNELS = ("forward", "delta", "dq", "dkdv")


@dataclass(frozen=True)
class Config:
    """Queries and keys per tile, warps per program, and tiles in flight in the pipelined loop."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("block_m", "block_n", "num_warps", "num_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, least in (("block_m", 16), ("block_n", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two of at least {least}, got {value}")

    def __str__(self):
        return f"{self.block_m}x{self.block_n}w{self.num_warps}s{self.num_stages}"


_pinned: dict[str, Config] = {}


@contextlib.contextmanager
def pinned(config: Config | None = None, **kernels: Config):
    """Run every kernel with `config`, or those named with their own: `pinned(forward=Config(128, 64))`.

    For bug reports, tests and reproducible bits. Process-wide, since backward passes run in threads of their own;
    keep it open until the backward pass is done.
    """
    unknown = set(kernels) - set(KERNELS)
    if unknown:
        raise TypeError(f"pinned: expected kernels among {', '.join(KERNELS)}, got {', '.join(sorted(unknown))}")
    before = dict(_pinned)
    _pinned.update({kernel: config for kernel in KERNELS if config is not None} | kernels)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def find(kernel: str, problem: Problem, gpu: Gpu) -> Config:
    """The config for this kernel of this problem on this GPU."""
    return _pinned.get(kernel) or rule(kernel, problem, gpu)


# TODO: the rule
def rule(kernel, problem, gpu):
    if gpu.arch == "interpreter":
        return Config(64, 64)
    return Config(64, 64)
