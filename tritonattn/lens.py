"""What the compiler made of a kernel, on any machine: no GPU is needed to compile for one.

    problem + config + GPU -> binary -> registers, spills, shared memory, instructions of the inner loops
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import launch
from .config import Config
from .gpu import Gpu
from .problem import Problem

EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
SPILL = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes. Counts are per thread, memory in bytes."""

    kernel: str
    gpu: Gpu
    config: Config
    registers: int
    stack: int           # local memory: spilled registers, mostly
    loop_spills: int     # instructions that spill or refill inside a loop over tiles
    shared_memory: int   # per block
    tensor_memory: int   # columns, per block
    serialized: bool = False  # on Hopper: a loop over tiles waits for every product by itself (ptxas' remark C7515)

    @property
    def fits(self) -> bool:
        return self.shared_memory <= self.gpu.shared_memory and self.tensor_memory <= self.gpu.tensor_memory


def inspect(kernel: str, problem: Problem, config: Config, gpu: Gpu) -> Report:
    """Compile one kernel ("forward", "delta", "dq", "dkdv") for a GPU and read its binary."""
    binary = compile(kernel, problem, config, gpu)
    loops = []
    if gpu.is_amd:
        registers, stack, spills = _read_amdgcn(binary.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            loops = tile_loops(_tool("nvdisasm", "-c", file.name))
        spills = max((len(SPILL.findall(loop)) for loop in loops), default=0)
    tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
    return Report(kernel, gpu, config, registers, stack, spills, binary.metadata.shared, tensor_memory,
                  any(map(serialized, loops)))


def compile(kernel: str, problem: Problem, config: Config, gpu: Gpu, residual: bool = True):
    """Triton's compiled kernel, with every intermediate form in `.asm`; the arguments are those of a real launch."""
    call = launch.example_call(kernel, problem, config, residual)
    if not isinstance(call.kernel, JITFunction):
        raise RuntimeError("lens: expected compilable kernels, got interpreted ones; start Python without TRITON_INTERPRET")
    target = GPUTarget("hip", gpu.arch, 64) if gpu.is_amd else GPUTarget("cuda", gpu.capability, 32)
    backend = make_backend(target)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "debug": False}
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, backend)
    bound, specialization, _ = bind(*call.arguments, **options)
    options, signature, constants, attributes = call.kernel._pack_args(backend, options, bound, specialization, None)
    return triton.compile(ASTSource(call.kernel, signature, constants, attributes), target=target, options=options.__dict__)


def tile_loops(sass: str) -> list[str]:
    """The loops over tiles in a disassembly, as text: the innermost ones with the most exponentials.

    A careful loop (kernels/window.py) takes smaller steps, so fewer; it hardly ever runs, and is left out.
    """
    lines = sass.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
    jumps = [(labels.get(match[1]), i) for i, line in enumerate(lines) if (match := JUMP.search(line))]
    loops = [(start, end) for start, end in jumps if start is not None and start < end]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    texts = ["\n".join(lines[start:end + 1]) for start, end in innermost]
    most = max((len(EXPONENTIAL.findall(text)) for text in texts), default=0)
    return [text for text in texts if most and len(EXPONENTIAL.findall(text)) == most]


def serialized(loop: str) -> bool:
    """Whether each warp-group product of a loop has a wait of its own.

    As it should be, all instructions of one product A B^T share one; a loop has at most four such products, of which each
    is often several instructions.
    """
    products, waits = len(re.findall(r"\bHGMMA\b", loop)), len(re.findall(r"\bWARPGROUP\.DEPBAR\b", loop))
    return products > 4 and waits >= products


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that Triton carries."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, timeout=120).stdout


def _read_amdgcn(assembly: str) -> tuple[int, int, int]:
    """Vector registers, scratch bytes and spilled vector registers."""
    def value(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return value("vgpr_count"), value("private_segment_fixed_size"), value("vgpr_spill_count")
