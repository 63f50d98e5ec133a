"""The codegen audit, with no GPU: no spills, shared memory within the chip, and the tensor-core instruction meant."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# what a matrix kernel must run on: by target, by the type of the rows
EXPECTED = {
    "sm_80": {
        "int8": "mma.sync m16n8k32.row.col.satfinite.s32.s8",
        "bfloat16": "mma.sync m16n8k16",
        "float32": "tf32",
    },
    "sm_90": {
        "int8": "s32.s8.s8",
        "bfloat16": "wgmma, A in registers",
        "float32": "wgmma, A in registers",
    },
    "sm_100": {"int8": "mma.sync", "bfloat16": "tcgen05", "float32": "tcgen05"},
    "gfx942": {"int8": "mfma", "bfloat16": "mfma", "float32": "mfma"},
}


# a gradient's wide fp32 products, where they meet the compiler for AMD
SPILLS = {("_mlp_gradient_kernel", "gfx942", "16 64"): 1000}
if triton.__version__.startswith("3.6."):
    # its AMD compiler keeps 13 words of the 128-wide network outside the registers; 3.7 keeps none
    SPILLS["_fused_mlp_kernel", "gfx942", "128 64 1"] = 52


@pytest.fixture(scope="module", params=SHARED)
def rows(request):
    # a process of its own: here the kernels are defined for the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "rewardzip_kernels.audit", "--json", "--target", request.param]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_spill_and_shared_memory_fits(rows):
    assert len(rows) > 15
    for row in rows:
        assert row["stack"] <= SPILLS.get((row["kernel"], row["target"], row["tile"]), 0), row
        assert row["shared"] <= SHARED[row["target"]], row


def test_tensor_cores_are_used(rows):
    matrix = [row for row in rows if row["kernel"] == "_int8_linear_kernel" and "sparse24" not in row["case"]]
    assert len({row["tile"] for row in matrix}) >= 5
    for row in matrix:
        kind = "int8" if "dynamic" in row["case"] else row["case"].split()[-1]
        assert EXPECTED[row["target"]][kind] in row["instructions"], row


def test_sparse24_uses_them(rows):
    """From 64 x 64 on the weights come out of registers into wgmma; smaller tiles are for memory, by mma.sync."""
    matrix = [row for row in rows if row["kernel"] == "_sparse24_kernel"]
    assert len({row["tile"] for row in matrix}) >= 4
    for row in matrix:
        if row["target"] == "sm_90" and row["tile"].startswith("1 64 64"):
            assert "wgmma, A in registers" in row["instructions"], row
        assert row["instructions"] != "-", row
    # many rows: expanded, then the product of a dense layer, in 16 bits with nothing to turn into floats on the way
    dense = [row for row in rows if row["kernel"] == "_int8_linear_kernel" and "sparse24" in row["case"]]
    assert len(dense) >= 2
    wide = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for row in dense:
        assert wide[row["target"]] in row["instructions"], row


def test_fused_ops_use_them_too(rows):
    """wgmma and tcgen05 from 64 rows a program on, mma.sync below."""
    for row in rows:
        hidden = row["kernel"] == "_fused_mlp_kernel" and "," in row["case"].partition(":")[2]
        if not hidden and row["kernel"] != "_reward_head_kernel":
            continue
        large = int(row["tile"].split()[0]) >= 64 and (hidden or int(row["tile"].split()[1]) >= 64)
        wide = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(row["target"]) if large else None
        assert (wide or ("mfma" if row["target"] == "gfx942" else "mma.sync")) in row["instructions"], row


def test_blocks_use_them_too(rows):
    """64 x 64 blocks keep wgmma and tcgen05; small ones are gathered into mma.sync."""
    found = [row for row in rows if row["kernel"] == "_block_sparse_linear_kernel"]
    assert len(found) > 10
    wide = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for row in found:
        assert row["instructions"] != "-", row
        # Triton has no int8 form of tcgen05
        if " 64x64 " in row["case"] and not (row["target"] == "sm_100" and row["case"].endswith("int8")):
            assert wide[row["target"]] in row["instructions"], row
