"""The recipes a search tries when it is given none: each technique alone, and those that go well together."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from .data import Data
from .distil import Distil
from .finetune import FineTune, can_blend
from .low_rank import LowRank
from .prune import Prune
from .quantize import Quantize
from .steps import Step

Recipe = tuple[Step, ...]

INT8 = Quantize(8, activations="dynamic")


def candidates(model: nn.Module, data: Data) -> list[Recipe]:
    """Those whose steps say that they can work on the model and data; of its own widths, shares."""
    widths = [m.out_features for m in model.modules() if type(m) is nn.Linear][:-1]
    # first in floats, and long: a net trained on its grid from the start stays behind one that got there from near by
    train = FineTune(6000, learning_rate=2e-3, batch_size=512, blend=can_blend(data))
    tune = FineTune(2000, batch_size=512, blend=can_blend(data))
    recipes: list[Recipe] = [(Quantize(8),), (INT8,)]
    recipes += [(_few(bits), tune) for bits in (6, 4, 3)]
    recipes += [(Prune("2:4"), train, INT8)]
    recipes += [(_neurons(amount), train, INT8) for amount in (0.3, 0.5, 0.75, 0.875)]
    recipes += [(_neurons(amount), train, _few(5), tune) for amount in (0.15, 0.3, 0.4, 0.5)]
    recipes += [(LowRank(energy=energy), train, INT8) for energy in (0.99, 0.9)]
    students = [tuple(_eights(w / part) for w in widths) for part in (2, 4, 8)] if widths else []
    # one layer instead of several
    students += [(_eights(max(widths) / 2),)] if len(widths) > 1 else []
    distil = Distil(task=0.0, steps=5000, blend=can_blend(data))
    recipes += [(dataclasses.replace(distil, student=s), INT8) for s in dict.fromkeys(students)]
    return recipes


def _few(bits: int) -> Quantize:
    return Quantize(bits, activations="dynamic", ranges="mse")


def _neurons(amount: float) -> Prune:
    return Prune("neurons", amount, importance="second-order", scope="model")


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
