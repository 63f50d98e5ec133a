"""The training loop for reward models: MSE on rewards, Bradley-Terry on preferences, mixed precision where it pays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Loss = Literal["mse", "bradley-terry"]


def fit(
    model: nn.Module,
    data: Sequence[Tensor],
    loss: Loss = "mse",
    *,
    steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    amp: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train ``model`` in place with Adam and a cosine schedule; returns the loss of each step.

    data: tensors with a row per sample. "mse": the forward's inputs, then the rewards. "bradley-terry": the inputs of
    the preferred rows, then those of the rejected, in the same order. amp: torch.float16 (with gradient scaling) or
    torch.bfloat16 autocast.
    """
    inputs = _check(data, loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"fit: {type(model).__name__} has no parameters to train")
    device = parameters[0].device
    rows = len(data[0])
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.train()
    losses = []
    columns = (TextColumn("fit"), BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("fit", total=steps, loss="")
        for step in range(steps):
            pick = torch.randint(rows, (min(batch_size, rows),), generator=generator)
            batch = [t[pick].to(device) for t in data]
            with torch.autocast(device.type, amp) if amp else nullcontext():
                if loss == "mse":
                    reward = model(*batch[:inputs])
                    if reward.shape != batch[inputs].shape:
                        raise ValueError(
                            f"fit: the model gives {tuple(reward.shape)}, the rewards are {tuple(batch[inputs].shape)}"
                        )
                    value = F.mse_loss(reward.float(), batch[inputs].float())
                else:
                    margin = model(*batch[:inputs]) - model(*batch[inputs:])
                    value = -F.logsigmoid(margin.float()).mean()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses.append(float(value.detach()))
            bar.advance(task)
            if step % 50 == 0 or step == steps - 1:
                bar.update(task, loss=f"loss {losses[-1]:.3g}")
    model.train(was_training)
    return losses


def _check(data: Sequence[Tensor], loss: str) -> int:
    """The number of inputs the model takes."""
    if loss not in ("mse", "bradley-terry"):
        raise ValueError(f"fit: loss is {loss!r}; it must be 'mse' or 'bradley-terry'")
    lengths = [len(t) for t in data]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(f"fit: the tensors have {lengths} rows; they must have the same number, 1 or more")
    if loss == "mse" and len(data) < 2:
        raise ValueError(f"fit: 'mse' takes the inputs and the rewards, got {len(data)} tensor")
    if loss == "bradley-terry" and len(data) % 2:
        raise ValueError(f"fit: 'bradley-terry' takes the inputs twice, got {len(data)} tensors")
    for position, tensor in enumerate(data):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"fit: tensor {position} of the data holds inf or NaN")
    return len(data) - 1 if loss == "mse" else len(data) // 2
