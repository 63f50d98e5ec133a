"""Engines a user could run an MLP on a CPU with, each made from the same ``nn.Sequential`` nets (an ensemble: several).

A maker takes (nets, rows, threads) and returns a call; what is not installed here raises, and the reason is printed.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Nets = Sequence[nn.Sequential]
Call = Callable[[], Tensor]


def together(nets: Nets) -> Callable[[Tensor], Tensor]:
    """The nets' outputs, stacked where there are several."""
    return nets[0] if len(nets) == 1 else lambda x: torch.stack([net(x) for net in nets])


def eager(nets: Nets, x: Tensor, threads: int) -> Call:
    run = together(nets)
    return lambda: run(x)


def amp(nets: Nets, x: Tensor, threads: int) -> Call:
    run = together(nets)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    return call


def compiled(nets: Nets, x: Tensor, threads: int) -> Call:
    torch.compiler.reset()
    run = torch.compile(together(nets))
    return lambda: run(x)


def torch_ao(nets: Nets, x: Tensor, threads: int) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}, torch.qint8) for net in nets]
    run = together(made)
    return lambda: run(x)


def onnx_model(nets: Nets) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    nodes, tensors, ends = [], [], []
    for e, net in enumerate(nets):
        name = "x"
        for i, part in enumerate(net):
            here = f"{e}_{i}"
            if isinstance(part, nn.Linear):
                # MatMul and Add: what the quantisers of onnxruntime know best
                tensors += (numpy_helper.from_array(part.weight.t().contiguous().numpy(), f"w{here}"),)
                tensors += (numpy_helper.from_array(part.bias.numpy(), f"b{here}"),)
                nodes.append(helper.make_node("MatMul", [name, f"w{here}"], [f"m{here}"], f"matmul{here}"))
                nodes.append(helper.make_node("Add", [f"m{here}", f"b{here}"], [f"h{here}"], f"add{here}"))
            else:
                kind = {nn.ReLU: "Relu", nn.ELU: "Elu"}[type(part)]
                nodes.append(helper.make_node(kind, [name], [f"h{here}"], f"act{here}"))
            name = f"h{here}"
        ends.append(name)
    if len(ends) > 1:
        tensors.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "axis"))
        nodes += [helper.make_node("Unsqueeze", [end, "axis"], [f"u{end}"]) for end in ends]
        nodes.append(helper.make_node("Concat", [f"u{end}" for end in ends], ["y"], axis=0))
        ends = ["y"]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", nets[0][0].in_features]),
        helper.make_tensor_value_info(ends[0], TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "mlp", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quantised(nets: Nets) -> Any:
    """The same in int8 by onnxruntime's static quantiser, weights per channel, calibrated on normal rows."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = 16

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            return {"x": torch.randn(64, nets[0][0].in_features).numpy()} if self.left >= 0 else None

    logging.getLogger().setLevel(logging.ERROR)  # it advises at every call
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        onnx.save(onnx_model(nets), before)
        quantize_static(
            str(before), str(after), Rows(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(after)


def onnxruntime(model: Any, x: Tensor, threads: int) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows, name = x.numpy(), session.get_outputs()[0].name
    return lambda: torch.from_numpy(session.run([name], {"x": rows})[0])


def openvino(model: Any, x: Tensor, threads: int) -> Call:
    import io

    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    request = core.compile_model(core.read_model(io.BytesIO(model.SerializeToString())), "CPU", settings)
    request, rows = request.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([rows], share_inputs=True)[0])


# name: (maker, whether it rounds to 8 or 16 bits)
RIVALS: dict[str, tuple[Callable[[Nets, Tensor, int], Call], bool]] = {
    "fp32": (eager, False),
    "AMP bf16": (amp, True),
    "compile": (compiled, False),
    "onnxruntime": (lambda nets, x, t: onnxruntime(onnx_model(nets), x, t), False),
    "onnxruntime int8": (lambda nets, x, t: onnxruntime(quantised(nets), x, t), True),
    "OpenVINO int8": (lambda nets, x, t: openvino(quantised(nets), x, t), True),
    "torch.ao dynamic": (torch_ao, True),
}
