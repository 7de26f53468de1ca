"""Reports of compiled kernels, made without a GPU: Triton compiles for any GPU on any machine.

    problem + config + GPU -> binary -> registers, spills, memory, blocks per SM, instructions of the loops over tiles
"""

import functools
import math
import os
import re
from dataclasses import dataclass, replace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ..config import Config
from ..configs.key import precision
from ..configs.lookup import closest_architecture
from ..gpu import Gpu
from ..kernels.tile import has_two_parts, main_width, tail_width
from ..problem import Problem
from ..runtime import launch
from . import sass
from .races import find_race
from .sass import Loop

# the fastest MMA instruction of each architecture
MMA_INSTRUCTIONS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # elsewhere HMMA
TENSOR_ROWS, TENSOR_COLUMNS = 128, 256  # of one UTCHMMA, whose shape is not in its text


@dataclass(frozen=True)
class KernelReport:
    """Resources and loops of one compiled kernel. Registers are per thread, memory is in bytes per block."""

    kernel: str
    problem: Problem
    gpu: Gpu
    config: Config
    registers: int
    stack: int           # local memory of a thread: spilled registers, mostly
    shared_memory: int
    tensor_memory: int   # columns
    accumulation: int = 0              # AMD: registers that only the matrix cores use, counted in `registers` too
    scalar: int = 0                    # AMD: registers of a wave
    spilled: int = 0                   # AMD: spilled registers, to memory or to lanes of other registers
    precision: str | None = None       # of float32 products: "ieee" or "tf32"
    loops: tuple[Loop, ...] = ()       # over tiles, the one without a mask first
    race: str | None = None            # Hopper: the first race in the machine code
    part: str | None = None            # of dK/dV in two passes: "dv" or "dk", if the loops are those of one pass

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.config.num_warps * self.gpu.multiprocessor.lanes

    @property
    def fits(self) -> bool:
        return self.shared_memory <= self.gpu.shared_memory and self.tensor_memory <= self.gpu.tensor_memory

    @property
    def loop_spills(self) -> int:
        """Instructions that spill or refill inside a loop over tiles: the most that one loop has."""
        return max((loop.spills for loop in self.loops), default=0)

    @functools.cached_property
    def passes(self) -> tuple["KernelReport", ...]:
        """A report of each pass of dK/dV in two passes, with its loops; otherwise this report.

        Where one pass has loops that were not found, there are too few products for one pass too.
        """
        if self.part or self.kernel != "dkdv" or not self.config.two_passes or not self.loops or len(self.loops) % 2:
            return (self,)
        # dK has three products of tiles, dV two
        by_work, half = sorted(self.loops, key=_work), len(self.loops) // 2
        return tuple(replace(self, part=part, loops=loops)
                     for part, loops in zip(launch.PASSES, (tuple(by_work[:half]), tuple(by_work[half:]))))

    @property
    def serialized(self) -> bool:
        """True if, on Hopper, a loop waits for each of its warp-group MMAs separately (C7510 to C7515 of ptxas).

        In a pipelined loop, all MMA instructions of one product of tiles share one wait.
        """
        for each in self.passes:
            for loop in each.loops:
                issued = sum(count for name, count in loop.products.items() if name.startswith("HGMMA"))
                if issued > len(each.products) and loop.waits >= issued:
                    return True
        return False

    @functools.cached_property
    def blocks_by_resource(self) -> dict[str, int]:
        """Blocks of this kernel that each resource of an SM allows."""
        sm, warps = self.gpu.multiprocessor, self.config.num_warps
        allowed = {"warps": sm.warps // warps, "blocks": sm.blocks, "registers": sm.warps_with(self.registers) // warps}
        if self.shared_memory:
            allowed["shared memory"] = sm.shared_memory // (self.shared_memory + sm.reserved)
        if self.tensor_memory:
            allowed["tensor memory"] = self.gpu.tensor_memory // self.tensor_memory
        return allowed

    @property
    def occupancy(self) -> int:
        """Blocks of this kernel that run on one SM at a time."""
        return min(self.blocks_by_resource.values())

    @property
    def occupancy_limiter(self) -> str:
        """The resource that limits the occupancy."""
        return min(self.blocks_by_resource, key=self.blocks_by_resource.get)

    @property
    def mma_instruction(self) -> str:
        """The MMA instructions of the loops, such as "HGMMA"; "" if there are none."""
        names = {re.match(r"[A-Z]+|v_s?mfma", name)[0] for loop in self.loops for name in loop.products
                 if not self._is_sum(loop, name)}
        return "+".join(sorted(names))

    def _is_sum(self, loop: Loop, name: str) -> bool:
        """Return whether these MMAs of a loop only add up weights: from registers, beside a faster MMA instruction.

        Two warps may add up the same weights. A product of two tiles would take at least four times as many.
        """
        return (name.startswith("HMMA") and self.best_mma_instruction != "HMMA"
                and flops(name) * loop.products[name] * self.config.num_warps <= 2 * self.sum_flops)

    @property
    def best_mma_instruction(self) -> str:
        """The fastest MMA instruction of this GPU for this dtype; "" for IEEE float32 products, which use FMAs."""
        if self.precision == "ieee" and not self.gpu.is_amd:
            return ""
        return MMA_INSTRUCTIONS.get(closest_architecture(self.gpu), "HMMA")

    @property
    def duplicated(self) -> float:
        """MMA work in one iteration of the loop, as a multiple of what the tile needs; ideally 1.

        With two passes, the larger value.
        """
        if len(self.passes) == 2:
            return max(each.duplicated for each in self.passes)
        loop, warps = self.loops[0], self.config.num_warps
        if "UTCHMMA" in loop.products:
            # one instruction covers 32 bytes of K
            depth = 32 // self.problem.dtype.itemsize
            needed = sum(math.ceil(m / TENSOR_ROWS) * math.ceil(n / TENSOR_COLUMNS) * k // depth for m, n, k in self.products)
            return loop.products["UTCHMMA"] / needed
        return sum(flops(name) * count for name, count in loop.products.items()) * warps / self.needed

    @property
    def redone(self) -> float:
        """Exponentials in one iteration of the loop, as a multiple of those that the scores of the tile need; ideally 1, and 1
        where they need none, or a score function may need some. With two passes, the larger value.
        """
        if len(self.passes) == 2:
            return max(each.redone for each in self.passes)
        tile = self.config.block_m * self.config.block_n
        needed = self.problem.softcap + (self.problem.normalizer != "relu")  # of each score
        needed *= self.problem.score_function is None
        return self.loops[0].exponentials * self.threads / (needed * tile) if needed else 1.0

    @property
    def products(self) -> tuple[tuple[int, int, int], ...]:
        """The products of tiles [M, K] by [K, N] in one iteration, as (M, N, K); head sizes are padded."""
        return self._products(parts(self.problem.d), parts(self.problem.dv))

    def _products(self, ds, dvs):
        m, n = self.config.block_m, self.config.block_n
        scores = tuple((m, n, d) for d in ds)
        return {
            "forward": (*scores, *((m, dv, n) for dv in dvs)),
            "dq": (*scores, *((m, n, dv) for dv in dvs), *((m, d, n) for d in ds)),
            "dkdv": (*((n, m, d) for d in ds + dvs), *((n, d, m) for d in dvs + ds)),
            "dv": (*((n, m, d) for d in ds), *((n, d, m) for d in dvs)),
            "dk": (*((n, m, d) for d in ds + dvs), *((n, d, m) for d in ds)),
            "dbias": (*scores, *((m, n, dv) for dv in dvs)),
            "diagonals": tuple((n // 2, n, d) for d in ds + dvs),
            "key_mass": scores,
            "mass_delta": scores,
            "delta": (),
        }[self.part or self.kernel]

    @property
    def needed(self) -> int:
        """Floating-point operations of `products` and of the sum of weights."""
        return sum(2 * m * n * k for m, n, k in self.products) + self.sum_flops

    @property
    def sum_flops(self) -> int:
        """Floating-point operations with which tensor cores add up the weights of a tile, in 8 columns."""
        summed = self.config.mma_sum and self.kernel == "forward" and self.problem.dtype.itemsize == 2
        summed = summed and self.problem.normalizer == "softmax"
        return 2 * self.config.block_m * 8 * self.config.block_n if summed else 0

    @property
    def useful(self) -> int:
        """Floating-point operations of the products without padding."""
        return sum(2 * m * n * k for m, n, k in self._products((self.problem.d,), (self.problem.dv,)))


def inspect_kernel(kernel: str, problem: Problem, config: Config, gpu: Gpu) -> KernelReport:
    """Compile one kernel (one of config.KERNELS) for a GPU and read its binary.

    Raises ValueError for a binary that cannot be read, RuntimeError if the kernels are interpreted, and Triton's own errors
    if it cannot compile the kernel.
    """
    compiled = compile_kernel(kernel, problem, config, gpu)
    if gpu.is_amd:
        text = compiled.asm["amdgcn"]
        resources = sass.resources_of_amdgcn(text)
    else:
        text = sass.disassemble(compiled.asm["cubin"])
        resources = sass.resources_of_cubin(compiled.asm["cubin"])
    example = launch.example_launch(kernel, problem, config)
    modes = example.arguments[-1].LOOP_MODES.value
    stretches, on_cores = example.passes * (len(modes) - modes.count(None)), precision(problem) == "ieee" and not gpu.is_amd
    loops = sass.loops(text, stretches or None, example.passes, "float" if on_cores else "tensor")
    return KernelReport(kernel, problem, gpu, config, shared_memory=compiled.metadata.shared,
                        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0, precision=precision(problem),
                        loops=loops, race=find_race(text, config.num_warps) if gpu.arch == "sm_90" else None, **resources)


def compile_kernel(kernel: str, problem: Problem, config: Config, gpu: Gpu):
    """Compile a kernel for the arguments of a real launch; `.asm` of the result holds every intermediate form."""
    return _compile_cached(kernel, problem, config, gpu, precision(problem))


@functools.lru_cache(maxsize=64)
def _compile_cached(kernel, problem, config, gpu, _precision):
    """Compile once per argument list. `_precision` is only a part of the cache's key: the launch reads torch's setting."""
    return compile_launch(launch.example_launch(kernel, problem, config), gpu)


def compile_launch(launched: launch.KernelLaunch, gpu: Gpu):
    """Compile what this launch runs on a GPU, into Triton's cache on disk, where the launch finds it."""
    if not isinstance(launched.kernel, JITFunction):
        raise RuntimeError("the kernels are interpreted and cannot be compiled; start Python without TRITON_INTERPRET")
    target = GPUTarget("hip", gpu.arch, 64) if gpu.is_amd else GPUTarget("cuda", gpu.capability, 32)
    backend = make_backend(target)
    options = launch.compile_options(launched.config) | {"debug": False}
    bind = create_function_from_signature(launched.kernel.signature, launched.kernel.params, backend)
    bound, specialization, _ = bind(*launched.arguments, **options)
    options, signature, constants, attributes = launched.kernel._pack_args(backend, options, bound, specialization, None)
    return triton.compile(ASTSource(launched.kernel, signature, constants, attributes), target=target, options=options.__dict__)


def ptxas_remarks(kernel: str, problem: Problem, config: Config, gpu: Gpu) -> list[str]:
    """Return the performance remarks of ptxas ("C7510: Potential Performance Loss: wgmma ... serialized ..."), a line each.

    Triton discards them, so ptxas runs once more.
    """
    if gpu.is_amd:
        return []
    from triton.backends.nvidia.compiler import get_ptxas  # Triton chooses between two

    ptx = compile_kernel(kernel, problem, config, gpu).asm["ptx"]
    arch = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    output = sass.run_tool(get_ptxas(gpu.capability), ptx.encode(), "-v", f"--gpu-name={arch}", "-o", os.devnull)
    return [line.split(": ", 1)[-1] for line in output.splitlines() if "Performance" in line]


def _work(loop: Loop) -> tuple[int, int]:
    """Return a measure of the products in an iteration, to compare loops of one binary: of MMAs, or of all instructions."""
    mma = sum(count * (flops(name) or 1) for name, count in loop.products.items())
    return mma, 0 if mma else len(loop.instructions)


def flops(product: str) -> int:
    """Return the floating-point operations that each warp contributes to one MMA: 2 x 16 x 8 x 16 for "HMMA.16816"."""
    numbers = re.search(r"(\d+)x(\d+)x(\d+)", product)
    if numbers:
        # the four warps of a warp group share one HGMMA
        return 2 * math.prod(map(int, numbers.groups())) // (4 if product.startswith("HGMMA") else 1)
    return {"16816": 2 * 16 * 8 * 16, "1688": 2 * 16 * 8 * 8, "1684": 2 * 16 * 8 * 4}.get(product.split(".")[-1], 0)


def parts(size: int) -> tuple[int, ...]:
    """Return the widths of the parts in which a tile holds a head of this size."""
    return (main_width(size), tail_width(size)) if has_two_parts(size) else (main_width(size),)


def padded(size: int) -> int:
    """Return the columns that a head of this size takes in a tile."""
    return sum(parts(size))
