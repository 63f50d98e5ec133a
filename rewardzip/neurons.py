"""Whole neurons taken out: the layer, the norms behind it and the layers that read it get smaller.

What a removed neuron gave on average, or always where it is constant, moves into the biases of its readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .channels import Channels
from .constraints import masked, masks, settle
from .models import MLP, RewardMLP
from .moments import Moments, assign, damped, dense
from .surgeon import take

Kept = dict[str, Tensor]
"""By the layer's name, which of its neurons stay: a boolean each."""


def prunable(channels: Channels, skip: Iterable[str] = ()) -> list[str]:
    """The layers whose neurons can go; ValueError where one that should be among them cannot."""
    found = []
    for name, module in channels.model.named_modules():
        if not isinstance(module, nn.Linear) or name in skip:
            continue
        reason = channels.fixed.get(name)
        if reason is not None and (name in channels.hidden or name not in channels.layers):
            raise ValueError(f"prune: the neurons of layer {name!r} must stay: {reason}; skip it to prune the others")
        if reason is None and module.out_features > 1:
            found.append(name)
    if not found:
        raise ValueError(f"prune: {type(channels.model).__name__} has no layer whose neurons another layer reads")
    return [name for name in channels.layers if name in found]


def neuron_scores(
    channels: Channels, layers: list[str], importance: str, inputs: dict[str, Moments], generator: torch.Generator
) -> dict[str, Tensor]:
    """What the readers of each neuron lose with it: see ``_loss``; of those that cannot matter, 0."""
    found = {}
    for name in layers:
        weight = dense(channels.model.get_submodule(name))
        if importance == "random":
            found[name] = torch.rand(len(weight), generator=generator, dtype=torch.float64, device="cpu")
        elif importance == "second-order":
            found[name] = _eliminated(channels, name, inputs)
        else:
            found[name] = sum(
                (_loss(channels, name, reader, start, importance, inputs) for reader, start in _places(channels, name)),
                torch.zeros_like(weight[:, 0]),
            )
        found[name] = found[name].to(weight.device)
    return found


def _places(channels: Channels, layer: str) -> list[tuple[str, int]]:
    """(reader, first column) wherever the layer's neurons are read."""
    places = []
    for reader in channels.readers(layer):
        start = 0
        for part in channels.reads[reader]:
            if part.layer == layer:
                places.append((reader, start))
            start += part.width or 0
    return places


def _loss(
    channels: Channels, layer: str, reader: str, start: int, importance: str, inputs: dict[str, Moments]
) -> Tensor:
    """magnitude: the L1 norm of the weights into a neuron times that of those out of it; activation: how far the
    neuron strays from its mean, which its readers' biases take over, times the L1 norm of the weights out of it."""
    weight = dense(channels.model.get_submodule(layer))
    out = dense(channels.model.get_submodule(reader))[:, start : start + len(weight)].abs().sum(0)
    if importance == "magnitude":
        return weight.abs().sum(1) * out
    variance = inputs[reader].covariance.diagonal()[start : start + len(weight)]
    return variance.clamp_min(0).sqrt() * out


def _eliminated(channels: Channels, layer: str, inputs: dict[str, Moments]) -> Tensor:
    """Neurons taken one by one, the cheapest first, each time the readers' other weights making up for it as well as
    they can (optimal brain surgeon); a neuron's score is what it costs at its turn."""
    width = len(dense(channels.model.get_submodule(layer)))
    places = _places(channels, layer)
    readers = {r for r, _ in places}
    weights = {r: (dense(channels.model.get_submodule(r)) * inputs[r].steepness[:, None].sqrt())[None] for r in readers}
    inverses = {r: torch.linalg.inv(damped(inputs[r].covariance))[None] for r in readers}
    scores = torch.full((width,), torch.inf, dtype=torch.float64, device="cpu")
    so_far = 0.0
    for _ in range(width - 1):
        loss = torch.zeros(width, dtype=torch.float64, device="cpu")
        for r, start in places:
            here = slice(start, start + width)
            own = inverses[r][0].diagonal()[here]
            loss += (weights[r][0, :, here].square().sum(0) / own).cpu()
        cheapest = int(loss.masked_fill(scores.isfinite(), torch.inf).argmin())
        # never less than before: what goes later must rank later
        so_far = max(so_far, float(loss[cheapest]))
        scores[cheapest] = so_far
        for r, start in places:
            take(weights[r], inverses[r], torch.tensor([[start + cheapest]], device=weights[r].device))
    return scores


