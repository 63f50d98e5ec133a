"""Whole reward MLPs on a CPU: fused_mlp in int8 and with fp32 rows beside what else a user could run.

    python benchmarks/cpu_mlp.py [--quick] [--seconds 1] [--out FOLDER]

Medians of one call, all rivals in turn; a result further than 3 % of the outputs' spread from float64, in the
norm, is not timed (12 % for a single row, which may be an unlucky one).
"""

import argparse
import itertools
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardzip.timing import interleaved
from rewardzip_kernels import fused_mlp, quantize_rows
from rewardzip_kernels.mlp_layout import Linear, pack

NETS = (((24, 64, 64, 1), "relu"), ((23, 32, 32, 1), "relu"), ((393, 256, 256, 1), "relu"), ((48, 256, 128, 1), "elu"))
ROWS = (1, 32, 1024, 65536)
MODULES = {"relu": nn.ReLU, "elu": nn.ELU}
TOLERANCE = 0.03

Call = Callable[[], Tensor]


def dense(widths: tuple[int, ...], activation: str) -> nn.Sequential:
    parts: list[nn.Module] = []
    for k, n in itertools.pairwise(widths):
        parts += nn.Linear(k, n), MODULES[activation]()
    return nn.Sequential(*parts[:-1]).requires_grad_(False)


def packed(model: nn.Sequential, activation: str) -> tuple[Tensor, Tensor, str]:
    linears = [part for part in model if isinstance(part, nn.Linear)]
    member = []
    for linear in linears[:-1]:
        weight, scale = quantize_rows(linear.weight)
        member.append(Linear(weight, linear.bias, scale))
    member.append(Linear(linears[-1].weight, linears[-1].bias))
    hidden = "".join(f"{linear.out_features} {activation}, " for linear in linears[:-1])
    layers = f"{linears[0].in_features}: {hidden}{linears[-1].out_features}"
    return *pack([member], layers), layers


def amp(model: nn.Sequential, x: Tensor) -> Call:
    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)  # type: ignore[no-any-return]

    return run


def onnx(model: nn.Sequential, x: Tensor, threads: int) -> Call | None:
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    nodes, tensors, name = [], [], "x"
    for i, part in enumerate(model):
        if isinstance(part, nn.Linear):
            tensors += (
                numpy_helper.from_array(part.weight.numpy(), f"w{i}"),
                numpy_helper.from_array(part.bias.numpy(), f"b{i}"),
            )
            nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], [f"h{i}"], transB=1))
        else:
            nodes.append(helper.make_node({nn.ReLU: "Relu", nn.ELU: "Elu"}[type(part)], [name], [f"h{i}"]))
        name = f"h{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", name)]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], tensors)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    session, rows = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]), x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": rows})[0])


def rivals(model: nn.Sequential, activation: str, x: Tensor, threads: int) -> dict[str, Call]:
    net, kept = packed(model, activation), [x]
    calls: dict[str, Call | None] = {
        "eager fp32": lambda: model(x),
        "AMP bf16": amp(model, x),
        "onnxruntime": onnx(model, x, threads),
        "int8": lambda: fused_mlp(kept, *net, None, "none", torch.int8),
        "fp32 rows": lambda: fused_mlp(kept, *net, None, "none", torch.float32),
    }
    if shutil.which("g++"):
        torch.compiler.reset()
        compiled = torch.compile(model)
        calls["compile"] = lambda: compiled(x)
    return {name: call for name, call in calls.items() if call is not None}


def cells(nets, row_counts, seconds: float) -> Iterator[dict[str, object]]:
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for widths, activation in nets:
            model = dense(widths, activation)
            for m in row_counts:
                x = torch.randn(m, widths[0])
                exact = model.double()(x.double())
                model.float()
                calls = rivals(model, activation, x, threads)
                spread = model(torch.randn(1000, widths[0])).std() * (m**0.5 if m > 1 else 4)
                with torch.inference_mode():
                    right = {n: c for n, c in calls.items() if (c().double() - exact).norm() <= TOLERANCE * spread}
                    taken = interleaved(right, "cpu", seconds)
                name = "-".join(map(str, widths)) + ("" if activation == "relu" else f" {activation}")
                yield {
                    "net": name,
                    "rows": m,
                    "threads": threads,
                    "us": {n: t.p50 * 1e6 for n, t in taken.items()},
                    "wrong": sorted(set(calls) - set(right)),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small network, a moment each")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each line of the table")
    parser.add_argument("--out", type=Path, help="folder for cpu_mlp.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    told = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    nets, row_counts, seconds = (NETS[1:2], (1, 32), 0.1) if options.quick else (NETS, ROWS, options.seconds)
    columns = ("eager fp32", "AMP bf16", "compile", "onnxruntime", "fp32 rows", "int8")
    print("  ".join(f"{k}: {v}" for k, v in told.items()), "  (us; -: not here, or a wrong result)")
    print(
        f"{'network':>17} {'rows':>6} {'threads':>7}",
        *(f"{c:>12}" for c in columns),
        f"{'int8 vs eager':>14} {'vs best':>8}",
    )
    lines = []
    for cell in cells(nets, row_counts, seconds):
        us: dict[str, float] = cell["us"]  # type: ignore[assignment]
        best = min(us[c] for c in columns[:4] if c in us)
        times = (f"{us[c]:12.1f}" if c in us else f"{'-':>12}" for c in columns)
        ratios = f"{us['eager fp32'] / us['int8']:13.2f}x {best / us['int8']:7.2f}x" if "int8" in us else "wrong"
        print(f"{cell['net']:>17} {cell['rows']:>6} {cell['threads']:>7}", *times, ratios, flush=True)
        lines.append(json.dumps(cell | told))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cpu_mlp.json").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
