"""Models on disk: a folder with ``config.json`` and ``model.safetensors``, as written down in ``docs/formats.md``."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .fuse import original_class
from .models import RewardMLP
from .nn import CompressedLinear, Int8Linear
from .swap import fuse_forwards

FORMAT, VERSION = "rewardzip", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A folder that cannot be read as a model; the message says which two things disagree."""


# what a config may name: how to build it, and the attributes that are its arguments. Nothing else is ever constructed.
LAYERS: dict[str, tuple[type[CompressedLinear], tuple[str, ...]]] = {
    "Int8Linear": (Int8Linear, ("in_features", "out_features", "bias", "rows", "compute_dtype", "dtype")),
}
MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    kind.__name__: (kind, fields)
    for kind, fields in (
        (RewardMLP, ("state_dim", "action_dim", "hidden")),
        (nn.Linear, ("in_features", "out_features", "bias")),
        (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
        (nn.Dropout, ("p",)),
        (nn.LeakyReLU, ("negative_slope",)),
        (nn.ELU, ("alpha",)),
        (nn.GELU, ("approximate",)),
        (nn.Softplus, ("beta", "threshold")),
        *((k, ()) for k in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Identity)),
        (nn.Flatten, ("start_dim", "end_dim")),
    )
}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model; an older save in the same folder is replaced in one step, or not at all."""
    target = Path(folder)
    _check_target(target)
    tensors, tied = _tensors(model)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": _describe(model),
        "layers": {
            name: {"op": type(m).__name__, **_settings(m, LAYERS[type(m).__name__][1])}
            for name, m in model.named_modules(remove_duplicate=False)
            if isinstance(m, CompressedLinear)
        },
        "tied": tied,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        safetensors.torch.save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        draft.chmod(0o755)
        _put_in_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(
    folder: str | os.PathLike[str], *, into: nn.Module | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Read a model back, in eval mode. MLPs need nothing else; another model is filled ``into`` one of its own class."""
    source = Path(folder)
    config = _read_config(source)
    tensors = _read_tensors(source, config["tied"])
    layers = {name: _layer(name, spec, tensors) for name, spec in config["layers"].items()}
    if into is None:
        if config["model"] is None:
            raise CheckpointError(f"{source}: the model is not an MLP of known parts; give load(into=...) one to fill")
        with torch.device("meta"):
            model = _build(config["model"], "", {n: make() for n, make in layers.items()}, str(source))
        _check_names(model, tensors, source)
        model.load_state_dict(tensors, assign=True)
    else:
        model = into
        _check_skeleton(model, layers, tensors, source)
        for name, make in layers.items():
            parent, _, child = name.rpartition(".")
            old = model.get_submodule(name)
            at = next(iter([*old.parameters(), *old.buffers()]))
            made = make().to_empty(device=at.device)
            model = made if not name else model
            if name:
                setattr(model.get_submodule(parent), child, made)
        model.load_state_dict(tensors)
    fuse_forwards(model)
    return model.eval() if device is None else model.eval().to(device)


def _settings(module: nn.Module, fields: tuple[str, ...]) -> dict[str, Any]:
    return {field: _plain(getattr(module, field)) for field in fields}


