"""The linear layers of GPT-2, transformers' ``Conv1D``, as ``nn.Linear`` while a recipe is at work on them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .nn.base import is_conv1d
from .swap import put


def as_linears(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """(the model with them changed, in place; those it had, by name)."""
    found = {name: m for name, m in model.named_modules() if is_conv1d(m)}
    return put(model, {name: _linear(conv) for name, conv in found.items()}), found


def as_they_were(model: nn.Module, found: dict[str, Any]) -> nn.Module:
    """Those that no step has packed or split are ``Conv1D`` again, in place: the model's class expects it."""
    modules = dict(model.named_modules())
    left = {name: conv for name, conv in found.items() if type(modules.get(name)) is nn.Linear}
    for name, conv in left.items():
        linear: Any = modules[name]
        conv.nx, conv.nf = linear.in_features, linear.out_features
        for parameter, value in (("weight", linear.weight.t()), ("bias", linear.bias)):
            held = nn.Parameter(value.detach().contiguous(), requires_grad=linear.weight.requires_grad)
            setattr(conv, parameter, held)
    return put(model, left)


def _linear(conv: Any) -> nn.Linear:
    k, n = conv.weight.shape
    linear = nn.Linear(k, n, device="meta", dtype=conv.weight.dtype)
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=conv.weight.requires_grad)
    linear.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
    return linear.train(conv.training)
