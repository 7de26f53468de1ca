"""Races in Hopper's machine code (SASS), found by following every path from a warp-group product.

    HGMMA R88, R152, gdesc[..], R88     issued: it reads R152.. and shared memory, and writes R88.., some time later
    WARPGROUP.DEPBAR.LE gsb0, 0x0       complete for this warp group
    BAR.SYNC                            done for every warp group: the tile in shared memory may be overwritten

ptxas before 13.3 may use a product's registers again too early (triton-lang/triton#11781), Triton may leave out the barrier
(triton-lang/triton#9484). The analysis follows every path, so it may also report races that cannot happen.

SASS does not show which memory a product reads: its address is in a descriptor. A copy (LDGSTS) always fills a tile. A store
(STS) may write to scratch memory, or to another tile than the product's. So it counts only if a fence makes it visible to
products, and if no barrier separates it from any product of its loop, since one of them reads it.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_REGISTER = re.compile(r"R(\d+)")
_WIDTHS = {"LDSM": 4, "CS2R": 2, "DADD": 2, "DMUL": 2, "DFMA": 2}  # registers that an instruction writes at most
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")  # of the next tile


class Instruction(NamedTuple):
    """One instruction: its address, opcode, operands, and the indices of those that may follow it."""

    address: str
    opcode: str
    operands: list[str]
    following: list[int]


def find_race(text: str, num_warps: int) -> str | None:
    """Describe the first race in a kernel's SASS, or return None. A single warp group, of four warps, needs no barrier."""
    program = parse(text)
    return register_race(program) or (unguarded_copy(program) or unguarded_store(program) if num_warps > 4 else None)


def register_race(program: list[Instruction]) -> str | None:
    """Describe the first register of a product that is written before the product is done, or return None."""
    for i, product in enumerate(program):
        if not product.opcode.startswith("HGMMA"):
            continue
        used = _registers(product.operands[0], int(re.search(r"64x(\d+)x", product.opcode)[1]) // 2)
        used |= _registers(product.operands[1], 4)
        for j in _reached(program, i, _is_wait):
            if overwritten := used & _written(program[j]):
                return f"R{min(overwritten)} of the product at {product.address} is written at {program[j].address}"
    return None


def unguarded_copy(program: list[Instruction]) -> str | None:
    """Describe the first copy to shared memory that no barrier separates from the wait for a product, or return None."""
    for i, wait in enumerate(program):
        if _is_wait(wait):
            for j in _reached(program, i, _is_barrier):
                if program[j].opcode.startswith(_COPIES):
                    return f"shared memory is written at {program[j].address}, without a barrier since {wait.address}"
    return None


def unguarded_store(program: list[Instruction]) -> str | None:
    """Describe the first store of a tile that no barrier separates from any product of its loop, or return None."""
    unguarded = {i: set(_reached(program, i, _is_barrier)) for i, product in enumerate(program)
                 if product.opcode.startswith("HGMMA")}
    after = functools.cache(lambda i: set(_reached(program, i)))
    for j in sorted(set().union(*unguarded.values())):
        if program[j].opcode.startswith("STS") and any(program[i].opcode.startswith("FENCE.VIEW.ASYNC")
                                                       for i in _reached(program, j, _is_barrier)):
            loop = [i for i in unguarded.keys() & after(j) if j in after(i)]
            if loop and all(j in unguarded[i] for i in loop):
                return (f"shared memory is written at {program[j].address}, without a barrier since the products up to "
                        f"{program[max(loop)].address}")
    return None


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a function's SASS, in order."""
    rows, labels = [], {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(rows)
        elif match := _INSTRUCTION.search(line):
            rows.append(match.groups())
    program = []
    for i, (address, condition, opcode, operands) in enumerate(rows):
        following = [i + 1]
        if opcode.startswith(("BRA", "EXIT")):
            # a predicate or a register before the label is a condition too: BRA P0, BRA.DIV UR5
            if not condition and re.match(r"`|$", operands):
                following = []
            following += [labels[name] for name in re.findall(r"`\((\.L_x_\d+)\)", operands)]
        # commas inside brackets do not separate operands
        program.append(Instruction(address, opcode, re.split(r",\s*(?![^\[]*\])", operands),
                                   [j for j in following if j < len(rows)]))
    return program


def _reached(program: list[Instruction], start: int,
             ends: Callable[[Instruction], bool] = lambda instruction: False) -> Iterator[int]:
    """Yield the indices of instructions that may run after `start`, on each path up to the first for which `ends` holds."""
    seen, waiting = set(), list(program[start].following)
    while waiting:
        if (i := waiting.pop()) in seen:
            continue
        seen.add(i)
        if not ends(program[i]):
            yield i
            waiting += program[i].following


def _is_wait(instruction: Instruction) -> bool:
    """Return whether an instruction waits for all products."""
    return instruction.opcode.startswith("WARPGROUP.DEPBAR") and instruction.operands[-1] == "0x0"


def _is_barrier(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("BAR")


def _written(instruction: Instruction) -> set[int]:
    """Return the registers that an instruction writes at once; a product writes its own later."""
    opcode = instruction.opcode
    if opcode.startswith(("HGMMA", "PLOP3")) or "SETP" in opcode:
        return set()
    # predicates that an instruction also writes stand first
    first = next((x for x in instruction.operands if not re.fullmatch(r"!?U?P(T|\d)", x)), "")
    wide = 4 if ".128" in opcode else 2 if re.search(r"\.64|WIDE", opcode) else 1
    return _registers(first, _WIDTHS.get(opcode.split(".")[0], wide))


def _registers(operand: str, count: int) -> set[int]:
    """Return `count` registers from the one that an operand names; none if it is no register."""
    match = _REGISTER.match(operand)
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()
