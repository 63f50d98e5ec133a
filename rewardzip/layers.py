"""Where in a model the error arises: outputs of its layers beside those of the same names in another model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .fuse import FusedForward, unfuse


def layer_errors(before: nn.Module, after: nn.Module, inputs: Sequence[Tensor]) -> dict[str, float]:
    """For each layer with weights that both models run under one name and at one width: the error of its outputs,
    root mean square, as a share of the outputs' own. A layer is missing where it became narrower or has gone."""
    names = _layers(before).keys() & _layers(after).keys()
    seen, judged = (_outputs(model, names, inputs) for model in (before, after))
    errors = {}
    for name in seen:
        if name in judged and judged[name].shape == seen[name].shape:
            norm = seen[name].norm()
            errors[name] = float((judged[name] - seen[name]).norm() / norm) if norm else 0.0
    return errors


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute with tensors of their own; not the tables in which parametrisations keep theirs."""
    return {
        name: m
        for name, m in model.named_modules()
        if name and "parametrizations" not in name and any(True for _ in (*m.parameters(False), *m.buffers(False)))
    } | {name: m for name, m in model.named_modules() if name and hasattr(m, "parametrizations")}


def _outputs(model: nn.Module, names: set[str], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """In the order in which the layers run."""
    if any(isinstance(m, FusedForward) for m in model.modules()):
        # one launch shows nothing of the layers in it: the author's forwards on a copy
        model = copy.deepcopy(model)
        for module in list(model.modules()):
            if isinstance(module, FusedForward):
                unfuse(module)
    found: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str) -> None:
        def note(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                found[name] = output.detach().double().cpu()

        hooks.append(model.get_submodule(name).register_forward_hook(note))

    try:
        for name in names:
            watch(name)
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
