"""What calibration rows say of the inputs of linear layers, and the weights that make up best for what was removed.

A layer is fitted to give what it gave before, from the inputs it gets now: least squares over the rows, its bias along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .constraints import masks
from .data import Data
from .nn.base import is_conv1d

BATCH = 1024

# added to the diagonal of the moments, as a share of its mean: columns that hardly vary must not get huge weights
DAMPING = 1e-2


@dataclass(frozen=True)
class Moments:
    """Of the inputs x [rows, K] of a layer: how many rows, their mean [K], and their products x^T x / rows [K, K].

    steepness: [N], the mean square of the model's derivative by each output of the layer before its activation, times
    the number of the model's outputs; ones where it was not asked for, or the model returns no tensor.
    """

    rows: int
    mean: Tensor
    second: Tensor
    steepness: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean.outer(self.mean)


def dense(layer: Any) -> Tensor:
    """The layer's weight as [outputs, inputs], in float64: sums over many rows are compared."""
    weight: Tensor = layer.weight.detach().double()
    return weight.t() if is_conv1d(layer) else weight


def sizes(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    first, second = layer.weight.shape
    return (second, first) if is_conv1d(layer) else (first, second)


@torch.no_grad()
def assign(layer: Any, weight: Tensor | None, bias: Tensor | None = None) -> None:
    """Set a layer's weight [outputs, inputs] and bias through whatever holds them; a bias is made where there is none.

    Written into the parameters there are: what shares them, or trains them, keeps them.
    """
    if weight is not None:
        _set(layer, "weight", weight.t() if is_conv1d(layer) else weight)
    if bias is not None and layer.bias is not None:
        _set(layer, "bias", bias)
    elif bias is not None and bool(bias.any()):
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)


def _set(layer: Any, name: str, value: Tensor) -> None:
    held = getattr(layer, name)
    if name in layer._parameters:
        held.copy_(value)
    else:
        setattr(layer, name, value.to(held))


def moments(model: nn.Module, layers: Iterable[str], data: Data, steepness: bool = False) -> dict[str, Moments]:
    """The moments of each layer's inputs, in the order in which the layers run."""
    sums: dict[str, list[Any]] = {}
    names = list(layers)
    with _inputs(model, names) as seen, _slopes(model, names if steepness else ()) as slopes:
        for outputs in _runs(model, data, gradients=steepness):
            found = slopes(outputs)
            for name, calls in seen().items():
                x = torch.cat(calls).double()
                ones = x.new_ones(sizes(model.get_submodule(name))[0]) * len(x)
                new = [len(x), x.sum(0), x.T @ x, found.get(name, ones)]
                sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
    return {name: Moments(rows, *(s / rows for s in others)) for name, (rows, *others) in sums.items()}


