"""What every linear op checks about its arguments, in one place; each message names the two things that disagree."""

import torch
from torch import Tensor

from .activations import parse

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_linear(op: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> None:
    """x [..., K] float, weight [N, K] int8, scale [N] fp32, bias [N] fp32 or None, all on one device."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if weight.dtype != torch.int8:
        raise TypeError(f"{op}: weight is {weight.dtype}; it must be int8")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; it must be [out, in], each 1 or more")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, but weight {tuple(weight.shape)} takes {k} inputs")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x on {x.device}")
    check_vector(op, "scale", scale, n, x)
    if bias is not None:
        check_vector(op, "bias", bias, n, x)
    parse(activation)


def check_vector(op: str, name: str, vector: Tensor, length: int, x: Tensor) -> None:
    if vector.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {vector.dtype}; it must be float32")
    if vector.shape != (length,):
        raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; it must be ({length},)")
    if vector.device != x.device:
        raise ValueError(f"{op}: {name} is on {vector.device}, x on {x.device}")


def dense_rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] whose last dimension is dense; a copy only where no view will do."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [M, N], a fresh tensor, as [..., N] for x [..., K]; a view would be one that nobody may change in place."""
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])  # type: ignore[no-any-return]
