"""Optimal brain surgeon: what goes next when the weights that are left make up, each time, for what went.

For a row w of a layer's weight and the covariance H of its inputs, taking the weights of a block b costs
w_b ((H^-1)_bb)^-1 w_b^T, and the others move by -w_b ((H^-1)_bb)^-1 (H^-1)_b: no search, no gradient steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import Moments, damped

# of the inverses that are updated at once: larger ones leave the cache
CACHED = 2**19

# updates of numbers beyond which the order is judged once, before anything has gone
AFFORDABLE = 2e10


def losses(weight: Tensor, inputs: Moments, block: tuple[int, int]) -> Tensor:
    """[blocks along N, blocks along K]: what each block's going costs at its turn, the cheapest of its rows first.

    The square of the change of the layer's outputs, weighted by how steeply the model depends on each.
    """
    n, k = weight.shape
    rows, columns = block
    # what is padded on has no weights: it goes first and costs nothing
    padded = F.pad(weight * inputs.steepness[:, None].sqrt(), (0, -k % columns, 0, -n % rows))
    inverse = torch.eye(padded.shape[1], dtype=weight.dtype, device=weight.device)
    inverse[:k, :k] = torch.linalg.inv(damped(inputs.covariance))
    groups = padded.view(-1, rows, padded.shape[1])
    blocks = padded.shape[1] // columns
    if len(groups) * blocks * inverse.numel() > AFFORDABLE:
        return _cost(groups, inverse.expand(len(groups), -1, -1), columns)
    size = max(1, CACHED // inverse.numel())
    return torch.cat([_in_turn(group, inverse, columns) for group in groups.split(size)])


def _cost(groups: Tensor, inverses: Tensor, columns: int) -> Tensor:
    """[G, blocks]: of each group [rows, K] of rows with an inverse [K, K] of its own, what each block costs now."""
    own = inverses.unflatten(2, (-1, columns)).unflatten(1, (-1, columns)).diagonal(dim1=1, dim2=3)
    own = own.permute(0, 3, 1, 2)  # [G, blocks, columns, columns]
    parts = groups.unflatten(2, (-1, columns)).transpose(1, 2)  # [G, blocks, rows, columns]
    solved: Tensor = parts / own if columns == 1 else torch.linalg.solve(own, parts, left=False)
    cost: Tensor = (solved * parts).sum((2, 3))
    return cost


def _in_turn(groups: Tensor, inverse: Tensor, columns: int) -> Tensor:
    groups, inverses = groups.clone(), inverse.repeat(len(groups), 1, 1)
    blocks = groups.shape[2] // columns
    gone = torch.zeros(len(groups), blocks, dtype=torch.bool, device=groups.device)
    scores, so_far = torch.zeros_like(gone, dtype=groups.dtype), groups.new_zeros(len(groups), 1)
    for _ in range(blocks):
        cost = _cost(groups, inverses, columns).masked_fill(gone, torch.inf)
        cheapest = cost.argmin(1, keepdim=True)
        # never less than before: what goes later must rank later
        so_far = torch.maximum(so_far, cost.gather(1, cheapest))
        scores.scatter_(1, cheapest, so_far)
        gone.scatter_(1, cheapest, True)
        take(groups, inverses, cheapest * columns + torch.arange(columns, device=groups.device))
    return scores


def take(groups: Tensor, inverses: Tensor, columns: Tensor) -> None:
    """Take the columns [G, C] out of the weights [G, rows, K] and the inverses [G, K, K], in place."""
    across = inverses.gather(1, columns[:, :, None].expand(-1, -1, inverses.shape[2]))  # [G, C, K]
    own = across.gather(2, columns[:, None].expand(-1, columns.shape[1], -1))
    moved = across / own if columns.shape[1] == 1 else torch.linalg.solve(own, across)
    groups -= groups.gather(2, columns[:, None].expand(-1, groups.shape[1], -1)) @ moved
    inverses -= across.transpose(1, 2) @ moved
    # nothing is left in these places: they must not be divided by
    inverses.diagonal(dim1=1, dim2=2).scatter_(1, columns, 1.0)
