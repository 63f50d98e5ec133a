"""The reward model of (state, action) that most of the field uses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RewardMLP(nn.Module):
    """state [..., S], action [..., A] -> reward [...]: concatenation, Linear and ReLU per hidden width, one output."""

    def __init__(self, state_dim: int, action_dim: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        sizes = (state_dim + action_dim, *hidden)
        if state_dim < 0 or action_dim < 0 or min(sizes) < 1:
            raise ValueError(f"RewardMLP: state_dim={state_dim}, action_dim={action_dim}, hidden={tuple(hidden)}")
        self.state_dim, self.action_dim, self.hidden = state_dim, action_dim, tuple(hidden)
        layers: list[nn.Module] = []
        for width_in, width_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        reward: Tensor = self.net(torch.cat([state, action], -1))
        return reward.squeeze(-1)
