"""What must go on holding for a weight while its model is trained: parametrisations, and how they are settled.

``torch.nn.utils.parametrize`` computes ``layer.weight`` from what is trained, so any optimiser may be used. Several on
one weight apply in the order they were put on.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Model = TypeVar("Model", bound=nn.Module)


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
    _class_of_its_own(layer)
    parametrize.register_parametrization(layer, name, constraint)


def masked(layer: nn.Module, mask: Tensor, name: str = "weight") -> None:
    """Hold the layer's weight at zero outside ``mask``; an older mask is narrowed."""
    older = masks(layer).get(name)
    if older is None:
        constrain(layer, Mask(mask), name)
    else:
        older &= mask


def is_constrained(layer: nn.Module) -> bool:
    """Whether parametrisations are on the layer."""
    return parametrize.is_parametrized(layer)


def _class_of_its_own(layer: nn.Module) -> None:
    """Copies of a parametrised module share its class, and torch writes to it: changing one would break the other."""
    if parametrize.is_parametrized(layer):
        shared = type(layer)
        own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, own)


def masks(layer: nn.Module) -> dict[str, Tensor]:
    """The masks that are held on the layer's parameters, by name."""
    held: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
    return {name: c.mask for name in held for c in held[name] if isinstance(c, Mask)}


def settle(model: Model) -> Model:
    """Take every constraint off, in place; the weights keep the values they held."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _class_of_its_own(module)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                with torch.no_grad():
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def settle_masked(model: Model, *, inplace: bool = False) -> Model:
    """The model with the masks it held made plain zeros: a copy, or itself where no layer holds one."""
    if not any(map(masks, model.modules())):
        return model
    model = model if inplace else copied(model)
    for module in list(model.modules()):
        if masks(module):
            settle(module)
    return model


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy, also of tensors computed from parameters, such as the weight of a layer under a pruning mask."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
