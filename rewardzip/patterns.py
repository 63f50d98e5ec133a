"""Where the zeros of a weight are: the pattern that pruning left in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewardzip_kernels.blocks import occupied

# the block shapes looked for, largest first: a 64 x 64 pattern is a 16 x 4 pattern too
BLOCKS = ((64, 64), (32, 32), (16, 16), (16, 4))
# group sizes of n:m patterns
GROUPS = (4, 8, 16)

# below this share of zeros a weight counts as dense
SOME = 0.05
# a pattern is named by what explains this share of the zeros
MOST = 0.9


@dataclass(frozen=True)
class Pattern:
    """shape [out, in]; ``filled``: per block shape, the share of blocks that hold anything; ``most``: per group size m,
    the most weights that any m inputs in a row hold; both empty for a dense weight. ``block``: the largest shape whose
    empty blocks explain the zeros."""

    shape: tuple[int, int]
    sparsity: float
    dead_outputs: int
    dead_inputs: int
    most: dict[int, int]
    filled: dict[tuple[int, int], float]
    block: tuple[int, int] | None

    def __str__(self) -> str:
        n, k = self.shape
        if self.sparsity < SOME:
            return "dense"
        dead = 1 - (1 - self.dead_outputs / n) * (1 - self.dead_inputs / k)
        if dead >= MOST * self.sparsity:
            return f"{self.dead_outputs} dead outputs, {self.dead_inputs} dead inputs"
        if self.block is not None:
            return f"blocks {self.block[0]}x{self.block[1]}"
        for m, n in self.most.items():
            # where there are many more zeros, the groups are so by chance
            if 2 * n <= m and MOST * self.sparsity <= 1 - n / m:
                return f"{n}:{m}"
        return "unstructured"


def find_pattern(weight: Tensor) -> Pattern:
    """The pattern of a [out, in] weight."""
    used = weight != 0
    n, k = used.shape
    sparsity = 1 - float(used.float().mean())
    dead_outputs, dead_inputs = int((~used.any(1)).sum()), int((~used.any(0)).sum())
    if sparsity < SOME:
        return Pattern((n, k), sparsity, dead_outputs, dead_inputs, {}, {}, None)
    filled, named = {}, None
    for block in BLOCKS:
        here = occupied(used, block)
        filled[block] = float(here.float().mean())
        # zeros in empty blocks, the last ones cut off at the weight's edge
        held = here.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
        if named is None and 1 - float(held.float().mean()) >= MOST * sparsity:
            named = block
    most = {}
    for m in GROUPS:
        padded = torch.nn.functional.pad(used, (0, -k % m))
        most[m] = int(padded.unflatten(1, (-1, m)).sum(2).max())
    return Pattern((n, k), sparsity, dead_outputs, dead_inputs, most, filled, named)
