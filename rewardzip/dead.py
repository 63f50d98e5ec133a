"""Neurons that do nothing: the same for every input, or read by nobody. They go and the model's numbers stay.

Only what is exact: what a constant neuron gave moves into the biases behind it, and a norm in between keeps them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from .channels import Channels
from .neurons import Kept, shrink

# types in which a bias takes a constant over without a rounding that shows
WIDE = (torch.float32, torch.float64)


@torch.no_grad()
def living(model: nn.Module, keep: Container[str] = ()) -> Kept:
    """Of layers with dead neurons, which live; ``keep``: layers whose shape must stay."""
    channels = Channels.of(model)
    times = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in channels.layers}
    keep = {name for name, layer in layers.items() if name in keep or not _own(layer, times)}
    sizes = {name: layer.out_features for name, layer in layers.items()}
    found: dict[str, Any] = {
        name: torch.ones(sizes[name], dtype=torch.bool, device="cpu")
        for name in channels.layers
        if name not in keep and name not in channels.fixed and sizes[name] > 1 and channels.readers(name)
    }
    for reader, parts in channels.reads.items():
        module: Any = model.get_submodule(reader)
        start = 0
        for part in parts:
            columns = slice(start, start := start + (part.width or 0))
            if part.layer not in found:
                continue
            dead = found[part.layer]
            if not isinstance(module, nn.Linear) or reader in keep:
                dead[:] = False  # a norm's mean would change
                continue
            idle = (module.weight[:, columns] == 0).all(0).cpu()
            if part.known is not None and part.values is not None:
                folds = module.bias is not None and module.weight.dtype in WIDE
                idle |= (part.known & ((part.values == 0) | folds)).cpu()
            dead &= idle
    for dead in found.values():
        # a whole layer that does nothing has not learnt yet, as before a last layer that starts at zero
        dead &= not bool(dead.all())
    return {name: ~dead for name, dead in found.items() if bool(dead.any())}


def drop_dead(model: nn.Module, keep: Container[str] = ()) -> dict[str, int]:
    """Take them out in place, and those that are dead then; how many each layer has lost."""
    lost: Counter[str] = Counter()
    while alive := living(model, keep):
        shrink(Channels.of(model), alive)
        lost.update({name: int((~mask).sum()) for name, mask in alive.items()})
    return dict(lost)


def _own(layer: nn.Module, times: Counter[nn.Parameter]) -> bool:
    """Whether the layer is torch's, and its parameters are no other module's."""
    return type(layer) is nn.Linear and all(times[p] == 1 for p in layer._parameters.values() if p is not None)
