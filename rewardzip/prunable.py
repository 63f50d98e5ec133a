"""Which layers of a model can be pruned, and what ``torch.nn.utils.prune`` has already done to them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .constraints import masked
from .moments import sizes
from .nn import CompressedLinear
from .nn.base import is_conv1d


def linears(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            raise ValueError(f"prune: layer {name!r} is packed ({type(module).__name__}); prune first, then swap")
        if isinstance(module, nn.Linear) or is_conv1d(module):
            if any(map(nn.parameter.is_lazy, module.parameters())):
                raise ValueError(f"prune: {name!r} has no weights yet; run one batch through the model first")
            found[name] = module
    return found


def layers_to_prune(model: nn.Module, skip: Sequence[str]) -> dict[str, Any]:
    """The layers to prune by name: all with more than one output that are not to be skipped."""
    left_out = skipped(model, skip)
    found = {n: m for n, m in linears(model).items() if sizes(m)[0] > 1 and n not in left_out}
    if not found:
        raise ValueError(f"prune: {type(model).__name__} has no linear layer to prune with more than one output")
    check_unshared(model, found)
    return found


def skipped(model: nn.Module, skip: Sequence[str]) -> set[str]:
    names = list(linears(model))
    for pattern in skip:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"prune: skip {pattern!r} matches no linear layer; there are {', '.join(names)}")
    return {name for pattern in skip for name in fnmatch.filter(names, pattern)}


def check_unshared(model: nn.Module, layers: Mapping[str, Any]) -> None:
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(name.removesuffix(".parametrizations.weight"))
    for names in owners.values():
        if len(names) > 1 and set(names) & set(layers):
            raise ValueError(
                f"prune: {' and '.join(map(repr, names))} share a parameter, so one cannot be pruned alone"
            )


def adopt(model: nn.Module) -> None:
    """Hold what torch.nn.utils.prune masks by constraints instead, which go through copies and any optimiser."""
    for module in model.modules():
        hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, torch_prune.BasePruningMethod)]
        for name in [hook._tensor_name for hook in hooks]:
            mask = getattr(module, f"{name}_mask")
            torch_prune.remove(module, name)
            masked(module, mask.bool(), name)
