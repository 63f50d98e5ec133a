"""The flat form of an MLP: two tensors for a whole ensemble, so that a launch and a state dict hold two.

    layers   "17+6: 256 layer_norm:1e-05 mish, 128 relu, 1": the inputs' widths, read side by side by the first layer;
             then per Linear layer its width, its LayerNorm if it has one, its activation if it has one

P(w) is w rounded up to a multiple of 16, and everything between w and P(w) is zero. Members follow one another.

    weights [E * size], int8, fp16 or bf16:   the hidden layers in order, each ``width`` rows
        a row of the first hidden layer       P(17) + P(6) values: every input starts on a multiple of 16
        a row of another                      P(width of the layer before) values
    params [E * size], fp32:                  the layers in order
        a hidden layer                        [scale P(width)] only if weights is int8, [bias P(width)],
                                              [gamma P(width)] [beta P(width)] only with LayerNorm
        the last layer                        ``width`` rows as above, then [bias P(width)]

    "17+6: 20 relu, 1", int8    weights   17 values 15 zeros 6 values 10 zeros   20 times
                                params    scale: 20 12 zeros   bias: 20 12 zeros   row: 20 12 zeros   bias: 1 15 zeros

With a single layer ``weights`` is empty and the rows in ``params`` are as wide as the first layer's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import activations

ALIGN = 16
MAX_LAYERS = 6
MAX_INPUTS = 8
MAX_WIDTH = 256
STORED = (torch.int8, torch.float16, torch.bfloat16)


def padded(width: int) -> int:
    return -(-width // ALIGN) * ALIGN


@dataclass(frozen=True)
class Layer:
    """One Linear layer and what follows it; the last six say where a member's numbers start in the flat tensors."""

    pieces: tuple[int, ...]
    columns: int
    width: int
    activation: str
    parameter: float
    eps: float | None
    weight: int
    scale: int | None
    bias: int
    gamma: int | None
    beta: int | None


@dataclass(frozen=True)
class Layout:
    """``weights`` and ``params`` are the sizes of one member."""

    layers: tuple[Layer, ...]
    weights: int
    params: int


class Linear(NamedTuple):
    """A layer's tensors: weight [N, K], scale [N] only where weight is int8, gamma and beta [N] with LayerNorm."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


@lru_cache(maxsize=256)
def parse_layers(layers: str) -> tuple[tuple[int, ...], tuple[tuple[int, float | None, str], ...]]:
    """``layers`` as the inputs' widths, and (width, eps of the LayerNorm or None, activation) per layer."""
    inputs, colon, rest = layers.partition(":")
    widths = [width.strip() for width in inputs.split("+")]
    if not colon or not all(width.isdecimal() and int(width) > 0 for width in widths):
        raise ValueError(f"layers: {layers!r} must start with the widths of the inputs, as in '17+6: 64 relu, 1'")
    if len(widths) > MAX_INPUTS:
        raise ValueError(f"layers: {layers!r} has {len(widths)} inputs; at most {MAX_INPUTS} fit in one launch")
    entries = tuple(_parse_layer(entry.strip()) for entry in rest.split(","))
    if len(entries) > MAX_LAYERS:
        raise ValueError(f"layers: {layers!r} has {len(entries)} layers; at most {MAX_LAYERS} fit in one launch")
    if entries[-1][1] is not None:
        raise ValueError(f"layers: {layers!r} has a LayerNorm after the last layer")
    return tuple(map(int, widths)), entries


def _parse_layer(entry: str) -> tuple[int, float | None, str]:
    width, *words = entry.split() or [""]
    if not width.isdecimal() or int(width) < 1:
        raise ValueError(f"layers: {entry!r} must start with a width of 1 or more")
    eps = None
    if words and words[0].partition(":")[0] == "layer_norm":
        number = words.pop(0).partition(":")[2] or "1e-05"
        try:
            eps = float(number)
        except ValueError:
            eps = math.nan
        if not 0 < eps < math.inf:
            raise ValueError(f"layers: the eps {number!r} in {entry!r} is not a positive number")
    if len(words) > 1:
        raise ValueError(f"layers: {entry!r} is not 'width [layer_norm[:eps]] [activation]'")
    activation = words[0] if words else "none"
    activations.parse(activation)
    return int(width), eps, activation


@lru_cache(maxsize=256)
def layout(layers: str, quantised: bool) -> Layout:
    """Where everything is; ``quantised``: the weights are int8."""
    found: list[Layer] = []
    weights = params = 0
    pieces, entries = parse_layers(layers)
    for width, eps, activation in entries:
        columns, vector = sum(map(padded, pieces)), padded(width)
        scale = gamma = beta = None
        if len(found) + 1 < len(entries):
            weight, weights = weights, weights + width * columns
            if quantised:
                scale, params = params, params + vector
        else:
            weight, params = params, params + width * columns
        bias, params = params, params + vector
        if eps is not None:
            gamma, beta, params = params, params + vector, params + 2 * vector
        entry, parameter = activations.parse(activation)
        places = (weight, scale, bias, gamma, beta)
        found.append(Layer(pieces, columns, width, entry.name, parameter, eps, *places))
        pieces = (width,)
    return Layout(tuple(found), weights, params)


