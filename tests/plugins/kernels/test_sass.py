"""Reading a disassembly: which instructions are tensor instructions, what the main loop is, what is a spill."""

from __future__ import annotations

import pytest

from seekforge.plugins.kernels import sass
from seekforge.plugins.kernels.sass import Loop


def listing(text: str) -> str:
    """Return lines as nvdisasm writes them; a line that ends with a colon is a label."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "mma.sync"),
        ("IMMA.16832.S8.S8", "mma.sync"),
        ("QMMA.16832.F32.E4M3.E4M3", "mma.sync"),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE8.4X", "mma.sync"),
        ("DMMA.884", "mma.sync"),
        ("HGMMA.64x16x16.F32.BF16", "wgmma"),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "wgmma"),
        ("IGMMA.64x64x32.S8.S8", "wgmma"),
        ("UTCHMMA", "tcgen05"),
        ("UTCQMMA.2CTA", "tcgen05"),
        ("UTCIMMA", "tcgen05"),
        ("UTCBAR", ""),
        ("FFMA", ""),
        ("IMAD.WIDE", ""),
        ("HFMA2.BF16", ""),
        ("WARPGROUP.ARRIVE", ""),
    ],
)
def test_tensor_instructions_are_told_by_their_unit(opcode: str, kind: str) -> None:
    assert sass.tensor_kind(opcode) == kind


LOOP = """
    MOV R1, c[0x0][0x28]
    .L_x_1:
    LDG.E.128 R4, [R2]
    HMMA.16816.F32.BF16 R8, R4, R6, R8
    HMMA.16816.F32.BF16 R12, R4, R6, R12
    ISETP.NE.AND P0, PT, R0, RZ, PT
    @P0 BRA `(.L_x_1)
    EXIT
    .L_x_2:
    BRA `(.L_x_2)
    NOP
"""


def test_the_main_loop_is_from_the_target_of_the_jump_back_to_the_jump() -> None:
    code = sass.read(listing(LOOP))
    assert code.loop == Loop(instructions=5, tensor=2, spills=0)
    assert code.tensor == {"HMMA.16816.F32.BF16": 2}
    assert (code.instructions, code.spill_stores, code.spill_loads) == (8, 0, 0)


def test_spills_are_counted_and_those_of_the_main_loop_told() -> None:
    text = LOOP.replace("LDG.E", "LDL.LU R3, [R1+0x8]\nLDG.E").replace("EXIT", "STL.64 [R1], R4\nEXIT")
    code = sass.read(listing(text))
    assert (code.spill_stores, code.spill_loads) == (1, 1)
    assert code.loop == Loop(instructions=6, tensor=2, spills=1)


def test_of_nested_loops_the_innermost_counts() -> None:
    text = """
        MOV R1, R2
        .L_x_0:
        IADD3 R3, R3, 0x1, RZ
        .L_x_1:
        QMMA.16832.F32.E4M3.E4M3 R8, R4, R6, R8
        @P0 BRA `(.L_x_1)
        FMUL R8, R8, R9
        @P1 BRA `(.L_x_0)
        EXIT
    """
    assert sass.read(listing(text)).loop == Loop(instructions=2, tensor=1, spills=0)


def test_a_wait_moved_behind_the_end_belongs_to_its_loop_and_makes_no_other() -> None:
    text = """
        MOV R1, R2
        .L_x_0:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_x_9)
        .L_x_1:
        UTCQMMA gdesc[UR8], gdesc[UR10], tmem[UR12], tmem[UR14], idesc[UR15]
        @P1 BRA `(.L_x_0)
        FMUL R1, R1, R1
        FMUL R1, R1, R1
        EXIT
        .L_x_9:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_x_9)
        BRA `(.L_x_1)
    """
    code = sass.read(listing(text))
    assert code.loop == Loop(instructions=7, tensor=1, spills=0), "4 inside, 3 of the wait"
    assert [body.instructions for body in code.bodies] == [7], "the wait inside it makes it no outer loop"


def test_a_jump_back_to_shared_code_behind_the_loop_is_no_loop() -> None:
    text = """
        @P3 BRA `(.L_x_5)
        HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8
        .L_x_4:
        EXIT
        .L_x_5:
        HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8
        BRA `(.L_x_4)
    """
    code = sass.read(listing(text))
    assert code.loop is None, "nothing is run twice"
    assert code.tensor == {"HGMMA.64x16x16.F32.BF16": 2}


def test_threads_that_left_their_warp_are_not_followed() -> None:
    text = """
        .L_x_0:
        HMMA.16816.F32.BF16 R8, R4, R6, R8
        BRA.DIV ~URZ, `(.L_x_3)
        .L_x_1:
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_3:
        MOV R2, 0x1f
        CALL.REL.NOINC `($__internal_0_$__cuda_sm70_shflsync_bfly)
        BRA `(.L_x_1)
    """
    assert sass.read(listing(text)).loop == Loop(instructions=3, tensor=1, spills=0)


def test_a_call_to_a_label_of_the_kernel_is_a_jump() -> None:
    text = """
        .L_x_1:
        HMMA.16816.F32.BF16 R8, R4, R6, R8
        @!P0 CALL.REL.NOINC `(.L_x_0)
        BRA `(.L_x_1)
        .L_x_0:
        EXIT
    """
    assert sass.read(listing(text)).loop == Loop(instructions=3, tensor=1, spills=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no instruction"), ("BRA `(.L_x_7)", "does not have"), ("BRX R2 -0x50", "computed address")],
)
def test_what_cannot_be_understood_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sass.read(listing(text) if text else "")


