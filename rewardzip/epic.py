"""EPIC, the distance between rewards that potential shaping and rescaling leave at zero.

Gleave et al., Quantifying differences in reward functions, ICLR 2021. It needs to know which input is the state, which
the action and which the next state; for plain rows there is ``fidelity.pearson_distance``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .fidelity import DRAWS, LEAST_ROWS, Figure, pearson_distance
from .running import outputs

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]

ROWS, SAMPLES, BATCH = 2048, 64, 16_384


def epic_distance(
    before: Reward,
    after: Reward,
    states: Tensor,
    actions: Tensor,
    next_states: Tensor,
    *,
    discount: float = 0.99,
    draws: int = DRAWS,
    seed: int = 0,
) -> Figure:
    """The distance of two rewards of (state, action, next state), over the transitions given.

    What a potential adds, ``discount * p(next state) - p(state)``, is taken out of both: from each transition's reward
    goes what its two states are worth by themselves, the mean over actions and next states drawn from those given.
    The same are drawn for both rewards, so the shaping goes whole and not on average.
    """
    transitions = Transitions(states, actions, next_states, discount=discount, seed=seed)
    return transitions.distance(transitions.canonical(before), transitions.canonical(after), draws)


class Transitions:
    """What EPIC draws from the transitions given, once for all rewards that are compared."""

    def __init__(
        self, states: Tensor, actions: Tensor, next_states: Tensor, *, discount: float = 0.99, seed: int = 0
    ) -> None:
        lengths = [len(states), len(actions), len(next_states)]
        if len(set(lengths)) != 1 or next_states.shape != states.shape:
            shapes = [tuple(t.shape) for t in (states, actions, next_states)]
            raise ValueError(f"EPIC: states, actions and next states have the shapes {shapes}")
        if lengths[0] < LEAST_ROWS:
            raise ValueError(f"EPIC: {lengths[0]} transitions are too few; it takes {LEAST_ROWS}")
        self.discount, self.seed = discount, seed
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(lengths[0], generator=generator, device="cpu")[:ROWS]
        self.action, self.reached = (
            t[torch.randint(len(t), (SAMPLES,), generator=generator, device="cpu")] for t in (actions, states)
        )
        self.rows = states[rows], actions[rows], next_states[rows]

    @classmethod
    def of(
        cls, inputs: Sequence[Tensor], next_states: Tensor | None, *, discount: float = 0.99, seed: int = 0
    ) -> Transitions | None:
        """Those in the inputs of a model: (state), (state, action) or (state, action, next state); None where nobody
        says what follows. Of three inputs the third is the next state if it is like the first."""
        if next_states is None and len(inputs) == 3 and inputs[0].shape == inputs[2].shape:
            next_states = inputs[2]
        if next_states is None:
            return None
        if len(inputs) > 3:
            raise ValueError(f"EPIC knows (state, action, next state), the model takes {len(inputs)} inputs")
        actions = inputs[1] if len(inputs) > 1 else inputs[0][:, :0]
        return cls(inputs[0], actions, next_states.to(inputs[0].device), discount=discount, seed=seed)

    def canonical(self, reward: Reward) -> Tensor:
        """The canonically shaped reward but for its constant, which no correlation sees."""
        state, _, next_state = self.rows
        worth_before, worth_after = (_mean_from(reward, s, self.action, self.reached) for s in (state, next_state))
        return reward(*self.rows).double().cpu() + self.discount * worth_after - worth_before

    def distance(self, x: Tensor, y: Tensor, draws: int = DRAWS) -> Figure:
        """Of two canonical rewards."""
        for name, canonical in (("first", x), ("second", y)):
            if not canonical.isfinite().all():
                raise ValueError(f"EPIC: the {name} reward is inf or NaN somewhere")
        drawn, generator = [], torch.Generator().manual_seed(self.seed + 1)
        for _ in range(draws):
            picks = torch.randint(len(x), (len(x),), generator=generator, device="cpu")
            drawn.append(pearson_distance(x, y, torch.bincount(picks, minlength=len(x)).double()))
        return Figure.of(pearson_distance(x, y), drawn)


def reward_of(model: nn.Module, inputs: int) -> Reward:
    """A model that takes so many of (state, action, next state)."""
    return lambda *transition: outputs(model, transition[:inputs])[:, 0]


def _mean_from(reward: Reward, states: Tensor, action: Tensor, reached: Tensor) -> Tensor:
    """The mean reward of leaving each state by the sampled actions for the sampled states."""
    samples = len(action)
    means = []
    for part in states.split(max(1, BATCH // samples)):
        rewards = reward(
            part.repeat_interleave(samples, 0),
            action.repeat(len(part), *[1] * (action.dim() - 1)),
            reached.repeat(len(part), *[1] * (reached.dim() - 1)),
        )
        means.append(rewards.double().cpu().view(len(part), samples).mean(1))
    return torch.cat(means)