def pack(members: Sequence[Sequence[Linear]], layers: str) -> tuple[Tensor, Tensor]:
    """(weights, params) of one or more networks of the same shape, each a list of its layers."""
    if not members:
        raise ValueError("pack: there is no member")
    stored = members[0][0].weight.dtype if len(members[0]) > 1 else torch.int8
    if stored not in STORED:
        raise TypeError(f"pack: hidden weights are {stored}; they must be int8, float16 or bfloat16")
    net = layout(layers, stored == torch.int8)
    device = members[0][0].weight.device
    weights = torch.zeros(len(members), net.weights, dtype=stored, device=device)
    params = torch.zeros(len(members), net.params, dtype=torch.float32, device=device)
    for e, member in enumerate(members):
        if len(member) != len(net.layers):
            raise ValueError(f"pack: member {e} has {len(member)} layers, but {layers!r} has {len(net.layers)}")
        for i, (layer, tensors) in enumerate(zip(net.layers, member, strict=True)):
            hidden = i + 1 < len(member)
            name = f"pack: member {e}, layer {i}"
            _check_linear(name, tensors, layer, stored if hidden else torch.float32)
            _rows((weights if hidden else params)[e], layer, tensors.weight)
            for place, vector in _vectors(layer, tensors):
                params[e, place : place + layer.width] = vector
    return weights.flatten(), params.flatten()


def _vectors(layer: Layer, tensors: Linear) -> list[tuple[int, Tensor]]:
    pairs = (
        (layer.scale, tensors.scale),
        (layer.bias, tensors.bias),
        (layer.gamma, tensors.gamma),
        (layer.beta, tensors.beta),
    )
    return [(place, vector) for place, vector in pairs if place is not None and vector is not None]


def _rows(flat: Tensor, layer: Layer, weight: Tensor) -> None:
    """Write weight [N, K] into a member's flat tensor, each piece from a multiple of 16 on."""
    rows = flat[layer.weight : layer.weight + layer.width * layer.columns].view(layer.width, layer.columns)
    start = taken = 0
    for piece in layer.pieces:
        rows[:, start : start + piece] = weight[:, taken : taken + piece]
        start, taken = start + padded(piece), taken + piece


def _check_linear(name: str, tensors: Linear, layer: Layer, dtype: torch.dtype) -> None:
    if tensors.weight.dtype != dtype:
        raise TypeError(f"{name}: weight is {tensors.weight.dtype}; it must be {dtype}")
    if tensors.weight.shape != (layer.width, sum(layer.pieces)):
        raise ValueError(
            f"{name}: weight has shape {tuple(tensors.weight.shape)}; it must be {(layer.width, sum(layer.pieces))}"
        )
    wanted = {"scale": layer.scale, "bias": layer.bias, "gamma": layer.gamma, "beta": layer.beta}
    for part, place in wanted.items():
        vector = getattr(tensors, part)
        if (vector is None) != (place is None):
            raise ValueError(f"{name}: {part} is {'missing' if vector is None else 'given, but has no place'}")
        if vector is not None and vector.shape != (layer.width,):
            raise ValueError(f"{name}: {part} has shape {tuple(vector.shape)}; it must be ({layer.width},)")


def unpack(weights: Tensor, params: Tensor, layers: str, members: int = 1, padding: bool = False) -> list[list[Linear]]:
    """The inverse of ``pack``; all are views but a first weight of several inputs.

    With their ``padding`` the fp32 ones are as long as they are stored, and views without exception.
    """
    net = layout(layers, weights.dtype == torch.int8)
    check_sizes("unpack", weights, params, net, members)
    found = []
    for w, p in zip(weights.view(members, net.weights), params.view(members, net.params), strict=True):
        member = []
        for layer in net.layers:
            flat = p if layer is net.layers[-1] else w
            rows = flat[layer.weight : layer.weight + layer.width * layer.columns].view(layer.width, -1)
            parts, start = [], 0
            for piece in layer.pieces:
                parts.append(rows[:, start : start + piece])
                start += padded(piece)
            places = (layer.bias, layer.scale, layer.gamma, layer.beta)
            length = padded(layer.width) if padding else layer.width
            vectors = [None if at is None else p[at : at + length] for at in places]
            weight = rows if padding and flat is p else parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            member.append(Linear(weight, *vectors))  # type: ignore[arg-type]
        found.append(member)
    return found


def check_sizes(op: str, weights: Tensor, params: Tensor, net: Layout, members: int) -> None:
    """The flat tensors' dtypes and lengths against the layout's."""
    if weights.dtype not in STORED:
        raise TypeError(f"{op}: weights is {weights.dtype}; it must be int8, float16 or bfloat16")
    if params.dtype != torch.float32:
        raise TypeError(f"{op}: params is {params.dtype}; it must be float32")
    for name, flat, size in (("weights", weights, net.weights), ("params", params, net.params)):
        if flat.shape != (members * size,) or not flat.is_contiguous():
            raise ValueError(
                f"{op}: {name} has shape {tuple(flat.shape)}, but {members} member(s) of these layers "
                f"take ({members * size},)"
            )
