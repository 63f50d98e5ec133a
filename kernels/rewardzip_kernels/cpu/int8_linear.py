"""int8_linear on a CPU: ``linear.py`` with fp32 rows and weights made fp32 in registers; or both in bf16, which holds
them exactly, where the processor multiplies it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..int8_linear import int8_linear_reference
from .instruction_sets import choose
from .linear import linear, settled
from .packing import Packed, PackedFloats, packed, packed_floats
from .tile import Float, PairsBFloat16


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
    isa: str | None = None,
) -> Tensor:
    compute = compute_dtype or x.dtype
    pairs = compute == torch.bfloat16 and PairsBFloat16.multiplies(choose(isa))

    def pack() -> Packed | PackedFloats:
        return packed_floats((weight,), compute) if pairs else packed((weight,))

    rows = x.to(compute).float()
    y = linear(PairsBFloat16 if pairs else Float, rows, pack, scale, bias, activation, None, isa)
    if y is None:
        return int8_linear_reference(x, weight, scale, bias, activation, compute_dtype)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _settled(weight: Tensor, *rest: Any) -> Callable[[Tensor], Tensor | None] | None:
    return settled(Float, lambda weight: packed((weight,)), (weight,), *rest)


int8_linear.settled = _settled  # type: ignore[attr-defined]
