"""What must go on holding for a weight while its model is trained: parametrisations, and how they are settled.

``torch.nn.utils.parametrize`` computes ``layer.weight`` from what is trained, so any optimiser may be used. Several on
one weight apply in the order they were put on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """Zeros that stay zeros."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    mask: Tensor


def constrain(layer: nn.Module, constraint: nn.Module, name: str = "weight") -> None:
    """Put a constraint on the layer's weight, on top of those it has."""
    parametrize.register_parametrization(layer, name, constraint)


def masked(layer: nn.Module, mask: Tensor) -> None:
    """Hold the layer's weight at zero outside ``mask``; an older mask is narrowed."""
    if parametrize.is_parametrized(layer, "weight"):
        for constraint in layer.parametrizations["weight"]:  # type: ignore[index]
            if isinstance(constraint, Mask):
                constraint.mask &= mask
                return
    constrain(layer, Mask(mask))


def is_constrained(layer: nn.Module) -> bool:
    """Whether parametrisations are on the layer."""
    return parametrize.is_parametrized(layer)


def settle(model: nn.Module) -> nn.Module:
    """Take every constraint off, in place; the weights keep the values they held."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                with torch.no_grad():
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model
