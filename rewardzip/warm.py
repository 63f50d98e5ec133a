"""Filling the CPU kernels' cache ahead of the first call that would wait for a compiler."""

from __future__ import annotations

import time

import torch
from torch import nn

from .ensemble import fuse_ensemble
from .int8 import Int8
from .progress import shown
from .swap import swap

ACTIVATIONS = (nn.ReLU, nn.ELU, nn.Tanh, nn.SiLU, nn.GELU, nn.Mish)
CONFIGS = (Int8(), Int8(activations="dynamic"))


def warm(progress: bool = True) -> dict[str, float]:
    """Run every kind of layer once; the seconds each took, which is next to nothing where it was compiled before."""
    models: dict[str, nn.Module] = {}
    for config in CONFIGS:
        rows = config.activations or "float"
        models[f"Linear, {rows} rows"] = swap(nn.Sequential(nn.Linear(8, 8)), config)
        models[f"LayerNorm and Mish, {rows} rows"] = swap(_mlp(nn.Mish, norm=True), config)
        models[f"an ensemble, {rows} rows"] = fuse_ensemble([_mlp(nn.ReLU), _mlp(nn.ReLU)], config)
        for activation in ACTIVATIONS:
            models[f"{activation.__name__} alone, {rows} rows"] = swap(
                nn.Sequential(nn.Linear(8, 8), activation()), config
            )
            models[f"an MLP with {activation.__name__}, {rows} rows"] = swap(_mlp(activation), config)
    taken = {}
    with torch.no_grad(), shown("compiling", len(models), progress) as now:
        for done, (name, model) in enumerate(models.items()):
            now(name, done)
            began = time.perf_counter()
            model.requires_grad_(False)(torch.randn(2, 8))
            taken[name] = time.perf_counter() - began
    return taken


def _mlp(activation: type[nn.Module], norm: bool = False) -> nn.Sequential:
    layers = [nn.Linear(8, 8), *([nn.LayerNorm(8)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(8, 8), activation(), nn.Linear(8, 1))
