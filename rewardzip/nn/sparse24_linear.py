"""``Sparse24Linear``: a linear layer with a 2:4 sparse weight, and its activation, on the 2:4 kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from rewardzip_kernels import quantize_rows, sparse24_linear
from rewardzip_kernels.loading import settled
from rewardzip_kernels.sparse24_layout import broken_groups, pack, places, unpack, width

from .base import check_source
from .sparse_linear import SparseLinear

Values = Literal["int8", "float16", "bfloat16"]

# beyond this no call takes a whole MLP
SMALLEST = 1 << 20


class Sparse24Linear(SparseLinear):
    """At most 2 nonzeros in every 4 inputs of an output; see ``rewardzip_kernels.sparse24_linear`` for the numerics.

    values: what the nonzeros are stored in; "int8" has a scale per output. rows: "float" keeps x as it is, "dynamic"
    rounds each row of x to int8, for int8 values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        values: Values = "int8",
        rows: Literal["float", "dynamic"] = "float",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if values not in ("int8", "float16", "bfloat16"):
            raise ValueError(f"Sparse24Linear: values is {values!r}; it must be 'int8', 'float16' or 'bfloat16'")
        if rows not in ("float", "dynamic"):
            raise ValueError(f"Sparse24Linear: rows is {rows!r}; it must be 'float' or 'dynamic'")
        if rows == "dynamic" and values != "int8":
            raise ValueError(f"Sparse24Linear: rows='dynamic' multiplies int8 by int8, but values is {values!r}")
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.values, self.rows = values, rows
        n, b = out_features, width(in_features)
        self.register_buffer("packed_values", torch.zeros(n, 4, b, dtype=getattr(torch, values), device=device))
        # places 0 and 1 in every group
        self.register_buffer("indices", torch.full((n, b), 0b01000100, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(n, dtype=torch.float32, device=device) if values == "int8" else None)
        self.register_buffer("fp32_bias", torch.zeros(n, dtype=torch.float32, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, values: Values = "int8", rows: Literal["float", "dynamic"] = "float"
    ) -> Self:
        """Pack a dense layer whose weight is 2:4 already: nothing is pruned here."""
        weight, bias = check_source("Sparse24Linear", linear)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, values, rows, weight.dtype, weight.device)
        layer.refresh(linear)
        return layer.train(linear.training)

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Whether a dense weight [out, in] is 2:4, so that packing it loses no nonzero."""
        return broken_groups(weight)[0] == 0

    @classmethod
    def wins(cls, shape: tuple[int, int], sparsity: float, device: str, rows: str) -> str | None:
        """Why this is faster than dense int8 for a weight [out, in] that fits, None where it was not measured to be.

        ``benchmarks/results/amd-epyc-zen5/sparse24-1-thread.json``; no GPU was measured. Smaller layers win too,
        alone, and lose to one call for a whole MLP, which they may be part of.
        """
        if device != "cpu" or shape[0] * shape[1] < SMALLEST:
            return None
        return "2 of every 4 inputs are zero: half the products, 5 bits a weight"

    def check_refresh(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().check_refresh(linear)
        broken, groups = broken_groups(weight)
        if broken:
            raise ValueError(
                f"Sparse24Linear: {broken} of the {groups} groups of 4 inputs of {linear} have more than 2 nonzeros"
            )
        self.check_range(linear, weight)
        return weight, bias

    def refresh(self, linear: nn.Linear) -> None:
        weight, bias = self.check_refresh(linear)
        if self.scale is not None:
            weight, scale = quantize_rows(weight)
            self.scale.copy_(scale)
        packed, indices = pack(weight)
        self.packed_values.copy_(packed)
        self.indices.copy_(indices)
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    def check_tensors(self, tensors: dict[str, Tensor]) -> None:
        where = places(tensors["indices"])
        if bool((where[..., 0] >= where[..., 1]).any()):
            raise ValueError("indices: a group's second place must be after its first")
        padded = width(self.in_features) * 8
        if bool(unpack(tensors["packed_values"], tensors["indices"], padded)[:, self.in_features :].any()):
            raise ValueError(f"packed_values: there are nonzeros beyond the {self.in_features} inputs")

    def weight_bytes(self) -> int:
        """5 bits a weight of int8, 9 of 16 bits, the inputs filled up to a multiple of 8."""
        return self.packed_values.numel() * self.packed_values.element_size() + self.indices.numel()

    def unpacked(self) -> Tensor:
        return unpack(self.packed_values, self.indices, self.in_features)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        return sparse24_linear(input, *self._numbers(), activation, self._compute_dtype())

    def settle(self, input: Tensor, activation: str) -> Callable[[Tensor], Tensor | None] | None:
        more = activation, self._compute_dtype(), input
        return settled(self.indices.device, "sparse24_linear", *self._numbers(), *more)

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor | None, int, Tensor | None]:
        return self.packed_values, self.indices, self.scale, self.in_features, self.fp32_bias

    def _compute_dtype(self) -> torch.dtype | None:
        return torch.int8 if self.rows == "dynamic" else None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.fp32_bias is not None}, values={self.values}, rows={self.rows}"
        )

    packed_values: Tensor
    indices: Tensor
    scale: Tensor | None
