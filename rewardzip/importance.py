"""Which weights matter least: scores for single weights and for blocks, and the masks that patterns make of them.

A score estimates what the layer's output loses when the weight goes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .moments import Moments
from .surgeon import losses

Importance = Literal["magnitude", "activation", "second-order", "random"]
IMPORTANCES = ("magnitude", "activation", "second-order", "random")


def scored(
    weight: Tensor, importance: str, inputs: Moments | None, generator: torch.Generator, block: tuple[int, int] = (1, 1)
) -> Tensor:
    """[blocks along N, blocks along K], of weights [N, K]: the mean of |w|, or of |w| times the norm of its input
    (Wanda), so that blocks cut short at the edges compare with the others; the loss when the other weights make up for
    the block; or random numbers."""
    counts = _blocks(torch.ones_like(weight), block)
    if importance == "random":
        return torch.rand(counts.shape, generator=generator, dtype=weight.dtype, device="cpu").to(weight.device)
    if importance == "magnitude":
        return _blocks(weight.abs(), block) / counts
    assert inputs is not None
    if importance == "activation":
        return _blocks(weight.abs() * inputs.second.diagonal().sqrt(), block) / counts
    return losses(weight, inputs, block) / counts


def _blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums over blocks, those cut short at the edges included."""
    for dim, size in enumerate(block):
        values = torch.stack([part.sum(dim) for part in values.split(size, dim)], dim)
    return values


def spread(per_block: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Each weight's value, from its block's."""
    return per_block.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """A mask without the ``removed`` lowest scores; of equal ones the first go."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:removed]] = False
    return mask.view(scores.shape)


def keep_of_each(scores: Tensor, kept: int, of: int) -> Tensor:
    """A mask of the ``kept`` highest of each ``of`` consecutive inputs; fewer inputs at the end count as a group."""
    n, k = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -k % of), value=-torch.inf).view(n, -1, of)
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, padded.topk(kept, -1).indices, True)
    return mask.view(n, -1)[:, :k]


def relative(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores made comparable between layers, by their root mean square."""
    return {name: s / s.square().mean().sqrt().clamp_min(1e-300) for name, s in scores.items()}
