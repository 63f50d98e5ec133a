"""Models on disk: a folder with ``config.json`` and ``model.safetensors``, as written down in ``docs/formats.md``."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .constraints import settle_masked
from .fuse import is_plain, original_class
from .models import MLP, RewardMLP
from .nn import (
    BlockSparseLinear,
    CompressedLinear,
    GridLinear,
    Int8Linear,
    SharedLinear,
    ShiftedLinear,
    Sparse24Linear,
    SparseRowsLinear,
)
from .nn.base import is_conv1d
from .nn.zeros import Zeros
from .packing import pack, packed_bytes, unpack
from .refusals import refuse_what_fails
from .swap import fuse_forwards, put

# version 1 had no sparse layers, and is otherwise the same
FORMAT, VERSION = "rewardzip", 2
CONFIG, WEIGHTS = "config.json", "model.safetensors"

# the types a dense model may have, whichever its class makes
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CheckpointError(ValueError):
    """A folder that cannot be read as a model; the message says which two things disagree."""


# what a config may name: how to build it, and the attributes that are its arguments. Nothing else is ever constructed.
LAYERS: dict[str, tuple[type[CompressedLinear], tuple[str, ...]]] = {
    "Int8Linear": (Int8Linear, ("in_features", "out_features", "bias", "rows", "compute_dtype", "dtype", "bits")),
    "GridLinear": (GridLinear, ("in_features", "out_features", "bias", "bits", "group", "dtype")),
    "SharedLinear": (SharedLinear, ("in_features", "out_features", "bias", "entries", "dtype")),
    "ShiftedLinear": (ShiftedLinear, ("in_features", "out_features", "bias", "dtype")),
    "Sparse24Linear": (Sparse24Linear, ("in_features", "out_features", "bias", "values", "rows", "dtype")),
    "SparseRowsLinear": (SparseRowsLinear, ("in_features", "out_features", "nonzeros", "bias", "values", "dtype")),
    "BlockSparseLinear": (
        BlockSparseLinear,
        ("in_features", "out_features", "stored", "bias", "block", "values", "rows", "dtype"),
    ),
}
MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    kind.__name__: (kind, fields)
    for kind, fields in (
        (nn.Sequential, ()),
        (RewardMLP, ("state_dim", "action_dim", "hidden")),
        (MLP, ("inputs", "hidden", "outputs")),
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


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_zeros(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"share", "pattern", "why", "dropped"}:
        return False
    texts = isinstance(value["pattern"], str) and isinstance(value["why"], str)
    return texts and _is_size(value["dropped"]) and _is_number(value["share"]) and 0 <= value["share"] <= 1


# what the arguments may be: torch's own constructors take almost anything and fail later
ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("in_features", "out_features", "nonzeros", "stored", "state_dim", "action_dim"), _is_size),
    **dict.fromkeys(("bits", "entries", "group"), lambda v: _is_size(v) and v > 0),
    "outputs": lambda v: v is None or _is_size(v),
    **dict.fromkeys(("hidden", "inputs", "normalized_shape"), lambda v: isinstance(v, list) and all(map(_is_size, v))),
    **dict.fromkeys(("start_dim", "end_dim"), lambda v: type(v) is int),
    **dict.fromkeys(("bias", "elementwise_affine"), lambda v: type(v) is bool),
    **dict.fromkeys(("eps", "p", "negative_slope", "alpha", "beta", "threshold"), _is_number),
    "approximate": lambda v: v in ("none", "tanh"),
    "block": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_size, v)),
    "rows": lambda v: v in ("float", "dynamic", "static"),
    "values": lambda v: v in ("int8", "float32", "float16", "bfloat16"),
    "dtype": lambda v: v in ("float32", "float16", "bfloat16", "float64"),
    "compute_dtype": lambda v: v in (None, "float32", "float16", "bfloat16"),
}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model; an older save in the same folder is replaced in one step, or not at all."""
    target = check_target(folder)
    model = settle_masked(model)
    tensors, tied = _tensors(model)
    _pack_codes(model, tensors)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": _describe(model),
        "layers": {
            name: {"op": type(m).__name__, **_settings(m, LAYERS[type(m).__name__][1]), **_noted(m)}
            for name, m in model.named_modules(remove_duplicate=False)
            if isinstance(m, CompressedLinear)
        },
        "tied": tied,
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        try:
            safetensors.torch.save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            # a full disk, for one
            raise OSError(f"save: {target} cannot be written: {error}") from error
        (draft / CONFIG).write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        _put_in_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(
    folder: str | os.PathLike[str], *, into: nn.Module | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Read a model back, in eval mode. MLPs need nothing else; other models are filled ``into`` one of their class."""
    source = Path(folder)
    config = _read_config(source)
    tensors = _read_tensors(source, config["tied"])
    layers = {name: _layer(name, spec, tensors, source) for name, spec in config["layers"].items()}
    if into is None:
        if config["model"] is None:
            raise CheckpointError(f"{source}: the model is not an MLP of known parts; give load(into=...) one to fill")
        try:
            with torch.device("meta"):
                model = _build(config["model"], "", {name: make("meta") for name, make in layers.items()}, source)
        except RecursionError:
            raise CheckpointError(f"{source}/{CONFIG}: the model is nested too deep") from None
        _check_tensors(model.state_dict(), tensors, type(model), source)
        # one parameter for all names of a tied tensor
        parameters = {id(p): nn.Parameter(p) for n, p in tensors.items() if n in _parameter_names(model)}
        model.load_state_dict({name: parameters.get(id(t), t) for name, t in tensors.items()}, assign=True)
    else:
        makers = layers | _narrowed(into, layers, tensors)
        _check_skeleton(into, makers, tensors, source)
        model = put(into, {name: make(into.get_submodule(name).weight.device) for name, make in makers.items()})
        model.load_state_dict(tensors)
        refuse_what_fails(model)
    fuse_forwards(model)
    return model.eval() if device is None else model.eval().to(device)


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _settings(module: nn.Module, fields: tuple[str, ...]) -> dict[str, Any]:
    return {field: _plain(field, getattr(module, field)) for field in fields}


def _noted(layer: CompressedLinear) -> dict[str, Any]:
    return {} if layer.zeros is None else {"zeros": asdict(layer.zeros)}


def _plain(field: str, value: Any) -> Any:
    """An argument as JSON has it: dtypes by name, tuples as lists, a bias by whether there is one."""
    if field == "bias":
        return value is not None
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def _describe(module: nn.Module) -> dict[str, Any] | None:
    """The module as a tree of known parts, None where one part is unknown."""
    kind = original_class(module)
    if not is_plain(module):
        return None
    if isinstance(module, CompressedLinear):
        return {"type": "packed"}
    if kind.__name__ not in MODULES or MODULES[kind.__name__][0] is not kind:
        return None
    fields = MODULES[kind.__name__][1]
    described = {"type": kind.__name__, **_settings(module, fields)}
    children = {name: _describe(child) for name, child in module._modules.items() if child is not None}
    if any(child is None for child in children.values()):
        return None
    return {**described, "children": children} if children else described


def _build(tree: Any, name: str, layers: dict[str, CompressedLinear], source: Path) -> nn.Module:
    where = f"{source}/{CONFIG}: {name or 'model'}"
    if not isinstance(tree, dict) or not isinstance(tree.get("type"), str):
        raise CheckpointError(f"{where}: {tree!r} is not a part with a type")
    if tree["type"] == "packed":
        if name not in layers or len(tree) > 1:
            raise CheckpointError(f"{where} is packed, but layers has {sorted(layers)}")
        return layers[name]
    known, fields = MODULES.get(tree["type"], (None, ()))
    if known is None:
        raise CheckpointError(f"{where}: {tree['type']!r} is not one of {sorted(MODULES)}")
    module: nn.Module = _make(known, fields, {k: v for k, v in tree.items() if k not in ("type", "children")}, where)
    children = tree.get("children", {})
    if not isinstance(children, dict):
        raise CheckpointError(f"{where}: children is {children!r}, not a table of named parts")
    theirs, mine = set(children), {child for child, _ in module.named_children()}
    if theirs != mine and known is not nn.Sequential:
        raise CheckpointError(f"{where}: {tree['type']} has the children {sorted(mine)}, not {sorted(theirs)}")
    for child, sub in children.items():
        part = _build(sub, f"{name}.{child}" if name else child, layers, source)
        try:
            module.add_module(child, part)
        except KeyError as error:
            raise CheckpointError(f"{where}: a part cannot be called {child!r}: {error}") from error
    return module


def _make(
    kind: Callable[..., Any], fields: tuple[str, ...], arguments: dict[str, Any], where: str, **device: Any
) -> Any:
    """``kind(**arguments)``, once they have been found to be its fields and of the right types."""
    name = kind.__name__
    if set(arguments) != set(fields):
        raise CheckpointError(f"{where} has the fields {sorted(arguments)}; {name} takes {sorted(fields)}")
    wrong = {field: value for field, value in arguments.items() if not ARGUMENTS[field](value)}
    if wrong:
        raise CheckpointError(f"{where}: {name} cannot be made with {wrong}")
    dtypes = {f: getattr(torch, v) for f, v in arguments.items() if f in ("dtype", "compute_dtype") and v}
    try:
        return kind(**{**arguments, **dtypes, **device})
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {name}({arguments}) cannot be made: {error}") from error


def _layer(name: str, spec: Any, tensors: dict[str, Tensor], source: Path) -> Callable[[Any], CompressedLinear]:
    """A function that makes one packed layer on a device, once its tensors have been found to be the right ones."""
    where = f"{source}/{CONFIG}: layer {name!r}"
    op = spec.get("op") if isinstance(spec, dict) else None
    if not isinstance(op, str) or op not in LAYERS:
        raise CheckpointError(f"{where}: {spec!r} is not one of {sorted(LAYERS)}")
    kind, fields = LAYERS[op]
    arguments = {field: value for field, value in spec.items() if field not in ("op", "zeros")}
    noted = spec.get("zeros")
    if "zeros" in spec and not _is_zeros(noted):
        raise CheckpointError(f"{where}: zeros is {noted!r}; it must have a share, a pattern and why")
    if op == "Int8Linear":
        arguments.setdefault("bits", 8)  # version 1 had no others

    def make(device: Any) -> CompressedLinear:
        layer: CompressedLinear = _make(kind, fields, arguments, where, device=device)
        layer.zeros = None if noted is None else Zeros(**noted)
        return layer

    blank, prefix = make("meta"), f"{name}." if name else ""
    if isinstance(blank, Int8Linear) and blank.bits < 8:
        _unpack_codes(f"{prefix}int8_weight", blank, tensors, where)
    for buffer, expected in blank.state_dict(prefix=prefix).items():
        found = tensors.get(buffer)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            has = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise CheckpointError(
                f"{where}: {buffer!r} should be {expected.dtype} {tuple(expected.shape)}, {WEIGHTS} has {has}"
            )
    try:
        blank.check_tensors({buffer: tensors[prefix + buffer] for buffer in blank.state_dict()})
    except ValueError as error:
        raise CheckpointError(f"{where}: {WEIGHTS} holds no such layer: {error}") from error
    return make


def _pack_codes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """int8 weights of fewer bits as bytes: the least of each row, then what is above it in that many bits."""
    for name, layer in model.named_modules(remove_duplicate=False):
        key = f"{name}.int8_weight".lstrip(".")
        if isinstance(layer, Int8Linear) and layer.bits < 8 and key in tensors:
            codes = tensors[key].short()
            low = codes.amin(1, keepdim=True)
            widest = int((codes - low).max())
            if widest >= 2**layer.bits:
                raise ValueError(f"save: {name!r} has {layer.bits} bits, its weights are up to {widest} steps apart")
            tensors[key] = torch.cat([low[:, 0].to(torch.int8).view(torch.uint8), pack(codes - low, layer.bits)])


def _unpack_codes(key: str, layer: Int8Linear, tensors: dict[str, Tensor], where: str) -> None:
    """Undo ``_pack_codes``, for every name of the tensor, once it has been found to be of the right length."""
    n, k = layer.out_features, layer.in_features
    found, size = tensors.get(key), n + packed_bytes(n * k, layer.bits)
    if found is not None and found.dtype == torch.int8 and found.shape == (n, k):
        # unpacked already, by another name of it
        return
    if found is None or found.dtype != torch.uint8 or found.shape != (size,):
        has = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise CheckpointError(f"{where}: {key!r} should be torch.uint8 {(size,)}, {WEIGHTS} has {has}")
    codes = unpack(found[n:], layer.bits, (n, k)) + found[:n].view(torch.int8)[:, None]
    if int(codes.max()) > 127 or int(codes.min()) < -127:
        raise CheckpointError(f"{where}: {key!r} holds weights beyond -127 to 127")
    whole = codes.to(torch.int8)
    tensors.update({name: whole for name, tensor in tensors.items() if tensor is found})


def _check_tensors(mine: dict[str, Tensor], theirs: dict[str, Tensor], kind: type[nn.Module], source: Path) -> None:
    """That the tensors of a model are those of the file, by name, shape and type (a float may be another float)."""
    if mine.keys() != theirs.keys():
        raise CheckpointError(
            f"{source}: {kind.__name__} and {WEIGHTS} do not have the same tensors: "
            f"{sorted(mine.keys() ^ theirs.keys())}"
        )
    for name, tensor in mine.items():
        found = theirs[name]
        alike = found.dtype == tensor.dtype or (found.dtype in FLOATS and tensor.dtype in FLOATS)
        if tensor.shape != found.shape or not alike:
            raise CheckpointError(
                f"{source}: {name!r} is {tensor.dtype} {tuple(tensor.shape)} in {kind.__name__}, "
                f"{found.dtype} {tuple(found.shape)} in {WEIGHTS}"
            )


def _narrowed(
    model: nn.Module, layers: dict[str, Callable[[Any], CompressedLinear]], tensors: dict[str, Tensor]
) -> dict[str, Callable[[Any], nn.Linear]]:
    """The model's dense layers that read fewer neurons in the file, where ``swap`` has dropped some."""
    if not any(_dropped(make("meta")) for make in layers.values()):
        return {}
    found: dict[str, Callable[[Any], nn.Linear]] = {}
    for name, old in model.named_modules():
        kept = tensors.get(f"{name}.weight")
        if type(old) is not nn.Linear or name in layers or kept is None or kept.dim() != 2:
            continue
        if len(kept) == old.out_features and kept.shape[1] < old.in_features:
            sizes = kept.shape[1], old.out_features, old.bias is not None
            found[name] = partial(nn.Linear, *sizes, dtype=old.weight.dtype)
    return found


def _dropped(layer: nn.Module) -> int:
    return layer.zeros.dropped if isinstance(layer, CompressedLinear) and layer.zeros else 0


def _check_skeleton(
    model: nn.Module,
    layers: Mapping[str, Callable[[Any], nn.Module]],
    tensors: dict[str, Tensor],
    source: Path,
) -> None:
    """Everything that could stop the filling, found before the first change."""

    def outside(layer: Any) -> tuple[int, int, bool]:
        if isinstance(layer, CompressedLinear):  # whose weight is worked out from what it may not have yet
            return layer.out_features, layer.in_features, layer.fp32_bias is not None
        out, features = layer.weight.t().shape if is_conv1d(layer) else layer.weight.shape
        return out, features, layer.bias is not None

    mine, blanks = model.state_dict(), {name: make("meta") for name, make in layers.items()}
    dropped = any(map(_dropped, blanks.values()))
    for name, layer in blanks.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"{source} has a layer {name!r}, {type(model).__name__} has none") from None
        if not isinstance(old, nn.Linear | CompressedLinear) and not is_conv1d(old):
            raise CheckpointError(f"{source}: layer {name!r} is {type(old).__name__} in {type(model).__name__}")
        found, wanted = outside(layer), outside(old)
        narrower = dropped and found[2] == wanted[2] and found[0] <= wanted[0] and found[1] <= wanted[1]
        if found != wanted and not narrower:
            raise CheckpointError(
                f"{source}: layer {name!r} is {found} (out, in, bias), in {type(model).__name__} {wanted}"
            )
        prefix = f"{name}." if name else ""
        mine = {k: v for k, v in mine.items() if not k.startswith(prefix)} | layer.state_dict(prefix=prefix)
    _check_tensors(mine, tensors, type(model), source)
    if any(t.is_meta for t in model.state_dict().values()):
        raise ValueError(f"load: {type(model).__name__} is on the meta device; give one with memory, by to_empty()")


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
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{source} has no {CONFIG} to read, it is no model saved by {FORMAT}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}/{CONFIG} is not JSON: {error}") from error
    known = {"format", "version", "model", "layers", "tied"}
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{source}/{CONFIG} is not a {FORMAT} config")
    if type(config.get("version")) is not int or not 1 <= config["version"] <= VERSION:
        raise CheckpointError(f"{source}/{CONFIG} has version {config.get('version')!r}; this reads 1 to {VERSION}")
    if config.keys() != known:
        raise CheckpointError(f"{source}/{CONFIG} has the fields {sorted(config)}; it must have {sorted(known)}")
    if not isinstance(config["layers"], dict) or not isinstance(config["tied"], dict):
        raise CheckpointError(f"{source}/{CONFIG}: layers and tied must be tables")
    return config