def test_what_was_read_comes_back_from_its_line() -> None:
    code = sass.read(listing(LOOP))
    assert sass.from_json(sass.to_json(code)) == code
    without = sass.read(listing("EXIT"))
    assert sass.from_json(sass.to_json(without)) == without


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("QGMMA.64x128x32.F32.E4M3.E4M3", "tensor"),
        ("FFMA.FTZ", "float"),
        ("HFMA2.BF16_V2", "float"),
        ("MUFU.EX2", "special"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "global"),
        ("LDSM.16.M88.4", "shared"),
        ("ATOMS.POPC.INC.32", "shared"),
        ("STL.64", "spill"),
        ("SHFL.BFLY", "exchange"),
        ("BAR.SYNC.DEFER_BLOCKING", "sync"),
        ("WARPGROUP.DEPBAR.LE", "sync"),
        ("BRA.U", "control"),
        ("IMAD.WIDE", "integer"),
        ("LOP3.LUT", "integer"),
        ("R2UR", "integer"),
    ],
)
def test_what_an_instruction_does(opcode: str, kind: str) -> None:
    assert sass.kind(opcode) == kind and kind in sass.KINDS


def test_innermost_loops_are_told_by_kind_whether_they_multiply_or_not() -> None:
    text = """
        MOV R1, R2
        .L_x_0:
        IADD3 R3, R3, 0x1, RZ
        .L_x_1:
        LDG.E.128 R4, [R2]
        BAR.SYNC.DEFER_BLOCKING 0x0
        FADD R8, R8, R4
        @P0 BRA `(.L_x_1)
        .L_x_2:
        LDGSTS.E.BYPASS.128 [R5], [R6.64]
        HMMA.16816.F32.BF16 R8, R4, R6, R8
        @P1 BRA `(.L_x_2)
        @P2 BRA `(.L_x_0)
        .L_x_3:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_x_3)
        EXIT
    """
    code = sass.read(listing(text))
    first, second = code.bodies
    assert first.kinds == {"float": 1, "global": 1, "sync": 1, "control": 1} and first.instructions == 4
    assert (first.barriers, first.waits, first.copies, first.tensor) == (1, True, False, {})
    assert second.kinds == {"tensor": 1, "global": 1, "control": 1} and second.tensor == {"HMMA.16816.F32.BF16": 1}
    assert (second.barriers, second.waits, second.copies) == (0, False, True)
    assert sum(code.kinds.values()) == code.instructions
    assert sass.from_json(sass.to_json(code)) == code


@pytest.mark.parametrize(
    ("loop", "waits"),
    [
        (("LDG.E R8, [R2.64]", "FMUL R9, R8, R3"), True),
        (("FMUL R9, R8, R3", "LDG.E R8, [R2.64]"), False),
        (("LDG.E R8, [R2.64]", "FMUL R9, R10, R3"), False),
        # carried to the next pass by a move at the end of this one
        (("FMUL R9, R12, R3", "LDG.E R8, [R2.64]", "IMAD.MOV.U32 R12, RZ, RZ, R8"), False),
        (("LDG.E R8, [R2.64]", "MOV R12, R8", "FMUL R9, R12, R3"), True),
        # written before it is read
        (("LDG.E R8, [R2.64]", "MOV R8, R4", "FMUL R9, R8, R3"), False),
        # the third of four registers; what is stored is read
        (("LDG.E.128 R8, [R2.64]", "FMUL R9, R10, R3"), True),
        (("LDG.E.64 R8, [R2.64]", "FMUL R7, R10, R3"), False),
        (("LDG.E R8, [R2.64]", "STS [R4], R8"), True),
        (("LDG.E R8, [R2.64]", "FSETP.GT.AND P1, PT, R8, RZ, PT"), True),
        (("LDG.E R8, [R2.64]", "LDG.E R9, [R2.64+0x4]", "FMUL R9, R9, R3"), True),
    ],
)
def test_what_a_pass_loads_for_itself_it_waits_for(loop: tuple[str, ...], waits: bool) -> None:
    (body,) = sass.read(listing("\n".join([".L_x_0:", *loop, "@P0 BRA `(.L_x_0)", "EXIT"]))).bodies
    loads = sum(line.startswith("LDG") for line in loop)
    assert (body.waits, body.ahead) == (waits, not waits or loads > 1)
