"""``Int8Linear``: a linear layer and its activation on the int8 kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from rewardzip_kernels import int8_dynamic_linear, int8_linear, quantize_rows
from rewardzip_kernels.loading import settled
from rewardzip_kernels.quantize import TINY

from .base import CompressedLinear, check_source

Rows = Literal["float", "dynamic", "static"]


class Int8Linear(CompressedLinear):
    """int8 weights with a scale per output; see ``rewardzip_kernels.int8_linear`` for the numerics.

    rows: "float" keeps x as it is, "dynamic" rounds each row of x to int8, "static" does so with one scale for all.
    bits: fewer than 8 and a row's weights are at most 2^bits - 1 steps apart; they are int8 in memory, packed on disk.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rows: Rows = "float",
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        bits: int = 8,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"Int8Linear: bits is {bits}; it must be 2 to 8")
        if rows not in ("float", "dynamic", "static"):
            raise ValueError(f"Int8Linear: rows is {rows!r}; it must be 'float', 'dynamic' or 'static'")
        self.in_features, self.out_features = in_features, out_features
        self.rows, self.compute_dtype, self.dtype = rows, compute_dtype, dtype
        self.bits = bits
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer(
            "fp32_bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )
        self.register_buffer("x_scale", torch.ones(1, dtype=torch.float32, device=device) if rows == "static" else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rows: Rows = "float",
        compute_dtype: torch.dtype | None = None,
        x_amax: float | None = None,
    ) -> Self:
        """Round a dense layer's weights; ``x_amax``, the largest input magnitude, is what a static scale is made of."""
        weight, bias = check_source("Int8Linear", linear)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, rows, compute_dtype, weight.dtype, weight.device)
        if rows == "static":
            if x_amax is None or not 0 < x_amax < torch.inf:
                raise ValueError(f"Int8Linear: rows='static' needs x_amax, the largest input magnitude, got {x_amax}")
            layer.x_scale = torch.full((1,), x_amax / 127, dtype=torch.float32, device=weight.device)
        layer.refresh(linear)
        bad = int((~layer.scale.isfinite()).sum())
        if bad:
            raise ValueError(f"Int8Linear: {bad} of the {n} outputs of {linear} have weights that are inf or NaN")
        return layer.train(linear.training)

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scale: Tensor,
        bits: int = 8,
        rows: Rows = "float",
        x_amax: float | None = None,
    ) -> Self:
        """A layer with the weight ``codes [N, K] * scale [N]``, and the bias and type of ``linear``."""
        layer = cls.from_linear(linear, rows, None, x_amax)
        layer.bits = bits
        layer.int8_weight.copy_(codes)
        layer.scale.copy_(scale)
        return layer

    @property
    def remark(self) -> str:  # type: ignore[override]
        return "" if self.bits == 8 else f"{self.bits} bits on disk"

    def refresh(self, linear: nn.Linear) -> None:
        weight, bias = self.check_refresh(linear)
        if self.bits == 8:
            quantize_rows(weight, out=(self.int8_weight, self.scale))
        else:
            most = 2 ** (self.bits - 1) - 1
            self.scale.copy_(weight.float().abs().amax(1).clamp(min=TINY) / most)
            self.int8_weight.copy_((weight.float() / self.scale[:, None]).round().clamp(-most, most))
        if bias is not None and self.fp32_bias is not None:
            self.fp32_bias.copy_(bias)

    @property
    def weight(self) -> Tensor:
        return (self.int8_weight.float() * self.scale[:, None]).to(self.dtype)

    def weight_bytes(self) -> int:
        return self.out_features * self.in_features

    def compute(self, input: Tensor, activation: str) -> Tensor:
        if self.rows == "float":
            return int8_linear(input, self.int8_weight, self.scale, self.fp32_bias, activation, self.compute_dtype)
        return int8_dynamic_linear(input, self.int8_weight, self.scale, self.fp32_bias, activation, self.x_scale)

    def settle(self, input: Tensor, activation: str) -> Callable[[Tensor], Tensor | None] | None:
        if self.compute_dtype not in (None, input.dtype):
            return None
        op = "int8_linear" if self.rows == "float" else "int8_dynamic_linear"
        numbers = self.int8_weight, self.scale, self.fp32_bias
        return settled(self.int8_weight.device, op, *numbers, activation, self.x_scale, input)

    def extra_repr(self) -> str:
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.fp32_bias is not None}, rows={self.rows}{compute}"
            f"{'' if self.bits == 8 else f', bits={self.bits}'}"
        )

    int8_weight: Tensor
    scale: Tensor
    x_scale: Tensor | None
