"""2:4 weights as ``tile24.py`` reads them, made once from the stored planes and dropped with them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..sparse24_layout import ordered, places
from .tile import PANEL


class Packed24:
    """``address`` is that of its header: panels, start, zeros, N, K, as int64; ``ones`` stands in for no scale."""

    def __init__(self, values: Tensor, indices: Tensor, in_features: int):
        (n, b), self.k = indices.shape, in_features
        self.n, self.count = n, -(-n // PANEL)
        self.padded_k, missing = 8 * b, -n % PANEL
        self.ones = None if values.dtype == torch.int8 else torch.ones(n, dtype=torch.float32, device="cpu")
        # per output and step of 8 inputs the four values of its two groups, and their places
        four = pad(ordered(values).view(n, b, 4), (0, 0, 0, 0, 0, missing)).view(-1, PANEL, b, 4)
        where = pad(places(indices).view(n, b, 4), (0, 0, 0, 0, 0, missing)).view(-1, 4, 16, b, 4)
        shifts = torch.arange(0, 8, 2, device="cpu").view(4, 1, 1, 1)
        bits = (where << shifts).sum(1).to(torch.uint8).permute(0, 2, 1, 3).reshape(self.count, b, 64)
        four = four.transpose(1, 2)
        if values.dtype != torch.int8:
            # one group after the other
            four = four.unflatten(3, (2, 2)).transpose(2, 3)
        stored = four.contiguous().view(torch.uint8).reshape(self.count, b, -1)
        self.panels = torch.cat((stored, bits), 2)
        total = values.sum((1, 2), dtype=torch.int32).mul_(-128) if self.ones is None else torch.zeros_like(self.ones)
        self.start = pad(total, (0, missing))
        self.zeros = torch.zeros_like(self.start)
        header = [self.panels.data_ptr(), self.start.data_ptr(), self.zeros.data_ptr(), n, in_features]
        self.header = torch.tensor(header, dtype=torch.int64, device="cpu")
        self.address = self.header.data_ptr()
