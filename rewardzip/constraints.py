"""What must go on holding for a weight while its model is trained: parametrisations, and how they are settled.

``torch.nn.utils.parametrize`` computes ``layer.weight`` from what is trained, so any optimiser may be used. Several on
one weight apply in the order they were put on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from .fuse import is_plain
from .nn.base import is_pruned

Constraint = TypeVar("Constraint", bound=nn.Module)
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


class Grid(nn.Module):
    """Weights [N, K] on whole multiples of a scale: ``clamp(round(weight / scale), low, high) * scale``.

    scale, low, high: [N, G], or [1, 1] for a whole tensor; each serves ``group`` inputs next to each other. A zero
    point is in the bounds: codes from 0 to 2^k - 1 less a zero point z are those from -z to 2^k - 1 - z. Gradients pass
    the rounding straight through; the scale is trained as well, by a factor that starts at 1.
    """

    def __init__(self, scale: Tensor, low: Tensor, high: Tensor, group: int) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("start", scale)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.log_factor = nn.Parameter(torch.zeros_like(scale))

    @property
    def scale(self) -> Tensor:
        return self.start * self.log_factor.exp()

    def spread(self, numbers: Tensor, columns: int) -> Tensor:
        """[N, G] -> [N, K]: for each weight its scale or bound."""
        return numbers.repeat_interleave(self.group, 1)[:, :columns]

    def forward(self, weight: Tensor) -> Tensor:
        scale, low, high = (self.spread(t, weight.shape[1]) for t in (self.scale, self.low, self.high))
        steps = (weight.float() / scale).clamp(low, high)
        rounded = steps + (steps.round() - steps).detach()
        return (rounded * scale).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def codes(self, weight: Tensor) -> Tensor:
        """The whole numbers [N, K] that the weights are."""
        scale, low, high = (self.spread(t.detach(), weight.shape[1]) for t in (self.scale, self.low, self.high))
        return (weight.detach().float() / scale).clamp(low, high).round()

    start: Tensor
    low: Tensor
    high: Tensor


class Codebook(nn.Module):
    """Weights that are entries of a table: what is trained is the table. ``zero``: its first entry stays 0."""

    def __init__(self, indices: Tensor, entries: int, zero: bool) -> None:
        super().__init__()
        self.entries, self.zero = entries, zero
        self.register_buffer("indices", indices)

    def forward(self, table: Tensor) -> Tensor:
        return self.table(table)[self.indices]

    def table(self, table: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(table[:1]), table[1:]]) if self.zero else table

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The mean of the weights that share an entry."""
        flat, indices = weight.float().flatten(), self.indices.flatten()
        sums = torch.zeros(self.entries, dtype=torch.float32, device=flat.device).index_add_(0, indices, flat)
        counts = torch.bincount(indices, minlength=self.entries).clamp(min=1)
        return self.table(sums / counts).to(weight.dtype)

    indices: Tensor


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


def constraint_of(layer: nn.Module, kind: type[Constraint]) -> Constraint | None:
    """The constraint of this kind on the layer's weight, if there is one."""
    if parametrize.is_parametrized(layer, "weight"):
        for constraint in layer.parametrizations["weight"]:  # type: ignore[index]
            if isinstance(constraint, kind):
                return constraint
    return None


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


def linears(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The layers that techniques may change, by name: ``nn.Linear`` itself, constrained or not, and not hooked."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        if kind is nn.Linear and is_plain(module) and not any(fnmatchcase(name, pattern) for pattern in skip):
            found[name] = module
    return found


def check_packable(kind: str, layers: dict[str, nn.Linear]) -> None:
    """That the kernels know the layers' type, before a step trains what can then not be packed."""
    for name, layer in layers.items():
        if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"{kind}: layer {name!r} is {layer.weight.dtype}; what is packed must be float32, float16 or bfloat16"
            )


def settle_masked(model: Model, *, inplace: bool = False) -> Model:
    """The model with the masks it held made plain zeros: a copy, or itself where no layer holds one."""
    if not any(map(masks, model.modules())):
        return model
    model = model if inplace else copied(model)
    for module in list(model.modules()):
        if masks(module):
            settle(module)
    return model


def unmasked(model: Model) -> Model:
    """The masks of torch.nn.utils.prune made plain zeros, in place."""
    for module in model.modules():
        if is_pruned(module):
            for hook in list(module._forward_pre_hooks.values()):
                torch_prune.remove(module, hook._tensor_name)  # type: ignore[attr-defined]
    return model


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy, also of tensors computed from parameters, such as the weight of a layer under a pruning mask."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
