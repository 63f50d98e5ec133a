"""int8_linear: y = act(scale * (x @ weight^T) + bias) with int8 weights, dequantised inside the product.

    x [..., K] fp32, fp16 or bf16     weight [N, K] int8     scale, bias [N] fp32     y [..., N] in x's dtype

``compute_dtype`` is what the products are made of; sums are always fp32. int8 is exact in all of them, so only x is
rounded, and only where x is wider: float32 (tf32 on a GPU's tensor cores, 2^-10 per element; exact on a CPU), float16
(2^-11, and x beyond 65504 becomes inf), bfloat16 (2^-8). The default is x's own dtype.
"""

from typing import Any

import torch
from torch import Tensor

from . import activations
from .checks import FLOATS, check_linear, dense_rows, shaped_like
from .registration import register


def int8_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula, in fp32, a slice of outputs at a time so that the dequantised weights stay in cache."""
    n, k = weight.shape
    rows = dense_rows(x).to(compute_dtype or x.dtype).float()
    y = torch.empty(rows.shape[0], n, dtype=torch.float32, device=x.device)
    step = max(16, (1 << 18) // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        torch.mm(rows, weight[part].float().t(), out=y[:, part])
    y *= scale
    if bias is not None:
        y += bias
    return shaped_like(x, activations.apply(y, activation).to(x.dtype))


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> None:
    check_linear("int8_linear", x, weight, scale, bias, activation)
    if compute_dtype is not None and compute_dtype not in FLOATS:
        raise TypeError(f"int8_linear: compute_dtype is {compute_dtype}; it must be float32, float16 or bfloat16")


def linear_output(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """The shape rule of every linear op."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the gradient needs: the output where it gives the derivative, otherwise the input to recompute with."""
    x, weight, scale, bias, activation, extra = inputs
    entry, _ = activations.parse(activation)
    # without an activation neither: the caller is then free to change both in place
    point = None if activation == "none" else output if entry.from_output else x
    ctx.save_for_backward(point, weight, scale, bias)
    ctx.activation, ctx.extra = activation, extra


def linear_input_gradient(ctx: Any, grad: Tensor, pre_activation: Any) -> Tensor:
    """d y / d x = (grad * act' * scale) @ weight; the rounding of x counts as the identity."""
    saved, weight, scale, bias = ctx.saved_tensors
    entry, parameter = activations.parse(ctx.activation)
    inner = grad.float() * scale
    if saved is not None:
        point = saved if entry.from_output else pre_activation(saved, weight, scale, bias, "none", ctx.extra)
        inner *= entry.derivative(point.float(), parameter)
    inner = inner.to(grad.dtype)
    return torch.matmul(inner, weight.to(grad.dtype))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return linear_input_gradient(ctx, grad, _op), None, None, None, None, None


_op = register(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, str activation='none', "
    "ScalarType? compute_dtype=None) -> Tensor",
    check=_check,
    reference=int8_linear_reference,
    fake=linear_output,
    setup_context=linear_setup_context,
    backward=_backward,
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """act(scale * (x @ weight^T) + bias), for any M, N, K from 1 up; reference: ``int8_linear_reference``."""
    y: Tensor = _op(x, weight, scale, bias, activation, compute_dtype)
    return y
