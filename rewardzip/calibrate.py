"""What reaches each layer while a model runs on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .data import Data
from .moments import check_rows
from .running import answer, device_of, eval_mode

ROWS = 2048
"""Enough to see the range and the correlations of a layer's inputs, few enough to hold them for every layer."""


@torch.no_grad()
def run(model: nn.Module, data: Data, size: int = 8192) -> Tensor:
    """The model's outputs for all rows, in eval mode, where the model is."""
    device = device_of(model)
    with eval_mode(model):
        return torch.cat([answer(model, *batch.to(device).inputs) for batch in data.batches(size)])


def check_enough(model: nn.Module, layers: dict[str, nn.Linear], data: Data, what: str) -> None:
    """That the rows say how a layer's inputs go together: one for each input, as many as are looked at."""
    check_rows(model, {name: min(layer.in_features, ROWS) for name, layer in layers.items()}, data, what)


def layer_inputs(model: nn.Module, names: Iterable[str], data: Data) -> dict[str, Tensor]:
    """The rows [R, K], in float32, that each layer sees for the first rows of the data, in running order."""
    return _watch(model, names, data, lambda inputs, output: inputs[0])


def layer_outputs(model: nn.Module, names: Iterable[str], data: Data) -> dict[str, Tensor]:
    """As ``layer_inputs``: what each layer gives."""
    return _watch(model, names, data, lambda inputs, output: output)


def _watch(model: nn.Module, names: Iterable[str], data: Data, pick: Callable[[Any, Any], Tensor]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            rows = pick(inputs, output).detach().float()
            seen.setdefault(name, []).append(rows.reshape(-1, rows.shape[-1]))

        return note

    names = list(names)
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        run(model, data[:ROWS])
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [name for name in names if name not in seen]
    if unseen:
        raise ValueError(f"calibration: the data never reaches layer {unseen[0]!r}; skip it")
    return {name: torch.cat(rows) for name, rows in seen.items()}
