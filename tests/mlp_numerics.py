"""The bound of the fused networks: the linear bound of ``numerics.py``, carried from layer to layer.

Against float64 from the same stored weights. With dh the error of a layer's input, W the weights with their scale:

    dz = |W| (dh + u_in |h|) + C sqrt(K) u_sum (|W| |h| + |bias|)       u_in: rounding to the type of the products
    dn = LayerNorm's first-order response to dz + C u_sum (its own terms)
    dh = L dn + C e_act                                                  L: the activation's Lipschitz constant

The last layer has u_in = 0 and its result is rounded to the output's type.
"""

import torch
from conftest import GPU
from numerics import SMALLEST, UNIT, C, activation_error, assert_within
from torch import Tensor

from rewardzip_kernels import activations
from rewardzip_kernels.mlp_layout import Layer, Linear, layout, pack, parse_layers, unpack

LIPSCHITZ = {"sigmoid": 0.25, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "mish": 1.09}


def random_mlp(layers: str, stored: torch.dtype, members: int, device: str) -> tuple[Tensor, Tensor]:
    """Networks whose values stay near 1, with scales that differ from channel to channel."""
    return pack([_member(layers, stored, device) for _ in range(members)], layers)


def _member(layers: str, stored: torch.dtype, device: str) -> list[Linear]:
    member = []
    pieces, entries = parse_layers(layers)
    k = sum(pieces)
    for i, (n, eps, _) in enumerate(entries):
        scale, gamma, beta = None, None, None
        bias = torch.randn(n, device=device)
        if i + 1 == len(entries):
            weight = torch.randn(n, k, device=device) / k**0.5
        elif stored == torch.int8:
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            scale = 10.0 ** (torch.rand(n, device=device) - 0.5) / (73 * k**0.5)
        else:
            weight = (torch.randn(n, k, device=device) / k**0.5).to(stored)
        if eps is not None:
            gamma, beta = torch.randn(n, device=device), torch.randn(n, device=device)
        member.append(Linear(weight, bias, scale, gamma, beta))
        k = n
    return member


