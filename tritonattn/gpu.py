"""GPU models: limits that a kernel must not exceed, and peak rates for roofline estimates."""

import functools
import importlib.util
import os
import re
from dataclasses import dataclass, replace

import torch

TRITON = importlib.util.find_spec("triton") is not None
# read once: Triton reads it when a kernel is defined, which is when this package is imported
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

LARGEST_HEAD = 512  # of the kernels, in any dtype


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one GPU model at its specified clock, per clock and SM.

    Not included: the tensor cores' rates for TF32, for fp64 and for 8 bits and fewer; sparsity; the bandwidth of caches and
    shared memory; the power limit, which keeps the clock of large products below the specified one.
    """

    clock: float       # Hz, with the tensor cores busy
    tensor: int        # flop of dense 16-bit products with float32 sums
    exponentials: int  # base 2, float32
    fp32: int          # float32 instructions; a fused multiply-add is two flop
    bandwidth: float   # of the device's memory, bytes per second
    l2: int            # bytes
    memory: int        # bytes

    fp32_clock: float | None = None  # Hz, where the vendor specifies another with the tensor cores idle


@dataclass(frozen=True)
class Multiprocessor:
    """Resources that the blocks on one SM share; on AMD, the work-groups on one compute unit."""

    warps: int          # resident at most; on AMD waves
    blocks: int
    shared_memory: int  # bytes
    reserved: int = 1024         # bytes of shared memory that the driver takes for each block
    registers: int = 512         # per lane in each of the four register files
    granularity: int = 8         # step in which registers per lane are allocated
    lanes: int = 32              # threads of a warp

    def warps_with(self, registers: int) -> int:
        """Return how many warps with this many registers per thread are resident. An SM has four register files."""
        allocated = -(-max(registers, 1) // self.granularity) * self.granularity
        return min(4 * (self.registers // allocated), self.warps)


@dataclass(frozen=True)
class Gpu:
    """A GPU model, or Triton's interpreter."""

    name: str
    arch: str           # "sm_90", "gfx942", "interpreter"
    sms: int            # streaming multiprocessors, or compute units
    shared_memory: int  # bytes that one block may use

    tensor_memory: int = 0     # columns of tensor memory that one block may use
    l2: int | None = None      # bytes; None unless read from a device
    memory: int | None = None  # bytes; None unless read from a device

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """Return the compute capability times ten: 90 for sm_90."""
        return int(self.arch.removeprefix("sm_"))

    def largest_head(self, dtype: torch.dtype) -> int:
        """Return LARGEST_HEAD, or 256 where the float32 tiles of larger heads, up to 160 KiB, do not fit. AMD needs less."""
        too_small = dtype.itemsize > 2 and self.shared_memory < 160 * 1024 and not self.is_amd
        return 256 if too_small else LARGEST_HEAD

    @property
    def multiprocessor(self) -> Multiprocessor:
        """The limits of one SM: those of its architecture, or of the latest known one before it."""
        if self.is_amd:
            # later models have more shared memory, all of it usable by one block
            return replace(_COMPUTE_UNIT, shared_memory=max(_COMPUTE_UNIT.shared_memory, self.shared_memory))
        return _MULTIPROCESSORS[max((known for known in _MULTIPROCESSORS if known <= self.capability), default=80)]

    @property
    def peaks(self) -> Peaks | None:
        """Its peak rates, by its name; None for an unknown model or a part of one (MIG)."""
        known = find_gpu(self.name)
        return _PEAKS[known] if known and (known.arch, known.sms) == (self.arch, self.sms) else None


INTERPRETER = Gpu("Triton's interpreter", "interpreter", 1, 1 << 40)

# Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 ISA guide: 512 registers
# of both kinds per lane of a wave, four SIMDs of eight waves per compute unit.
_MULTIPROCESSORS = {  # by compute capability times ten
    80: Multiprocessor(64, 32, 164 * 1024), 86: Multiprocessor(48, 16, 100 * 1024), 87: Multiprocessor(48, 16, 164 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024), 90: Multiprocessor(64, 32, 228 * 1024), 100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}
_COMPUTE_UNIT = Multiprocessor(32, 32, 64 * 1024, reserved=0, lanes=64)  # of AMD

