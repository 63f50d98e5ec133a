"""What the package a model comes from would do wrong to compressed layers, in silence: an error where it is tried."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .nn import CompressedLinear


def refuse_what_fails(model: nn.Module) -> None:
    """To be called on a model that has its compressed layers.

    stable-baselines3 finds what it trains by ``parameters()``, which compressed layers have none of. transformers fills
    the weights it misses in a file with random numbers.
    """
    # the outermost policy gives its name
    for module in reversed(list(model.modules())):
        layers = [layer for layer in module.modules() if isinstance(layer, CompressedLinear)]
        if _is_a(module, "stable_baselines3.common.policies", "BaseModel"):
            for layer in layers:
                layer.policy = type(module).__name__
        if layers and _is_a(module, "transformers.modeling_utils", "PreTrainedModel"):
            # past the module's own __setattr__, which may fuse it anew
            module.__dict__["save_pretrained"] = _save_pretrained


def allow_saving(module: nn.Module) -> None:
    if module.__dict__.get("save_pretrained") is _save_pretrained:
        del module.__dict__["save_pretrained"]


def _save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained: the model has compressed layers, which from_pretrained would fill with random weights: use "
        "rz.save(model, folder) and rz.load(folder, into=model_class(config)), or rz.restore(model).save_pretrained"
    )


def _is_a(module: nn.Module, where: str, name: str) -> bool:
    return any((kind.__module__, kind.__name__) == (where, name) for kind in type(module).__mro__)
