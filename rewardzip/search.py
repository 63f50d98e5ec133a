"""``search``: the recipe to take, measured on the user's own model, rows and machine.

The recipes to try are few and each has a meaning, so they are listed (``candidates.py``) and not sampled; what is worth
economy is training. So: all of them first, hardly trained; then the better half after some training; then half of those
after all of it (successive halving). "Better" is what is gained, and how near to the gate. An optimiser such as optuna
would add a dependency to model a space of some twenty points, and its pruners do not take several objectives.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import at, candidates, title
from .data import Data
from .epic import Transitions, reward_of
from .evaluate import Returns, check_original, evaluate, worst
from .fidelity import LEAST_ROWS, Figure, compare
from .footprint import size
from .gate import Gate
from .identity import code_hash, data_hash, model_hash
from .journal import Journal
from .progress import shown
from .recipe import run_steps
from .report import Candidate, Report
from .running import device_of, eval_mode, outputs
from .steps import Step
from .timing import interleaved
from .trials import RUNGS, Trial, choose, front_of, notes_on, promise, trial_of

HELD_OUT = 0.3
"""The share of the rows that nothing is trained on: half of it chooses, half makes the report."""
SECONDS = 0.4
"""What timing a candidate takes."""

Recipe = tuple[Step, ...]


@dataclass(frozen=True)
class Found:
    """The answer of a search. An empty recipe says: leave it dense."""

    model: nn.Module
    recipe: Recipe
    report: Report
    passed: bool
    """Whether the model is within the gate, on rows that had no part in choosing it."""

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates that no other beats in size, time and fidelity at once."""
        return tuple(candidate for candidate in self.report.front if candidate.on_front)


