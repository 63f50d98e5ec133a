"""Random sparse weights for the tests of sparse kernels and modules."""

import torch
from numerics import quantized
from torch import Tensor, nn

from rewardzip_kernels.sparse24_layout import pack
from rewardzip_kernels.sparse_rows_linear import nonzeros


def keep_two(weight: Tensor, last: bool = False) -> Tensor:
    """The weight with 2 of every 4 inputs kept, at random or the last two."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -k % 4)).view(n, -1, 4)
    order = torch.rand(groups.shape, device=weight.device).argsort(2)
    if last:
        order = torch.arange(4, device=weight.device).flip(0).expand(groups.shape)
    return (groups * (order < 2)).view(n, -1)[:, :k].contiguous()


def sparse24(n: int, k: int, device: str = "cpu", values: torch.dtype = torch.int8):
    """(dense weight, packed values, indices, scale or None, bias, scale of the dense weight)."""
    q, scale, bias = quantized(n, k, device)
    if values != torch.int8:
        # exact in both 16-bit types, over many exponents, some of them fp16's subnormal ones
        q, scale = q.to(values) * 2.0 ** -torch.randint(0, 20, (n, k), device=device), torch.ones(n, device=device)
        bias = bias.clamp(-1, 1)
    q = keep_two(q.to(values))
    packed, indices = pack(q)
    return q, packed, indices, scale if values == torch.int8 else None, bias, scale


def sparse_rows(n: int, k: int, device: str = "cpu", values: torch.dtype = torch.int8, kept: float = 0.2):
    """(dense weight, values, columns, starts, scale or None, bias, scale of the dense weight)."""
    q, scale, bias = quantized(n, k, device)
    if values != torch.int8:
        q, scale, bias = q.to(values) / 64, torch.ones(n, device=device), bias.clamp(-1, 1)
    q = q * (torch.rand(n, k, device=device) < kept)
    columns, starts = nonzeros(q != 0)
    return q, q[q != 0], columns, starts, scale if values == torch.int8 else None, bias, scale


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias).requires_grad_(False)
    layer.weight.copy_(weight)
    return layer