def exact_mlp(
    inputs: list[Tensor], weights: Tensor, params: Tensor, layers: str, members: int, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(y, its bound) of every member in float64: [E, M, out]."""
    net = layout(layers, weights.dtype == torch.int8)
    x = torch.cat([x.double() for x in inputs], 1)
    tf32 = x.is_cuda and compute == torch.float32
    # an integer input is scaled in fp32; rounding to a wider type costs nothing
    rounded = all(i.dtype == compute for i in inputs)
    pairs = [
        _propagate(x, net.layers, member, compute, "tf32" if tf32 else compute, rounded)
        for member in unpack(weights, params, layers, members)
    ]
    return torch.stack([y for y, _ in pairs]), torch.stack([bound for _, bound in pairs])


def _propagate(
    h: Tensor, layers: tuple[Layer, ...], member: list[Linear], compute: torch.dtype, unit: object, rounded: bool
) -> tuple[Tensor, Tensor]:
    error = 2 * UNIT[torch.float32] * h.abs()
    for i, (layer, tensors) in enumerate(zip(layers, member, strict=True)):
        hidden = i + 1 < len(layers)
        w = (tensors.weight.to(compute) if hidden else tensors.weight).double()
        if tensors.scale is not None:
            w = w * tensors.scale.double()[:, None]
        bias = tensors.bias.double()
        z, size = h @ w.t() + bias, h.abs() @ w.abs().t() + bias.abs()
        if hidden and not (i == 0 and rounded and unit != "tf32") and unit != torch.float32:
            error = error + UNIT[unit] * (h.abs() + error) + SMALLEST[compute]
        error = error @ w.abs().t() + C * h.shape[1] ** 0.5 * UNIT[torch.float32] * size
        if layer.eps is not None:
            z, error = _layer_norm(z, error, tensors, layer.eps)
        name = (
            layer.activation
            if layer.activation not in ("leaky_relu", "elu")
            else f"{layer.activation}:{layer.parameter}"
        )
        lipschitz = LIPSCHITZ.get(layer.activation, max(1.0, layer.parameter))
        error = lipschitz * error + C * activation_error(z, layer.activation)
        h = activations.apply(z, name)
    return h, error


def _layer_norm(z: Tensor, error: Tensor, tensors: Linear, eps: float) -> tuple[Tensor, Tensor]:
    gamma, beta = tensors.gamma.double(), tensors.beta.double()
    centred = z - z.mean(1, keepdim=True)
    inverse = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    unit = centred * inverse
    moved = (error + error.mean(1, keepdim=True)) * inverse
    moved = moved + unit.abs() * (unit.abs() * moved).mean(1, keepdim=True)
    own = (z.abs() + z.abs().mean(1, keepdim=True)) * inverse * z.shape[1] ** 0.5 + 4 * unit.abs()
    rounding = C * UNIT[torch.float32] * (own * gamma.abs() + beta.abs())
    return unit * gamma + beta, 1.01 * moved * gamma.abs() + rounding


def assert_mlp(
    y: Tensor,
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None,
    reduce: str,
    compute: torch.dtype,
) -> None:
    """Hold a result to the bound: a deviation moves by at most the root of the mean square of its members' errors."""
    ys, errors = exact_mlp(inputs, weights, params, layers, members or 1, compute)
    if reduce == "mean_std":
        count = ys.shape[0]
        size = ys.abs().mean(0)
        mean, deviation = errors.mean(0), (errors.square().sum(0) / (count - 1)).sqrt()
        own = C * count**0.5 * UNIT[torch.float32] * size
        # where the members nearly agree, the deviation is what is left of their rounding
        errors = torch.stack([mean + own, deviation + 2 * own])
        ys = torch.stack([ys.mean(0), ys.std(0)])
    bound = errors + C * UNIT[y.dtype] * ys.abs() + SMALLEST[y.dtype]
    assert_within(y.view(ys.shape), ys, bound)


def random_head(n: int, k: int, n_out: int, stored: torch.dtype = torch.int8, device: str | None = None) -> tuple:
    """(weight, scale, bias, head_weight, head_bias), with scales that differ from channel to channel."""
    device = device or ("cuda" if GPU else "cpu")
    if stored == torch.int8:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        scale = 10.0 ** (torch.rand(n, device=device) - 0.5) / (73 * k**0.5)
    else:
        weight, scale = (torch.randn(n, k, device=device) / k**0.5).to(stored), None
    head_weight = torch.randn(n_out, n, device=device) / n**0.5
    return weight, scale, torch.randn(n, device=device), head_weight, torch.randn(n_out, device=device)


def exact_head(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    activation: str,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y, its bound before rounding) in float64: the bound of each layer, the first carried through the second."""
    w = weight.to(compute).double() * (1.0 if scale is None else scale.double()[:, None])
    b, c = (w.new_zeros(1) if t is None else t.double() for t in (bias, head_bias))
    h, v = x.double(), head_weight.double()
    z, size = h @ w.t() + b, h.abs() @ w.abs().t() + b.abs()
    error = C * h.shape[1] ** 0.5 * UNIT[torch.float32] * size
    unit = "tf32" if x.is_cuda and compute == torch.float32 and x.dtype == torch.float32 else compute
    if x.dtype != compute or unit == "tf32":
        error = error + (UNIT[unit] * h.abs() + SMALLEST[compute]) @ w.abs().t()
    entry, parameter = activations.parse(activation)
    error = LIPSCHITZ.get(entry.name, max(1.0, parameter)) * error + C * activation_error(z, activation)
    h = activations.apply(z, activation)
    size = h.abs() @ v.abs().t() + c.abs()
    return h @ v.t() + c, error @ v.abs().t() + C * h.shape[1] ** 0.5 * UNIT[torch.float32] * size


def assert_head(run, x: Tensor, args: tuple, activation: str = "relu", compute: torch.dtype | None = None) -> None:
    y = run(x, *args, activation, compute)
    ref, bound = exact_head(x.reshape(-1, x.shape[-1]), *args, activation, compute or x.dtype)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], args[3].shape[0])
    assert_within(y.reshape(ref.shape), ref, bound + C * UNIT[x.dtype] * ref.abs() + SMALLEST[x.dtype])
