"""What was found in a weight when it was packed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Zeros:
    """share: of the weights that were zero, before rounding made some so. why: what was chosen for them, "" where
    there were few. dropped: the outputs that did nothing, and have gone."""

    share: float
    pattern: str
    why: str
    dropped: int = 0
