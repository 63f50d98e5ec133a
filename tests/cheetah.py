"""A reward net of the usual size on real data: HalfCheetah, (state, action, next state) through 40-256-256-1."""

import contextlib
import tempfile
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import rewardzip as rz


class CheetahReward(nn.Module):
    def __init__(self, *hidden: int) -> None:
        super().__init__()
        sizes = (17 + 6 + 17, *(hidden or (256, 256)))
        layers: list[nn.Module] = []
        for k, n in pairwise(sizes):
            layers += [nn.Linear(k, n), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.net(torch.cat([state, action, next_state], -1)).squeeze(-1)


@lru_cache
def seen(steps: int = 12_000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state, action, next state, reward) of a random policy."""
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # it writes a log of its own model's warnings
        env = gymnasium.make("HalfCheetah-v5", max_episode_steps=200)
    env.action_space.seed(0)
    state, _ = env.reset(seed=0)
    rows = []
    for _ in range(steps):
        action = env.action_space.sample()
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append([torch.as_tensor(x, dtype=torch.float32) for x in (state, action, after, reward)])
        state = env.reset()[0] if terminated or truncated else after
    env.close()
    state, action, after, reward = (torch.stack(column) for column in zip(*rows, strict=True))
    return state, action, after, reward


def scale() -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each number of a state."""
    state = seen()[0]
    return state.mean(0), state.std(0)


def transitions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state, action, next state, reward) of a random policy, states standardised."""
    (state, action, after, reward), (mean, std) = seen(), scale()
    return (state - mean) / std, action, (after - mean) / std, reward


@lru_cache
def trained(steps: int = 1000) -> tuple[nn.Module, rz.Data]:
    """(the net fitted to 10,000 transitions, 2,000 others)."""
    *inputs, reward = transitions()
    torch.manual_seed(0)
    model = CheetahReward()
    train, held = (
        rz.Data(tuple(t[part] for t in inputs), reward[part]) for part in (slice(10_000), slice(10_000, None))
    )
    rz.fit(model, (*train.inputs, train.rewards), steps=steps, progress=False)
    return model.eval().requires_grad_(False), held
