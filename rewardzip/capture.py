"""A model's forward as a CUDA graph, for any batch up to the one it was captured with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Replay = Callable[[], Any]


def capture(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> nn.Module:
    """The model behind the same call, its launches recorded once and replayed: one launch from Python, not one a layer.

    The first dimension of every input and output is the batch. A call copies its inputs into the graph's memory, runs
    the smallest recorded batch that holds them (powers of two up to the example's, each recorded at its first use), and
    copies the outputs out. Numbers refreshed in place are seen; gradients are not recorded. On a CPU there are no
    graphs: the model comes back as it is, with a warning.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or any(x.dim() == 0 or len(x) != len(inputs[0]) or len(x) == 0 for x in inputs):
        raise ValueError(f"capture: inputs of shapes {[tuple(x.shape) for x in inputs]}; the first sizes must agree")
    if not all(x.is_cuda for x in inputs):
        warnings.warn("capture: there are no CUDA graphs on a CPU, the model is returned as it is", stacklevel=2)
        return model
    return Captured(model, inputs)


class Captured(nn.Module):
    """A model and its recorded graphs, one per power of two of rows."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = [x.detach().clone() for x in inputs]
        self.graphs: dict[int, tuple[Replay, Any]] = {}

    def forward(self, *inputs: Tensor) -> Any:
        rows = len(inputs[0])
        self._check(inputs, rows)
        bucket = min(1 << (rows - 1).bit_length(), len(self.inputs[0]))
        for static, given in zip(self.inputs, inputs, strict=True):
            static[:rows].copy_(given)
        if bucket not in self.graphs:
            self.graphs[bucket] = record(self.model, [x[:bucket] for x in self.inputs])
        replay, outputs = self.graphs[bucket]
        replay()
        return _first_rows(outputs, rows)

    def _check(self, inputs: tuple[Tensor, ...], rows: int) -> None:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"captured model: {len(inputs)} inputs, but {len(self.inputs)} were captured")
        for i, (given, static) in enumerate(zip(inputs, self.inputs, strict=True)):
            if given.shape[1:] != static.shape[1:] or given.dtype != static.dtype or len(given) != rows:
                raise ValueError(
                    f"captured model: input {i} is {given.dtype} {tuple(given.shape)}, "
                    f"captured as {static.dtype} {tuple(static.shape)}"
                )
        if not 1 <= rows <= len(self.inputs[0]):
            raise ValueError(f"captured model: {rows} rows, captured with {len(self.inputs[0])}")


def record(model: Callable[..., Any], inputs: list[Tensor]) -> tuple[Replay, Any]:
    """(a function that runs the model on these very tensors again, the tensors its result appears in)."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(inputs[0].device)
    stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates, fills caches: nothing of that may be recorded
            model(*inputs)
    torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = model(*inputs)
    return graph.replay, outputs


def _first_rows(outputs: Any, rows: int) -> Any:
    if isinstance(outputs, Tensor):
        return outputs[:rows].clone()
    if isinstance(outputs, dict):
        return {name: _first_rows(value, rows) for name, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return type(outputs)(_first_rows(value, rows) for value in outputs)
    return outputs
