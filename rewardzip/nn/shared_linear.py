"""``SharedLinear``: weights that are entries of a codebook."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardzip_kernels import activations

from ..clustering import clusters
from ..packing import pack, packed_bytes, unpack
from .base import CompressedLinear, check_source


class SharedLinear(CompressedLinear):
    """``W[n, k] = codebook[index[n, k]]``, indices in as few bits as it needs, on disk and in memory.

    Each call looks the weight up anew: it is small, and slower than a dense layer.
    """

    remark = "computed in floats from its codebook"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        entries: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= entries <= 256:
            raise ValueError(f"SharedLinear: the codebook has {entries} entries; it must have 2 to 256")
        self.in_features, self.out_features = in_features, out_features
        self.entries, self.bits, self.dtype = entries, (entries - 1).bit_length(), dtype
        size = packed_bytes(out_features * in_features, self.bits)
        self.register_buffer("indices", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("codebook", torch.zeros(entries, dtype=torch.float32, device=device))
        self.register_buffer(
            "fp32_bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_codebook(cls, linear: nn.Linear, indices: Tensor, codebook: Tensor) -> Self:
        """A layer whose weight is ``codebook[indices]``; bias and type are those of ``linear``."""
        weight, bias = check_source("SharedLinear", linear)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, len(codebook), weight.dtype, weight.device)
        layer._take(indices, codebook, bias)
        return layer.train(linear.training)

    def refresh(self, linear: nn.Linear) -> None:
        """Cluster the new weights anew."""
        weight, bias = self.check_refresh(linear)
        self._take(*clusters(weight.float(), self.entries), bias)

    def _take(self, indices: Tensor, codebook: Tensor, bias: Tensor | None) -> None:
        self.indices.copy_(pack(indices, self.bits))
        self.codebook.copy_(codebook)
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    @property
    def weight(self) -> Tensor:
        # a file made up by somebody may hold an index past the end of a codebook that is no power of two
        indices = unpack(self.indices, self.bits, (self.out_features, self.in_features)).clamp(max=self.entries - 1)
        return self.codebook[indices.int()].to(self.dtype)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        weight, bias = self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)
        return activations.apply(F.linear(input, weight, bias), activation)

    def weight_bytes(self) -> int:
        return self.indices.numel() + 4 * self.codebook.numel()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.fp32_bias is not None}, entries={self.entries}"
        )

    indices: Tensor
    codebook: Tensor
