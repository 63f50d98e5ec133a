"""``BlockSparseLinear``: a pruned linear layer of which only the blocks that hold something are kept and multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from rewardzip_kernels import block_sparse_linear, quantize_rows
from rewardzip_kernels.blocks import (
    MAX_SIDE,
    Blocks,
    check_pattern,
    cut,
    default_block,
    grid,
    occupied,
    row_of_each,
    to_blocks,
    to_dense,
)
from rewardzip_kernels.loading import settled

from .base import check_source
from .sparse_linear import SparseLinear

Values = Literal["int8", "float16", "bfloat16"]
Rows = Literal["float", "dynamic"]


class BlockSparseLinear(SparseLinear):
    """Blocks of outputs x inputs in int8 with a scale per output, or in 16 bits; see
    ``rewardzip_kernels.block_sparse_linear`` for the numerics.

    block: None is (16, 4) on a CPU and (64, 64) on a GPU, which each multiplies best; any shape runs on both.
    rows: "float" keeps x as it is, "dynamic" rounds each row of x to int8 (with int8 values).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stored: int = 0,
        bias: bool = True,
        block: tuple[int, int] | None = None,
        values: Values = "int8",
        rows: Rows = "float",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        block = default_block(device or "cpu") if block is None else block
        if len(block) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in block):
            raise ValueError(f"BlockSparseLinear: block is {block}; it must be (outputs, inputs), each 1 to {MAX_SIDE}")
        if values not in ("int8", "float16", "bfloat16"):
            raise ValueError(f"BlockSparseLinear: values is {values!r}; it must be 'int8', 'float16' or 'bfloat16'")
        if rows not in ("float", "dynamic"):
            raise ValueError(f"BlockSparseLinear: rows is {rows!r}; it must be 'float' or 'dynamic'")
        if rows == "dynamic" and values != "int8":
            raise ValueError(f"BlockSparseLinear: rows='dynamic' multiplies int8 by int8, but values is {values!r}")
        height, width = grid(out_features, in_features, block)
        if not 0 <= stored <= height * width:
            raise ValueError(f"BlockSparseLinear: stored is {stored}, but there are {height} x {width} blocks")
        self.in_features, self.out_features, self.stored = in_features, out_features, stored
        self.block, self.values, self.rows, self.dtype = (block[0], block[1]), values, rows, dtype
        kind = getattr(torch, values)
        # until a pattern is loaded, the first blocks there are
        starts = (torch.arange(height + 1, device=device) * width).clamp(max=stored).to(torch.int32)
        columns = (torch.arange(stored, device=device) % width).to(torch.int32)
        self.register_buffer("block_values", torch.zeros(stored, *block, dtype=kind, device=device))
        self.register_buffer("block_columns", columns)
        self.register_buffer("block_starts", starts)
        self.register_buffer(
            "scale", torch.ones(out_features, dtype=torch.float32, device=device) if values == "int8" else None
        )
        self.register_buffer(
            "fp32_bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block: tuple[int, int] | None = None, values: Values = "int8", rows: Rows = "float"
    ) -> Self:
        """Keep the blocks of a dense layer that hold anything but zeros."""
        weight, bias = check_source("BlockSparseLinear", linear)
        (n, k), device = weight.shape, weight.device
        block = default_block(device) if block is None else block
        # what is wrong with the settings is found before the weights are cut by them
        cls(k, n, 0, bias is not None, block, values, rows, weight.dtype, "meta")
        kept = occupied(weight, block)
        layer = cls(k, n, int(kept.sum()), bias is not None, block, values, rows, weight.dtype, device)
        found = to_blocks(weight, kept, block)
        layer.block_columns.copy_(found.columns)
        layer.block_starts.copy_(found.starts)
        layer.refresh(linear)
        numbers, of_what = (layer.block_values, "weights") if layer.scale is None else (layer.scale, "outputs' weights")
        bad = int((~numbers.isfinite()).sum())
        if bad:
            raise ValueError(f"BlockSparseLinear: {bad} {of_what} of {linear} are inf or NaN in {values}")
        return layer.train(linear.training)

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.block_values, self.block_columns, self.block_starts)

    def kept(self) -> Tensor:
        """[block rows, block columns] of bool: which blocks are stored."""
        kept = torch.zeros(
            grid(self.out_features, self.in_features, self.block), dtype=torch.float32, device=self.block_starts.device
        )
        kept[row_of_each(self.blocks), self.block_columns.long()] = 1
        return kept.bool()

    def check_refresh(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().check_refresh(linear)
        outside = int((occupied(weight, self.block) & ~self.kept().to(weight.device)).sum())
        if outside:
            raise ValueError(
                f"refresh: {outside} blocks of {self.block[0]} x {self.block[1]} hold weights in the dense layer, "
                f"but are not among the {self.stored} stored ones; swap the model anew"
            )
        return weight, bias

    def refresh(self, linear: nn.Linear) -> None:
        weight, bias = self.check_refresh(linear)
        if self.scale is not None:
            weight, scale = quantize_rows(weight)
            self.scale.copy_(scale)
        self.block_values.copy_(cut(weight, self.block)[self.kept().to(weight.device)])
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    def unpacked(self) -> Tensor:
        return to_dense(self.blocks, self.out_features, self.in_features)

    def weight_bytes(self) -> int:
        """The stored blocks, an index of four bytes each, and where each block row begins."""
        block = self.block[0] * self.block[1] * self.block_values.element_size()
        return self.stored * (block + 4) + 4 * len(self.block_starts)

    def check_tensors(self, tensors: dict[str, Tensor]) -> None:
        where = tensors["block_columns"], tensors["block_starts"]
        check_pattern(*where, self.out_features, self.in_features, self.block)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor, int, int, Tensor | None, Tensor | None]:
        return (*self.blocks, self.out_features, self.in_features, self.scale, self.fp32_bias)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        return block_sparse_linear(input, *self.numbers(), activation, self.rows == "dynamic")

    def settle(self, input: Tensor, activation: str) -> Callable[[Tensor], Tensor | None] | None:
        device, dynamic = self.block_values.device, self.rows == "dynamic"
        return settled(device, "block_sparse_linear", *self.numbers(), activation, dynamic, input)

    def extra_repr(self) -> str:
        height, width = grid(self.out_features, self.in_features, self.block)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.fp32_bias is not None}, "
            f"block={self.block}, stored={self.stored} of {height * width}, values={self.values}, rows={self.rows}"
        )

    block_values: Tensor
    block_columns: Tensor
    block_starts: Tensor
    scale: Tensor | None
