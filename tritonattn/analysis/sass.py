"""What a compiled kernel's binary holds, read without a GPU.

    cubin (ELF) -> registers and stack of each function -> SASS -> the loops over tiles -> instructions by kind
    amdgcn      -> the same, from the notes in the assembly and from its text

An instruction is its opcode with its modifiers, as the vendor's disassembler writes it: "HGMMA.64x128x16.F32.BF16".
"""

import collections
import functools
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass

import triton

# ELF64: where the header has the table of sections; and notes of NVIDIA's that hold (function, value)
_SECTIONS, _REGISTERS, _FRAME = 0x28, 0x2F, 0x11
_WITH_PAYLOAD = 4  # the format of a note that says its own length


@dataclass(frozen=True)
class Resources:
    """What one thread takes; on AMD, what a lane (vector registers) and a wave (scalar registers) take."""

    registers: int         # on AMD: vector registers, accumulation registers among them
    stack: int             # bytes of local memory: spilled registers, mostly
    accumulation: int = 0  # AMD alone: of the registers, those of the matrix cores' own kind
    scalar: int = 0        # AMD alone
    spilled: int = 0       # AMD alone: vector registers kept in memory, and scalar ones kept in lanes of others


def of_cubin(cubin: bytes) -> Resources:
    """The largest function's registers and stack, from the notes that the driver reads as well. ValueError: no such notes."""
    try:
        found = {_REGISTERS: {}, _FRAME: {}}
        for note, function, value in _notes(cubin):
            found.get(note, {})[function] = value
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"cubin: expected a whole ELF file, got {len(cubin)} bytes that end too early ({error})") from None
    if not found[_REGISTERS]:
        raise ValueError("cubin: expected notes on registers (.nv.info), got none: not NVIDIA's, or stripped")
    return Resources(max(found[_REGISTERS].values()), max(found[_FRAME].values(), default=0))


def _notes(cubin):
    """(note, function, value) of every note in .nv.info that holds two numbers."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError("it does not begin as one")
    table, = struct.unpack_from("<Q", cubin, _SECTIONS)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, start, length in sections:
        begin = sections[names][4] + name
        if cubin[begin:cubin.index(b"\0", begin)] != b".nv.info":
            continue
        at = start
        while at < start + length:
            form, note, payload = struct.unpack_from("<BBH", cubin, at)
            if form == _WITH_PAYLOAD and payload == 8:
                yield note, *struct.unpack_from("<II", cubin, at + 4)
            at += 4 + (payload if form == _WITH_PAYLOAD else 0)


def of_amdgcn(assembly: str) -> Resources:
    """From the notes at the end of the assembly. ValueError where they are missing."""
    def value(key):
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"amdgcn: expected the note .{key}, got none: cut off, or stripped")
        return int(found[1])

    return Resources(value("vgpr_count"), value("private_segment_fixed_size"), value("agpr_count"), value("sgpr_count"),
                     value("vgpr_spill_count") + value("sgpr_spill_count"))


def disassemble(cubin: bytes) -> str:
    """SASS, by the nvdisasm that Triton carries. ValueError: what it says of a file that it cannot read.

    Without its analysis of jumps by way of a stack, which kernels do not make and which takes up to a third of its time.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = run(triton.knobs.nvidia.nvdisasm.path, "-c", "--no-dataflow", file.name)
    if done.returncode:
        raise ValueError(f"cubin: expected one that nvdisasm reads, got: {done.stderr.strip() or done.returncode}")
    return done.stdout


def run(path: str, *arguments: str) -> subprocess.CompletedProcess:
    """One of the CUDA tools that Triton carries has run."""
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120)


# What an opcode is, by its beginning; the first that fits. NVIDIA's opcodes are upper case, AMD's lower.
KINDS = {
    "tensor": r"HMMA|HGMMA|UTC[HQIO]+MMA|[QIOD]G?MMA|v_s?mf?mac?_\w*\dx\d",
    "special": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "spill": r"STL|LDL|scratch_",
    "conversion": r"F2FP?|I2FP?|F2I|I2I|FRND|v_cvt_",
    "float": r"F(FMA|MUL|ADD)(32I|2)?\b|H(FMA|MUL|ADD)2|D(FMA|MUL|ADD)|v_(pk_)?(fma\w*|mul|add|sub|mac)_f(16|32|64)|v_ldexp",
    "select": r"FMNMX|FSEL|FSETP|FCHK|v_(pk_)?(max|min|med)3?_f|v_cmpx?_\w+_f|v_cndmask",
    "shuffle": r"SHFL|REDUX|VOTE|CREDUX|ds_(bpermute|permute|swizzle)|v_permlane|v_mov_b32_dpp",
    "shared": r"LDSM?\b|STSM?\b|ATOMS|ds_",
    "tensor memory": r"LDTM|STTM|UTCCP|UTCSHIFT|v_accvgpr",
    "tma": r"UTMA|UBLK",
    "barrier": r"BAR|WARPGROUP|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|UTCBAR|MEMBAR|FENCE|ERRBAR|BSSY|BSYNC|ELECT|CCTL|"
               r"s_barrier|s_waitcnt|s_nop|s_sleep|s_sched|buffer_(inv|wbl)",
    "global": r"LDG|STG|RED|ATOM|LD\b|ST\b|global_|buffer_|flat_",
    "control": r"BRA|BRX|JMP|EXIT|CALL|RET|NOP|BREAK|YIELD|NANOSLEEP|KILL|s_c?branch|s_endpgm|s_setprio",
    "uniform": r"U[A-Z]|R2UR|S2UR|LDCU?\b|s_|v_(read|write)\w*lane",
    "integer": r"",  # the rest: sums, logic, moves
}
_KIND = re.compile("|".join(f"(?P<k{i}>{pattern})" for i, pattern in enumerate(KINDS.values())))
_NAMES = {f"k{i}": name for i, name in enumerate(KINDS)}
_SASS = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_AMDGCN = re.compile(r"\s+([a-z]\w+)")
_LABEL = re.compile(r"\s*(\.L_x_\d+|\.LBB\d+_\d+):")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)|\bs_c?branch\w*\s+(\.LBB\d+_\d+)")


