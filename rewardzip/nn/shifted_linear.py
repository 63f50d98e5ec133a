"""``ShiftedLinear``: 8-bit weights with a zero point, on the int8 kernel."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from rewardzip_kernels import int8_linear
from rewardzip_kernels.quantize import TINY

from .base import CompressedLinear, check_source


class ShiftedLinear(CompressedLinear):
    """``W[n, k] = (int8_weight[n, k] - int8_weight[n, K]) * scale[n]``: numbers of 9 bits, moved into 8.

    Row n of the kernel's weight [N, K + 1] ends with how far it was moved, and rows of x with minus their sum.
    """

    remark = "one input more, for the zero point"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features + 1, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer(
            "fp32_bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_codes(cls, linear: nn.Linear, codes: Tensor, scale: Tensor, low: Tensor) -> Self:
        """codes [N, K]: the whole numbers that are multiplied by scale [N], from ``low`` [N] to 255 above it."""
        weight, bias = check_source("ShiftedLinear", linear)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, weight.dtype, weight.device)
        layer._take(codes, scale, low, bias)
        return layer.train(linear.training)

    def refresh(self, linear: nn.Linear) -> None:
        """Round to nearest between the least and the largest weight of each output."""
        weight, bias = self.check_refresh(linear)
        least, most = weight.float().amin(1).clamp(max=0), weight.float().amax(1).clamp(min=0)
        scale = (most - least).clamp(min=TINY) / 255
        low = (least / scale).round()
        codes = (weight.float() / scale[:, None]).round().clamp(low[:, None], low[:, None] + 255)
        self._take(codes, scale, low, bias)

    def _take(self, codes: Tensor, scale: Tensor, low: Tensor, bias: Tensor | None) -> None:
        self.scale.copy_(scale)
        moved = -128 - low[:, None]
        self.int8_weight.copy_(torch.cat([codes + moved, moved], 1))
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    @property
    def weight(self) -> Tensor:
        codes, moved = self.int8_weight[:, :-1].float(), self.int8_weight[:, -1:].float()
        return ((codes - moved) * self.scale[:, None]).to(self.dtype)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        rows = torch.cat([input, -input.sum(-1, keepdim=True)], -1)
        return int8_linear(rows, self.int8_weight, self.scale, self.fp32_bias, activation)

    def weight_bytes(self) -> int:
        return self.int8_weight.numel()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.fp32_bias is not None}"

    int8_weight: Tensor
    scale: Tensor
