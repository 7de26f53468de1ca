"""What a GPU is, as far as running attention on it goes."""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is defined, and the kernels are defined when this package is imported
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True)
class Gpu:
    """One model of GPU, or Triton's interpreter."""

    name: str
    arch: str           # "sm_90", "gfx942", "interpreter"
    sms: int            # streaming multiprocessors, or compute units
    shared_memory: int  # bytes that one block may use

    tensor_memory: int = 0  # columns of it that one block may use, where there is such memory

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """Compute capability times ten: 90 for sm_90."""
        return int(self.arch.removeprefix("sm_"))


# Sources: CUDA C++ Programming Guide, "Technical Specifications"; AMD CDNA3 ISA guide; product pages.
INTERPRETER = Gpu("Triton's interpreter", "interpreter", 1, 1 << 40)
KNOWN = {gpu.arch: gpu for gpu in (
    Gpu("A100", "sm_80", 108, 163 * 1024),
    Gpu("A10", "sm_86", 72, 99 * 1024),
    Gpu("L40S", "sm_89", 142, 99 * 1024),
    Gpu("H200", "sm_90", 132, 227 * 1024),
    Gpu("B200", "sm_100", 148, 227 * 1024, 512),
    Gpu("RTX 5090", "sm_120", 170, 99 * 1024),
    Gpu("MI300X", "gfx942", 304, 64 * 1024),
)}


def of(device: torch.device) -> Gpu:
    """The GPU that runs kernels on tensors of this device."""
    return INTERPRETER if INTERPRETED else _properties(device.index)


@functools.cache
def _properties(index: int | None) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Gpu(found.name, found.gcnArchName.split(":")[0], found.multi_processor_count, found.shared_memory_per_block)
    arch = f"sm_{found.major}{found.minor}"
    tensor_memory = KNOWN["sm_100"].tensor_memory if found.major == 10 else 0
    return Gpu(found.name, arch, found.multi_processor_count, found.shared_memory_per_block_optin, tensor_memory)
