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
    """shape [out, in]; filled: per block shape, the share of blocks that hold anything; n_m: at most n of every m."""

    shape: tuple[int, int]
    sparsity: float
    dead_outputs: int
    dead_inputs: int
    n_m: tuple[int, int] | None
    filled: dict[tuple[int, int], float]
    block: tuple[int, int] | None
    """The largest shape whose empty blocks explain the zeros."""

    def __str__(self) -> str:
        n, k = self.shape
        if self.sparsity < SOME:
            return "dense"
        dead = 1 - (1 - self.dead_outputs / n) * (1 - self.dead_inputs / k)
        if dead >= MOST * self.sparsity:
            return f"{self.dead_outputs} dead outputs, {self.dead_inputs} dead inputs"
        if self.block is not None:
            return f"blocks {self.block[0]}x{self.block[1]}"
        return "unstructured" if self.n_m is None else f"{self.n_m[0]}:{self.n_m[1]}"


def find_pattern(weight: Tensor) -> Pattern:
    """The pattern of a [out, in] weight."""
    used = weight != 0
    n, k = used.shape
    sparsity = 1 - float(used.float().mean())
    dead_outputs, dead_inputs = int((~used.any(1)).sum()), int((~used.any(0)).sum())
    if sparsity < SOME:
        return Pattern((n, k), sparsity, dead_outputs, dead_inputs, None, {}, None)
    filled, named = {}, None
    for block in BLOCKS:
        here = occupied(used, block)
        filled[block] = float(here.float().mean())
        # zeros in empty blocks, the last ones cut off at the weight's edge
        held = here.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
        if named is None and 1 - float(held.float().mean()) >= MOST * sparsity:
            named = block
    return Pattern((n, k), sparsity, dead_outputs, dead_inputs, _n_m(used), filled, named)


def _n_m(used: Tensor) -> tuple[int, int] | None:
    """The first group size of which no group is more than half used."""
    for m in GROUPS:
        padded = torch.nn.functional.pad(used, (0, -used.shape[1] % m))
        most = int(padded.unflatten(1, (-1, m)).sum(2).max())
        if most <= m // 2:
            return max(most, 1), m
    return None
