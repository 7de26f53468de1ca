"""The contents of a compiled kernel's binary, read without a GPU.

    cubin  -> registers, stack (cuobjdump), SASS (nvdisasm) -> the loops over tiles -> instructions by kind
    amdgcn -> the same, from the notes in the assembly and from its text

An instruction is its opcode with its modifiers, as the vendor's disassembler writes it: "HGMMA.64x128x16.F32.BF16".
"""

import collections
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

# fields of KernelReport, by their names in cuobjdump's output and in amdgcn's notes
_USAGE = {"registers": "REG", "stack": "STACK"}
_NOTES = {"registers": ["vgpr_count"], "stack": ["private_segment_fixed_size"], "accumulation": ["agpr_count"],
          "scalar": ["sgpr_count"], "spilled": ["vgpr_spill_count", "sgpr_spill_count"]}


def resources_of_cubin(cubin: bytes) -> dict[str, int]:
    """Return the fields of KernelReport that cuobjdump shows, of the largest function. Raises ValueError if it shows none."""
    usage = run_tool(triton.knobs.nvidia.cuobjdump, cubin, "-res-usage")
    if "REG:" not in usage:
        raise ValueError(f"cuobjdump: expected the resources of a kernel, got: {usage.strip()[-300:]}")
    return {field: max(map(int, re.findall(rf"\b{name}:(\d+)", usage))) for field, name in _USAGE.items()}


def resources_of_amdgcn(assembly: str) -> dict[str, int]:
    """Return the fields of KernelReport in the notes at the end of AMD's assembly. Raises ValueError if one is missing."""
    notes = dict(re.findall(r"\.(\w+):\s+(\d+)", assembly))
    if missing := [name for names in _NOTES.values() for name in names if name not in notes]:
        raise ValueError(f"amdgcn: expected the note .{missing[0]}, got none: cut off, or stripped")
    return {field: sum(int(notes[name]) for name in names) for field, names in _NOTES.items()}


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a cubin. Raises ValueError if nvdisasm cannot read it.

    The dataflow analysis is off: it resolves indirect jumps, which kernels do not have, and takes up to a third of the time.
    """
    return run_tool(triton.knobs.nvidia.nvdisasm, cubin, "-c", "--no-dataflow")


def run_tool(tool: triton.knobs.NvidiaTool, content: bytes, *options: str) -> str:
    """Return what a CUDA tool that comes with Triton prints about a file. Raises ValueError, with its output, if it fails."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([tool.path, *options, file.name], capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    if done.returncode:
        raise ValueError(f"{Path(tool.path).name}: expected a file that it can read, got: {output.strip()[-300:]}")
    return output


# Kinds of instructions by the prefix of the opcode; the first match counts. NVIDIA's are upper case, AMD's lower.
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
NAN_SAFE_RATIO = 0.6  # of the first loop's exponentials: a loop with fewer is a nan_safe one


@functools.cache
def kind(opcode: str) -> str:
    """Return the kind of an instruction, one of KINDS."""
    return _NAMES[_KIND.match(opcode).lastgroup]


