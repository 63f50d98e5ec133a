"""block_sparse_linear: y = act(scale * (x @ W^T) + bias), W in blocks of which only the stored ones are multiplied.

    x [..., K] fp32, fp16 or bf16                        y [..., N] in x's dtype
    values [S, bn, bk], columns [S], starts [rows + 1]   W, in the form drawn in ``blocks.py``
    values int8 with scale [N] fp32, or fp16, bf16 without; bias [N] fp32 or None

Products and sums are those of ``int8_linear``; with ``dynamic`` those of ``int8_dynamic_linear``: each row of x is
rounded to int8 and the sums are exact integers. 16-bit blocks of another type than x are multiplied in fp32 (tf32 on
a GPU's tensor cores). An inf or a NaN in x reaches every output that has a non-zero weight for it; whether it reaches
others depends on the blocks.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import activations
from .blocks import MAX_SIDE, Blocks, grid, to_dense
from .checks import FLOATS, check_vector, dense_rows, shaped_like
from .int8_dynamic_linear import MAX_K, int8_matmul_reference
from .mlp_layout import STORED
from .quantize import quantize_rows
from .registration import register


def compute_type(x: torch.dtype, values: torch.dtype) -> torch.dtype:
    """What products of float rows are made of; int8 is exact in all of them."""
    return x if values in (torch.int8, x) else torch.float32


def block_sparse_linear_reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    out_features: int,
    in_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    dynamic: bool = False,
) -> Tensor:
    """A block row at a time: its inputs gathered, its blocks side by side as one small dense weight."""
    _, bn, bk = values.shape
    rows = dense_rows(x)
    row_scale = None
    if dynamic:
        rows, row_scale = quantize_rows(rows)
    rows = torch.nn.functional.pad(rows, (0, -in_features % bk)).unflatten(1, (-1, bk))
    y = torch.empty(rows.shape[0], out_features, dtype=torch.float32, device=x.device)
    bounds = starts.tolist()
    for r, (first, last) in enumerate(pairwise(bounds)):
        part = slice(r * bn, min((r + 1) * bn, out_features))
        gathered = rows[:, columns[first:last].long()].flatten(1)
        weight = values[first:last].transpose(0, 1).flatten(1)[: part.stop - part.start]
        y[:, part] = int8_matmul_reference(gathered, weight) if dynamic else gathered.float() @ weight.float().t()
    if scale is not None:
        y *= scale if row_scale is None else row_scale[:, None] * scale
    if bias is not None:
        y += bias
    return shaped_like(x, activations.apply(y, activation).to(x.dtype))


def _check(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    out_features: int,
    in_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    dynamic: bool = False,
) -> None:
    """Types and shapes; what ``columns`` and ``starts`` hold is for ``blocks.check_pattern``, which reads them."""
    op = "block_sparse_linear"
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if values.dtype not in STORED:
        raise TypeError(f"{op}: values is {values.dtype}; it must be int8, float16 or bfloat16")
    if values.dim() != 3 or not all(1 <= side <= MAX_SIDE for side in values.shape[1:]):
        raise ValueError(
            f"{op}: values has shape {tuple(values.shape)}; it must be [stored, 1..{MAX_SIDE}, 1..{MAX_SIDE}]"
        )
    if out_features < 1 or in_features < 1:
        raise ValueError(f"{op}: out_features is {out_features}, in_features {in_features}; each must be 1 or more")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, but the weight takes {in_features} inputs")
    block = values.shape[1], values.shape[2]
    lengths = {"columns": (columns, values.shape[0]), "starts": (starts, grid(out_features, in_features, block)[0] + 1)}
    for name, (tensor, length) in lengths.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be int32")
        if tensor.shape != (length,):
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; with values {tuple(values.shape)} and "
                f"{out_features} outputs it must be ({length},)"
            )
    for name, tensor in (("values", values), ("columns", columns), ("starts", starts)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}")
    if (scale is None) == (values.dtype == torch.int8):
        raise ValueError(f"{op}: values is {values.dtype}, but scale is {'None' if scale is None else 'given'}")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None:
            check_vector(op, name, vector, out_features, x)
    if dynamic and values.dtype != torch.int8:
        raise ValueError(f"{op}: dynamic rounds rows to int8, but values is {values.dtype}; it must be int8")
    if dynamic and in_features > MAX_K:
        raise ValueError(f"{op}: there are {in_features} inputs, but int32 sums hold at most {MAX_K}")
    activations.parse(activation)


def _fake(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, out_features: int, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, starts, n, k, scale, bias, activation, dynamic = inputs
    entry, _ = activations.parse(activation)
    # without an activation neither: the caller is then free to change both in place
    point = None if activation == "none" else output if entry.from_output else x
    ctx.save_for_backward(point, values, columns, starts, scale, bias)
    ctx.sizes, ctx.activation, ctx.dynamic = (n, k), activation, dynamic


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d y / d x = (grad * act' * scale) @ W; the rounding of x counts as the identity."""
    point, values, columns, starts, scale, bias = ctx.saved_tensors
    entry, parameter = activations.parse(ctx.activation)
    inner = grad.float() if scale is None else grad.float() * scale
    if point is not None:
        if not entry.from_output:
            point = _op(point, values, columns, starts, *ctx.sizes, scale, bias, "none", ctx.dynamic)
        inner = inner * entry.derivative(point.float(), parameter)
    weight = to_dense(Blocks(values, columns, starts), *ctx.sizes)
    found = torch.matmul(inner.to(grad.dtype), weight.to(grad.dtype))
    return found, None, None, None, None, None, None, None, None, None


_op = register(
    "block_sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, int out_features, int in_features, "
    "Tensor? scale=None, Tensor? bias=None, str activation='none', bool dynamic=False) -> Tensor",
    check=_check,
    reference=block_sparse_linear_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    out_features: int,
    in_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    dynamic: bool = False,
) -> Tensor:
    """act(scale * (x @ W^T) + bias) over the stored blocks alone; reference: ``block_sparse_linear_reference``."""
    y: Tensor = _op(x, values, columns, starts, out_features, in_features, scale, bias, activation, dynamic)
    return y
