"""How a problem is run: block sizes, warps, stages. A value, chosen before the launch and passed in.

`config.find(kernel, problem, gpu)` is the one place that chooses: what is pinned, else the rule.
"""

import contextlib
import functools
import re
from dataclasses import dataclass, replace

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


def find(kernel: str, problem: Problem, gpu: Gpu) -> Config:
    """The config for this kernel of this problem on this GPU."""
    for layer in reversed(_pinned):
        if kernel in layer:
            return layer[kernel]
    return rule(kernel, problem, gpu)


# Chosen by what the compiler makes of them (`lens`): the largest tiles that spill nothing in the loop and fit.
# One config for head sizes up to each of WIDTHS; {bytes of the dtype: {family of GPUs: {kernel: configs}}}.
# Above 256, and above 128 in float32, nothing fits into the registers: those configs are the ones that spill least.
WIDTHS = (64, 96, 128, 192, 256, 512)
RULE = {
    2: {
        "sm_80": {
            "forward": "128x128w8s2 128x128w8s2 128x64w8s3 64x64w4s3 64x64w8s1 32x32w4s2",
            "dq": "128x64w8s2 128x64w8s2 64x64w4s2 128x32w8s2 64x32w4s2 16x32w4s1",
            "dkdv": "64x128w8s2 32x128w8s2 32x64w4s2 32x32w4s2 32x64w8s1 16x16w4s1",
        },
        "sm_86": {
            "forward": "128x64w8s2 128x128w8s2 128x64w8s3 128x32w8s2 64x64w8s1 32x32w4s1",
            "dq": "128x64w8s2 128x64w8s2 64x64w4s2 64x32w4s2 32x32w4s2 16x32w4s1",
            "dkdv": "32x128w8s2 32x64w4s2 32x64w4s2 32x32w4s2 32x32w4s2 16x16w4s1",
        },
        "sm_90": {
            "forward": "128x128w8s2 128x128w8s2 128x128w8s2 128x64w8s3 128x32w8s2 16x32w4s1",
            "dq": "128x64w8s2 128x64w8s2 128x64w8s2 128x64w8s2 128x32w8s2 16x32w4s1",
            "dkdv": "64x128w8s2 32x128w8s2 32x128w8s2 32x64w8s2 32x64w8s2 16x32w8s1",
        },
        "sm_100": {
            "forward": "128x64w8s3 128x64w8s3 128x64w8s3 128x64w8s3 128x32w8s2 16x32w4s1",
            "dq": "128x64w8s2 128x64w8s2 128x64w8s2 64x64w4s2 64x32w4s2 16x32w4s1",
            "dkdv": "64x128w8s2 64x128w8s2 64x128w8s2 32x32w4s2 32x32w4s2 16x32w8s1",
        },
        "gfx942": {
            "forward": "128x64w8s3 128x64w8s2 128x64w8s2 64x64w4s2 64x32w4s2 32x32w4s1",
            "dq": "128x64w4s2 128x64w4s2 128x64w4s2 64x32w4s2 64x32w4s2 16x32w4s1",
            "dkdv": "32x64w4s2 32x64w4s2 32x32w4s2 32x32w4s1 32x32w4s1 16x16w4s1",
        },
    },
    4: {
        "sm_80": {
            "forward": "64x32w8s2 64x32w8s2 32x32w4s2 32x32w8s1 32x32w8s1 16x16w4s1",
            "dq": "64x32w8s2 32x32w8s1 32x32w8s1 16x32w4s1 16x32w4s1 16x16w4s1",
            "dkdv": "32x32w8s1 32x32w8s1 32x32w8s1 16x32w8s1 16x32w8s1 16x16w8s1",
        },
        "sm_86": {
            "forward": "64x32w8s2 32x32w8s1 32x32w8s1 32x32w8s1 32x32w8s1 16x16w4s1",
            "dq": "64x32w8s2 16x32w4s1 16x32w4s1 16x32w4s1 16x16w4s1 16x16w4s1",
            "dkdv": "32x32w8s1 32x32w8s1 32x32w8s1 16x32w4s1 16x16w4s1 16x16w8s1",
        },
    },
}

# where something is read or drawn for each pair: smaller tiles, the same on every family
PAIRS_RULE = {
    2: {
        "forward": "128x32w8s1 64x32w8s1 64x32w8s1 64x32w4s1 32x32w4s1 16x32w4s1",
        "dq": "128x32w8s1 128x32w8s1 64x32w8s1 32x32w4s1 32x32w4s1 16x32w4s1",
        "dkdv": "32x64w8s1 32x64w8s1 32x32w4s1 32x32w4s1 32x32w4s1 16x16w4s1",
        "dbias": "64x64w8s1 64x64w8s1 64x64w8s1 32x32w4s1 32x32w4s1 16x16w4s1",
    },
    4: {
        "forward": "32x32w4s1 32x32w4s1 32x32w4s1 16x32w4s1 16x16w4s1 16x16w4s1",
        "dq": "32x32w4s1 32x32w4s1 32x32w4s1 16x32w4s1 16x16w4s1 16x16w4s1",
        "dkdv": "32x32w8s1 32x32w8s1 16x32w4s1 16x32w4s1 16x16w4s1 16x16w4s1",
        "dbias": "32x32w4s1 32x32w4s1 32x32w4s1 16x32w4s1 16x16w4s1 16x16w4s1",
    },
}


@functools.cache
def rule(kernel: str, problem: Problem, gpu: Gpu) -> Config:
    """A config that fits, from the head sizes, the dtype and the GPU alone: the same whatever the batch and lengths."""
    if gpu.arch == "interpreter":
        # an interpreted step costs the same whatever its size
        return Config(64, 64)
    width = max(problem.d, problem.dv)
    if kernel == "delta":
        return Config(max(16, 8192 // max(64, 1 << (width - 1).bit_length())), 16, 4, 1)
    size = min(problem.dtype.itemsize, 4)
    like = family(gpu, RULE[size])
    with_pairs = kernel == "dbias" or problem.bias is not None or problem.masked or problem.dropout
    with_pairs |= kernel == "dkdv" and problem.lengths
    configs = (PAIRS_RULE[size] if with_pairs else RULE[size][like])[kernel].split()
    found = Config.parse(configs[next(i for i, limit in enumerate(WIDTHS) if width <= limit)])
    # on Hopper alone: elsewhere a loop out of the pipeline gains nothing and takes registers
    return replace(found, edge_stages=1) if like == "sm_90" and kernel != "dbias" else found


def family(gpu: Gpu, known) -> str:
    """Which of the known GPUs this one is like: the same tensor cores, and at most its shared memory."""
    if (gpu.is_amd and not gpu.arch.startswith(("gfx94", "gfx95"))) or (not gpu.is_amd and gpu.capability < 80):
        raise RuntimeError(f"GPU: expected NVIDIA from sm_80 on or AMD CDNA 3 or later, got {gpu.name} ({gpu.arch})")
    if gpu.is_amd:
        like = "gfx942"
    elif 90 <= gpu.capability < 120:
        like = "sm_90" if gpu.capability < 100 else "sm_100"
    else:
        like = "sm_80" if gpu.shared_memory >= 163 * 1024 else "sm_86"
    return like if like in known else "sm_86"
