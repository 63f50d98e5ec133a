"""sparse24_linear: y = act(scale * (x @ weight^T) + bias), the weight 2:4 sparse and stored packed.

    x [..., K] fp32, fp16 or bf16        values [N, 4, B], indices [N, B]: ``sparse24_layout.py``, B = ceil(K / 8)
    scale [N] fp32 with int8 values, None with fp16 or bf16 ones     bias [N] fp32     y [..., N] in x's dtype

``compute_dtype`` is what the products are made of, as in ``int8_linear``; the default is x's own dtype, or the wider
one where the values are floats. torch.int8, with int8 values, rounds each row of x to int8 as ``int8_dynamic_linear``
does: exact int32 sums, the same to the bit on every device.
An inf or NaN in x reaches every output that kept a weight there; at a pruned weight it counts as 0 * x or not at all.
"""

from typing import Any

import torch
from torch import Tensor

from . import activations
from .checks import FLOATS, check_vector
from .int8_dynamic_linear import MAX_K, int8_dynamic_linear_reference
from .int8_linear import int8_linear_reference
from .registration import register
from .sparse24_layout import unpack, width


def sparse24_linear_reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight made dense, then the dense reference."""
    weight = unpack(values, indices, in_features)
    if scale is None:
        scale = torch.ones(weight.shape[0], dtype=torch.float32, device=x.device)
    if compute_dtype == torch.int8:
        return int8_dynamic_linear_reference(x, weight, scale, bias, activation)
    return int8_linear_reference(x, weight, scale, bias, activation, products(x, values, compute_dtype))


def products(x: Tensor, values: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """What the products are made of where the caller leaves it open: exact for the values, and x as it is."""
    if compute_dtype is not None:
        return compute_dtype
    return torch.promote_types(x.dtype, values.dtype) if values.is_floating_point() else x.dtype


def check_values(
    op: str, x: Tensor, values: Tensor, scale: Tensor | None, n: int, in_features: int, bias: Tensor | None,
    floats: tuple[torch.dtype, ...],
) -> None:  # fmt: skip
    """What the sparse ops share: x against in_features, the type of the values against scale, the vectors."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, but the weight takes {in_features} inputs")
    if values.dtype != torch.int8 and values.dtype not in floats:
        raise TypeError(f"{op}: values are {values.dtype}; they must be int8 or one of {floats}")
    if values.device != x.device:
        raise ValueError(f"{op}: values are on {values.device}, x on {x.device}")
    if (scale is None) == (values.dtype == torch.int8):
        raise ValueError(f"{op}: {values.dtype} values {'need a' if scale is None else 'take no'} scale")
    if scale is not None:
        check_vector(op, "scale", scale, n, x)
    if bias is not None:
        check_vector(op, "bias", bias, n, x)


def _check(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> None:
    op, shape = "sparse24_linear", values.shape
    if len(shape) != 3 or shape[1] != 4 or 0 in shape:
        raise ValueError(f"{op}: values have shape {tuple(shape)}; it must be [out, 4, inputs / 8]")
    n, _, b = shape
    if in_features < 1 or width(in_features) != b:
        raise ValueError(f"{op}: {in_features} inputs need {width(in_features)} columns of values, not {b}")
    if indices.dtype != torch.uint8 or indices.shape != (n, b) or indices.device != values.device:
        raise ValueError(
            f"{op}: indices are {indices.dtype} {tuple(indices.shape)} on {indices.device}; "
            f"they must be torch.uint8 {(n, b)} on {values.device}"
        )
    check_values(op, x, values, scale, n, in_features, bias, (torch.float16, torch.bfloat16))
    if compute_dtype is not None:
        if compute_dtype not in (*FLOATS, torch.int8):
            raise TypeError(f"{op}: compute_dtype is {compute_dtype}; it must be float32, float16, bfloat16 or int8")
        if values.dtype != torch.int8 and compute_dtype not in (torch.float32, values.dtype):
            raise TypeError(f"{op}: compute_dtype is {compute_dtype}, which does not hold values of {values.dtype}")
        if compute_dtype == torch.int8 and in_features > MAX_K:
            raise ValueError(f"{op}: {in_features} inputs, but int32 sums hold at most {MAX_K}")
    activations.parse(activation)


def _output(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, scale, in_features, bias, activation, compute_dtype = inputs
    entry, _ = activations.parse(activation)
    point = None if activation == "none" else output if entry.from_output else x
    ctx.save_for_backward(point, values, indices, scale, bias)
    ctx.rest = in_features, activation, compute_dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d y / d x = (grad * act' * scale) @ weight; the rounding of x counts as the identity."""
    point, values, indices, scale, bias = ctx.saved_tensors
    in_features, activation, compute_dtype = ctx.rest
    entry, parameter = activations.parse(activation)
    inner = grad.float()
    if scale is not None:
        inner = inner * scale
    if point is not None:
        if not entry.from_output:
            point = _op(point, values, indices, scale, in_features, bias, "none", compute_dtype)
        inner = inner * entry.derivative(point.float(), parameter)
    weight = unpack(values, indices, in_features)
    return torch.matmul(inner.to(grad.dtype), weight.to(grad.dtype)), *([None] * 7)


_op = register(
    "sparse24_linear(Tensor x, Tensor values, Tensor indices, Tensor? scale, int in_features, Tensor? bias=None, "
    "str activation='none', ScalarType? compute_dtype=None) -> Tensor",
    check=_check,
    reference=sparse24_linear_reference,
    fake=_output,
    setup_context=_setup_context,
    backward=_backward,
)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """act(scale * (x @ weight^T) + bias) for any M, N, K from 1 up; reference: ``sparse24_linear_reference``."""
    y: Tensor = _op(x, values, indices, scale, in_features, bias, activation, compute_dtype)
    return y
