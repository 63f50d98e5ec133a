"""Random layers in blocks, and the bound of ``numerics.py`` for what a kernel makes of them."""

import torch
from numerics import assert_dynamic, assert_linear, quantized

from rewardzip_kernels.blocks import Blocks, grid, to_blocks, to_dense

# M, N, K, block, share of the blocks stored, and why
CASES = [
    (1, 1, 1, (16, 4), 1.0, "the smallest, one block beyond both ends"),
    (1, 64, 64, (16, 4), 0.5, "one row, all aligned"),
    (4, 65, 130, (16, 4), 0.3, "the last size of the one-row kernel, tails in N and K"),
    (5, 17, 23, (16, 4), 0.5, "the first size of the tiled kernel, everything odd"),
    (17, 130, 640, (64, 64), 0.3, "a row over the tile, a last block of two outputs"),
    (17, 200, 150, (64, 64), 0.6, "a last block of some inputs"),
    (65, 96, 96, (32, 32), 0.5, "two blocks side by side in a step"),
    (33, 50, 70, (16, 16), 0.5, "two tall tiles of a CPU and a row"),
    (22, 40, 61, (5, 3), 0.4, "blocks that divide nothing"),
    (3, 140, 24, (70, 8), 0.7, "blocks taller than a tile of outputs"),
    (19, 30, 700, (8, 300), 0.7, "blocks wider than a step"),
    (20, 70, 90, (16, 4), 0.0, "nothing stored"),
    (20, 70, 90, (16, 4), 1.0, "everything stored"),
    (9, 33, 47, (128, 128), 1.0, "one block is the layer"),
    (20, 9, 47, (1, 1), 0.1, "blocks of one weight"),
    (1100, 17, 32, (16, 4), 0.2, "the tile for many rows"),
]


def random_blocks(n: int, k: int, block: tuple[int, int], share: float, device: str = "cpu"):
    """(blocks, scale, bias) of random int8 weights; the first block row holds nothing where there is another."""
    q, scale, bias = quantized(n, k, device)
    kept = torch.rand(grid(n, k, block), device=device) < share
    if len(kept) > 1 and share < 1:
        kept[0] = False
    return to_blocks(q, kept, block), scale, bias


def half_blocks(blocks: Blocks, dtype: torch.dtype) -> Blocks:
    return Blocks((blocks.values.float() / 50).to(dtype), blocks.columns, blocks.starts)


def assert_blocks(y, x, blocks, n, k, scale, bias, activation, dynamic, compute=None) -> None:
    """Hold a result to the bound of the dense layer with the same weights."""
    dense = to_dense(blocks, n, k)
    if dynamic:
        assert_dynamic(y, x, dense, scale, bias, activation, None)
    else:
        ones = torch.ones(n, device=x.device)
        assert_linear(y, x, dense, ones if scale is None else scale, bias, activation, compute)
