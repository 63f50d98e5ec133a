"""What a recipe is made of: steps with plain fields, which a JSON or TOML file can hold as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .data import Data

STEPS: dict[str, type[Step]] = {}


@dataclass
class Work:
    """What the steps of one recipe share."""

    original: nn.Module
    """The model as it came, in eval mode: the teacher, and what the result is judged by. Steps leave it alone."""
    data: Data | None = None
    """The rows to calibrate and to train on; those the result is judged by are not among them."""
    seed: int = 0
    progress: bool = True
    notes: list[str] = field(default_factory=list)
    """What a reader of the report should know: a step that did not pay, a layer left alone and why."""
    folder: Path | None = None
    """Where the trainings are kept, for a run that may be killed."""
    trainings: int = 0

    def checkpoint(self) -> Path | None:
        """Where ``fit`` keeps the next training: the same recipe has the same trainings in the same order."""
        self.trainings += 1
        return None if self.folder is None else self.folder / f"training-{self.trainings}"

    def needs_data(self, step: Step, rewards: bool = False) -> Data:
        name = type(step).__name__
        if self.data is None:
            raise ValueError(f"{name}: needs data, and compress was given none")
        if rewards and self.data.rewards is None and self.data.rejected is None:
            raise ValueError(f"{name}: needs rewards or preferences in the data, which has inputs alone")
        return self.data


class Step:
    """One technique: a frozen dataclass with plain fields. Subclasses register themselves by name.

    Steps work on dense layers in floats. What must hold while the model is trained further (a mask, a grid, a
    codebook) is a parametrisation of the layer's weight, see ``constraints.py``; at the end ``compress`` settles those
    and packs the layers for the kernels.
    """

    packs: ClassVar[bool] = False
    """Whether the step decides how the layers are packed at the end; nothing that changes weights freely may follow."""

    def __init_subclass__(cls) -> None:
        STEPS[cls.__name__] = cls

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Raise ValueError, before any step has run, where this one cannot work on the model or without the data."""

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        """The compressed model; ``model`` is the recipe's own copy and may be changed."""
        raise NotImplementedError

    def pack(self, model: nn.Module, work: Work) -> nn.Module:
        """Called once, after the last step: put the kept form of the layers in place of the trained one."""
        return model

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"step": type(self).__name__, **fields}


def check_numbers(step: Step, whole: tuple[str, ...] = (), real: tuple[str, ...] = ()) -> None:
    """That fields hold numbers, or None where that is their default, before they are compared with any."""
    for name in (*whole, *real):
        value = getattr(step, name)
        may = (int,) if name in whole else (int, float)
        if type(value) not in may and not (value is None and getattr(type(step), name) is None):
            kind = "whole number" if name in whole else "number"
            raise ValueError(f"{type(step).__name__}: {name} is {value!r}; it must be a {kind}")


def from_dict(fields: dict[str, Any]) -> Step:
    """The step that ``to_dict`` described."""
    fields = dict(fields)
    name = fields.pop("step", None)
    if name not in STEPS:
        raise ValueError(f"recipe: step {name!r} is not one of {', '.join(sorted(STEPS))}")
    make: Callable[..., Step] = STEPS[name]
    known = {f.name for f in dataclasses.fields(make)}  # type: ignore[arg-type]
    if unknown := set(fields) - known:
        raise ValueError(f"recipe: {name} has no field {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}")
    return make(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
