"""One block in four kept."""

from functools import partial

import torch
from checked import linear_op
from torch import Tensor

from rewardzip.nn import BlockSparseLinear

BLOCK = (16, 16)


def keep_blocks(weight: Tensor) -> Tensor:
    grid = torch.rand(weight.shape[0] // BLOCK[0], weight.shape[1] // BLOCK[1], device=weight.device) >= 0.75
    return grid.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)


FORMS = {
    "blocks int8": partial(BlockSparseLinear.from_linear, block=BLOCK),
    "blocks int8 x int8": partial(BlockSparseLinear.from_linear, block=BLOCK, rows="dynamic"),
    "blocks fp16": partial(BlockSparseLinear.from_linear, block=BLOCK, values="float16"),
}
test_block_sparse_linear = linear_op("block_sparse_linear", FORMS, keep_blocks)
