"""What the tests of recipes share: a model worth compressing, and a compress that judges nothing."""

from typing import Any

import torch
from torch import nn

import rewardzip as rz
from rewardzip.recipe import run_steps


def rows(count: int = 512, seed: int = 0) -> rz.Data:
    """States, actions and a reward that a small net can learn; columns that go together, as they do in real states."""
    generator = torch.Generator().manual_seed(seed)
    state, action = torch.randn(count, 6, generator=generator), torch.randn(count, 2, generator=generator)
    state[:, 3:] = state[:, :3] + 0.3 * state[:, 3:]
    return rz.Data((state, action), state[:, 0] * action[:, 0] - state[:, 1].abs())


def trained(hidden: tuple[int, ...] = (24, 24), steps: int = 300) -> rz.RewardMLP:
    torch.manual_seed(0)
    model = rz.RewardMLP(6, 2, hidden)
    rz.fit(model, rows(2048), steps=steps, learning_rate=5e-3, progress=False)
    return model.eval()


def squeeze(model: nn.Module, *steps: Any, data: rz.Data | None = None, seed: int = 0) -> tuple[nn.Module, list[str]]:
    """(the compressed model, notes) of a recipe, with no report."""
    small, notes = run_steps(model, steps, data, seed=seed, progress=False)
    return small, list(notes)


def error(model: nn.Module, other: nn.Module, data: rz.Data) -> float:
    """Mean squared difference of two models."""
    with torch.no_grad():
        return float((model(*data.inputs) - other(*data.inputs)).square().mean())
