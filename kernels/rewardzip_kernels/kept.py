"""What is worked out from tensors, kept while they are as they were and dropped with them.

A kept value is used only for the very tensors it came from, at the same addresses and versions: torch counts every
in-place change. (A change through ``tensor.data`` or NumPy is not counted.) A tensor made in inference mode counts
nothing, so its values are compared.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Source:
    def __init__(self, tensor: Tensor, gone: Callable[[Any], None]) -> None:
        self.tensor = weakref.ref(tensor, gone)
        self.address = tensor.data_ptr()
        self.version = None if tensor.is_inference() else tensor._version
        self.copy = tensor.clone() if tensor.is_inference() else None

    def is_at(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, where it was."""
        return self.tensor() is tensor and self.address == tensor.data_ptr()

    def holds(self, tensor: Tensor) -> bool:
        if not self.is_at(tensor):
            return False
        if self.copy is not None:
            return torch.equal(tensor, self.copy)
        return self.version == tensor._version


class Kept(Generic[T]):
    """``kept(tensors, *settings)`` is ``make(*tensors, *settings)``, made once."""

    def __init__(self, make: Callable[..., T]) -> None:
        self.make = make
        self.entries: dict[tuple[Hashable, ...], tuple[tuple[Source, ...], T]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], *settings: Hashable) -> T:
        key = (*map(id, tensors), *settings)
        entry = self.entries.get(key)
        if entry is not None:
            for source, tensor in zip(entry[0], tensors, strict=True):
                if not source.holds(tensor):
                    break
            else:
                return entry[1]

        def gone(reference: Any) -> None:
            now = self.entries.get(key)
            if now is not None and any(source.tensor is reference for source in now[0]):
                del self.entries[key]

        with torch.no_grad():
            value = self.make(*tensors, *settings)
            self.entries[key] = tuple(Source(tensor, gone) for tensor in tensors), value
        return value
