"""``FineTune``: train the compressed model, with what the steps before it decided held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import run
from .data import Data
from .fit import fit
from .running import answer
from .steps import Step, Work, check_numbers


@dataclass(frozen=True)
class FineTune(Step):
    """Masks, grids and codebooks are parametrisations of the weights: zeros stay zeros, gradients pass the rounding.

    towards: "original" learns the original's outputs and needs no rewards; "rewards" learns the rewards in the data, or
    the preferences where it has those. blend: half of each batch are rows that nobody collected, mixtures of two and
    inputs of different rows put together, and the original is asked for its answers: where the rows are few, training
    on them alone learns them by heart, and EPIC asks for rewards of transitions that never happened.
    amp: "float16" (gradients scaled) or "bfloat16". early_stop: see ``rz.fit``.
    """

    steps: int = 500
    learning_rate: float = 1e-3
    batch_size: int = 256
    towards: Literal["original", "rewards"] = "original"
    blend: bool = False
    amp: Literal["float16", "bfloat16"] | None = None
    early_stop: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, ("steps", "batch_size", "early_stop"), ("learning_rate",))
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"FineTune: steps={self.steps}, batch_size={self.batch_size}, learning_rate={self.learning_rate} "
                "must be above 0"
            )
        if self.towards not in ("original", "rewards"):
            raise ValueError(f"FineTune: towards is {self.towards!r}; it must be 'original' or 'rewards'")
        if self.blend and self.towards == "rewards":
            raise ValueError("FineTune: blend asks the original for its answers, towards='rewards' does not")
        if self.amp not in (None, "float16", "bfloat16"):
            raise ValueError(f"FineTune: amp is {self.amp!r}; it must be None, 'float16' or 'bfloat16'")

    def check(self, model: nn.Module, data: Data | None) -> None:
        rows = Work(model, data).needs_data(self, rewards=self.towards == "rewards")
        if self.blend and not can_blend(rows):
            raise ValueError("FineTune: blend mixes rows, and some inputs in the data are whole numbers")

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        data = work.needs_data(self, rewards=self.towards == "rewards")
        if self.towards == "original":
            data, loss = (data, Blended(work.original)) if self.blend else (with_targets(work.original, data), imitate)
        else:
            loss = "mse" if data.rewards is not None else "bradley-terry"  # type: ignore[assignment]
        with trainable(model):
            fit(
                model,
                data,
                loss,
                steps=self.steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                amp=None if self.amp is None else getattr(torch, self.amp),
                seed=work.seed,
                progress=work.progress,
                early_stop=self.early_stop,
                checkpoint=work.checkpoint(),
            )
        return model


def with_targets(teacher: nn.Module, data: Data) -> Data:
    """The same rows with the teacher's outputs as one input more, behind the others; rejected rows as well."""
    inputs = (*data.inputs, run(teacher, data).to(data.inputs[0].device))
    if data.rejected is None:
        return Data(inputs, data.rewards)
    lost = run(teacher, Data(data.rejected)).to(data.inputs[0].device)
    return Data(inputs, data.rewards, (*data.rejected, lost))


def imitate(model: nn.Module, batch: Data) -> Tensor:
    """The squared error against targets put there by ``with_targets``."""
    sides = [batch.inputs] if batch.rejected is None else [batch.inputs, batch.rejected]
    errors = [
        F.mse_loss(out.float(), side[-1].to(out.device).float())
        for side in sides
        for out in [answer(model, *side[:-1])]
    ]
    return torch.stack(errors).mean()


def can_blend(data: Data) -> bool:
    return all(t.is_floating_point() for t in (*data.inputs, *(data.rejected or ())))


class Blended:
    """The squared error against the original's answers, on rows half of which nobody collected: see ``blended``."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def __call__(self, model: nn.Module, batch: Data) -> Tensor:
        errors = []
        for side in [batch.inputs] if batch.rejected is None else [batch.inputs, batch.rejected]:
            mixed = blended(side)
            with torch.no_grad(), torch.autocast(mixed[0].device.type, enabled=False):
                wanted = answer(self.teacher, *mixed)
            out = answer(model, *mixed)
            errors.append(F.mse_loss(out.float(), wanted.to(out.device).float()))
        return torch.stack(errors).mean()


def blended(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Half of the rows as they are; a quarter put together anew, each input from another row; a quarter mixed, row i of
    n with the one before it, i/(n-1) of that. Batches are drawn in no order, so all shares and all pairs come up,
    without random numbers."""
    quarter, found = len(inputs[0]) // 4, []
    for place, rows in enumerate(inputs):
        anew, mixed, rest = rows[:quarter], rows[quarter : 2 * quarter], rows[2 * quarter :]
        share = torch.linspace(0, 1, quarter, dtype=rows.dtype, device=rows.device)
        mixed = mixed.lerp(mixed.roll(1, 0), share.view(-1, *[1] * (rows.dim() - 1)))
        found.append(torch.cat([anew.roll(place, 0), mixed, rest]))
    return found


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """What was frozen altogether is trained, then frozen again; where some of it is trainable, only that is."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    frozen = not any(p.requires_grad for p in parameters)
    for parameter in parameters if frozen else []:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters if frozen else []:
            parameter.requires_grad_(False)
