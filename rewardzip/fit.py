"""The one training loop, for rewards, preferences, and whatever a loss of one's own says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import resume
from .data import Data
from .identity import code_hash, data_hash, model_hash
from .parallel import Team
from .running import answer

Loss = Literal["mse", "bradley-terry"] | Callable[[nn.Module, Data], Tensor]

HELD_OUT = 0.1
"""The share of the rows that early stopping judges by."""


def fit(
    model: nn.Module,
    data: Data | Sequence[Tensor],
    loss: Loss = "mse",
    *,
    steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    amp: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
    early_stop: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
) -> list[float]:
    """Train ``model`` in place with Adam and a cosine schedule; returns the loss of each step.

    data: ``Data``, or tensors with a row per sample. "mse": the forward's inputs, then the rewards. "bradley-terry":
    the inputs of the preferred rows, then those of the rejected, in the same order. loss: one of these names, or a
    function of the model and a batch (``Data``). amp: torch.float16 (with gradient scaling) or torch.bfloat16 autocast.
    early_stop: hold a tenth of the rows out, stop when the loss on them has not fallen for this many steps, and keep
    the weights that had the lowest. checkpoint: a folder; a run that was killed goes on from what it last wrote there,
    every ``checkpoint_every`` steps, and ends exactly as if it had not been.

    Under torchrun each process works on its share of every batch. The model stays on the device or devices it is on.
    """
    # a twentieth of what importing this package costs
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    rows = as_data(model, data, loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"fit: {type(model).__name__} has no parameters to train")
    if steps < 0 or batch_size < 1:
        raise ValueError(f"fit: steps={steps} must be 0 or more, batch_size={batch_size} 1 or more")
    if early_stop is not None and early_stop < 1:
        raise ValueError(f"fit: early_stop is {early_stop}; it is a number of steps, 1 or more")
    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "amp": str(amp),
        "seed": seed,
        "early_stop": early_stop,
        "loss": loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__),
        "loss_code": code_hash(loss),
        "parameters": [tuple(p.shape) for p in parameters],
    }
    if checkpoint is not None:
        settings |= {"data": data_hash(rows), "modules": model_hash(model, weights=False)}
    state = resume.read(Path(checkpoint), settings) if checkpoint is not None else None
    rows, held = rows.split(HELD_OUT, seed) if early_stop else (rows, None)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    autocast = torch.autocast(device.type, amp) if amp else nullcontext()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    losses: list[float] = []
    best: dict[str, Any] = {"loss": float("inf"), "step": 0, "weights": {}}
    flags = {module: module.training for module in model.modules()}
    team = Team(device)
    try:
        size = min(batch_size, len(rows)) // team.size * team.size
        if size == 0:
            raise ValueError(
                f"fit: {min(batch_size, len(rows))} rows a batch cannot be shared by {team.size} processes"
            )
        if state is not None and len(state["generators"]) != team.size:
            was = len(state["generators"])
            raise ValueError(f"fit: the run in {checkpoint} was shared by {was} processes, this one by {team.size}")
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])  # type: ignore[attr-defined]
            losses, best = state["losses"], state["best"]
            generator.set_state(state["generator"])
            resume.set_generator_states(device, state["generators"][team.rank])
        model.train()
        objective = team.wrap(_Objective(model, loss))
        columns = (TextColumn("fit"), BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.fields[loss]}"))
        with Progress(*columns, TimeRemainingColumn(), disable=not progress or team.rank > 0) as bar:
            task = bar.add_task("fit", total=steps, loss="", completed=len(losses))
            for step in range(len(losses), steps):
                if early_stop and step - best["step"] >= early_stop:
                    break
                pick = torch.randint(len(rows), (size,), generator=generator, device="cpu")
                with autocast:
                    cost = objective(rows[team.share(pick)].to(device))
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(cost).backward()
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() >= scale:  # else the gradients overflowed and no step was taken
                    schedule.step()
                losses.append(team.mean(cost.detach()))
                if held is not None and early_stop and (step + 1) % max(1, early_stop // 10) == 0:
                    now = team.mean(_judge(model, loss, held, device, autocast))
                    if now < best["loss"]:
                        weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
                        best = {"loss": now, "step": step + 1, "weights": weights}
                if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                    generators = team.gather(resume.generator_states(device))
                    if team.rank == 0:
                        kept = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
                        kept |= {"settings": settings, "losses": losses, "best": best}
                        kept |= {"generator": generator.get_state(), "generators": generators}
                        resume.write(Path(checkpoint), kept)
                    team.wait()
                bar.advance(task)
                if step % 50 == 0 or step == steps - 1:
                    bar.update(task, loss=f"loss {losses[-1]:.3g}")
        if best["weights"]:
            model.load_state_dict(best["weights"])
    finally:
        for module, training in flags.items():
            module.training = training
    return losses


class _Objective(nn.Module):
    """The loss as a module, so that what trains in parallel sees one forward a step, whatever the loss calls."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Data) -> Tensor:
        return value(self.model, batch, self.loss)


