"""Learning from a teacher's answers.

loss = task * (loss on the rewards) + (1 - task) * (divergence from the teacher)

regression   (s - t)^2
pairwise     cross entropy of sigmoid((s_i - s_j) / T) against sigmoid((t_i - t_j) / T), times T^2, over the pairs
             of a batch; T counts in standard deviations of the teacher's rewards
softmax      KL(softmax(t / T) || softmax(s / T)) * T^2, for models with several outputs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import layer_outputs, run
from .data import Data
from .fit import as_wide, fit
from .running import answer, device_of

Form = Literal["regression", "pairwise", "softmax"]


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    teacher_data: Data | None = None,
    form: Form = "regression",
    task: float = 0.5,
    temperature: float = 1.0,
    hard: bool = False,
    features: tuple[tuple[str, str], ...] = (),
    **options: Any,
) -> list[float]:
    """Train ``student`` in place; returns the loss of each step. ``options`` are those of ``rz.fit``.

    teacher_data: the same rows as the teacher sees them, where that is not how the student does (an image for a conv
    net, the state for its student).
    """
    seen = data if teacher_data is None else teacher_data
    if len(seen) != len(data):
        raise ValueError(f"distil: the teacher has {len(seen)} rows, the student {len(data)}")
    if features and data.rejected is not None:
        raise ValueError("distil: features are matched on rewards or inputs alone, and the data has preferences")
    if task and data.rewards is None and data.rejected is None:
        raise ValueError(f"distil: task={task} needs rewards or preferences in the data, which has inputs alone")
    device = data.inputs[0].device
    targets = run(teacher, seen).float().to(device)
    check_form(form, targets)
    lost = None
    if data.rejected is not None:
        assert seen.rejected is not None
        lost = (*data.rejected, run(teacher, Data(seen.rejected)).float().to(device))
    hints = _all_outputs(teacher, [name for name, _ in features], seen)
    rows = Data((*data.inputs, targets, *hints), data.rewards, None if lost is None else (*lost, *hints))
    loss = _Loss(len(data.inputs), form, task, temperature, hard, float(targets.std().clamp(min=1e-12)))
    both = _Both(student, [name for _, name in features], data, [hint.shape[1] for hint in hints])
    try:
        return fit(both, rows, loss, **options)
    finally:
        both.unhook()


@dataclass(frozen=True)
class _Loss:
    inputs: int
    form: Form
    task: float
    temperature: float
    hard: bool
    spread: float

    def __call__(self, both: Any, batch: Data) -> Tensor:
        own = Data(batch.inputs[: self.inputs], batch.rewards)
        targets, out = batch.inputs[self.inputs], both(*own.inputs)
        total = torch.zeros((), dtype=torch.float32, device=out.device)
        for project, hint, name in zip(both.maps, batch.inputs[self.inputs + 1 :], both.names, strict=True):
            hint = (hint - hint.mean(0)) / (hint.std(0) + 1e-6)
            total = total + F.mse_loss(project(both.seen[name].flatten(1)).float(), hint)
        task = torch.zeros((), dtype=torch.float32, device=out.device)
        if batch.rejected is not None:
            lost = both(*batch.rejected[: self.inputs])
            task = -F.logsigmoid((out - lost).float()).mean()
            out, targets = torch.cat([out, lost]), torch.cat([targets, batch.rejected[self.inputs]])
        elif self.task:
            task = _task(out, own)
        total = total + self.divergence(out.float(), targets.to(out.device))
        return self.task * task + (1 - self.task) * total

    def divergence(self, out: Tensor, targets: Tensor) -> Tensor:
        if self.form == "regression":
            return F.mse_loss(out, targets)
        t = self.temperature
        if self.form == "softmax":
            if self.hard:
                return F.cross_entropy(out / t, targets.argmax(-1))
            wanted = F.log_softmax(targets / t, -1)
            return F.kl_div(F.log_softmax(out / t, -1), wanted, reduction="batchmean", log_target=True) * t**2
        t *= self.spread
        out, targets = out.flatten(), targets.flatten()
        margin, theirs = (out[:, None] - out) / t, (targets[:, None] - targets) / t
        wanted = (theirs.sign() + 1) / 2 if self.hard else theirs.sigmoid()
        return F.binary_cross_entropy_with_logits(margin, wanted) * self.temperature**2


class _Both(nn.Module):
    """A student and the maps from its layers to the teacher's, trained together."""

    def __init__(self, student: nn.Module, names: list[str], data: Data, widths: list[int]) -> None:
        super().__init__()
        self.student, self.names = student, names
        self.seen: dict[str, Tensor] = {}
        self.hooks = [student.get_submodule(n).register_forward_hook(self._note(n)) for n in names]
        first = data[:1].to(device_of(student)).inputs
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            if names:
                student(*first)
            mine = [self.seen[name].flatten(1).shape[1] for name in names]
            self.maps = nn.ModuleList(
                nn.Linear(*sizes, device="cpu", dtype=torch.float32) for sizes in zip(mine, widths, strict=True)
            ).to(first[0].device)

    def _note(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen[name] = output

        return note

    def forward(self, *inputs: Tensor) -> Tensor:
        return answer(self.student, *inputs)

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _all_outputs(teacher: nn.Module, names: list[str], data: Data) -> list[Tensor]:
    """What layers of the teacher give, for every row, as matrices."""
    if not names:
        return []
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in data.batches(2048):
        for name, rows in layer_outputs(teacher, names, batch).items():
            parts[name].append(rows.reshape(len(batch), -1).to(data.inputs[0].device))
    return [torch.cat(parts[name]) for name in names]


def task_loss(model: nn.Module, batch: Data) -> Tensor:
    """What the student is trained on without a teacher."""
    if batch.rejected is not None:
        return -F.logsigmoid((answer(model, *batch.inputs) - answer(model, *batch.rejected)).float()).mean()
    return _task(answer(model, *batch.inputs), batch)


def _task(out: Tensor, batch: Data) -> Tensor:
    """Squared error on rewards; cross entropy where they are whole numbers that name one of several outputs."""
    assert batch.rewards is not None
    if not batch.rewards.is_floating_point() and out.dim() == 2:
        return F.cross_entropy(out.float(), batch.rewards.to(out.device).long())
    wanted = as_wide(batch.rewards, out)
    if out.shape != wanted.shape:
        raise ValueError(f"distil: the student gives {tuple(out.shape)}, the rewards are {tuple(batch.rewards.shape)}")
    return F.mse_loss(out.float(), wanted.to(out.device).float())


def check_form(form: Form, out: Tensor) -> None:
    one = out.dim() == 1 or out.shape[-1] == 1
    if form == "softmax" and one:
        raise ValueError(
            "Distil: form='softmax' over one output is 1 whatever the model says; use 'regression' or 'pairwise'"
        )
    if form == "pairwise" and not one:
        raise ValueError(f"Distil: form='pairwise' compares scalar rewards, the model gives {out.shape[-1]} outputs")
