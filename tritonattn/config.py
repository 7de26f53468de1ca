"""Config: block sizes, warps and stages of a kernel. Looked up before a launch (configs/lookup.py) and passed in."""

import contextlib
import re
import threading
from dataclasses import dataclass

KERNELS = ("forward", "delta", "dq", "dkdv", "dbias", "diagonals", "key_mass", "mass_delta")


@dataclass(frozen=True)
class Config:
    """Block sizes, warps and stages of one kernel.

    Raises ValueError unless block sizes are powers of two from 16 on, and num_warps a power of two.

    edge_stages=1 keeps the masked end of a loop out of the software pipeline (see kernels/window.py).

    ahead starts a product before the exponentials, which then run beside it, for more registers: in the forward kernel the
    scores of the next tile, in dK/dV the gradient of the weights of this tile. The other kernels ignore it. mma_sum lets
    tensor cores add up the 16-bit weights that V is multiplied with, in the forward kernel. two_passes lets half of the
    programs of dK/dV compute dV and the others dK: five products of tiles instead of four, and one accumulator in each
    program instead of two. Other kernels ignore it.
    """

    block_m: int         # queries per tile
    block_n: int         # keys per tile
    num_warps: int = 4   # per program
    num_stages: int = 2  # tiles in flight in the pipelined loop
    edge_stages: int | None = None
    ahead: bool = False
    mma_sum: bool = False
    two_passes: bool = False

    def __post_init__(self):
        for name in ("block_m", "block_n", "num_warps", "num_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name in ("ahead", "mma_sum", "two_passes"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.edge_stages not in (None, 1):
            raise ValueError(f"edge_stages: expected 1 or None, got {self.edge_stages!r}")
        for name, least in (("block_m", 16), ("block_n", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two of at least {least}, got {value}")

    @staticmethod
    def parse(text: str) -> "Config":
        """Return the config printed as `text`: "128x64w8s3" is Config(128, 64, num_warps=8, num_stages=3).

        After that may come e1 for edge_stages=1, a for ahead, m for mma_sum and p for two_passes: "128x64w8s3e1am".
        """
        match = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)(?:e(1))?(a?)(m?)(p?)", text)
        if not match:
            raise ValueError(f"config: expected the form 128x64w8s3, got {text!r}")
        *numbers, ahead, mma_sum, two_passes = match.groups()
        return Config(*(int(number) for number in numbers if number), ahead=bool(ahead), mma_sum=bool(mma_sum),
                      two_passes=bool(two_passes))

    def __str__(self):
        flags = {"e1": self.edge_stages, "a": self.ahead, "m": self.mma_sum, "p": self.two_passes}
        sizes = f"{self.block_m}x{self.block_n}w{self.num_warps}s{self.num_stages}"
        return sizes + "".join(flag for flag, is_set in flags.items() if is_set)


_pinned: list[dict[str, Config]] = []  # the innermost last
_pins: tuple = ()  # the config in force for each kernel, () without any
_lock = threading.Lock()


@contextlib.contextmanager
def pinned(config: Config | None = None, **kernels: Config):
    """Run every kernel with `config`, or each named kernel with its own: `pinned(forward=Config(128, 64))`.

    For bug reports, tests and reproducible bits. Process-wide, since autograd runs backward passes in other threads;
    keep it open until the backward pass is done.

    Raises:
        TypeError: a name that is no kernel's, or a value that is no Config.
    """
    unknown = set(kernels) - set(KERNELS)
    if unknown:
        raise TypeError(f"pinned: expected kernels among {', '.join(KERNELS)}, got {', '.join(sorted(unknown))}")
    layer = {kernel: config for kernel in KERNELS if config is not None} | kernels
    for value in layer.values():
        if not isinstance(value, Config):
            raise TypeError(f"pinned: expected a Config, got {value!r}; Config.parse reads the printed form")
    _change_pins(lambda: _pinned.append(layer))
    try:
        yield
    finally:
        # by identity, since blocks of different threads may overlap
        _change_pins(lambda: _pinned.pop(next(i for i, other in enumerate(_pinned) if other is layer)))


def _change_pins(change):
    global _pins
    with _lock:
        change()
        _pins = tuple(map(pinned_config, KERNELS)) if _pinned else ()


def pinned_config(kernel: str) -> Config | None:
    """Return the config of the innermost `pinned` with this kernel, or None."""
    return next((layer[kernel] for layer in reversed(_pinned) if kernel in layer), None)


def pins() -> tuple:
    """Return the pinned config of every kernel, or () where none is pinned."""
    return _pins
