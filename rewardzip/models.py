"""The reward model of (state, action) that most of the field uses, and its like for any inputs and outputs."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .fuse import original_class


class RewardMLP(nn.Module):
    """state [..., S], action [..., A] -> reward [...]: concatenation, Linear and ReLU per hidden width, one output."""

    def __init__(self, state_dim: int, action_dim: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        sizes = (state_dim + action_dim, *hidden)
        if state_dim < 0 or action_dim < 0 or min(sizes) < 1:
            raise ValueError(f"RewardMLP: state_dim={state_dim}, action_dim={action_dim}, hidden={tuple(hidden)}")
        self.state_dim, self.action_dim, self.hidden = state_dim, action_dim, tuple(hidden)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        reward: Tensor = self.net(torch.cat([state, action], -1))
        return reward.squeeze(-1)


class MLP(nn.Module):
    """Any inputs [rows, ...] -> [rows], or [rows, outputs]: flattened, concatenated, then as ``RewardMLP``.

    inputs: the numbers a row has in each input. outputs: None for one number without a dimension of its own.
    """

    def __init__(self, inputs: Sequence[int], hidden: Sequence[int] = (64, 64), outputs: int | None = None) -> None:
        super().__init__()
        sizes = (sum(inputs), *hidden, 1 if outputs is None else outputs)
        if min(sizes) < 1:
            raise ValueError(f"MLP: inputs={tuple(inputs)}, hidden={tuple(hidden)}, outputs={outputs}")
        self.inputs, self.hidden, self.outputs = tuple(inputs), tuple(hidden), outputs
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, *inputs: Tensor) -> Tensor:
        rows = [x if x.dim() == 2 else x.flatten(1) for x in inputs]
        out: Tensor = self.net(rows[0] if len(rows) == 1 else torch.cat(rows, 1))
        return out.squeeze(1) if self.outputs is None else out


def input_widths(model: nn.Module) -> tuple[int, ...]:
    """The numbers a row has in each input, where the model's class says so."""
    # another forward may take other inputs
    forward = original_class(model).forward
    if isinstance(model, RewardMLP) and forward is RewardMLP.forward:
        return model.state_dim, model.action_dim
    return model.inputs if isinstance(model, MLP) and forward is MLP.forward else ()
