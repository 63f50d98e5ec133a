"""The ops of rewardzip_kernels in ONNX: standard operators only, and int8 weights stay int8 in the file.

rows in floats      MatMul(x, Transpose(DequantizeLinear(int8_weight, scale)))
rows rounded        ``quantize_rows`` written out, then MatMulInteger: a scale per row, not one for the batch, so a
                    row's result does not depend on its neighbours, as DynamicQuantizeLinear's would
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardzip_kernels.quantize import QMAX, TINY

FLOAT, INT8, FLOAT16, BFLOAT16 = 1, 3, 10, 16  # of onnx.TensorProto
# where operators live that torch.onnx itself translates, or reports
KNOWN = ("aten", "prim", "prims", "_operator")
NARROW = (FLOAT16, BFLOAT16)


def need_onnx() -> Any:
    """(onnxscript's operators, onnxruntime), or an error that names the extra."""
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ImportError(
            "export to .onnx takes onnx, onnxscript and onnxruntime: pip install rewardzip[onnx]"
        ) from error
    assert onnx
    return onnxscript.opset18, onnxruntime


def _int8_linear(
    x: Any, weight: Any, scale: Any, bias: Any = None, activation: str = "none", compute_dtype: Any = None
) -> Any:
    op, _ = need_onnx()
    if activation != "none":
        raise ValueError(f"export: an int8_linear with the activation {activation!r} inside")
    rows = op.Cast(x, to=FLOAT)
    if compute_dtype in NARROW:
        rows = op.Cast(op.Cast(x, to=compute_dtype), to=FLOAT)
    columns = op.Transpose(op.DequantizeLinear(weight, scale, axis=0), perm=[1, 0])
    return _finish(op, op.MatMul(rows, columns), bias, x)


def _int8_dynamic_linear(
    x: Any, weight: Any, scale: Any, bias: Any = None, activation: str = "none", x_scale: Any = None
) -> Any:
    op, _ = need_onnx()
    if activation != "none":
        raise ValueError(f"export: an int8_dynamic_linear with the activation {activation!r} inside")
    rows = op.Cast(x, to=FLOAT)
    axis = op.Constant(value_ints=[-1])
    top = op.Constant(value_float=float(QMAX))
    if x_scale is None:
        amax = op.Max(op.ReduceMax(op.Abs(rows), axis, keepdims=1), op.Constant(value_float=TINY))
        step, inverse = op.Div(amax, top), op.Div(top, amax)
    else:
        step, inverse = x_scale, op.Reciprocal(x_scale)
    q = op.Clip(op.Round(op.Mul(rows, inverse)), op.Neg(top), top)
    sums = op.MatMulInteger(op.Cast(q, to=INT8), op.Transpose(weight, perm=[1, 0]))
    # zero for a row of finite values, NaN for another: what is computed from such a row is NaN
    poison = op.ReduceSum(op.Sub(rows, rows), axis, keepdims=1)
    y = op.Add(op.Mul(op.Cast(sums, to=FLOAT), op.Mul(step, scale)), poison)
    return _finish(op, y, bias, x)


def _finish(op: Any, y: Any, bias: Any, x: Any) -> Any:
    return op.CastLike(y if bias is None else op.Add(y, bias), x)


def translations() -> dict[Any, Callable[..., Any]]:
    ops = torch.ops.rewardzip
    return {ops.int8_linear.default: _int8_linear, ops.int8_dynamic_linear.default: _int8_dynamic_linear}


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Translate a traced model into a file."""
    need_onnx()
    table = translations()
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "aten") not in KNOWN and node.target not in table:
            raise ValueError(f"export: {layer_of(node)} uses {node.target}, which has no form in ONNX here")
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _translate(program, table)
    finally:
        logger.setLevel(level)
    # stack traces of this machine
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()
    made.save(str(path), external_data=False)


def _translate(program: torch.export.ExportedProgram, table: dict[Any, Any]) -> Any:
    try:
        return torch.onnx.export(program, dynamo=True, custom_translation_table=table, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        told = str(error.__cause__ or error)
        # torch.onnx takes ops apart first: special_bessel_j0 is bessel_j0 by then
        name = re.search(r"%(\w+) :", told)
        nodes = [node for node in program.graph.nodes if name and f"_{node.name}".endswith(f"_{name[1]}")]
        where = f"{layer_of(nodes[0])} uses {nodes[0].target}" if nodes else told.splitlines()[0]
        raise ValueError(f"export: {where}, which has no form in ONNX") from error


def layer_of(node: torch.fx.Node) -> str:
    """The layer whose code a node comes from, by its name and class."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "the model"
    path, kind = stack[-1]
    name = path.removeprefix("L['self']").removeprefix(".")
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"layer {name!r} ({kind.rpartition('.')[2]})" if name else f"the model ({kind.rpartition('.')[2]})"


def run_onnx(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What onnxruntime makes of the file on the CPU."""
    _, onnxruntime = need_onnx()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, fed)]
