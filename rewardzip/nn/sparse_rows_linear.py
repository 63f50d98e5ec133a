"""``SparseRowsLinear``: a linear layer of which few weights are left, in no pattern, and its activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from rewardzip_kernels import quantize_rows, sparse_rows_linear
from rewardzip_kernels.loading import settled
from rewardzip_kernels.sparse_rows_linear import check_stored, column_type, dense, nonzeros

from .base import check_source
from .sparse_linear import SparseLinear, reaches

# the weights a layer must have had for the time saved on them to show
SMALLEST = 1 << 20

Values = Literal["int8", "float32", "float16", "bfloat16"]


class SparseRowsLinear(SparseLinear):
    """Each output's nonzeros and their inputs; see ``rewardzip_kernels.sparse_rows_linear`` for the numerics.

    nonzeros: how many there is room for. rows: always "float". values: what they are stored in; "int8" has a scale per
    output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzeros: int,
        bias: bool = True,
        values: Values = "int8",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if values not in ("int8", "float32", "float16", "bfloat16"):
            raise ValueError(
                f"SparseRowsLinear: values is {values!r}; it must be 'int8', 'float32', 'float16' or 'bfloat16'"
            )
        if not 0 <= nonzeros <= in_features * out_features:
            raise ValueError(
                f"SparseRowsLinear: {nonzeros} nonzeros in a weight of {out_features} x {in_features}"
            )  # fmt: skip
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.nonzeros, self.values = nonzeros, values
        self.register_buffer("packed_values", torch.zeros(nonzeros, dtype=getattr(torch, values), device=device))
        self.register_buffer("columns", torch.zeros(nonzeros, dtype=column_type(in_features), device=device))
        self.register_buffer("starts", torch.zeros(out_features + 1, dtype=torch.int32, device=device))
        self.register_buffer(
            "scale", torch.ones(out_features, dtype=torch.float32, device=device) if values == "int8" else None
        )
        self.register_buffer(
            "fp32_bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, values: Values = "int8") -> Self:
        """Pack the nonzeros of a dense layer: nothing is pruned here."""
        weight, bias = check_source("SparseRowsLinear", linear)
        n, k = weight.shape
        layer = cls(k, n, int((weight != 0).sum()), bias is not None, values, weight.dtype, weight.device)
        layer.refresh(linear)
        return layer.train(linear.training)

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Any weight fits, with all its nonzeros."""
        return True

    @classmethod
    def wins(cls, shape: tuple[int, int], sparsity: float, device: str, rows: str) -> str | None:
        """Why this is faster than dense int8 for a weight [out, in] that fits, None where it was not measured to be.

        ``benchmarks/results/amd-epyc-zen5/sparse24-1-thread.json``; no GPU was measured. Against rows rounded to int8
        95 % wins or loses by how many rows there are.
        """
        least = 0.95 if rows == "float" else 0.98
        if device != "cpu" or shape[0] * shape[1] < SMALLEST or not reaches(sparsity, least):
            return None
        return f"{100 * sparsity:.1f} % of its weights are zero, from {100 * least:.0f} % on it is faster"

    def check_refresh(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().check_refresh(linear)
        count = int((weight != 0).sum())
        if count > self.nonzeros:
            raise ValueError(f"refresh: the dense layer has {count} nonzeros, the packed one room for {self.nonzeros}")
        self.check_range(linear, weight)
        return weight, bias

    def refresh(self, linear: nn.Linear) -> None:
        weight, bias = self.check_refresh(linear)
        pattern = weight != 0
        if self.scale is not None:
            weight, scale = quantize_rows(weight)
            self.scale.copy_(scale)
        columns, starts = nonzeros(pattern)
        self.packed_values[: columns.numel()].copy_(weight[pattern])
        self.columns[: columns.numel()].copy_(columns)
        self.starts.copy_(starts)
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    def check_tensors(self, tensors: dict[str, Tensor]) -> None:
        check_stored(tensors["columns"], tensors["starts"], self.in_features)

    def weight_bytes(self) -> int:
        """Each nonzero's value and column, and a start an output: 3 bytes a nonzero of int8 up to 32768 inputs."""
        stored = self.packed_values.element_size() + self.columns.element_size()
        return self.nonzeros * stored + 4 * self.starts.numel()

    def unpacked(self) -> Tensor:
        return dense(self.packed_values, self.columns, self.starts, self.in_features)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        return sparse_rows_linear(input, *self._numbers(), activation)

    def settle(self, input: Tensor, activation: str) -> Callable[[Tensor], Tensor | None] | None:
        return settled(self.starts.device, "sparse_rows_linear", *self._numbers(), activation, input)

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, Tensor | None]:
        return self.packed_values, self.columns, self.starts, self.scale, self.in_features, self.fp32_bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nonzeros={self.nonzeros}, "
            f"bias={self.fp32_bias is not None}, values={self.values}"
        )

    rows = "float"
    packed_values: Tensor
    columns: Tensor
    starts: Tensor
    scale: Tensor | None