NAN_SAFE_RATIO = 0.6  # of the first loop's exponentials: what has fewer is careful


@functools.cache
def kind(opcode: str) -> str:
    """One of KINDS."""
    return _NAMES[_KIND.match(opcode).lastgroup]


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: what each warp (or wave) issues in one round of it."""

    instructions: tuple[str, ...]
    text: str = ""

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """How many instructions of each kind."""
        return dict(collections.Counter(map(kind, self.instructions)))

    @functools.cached_property
    def products(self) -> dict[str, int]:
        """Products of tiles by instruction and shape: {"HGMMA.64x128x16": 8}. UTCHMMA's shape is not in its text."""
        found = collections.Counter()
        for opcode in self.instructions:
            if kind(opcode) == "tensor":
                shaped = re.match(r"[A-Z]+(\.\d[\dx]*\b)?|v_s?mf?mac?_[a-z]\w*?\d+x\d+x\d+", opcode)
                found[shaped[0]] += 1
        return dict(found)

    @property
    def exponentials(self) -> int:
        return sum(opcode.startswith(("MUFU.EX2", "v_exp_f")) for opcode in self.instructions)

    @property
    def pipelined(self) -> bool:
        """Whether it copies ahead into shared memory, without a register between."""
        return any(opcode.startswith(("LDGSTS", "UTMALDG", "UBLKCP")) for opcode in self.instructions)

    @property
    def spills(self) -> int:
        return self.counts.get("spill", 0)

    @property
    def waits(self) -> int:
        """How often a round waits for warp-group products (Hopper)."""
        return sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in self.instructions)


def loops(text: str, stretches: int | None = None) -> tuple[Loop, ...]:
    """The loops over tiles in SASS or amdgcn: innermost ones with exponentials; the stretch without a mask comes first.

    That is the shortest of the pipelined ones, since edges may be left out of the pipeline. A careful loop
    (kernels/window.py) stands behind the others and takes smaller steps, so has fewer exponentials unless all have few; it
    hardly ever runs, and is left out. `stretches` says how many loops there are without it, where that is known.
    """
    lines = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    jumps = [(labels.get(match[1] or match[2]), i) for i, line in enumerate(lines) if (match := _JUMP.search(line))]
    ranges = [(start, end) for start, end in jumps if start is not None and start < end]
    # what the compiler moved behind a loop jumps back into it, which makes no loop; several jumps to one head make one
    ranges = [a for a in ranges if not any(b[0] < a[0] <= b[1] < a[1] for b in ranges)]
    ranges = sorted(dict(sorted(ranges)).items())
    innermost = [a for a in ranges if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
    opcode = _opcode_of(text)
    found = [Loop(tuple(match[1] for line in part if (match := opcode(line))), "\n".join(part))
             for part in (lines[start:end + 1] for start, end in innermost)]
    found = [loop for loop in found if loop.exponentials]
    chosen = [loop for loop in found if loop.exponentials > NAN_SAFE_RATIO * found[0].exponentials][:stretches]
    return tuple(sorted(chosen, key=lambda loop: (not loop.pipelined, len(loop.instructions))))


def spills(text: str) -> int:
    """Instructions that spill or refill a register, anywhere in SASS or amdgcn."""
    opcode = _opcode_of(text)
    return sum(kind(match[1]) == "spill" for line in text.splitlines() if (match := opcode(line)))


def _opcode_of(text):
    """What finds the opcode in a line. Each instruction of SASS has its offset before it, as a comment."""
    return _SASS.search if _SASS.search(text) else _AMDGCN.match


def partitions(sass: str) -> tuple[int, ...]:
    """Registers per thread of each warp-specialised partition, as they are set at its start; () where there are none."""
    return tuple(int(match[1], 16) for match in re.finditer(r"USETMAXREG[^;]*?(0x[0-9a-f]+)", sass))
