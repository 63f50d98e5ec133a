"""What a kernel makes of several weight tensors once, kept until one of them is changed or gone.

As in ``packing.py``: used only for the very tensors it came from, at the same addresses and the same versions, which
torch counts in-place changes by. Tensors made in inference mode count nothing, so their values are compared.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (a reference to the tensor, its address, its version, its copy where it counts none) of each, and what was made
_Source = tuple[weakref.ref[Tensor], int, int, Tensor | None]
_kept: dict[tuple[Any, ...], tuple[list[_Source], Any]] = {}


def _unchanged(tensor: Tensor, source: _Source) -> bool:
    reference, address, version, copy = source
    if reference() is not tensor or tensor.data_ptr() != address:
        return False
    return tensor._version == version if copy is None else torch.equal(tensor, copy)


def kept(make: Callable[..., Any], tensors: tuple[Tensor, ...], *rest: Any) -> Any:
    """``make(*tensors, *rest)``, made anew only where a tensor is another one or has changed."""
    key = (make, *map(id, tensors), rest)
    found = _kept.get(key)
    if found is not None and all(map(_unchanged, tensors, found[0])):
        return found[1]

    # by name: when the interpreter ends, this module's own may be gone before the tensor
    def gone(reference: Any, entries: dict[Any, Any] = _kept) -> None:
        now = entries.get(key)
        if now is not None and any(source[0] is reference for source in now[0]):
            del entries[key]

    def source(tensor: Tensor) -> _Source:
        if tensor.is_inference():
            return weakref.ref(tensor, gone), tensor.data_ptr(), 0, tensor.clone()
        return weakref.ref(tensor, gone), tensor.data_ptr(), tensor._version, None

    with torch.no_grad():
        made = make(*tensors, *rest)
        _kept[key] = [source(tensor) for tensor in tensors], made
    return made
