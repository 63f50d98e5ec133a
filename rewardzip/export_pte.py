"""The ops of rewardzip_kernels for ExecuTorch, in plain functional torch; int8 weights stay int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardzip_kernels.quantize import QMAX, TINY


def need_executorch() -> Any:
    """(lower, Runtime), or an error that says what to install."""
    try:
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime
    except ImportError as error:
        raise ImportError("export to .pte takes ExecuTorch: pip install executorch") from error
    return to_edge_transform_and_lower, Runtime


def _int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Any = None, activation: str = "none", compute: Any = None
) -> Tensor:
    rows = x.float() if compute is None else x.to(compute).float()
    y = (rows @ weight.float().t()) * scale
    return (y if bias is None else y + bias).to(x.dtype)


def _int8_dynamic_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Any = None, activation: str = "none", x_scale: Any = None
) -> Tensor:
    rows = x.float()
    amax = rows.abs().amax(-1, keepdim=True).clamp(min=TINY)
    step, inverse = (amax / QMAX, QMAX / amax) if x_scale is None else (x_scale, 1.0 / x_scale)
    # fp32 holds these integers and, up to 1040 inputs, their sums
    q = (rows * inverse).round().clamp(-QMAX, QMAX)
    y = (q @ weight.float().t()) * (step * scale)
    return (y if bias is None else y + bias).to(x.dtype)


def write_pte(program: torch.export.ExportedProgram, path: Path) -> None:
    lower, _ = need_executorch()
    ops = torch.ops.rewardzip
    table = {ops.int8_linear.default: _int8_linear, ops.int8_dynamic_linear.default: _int8_dynamic_linear}
    program = program.run_decompositions({**torch.export.default_decompositions(), **table})
    path.write_bytes(lower(program).to_executorch().buffer)


def run_pte(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    _, runtime = need_executorch()
    method = runtime.get().load_program(path).load_method("forward")
    return list(method.execute([x.contiguous() for x in inputs]))
