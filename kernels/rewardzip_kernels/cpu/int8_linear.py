"""int8_linear on a CPU: ``linear.py`` with fp32 rows and weights made fp32 in registers; or both in bf16, which holds
them exactly, where the processor multiplies it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..int8_linear import int8_linear_reference
from .instruction_sets import choose
from .linear import linear, settled
from .packing import Packed, PackedFloats, packed, packed_floats
from .tile import Float, PairsBFloat16, RowsBFloat16


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
    isa: str | None = None,
) -> Tensor:
    kind: type[Float] = Float
    compute = compute_dtype or x.dtype
    if compute == torch.bfloat16 and PairsBFloat16.multiplies(choose(isa)):
        narrow = x.dtype == torch.bfloat16
        kind, rows = (RowsBFloat16, x) if narrow else (PairsBFloat16, x.float())
    else:
        rows = x.to(compute).float()
    y = linear(kind, rows, lambda: _packed(kind, weight), scale, bias, activation, None, isa)
    if y is None:
        return int8_linear_reference(x, weight, scale, bias, activation, compute_dtype)
    return y if x.dtype == y.dtype else y.to(x.dtype)


def _packed(kind: type[Float], weight: Tensor) -> Packed | PackedFloats:
    return packed((weight,)) if kind is Float else packed_floats((weight,), torch.bfloat16)


def _settled(weight: Tensor, *rest: Any) -> Callable[[Tensor], Tensor | None] | None:
    narrow = rest[-1].dtype == torch.bfloat16 and PairsBFloat16.multiplies(choose())
    kind = RowsBFloat16 if narrow else Float
    return settled(kind, partial(_packed, kind), (weight,), *rest)


int8_linear.settled = _settled  # type: ignore[attr-defined]
