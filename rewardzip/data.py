"""Rows to learn from and to judge by, checked once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models import MLP, RewardMLP, input_widths


@dataclass(frozen=True)
class Data:
    """Inputs of a model, a row per sample in each tensor, and what is known of them.

    rewards: the truth for each row (a reward, or one row of values where a model has several outputs).
    rejected: the inputs of the rows that lost against ``inputs``, in the same order (preferences).

    Wherever data is asked for, a plain sequence of tensors will do: the forward's inputs, and the rewards behind them
    where there are any.
    """

    inputs: tuple[Tensor, ...]
    rewards: Tensor | None = None
    rejected: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        if self.rejected is not None:
            object.__setattr__(self, "rejected", tuple(self.rejected))
        if not self.inputs:
            raise ValueError("data: there are no inputs")
        if self.rejected is not None:
            shapes = [[tuple(t.shape) for t in side] for side in (self.inputs, self.rejected)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"data: the preferred inputs have the shapes {shapes[0]}, the rejected {shapes[1]}")
        rows = {name: len(tensor) for name, tensor in self._named()}
        if len(set(rows.values())) != 1 or not len(self):
            raise ValueError(f"data: every tensor must have the same number of rows, 1 or more; there are {rows}")
        for name, tensor in self._named():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                bad = (
                    int((~tensor.isfinite()).flatten(1).any(1).sum())
                    if tensor.dim() > 1
                    else int((~tensor.isfinite()).sum())
                )
                raise ValueError(f"data: {bad} of the {len(tensor)} rows of {name} hold inf or NaN")

    @classmethod
    def of(cls, model: nn.Module, data: Data | Sequence[Tensor] | Tensor) -> Data:
        """What was given, as ``Data``: the model's signature says which tensors are its inputs."""
        if isinstance(data, Data):
            _check_widths(model, data.inputs)
            return data
        tensors = (data,) if isinstance(data, Tensor) else tuple(data)
        if not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"data: takes tensors, got {[type(t).__name__ for t in tensors]}")
        fewest, most = _positional(model)
        all_inputs, rewards_last = (fewest <= count <= most for count in (len(tensors), len(tensors) - 1))
        if all_inputs and rewards_last and tensors[-1].shape[1:] in ((), (1,)):
            raise ValueError(
                f"data: the last of {len(tensors)} tensors is {tuple(tensors[-1].shape)}, which may be rewards or an "
                f"input that {type(model).__name__} can do without; say rz.Data(inputs, rewards) or rz.Data(inputs)"
            )
        if all_inputs or rewards_last:
            inputs = tensors if all_inputs else tensors[:-1]
            _check_widths(model, inputs)
            return cls(inputs, None if all_inputs else tensors[-1])
        takes = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise ValueError(
            f"data: {type(model).__name__} takes {takes} inputs, and rewards may follow; got {len(tensors)} tensors"
        )

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, rows: Any) -> Data:
        """Some of the rows: a slice, or a tensor of row numbers."""
        return self._map(lambda t: t[rows])

    def to(self, device: torch.device | str) -> Data:
        return self._map(lambda t: t.to(device))

    def split(self, share: float = 0.2, seed: int = 0) -> tuple[Data, Data]:
        """(the rest, ``share`` of the rows), drawn without order."""
        if not 0 < share < 1:
            raise ValueError(f"data: split takes a share between 0 and 1, got {share}")
        held = round(share * len(self))
        if held in (0, len(self)):
            raise ValueError(f"data: {len(self)} rows are too few to hold {share:.0%} back")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu")
        return self[order[held:]], self[order[:held]]

    def batches(self, size: int) -> Iterator[Data]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in self._named()]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for i, tensor in enumerate(self.inputs):
            yield f"input {i}", tensor
        if self.rewards is not None:
            yield "rewards", self.rewards
        for i, tensor in enumerate(self.rejected or ()):
            yield f"rejected input {i}", tensor

    def _map(self, change: Any) -> Data:
        # rows of what was checked need no check again: this is done for every batch
        made = object.__new__(Data)
        object.__setattr__(made, "inputs", tuple(map(change, self.inputs)))
        object.__setattr__(made, "rewards", None if self.rewards is None else change(self.rewards))
        object.__setattr__(made, "rejected", None if self.rejected is None else tuple(map(change, self.rejected)))
        return made


def _positional(model: nn.Module) -> tuple[int, float]:
    """The least and the largest number of inputs that ``model`` takes by position."""
    if isinstance(model, MLP):
        return len(model.inputs), len(model.inputs)
    kinds = inspect.Parameter
    parameters = list(inspect.signature(model.forward).parameters.values())
    places = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    fewest = sum(p.default is kinds.empty for p in places)
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        return max(fewest, 1), float("inf")
    return max(fewest, 1), len(places)


def _check_widths(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Of a model that joins its inputs, which any order of them fits."""
    for place, (width, tensor) in enumerate(zip(input_widths(model), inputs, strict=False)):
        found = tensor.shape[-1] if isinstance(model, RewardMLP) else tensor[:1].numel()
        if found != width:
            raise ValueError(
                f"data: input {place} has the shape {tuple(tensor.shape)}, "
                f"{type(model).__name__} takes {width} numbers a row there"
            )
