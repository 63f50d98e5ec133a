"""``Distil``: a smaller model that learns from the larger one's answers, and from the rewards where there are any."""

from __future__ import annotations

import copy
import importlib
import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .calibrate import run
from .data import Data
from .fidelity import pair_agreement
from .finetune import Blended, can_blend
from .fit import fit
from .models import MLP, RewardMLP
from .running import device_of
from .steps import Step, Work, check_numbers
from .teach import Form, check_form, distil, task_loss


@dataclass(frozen=True)
class Distil(Step):
    """Put a trained student in the model's place.

    student: hidden widths of an MLP with the model's inputs and outputs, or "package.module:function" that makes one.
    task: the share of the loss that is on the rewards in the data; 0 where it has none. hard: the teacher's choices
    (which of a pair, which output) and not its shades. features: pairs of layer names, the teacher's and the student's,
    whose outputs are matched through a linear map that is trained with them. seeds: how many students are trained, and
    as many again without the teacher; the one nearest to the model is kept, and the notes tell what the teacher gave.
    blend: as of ``FineTune``, for form="regression" with task=0 and no features.
    amp: "float16" (with gradient scaling) or "bfloat16".
    """

    student: tuple[int, ...] | str = (64, 64)
    form: Form = "regression"
    task: float = 0.5
    temperature: float = 1.0
    hard: bool = False
    features: tuple[tuple[str, str], ...] = ()
    steps: int = 2000
    learning_rate: float = 2e-3
    batch_size: int = 256
    seeds: int = 3
    blend: bool = False
    amp: Literal["float16", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        check_numbers(self, ("steps", "batch_size", "seeds"), ("task", "temperature", "learning_rate"))
        object.__setattr__(self, "features", tuple((teacher, student) for teacher, student in self.features))
        object.__setattr__(self, "student", tuple(self.student) if isinstance(self.student, list) else self.student)
        named = isinstance(self.student, str) and ":" in self.student
        if not named and not (isinstance(self.student, tuple) and all(type(w) is int and w > 0 for w in self.student)):
            raise ValueError(
                f"Distil: student is {self.student!r}; it must be widths like (64, 64), or 'package.module:function'"
            )
        if self.form not in ("regression", "pairwise", "softmax"):
            raise ValueError(f"Distil: form is {self.form!r}; it must be 'regression', 'pairwise' or 'softmax'")
        if not 0 <= self.task < 1 or not self.temperature > 0:
            raise ValueError(
                f"Distil: task={self.task} must be from 0 to below 1, temperature={self.temperature} above 0"
            )
        if self.form == "regression" and (self.hard or self.temperature != 1):
            raise ValueError(
                f"Distil: form='regression' compares numbers; hard={self.hard}, temperature={self.temperature} "
                "have a meaning for 'pairwise' and 'softmax' alone"
            )
        if self.blend and (self.form != "regression" or self.task or self.features):
            raise ValueError(
                f"Distil: blend is for form='regression' with task=0 and no features, not form={self.form!r}, "
                f"task={self.task}, features={self.features}: nobody knows the reward of a mixture of rows"
            )
        if self.amp not in (None, "float16", "bfloat16"):
            raise ValueError(f"Distil: amp is {self.amp!r}; it must be None, 'float16' or 'bfloat16'")
        if self.seeds < 3 or self.steps < 1:
            raise ValueError(f"Distil: seeds={self.seeds} must be 3 or more, steps={self.steps} 1 or more")

    def check(self, model: nn.Module, data: Data | None) -> None:
        rows = Work(model, data).needs_data(self)
        if len(rows) < 10:
            raise ValueError(f"Distil: {len(rows)} rows are too few to train on and to compare students by; give 10")
        if self.blend and not can_blend(rows):
            raise ValueError("Distil: blend mixes rows, and some inputs in the data are whole numbers")
        out = run(model, rows[:2])
        check_form(self.form, out)
        student = self.make(model, rows, 0)
        theirs = run(student, rows[:2])
        if theirs.shape != out.shape:
            raise ValueError(
                f"Distil: for 2 rows the student gives {tuple(theirs.shape)}, the model {tuple(out.shape)}"
            )
        for mine, its in self.features:
            for owner, name in ((model, mine), (student, its)):
                if name not in dict(owner.named_modules()):
                    raise ValueError(f"Distil: features name {name!r}, which {type(owner).__name__} does not have")

    def make(self, model: nn.Module, data: Data, seed: int) -> nn.Module:
        """A student that has learned nothing yet, where the model is."""
        out = None if isinstance(self.student, str) or isinstance(model, RewardMLP) else run(model, data[:2])
        # made on the CPU, where a seed gives the same student whatever the machine
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed)
            if isinstance(self.student, str):
                module, _, function = self.student.partition(":")
                try:
                    student: nn.Module = getattr(importlib.import_module(module), function)()
                except Exception as error:  # whatever the user's own code raises
                    raise ValueError(
                        f"Distil: no student can be made by {self.student!r}: {type(error).__name__}: {error}"
                    ) from error
            elif other := [t.dtype for t in data.inputs if t.dtype != torch.float32]:
                raise ValueError(
                    f"Distil: a student of widths takes float32, the data has {other[0]}; name one that takes it, "
                    "student='package.module:function'"
                )
            elif isinstance(model, RewardMLP):
                student = RewardMLP(model.state_dim, model.action_dim, self.student).float()
            else:
                sizes = [t[0].numel() for t in data.inputs]
                student = MLP(sizes, self.student, None if out is None or out.dim() == 1 else out.shape[1]).float()
        return student.to(device_of(model))

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        taught, alone = self.students(work)
        work.notes.append(_comparison(taught, alone))
        return nearest(taught)

    def students(self, work: Work) -> tuple[list[_Judged], list[_Judged]]:
        """(taught, from the same beginnings without the teacher): the latter where the data has rewards."""
        rows, judged = work.needs_data(self).split(0.2, work.seed)
        truth = rows.rewards is not None or rows.rejected is not None
        share = self.task if truth else 0.0
        taught: list[_Judged] = []
        alone: list[_Judged] = []
        for seed in range(work.seed, work.seed + self.seeds):
            student = self.make(work.original, rows, seed)
            twin = copy.deepcopy(student)
            amp = None if self.amp is None else getattr(torch, self.amp)
            options: dict[str, Any] = {"seed": seed, "progress": work.progress, "amp": amp}
            options |= {name: getattr(self, name) for name in ("steps", "learning_rate", "batch_size")}
            if self.blend:
                fit(student, rows, Blended(work.original), checkpoint=work.checkpoint(), **options)
            else:
                distil(
                    student,
                    work.original,
                    rows,
                    form=self.form,
                    task=share,
                    temperature=self.temperature,
                    hard=self.hard,
                    features=self.features,
                    checkpoint=work.checkpoint(),
                    **options,
                )
            taught.append(_judge(student, work.original, judged))
            if truth:
                fit(twin, rows, task_loss, checkpoint=work.checkpoint(), **options)
                alone.append(_judge(twin, work.original, judged))
        return taught, alone


