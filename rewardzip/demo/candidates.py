"""The reward as trained and as compressed, and what is known of each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from statistics import mean, median

import torch
from torch import Tensor, nn

from ..fidelity import pair_agreement
from ..int8 import Int8
from ..swap import swap
from .planner import Episode


@dataclass
class Candidate:
    name: str
    about: str
    model: nn.Module
    size: int
    """Bytes of its weights, biases and scales."""
    scored: Tensor
    """Its rewards for the held-out transitions."""
    agreement: float
    """The share of pairs of held-out transitions that it puts in the dense model's order."""
    error: float
    """Root mean squared distance to the true rewards."""
    episodes: list[Episode] = field(default_factory=list)

    @property
    def returned(self) -> float:
        return mean(e.total for e in self.episodes)

    @property
    def planning(self) -> float:
        """Seconds to plan one action: the median of all actions."""
        return median(t for e in self.episodes for t in e.planning)

    @property
    def in_reward(self) -> float:
        """Those of them spent in the reward net."""
        return median(t for e in self.episodes for t in e.in_reward)


def candidates(dense: nn.Module, held_out: tuple[Tensor, ...], truth: Tensor) -> list[Candidate]:
    """The dense model first; a compression that ruins the reward last, so that one sees that the test can tell."""
    both = Int8(activations="dynamic")
    models = {
        "fp32": ("as trained", dense),
        "int8": ("weights in int8", swap(dense, Int8())),
        "int8 x int8": ("weights and rows in int8", swap(dense, both)),
        "ternary": ("weights rounded to three values: too far", swap(rounded_to_three(dense), both)),
    }
    found = []
    with torch.no_grad():
        before = dense(*held_out).cpu()
        for name, (about, model) in models.items():
            scored = model(*held_out).float().cpu()
            error = float((scored - truth).square().mean().sqrt())
            found.append(Candidate(name, about, model, bytes_of(model), scored, pair_agreement(before, scored), error))
    return found


def bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def rounded_to_three(model: nn.Module) -> nn.Module:
    """A copy, every hidden weight rounded to the nearest of -m, 0 and m, m being its output's largest."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.out_features > 1:
                largest = layer.weight.abs().amax(1, keepdim=True)
                layer.weight.copy_((layer.weight / largest).round() * largest)
    return model
