"""Planted bugs: each one, put into a kernel's source, must push a result out of the bound the tests use.

A tolerance too wide to notice them would fail here.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU, need_triton
from numerics import assert_dynamic, assert_linear, quantized

import rewardzip_kernels

GEMM = "int8_linear"
ROWS = "quantize_rows"
GEMM_BUGS = {
    "K tail dropped": ("steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)", "steps = tl.cdiv(K // BLOCK_K, SPLIT_K)"),
    "neighbour's scale": ("tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]", "tl.load(scale_ptr + n - (n > 0).to(tl.int32), mask=n < N, other=0.0)[:, None]"),
    "bias missing on the N tail": ("mask=n_mask, other=0.0)\n    return", "mask=n_mask & (n < 64), other=0.0)\n    return"),
    "last row not stored": ("inside = (m < M)[None, :]", "inside = (m < M - 1)[None, :]"),
    "ReLU before bias": ("    if bias_ptr is not None:\n        y +=", "    y = activate(y, ACTIVATION, PARAMETER)\n    if bias_ptr is not None:\n        y +="),
    "scale off by 1 %": ("y = acc.to(tl.float32)", "y = 1.01 * acc.to(tl.float32)"),
    "fp16 accumulator": ("x_tile += BLOCK_K\n    return acc\n", "x_tile += BLOCK_K\n        acc = acc.to(tl.float16).to(acc.dtype)\n    return acc\n"),
    "one element wrong": ("acc = finish(", "acc = tl.where((m == 3)[None, :] & (n == 5)[:, None], acc * 1.001, acc)\n        acc = finish("),
    "one-row kernel: K tail dropped": ("for start in range(0, K, BLOCK_K):\n        if EVEN_K", "for start in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):\n        if EVEN_K"),
    "a split forgotten": ("tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)"),
    "a neighbour's row": ("tl.minimum(m, M - 1)", "tl.minimum(m + (m == 4), M - 1)"),
}  # fmt: skip
ROW_BUGS = {
    "127 / amax as a reciprocal and a product": (
        "inverse = tl.div_rn(tl.full([BLOCK_R], 127.0, tl.float32), amax)",
        "inverse = 127.0 * tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), amax)",
    ),
    "truncated instead of rounded": ("+ ROUND) - ROUND", "+ 0.0)"),
    "only the first columns seen": ("for start in range(0, K, BLOCK_K):\n        k = start", "for start in range(0, 16, BLOCK_K):\n        k = start"),
}  # fmt: skip


def mutant(tmp_path, stem, old, new):
    """The kernel module with one piece of its source replaced, under a name of its own."""
    need_triton()
    source = (Path(rewardzip_kernels.__path__[0]) / "gpu" / f"{stem}.py").read_text()
    assert source.count(old) >= 1, f"the source no longer says {old!r}: plant this bug anew"
    name = f"rewardzip_kernels.gpu.{stem}_mutant"
    file = tmp_path / f"{stem}_mutant.py"
    file.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_gemm(module, device):
    for m, n, k in ((3, 70, 600), (17, 70, 130), (20, 70, 4100)):
        q, scale, bias = quantized(n, k, device)
        x = torch.randn(m, k, device=device)
        for activation in ("none", "relu"):
            y = module.int8_linear(x, q, scale, bias, activation)
            assert_linear(y, x, q, scale, bias, activation, "tf32" if GPU else None)


def check_rows(module, device):
    for k in (40, 3000):
        x = torch.randn(500, k, device=device)
        q, row_scale = torch.empty(500, k, dtype=torch.int8, device=device), torch.empty(500, device=device)
        module.quantize_rows(x, None, q, row_scale)
        weight, scale, _ = quantized(50, k, device)
        y = (q.double() @ weight.double().t() * row_scale.double()[:, None] * scale.double()).float()
        assert_dynamic(y, x, weight, scale, None, "none", None)


CHECKS = {GEMM: check_gemm, ROWS: check_rows}
BUGS = [(GEMM, name, *bug) for name, bug in GEMM_BUGS.items()] + [(ROWS, name, *bug) for name, bug in ROW_BUGS.items()]


@pytest.mark.parametrize("stem", CHECKS)
def test_the_sound_kernel_passes(stem, tmp_path, device, poisoned):
    CHECKS[stem](mutant(tmp_path, stem, "import triton\n", "import triton\n"), device)


@pytest.mark.parametrize(("stem", "name", "old", "new"), BUGS, ids=[b[1] for b in BUGS])
def test_planted_bug_is_caught(stem, name, old, new, tmp_path, device, poisoned):
    with pytest.raises(AssertionError, match="outside"):
        CHECKS[stem](mutant(tmp_path, stem, old, new), device)
