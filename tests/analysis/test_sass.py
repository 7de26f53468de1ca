"""Reading made-up binaries; test_compile_report.py reads compiled ones."""

import pytest

from tritonattn.analysis import sass

SASS = """
 .L_x_1:
        /*0000*/   MUFU.EX2 R1, R2 ;
        /*0010*/   @!P0 STL [R1], R2 ;
        /*0020*/   @UP2 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;
        /*0030*/   MUFU.EX2 R1, R2 ;
        /*0040*/   @P0 BRA `(.L_x_1) ;
 .L_x_2:
 .L_x_3:
        /*0050*/   MUFU.EX2 R1, R2 ;
        /*0060*/   LDL R1, [R2] ;
        /*0070*/   @P0 BRA `(.L_x_3) ;
        /*0080*/   @P1 BRA `(.L_x_2) ;
        /*0090*/   STL [R1], R2 ;
 .L_x_4:
        /*00a0*/   MUFU.EX2 R1, R2 ;
        /*00b0*/   MUFU.EX2 R1, R2 ;
        /*00c0*/   @P0 BRA `(.L_x_4) ;
"""
AMDGCN = """
.LBB0_1:
	s_add_i32 s13, s13, 64
	v_exp_f32_e32 v1, v2
	v_mfma_f32_32x32x8_bf16 v[34:49], v[106:107], v[94:95], 0
	scratch_store_dwordx2 off, v[2:3], s33
	s_cbranch_scc1 .LBB0_1
    .group_segment_fixed_size: 0
  - .agpr_count:     12
    .private_segment_fixed_size: 40
    .sgpr_count:     106
    .vgpr_count:     255
    .sgpr_spill_count: 2
    .vgpr_spill_count: 9
"""


def test_resources_of_amdgcn():
    assert sass.resources_of_amdgcn(AMDGCN) == {"registers": 255, "stack": 40, "accumulation": 12, "scalar": 106, "spilled": 11}
    with pytest.raises(ValueError, match="vgpr_count"):
        sass.resources_of_amdgcn(AMDGCN.replace(".vgpr_count", ".other"))


@pytest.mark.parametrize("opcode, kind", [
    ("HMMA.16816.F32.BF16", "tensor"), ("HGMMA.64x128x16.F32", "tensor"), ("UTCHMMA", "tensor"), ("IMMA.16832", "tensor"),
    ("v_mfma_f32_32x32x8_bf16", "tensor"), ("MUFU.EX2", "special"), ("v_exp_f32_e32", "special"), ("STL.64", "spill"),
    ("LDL", "spill"), ("scratch_load_dwordx4", "spill"), ("F2FP.BF16.F32.PACK_AB", "conversion"), ("I2F.RP", "conversion"),
    ("v_cvt_f32_i32_e32", "conversion"), ("FFMA", "float"), ("FFMA2", "float"), ("FADD.FTZ", "float"),
    ("v_pk_fma_f32", "float"),
    ("v_mul_f32_e32", "float"), ("v_fmac_f32_e32", "float"), ("FMNMX", "select"), ("FMNMX3", "select"), ("FSEL", "select"),
    ("v_cmp_lt_f32_e32", "select"), ("v_max3_f32", "select"), ("v_cndmask_b32_e32", "select"), ("SHFL.BFLY", "shuffle"),
    ("ds_bpermute_b32", "shuffle"), ("LDS.128", "shared"), ("LDSM.16.M88.4", "shared"), ("STSM.16", "shared"),
    ("ds_read2_b64", "shared"), ("LDTM.16dp", "tensor memory"), ("v_accvgpr_read_b32", "tensor memory"), ("UTMALDG.2D", "tma"),
    ("UBLKCP.S.G", "tma"), ("BAR.SYNC.DEFER", "barrier"), ("WARPGROUP.ARRIVE", "barrier"), ("UTCBAR", "barrier"),
    ("s_waitcnt", "barrier"), ("LDG.E.128", "global"), ("LDGSTS.E", "global"), ("LDGDEPBAR", "barrier"),
    ("RED.E.ADD", "global"),
    ("buffer_load_dwordx4", "global"), ("BRA", "control"), ("NOP", "control"), ("s_cbranch_scc1", "control"),
    ("UIADD3", "uniform"), ("R2UR", "uniform"), ("s_add_i32", "uniform"), ("IADD3", "integer"), ("LOP3.LUT", "integer"),
    ("IMAD.MOV.U32", "integer"), ("PRMT", "integer"), ("v_and_b32_e32", "integer"), ("LEA.HI", "integer"), ("VIADD", "integer"),
])
def test_kinds_of_instructions(opcode, kind):
    assert sass.kind(opcode) == kind


