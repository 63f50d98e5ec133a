"""What must hold of any reward model, whatever its figures: numbers, more than one, and the same in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .running import outputs


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


def finite(new: Tensor) -> Check:
    bad = int((~new.isfinite()).any(1).sum())
    return Check("finite", not bad, f"inf or NaN for {bad} of {len(new)} rows" if bad else "no inf, no NaN")


def varies(new: Tensor) -> Check:
    constant = [i for i, column in enumerate(new.T) if column.min() == column.max()]
    if constant:
        which = f"output {constant[0]}" if new.shape[1] > 1 else "the output"
        return Check("varies", False, f"{which} is {float(new[0, constant[0]]):g} for all rows")
    levels = min(len(column.unique()) for column in new.T)
    return Check("varies", True, f"{levels:,} different values for {len(new):,} rows")


def batch_invariance(
    before: nn.Module, after: nn.Module, inputs: Sequence[Tensor], old: Tensor, new: Tensor, batches: Sequence[int]
) -> Check:
    """That a row's output does not depend on the rows beside it, nor on how many: alone, and in the batches timed."""
    spread = float(old.std(0).mean())
    changes = {}
    for model, whole in ((before, old), (after, new)):
        alone = torch.cat([outputs(model, [t[i : i + 1] for t in inputs]) for i in range(min(32, len(old)))])
        largest = float((alone - whole[: len(alone)]).abs().max())
        for batch in batches:
            part = outputs(model, [t[:batch] for t in inputs])
            largest = max(largest, float((part - whole[:batch]).abs().max()))
        changes[model] = largest / spread
    now, then = changes[after], changes[before]
    # the roundoff of a dense model in 16 bits is not the compression's doing
    return Check(
        "batch invariance",
        now <= max(1e-3, 2 * then),
        f"alone or among others, a row moves by {now:.1e} of the spread; in the original by {then:.1e}",
    )