def choose(scores: dict[str, Tensor], removed: dict[str, int] | int) -> Kept:
    """Which neurons stay when so many of each layer go, or so many in all: at least one stays in each layer."""
    scores = {name: s.cpu() for name, s in scores.items()}
    if isinstance(removed, int):
        # the best of each layer is safe, the lowest of the others go, wherever they are
        flat = torch.cat([s.index_fill(0, s.argmax(), torch.inf) for s in scores.values()])
        mask = torch.ones_like(flat, dtype=torch.bool)
        mask[flat.argsort(stable=True)[: min(removed, len(flat) - len(scores))]] = False
        return dict(zip(scores, mask.split([len(s) for s in scores.values()]), strict=True))
    kept = {}
    for name, s in scores.items():
        kept[name] = torch.ones_like(s, dtype=torch.bool)
        kept[name][s.argsort(stable=True)[: min(removed[name], len(s) - 1)]] = False
    return kept


def shrink(channels: Channels, kept: Kept) -> list[str]:
    """Take neurons out of the model, in place; what the constant ones gave stays. Returns the layers that read them."""
    model, readers = channels.model, []
    for name in channels.reads:
        module: Any = model.get_submodule(name)
        parts = channels.reads[name]
        columns = None
        if any(part.layer in kept for part in parts):
            columns = torch.cat([_stays(part.layer, part.width or 0, kept) for part in parts])
        if not isinstance(module, nn.Linear):
            if columns is not None:
                _narrow_norm(module, columns)
            continue
        if columns is not None:
            readers.append(name)
            none = [torch.zeros(part.width or 0, dtype=torch.float32, device="cpu") for part in parts]
            known = torch.cat([none[i].bool() if p.known is None else p.known.cpu() for i, p in enumerate(parts)])
            values = torch.cat([none[i] if p.values is None else p.values.cpu() for i, p in enumerate(parts)])
            gone = (known & ~columns).to(module.weight.device)
            if bool(gone.any()):
                extra = dense(module)[:, gone] @ values.to(gone.device)[gone].double()
                assign(module, None, extra + (0 if module.bias is None else module.bias.detach().double()))
        _narrow(module, kept.get(name), columns)
    for part in model.modules():
        if isinstance(part, RewardMLP | MLP):
            part.hidden = tuple(m.out_features for m in part.net if isinstance(m, nn.Linear))[:-1]
    return readers


def _stays(layer: str | None, width: int, kept: Kept) -> Tensor:
    return kept[layer].cpu() if layer in kept else torch.ones(width, dtype=torch.bool, device="cpu")


@torch.no_grad()
def _narrow(linear: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    """A linear layer with some of its outputs and inputs, under what is left of its masks."""
    if rows is None and columns is None:
        return
    held = masks(linear)
    if held:
        settle(linear)
    device = linear.weight.device
    rows = torch.ones(linear.out_features, dtype=torch.bool, device="cpu") if rows is None else rows.cpu()
    columns = torch.ones(linear.in_features, dtype=torch.bool, device="cpu") if columns is None else columns
    rows, columns = rows.to(device), columns.to(device)
    linear.weight = nn.Parameter(linear.weight[rows][:, columns], linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows], linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
    if "weight" in held:
        masked(linear, held["weight"][rows][:, columns])
    if "bias" in held:
        masked(linear, held["bias"][rows], "bias")


def _narrow_norm(norm: Any, columns: Tensor) -> None:
    for name in ("weight", "bias"):
        old = getattr(norm, name, None)
        if old is not None:
            setattr(norm, name, nn.Parameter(old.detach()[columns.to(old.device)], old.requires_grad))
    if not isinstance(norm, nn.BatchNorm1d):
        norm.normalized_shape = (int(columns.sum()),)
        return
    norm.num_features = int(columns.sum())
    for name in ("running_mean", "running_var"):
        if (held := getattr(norm, name)) is not None:
            setattr(norm, name, held[columns.to(held.device)])
