"""What a search has measured of its candidates, and what it chooses of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .candidates import Recipe, at, title
from .fidelity import Figure
from .gate import Gate
from .report import Candidate

RUNGS = (0.05, 0.25, 1.0)
"""Of a recipe's training, the share that it gets in each round."""


@dataclass(frozen=True)
class Trial:
    """One recipe, trained for one share of its training, as measured."""

    recipe: Recipe
    rung: int
    smaller: float
    faster: float
    agreement: float
    excess: float
    """What was lost as a share of what the gate lets go: passes at 1."""
    surely: float
    """The same at the worse end of the intervals."""
    returns: float | None
    spent: float

    @property
    def gain(self) -> float:
        return self.smaller * self.faster

    @property
    def costs(self) -> tuple[float, ...]:
        return (-self.smaller, -self.faster, self.excess, *(() if self.returns is None else (-self.returns,)))


def trial_of(recipe: Recipe, rung: int, entry: dict[str, Any], gate: Gate) -> Trial:
    figures = {name: Figure(*three) for name, three in entry["figures"].items()}
    excess, surely = gate.excess(figures), gate.excess(figures, surely=True)
    kept = {name: entry[name] for name in ("smaller", "faster", "agreement", "returns", "spent")}
    return Trial(recipe, rung, excess=excess, surely=surely, **kept)


def promise(trial: Trial) -> float:
    """What more training is spent by: the gain, and far less of it the further from the gate. What another beats in
    everything promises less than the other."""
    return float(trial.gain / max(trial.excess, 1) ** 4)


def choose(trials: Sequence[Trial]) -> Trial | None:
    """The most gained within the gate, those first whose intervals lie within it; else the nearest to the gate."""
    # of each recipe what lost least; its size and time do not depend on training
    best: dict[Recipe, Trial] = {}
    for trial in sorted(trials, key=lambda t: (t.surely, -t.rung)):
        best.setdefault(trial.recipe, trial)
    for within in ([t for t in best.values() if t.surely <= 1], [t for t in best.values() if t.excess <= 1]):
        if within:
            # times differ by this much from one run to the next: then the simpler recipe
            most = max(t.gain for t in within)
            return min((t for t in within if t.gain > 0.95 * most), key=lambda t: (len(t.recipe), t.excess))
    return min(best.values(), key=lambda t: t.excess, default=None)


def front_of(trials: Sequence[Trial], chosen: Trial | None) -> tuple[Candidate, ...]:
    """Every trial, and whether it is among those that none beats."""

    def beaten(trial: Trial) -> bool:
        pairs = [list(zip(other.costs, trial.costs, strict=False)) for other in trials]
        return any(all(a <= b for a, b in pair) and any(a < b for a, b in pair) for pair in pairs)

    listed = [Candidate("original", 1, 1, 1, True, chosen=chosen is None)]
    for trial in trials:
        name = title(at(trial.recipe, RUNGS[trial.rung]))
        figures = trial.smaller, trial.faster, trial.agreement, trial.excess <= 1
        listed.append(Candidate(name, *figures, trial == chosen, not beaten(trial), trial.returns))
    return tuple(listed)


def notes_on(trials: Sequence[Trial], chosen: Trial, dense: bool, failed: Sequence[str]) -> tuple[str, ...]:
    notes = [f"{len(trials)} models of {len({t.recipe for t in trials})} recipes were measured"]
    if dense:
        notes.append("leave it dense: nothing within the gate is both smaller and faster by more than it costs")
    elif chosen.excess > 1:
        notes.append(
            f"no recipe is within the gate; the nearest is {title(chosen.recipe)}; leave it dense, or widen it"
        )
    else:
        notes.append(f"chosen: {title(at(chosen.recipe, RUNGS[chosen.rung]))}")
    return (*notes, *(f"not tried: {reason}" for reason in failed))
