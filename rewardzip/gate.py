"""What a compressed reward must keep to be called good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isnan

from .fidelity import HIGHER_IS_BETTER, LABELS, Figure


@dataclass(frozen=True)
class Gate:
    """Limits on figures against the original; NaN and constant outputs fail whatever the limits.

    agreement: the least pair agreement, and the least share of rows with the same greedy action where there are several
        outputs. epic: the largest EPIC distance, or Pearson distance where no next states are given. best_of_n: the
        largest share that picking the best of 16 may lose. Where a model has several outputs, the worst counts.
    """

    agreement: float = 0.99
    epic: float = 0.02
    best_of_n: float = 0.01

    def __post_init__(self) -> None:
        for name in ("agreement", "epic", "best_of_n"):
            value = getattr(self, name)
            # a model that picks the worst loses up to twice the gain and more
            most = inf if name == "best_of_n" else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"Gate: {name} is {value!r}; it must be a number from 0 to {most}")

    def failures(self, figures: Mapping[str, Figure]) -> list[str]:
        """Why these figures do not pass, a sentence each."""
        reasons = []
        for name, limit in self.limits(figures).items():
            value, least = figures[name].value, HIGHER_IS_BETTER[name]
            # a figure that is NaN passes nothing
            if not (value >= limit if least else value <= limit):
                bound = "at least" if least else "at most"
                reasons.append(f"{LABELS[name]} is {figures[name]}, it must be {bound} {limit:g}")
        return reasons

    def undecided(self, figures: Mapping[str, Figure]) -> list[str]:
        """The figures whose intervals hold the limit: other rows could have decided otherwise."""
        return [
            f"{LABELS[name]} is {figures[name]}: the limit, {limit:g}, lies within; more rows would tell"
            for name, limit in self.limits(figures).items()
            if (f := figures[name]).low is not None and f.high is not None and f.low < limit < f.high
        ]

    def excess(self, figures: Mapping[str, Figure], surely: bool = False) -> float:
        """What was lost as a share of what may be, by the figure that lost most: passes at 1. Infinite without figures.

        surely: at the worse ends of the intervals.
        """
        shares = [inf] if not figures else [0.0]
        for name, limit in self.limits(figures).items():
            figure, higher = figures[name], HIGHER_IS_BETTER[name]
            end = figure.low if higher else figure.high
            value = end if surely and end is not None else figure.value
            lost, may = (1 - value, 1 - limit) if higher else (value, limit)
            shares.append(lost / may if may else (inf if lost > 0 else 0.0))
        return inf if any(isnan(share) for share in shares) else max(shares)

    def limits(self, figures: Mapping[str, Figure]) -> dict[str, float]:
        """The limit of each of these figures that has one."""
        distance = "epic" if "epic" in figures else "pearson_distance"
        limits = {"agreement": self.agreement, "greedy": self.agreement, distance: self.epic}
        return {name: limit for name, limit in {**limits, "best_of_n": self.best_of_n}.items() if name in figures}
