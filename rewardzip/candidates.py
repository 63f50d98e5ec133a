"""The recipes a search tries when it is given none: each technique alone, and those that go well together."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from .data import Data
from .distil import Distil
from .finetune import FineTune
from .low_rank import LowRank
from .prune import Prune
from .quantize import Quantize
from .steps import Step

Recipe = tuple[Step, ...]

INT8 = Quantize(8, activations="dynamic")
TRAIN = FineTune(steps=2000)


def candidates(model: nn.Module, data: Data) -> list[Recipe]:
    """Those whose steps say that they can work on the model and data; of its own widths, shares."""
    widths = [m.out_features for m in model.modules() if type(m) is nn.Linear][:-1]
    recipes: list[Recipe] = [(Quantize(8),), (INT8,)]
    recipes += [(_few(bits), TRAIN) for bits in (6, 4, 3)]
    recipes += [(Prune("2:4"), TRAIN, INT8)]
    recipes += [(_neurons(amount), TRAIN, INT8) for amount in (0.25, 0.5, 0.75, 0.875)]
    recipes += [(_neurons(amount), _few(4), TRAIN) for amount in (0.25, 0.5)]
    recipes += [(LowRank(energy=energy), TRAIN, INT8) for energy in (0.99, 0.9)]
    students = [tuple(_eights(w / part) for w in widths) for part in (2, 3, 4, 8)] if widths else []
    # one layer instead of several
    students += [(_eights(max(widths) / 2),)] if len(widths) > 1 else []
    recipes += [(Distil(student=s, task=0.0, steps=4000), INT8) for s in dict.fromkeys(students)]
    return recipes


def _few(bits: int) -> Quantize:
    return Quantize(bits, activations="dynamic")


def _neurons(amount: float) -> Prune:
    return Prune("neurons", amount, importance="second-order")


def _eights(width: float) -> int:
    return max(8, round(width / 8) * 8)


def at(recipe: Recipe, share: float) -> Recipe:
    """The recipe with a share of its training, a step of it at least."""

    def less(step: Any) -> Step:
        training = [f for f in ("steps", "finetune_steps") if getattr(step, f, 0)]
        scaled: Step = dataclasses.replace(step, **{f: max(1, round(share * getattr(step, f))) for f in training})
        return scaled

    return tuple(map(less, recipe))


def title(recipe: Recipe) -> str:
    """The steps in a line, with the settings that are not the usual ones."""
    if not recipe:
        return "the model as it is"
    named = []
    for step in recipe:
        settings: Any = dataclasses.fields(step)  # type: ignore[arg-type]
        said = [
            repr(value) if f.default is dataclasses.MISSING else f"{f.name}={value!r}"
            for f in settings
            if (value := getattr(step, f.name)) != f.default
        ]
        named.append(f"{type(step).__name__}({', '.join(said)})")
    return " + ".join(named)