def check_rows(model: nn.Module, needed: dict[str, int], data: Data, what: str) -> None:
    """That each layer sees as many rows as it needs, judged by one row of the data."""
    with _inputs(model, needed) as seen:
        next(_runs(model, data[:1]))
        calls = {name: sum(map(len, given)) for name, given in seen().items()}
    for name, rows in needed.items():
        if name not in calls:
            raise ValueError(f"{what}: the data never reaches layer {name!r}; skip it")
        if calls[name] * len(data) < rows:
            least = -(-rows // calls[name])
            raise ValueError(f"{what}: layer {name!r} needs {least} rows of data or more, there are {len(data)}")


@torch.no_grad()
def refit(
    before: nn.Module, model: nn.Module, name: str, data: Data, weights: bool = True, rows: Tensor | None = None
) -> None:
    """Fit one layer of ``model``, in place, to the outputs that the layer of this name has in ``before``.

    A weight that is zero under a mask stays so. weights=False moves the bias alone. rows: which outputs are left.
    """
    target, layer = before.get_submodule(name), model.get_submodule(name)
    count = 0
    ours: Any = 0.0
    theirs: Any = 0.0
    own: Any = 0.0
    cross: Any = 0.0
    with _inputs(before, [name]) as seen_before, _inputs(model, [name]) as seen:
        for _ in zip(_runs(before, data), _runs(model, data), strict=True):
            x, y = (torch.cat(found()[name]).double() for found in (seen, seen_before))
            count, ours, theirs = count + len(x), ours + x.sum(0), theirs + y.sum(0)
            if weights:
                own, cross = own + x.T @ x, cross + y.T @ x
    ours, theirs = ours / count, theirs / count
    weight, wanted = dense(layer), dense(target)
    offset = torch.zeros_like(wanted[:, 0]) if target.bias is None else target.bias.detach().double()  # type: ignore[operator]
    if rows is not None:
        wanted, offset = wanted[rows.to(wanted.device)], offset[rows.to(wanted.device)]
    if weights:
        own, cross = own / count - ours.outer(ours), cross / count - theirs.outer(ours)
        weight = least_squares(weight, own, wanted @ cross, _free(layer, weight))
    assign(layer, weight if weights else None, offset + wanted @ theirs - weight @ ours)


def _free(layer: nn.Module, weight: Tensor) -> Tensor:
    """Which weights may be other than zero."""
    mask = masks(layer).get("weight")
    if mask is None:
        return torch.ones_like(weight, dtype=torch.bool)
    return mask.t() if is_conv1d(layer) else mask


def least_squares(weight: Tensor, own: Tensor, wanted: Tensor, free: Tensor, steps: int = 300) -> Tensor:
    """The weight W [N, K], zero outside ``free``, that minimises tr(W own W^T) / 2 - tr(wanted W^T), near ``weight``
    where that leaves a choice.

    Every row has a system of its own, over its own free columns; conjugate gradients solve all rows at once with one
    product with ``own`` [K, K] a step, whatever the pattern.
    """
    share = damped(own).diagonal()[:1] - own.diagonal()[:1]
    own, wanted = damped(own), wanted + share * weight
    if bool(free.all()):
        solved: Tensor = torch.linalg.solve(own, wanted, left=False)
        return solved
    scale = own.diagonal()
    weight = weight * free
    residual = (wanted - weight @ own) * free
    direction = residual / scale
    size = (residual * direction).sum(1, keepdim=True)
    enough = 1e-16 * size.amax()
    for _ in range(steps):
        if bool((size <= enough).all()):
            break
        image = (direction @ own) * free
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(1e-300)
        weight = weight + length * direction
        residual = residual - length * image
        ahead = residual / scale
        grown = (residual * ahead).sum(1, keepdim=True)
        direction = ahead + grown / size.clamp_min(1e-300) * direction
        size = grown
    return weight


def damped(second: Tensor) -> Tensor:
    """Moments that can be inverted, whatever the rows."""
    share = DAMPING * second.diagonal().mean()
    return second + torch.eye(len(second), dtype=second.dtype, device=second.device) * share.clamp_min(1e-12)


@contextmanager
def _inputs(model: nn.Module, names: Iterable[str]) -> Iterator[Callable[[], dict[str, list[Tensor]]]]:
    """A function that hands over what reached each layer since it was last called, as rows."""
    calls: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls.setdefault(name, []).append(args[0].detach().flatten(0, -2))

        return note

    def handed() -> dict[str, list[Tensor]]:
        found = dict(calls)
        calls.clear()
        return found

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield handed
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _slopes(model: nn.Module, names: Iterable[str]) -> Iterator[Callable[[Any], dict[str, Tensor]]]:
    """A function that differentiates the model's outputs by those of each layer: squares, summed over the rows."""
    probes: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def probe(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # zeros to differentiate by: the model may be frozen
            probes.setdefault(name, []).append(torch.zeros_like(output, requires_grad=True))
            return output + probes[name][-1]

        return note

    def slopes(outputs: Any) -> dict[str, Tensor]:
        found = dict(probes)
        probes.clear()
        if not found or not isinstance(outputs, Tensor):
            return {}
        # random signs: in the mean, the squares of all outputs' derivatives add up
        signs = torch.randint(2, outputs.shape, generator=generator, device="cpu").to(outputs) * 2 - 1
        grads = torch.autograd.grad(
            (outputs * signs).sum(), [p for calls in found.values() for p in calls], materialize_grads=True
        )
        squares = [g.double().flatten(0, -2).square().sum(0) for g in grads]
        calls = [len(c) for c in found.values()]
        return {n: torch.stack(squares[sum(calls[:i]) :][: calls[i]]).sum(0) for i, n in enumerate(found)}

    hooks = [model.get_submodule(name).register_forward_hook(probe(name)) for name in names]
    try:
        yield slopes
    finally:
        for hook in hooks:
            hook.remove()


def _runs(model: nn.Module, data: Data, gradients: bool = False) -> Iterator[Any]:
    """Run the model in eval mode over the data, a batch at each step."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in data.batches(BATCH):
            with torch.set_grad_enabled(gradients):
                outputs = model(*(t.to(device) for t in batch.inputs))
            # of an object with several parts the logits
            yield getattr(outputs, "logits", outputs)
    finally:
        for module, training in flags.items():
            module.training = training
