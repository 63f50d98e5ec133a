"""A model as a function of rows: run without gradients, in eval mode, where its tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def answer(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What the model gives for the inputs: a tensor, or the logits of an object that has some."""
    given = model(*inputs)
    found = getattr(given, "logits", given)
    if not isinstance(found, Tensor):
        raise TypeError(f"{type(model).__name__} gives {type(found).__name__}, not a tensor or an object with logits")
    return found


def outputs(model: nn.Module, inputs: Sequence[Tensor], batch: int = 4096) -> Tensor:
    """[rows, outputs] in float64 on the CPU."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), batch):
            try:
                result = model(*(t[start : start + batch] for t in inputs))
            except (RuntimeError, IndexError) as error:
                shapes = [tuple(t.shape) for t in inputs]
                raise ValueError(
                    f"{type(model).__name__} does not take inputs of the shapes {shapes}: {error}"
                ) from error
            result = getattr(result, "logits", result)
            if not isinstance(result, Tensor) or len(result) != len(inputs[0][start : start + batch]):
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(f"{type(model).__name__} must give a row for each row of its inputs, it gave {got}")
            parts.append(result.detach().double().cpu().reshape(len(result), -1))
    return torch.cat(parts)


def on_gpu(x: Tensor) -> bool:
    """Apart, so that a test without a GPU can go the way of one."""
    return x.is_cuda


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device
