"""``GridLinear``: weights of 2 to 8 bits with a scale and bounds for each group of inputs, computed in floats."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardzip_kernels import activations
from rewardzip_kernels.quantize import TINY

from ..packing import pack, packed_bytes, unpack
from .base import CompressedLinear, check_source


class GridLinear(CompressedLinear):
    """``W[n, k] = (code[n, k] + low[n, k // group]) * scale[n, k // group]``, codes from 0 to 2^bits - 1.

    For groups, which an int8 kernel with one scale an output cannot take. The codes are packed in memory as on disk;
    each call makes the weight anew, so it is small, and slower than a dense layer.
    """

    remark = "computed in floats from its codes"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        group: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8 or group < 1:
            raise ValueError(f"GridLinear: bits={bits}, group={group}; they must be 2 to 8, and 1 or more")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group, self.dtype = bits, group, dtype
        count, groups = out_features * in_features, (in_features + group - 1) // group
        self.register_buffer("codes", torch.zeros(packed_bytes(count, bits), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=torch.float32, device=device))
        self.register_buffer("low", torch.zeros(out_features, groups, dtype=torch.int16, device=device))
        self.register_buffer(
            "fp32_bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_codes(cls, linear: nn.Linear, codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int) -> Self:
        """codes [N, K]: the whole numbers that are multiplied by scale [N, G], ``low`` [N, G] or more."""
        weight, bias = check_source("GridLinear", linear)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, bits, group, weight.dtype, weight.device)
        layer._take(codes, scale, low, bias)
        return layer.train(linear.training)

    def refresh(self, linear: nn.Linear) -> None:
        """Round to nearest between the least and the largest weight of each group."""
        weight, bias = self.check_refresh(linear)
        rows = F.pad(weight.float(), (0, -self.in_features % self.group)).view(self.out_features, -1, self.group)
        # padding is 0, and 0 is within the bounds
        least, most = rows.amin(2).clamp(max=0), rows.amax(2).clamp(min=0)
        scale = (most - least).clamp(min=TINY) / (2**self.bits - 1)
        low = (least / scale).round()
        spread = [self._spread(t) for t in (scale, low)]
        codes = (weight.float() / spread[0]).round().clamp(spread[1], spread[1] + 2**self.bits - 1)
        self._take(codes, scale, low, bias)

    def _take(self, codes: Tensor, scale: Tensor, low: Tensor, bias: Tensor | None) -> None:
        self.scale.copy_(scale)
        self.low.copy_(low)
        self.codes.copy_(pack(codes - self._spread(self.low), self.bits))
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    def _spread(self, numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(self.group, 1)[:, : self.in_features]

    @property
    def weight(self) -> Tensor:
        codes = unpack(self.codes, self.bits, (self.out_features, self.in_features))
        runs = F.pad(codes, (0, -self.in_features % self.group)).view(*self.scale.shape, -1)
        filled = (runs + self.low[..., None]) * self.scale[..., None]
        return filled.flatten(1)[:, : self.in_features].to(self.dtype)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        weight, bias = self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)
        return activations.apply(F.linear(input, weight, bias), activation)

    def weight_bytes(self) -> int:
        return self.codes.numel()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.fp32_bias is not None}, bits={self.bits}, group={self.group}"
        )

    codes: Tensor
    scale: Tensor
    low: Tensor
