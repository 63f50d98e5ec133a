"""The activations every op can fuse, and their derivatives: the one table to extend in torch.

An activation is written as a string, ``"relu"``, or with its parameter, ``"leaky_relu:0.2"``. The Triton twin of this
table is ``gpu/activations.py``, the Numba twin ``cpu/activations.py``; a test holds all three to the same values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Activation:
    """One activation: its value, its derivative, and its parameter's default (None where it takes none)."""

    name: str
    forward: Function
    derivative: Function
    """d forward / d input, from the output where ``from_output``, otherwise from the input."""
    from_output: bool
    default: float | None = None


def _gelu_derivative(x: Tensor, _: float) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(x: Tensor, _: float) -> Tensor:
    t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _silu_derivative(x: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _mish_derivative(x: Tensor, _: float) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("none", lambda x, _: x, lambda y, _: torch.ones_like(y), True),
        Activation("relu", lambda x, _: F.relu(x), lambda y, _: (y > 0).to(y.dtype), True),
        Activation(
            "leaky_relu",
            lambda x, slope: F.leaky_relu(x, slope),
            lambda x, slope: torch.where(x > 0, 1.0, slope),
            False,
            0.01,
        ),
        Activation(
            "elu",
            lambda x, alpha: F.elu(x, alpha),
            lambda x, alpha: torch.where(x > 0, 1.0, alpha * torch.exp(x.clamp(max=0))),
            False,
            1.0,
        ),
        Activation("tanh", lambda x, _: torch.tanh(x), lambda y, _: 1 - y * y, True),
        Activation("sigmoid", lambda x, _: torch.sigmoid(x), lambda y, _: y * (1 - y), True),
        Activation("silu", lambda x, _: F.silu(x), _silu_derivative, False),
        Activation("gelu", lambda x, _: F.gelu(x), _gelu_derivative, False),
        Activation("gelu_tanh", lambda x, _: F.gelu(x, approximate="tanh"), _gelu_tanh_derivative, False),
        Activation("mish", lambda x, _: F.mish(x), _mish_derivative, False),
        Activation("softplus", lambda x, _: F.softplus(x), lambda x, _: torch.sigmoid(x), False),
    )
}


@lru_cache(maxsize=256)
def parse(activation: str) -> tuple[Activation, float]:
    """``"elu:0.5"`` to (its table entry, its parameter); 0.0 for an activation that takes no parameter."""
    name, _, parameter = activation.partition(":")
    entry = ACTIVATIONS.get(name)
    if entry is None:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if not parameter:
        return entry, entry.default or 0.0
    if entry.default is None:
        raise ValueError(f"activation {name!r} takes no parameter, got {activation!r}")
    try:
        value = float(parameter)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"activation parameter {parameter!r} in {activation!r} is not a finite number")
    return entry, value


def apply(x: Tensor, activation: str) -> Tensor:
    entry, parameter = parse(activation)
    return entry.forward(x, parameter)
