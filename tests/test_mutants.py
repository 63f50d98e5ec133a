"""Planted bugs: each one, put into a kernel's source, must push a result out of the bound the tests use.

A tolerance too wide to notice them would fail here.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from block_numerics import assert_blocks, random_blocks
from conftest import GPU, need_triton
from mlp_numerics import assert_head, assert_mlp, random_head, random_mlp
from numerics import assert_dynamic, assert_linear, quantized
from sparse_numerics import sparse24, sparse_rows

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
    "MLP: neighbour's scale": ('vector(params, get(NET, L, "scale"), n,', 'vector(params, get(NET, L, "scale"), n ^ 1,'),
    "MLP: bias missing on the tail": ('    acc += vector(params, get(NET, L, "bias"), n, NET, L)', '    acc += tl.where(n < 64, vector(params, get(NET, L, "bias"), n, NET, L), 0.0)'),
    "MLP: activation before LayerNorm": ('    if get(NET, L, "eps") is not None:\n        gamma', '    z = activate(z, get(NET, L, "activation"), get(NET, L, "parameter"))\n    if get(NET, L, "eps") is not None:\n        gamma'),
    "MLP: last row not stored": ("inside = (m < M)[:, None]", "inside = (m < M - 1)[:, None]"),
    "MLP: K tail dropped": ("tl.range(0, piece_width(NET, 0, i), SLICE):\n            x = x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(COMPUTE)", "tl.range(0, piece_width(NET, 0, i) - SLICE, SLICE):\n            x = x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(COMPUTE)"),
    "MLP: inputs overlap": ("piece_start(NET, L, i)) + n", "0) + n"),
    "MLP: every member the first": ('            weights += member_size(NET, "weights")\n', ""),
    "MLP: deviation over E": ("squares[j] / (MEMBERS - 1)", "squares[j] / MEMBERS"),
    "MLP: variance over N - 1": ('squares / get(NET, L, "width")', 'squares / (get(NET, L, "width") - 1)'),
    "MLP: the last slice counted whole": ('count = tl.minimum(get(NET, L, "width") - seen, seen * 0.0 + z.shape[1])', "count = seen * 0.0 + z.shape[1]"),
    "MLP: rounded before the last layer": ("    row = params + (", "    h = h.to(tl.float16).to(tl.float32)\n    row = params + ("),
    "MLP: scale off by 1 %": ('        acc *= vector', '        acc *= 1.01 * vector'),
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
SPARSE24 = "sparse24_linear"
SPARSE24_BUGS = {
    "2:4: places of the other half": ("_dense(first, second, places >> (4 * half), BLOCK_N, BLOCK_B)\n            acc", "_dense(first, second, places >> (4 - 4 * half), BLOCK_N, BLOCK_B)\n            acc"),
    "2:4: second value never third": ("w2 = tl.where(p == 2, first, tl.where(q == 2, second, none))", "w2 = tl.where(p == 2, first, none)"),
    "2:4: inputs 1 and 2 exchanged": ("tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    "2:4: the second half's inputs from the first": ("x_tile + 4 * half * B, mask=(4 * (half * B + start) + k)[:, None] < K", "x_tile, mask=(4 * (half * B + start) + k)[:, None] < K"),
    "2:4: last outputs not stored": ("mask=(m < M)[None, :] & (n < N)[:, None])", "mask=(m < M)[None, :] & (n < N - 1)[:, None])"),
    "2:4: the halves of K in one place": ("y_tile += tl.program_id(1).to(tl.int64) * M * N", "y_tile += 0"),
    "2:4: K tail dropped": ("(4 * (half * B + start) + k)[:, None] < K", "(4 * (half * B + start) + k)[:, None] < K - 7"),
    "2:4: one-row kernel, wrong input picked": ("tl.where(odd, x3, x2), tl.where(odd, x1, x0)", "tl.where(odd, x3, x2), tl.where(odd, x0, x1)"),
    "2:4: one-row kernel, second value dropped": ("acc += second.to(SUM)", "acc += 0 * second.to(SUM)"),
    "2:4: expanded, halves overlap": ("mine = (4 * start + k < 4 * B) & (column < K)", "mine = column < K"),
    "2:4: expanded, second half missing": ("column = 4 * (half * B + start) + k", "column = 4 * start + k"),
}  # fmt: skip
SPARSE_ROWS = "sparse_rows_linear"
SPARSE_ROWS_BUGS = {
    "rows: neighbour's scale": ("tl.load(scale_ptr + n)", "tl.load(scale_ptr + (n + 1) % N)"),
    "rows: last nonzero dropped": ("mask=i < last, other=-1)", "mask=i < last - 1, other=-1)"),
    "rows: only the first turn": ("for start in range(first, last, BLOCK)", "for start in range(first, tl.minimum(last, first + BLOCK), BLOCK)"),
    "rows: neighbouring input": ("x_rows + column[None, :]", "x_rows + (column ^ 1)[None, :]"),
    "rows: last row not stored": ("mask=m < M)\n\n", "mask=m < M - 1)\n\n"),
    "rows: bias forgotten": ("finish(tl.sum(acc, axis=1), scale, bias_ptr,", "finish(tl.sum(acc, axis=1), scale, None,"),
}  # fmt: skip

BLOCKS = "block_sparse_linear"
BLOCK_BUGS = {
    "blocks: the last block forgotten": ("range(stored * STEPS)", "range((stored - 1) * STEPS)"),
    "blocks: the neighbour's inputs": ("k = tl.load(columns_ptr + block) * BK + within\n            w", "k = tl.load(columns_ptr + block) * BK + (within ^ 1)\n            w"),
    "blocks: every column the first": ("tl.load(columns_ptr + block) * BK + within\n            w", "tl.load(columns_ptr + first) * BK + within\n            w"),
    "blocks: the tail of small blocks dropped": ("inside = e < stored * BK", "inside = e < stored * BK // BLOCK_K * BLOCK_K"),
    "blocks: an empty block row not written": ("n_inside = (inner < BN) & (n < N)", "n_inside = (inner < BN) & (n < N) & (tl.load(starts_ptr + r + 1) > tl.load(starts_ptr + r))"),
    "blocks: neighbour's scale": ("tl.load(scale_ptr + n, mask=n_inside, other=0.0)[:, None]", "tl.load(scale_ptr + (n ^ 1), mask=n_inside, other=0.0)[:, None]"),
    "blocks: the row's scale forgotten": ("row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]", "row_scale = tl.full([1, BLOCK_M], 0.02, tl.float32)"),
    "blocks: last output not stored": ("(inner < BN) & (n < N)", "(inner < BN) & (n < N - 1)"),
    "blocks: a tall block's first part in all": ("(tl.program_id(0) // m_tiles) % PARTS * BLOCK_N", "0 * BLOCK_N"),
    "blocks: fp16 accumulator": ("input_precision=\"tf32\", out_dtype=acc.dtype)\n    else", "input_precision=\"tf32\", out_dtype=acc.dtype).to(tl.float16).to(acc.dtype)\n    else"),
    "blocks: one-row kernel, activation lost": ("finish(tl.sum(acc, axis=1), scale, bias_ptr, row_scale, n, n_inside, ACTIVATION", 'finish(tl.sum(acc, axis=1), scale, bias_ptr, row_scale, n, n_inside, "none"'),
    "blocks: one-row kernel, a neighbour's row": ("m = (tl.program_id(0) % M).to(tl.int64)", "m = (tl.program_id(0) % M).to(tl.int64) * 0"),
}  # fmt: skip


# an op whose kernel is in several files, each importing from those before it
PARTS = {MLP: ("mlp_tiles", "mlp_layers", "fused_mlp")}


def mutant(tmp_path, stem, old, new):
    """The kernel module with one piece of its source replaced, under a name of its own."""
    need_triton()
    parts = PARTS.get(stem, (stem,))
    sources = [(Path(rewardzip_kernels.__path__[0]) / "gpu" / f"{part}.py").read_text() for part in parts]
    assert any(old in source for source in sources), f"the source no longer says {old!r}: plant this bug anew"
    for part, source in zip(parts, sources, strict=True):
        source = source.replace(old, new, 1)
        for other in parts:
            source = source.replace(f"from .{other} import", f"from .{other}_mutant import")
        name = f"rewardzip_kernels.gpu.{part}_mutant"
        file = tmp_path / f"{part}_mutant.py"
        file.write_text(source)
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


def check_sparse24(module, device):
    for m, n, k in ((3, 20, 140), (17, 40, 140), (512, 9, 600), (9, 20, 256)):
        q, values, indices, scale, bias, _ = sparse24(n, k, device)
        x = torch.randn(m, k, device=device)
        x = x.half() if m == 9 else x  # K in halves
        y = module.sparse24_linear(x, values, indices, scale, k, bias, "relu")
        assert_linear(y, x, q, scale, bias, "relu", "tf32" if GPU else None)


def check_sparse_rows(module, device):
    q, *stored, scale, bias, _ = sparse_rows(20, 300, device, kept=0.5)
    x = torch.randn(11, 300, device=device)
    assert_linear(module.sparse_rows_linear(x, *stored, scale, 300, bias, "relu"), x, q, scale, bias, "relu")


def check_blocks(module, device):
    for m, n, k, block, share in (
        (20, 130, 256, (64, 64), 0.6),
        (20, 70, 90, (16, 4), 0.4),
        (3, 70, 90, (128, 4), 1.0),
    ):
        blocks, scale, bias = random_blocks(n, k, block, share, device)
        x = torch.randn(m, k, device=device)
        for dynamic in (False, True):
            y = module.block_sparse_linear(x, *blocks, n, k, scale, bias, "relu", dynamic)
            assert_blocks(y, x, blocks, n, k, scale, bias, "relu", dynamic, "tf32" if GPU else None)
    blocks, scale, bias = random_blocks(130, 90, (130, 8), 1.0, device)
    y = module.block_sparse_linear(x := torch.randn(20, 90, device=device), *blocks, 130, 90, scale, bias)
    assert_blocks(y, x, blocks, 130, 90, scale, bias, "none", False, "tf32" if GPU else None)


CHECKS = {
    GEMM: check_gemm,
    ROWS: check_rows,
    MLP: check_mlp,
    HEAD: check_head,
    SPARSE24: check_sparse24,
    SPARSE_ROWS: check_sparse_rows,
    BLOCKS: check_blocks,
}
ALL = {
    GEMM: GEMM_BUGS,
    ROWS: ROW_BUGS,
    MLP: MLP_BUGS,
    HEAD: HEAD_BUGS,
    SPARSE24: SPARSE24_BUGS,
    SPARSE_ROWS: SPARSE_ROWS_BUGS,
    BLOCKS: BLOCK_BUGS,
}
BUGS = [(stem, name, *bug) for stem, bugs in ALL.items() for name, bug in bugs.items()]


@pytest.mark.parametrize("stem", CHECKS)
def test_the_sound_kernel_passes(stem, tmp_path, device, poisoned):
    CHECKS[stem](mutant(tmp_path, stem, "import triton\n", "import triton\n"), device)


@pytest.mark.parametrize(("stem", "name", "old", "new"), BUGS, ids=[b[1] for b in BUGS])
def test_planted_bug_is_caught(stem, name, old, new, tmp_path, device, poisoned):
    with pytest.raises(AssertionError, match="outside"):
        CHECKS[stem](mutant(tmp_path, stem, old, new), device)
