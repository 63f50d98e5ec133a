"""Planning with a learned reward: pytorch_mppi imagines trajectories, the reward net scores every step of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .pendulum import make_pendulum

SAMPLES, HORIZON = 500, 20


@dataclass(frozen=True)
class Episode:
    """What the environment paid, where the pendulum was (0 is upright), and the seconds that each action took."""

    seed: int
    total: float
    angles: list[float]
    planning: list[float]
    in_reward: list[float]


def fly(
    reward: nn.Module, dynamics: nn.Module, seed: int, steps: int = 200, samples: int = SAMPLES, horizon: int = HORIZON
) -> Episode:
    """One episode of the real Pendulum, every action planned with the learned networks; the seed fixes all of it."""
    try:
        from pytorch_mppi import MPPI
    except ImportError as error:
        raise ImportError("the demo plans with pytorch_mppi: pip install 'rewardzip[rl,report]'") from error
    device = next(dynamics.parameters()).device
    clock = _clock(device)
    spent = 0.0

    def cost(state: Tensor, action: Tensor) -> Tensor:
        nonlocal spent
        start = clock()
        paid: Tensor = reward(state, action)
        spent += clock() - start
        return -paid

    environment = make_pendulum()
    total, angles, planning, in_reward = 0.0, [], [], []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        limit = torch.tensor(2.0, device=device)
        noise = torch.tensor(1.0, device=device)
        planner = MPPI(dynamics, cost, 3, noise, samples, horizon, device, u_min=-limit, u_max=limit)
        state, _ = environment.reset(seed=seed)
        for _ in range(steps):
            spent, start = 0.0, clock()
            action = planner.command(torch.from_numpy(state))
            planning.append(clock() - start)
            in_reward.append(spent)
            state, paid, *_ = environment.step(action.cpu().numpy())
            total += float(paid)
            angles.append(math.degrees(math.atan2(state[1], state[0])))
    environment.close()
    return Episode(seed, total, angles, planning, in_reward)


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished
