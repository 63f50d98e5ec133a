"""Models and data by name, as the command line takes them."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .checkpoint import load
from .data import Data

ACTIVATIONS = {kind.__name__.lower(): kind for kind in (nn.ReLU, nn.Tanh, nn.ELU, nn.SiLU, nn.GELU, nn.LeakyReLU)}
WEIGHTS = (".safetensors", ".pt", ".pth")


def load_model(name: str) -> nn.Module:
    """A folder saved by ``rz.save``; "package.module:function", which makes one; or the weights of an MLP in a
    .safetensors or .pt file. Weights do not tell the activation: it is ReLU, or what follows a colon (weights.pt:tanh).
    """
    file, _, activation = name.partition(":")
    if Path(file).suffix in WEIGHTS:
        return mlp_of(_state(Path(file)), activation or "relu", file)
    if Path(name).is_dir():
        return load(name)
    model = _call(name, "a folder saved by rz.save, or weights in .safetensors or .pt")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} gives {type(model).__name__}, not a torch.nn.Module")
    return model


def load_data(name: str, model: nn.Module) -> tuple[Data, Tensor | None]:
    """(the rows, the next states): an .npz or .parquet file, or "package.module:function", which gives what
    ``rz.evaluate`` takes.

    In a file, "reward" or "rewards" is the truth, "rejected_..." are the inputs of rows that lost, "next_state" or
    "next_states" is what EPIC asks for where it is no parameter of the forward, and everything else is an input: in
    the order of the forward's parameters where they have those names, else in the file's. Columns "state_0",
    "state_1", ... are one input "state".
    """
    if Path(name).suffix == ".npz":
        named = _npz(Path(name))
    elif Path(name).suffix == ".parquet":
        named = _parquet(Path(name))
    else:
        data = Data.of(model, _call(name, "an .npz or .parquet file"))
        return _joined(model, data), None
    rewards = [named.pop(key) for key in ("reward", "rewards") if key in named]
    takes = inspect.signature(model.forward).parameters
    follow = [named.pop(key) for key in ("next_state", "next_states") if key in named and key not in takes]
    lost = {key.removeprefix("rejected_"): named.pop(key) for key in list(named) if key.startswith("rejected_")}
    inputs = _in_order(model, named)
    rejected = tuple(_in_order(model, lost)) if lost else None
    data = Data(tuple(inputs), rewards[0] if rewards else None, rejected)
    if follow and isinstance(model, nn.Sequential) and len(inputs) > 1:
        warnings.warn(f"{name}: the next states are not used, {type(model).__name__} takes one input", stacklevel=2)
        follow = []
    return _joined(model, data), follow[0] if follow else None


def mlp_of(state: dict[str, Tensor], activation: str, file: str) -> nn.Sequential:
    """The MLP that these weights are of: its linear layers in their order, an activation between each two."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{file}: the activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    weights = {key.removesuffix("weight"): value for key, value in state.items() if key.endswith("weight")}
    others = [key for key in state if not key.endswith(("weight", "bias"))]
    shapes = [tuple(w.shape) for w in weights.values()]
    if not weights or others or any(len(shape) != 2 for shape in shapes):
        found = {key: tuple(value.shape) for key, value in state.items()}
        raise ValueError(f"{file} is not of an MLP alone: it has {found}")
    weights = {prefix: weights[prefix] for prefix in _layers_in_order(list(weights), file)}
    for (name, first), (then, second) in pairwise(weights.items()):
        gives, takes = first.shape[0], second.shape[1]
        if gives != takes:
            raise ValueError(f"{file}: {name!r} gives {gives} numbers, {then!r} after it takes {takes}")
    layers: list[nn.Module] = []
    for prefix, weight in weights.items():
        bias = state.get(f"{prefix}bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        layers += [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).eval()


def _layers_in_order(prefixes: list[str], file: str) -> list[str]:
    """By the numbers in their names, where these differ in nothing else; a .pt file keeps the model's own order."""
    if len({re.sub(r"\d+", "#", prefix) for prefix in prefixes}) == 1:
        return sorted(prefixes, key=lambda prefix: [int(digits) for digits in re.findall(r"\d+", prefix)])
    if Path(file).suffix == ".safetensors":
        raise ValueError(
            f"{file}: no numbers in the names {prefixes} tell the order of the layers, and the file has none"
        )
    return prefixes


def _state(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has errors of its own
        raise ValueError(f"{file} cannot be read as weights alone: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds {type(state).__name__}, not a table of tensors")
    return state


def _call(name: str, otherwise: str) -> Any:
    module, colon, function = name.partition(":")
    if not colon or not re.fullmatch(r"[\w.]+", module):
        raise ValueError(f"{name} is neither {otherwise}, nor package.module:function")
    # as `python -m` does, and an installed command does not
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    try:
        return make()
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"{name} raises {type(error).__name__}: {error}") from error


def _npz(file: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: _float32(torch.from_numpy(arrays[key])) for key in arrays.files}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as arrays of numbers: {error}") from error


def _parquet(file: Path) -> dict[str, Tensor]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("reading parquet takes pyarrow: pip install rewardzip[score]") from error
    import numpy as np

    try:
        table = parquet.read_table(file)
        columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
        tensors = {name: _float32(torch.from_numpy(column)) for name, column in columns.items()}
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as columns of numbers: {error}") from error
    grouped: dict[str, list[str]] = {}
    for name in tensors:
        grouped.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    both = [stem for stem, names in grouped.items() if stem in names and len(names) > 1]
    if both:
        raise ValueError(
            f"{file} has the column {both[0]!r} and others with numbers behind that name: {grouped[both[0]]}"
        )
    return {
        # by number: many writers put state_10 before state_2
        stem: tensors[stem] if names == [stem] else torch.stack([tensors[n] for n in sorted(names, key=_last)], 1)
        for stem, names in grouped.items()
    }


def _last(name: str) -> int:
    return int(name.rpartition("_")[2])


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _in_order(model: nn.Module, named: dict[str, Tensor]) -> list[Tensor]:
    wanted = list(inspect.signature(model.forward).parameters)
    if set(named) <= set(wanted):
        return [named[name] for name in wanted if name in named]
    return list(named.values())


def _joined(model: nn.Module, data: Data) -> Data:
    """Side by side where the model is a chain, which takes one input."""
    if not isinstance(model, nn.Sequential) or len(data.inputs) == 1:
        return data
    rejected = None if data.rejected is None else (torch.cat(data.rejected, 1),)
    return Data((torch.cat(data.inputs, 1),), data.rewards, rejected)
