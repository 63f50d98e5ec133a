"""The machine code counted: the parsers on listings made by hand, and the committed table made again in part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewardzip_kernels.disassembly import KINDS, Instruction, amdgcn, executed, kind, sass

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "static-evidence.md"
CASES = ["int8_linear 16x1024x4096 bfloat16", "fused_mlp 1048576 x 32: 64 relu, 64 relu, 1"]


def listing(lines: list[str]) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x000f */" for i, line in enumerate(lines))


def test_sass_knows_its_loops():
    body = ["LDG.E.128 R4, [R2]", "I2F.F16.S16 R8, R4", *["FFMA R1, R1, R1, R1"] * 6]
    lines = ["S2R R0, SR_TID.X", *body, "@P0 BRA 0x10", *body, "@!P3 BRA 0xa0", "@P1 BRA.U 0x10", "EXIT", "BRA 0x0"]
    code = sass(listing(lines))
    assert [one.name for one in code][:2] == ["S2R", "LDG.E.128"]
    assert code[0].loops == ()
    assert {one.loops for one in code[1:9]} == {(0,)}  # both branches to 0x10: one loop
    assert {one.loops for one in code[10:18]} == {(0, 1)}
    assert code[-1] == Instruction("EXIT")  # what lies behind it is not part of a run
    run = executed(code, (3, 5), pipelined=False)
    assert run.kinds["load 16"] == 3 + 3 * 5
    assert run.slots(1) == 1 + 3 * 10 + 3 * 5 * 9 + 1 == sum(run.kinds.values())


def test_a_wait_is_no_loop():
    assert all(one.loops == () for one in sass(listing(["SYNCS.PHASECHK.TRANS64.TRYWAIT P0", "@!P0 BRA 0x0", "EXIT"])))


def test_amdgcn_knows_its_loops():
    text = """
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tv_add_f32 v1, v1, v2
.LBB0_2:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
\tglobal_load_dwordx4 v[0:3], v[4:5], off
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
; %bb.4:
\ts_endpgm
; -- End function
\tv_add_f32 v1, v1, v2
"""
    code = amdgcn(text)
    assert [one.loops for one in code] == [(), (0,), (0,), (0, 1), ()]
    run = executed(code, (7, 4), pipelined=False)
    assert run.kinds["tensor core"] == 28
    assert run.multiply_adds == 28 * 32 * 32 * 8
    assert run.slots(4) == 4 * 7  # the one vector instruction of the outer loop


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HGMMA.64x64x16.F32", "tensor core"),
        ("UTCHMMA", "tensor core"),
        ("v_mfma_f32_16x16x16_f16", "tensor core"),
        ("LDG.E.128", "load 16"),
        ("LDGSTS.E.BYPASS.128", "load 16"),
        ("LDG.E.64.CONSTANT", "load 8"),
        ("LDG.E", "load 4"),
        ("LDG.E.U8", "load 1, 2"),
        ("global_load_dword", "load 4"),
        ("global_load_ubyte", "load 1, 2"),
        ("LDGDEPBAR", "other"),  # a fence, no load
        ("LDSM.16.MT88.4", "shared"),
        ("LDS", "shared"),
        ("I2F.F16.S16", "conversion"),
        ("MUFU.EX2", "special"),
        ("HFMA2.MMA", "other"),  # fused multiply-adds on the other pipe: no tensor core
        ("FFMA", "other"),
    ],
)
def test_kinds(name, expected):
    assert kind(name) == expected
    assert expected in KINDS


def test_steps_of_a_pipelined_loop_run_outside_it_too():
    code = [Instruction("HGMMA.64x64x16.F32"), Instruction("HGMMA.64x64x16.F32", (0,))]
    assert executed(code, (8,), pipelined=True).multiply_adds == 8 * 64 * 64 * 16 / 4
    assert executed(code, (8,), pipelined=False).multiply_adds == 9 * 64 * 64 * 16 / 4


def test_loops_that_were_not_expected():
    with pytest.raises(ValueError, match="has 1 loops, 2 were expected"):
        executed([Instruction("FADD", (0,))], (3, 4), pipelined=False)


def test_the_committed_table_is_what_the_command_prints():
    triton = pytest.importorskip("triton")
    page = PAGE.read_text()
    if f"Triton {triton.__version__};" not in page:
        pytest.skip("the table was made with another Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "benchmarks/static_evidence.py", "--target", "sm_90", "--target", "gfx942"]
    command += [word for case in CASES for word in ("--case", case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| int8", "| fused"))]
    assert len(rows) == 6
    for row in rows:
        assert row in page
        # every product the layers need is in the machine code, and none beside them
        assert row.split("|")[18].strip() in ("100%", "-"), row
