"""Planted bugs: each one, put into a kernel's source, must push a result out of the bound the tests use.

A tolerance too wide to notice them would fail here.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU, need_triton
from mlp_numerics import assert_head, assert_mlp, random_head, random_mlp
from numerics import assert_dynamic, assert_linear, quantized

import rewardzip_kernels
from rewardzip_kernels.mlp_layout import parse_layers

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


MLP = "fused_mlp"
MLP_BUGS = {
    "MLP: neighbour's scale": ('_vector(params, _get(NET, L, "scale"), n,', '_vector(params, _get(NET, L, "scale"), n ^ 1,'),
    "MLP: bias missing on the tail": ('    acc += _vector(params, _get(NET, L, "bias"), n, NET, L)', '    acc += tl.where(n < 64, _vector(params, _get(NET, L, "bias"), n, NET, L), 0.0)'),
    "MLP: activation before LayerNorm": ('    if _get(NET, L, "eps") is not None:\n        gamma', '    z = activate(z, _get(NET, L, "activation"), _get(NET, L, "parameter"))\n    if _get(NET, L, "eps") is not None:\n        gamma'),
    "MLP: last row not stored": ("inside = (m < M)[:, None]", "inside = (m < M - 1)[:, None]"),
    "MLP: K tail dropped": ("tl.range(0, _piece(NET, 0, i), SLICE):\n            x = _x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(COMPUTE)", "tl.range(0, _piece(NET, 0, i) - SLICE, SLICE):\n            x = _x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(COMPUTE)"),
    "MLP: inputs overlap": ("_start(NET, L, i)) + n", "0) + n"),
    "MLP: every member the first": ('            weights += _size(NET, "weights")\n', ""),
    "MLP: deviation over E": ("squares[j] / (MEMBERS - 1)", "squares[j] / MEMBERS"),
    "MLP: variance over N - 1": ('squares / _get(NET, L, "width")', 'squares / (_get(NET, L, "width") - 1)'),
    "MLP: the last slice counted whole": ('count = tl.minimum(_get(NET, L, "width") - seen, seen * 0.0 + z.shape[1])', "count = seen * 0.0 + z.shape[1]"),
    "MLP: rounded before the last layer": ("    row = params + (", "    h = h.to(tl.float16).to(tl.float32)\n    row = params + ("),
    "MLP: scale off by 1 %": ('        acc *= _vector', '        acc *= 1.01 * _vector'),
    "MLP: not rounded between layers": ("out = out + (z.to(COMPUTE),)", "out = out + ((z * 1.002).to(COMPUTE),)"),
}  # fmt: skip
HEAD = "reward_head"
HEAD_BUGS = {
    "head: every tile the first": ("(tile.to(tl.int64) * M + m)", "(0 * M + m)"),
    "head: the last tile not summed": ("range(0, tiles, BLOCK_T)", "range(0, tiles - BLOCK_T, BLOCK_T)"),
    "head: neighbour's weights": ("head_ptr + o * N + n, mask=inside", "head_ptr + o * N + (n ^ 1), mask=inside"),
    "head: its bias forgotten": ("        y += tl.load(head_bias_ptr + i % N_OUT)", "        y += 0.0"),
    "head: the first output in all": ("v = tl.load(head_ptr + o * N", "v = tl.load(head_ptr + 0 * N"),
    "head: one-row kernel, activation lost": ("finish(sums, scale, bias_ptr, None, n, inside, ACTIVATION", 'finish(sums, scale, bias_ptr, None, n, inside, "none"'),
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


def check_mlp(module, device):
    for m, layers, members in (
        (18, "17+6: 70 relu, 100 relu, 2", 3),
        (9, "300: 100 layer_norm elu, 70 layer_norm tanh, 20", None),
    ):
        weights, params = random_mlp(layers, torch.int8, members or 1, device)
        xs = [torch.randn(m, k, device=device) for k in parse_layers(layers)[0]]
        for reduce in ("none", "mean_std")[: 1 if members is None else 2]:
            y = module.fused_mlp(xs, weights, params, layers, members, reduce, torch.float32)
            assert_mlp(y, xs, weights, params, layers, members, reduce, torch.float32)


def check_head(module, device):
    for m, n in ((3, 70), (20, 2090)):
        x, args = torch.randn(m, 50, device=device), random_head(n, 50, 3)
        assert_head(module.reward_head, x, args)


CHECKS = {GEMM: check_gemm, ROWS: check_rows, MLP: check_mlp, HEAD: check_head}
ALL = {GEMM: GEMM_BUGS, ROWS: ROW_BUGS, MLP: MLP_BUGS, HEAD: HEAD_BUGS}
BUGS = [(stem, name, *bug) for stem, bugs in ALL.items() for name, bug in bugs.items()]


@pytest.mark.parametrize("stem", CHECKS)
def test_the_sound_kernel_passes(stem, tmp_path, device, poisoned):
    CHECKS[stem](mutant(tmp_path, stem, "import triton\n", "import triton\n"), device)


@pytest.mark.parametrize(("stem", "name", "old", "new"), BUGS, ids=[b[1] for b in BUGS])
def test_planted_bug_is_caught(stem, name, old, new, tmp_path, device, poisoned):
    with pytest.raises(AssertionError, match="outside"):
        CHECKS[stem](mutant(tmp_path, stem, old, new), device)
