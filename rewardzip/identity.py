"""What makes two models, or two tables of rows, the same to a run that goes on where another was killed.

Of a model: its modules with their classes, settings and code, and its tensors. Code is compared as compiled, so another
version of Python is another model. Attributes with a leading underscore are taken for caches.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .data import Data
from .fuse import original_class

# their settings are in extra_repr, their code is as old as the package
KNOWN = ("torch", "rewardzip")


def model_hash(model: nn.Module, weights: bool = True) -> str:
    """weights=False: of tensors that training changes, the names and shapes alone."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        kind = original_class(module)
        digest.update(f"{name}:{kind.__module__}.{kind.__qualname__}({module.extra_repr()})\n".encode())
        if kind.__module__.partition(".")[0] not in KNOWN:
            own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
            digest.update(describe({**own, "forward": vars(module).get("forward", kind.forward)}).encode())
    # state_dict leaves out the buffers that are not saved
    for name, tensor in {**model.state_dict(), **dict(model.named_buffers())}.items():
        digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)}\n".encode())
        if weights:
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def data_hash(data: Data, more: Iterable[Tensor | None] = ()) -> str:
    """Of the bytes of its tensors, and of ``more``."""
    digest = hashlib.sha256(describe([len(data.inputs), data.rewards is None, data.rejected is None]).encode())
    for tensor in (*data.tensors(), *more):
        digest.update(b"none" if tensor is None else f"{tensor.dtype}{tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()[:32]


def describe(value: Any) -> str:
    """Plain values, tensors, functions with their code, and tables of these; of other objects the class alone."""
    if isinstance(value, Tensor):
        return hashlib.sha256(_bytes(value)).hexdigest()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{describe(key)}: {describe(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device | None):
        return repr(value)
    if hasattr(value, "tobytes"):  # of numpy
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {describe(value.co_consts)}"
    function = inspect.unwrap(value) if inspect.isroutine(value) else value
    name = (
        f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else type(value).__name__
    )
    return f"{name} {describe(getattr(function, '__code__', None))}"


def code_hash(function: Any) -> str:
    return hashlib.sha256(describe(function).encode()).hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
