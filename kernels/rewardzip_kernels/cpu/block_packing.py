"""Blocks of any shape as the CPU multiplies them: pieces of 4 inputs by 16 outputs, those of zeros alone left out.

pieces  [P][16][4] int8: one input dword against one vector of outputs; or [P][4][16] fp32 for 16-bit values
inputs  [P] int32: which four inputs a piece takes, in quarters of a row
starts  [N/64 * 4 + 1] int32: group g of 16 outputs is pieces[starts[g] : starts[g + 1]]
start   [N/64 * 64] int32: -128 times the sum of an output's weights, as in ``packing.py``
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..blocks import Blocks, check_pattern, occupied, to_blocks, to_dense
from ..kept import Kept
from .tile import PANEL

PIECE = (16, 4)
GROUPS = PANEL // PIECE[0]


class PackedBlocks:
    """``address`` is that of its header: pieces, start, zeros, inputs, starts, N, K, as int64."""

    def __init__(self, values: Tensor, columns: Tensor, starts: Tensor, n: int, k: int) -> None:
        check_pattern(columns, starts, n, k, (values.shape[1], values.shape[2]))
        dense = to_dense(Blocks(values, columns, starts), n, k)
        padded = torch.nn.functional.pad(dense, (0, -k % PIECE[1], 0, -n % PANEL))
        found = to_blocks(padded, occupied(padded, PIECE), PIECE)
        if values.dtype == torch.int8:
            self.pieces = found.values
            self.start = padded.sum(1, dtype=torch.int32).mul_(-128)
        else:
            self.pieces = found.values.float().transpose(1, 2).contiguous()
            self.start = torch.zeros(padded.shape[0], dtype=torch.int32, device="cpu")
        self.inputs, self.starts = found.columns, found.starts
        self.zeros = torch.zeros_like(self.start)
        tensors = self.pieces, self.start, self.zeros, self.inputs, self.starts
        self.header = torch.tensor([*(t.data_ptr() for t in tensors), n, k], dtype=torch.int64, device="cpu")
        self.address, self.count, self.stored = self.header.data_ptr(), padded.shape[0] // PANEL, len(self.inputs)

    def panel_ranges(self, parts: int) -> list[tuple[int, int]]:
        """The panels in at most ``parts`` runs that hold about as many pieces each."""
        ends = self.starts[GROUPS::GROUPS].double() + torch.arange(1, self.count + 1, device="cpu") * 1e-3
        wanted = ends[-1] * torch.arange(1, parts, device="cpu") / parts
        bounds = [0, *(torch.searchsorted(ends, wanted) + 1).tolist(), self.count]
        return [(a, b) for a, b in pairwise(bounds) if a < b]


packed_blocks = Kept(PackedBlocks)