def _plain(value: Any) -> Any:
    """An argument as JSON has it: dtypes by name, tuples as lists, a bias by whether there is one."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return list(value)
    return value is not None if isinstance(value, Tensor) or value is None else value


def _describe(module: nn.Module) -> dict[str, Any] | None:
    """The module as a tree of known parts, None where one part is unknown."""
    kind = original_class(module)
    if isinstance(module, CompressedLinear):
        return {"type": "packed"}
    if kind is nn.Sequential:
        described: dict[str, Any] = {"type": "Sequential"}
    elif MODULES.get(kind.__name__, (None,))[0] is kind:
        described = {"type": kind.__name__, **_settings(module, MODULES[kind.__name__][1])}
    else:
        return None
    children = {name: _describe(child) for name, child in module.named_children()}
    if any(child is None for child in children.values()):
        return None
    return {**described, "children": children} if children else described


def _build(tree: Any, name: str, layers: dict[str, CompressedLinear], source: str) -> nn.Module:
    where = f"{source}/{CONFIG}: {name or 'model'}"
    if not isinstance(tree, dict) or not isinstance(tree.get("type"), str):
        raise CheckpointError(f"{where}: {tree!r} is not a part with a type")
    arguments = {k: v for k, v in tree.items() if k not in ("type", "children")}
    if tree["type"] == "packed":
        if name not in layers or len(tree) > 1:
            raise CheckpointError(f"{where} is packed, but layers has {sorted(layers)}")
        return layers[name]
    children = tree.get("children", {})
    if not isinstance(children, dict) or not all(c.isidentifier() or c.isdigit() for c in children):
        raise CheckpointError(f"{where}: children is not a table of named parts")
    parts = {child: _build(sub, f"{name}.{child}" if name else child, layers, source) for child, sub in children.items()}
    if tree["type"] == "Sequential" and not arguments:
        module: nn.Module = nn.Sequential()
    else:
        known, fields = MODULES.get(tree["type"], (None, ()))
        if known is None or set(arguments) != set(fields):
            raise CheckpointError(f"{where}: {tree['type']} with {sorted(arguments)}; it takes {sorted(fields)}")
        try:
            module = known(**arguments)
        except Exception as error:
            raise CheckpointError(f"{where}: {tree['type']}({arguments}) cannot be made: {error}") from error
        if set(parts) != {child for child, _ in module.named_children()}:
            raise CheckpointError(f"{where}: {tree['type']} has other children than {sorted(parts)}")
    for child, part in parts.items():
        module.add_module(child, part)
    return module


def _layer(name: str, spec: Any, tensors: dict[str, Tensor]) -> Callable[[], CompressedLinear]:
    """A function that makes one packed layer on meta, its settings and the shapes of its tensors checked."""
    kind, fields = LAYERS.get(spec.get("op") if isinstance(spec, dict) else None, (None, ()))  # type: ignore[arg-type]
    if kind is None:
        raise CheckpointError(f"layer {name!r}: {spec!r} is not one of {sorted(LAYERS)}")
    arguments = {k: v for k, v in spec.items() if k != "op"}
    if set(arguments) != set(fields):
        raise CheckpointError(f"layer {name!r} has the fields {sorted(arguments)}; {kind.__name__} takes {sorted(fields)}")
    for field in ("dtype", "compute_dtype"):
        text = arguments[field]
        if text not in ("float32", "float16", "bfloat16", False if field == "compute_dtype" else "float32"):
            raise CheckpointError(f"layer {name!r}: {field} is {text!r}")
        arguments[field] = getattr(torch, text) if text else None
    for field in ("in_features", "out_features"):
        if type(arguments[field]) is not int or arguments[field] < 1:
            raise CheckpointError(f"layer {name!r}: {field} is {arguments[field]!r}; it must be 1 or more")
    try:
        layer = kind(**arguments, device="meta")
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"layer {name!r}: {error}") from error
    for buffer, expected in layer.state_dict(prefix=f"{name}." if name else "").items():
        found = tensors.get(buffer)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            has = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise CheckpointError(
                f"{CONFIG} says {buffer!r} is {expected.dtype} {tuple(expected.shape)}, {WEIGHTS} has {has}"
            )
    return lambda: kind(**arguments, device="meta")


def _check_names(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    expected = model.state_dict()
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise CheckpointError(f"{source}: the model and {WEIGHTS} do not have the same tensors: {odd}")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{source}: {name!r} is {tuple(tensor.shape)} in the model, {tuple(tensors[name].shape)} in {WEIGHTS}"
            )


def _check_skeleton(model: nn.Module, layers: dict[str, Any], tensors: dict[str, Tensor], source: Path) -> None:
    """Everything that could stop the filling, found before the first change."""
    packed = tuple(f"{name}." if name else "" for name in layers)
    for name in layers:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"{source} has a layer {name!r}, {type(model).__name__} has none") from None
    mine = {k: v for k, v in model.state_dict().items() if not packed or not k.startswith(packed)}
    theirs = {k: v for k, v in tensors.items() if not packed or not k.startswith(packed)}
    if mine.keys() != theirs.keys():
        raise CheckpointError(
            f"{source}: {type(model).__name__} and {WEIGHTS} do not have the same tensors: "
            f"{sorted(mine.keys() ^ theirs.keys())}"
        )
    for name, tensor in mine.items():
        if tensor.shape != theirs[name].shape:
            raise CheckpointError(
                f"{source}: {name!r} is {tuple(tensor.shape)} in {type(model).__name__}, "
                f"{tuple(theirs[name].shape)} in {WEIGHTS}"
            )


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and the names under which the others are the same tensor."""
    kept: dict[Any, str] = {}
    tensors, tied = {}, {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise TypeError(f"save: {name!r} is {type(tensor).__name__} on {getattr(tensor, 'device', None)}")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in kept:
            tied[name] = kept[key]
        else:
            kept[key] = name
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{source} has no {CONFIG}: not a model saved by rewardzip") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source}/{CONFIG} is not JSON: {error}") from error
    known = {"format", "version", "model", "layers", "tied"}
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{source}/{CONFIG} is not a {FORMAT} config")
    if config.get("version") != VERSION:
        raise CheckpointError(f"{source}/{CONFIG} has version {config.get('version')!r}; this reads {VERSION}")
    if config.keys() != known:
        raise CheckpointError(f"{source}/{CONFIG} has the fields {sorted(config)}; it must have {sorted(known)}")
    if not isinstance(config["layers"], dict) or not isinstance(config["tied"], dict):
        raise CheckpointError(f"{source}/{CONFIG}: layers and tied must be tables")
    return config


def _read_tensors(source: Path, tied: dict[str, str]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(source / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{source} has no {WEIGHTS}") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{source}/{WEIGHTS} is corrupt or cut short: {error}") from error
    for name, same in tied.items():
        if same not in tensors:
            raise CheckpointError(f"{source}/{CONFIG} ties {name!r} to {same!r}, which {WEIGHTS} does not have")
        tensors[name] = tensors[same]
    return tensors


def _check_target(target: Path) -> None:
    """Refuse to replace anything but an older save."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"save: {target} is a file; a model is saved as a folder")
    others = sorted(p.name for p in target.iterdir() if p.name not in (CONFIG, WEIGHTS))
    if others:
        raise ValueError(f"save: {target} holds other files ({', '.join(others[:3])}); give another folder")


def _put_in_place(draft: Path, target: Path) -> None:
    """The finished folder under its final name, the older one gone, with no moment in between."""
    if not target.exists():
        draft.rename(target)
        return
    exchange = 2  # RENAME_EXCHANGE of renameat2(2); AT_FDCWD is -100
    try:
        failed = ctypes.CDLL(None).renameat2(-100, os.fsencode(draft), -100, os.fsencode(target), exchange)
    except (AttributeError, OSError, TypeError):
        failed = -1
    if failed:
        # no such call on this system or file system: two renames, the older save whole beside its name in between
        older = Path(tempfile.mkdtemp(prefix=f".{target.name}-older-", dir=target.parent))
        target.rename(older / "saved")
        draft.rename(target)
        shutil.rmtree(older)
