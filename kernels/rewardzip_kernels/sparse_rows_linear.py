"""sparse_rows_linear: y = act(scale * (x @ weight^T) + bias) from the nonzeros of each output's weights alone.

    x [..., K] fp32, fp16 or bf16     scale, bias [N] fp32     y [..., N] in x's dtype
    values  [room]    int8 with a scale, or fp32, fp16, bf16 without one
    columns [room]    int16 where K <= 32768, otherwise int32: the input each value belongs to
    starts  [N + 1]   int32: output n has the values from starts[n] to starts[n + 1]; room for more may follow the last

For weights of which next to nothing is left, with no pattern: 3 bytes a nonzero. Products and sums are fp32.
An inf or NaN in x reaches every output that kept a weight there; at a pruned weight it does not count.
"""

from typing import Any

import torch
from torch import Tensor

from . import activations
from .checks import FLOATS, dense_rows, shaped_like
from .registration import register
from .sparse24_linear import check_values


def column_type(k: int) -> torch.dtype:
    return torch.int16 if k <= 2**15 else torch.int32


def nonzeros(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """A pattern [N, K] of bools -> (columns, starts) of its true places."""
    n, k = pattern.shape
    starts = torch.zeros(n + 1, dtype=torch.int32, device=pattern.device)
    torch.cumsum(pattern.sum(1), 0, dtype=torch.int32, out=starts[1:])
    return pattern.nonzero()[:, 1].to(column_type(k)), starts


def outputs_of(starts: Tensor) -> Tensor:
    """The output of every nonzero, int64."""
    counts = starts.diff().long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=starts.device), counts)


def dense(values: Tensor, columns: Tensor, starts: Tensor, k: int) -> Tensor:
    """The dense weight [N, K], in the type of the values."""
    rows = outputs_of(starts)
    weight = values.new_zeros(starts.numel() - 1, k)
    weight[rows, columns[: rows.numel()].long()] = values[: rows.numel()]
    return weight


def check_stored(columns: Tensor, starts: Tensor, k: int) -> None:
    """That no nonzero lies outside the weight, and none is there twice: what the kernels' memory accesses rely on."""
    steps = starts.diff()
    total = int(starts[-1])
    if int(starts[0]) != 0 or bool((steps < 0).any()) or total > columns.numel():
        raise ValueError(f"starts must rise from 0 to at most {columns.numel()}, the room for nonzeros")
    used = columns[:total]
    if total and (int(used.min()) < 0 or int(used.max()) >= k):
        raise ValueError(f"columns lie between {int(used.min())} and {int(used.max())}; there are {k} inputs")
    same = outputs_of(starts).diff() == 0
    if bool((same & (used.diff() <= 0)).any()):
        raise ValueError("the columns of an output must rise")


def sparse_rows_linear_reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The products of all nonzeros, summed by output, a few rows at a time."""
    check_stored(columns, starts, in_features)
    n, outputs = starts.numel() - 1, outputs_of(starts)
    used, weights = columns[: outputs.numel()].long(), values[: outputs.numel()].float()
    rows = dense_rows(x).float()
    y = torch.zeros(rows.shape[0], n, dtype=torch.float32, device=x.device)
    step = max(1, (1 << 20) // max(1, outputs.numel()))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        y[part].index_add_(1, outputs, rows[part][:, used] * weights)
    if scale is not None:
        y *= scale
    if bias is not None:
        y += bias
    return shaped_like(x, activations.apply(y, activation).to(x.dtype))


def _check(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> None:
    op = "sparse_rows_linear"
    if in_features < 1:
        raise ValueError(f"{op}: in_features is {in_features}; it must be 1 or more")
    if values.dim() != 1:
        raise ValueError(f"{op}: values have shape {tuple(values.shape)}; it must be [nonzeros]")
    expected = column_type(in_features)
    if columns.dtype != expected or columns.shape != values.shape or columns.device != values.device:
        raise ValueError(
            f"{op}: columns are {columns.dtype} {tuple(columns.shape)} on {columns.device}; they must be "
            f"{expected} {tuple(values.shape)} on {values.device} for {in_features} inputs"
        )
    if starts.dtype != torch.int32 or starts.dim() != 1 or starts.shape[0] < 2 or starts.device != values.device:
        raise ValueError(
            f"{op}: starts are {starts.dtype} {tuple(starts.shape)} on {starts.device}; "
            f"they must be torch.int32 [out + 1] on {values.device}, with 1 output or more"
        )
    check_values(op, x, values, scale, starts.shape[0] - 1, in_features, bias, FLOATS)
    activations.parse(activation)


def _output(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], starts.shape[0] - 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, starts, scale, in_features, bias, activation = inputs
    entry, _ = activations.parse(activation)
    point = None if activation == "none" else output if entry.from_output else x
    ctx.save_for_backward(point, values, columns, starts, scale, bias)
    ctx.rest = in_features, activation


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d y / d x = (grad * act' * scale) @ weight."""
    point, values, columns, starts, scale, bias = ctx.saved_tensors
    in_features, activation = ctx.rest
    entry, parameter = activations.parse(activation)
    inner = grad.float()
    if scale is not None:
        inner = inner * scale
    if point is not None:
        if not entry.from_output:
            point = _op(point, values, columns, starts, scale, in_features, bias, "none")
        inner = inner * entry.derivative(point.float(), parameter)
    weight = dense(values, columns, starts, in_features)
    return torch.matmul(inner.to(grad.dtype), weight.to(grad.dtype)), *([None] * 7)


_op = register(
    "sparse_rows_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor? scale, int in_features, "
    "Tensor? bias=None, str activation='none') -> Tensor",
    check=_check,
    reference=sparse_rows_linear_reference,
    fake=_output,
    setup_context=_setup_context,
    backward=_backward,
)


def sparse_rows_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """act(scale * (x @ weight^T) + bias), any M, N, K from 1 up; reference: ``sparse_rows_linear_reference``."""
    y: Tensor = _op(x, values, columns, starts, scale, in_features, bias, activation)
    return y