def value(model: nn.Module, batch: Data, loss: Loss) -> Tensor:
    """The loss of a batch that lies where the model takes its inputs."""
    if callable(loss):
        return loss(model, batch)
    if loss == "bradley-terry":
        assert batch.rejected is not None
        margin = answer(model, *batch.inputs) - answer(model, *batch.rejected)
        return -F.logsigmoid(margin.float()).mean()
    assert batch.rewards is not None
    reward = answer(model, *batch.inputs)
    wanted = as_wide(batch.rewards, reward)
    if reward.shape != wanted.shape:
        raise ValueError(f"fit: the model gives {tuple(reward.shape)}, the rewards are {tuple(wanted.shape)}")
    # a model spread over devices answers from the last
    return F.mse_loss(reward.float(), wanted.to(reward.device).float())


def as_wide(rewards: Tensor, out: Tensor) -> Tensor:
    """One reward a row, [rows] or [rows, 1], in the shape of a model's one output."""
    return rewards.reshape(out.shape) if rewards.numel() == out.numel() == len(out) else rewards


@torch.no_grad()
def _judge(model: nn.Module, loss: Loss, held: Data, device: torch.device, autocast: Any) -> Tensor:
    model.eval()
    with autocast:
        parts = [value(model, batch.to(device), loss) * len(batch) for batch in held.batches(4096)]
    model.train()
    return torch.stack([part.double() for part in parts]).sum() / len(held)


def as_data(model: nn.Module, data: Data | Sequence[Tensor], loss: Loss) -> Data:
    """The rows, found to be what the loss needs."""
    if not callable(loss) and loss not in ("mse", "bradley-terry"):
        raise ValueError(f"fit: loss is {loss!r}; it must be 'mse' or 'bradley-terry', or a function")
    if not isinstance(data, Data) and not all(isinstance(part, Tensor) for part in data):
        raise TypeError(
            f"fit: data takes tensors, got {[type(part).__name__ for part in data]}; the inputs and then the "
            "rewards, or for 'bradley-terry' the inputs of the preferred rows, then those of the rejected, in one row: "
            "(state, action, lost_state, lost_action)"
        )
    if not isinstance(data, Data) and not callable(loss):
        if loss == "mse" and len(data) < 2:
            raise ValueError(f"fit: 'mse' takes the inputs and the rewards, got {len(data)} tensor")
        if loss == "bradley-terry" and (len(data) % 2 or not data):
            raise ValueError(f"fit: 'bradley-terry' takes the inputs twice, got {len(data)} tensors")
        half = len(data) // 2
        data = Data(tuple(data[:-1]), data[-1]) if loss == "mse" else Data(tuple(data[:half]), None, tuple(data[half:]))
    data = Data.of(model, data)
    if loss == "mse" and data.rewards is None:
        raise ValueError("fit: 'mse' needs rewards in the data")
    if loss == "bradley-terry" and data.rejected is None:
        raise ValueError("fit: 'bradley-terry' needs rejected inputs in the data")
    return data
