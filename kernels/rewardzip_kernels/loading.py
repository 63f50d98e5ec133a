"""The fast implementation of an op, imported on first use: neither Triton nor Numba is touched before it is needed."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

_found: dict[tuple[str, str], Callable[..., Any]] = {}

NEEDS = {"gpu": ("triton",), "cpu": ("numba", "llvmlite")}
OPS = (
    "quantize_rows",
    "int8_linear",
    "int8_dynamic_linear",
    "fused_mlp",
    "reward_head",
    "block_sparse_linear",
    "sparse24_linear",
    "sparse_rows_linear",
)


def implementation(device: str, op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """``rewardzip_kernels.<device>.<op>.<op>``, or the reference: with one warning where the compiler is missing."""
    try:
        return _found[device, op]
    except KeyError:
        pass
    module = f"{__package__}.{device}.{op}"
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), op)
    except ImportError as error:
        if error.name == module:  # this op has no kernel of its own for this device
            return _found.setdefault((device, op), reference)
        if (error.name or "").partition(".")[0] not in NEEDS[device]:
            raise
        warnings.warn(
            f"{NEEDS[device][0]} is not installed: {op} runs as plain torch on the {device.upper()}, "
            f"right but slow (pip install {NEEDS[device][0]})",
            RuntimeWarning,
            stacklevel=2,
        )
        function = reference
    _found[device, op] = function
    return function


def settled(device: torch.device, op: str, *arguments: Any) -> Callable[..., Any] | None:
    """A shorter way for eager calls of ``op`` that nobody listens to, where its implementation has one."""
    settle = getattr(_found.get(("cpu" if device.type == "cpu" else "gpu", op)), "settled", None)
    return settle(*arguments) if settle else None


def available() -> dict[str, dict[str, str]]:
    """For each op and device, what would run it; looks without importing."""
    return {op: {device: _how(device, op) for device in NEEDS} for op in OPS}


def _how(device: str, op: str) -> str:
    if importlib.util.find_spec(f"{__package__}.{device}.{op}") is None:
        return "torch"
    compiler = NEEDS[device][0]
    return compiler if importlib.util.find_spec(compiler) else f"torch ({compiler} is not installed)"
