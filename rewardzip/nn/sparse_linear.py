"""What layers that leave zeros out have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import CompressedLinear
from .int8_linear import Int8Linear

# how far an amount may be missed: pruning takes whole weights and blocks, of layers that they do not divide
ROUNDED = 1e-3


def reaches(share: float, least: float) -> bool:
    """Whether a share of zeros is what pruning by the amount ``least`` leaves, or more."""
    return share >= least - ROUNDED


class SparseLinear(CompressedLinear):
    """Stored values in a pattern of their own, zero elsewhere, times a scale per output where they are int8."""

    values: str
    scale: Tensor | None
    compute_dtype = None

    def unpacked(self) -> Tensor:
        """[out, in]: the stored values with the zeros between them, before any scale."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        dense = self.unpacked().float()
        return (dense if self.scale is None else dense * self.scale[:, None]).to(self.dtype)

    def check_range(self, linear: nn.Linear, weight: Tensor) -> None:
        """ValueError where a weight of ``linear`` is no number that the values can hold."""
        largest = torch.finfo(weight.dtype if self.values == "int8" else getattr(torch, self.values)).max
        bad = int((~(weight.abs() <= largest)).any(1).sum())
        if bad:
            raise ValueError(
                f"{type(self).__name__}: {bad} of the {self.out_features} outputs of {linear} have weights that are "
                f"inf, NaN or beyond {largest:g}"
            )

    def filled(self) -> nn.Module:
        """The layer that computes the same with the zeros among its weights: in int8 where the values are."""
        if self.scale is None:
            return self.to_linear()
        bias, device = self.fp32_bias, self.scale.device
        layer = Int8Linear(self.in_features, self.out_features, bias is not None, self.rows, None, self.dtype, device)  # type: ignore[arg-type]
        layer.int8_weight.copy_(self.unpacked())
        layer.scale.copy_(self.scale)
        if bias is not None and layer.fp32_bias is not None:
            layer.fp32_bias.copy_(bias)
        return layer.train(self.training)