@dataclass(frozen=True)
class Loop:
    """The instructions that each warp (or wave) issues in one iteration of a loop."""

    instructions: tuple[str, ...]
    text: str = ""

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """The number of instructions of each kind."""
        return dict(collections.Counter(map(kind, self.instructions)))

    @functools.cached_property
    def products(self) -> dict[str, int]:
        """The number of MMAs by instruction and shape: {"HGMMA.64x128x16": 8}. UTCHMMA's shape is not in its text."""
        counts = collections.Counter()
        for opcode in self.instructions:
            if kind(opcode) == "tensor":
                shaped = re.match(r"[A-Z]+(\.\d[\dx]*\b)?|v_s?mf?mac?_[a-z]\w*?\d+x\d+x\d+", opcode)
                counts[shaped[0]] += 1
        return dict(counts)

    @property
    def exponentials(self) -> int:
        return sum(opcode.startswith(("MUFU.EX2", "v_exp_f")) for opcode in self.instructions)

    @property
    def pipelined(self) -> bool:
        """True if the loop copies asynchronously from global to shared memory."""
        return any(opcode.startswith(("LDGSTS", "UTMALDG", "UBLKCP")) for opcode in self.instructions)

    @property
    def spills(self) -> int:
        return self.counts.get("spill", 0)

    @property
    def waits(self) -> int:
        """The number of waits for warp-group MMAs in one iteration (Hopper)."""
        return sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in self.instructions)

    def beside_products(self, prefixes: tuple[str, ...] = ("",)) -> float:
        """Return the share of these instructions that a warp issues while a warp-group MMA of its own runs (Hopper).

        An MMA runs from its issue to the wait for all MMAs, which may come in the next iteration.
        """
        counted = beside = 0
        running = False
        for turn in range(2):  # the first one shows what runs at the start
            for opcode, line in zip(self.instructions, filter(_SASS.search, self.text.splitlines())):
                if opcode.startswith("HGMMA"):
                    running = True
                elif opcode.startswith("WARPGROUP.DEPBAR") and line.split(";")[0].rstrip().endswith(" 0x0"):
                    running = False
                if turn == 1 and opcode.startswith(prefixes):
                    counted, beside = counted + 1, beside + running
        return beside / counted if counted else 0.0

    @property
    def softmax_beside_products(self) -> float:
        """The share of maxima and exponentials that are issued while a product of the same warp runs (Hopper)."""
        return self.beside_products(("MUFU.EX2", "FMNMX"))


def loops(text: str, stretches: int | None = None, passes: int = 1, product: str = "tensor") -> tuple[Loop, ...]:
    """Return the loops over tiles in SASS or amdgcn: innermost loops with exponentials, the one without a mask first.

    The loop without a mask is the shortest of the pipelined ones, since masked loops may not be pipelined. The nan_safe loop
    (kernels/window.py) is left out, since it hardly ever runs: it follows the others, with two passes those of its pass, and
    has fewer exponentials, because its tiles are smaller. `stretches` is the number of loops without it, if known.

    Where no loop has exponentials, as in ReLU attention, these are the loops with products, instructions of the kind `product`;
    then a nan_safe loop is recognized by its place.
    """
    lines = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    jumps = [(labels.get(match[1] or match[2]), i) for i, line in enumerate(lines) if (match := _JUMP.search(line))]
    ranges = [(start, end) for start, end in jumps if start is not None and start < end]
    # a block that was moved behind a loop jumps back into it: this is no loop. Several jumps to one head are one loop
    ranges = [a for a in ranges if not any(b[0] < a[0] <= b[1] < a[1] for b in ranges)]
    ranges = sorted(dict(sorted(ranges)).items())
    innermost = [a for a in ranges if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
    # in SASS, a comment with the offset precedes every instruction
    opcode = _SASS.search if _SASS.search(text) else _AMDGCN.match
    every_loop = [Loop(tuple(match[1] for line in part if (match := opcode(line))), "\n".join(part))
                  for part in (lines[start:end + 1] for start, end in innermost)]
    if with_exponentials := [loop for loop in every_loop if loop.exponentials]:
        fewest = NAN_SAFE_RATIO * with_exponentials[0].exponentials
        over_tiles = [loop for loop in with_exponentials if loop.exponentials > fewest][:stretches]
    else:
        over_tiles = _loops_with_products(every_loop, stretches, passes, product)
    return tuple(sorted(over_tiles, key=lambda loop: (not loop.pipelined, len(loop.instructions))))


def _loops_with_products(every_loop, stretches, passes, product):
    """Return the first `stretches` loops with products, of each pass its share: a nan_safe loop follows those of its pass."""
    # products of float32 are multiply-adds, of which other loops have few
    counts = [loop.counts.get(product, 0) for loop in every_loop]
    found = [loop for loop, count in zip(every_loop, counts) if count > max(counts) / 8]
    of_pass, share = len(found) // passes, stretches and stretches // passes
    return [loop for i in range(passes) for loop in found[i * of_pass:(i + 1) * of_pass][:share]]
