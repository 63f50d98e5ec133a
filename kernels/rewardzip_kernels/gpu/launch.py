"""Launching a Triton kernel for less than Triton's own launcher costs.

Triton works out on every call which compiled variant its arguments select. Here the caller names that with a key, once
per layer and batch class, and later calls go straight to the compiled kernel. The key must hold all that specialises:
the kernel, the device, every dtype, pointer alignment, the integers Triton looks at, and the constants.
"""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

_compiled: dict[tuple[Hashable, ...], Any] = {}


def aligned(*tensors: Tensor | None) -> bool | tuple[bool, ...]:
    """True where all start on 16 bytes, as what torch allocates does; otherwise each one's own answer."""
    bits = 0
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr()
    return True if bits % 16 == 0 else tuple(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def interpret(kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Triton's interpreter, where TRITON_INTERPRET=1 was set before the kernels were imported."""
    kernel[grid](*args, **options)


# what a launch on anything but a GPU does, returning a compiled kernel or None; the audit records it instead
off_gpu = interpret


def launch(kernel: Any, grid: tuple[int, int, int], key: tuple[Hashable, ...], args: tuple[Any, ...], **options: Any):
    """Run ``kernel`` over ``grid``; ``args`` are all its parameters in order, ``options`` those of the compiler."""
    device = args[0].device
    key = (kernel, device.index, *key)
    compiled = _compiled.get(key)
    if compiled is None or knobs.runtime.launch_enter_hook.calls:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            compiled = (
                (kernel[grid](*args, **options)) if device.type == "cuda" else off_gpu(kernel, grid, args, options)
            )
        if compiled is not None:
            _compiled[key] = compiled
    elif device.index == torch.cuda.current_device():
        _run(compiled, grid, device.index, args)
    else:
        with torch.cuda.device(device):
            _run(compiled, grid, device.index, args)


def settled(
    kernel: Any, grid: tuple[int, int, int], key: tuple[Hashable, ...], device: torch.device
) -> Callable[..., bool] | None:
    """The launch of what ``launch`` has compiled, as a function of the arguments: it gives False, and does nothing,
    where another device is current or a profiler listens."""
    compiled = _compiled.get((kernel, device.index, *key))
    if compiled is None:
        return None
    run, function, metadata, index = compiled.run, compiled.function, compiled.packed_metadata, device.index
    runtime, (across, down, deep) = knobs.runtime, grid

    def go(*args: Any) -> bool:
        if runtime.launch_enter_hook.calls or index != torch.cuda.current_device():
            return False
        run(across, down, deep, current_stream(index), function, metadata, None, None, None, *args)
        return True

    return go


def current_stream(device: int) -> int:
    stream: int = triton.runtime.driver.active.get_current_stream(device)
    return stream


def _run(compiled: Any, grid: tuple[int, int, int], device: int, args: tuple[Any, ...]) -> None:
    stream = current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