@dataclass(frozen=True)
class _Judged:
    """A student, on rows it has not seen: agreement with the model, loss on the rewards."""

    agreement: float
    loss: float
    student: nn.Module


def nearest(students: list[_Judged]) -> nn.Module:
    return max(students, key=lambda s: s.agreement).student


def _judge(student: nn.Module, teacher: nn.Module, rows: Data) -> _Judged:
    mine, its = run(student, rows).float().cpu(), run(teacher, rows).float().cpu()
    if mine.dim() == 1 or mine.shape[-1] == 1:
        agreement = pair_agreement(its.flatten(), mine.flatten())
    else:
        agreement = float((mine.argmax(-1) == its.argmax(-1)).double().mean())
    if rows.rewards is None and rows.rejected is None:
        return _Judged(agreement, float("nan"), student)
    with torch.no_grad():
        return _Judged(agreement, float(task_loss(student, rows.to(device_of(student)))), student)


def _comparison(taught: list[_Judged], alone: list[_Judged]) -> str:
    """What the teacher gave: a difference counts where it is more than twice its standard error."""
    note = f"Distil: {len(taught)} seeds, on rows held back: agreement with the model "
    note += _spread([s.agreement for s in taught])
    if not alone:
        return f"{note}. The data has no rewards, so there is no student without the teacher to compare with"
    note += f", without the teacher {_spread([s.agreement for s in alone])}; loss on the rewards "
    note += f"{_spread([s.loss for s in taught])}, without the teacher {_spread([s.loss for s in alone])}. "
    nearer = _above([s.agreement for s in taught], [s.agreement for s in alone])
    truer = _above([-s.loss for s in taught], [-s.loss for s in alone])
    if not nearer and not truer:
        return note + "Distillation did not help: no gain is above twice its standard error"
    return note + f"Distillation helped with {' and '.join(nearer * ['agreement'] + truer * ['the rewards'])}"


def _spread(numbers: list[float]) -> str:
    return f"{statistics.mean(numbers):.4g} +- {statistics.stdev(numbers):.2g}"


def _above(some: list[float], others: list[float]) -> bool:
    error = ((statistics.variance(some) + statistics.variance(others)) / len(some)) ** 0.5
    return bool(statistics.mean(some) - statistics.mean(others) > 2 * error)
