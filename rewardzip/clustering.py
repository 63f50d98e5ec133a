"""k-means of single numbers, where sorting makes it exact to assign and cheap to repeat."""

from __future__ import annotations

import torch
from torch import Tensor


def clusters(weight: Tensor, entries: int, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """(the entry of each weight, the codebook in rising order): Lloyd's rounds, with no chance in them."""
    flat = weight.detach().flatten().double().sort().values
    sums = torch.cat([flat.new_zeros(1), flat.cumsum(0)])
    starts = (
        torch.linspace(0, len(flat) - 1, 2 * entries + 1, dtype=torch.float32, device=flat.device)[1::2].round().long()
    )
    # quantiles follow the crowd and an even spacing reaches the few large weights: half way between the two
    even = torch.linspace(0, 1, entries, device=flat.device, dtype=flat.dtype) * (flat[-1] - flat[0]) + flat[0]
    centres = (flat[starts] + even) / 2
    distinct = flat.unique()
    if len(distinct) <= entries:
        centres, rounds = torch.cat([distinct, distinct[-1:].expand(entries - len(distinct))]), 0
    for _ in range(rounds):
        ends = torch.searchsorted(flat, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(flat))])
        counts = edges[1:] - edges[:-1]
        means = (sums[edges[1:]] - sums[edges[:-1]]) / counts.clamp(min=1)
        new = torch.where(counts > 0, means, centres)
        if torch.equal(new, centres):
            break
        centres = new
    centres = centres.to(weight.dtype)
    return torch.bucketize(weight.detach(), (centres[1:] + centres[:-1]) / 2), centres
