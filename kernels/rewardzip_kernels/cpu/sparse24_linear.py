"""sparse24_linear on a CPU: ``linear.py`` with the tile that picks the kept inputs out of each row."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kept import Kept
from ..sparse24_linear import products, sparse24_linear_reference
from .linear import linear, settled
from .packing24 import Packed24
from .tile24 import Sparse24BFloat16, Sparse24Float, Sparse24Float16, Sparse24Int8

FLOAT_KINDS = {torch.int8: Sparse24Float, torch.float16: Sparse24Float16, torch.bfloat16: Sparse24BFloat16}


_kept = Kept(Packed24)


def _packed(values: Tensor, indices: Tensor, in_features: int) -> Packed24:
    return _kept((values, indices), in_features)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
    isa: str | None = None,
) -> Tensor:
    dynamic = compute_dtype == torch.int8
    kind = Sparse24Int8 if dynamic else FLOAT_KINDS[values.dtype]
    rows = x.float() if dynamic else x.to(products(x, values, compute_dtype)).float()

    y = linear(kind, rows, lambda: _packed(values, indices, in_features), scale, bias, activation, None, isa)
    if y is None:
        return sparse24_linear_reference(x, values, indices, scale, in_features, bias, activation, compute_dtype)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _settled(
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    compute_dtype: torch.dtype | None,
    x: Tensor,
) -> Callable[[Tensor], Tensor | None] | None:
    kind = Sparse24Int8 if compute_dtype == torch.int8 else FLOAT_KINDS[values.dtype]
    pack = partial(_packed, in_features=in_features)
    return settled(kind, pack, (values, indices), scale, bias, activation, None, x)


sparse24_linear.settled = _settled  # type: ignore[attr-defined]