def test_loops_over_tiles_are_innermost_without_nan_safe_shortest_first():
    short, long = sass.loops(SASS)
    assert short.instructions == ("MUFU.EX2", "MUFU.EX2", "BRA") and short.spills == 0
    assert long.counts == {"special": 2, "spill": 1, "tensor": 1, "control": 1} and long.spills == 1
    assert long.products == {"HGMMA.64x128x16": 1} and long.exponentials == 2
    loop, = sass.loops(AMDGCN)
    assert loop.products == {"v_mfma_f32_32x32x8": 1} and loop.spills == 1 and loop.exponentials == 1
    assert sass.loops("") == ()


def lines(*instructions):
    return "".join(f"        /*{i:04x}*/                   {text} ;\n" for i, text in enumerate(instructions))


def test_softmax_beside_products():
    """A product that is waited for in the next iteration runs beside what stands before that wait."""
    wait, product = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "HGMMA.64x128x16.F32 R88, R152, gdesc[UR20], R88, gsb0"
    body = ["FMNMX R1, R2, R3", wait, "MUFU.EX2 R1, R2", product, "FADD R1, R2, R3", "MUFU.EX2 R4, R5"]
    loop, = sass.loops(".L_x_1:\n" + lines(*body, "@P0 BRA `(.L_x_1)"))
    assert loop.softmax_beside_products == pytest.approx(2 / 3), "the maximum and the second exponential"
    assert loop.beside_products(("MUFU.EX2",)) == 1 / 2 and loop.beside_products(("FADD",)) == 1
    part = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    loop, = sass.loops(".L_x_1:\n" + lines(product, product, part, "MUFU.EX2 R4, R5", wait, "@P0 BRA `(.L_x_1)"))
    assert loop.softmax_beside_products == 1, "one of two products still runs"
    assert sass.loops(AMDGCN)[0].softmax_beside_products == 0


COLD = """
.LBB0_1:
	v_exp_f32_e32 v1, v2
	v_mfma_f32_32x32x8_bf16 v[34:49], v[106:107], v[94:95], 0
	s_cbranch_execz .LBB0_4
.LBB0_2:
	v_mfma_f32_32x32x8_bf16 v[34:49], v[106:107], v[94:95], 0
	v_exp_f32_e32 v1, v2
	s_cbranch_scc0 .LBB0_1
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.LBB0_4:
	buffer_load_dwordx4 v[98:101], v34, s[8:11], 0 offen
	s_branch .LBB0_2
"""


def test_block_moved_behind_a_loop_is_no_loop():
    loop, = sass.loops(COLD)
    assert loop.products == {"v_mfma_f32_32x32x8": 2} and loop.exponentials == 2
    assert loop.instructions.count("s_cbranch_scc1") == 1, "of two jumps to one head the last ends the loop"


def test_number_of_loops_is_limited():
    assert len(sass.loops(SASS, 1)) == 1 and sass.loops(SASS, 1)[0].spills == 1, "the first in the text"
    assert len(sass.loops(SASS, 5)) == 2


def test_loops_without_exponentials_are_told_by_products_and_place():
    """Of each pass the first loops count, not the nan_safe one after them, nor a loop without products."""
    def loop(name, *body):
        return f".L_x_{name}:\n" + lines(*body, f"@P0 BRA `(.L_x_{name})")

    product, others = "HMMA.16816.F32 R1, R2, R3, R4", ("FADD R1, R2, R3",) * 3
    text = "".join([loop(1, product), loop(2, product, product), loop(3, *others), loop(4, product, *others),
                    loop(5, product, "STL [R1], R2"), loop(6, product, product, "STL [R1], R2"), loop(7, product)])
    found = sass.loops(text, 4, 2)
    assert sorted((each.counts["tensor"], each.spills) for each in found) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(sass.loops(text)) == 6 and len(sass.loops(text, product="float")) == 2


def test_pipelined_loop_comes_first():
    copying = SASS.replace("@!P0 STL [R1], R2", "LDGSTS.E [R1], R2")
    assert [loop.pipelined for loop in sass.loops(copying)] == [True, False]


def test_spills_are_counted_in_loops():
    assert sum(loop.spills for loop in sass.loops(SASS)) == 1
    assert [loop.spills for loop in sass.loops(AMDGCN)] == [1]


def test_path_in_amdgcn_is_not_mistaken_for_sass():
    """AMD's assembly names source files, and a folder may be called anything."""
    assert sass.loops('\t.file 1 "/home/BRANDON/*0000*/x.py"\n' + AMDGCN) == sass.loops(AMDGCN) != ()
