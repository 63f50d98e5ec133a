"""What compression did to a reward, in the language of rewards."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_agreement(before: Tensor, after: Tensor, pairs: int = 100_000, seed: int = 0) -> float:
    """The share of random pairs of rows that both rewards put in the same order; ties in ``before`` do not count."""
    if before.shape != after.shape or before.dim() != 1 or len(before) < 2:
        raise ValueError(f"pair_agreement takes two vectors of 2 or more, got {before.shape} and {after.shape}")
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randint(len(before), (2, pairs), generator=generator)
    first, second = (before[i] - before[j]).sign(), (after[i] - after[j]).sign()
    counted = first != 0
    return float((first == second)[counted].double().mean())