def search(
    model: nn.Module,
    data: Data | Sequence[Tensor] | Tensor,
    *,
    gate: Gate | None = None,
    budget: float = 600,
    recipes: Sequence[Sequence[Step]] | None = None,
    batch: int = 1024,
    next_states: Tensor | None = None,
    discount: float = 0.99,
    returns: Returns | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """The recipe within the gate whose model is the smallest and fastest: times smaller x times faster, at ``batch``.

    budget: seconds, with those that a killed search had spent in ``folder``, which keeps what was measured.
    recipes: what to try; by default what suits the model. next_states, discount: for EPIC, see ``evaluate``. returns:
    see there; asked of those fully trained, and one objective more. Where nothing is within the gate, the one nearest
    to it is returned, not ``passed``; where nothing within it is smaller and faster, the model as it is.
    """
    gate = gate or Gate()
    data = Data.of(model, data)
    if not budget > 0:
        raise ValueError(f"search: budget is {budget} seconds; it must be above 0")
    needed = int(LEAST_ROWS / HELD_OUT * 2) + 1
    if len(data) < needed:
        raise ValueError(f"search: {len(data)} rows are too few to train, to choose and to judge by; give {needed}")
    rows, held = data.split(HELD_OUT, seed)
    chooses, judges = held.split(0.5, seed)
    next_chooses, next_judges = _beside(next_states, data, seed)
    if flat := tuple(recipe for recipe in recipes or () if isinstance(recipe, Step))[:1]:
        raise TypeError(f"search: {title(flat)} is a step; recipes are sequences of them, [[{title(flat)}], ...]")
    check_original(model, judges, next_judges)
    tried = tuple(tuple(recipe) for recipe in (candidates(model, rows) if recipes is None else recipes))
    if not tried:
        raise ValueError("search: there are no recipes to try")
    subject = {"model": model_hash(model), "data": data_hash(data, [next_states])} if folder else {}
    journal = Journal(folder, {**subject, "seed": seed, "batch": batch, "discount": discount})
    bench = _Bench(model, rows, chooses, gate, batch, returns, seed, next_chooses, discount)
    with shown("search", budget, progress) as show:
        trials = _halving(bench, tried, journal, budget, show)
        show("judging the choice", budget)
        chosen = choose(trials)
        if chosen is None:
            raise ValueError(f"search: none of the {len(tried)} recipes works on the model: {bench.failed[0]}")
        dense = chosen.excess <= 1 and chosen.gain <= 1
        recipe = () if dense else at(chosen.recipe, RUNGS[chosen.rung])
        # a resumed search has the numbers of what it chose, not the model: the same steps and seed make it again
        small = bench.built.get((chosen.recipe, chosen.rung)) or bench.build(recipe)
        small = model if dense else small
        report = evaluate(
            model,
            small,
            judges,
            gate=gate,
            batches=(1, batch),
            next_states=next_judges,
            discount=discount,
            returns=returns,
            seconds=3 * SECONDS,
            seed=seed,
            progress=False,
        )
    front = front_of(trials, None if dense else chosen)
    notes = *notes_on(trials, chosen, dense, bench.failed), *report.notes
    report = replace(report, front=front, notes=notes)
    return Found(small, recipe, report, report.passed and chosen.excess <= 1)


def _beside(next_states: Tensor | None, data: Data, seed: int) -> tuple[Tensor | None, Tensor | None]:
    """The next states of the rows that choose and of those that judge."""
    if next_states is None:
        return None, None
    if len(next_states) != len(data):
        raise ValueError(f"search: there are {len(next_states)} next states for {len(data)} rows")
    chooses, judges = Data((next_states,)).split(HELD_OUT, seed)[1].split(0.5, seed)
    return chooses.inputs[0], judges.inputs[0]


class _Bench:
    """Builds recipes and measures what comes out, always in the same way."""

    def __init__(
        self,
        model: nn.Module,
        rows: Data,
        judged: Data,
        gate: Gate,
        batch: int,
        returns: Returns | None,
        seed: int,
        next_states: Tensor | None,
        discount: float,
    ) -> None:
        self.model, self.rows, self.gate, self.returns, self.seed = model, rows, gate, returns, seed
        device = device_of(model)
        self.inputs = tuple(t.to(device) for t in judged.inputs)
        part = torch.arange(batch, device="cpu") % len(judged)
        self.timed = tuple(t[part.to(device)] for t in self.inputs)
        with eval_mode(model):
            self.before = outputs(model, self.inputs)
            one = self.before.shape[1] == 1
            self.epic = Transitions.of(self.inputs, next_states, discount=discount, seed=seed) if one else None
            self.canonical = None if self.epic is None else self.epic.canonical(reward_of(model, len(self.inputs)))
        self.disk = size(model).disk
        self.built: dict[tuple[Recipe, int], nn.Module] = {}
        self.failed: list[str] = []

    def build(self, recipe: Recipe) -> nn.Module:
        return run_steps(self.model, recipe, self.rows, seed=self.seed, progress=False)[0]

    def __call__(self, recipe: Recipe, rung: int) -> dict[str, Any]:
        start = time.perf_counter()
        small = self.build(at(recipe, RUNGS[rung]))
        self.built[recipe, rung] = small
        with eval_mode(self.model, small), torch.no_grad():
            figures = self.figures(small)
            calls = {"before": lambda: self.model(*self.timed), "after": lambda: small(*self.timed)}
            taken = interleaved(calls, device_of(small), SECONDS)
        played = None
        if self.returns and at(recipe, RUNGS[rung]) == recipe:
            played = float(torch.as_tensor(self.returns(small), dtype=torch.float64, device="cpu").mean())
        return {
            "smaller": self.disk / size(small).disk,
            # others on the machine slow calls and never speed them: the tenth percentile is the least disturbed
            "faster": taken["before"].p10 / taken["after"].p10,
            "agreement": figures["agreement"].value if figures else 0.0,
            "figures": {name: [f.value, f.low, f.high] for name, f in figures.items()},
            "returns": played,
            "spent": time.perf_counter() - start,
        }

    def figures(self, small: nn.Module) -> dict[str, Figure]:
        """Empty where the model is broken: NaN, or one value for all rows."""
        after = outputs(small, self.inputs)
        if not after.isfinite().all() or any(column.min() == column.max() for column in after.T):
            return {}
        figures = worst([compare(x, y, draws=100) for x, y in zip(self.before.T, after.T, strict=True)])
        if after.shape[1] > 1:
            figures["greedy"] = Figure.mean((self.before.argmax(1) == after.argmax(1)).double())
        if self.epic is not None and self.canonical is not None:
            canonical = self.epic.canonical(reward_of(small, len(self.inputs)))
            figures["epic"] = self.epic.distance(self.canonical, canonical, draws=100)
        return figures


def _halving(
    bench: _Bench, tried: Sequence[Recipe], journal: Journal, budget: float, show: Callable[[str, float], None]
) -> list[Trial]:
    """Every trial there was time for, those of earlier runs included."""
    start, before = time.perf_counter(), sum(entry["spent"] for entry in journal.entries.values())
    trials: list[Trial] = []
    running = list(tried)
    for rung in range(len(RUNGS)):
        done: list[Trial] = []
        for recipe in running:
            steps = at(recipe, RUNGS[rung])
            key = f"{rung} {json.dumps([step.to_dict() for step in steps])}"
            if bench.returns and steps == recipe:
                # what was measured without them, or by another function, is measured again
                key += f" {code_hash(bench.returns)}"
            known = [t for t in trials if at(t.recipe, RUNGS[t.rung]) == steps]
            if known:  # nothing in it is trained
                done += known[:1]
                continue
            spent = before + time.perf_counter() - start
            if key not in journal.entries:
                # the final report takes its time as well, and the first round is always run
                if spent + _expected(recipe, rung, trials) > budget - min(30, budget / 4) and trials:
                    continue
                show(f"round {rung + 1}, {len(done) + 1}/{len(running)}: {title(steps)}", spent)
                try:
                    measured = bench(recipe, rung)
                except Exception as error:  # whatever the model's own code raises: the other recipes go on
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    bench.failed.append(f"{title(recipe)}: {kind}{error}")
                    continue
                journal.add(key, measured)
            done.append(trial_of(recipe, rung, journal.entries[key], bench.gate))
            trials += done[-1:]
        running = [t.recipe for t in sorted(done, key=promise, reverse=True)][: max(3, (len(done) + 1) // 2)]
    return trials


def _expected(recipe: Recipe, rung: int, trials: Sequence[Trial]) -> float:
    """Seconds that a trial will take, from what the same recipe took with less training."""
    earlier = [t for t in trials if t.recipe == recipe]
    if not earlier:
        return max((t.spent for t in trials), default=0.0)
    return earlier[-1].spent * RUNGS[rung] / RUNGS[earlier[-1].rung]