# Sources of the peaks:
#   clocks, bandwidth, memory   datasheets of A100, A10, L40S, H100, H200, HGX B200 and MI300X; NVIDIA's whitepapers on
#                               GA102, Ada, GH100 (it has both of Hopper's clocks) and RTX Blackwell. A GB of memory is
#                               2^30 bytes, as drivers count; one of bandwidth is 10^9
#   tensor                      derived: TFLOP/s / (SMs x clock), always a power of two. GeForce has half the rate with
#                               float32 sums. B200's clocks are in turn derived from 2,250 and 75 TFLOP/s
#   exponentials, fp32          CUDA C++ Programming Guide, "Arithmetic Instructions". MI300X: LLVM's scheduling model has
#                               exponentials at a quarter of the 64 lanes' rate; packed instructions fill each lane twice
#   l2                          the whitepapers, the Blackwell tuning guide. H200: as the device reports it. L40S: its chip's,
#                               AD102. MI300X: eight of 4 MB, each for an eighth of the compute units; the 256 MB behind
#                               them are not counted
_PEAKS = {
    Gpu("A100", "sm_80", 108, 163 * 1024): Peaks(1.41e9, 2048, 16, 64, 2.039e12, 40 << 20, 80 << 30),
    Gpu("RTX 3090", "sm_86", 82, 99 * 1024): Peaks(1.695e9, 512, 16, 128, 0.936e12, 6 << 20, 24 << 30),
    Gpu("A10", "sm_86", 72, 99 * 1024): Peaks(1.695e9, 1024, 16, 128, 0.600e12, 6 << 20, 24 << 30),
    Gpu("RTX 4090", "sm_89", 128, 99 * 1024): Peaks(2.52e9, 512, 16, 128, 1.008e12, 72 << 20, 24 << 30),
    Gpu("L40S", "sm_89", 142, 99 * 1024): Peaks(2.52e9, 1024, 16, 128, 0.864e12, 96 << 20, 48 << 30),
    Gpu("H100", "sm_90", 132, 227 * 1024): Peaks(1.83e9, 4096, 16, 128, 3.35e12, 50 << 20, 80 << 30, fp32_clock=1.98e9),
    Gpu("H200", "sm_90", 132, 227 * 1024): Peaks(1.83e9, 4096, 16, 128, 4.80e12, 60 << 20, 141 << 30, fp32_clock=1.98e9),
    Gpu("B200", "sm_100", 148, 227 * 1024, 512):
        Peaks(1.856e9, 8192, 16, 128, 7.70e12, 126 << 20, 180 << 30, fp32_clock=1.98e9),
    Gpu("RTX 5090", "sm_120", 170, 99 * 1024): Peaks(2.407e9, 512, 16, 128, 1.792e12, 96 << 20, 32 << 30),
    Gpu("MI300X", "gfx942", 304, 64 * 1024): Peaks(2.1e9, 2048, 16, 128, 5.30e12, 32 << 20, 192 << 30),
}
# one GPU for each architecture: the last one listed
KNOWN = {gpu.arch: gpu for gpu in _PEAKS}

# words of a device's name that do not distinguish models; "PCIe", "NVL", "40GB" and "Ti" do
_GENERIC_WORDS = {"NVIDIA", "GEFORCE", "AMD", "INSTINCT", "SXM", "SXM4", "SXM5", "OAM", "80GB", "HBM3", "VF"}


def named(name: str) -> Gpu:
    """Return the known GPU of this name ("h200", "NVIDIA A100-SXM4-80GB"). Raises ValueError, which lists the known ones."""
    if (known := find_gpu(name)) is None:
        raise ValueError(f"expected a GPU out of {', '.join(gpu.name for gpu in _PEAKS)}; got {name!r}")
    return known


@functools.lru_cache(maxsize=256)
def find_gpu(name: str) -> Gpu | None:
    """Return the known GPU with this device name, in any case and spacing, or None."""
    return next((gpu for gpu in _PEAKS if _core(gpu.name) == _core(name)), None)


def _core(name):
    return "".join(word for word in re.findall(r"[A-Z0-9]+", name.upper()) if word not in _GENERIC_WORDS)


def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU that runs kernels on tensors of this device."""
    return INTERPRETER if INTERPRETED else _properties(device.index)


@functools.cache
def _properties(index: int | None) -> Gpu:
    device = torch.cuda.get_device_properties(index)
    sizes = getattr(device, "L2_cache_size", None), device.total_memory
    if torch.version.hip:
        arch = device.gcnArchName.split(":")[0]
        return Gpu(device.name, arch, device.multi_processor_count, device.shared_memory_per_block, 0, *sizes)
    arch = f"sm_{device.major}{device.minor}"
    tensor_memory = KNOWN["sm_100"].tensor_memory if device.major in (10, 11) else 0
    return Gpu(device.name, arch, device.multi_processor_count, device.shared_memory_per_block_optin, tensor_memory, *sizes)
