"""Weights as the register tile reads them, packed once per weight tensor and dropped with it: ``kept.py``.

weight [N, K] int8  ->  panels [N/64][K/4][64][4], zeros beyond N and K
                        start  [N/64 * 64] int32, -128 times the sum of a row of weights: the accumulators begin
                               there where inputs are stored as u8 = int8 + 128
"""

import torch
from torch import Tensor

from ..kept import Kept
from .tile import PANEL


class Packed:
    """``address`` is that of its header: panels, start, zeros, N, K, as int64."""

    def __init__(self, weight: Tensor):
        self.n, self.k = n, k = weight.shape
        self.padded_k, self.count = (k + 3) // 4 * 4, -(-n // PANEL)
        padded = torch.nn.functional.pad(weight, (0, -k % 4, 0, -n % PANEL))
        panels = padded.contiguous().view(torch.int32).view(-1, PANEL, padded.shape[1] // 4)
        self.panels = panels.transpose(1, 2).contiguous()
        self.start = padded.sum(1, dtype=torch.int32).mul_(-128)
        self.zeros = torch.zeros_like(self.start)
        header = [self.panels.data_ptr(), self.start.data_ptr(), self.zeros.data_ptr(), n, k]
        self.header = torch.tensor(header, dtype=torch.int64, device="cpu")
        self.address = self.header.data_ptr()


class PackedFloats:
    """The same of weights in floats: as fp32 [N/64][K/4][4][64], or in pairs of bf16 [N/64][K/4][2][64][2], which hold
    int8 exactly."""

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32):
        self.n, self.k = n, k = weight.shape
        self.padded_k, self.count = (k + 3) // 4 * 4, -(-n // PANEL)
        together = 4 // dtype.itemsize
        padded = torch.nn.functional.pad(weight.to(dtype), (0, -k % 4, 0, -n % PANEL))
        parts = padded.view(-1, PANEL, padded.shape[1] // 4, 4 // together, together)
        self.panels = parts.permute(0, 2, 3, 1, 4).contiguous()
        self.zeros = torch.zeros(len(padded), dtype=torch.float32, device="cpu")
        header = [self.panels.data_ptr(), self.zeros.data_ptr(), self.zeros.data_ptr(), n, k]
        self.header = torch.tensor(header, dtype=torch.int64, device="cpu")
        self.address = self.header.data_ptr()


packed, packed_floats = Kept(Packed), Kept(PackedFloats)
