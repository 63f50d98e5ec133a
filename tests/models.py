"""Models and comparisons the tests share."""

import copy
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import nn

import rewardzip as rz
from rewardzip.fuse import FusedForward, unfuse
from rewardzip.nn import CompressedLinear


def swapped(model: nn.Module, config: rz.Int8 | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """``rz.swap`` without its notes on what could not be fused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rz.swap(model, config or rz.Int8(), *args, **kwargs)


def unfused(fast: nn.Module) -> nn.Module:
    """The same compressed layers under the author's own forwards."""
    fast = copy.deepcopy(fast)
    for module in fast.modules():
        if isinstance(module, FusedForward):
            unfuse(module)
    return fast


def dense_twin(fast: nn.Module) -> nn.Module:
    """The author's forwards on dense layers whose weights are the rounded ones, in float32."""
    return rz.restore(fast).float()


def packed(model: nn.Module) -> dict[str, CompressedLinear]:
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, CompressedLinear)}


def fused(model: nn.Module) -> dict[str, str]:
    """Full name of each fused layer, and its activation."""
    return {
        f"{name}.{child}" if name else child: activation
        for name, module in model.named_modules()
        if isinstance(module, FusedForward)
        for child, activation in module.rz_fused.items()
    }


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU, outputs: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, n in pairwise(sizes):
        layers += [nn.Linear(k, n), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
