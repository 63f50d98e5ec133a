"""How far two correct runs of the same model may be apart: the bound that an exported model is held to.

The model is run in float64 on the weights its compressed layers stand for, and every product ``z = x @ w^T + b`` in it
is given the error that one implementation may make, with u the unit roundoff and S = |x| @ |w|^T + |b|, as in
``docs/numerics.md``:

    delta = C (u_out |z| + sqrt(K) u S) + 4 u (S + sum |w|)

the second part for the functions between the products. What reaches an output y is, to first order, the sum over all
products of |dy/dz| delta; the derivatives come from one backward pass per output.

A layer that rounds its rows may round a value the other way where the last bit before it differs. C values a row may be
rounded so: C max_k |dy/dx_k| step, the step being that of int8 or of a narrower float.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rewardzip_kernels.quantize import QMAX

from .nn import Int8Linear
from .swap import restore

C = 3.0
UNIT = {torch.float64: 2.0**-24, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class _Products(TorchFunctionMode):
    """Notes, while the twin runs, every value an implementation may have another way, and by how much."""

    def __init__(self, layers: dict[int, Int8Linear], unit: float) -> None:
        super().__init__()
        self.layers, self.unit = layers, unit
        self.products: list[tuple[Tensor, Tensor]] = []
        self.rounded: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.linear, torch.matmul, Tensor.matmul, torch.bmm):
            return func(*args, **kwargs)
        layer = self.layers.get(id(args[1]))
        step = None if layer is None else _step(layer, args[0].detach())
        if step is not None:
            # a tensor of its own: its derivative is that of this use alone
            x = args[0].clone() if args[0].requires_grad else args[0].detach().requires_grad_()
            self.rounded.append((x, C * step))
            args = (x, *args[1:])
        z = func(*args, **kwargs)
        if z.requires_grad:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            columns = args[1].detach().transpose(-1, -2) if func is F.linear else args[1].detach()
            with torch.no_grad():
                self.products.append((z, self._error(z.detach(), args[0].detach(), columns, bias)))
        return z

    def _error(self, z: Tensor, x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        size, u = x.abs() @ columns.abs(), UNIT[torch.float32]
        if bias is not None:
            size = size + bias.detach().abs()
        sums: Tensor = C * (self.unit * z.abs() + x.shape[-1] ** 0.5 * u * size)
        sums += 4 * u * (size + columns.abs().sum(-2, keepdim=columns.dim() > 2))
        return sums


def _step(layer: Int8Linear, x: Tensor) -> Tensor | None:
    """By how much a value of x changes when it is rounded the other way; None where it is not rounded."""
    if layer.rows == "static" and layer.x_scale is not None:
        return layer.x_scale.double().expand_as(x)
    if layer.rows == "dynamic":
        return (x.abs().amax(-1, keepdim=True) / QMAX).expand_as(x)
    return None if layer.compute_dtype in (None, torch.float32) else 2 * UNIT[layer.compute_dtype] * x.abs()


def error_bound(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The bound for each element of each output of ``model``, which is unfused, in ``dtype`` and on the CPU."""
    twin = restore(model).double().eval().requires_grad_(True)
    layers = {
        id(twin.get_submodule(name).weight): layer
        for name, layer in model.named_modules()
        if isinstance(layer, Int8Linear)
    }
    with torch.enable_grad(), _Products(layers, UNIT[dtype]) as noted:
        outputs = tensors(twin(*[x.double() if x.is_floating_point() else x for x in inputs]))
    values = [value for value, _ in (*noted.products, *noted.rounded)]
    bounds = []
    for y in outputs:
        # the members of an ensemble come before the rows
        stacked = len(y) != len(inputs[0]) and y.dim() > 1 and y.shape[1] == len(inputs[0])
        y = y.transpose(0, 1) if stacked else y
        bound = C * UNIT[dtype] * y.detach().abs().clamp(min=1.0).contiguous() * 4 / 3
        flat, columns = bound.view(len(bound), -1), y.reshape(len(y), -1)
        for j in range(columns.shape[1]):
            slopes = torch.autograd.grad(columns[:, j].sum(), values, retain_graph=True, materialize_grads=True)
            shares = [
                slope.abs() * size for slope, (_, size) in zip(slopes, (*noted.products, *noted.rounded), strict=True)
            ]
            for i, share in enumerate(shares):
                share = share.reshape(len(y), -1)
                flat[:, j] += share.sum(1) if i < len(noted.products) else share.amax(1)
        bounds.append(bound.transpose(0, 1) if stacked else bound)
    return bounds


def tensors(outputs: Any) -> list[Tensor]:
    """What a model gives, as a list."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, tuple | list) and outputs and all(isinstance(y, Tensor) for y in outputs):
        return list(outputs)
    raise TypeError(f"export: the model gives {type(outputs).__name__}; it must give a tensor, or a tuple of them")