def _read_tensors(source: Path, tied: dict[str, Any]) -> dict[str, Tensor]:
    try:
        # as torch lays tensors out: where one begins decides the order of its sums, and so the last bits
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(source / WEIGHTS).items()}
    except OSError as error:
        raise CheckpointError(f"{source} has no {WEIGHTS} to read: {error}") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}/{WEIGHTS} is corrupt or cut short: {error}") from error
    shared = {}
    for name, same in tied.items():
        if name in tensors or not isinstance(same, str) or same not in tensors:
            raise CheckpointError(f"{source}/{CONFIG} ties {name!r} to {same!r}; {WEIGHTS} has {sorted(tensors)}")
        shared[name] = tensors[same]
    return {**tensors, **shared}


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Where a save goes: of a link, to what it points to. Whatever is no older save is not replaced."""
    target = Path(folder).resolve()
    if not target.exists():
        if not next(parent for parent in target.parents if parent.exists()).is_dir():
            raise ValueError(f"save: {target} is below a file; a model is saved as a folder")
        return target
    if not target.is_dir():
        raise ValueError(f"save: {target} is a file; a model is saved as a folder")
    others = sorted(p.name for p in target.iterdir() if p.name not in (CONFIG, WEIGHTS))
    if others:
        raise ValueError(f"save: {target} holds other files ({', '.join(others[:3])}); give another folder")
    return target


def _put_in_place(draft: Path, target: Path) -> None:
    """The finished folder under its final name, the older one gone, with no moment in between."""
    try:
        draft.rename(target)
        return
    except OSError:
        # something stands there already, perhaps put there this moment by another process
        if not target.exists():
            raise
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
