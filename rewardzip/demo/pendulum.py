"""Gymnasium's Pendulum: transitions of a random policy, and the two networks learned from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

# Pendulum's own reset, widened to every angle and speed it can have: a random policy from its usual start never stands
EVERYWHERE = {"x_init": math.pi, "y_init": 8.0}
EPISODE = 20


class Dynamics(nn.Module):
    """(state [..., 3], action [..., 1]) -> the state one step later."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        layers = (nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        self.change = nn.Sequential(*layers)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        change: Tensor = self.change(torch.cat([state, action], -1))
        return state + change


def make_pendulum() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("the demo learns from Gymnasium: pip install 'rewardzip[rl,report]'") from error
    return gymnasium.make("Pendulum-v1")


def transitions(steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state [steps, 3], action [steps, 1], reward [steps], state after [steps, 3]) of a random policy."""
    environment = make_pendulum()
    environment.action_space.seed(seed)
    states, actions, rewards, afters = [], [], [], []
    state, _ = environment.reset(seed=seed, options=EVERYWHERE)
    for step in track(range(1, steps + 1), "rollouts"):
        action = environment.action_space.sample()
        after, reward, *_ = environment.step(action)
        states.append(state)
        actions.append(action)
        rewards.append(float(reward))
        afters.append(after)
        state = environment.reset(options=EVERYWHERE)[0] if step % EPISODE == 0 else after
    environment.close()
    stacked = [torch.from_numpy(np.stack(rows)) for rows in (states, actions, afters)]
    return stacked[0], stacked[1], torch.tensor(rewards, device="cpu"), stacked[2]
