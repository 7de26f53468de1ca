"""Races in SASS: planted ones are found, and a product that is waited for is none."""

import collections

import pytest

from tritonattn.analysis import races

# two products and the copy of the next tile, as in the loop over keys of the forward pass
LOOP = """
.L_x_1:
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0120*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0130*/                   MUFU.EX2 R152, R24 ;
        /*0140*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR20].tnspB, R88, gsb0 ;
        /*0150*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0160*/                   LDGSTS.E.BYPASS.128 [R222], desc[UR16][R190.64], !P5 ;
        /*0170*/               @P0 BRA `(.L_x_1) ;
        /*0180*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0190*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*01a0*/                   STS.128 [R67+UR6], R88 ;
        /*01b0*/                   EXIT ;
"""


def test_a_product_that_is_waited_for_is_no_race():
    assert races.register_race(races.parse(LOOP)) is None and races.unguarded_copy(races.parse(LOOP)) is None


@pytest.mark.parametrize("planted, register", [
    ("MOV R152, R2", 152), ("MOV R155, R2", 155), ("LDS.128 R150, [R4]", 150), ("IMAD.WIDE R154, R4, 0x2, R6", 154),
    ("LDSM.16.M88.4 R149, [R4]", 149), ("MOV R88, R2", 88), ("FADD R151, R2, R3", 151),
    ("SHFL.BFLY PT, R153, R4, 0x1, 0x1f", 153),
])
def test_a_register_that_is_written_too_early_is_found(planted, register):
    text = LOOP.replace("        /*0150*/", f"        /*0148*/                   {planted} ;\n        /*0150*/")
    assert races.register_race(races.parse(text)) == f"R{register} of the product at 0140 is written at 0148"


@pytest.mark.parametrize("planted", [
    "MOV R156, R2", "STS.128 [R152], R4", "FSETP.GT.AND P1, PT, R152, R3, PT", "R2UR UR4, R152", "LDS.128 R156, [R4]",
    "PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x0",
])
def test_reads_and_other_registers_are_no_race(planted):
    text = LOOP.replace("        /*0150*/", f"        /*0148*/                   {planted} ;\n        /*0150*/")
    assert races.register_race(races.parse(text)) is None


def test_the_next_round_is_followed():
    """The write stands before the product in the text, and runs after it."""
    text = LOOP.replace("        /*0110*/", "        /*0108*/                   MOV R153, R2 ;\n        /*0110*/")
    assert races.register_race(races.parse(text)) == "R153 of the product at 0140 is written at 0108"


def without(address):
    return "\n".join(line for line in LOOP.splitlines() if f"/*{address}*/" not in line)


def test_a_refill_without_a_barrier_is_found():
    expected = "shared memory is written at 0160, without a barrier since 0120"
    assert races.unguarded_copy(races.parse(without("0150"))) == expected
    assert races.find_race(without("0150"), num_warps=8) == expected
    assert races.find_race(without("0150"), num_warps=4) is None, "a single warp group"


def test_a_store_behind_the_loop_is_no_refill():
    """The epilogue stores to memory of its own."""
    assert races.find_race(without("0190"), num_warps=8) is None


def loop_of(*instructions):
    """Return the SASS of a loop; "FENCE" and "BAR" are short forms."""
    short = {"FENCE": "FENCE.VIEW.ASYNC.S", "BAR": "BAR.SYNC.DEFER_BLOCKING 0x0", "STS": "STS.128 [R67+UR6], R8",
             "HGMMA": "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0", "WAIT": "WARPGROUP.DEPBAR.LE gsb0, 0x0"}
    lines = (*instructions, "@P0 BRA `(.L_x_1)", "EXIT")
    return ".L_x_1:\n" + "\n".join(f"/*{16 * i:04x}*/ {short.get(x, x)} ;" for i, x in enumerate(lines))


@pytest.mark.parametrize("loop, race", [
    (["STS", "FENCE", "BAR", "HGMMA", "WAIT", "HGMMA", "WAIT"], True),
    (["BAR", "STS", "FENCE", "BAR", "HGMMA", "WAIT", "HGMMA", "WAIT"], False),
    # K and V are stored apart: every warp group has read K before V's barrier
    (["STS", "FENCE", "BAR", "HGMMA", "WAIT", "STS", "FENCE", "BAR", "HGMMA", "WAIT"], False),
    # scratch memory: other threads read it behind a barrier, and no product does
    (["HGMMA", "WAIT", "STS", "BAR", "LDS R4, [R5]", "FENCE", "BAR"], False),
])
def test_a_store_to_a_tile_without_a_barrier_since_any_product_is_found(loop, race):
    expected = f"shared memory is written at 0000, without a barrier since the products up to {16 * 5:04x}" if race else None
    assert races.find_race(loop_of(*loop), num_warps=8) == expected
    assert races.find_race(loop_of(*loop), num_warps=4) is None


@pytest.mark.parametrize("branch, following", [
    ("BRA `(.L_x_1)", [0]), ("@P0 BRA `(.L_x_1)", [2, 0]), ("BRA !UP1, `(.L_x_1)", [2, 0]),
    ("BRA.DIV UR5, `(.L_x_1)", [2, 0]), ("BRA.DIV ~URZ, `(.L_x_1)", [2, 0]), ("EXIT", []), ("@!P2 EXIT", [2])])
def test_branches(branch, following):
    text = ".L_x_1:\n" + "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(["NOP", branch, "NOP"]))
    assert races.parse(text)[1].following == following


def test_a_kernel_is_parsed_once_and_followed_once_from_each_product(monkeypatch):
    """Stores and products are many, and each path is as long as the kernel."""
    calls = collections.Counter()

    def parse(text, real=races.parse):
        calls["parse"] += 1
        return real(text)

    def reached(program, start, *ends, real=races._reached):
        calls[(start, *ends)] += 1
        return real(program, start, *ends)

    monkeypatch.setattr(races, "parse", parse)
    monkeypatch.setattr(races, "_reached", reached)
    # the second product runs behind a barrier: no store is a race
    text = loop_of(*["STS"] * 5, "FENCE", "BAR", "HGMMA", "WAIT", "BAR", "HGMMA", "WAIT")
    assert races.find_race(text, num_warps=8) is None
    assert calls["parse"] == 1 and calls[7,] == calls[10,] == 1 and calls[0,] == 1
    assert max(calls.values()) == 1, calls
