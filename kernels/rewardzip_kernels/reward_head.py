"""reward_head: y = act(scale * (x @ weight^T) + bias) @ head_weight^T + head_bias, the hidden layer never stored.

    x [..., K] fp32, fp16 or bf16     weight [N, K] int8 with scale [N] fp32, or fp16, bf16 without
    bias [N] fp32 or None             head_weight [n_out, N], head_bias [n_out] or None, fp32, n_out 1 to 16
    y [..., n_out] in x's dtype

``compute_dtype``, by default x's dtype, is what the first product is made of: x and a 16-bit weight are rounded to it
(int8 is exact), as in ``int8_linear``. Everything after its fp32 sums is fp32, and no order of summation depends on
anything but the batch class: the same input gives the same reward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import activations
from .checks import FLOATS, check_vector, dense_rows
from .mlp_layout import STORED
from .registration import register

MAX_OUT = 16


def _slices(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, compute: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The hidden layer before its activation, as many outputs at a time as keep the weights in cache: fp32."""
    rows = dense_rows(x).to(compute).float()
    n, k = weight.shape
    step = max(16, (1 << 18) // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        z = rows @ weight[part].to(compute).float().t()
        if scale is not None:
            z = z * scale[part]
        yield part, z if bias is None else z + bias[part]


def reward_head_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    y = torch.zeros(x.shape[:-1].numel(), head_weight.shape[0], dtype=torch.float32, device=x.device)
    for part, z in _slices(x, weight, scale, bias, compute_dtype or x.dtype):
        y += activations.apply(z, activation) @ head_weight[:, part].t()
    if head_bias is not None:
        y += head_bias
    return y.to(x.dtype).reshape(*x.shape[:-1], head_weight.shape[0])


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"reward_head: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if weight.dtype not in STORED:
        raise TypeError(f"reward_head: weight is {weight.dtype}; it must be int8, float16 or bfloat16")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"reward_head: weight has shape {tuple(weight.shape)}; it must be [out, in], each 1 or more")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"reward_head: x has shape {tuple(x.shape)}, but weight {tuple(weight.shape)} takes {k} inputs"
        )
    if weight.device != x.device:
        raise ValueError(f"reward_head: weight is on {weight.device}, x on {x.device}")
    if (scale is None) == (weight.dtype == torch.int8):
        raise ValueError(f"reward_head: weight is {weight.dtype}, but scale is {'None' if scale is None else 'given'}")
    if head_weight.dim() != 2 or head_weight.shape[1] != n or not 1 <= head_weight.shape[0] <= MAX_OUT:
        raise ValueError(
            f"reward_head: head_weight has shape {tuple(head_weight.shape)}, but weight {tuple(weight.shape)} "
            f"gives {n} values; it must be [1 to {MAX_OUT}, {n}]"
        )
    if head_weight.dtype != torch.float32 or head_weight.device != x.device:
        raise TypeError(
            f"reward_head: head_weight is {head_weight.dtype} on {head_weight.device}; it must be float32 on {x.device}"
        )
    vectors = (("scale", scale, n), ("bias", bias, n), ("head_bias", head_bias, head_weight.shape[0]))
    for name, vector, length in vectors:
        if vector is not None:
            check_vector("reward_head", name, vector, length, x)
    if compute_dtype is not None and compute_dtype not in FLOATS:
        raise TypeError(f"reward_head: compute_dtype is {compute_dtype}; it must be float32, float16 or bfloat16")
    activations.parse(activation)


def _fake(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, head_weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], head_weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, head_weight, _, ctx.activation, ctx.compute_dtype = inputs
    ctx.save_for_backward(x, weight, scale, bias, head_weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d y / d x, the hidden layer computed again; the rounding of x counts as the identity."""
    x, weight, scale, bias, head_weight = ctx.saved_tensors
    entry, parameter = activations.parse(ctx.activation)
    rows = grad.float().reshape(-1, head_weight.shape[0])
    found = torch.zeros(rows.shape[0], x.shape[-1], dtype=torch.float32, device=x.device)
    for part, z in _slices(x, weight, scale, bias, ctx.compute_dtype or x.dtype):
        slope = entry.derivative(entry.forward(z, parameter) if entry.from_output else z, parameter)
        inner = (rows @ head_weight[:, part]) * slope
        found = found + (inner if scale is None else inner * scale[part]) @ weight[part].float()
    return found.reshape(x.shape).to(x.dtype), None, None, None, None, None, None, None


_op = register(
    "reward_head(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor head_weight, Tensor? head_bias=None, "
    "str activation='none', ScalarType? compute_dtype=None) -> Tensor",
    check=_check,
    reference=reward_head_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def reward_head(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """A wide Linear, its activation and a narrow Linear in one; reference: ``reward_head_reference``."""
    y: Tensor = _op(x, weight, scale, bias, head_weight, head_bias, activation, compute_dtype)
    return y
