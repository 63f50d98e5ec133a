"""Weights as the register tile reads them, packed once per weight tensor and dropped with it.

    weight [N, K] int8  ->  panels [N/64][K/4][64][4], zeros beyond N and K
                            start  [N/64 * 64] int32, -128 times the sum of a row of weights: the accumulators begin
                                   there where inputs are stored as u8 = int8 + 128

A kept copy is used only for the very tensor it came from, at the same address and the same version: torch counts every
in-place change. (A change through ``weight.data`` or NumPy is not counted: follow it with ``forget(weight)``.)
A tensor made in inference mode counts nothing, so its values are compared.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .tile import PANEL

_kept: dict[int, "Packed"] = {}


class Packed:
    """``address`` is that of its header: panels, start, zeros, N, K, as int64."""

    def __init__(self, weight: Tensor, gone: Callable[[weakref.ref[Tensor]], None]):
        self.n, self.k = n, k = weight.shape
        self.padded_k, self.count = (k + 3) // 4 * 4, -(-n // PANEL)
        self.tensor = weakref.ref(weight, gone)
        self.source = weight.data_ptr()
        self.version = None if weight.is_inference() else weight._version
        self.copy = weight.clone() if weight.is_inference() else None
        padded = torch.nn.functional.pad(weight, (0, -k % 4, 0, -n % PANEL))
        panels = padded.contiguous().view(torch.int32).view(-1, PANEL, padded.shape[1] // 4)
        self.panels = panels.transpose(1, 2).contiguous()
        self.start = padded.sum(1, dtype=torch.int32).mul_(-128)
        self.zeros = torch.zeros_like(self.start)
        header = [self.panels.data_ptr(), self.start.data_ptr(), self.zeros.data_ptr(), n, k]
        self.header = torch.tensor(header, dtype=torch.int64)
        self.address = self.header.data_ptr()

    def holds(self, weight: Tensor) -> bool:
        if self.tensor() is not weight or self.source != weight.data_ptr():
            return False
        if self.copy is not None:
            return torch.equal(weight, self.copy)
        return self.version == weight._version


class PackedFloats:
    """The same of weights in floats: as fp32 [N/64][K/4][4][64], or in pairs of bf16 [N/64][K/4][2][64][2], which hold
    int8 exactly."""

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32):
        n, k = weight.shape
        together = 4 // dtype.itemsize
        padded = torch.nn.functional.pad(weight.to(dtype), (0, -k % 4, 0, -n % PANEL))
        parts = padded.view(-1, PANEL, padded.shape[1] // 4, 4 // together, together)
        self.panels = parts.permute(0, 2, 3, 1, 4).contiguous()
        self.zeros = torch.zeros(len(padded))
        header = [self.panels.data_ptr(), self.zeros.data_ptr(), self.zeros.data_ptr(), n, k]
        self.header = torch.tensor(header, dtype=torch.int64)
        self.address = self.header.data_ptr()


def packed(weight: Tensor) -> Packed:
    key = id(weight)
    kept = _kept.get(key)
    if kept is not None and kept.holds(weight):
        return kept

    # by name: when the interpreter ends, this module's own may be gone before the tensor
    def gone(reference: weakref.ref[Tensor], entries: dict[int, Packed] = _kept) -> None:
        now = entries.get(key)
        if now is not None and now.tensor is reference:
            del entries[key]

    with torch.no_grad():
        _kept[key] = new = Packed(weight, gone)
    return new


def forget(weight: Tensor) -> None:
    _kept.pop(id(weight), None)
