"""int8_dynamic_linear: y = act(scale * row_scale * (q(x) @ weight^T) + bias), int8 times int8 with exact int32 sums.

    x [..., K] fp32, fp16 or bf16     weight [N, K] int8     scale, bias [N] fp32     y [..., N] in x's dtype
    q(x), row_scale                   ``quantize_rows`` of x: a scale per row, or the one static ``x_scale`` [1]

The integers, and so their sums, are the same to the bit on every device; only the epilogue rounds.
"""

from typing import Any

import torch
from torch import Tensor

from . import activations
from .checks import check_linear, check_vector, dense_rows, shaped_like
from .int8_linear import linear_input_gradient, linear_output, linear_setup_context
from .quantize import QMAX, quantize_rows
from .registration import register

# the largest sum, K * 127 * 127, must stay below 2^31
MAX_K = (2**31 - 1) // QMAX**2

# a sum of this many products is below 2^24: exact in fp32, in whatever order it is taken
_EXACT_K = 2**24 // QMAX**2


def int8_matmul_reference(q: Tensor, weight: Tensor) -> Tensor:
    """q [M, K] int8, weight [N, K] int8 -> [M, N] int32: exact integer sums through fp32 products of exact slices."""
    sums = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _EXACT_K):
        part = slice(start, start + _EXACT_K)
        sums += (q[:, part].float() @ weight[:, part].float().t()).to(torch.int32)
    return sums


def int8_dynamic_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_scale: Tensor | None = None,
) -> Tensor:
    q, row_scale = quantize_rows(dense_rows(x), x_scale)
    y = int8_matmul_reference(q, weight) * (row_scale[:, None] * scale)
    if bias is not None:
        y += bias
    return shaped_like(x, activations.apply(y, activation).to(x.dtype))


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_scale: Tensor | None = None,
) -> None:
    check_linear("int8_dynamic_linear", x, weight, scale, bias, activation)
    if weight.shape[1] > MAX_K:
        raise ValueError(
            f"int8_dynamic_linear: weight has {weight.shape[1]} inputs, but int32 sums hold at most {MAX_K}"
        )
    if x_scale is not None:
        check_vector("int8_dynamic_linear", "x_scale", x_scale, 1, x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return linear_input_gradient(ctx, grad, _op), None, None, None, None, None


_op = register(
    "int8_dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, str activation='none', "
    "Tensor? x_scale=None) -> Tensor",
    check=_check,
    reference=int8_dynamic_linear_reference,
    fake=linear_output,
    setup_context=linear_setup_context,
    backward=_backward,
)


def int8_dynamic_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_scale: Tensor | None = None,
) -> Tensor:
    """``int8_linear`` with x quantised too, per row or by ``x_scale``; reference: ``int8_dynamic_linear_reference``."""
    y: Tensor = _op(x, weight, scale, bias, activation, x_scale)
    return y
