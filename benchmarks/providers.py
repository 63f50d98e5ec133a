"""What a user could run a Linear + ReLU layer on: this package's forms, dense torch in all its settings, and rivals.

A provider takes (dense layer, rows) and returns a call, or None where it cannot run here; a reason goes to ``skipped``.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewardzip.capture import record
from rewardzip.nn import Int8Linear

Call = Callable[[], Tensor]
skipped: dict[str, str] = {}


def dense(layer: nn.Linear, x: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    weight, bias, rows = layer.weight.to(dtype), layer.bias.to(dtype), x.to(dtype)
    return lambda: torch.relu(F.linear(rows, weight, bias))


def tf32(layer: nn.Linear, x: Tensor) -> Call | None:
    if not x.is_cuda:
        return None
    call = dense(layer, x)

    def run() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def amp(layer: nn.Linear, x: Tensor, dtype: torch.dtype, grad: bool) -> Call:
    weight, bias = layer.weight.detach().requires_grad_(grad), layer.bias.detach().requires_grad_(grad)

    def run() -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return torch.relu(F.linear(x, weight, bias))

    return run


def compiled(layer: nn.Linear, x: Tensor, mode: str) -> Call:
    function = torch.compile(lambda rows, w, b: torch.relu(F.linear(rows, w, b)), mode=mode)
    return lambda: function(x, layer.weight, layer.bias)


def int8(layer: nn.Linear, x: Tensor, rows: Any, dtype: torch.dtype = torch.float32, compute: Any = None) -> Call:
    packed = Int8Linear.from_linear(layer, rows=rows, compute_dtype=compute)
    x = x.to(dtype)
    return lambda: packed(x, "relu")


def torchao_int8(layer: nn.Linear, x: Tensor) -> Call | None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features), nn.ReLU()).to(x.device, torch.bfloat16)
    model[0].load_state_dict(layer.state_dict())
    quantize_(model, Int8WeightOnlyConfig())
    model, rows = torch.compile(model), x.to(torch.bfloat16)
    return lambda: model(rows)


def gemlite_int8(layer: nn.Linear, x: Tensor) -> Call:
    from gemlite import helper

    make = getattr(helper, "A16W8_INT8", None) or helper.A16W8  # by its version
    packed, rows = make(device=str(x.device)).from_linear(copy.deepcopy(layer).half()), x.half()
    return lambda: torch.relu(packed(rows))


def bitsandbytes_int8(layer: nn.Linear, x: Tensor) -> Call:
    from bitsandbytes.nn import Linear8bitLt

    packed = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    packed.load_state_dict(copy.deepcopy(layer).half().state_dict())
    packed, rows = packed.to(x.device), x.half()
    return lambda: torch.relu(packed(rows))


def providers(layer: nn.Linear, x: Tensor, compile: bool = True) -> dict[str, Call]:
    """Every provider that can run here, by name; ours begin with ``rewardzip``."""
    gpu = x.is_cuda
    makers: dict[str, Callable[[], Call | None]] = {
        "fp32": lambda: dense(layer, x),
        "fp32, TF32": lambda: tf32(layer, x),
        "AMP bf16": lambda: amp(layer, x, torch.bfloat16, False),
        "AMP bf16, training": lambda: amp(layer, x, torch.bfloat16, True),
        "AMP fp16": lambda: amp(layer, x, torch.float16, False) if gpu else None,
        "bf16": lambda: dense(layer, x, torch.bfloat16),
        "fp16": lambda: dense(layer, x, torch.float16),
        "compile": lambda: compiled(layer, x, "default") if compile else None,
        "compile, reduce-overhead": lambda: compiled(layer, x, "reduce-overhead") if compile and gpu else None,
        "compile, max-autotune": lambda: compiled(layer, x, "max-autotune") if compile and gpu else None,
        "torchao int8": lambda: torchao_int8(layer, x) if compile else None,
        "gemlite int8": lambda: gemlite_int8(layer, x) if gpu else None,
        "bitsandbytes int8": lambda: bitsandbytes_int8(layer, x) if gpu else None,
        "rewardzip int8": lambda: int8(layer, x, "float"),
        "rewardzip int8, bf16 rows": lambda: int8(layer, x, "float", torch.bfloat16) if gpu else None,
        "rewardzip int8 x int8": lambda: int8(layer, x, "dynamic"),
    }
    made = {}
    for name, make in makers.items():
        try:
            call = make()
        except Exception as error:  # a rival that cannot run here is noted, not fatal
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if call is None:
            skipped.setdefault(name, "not for this machine, or not installed")
        else:
            made[name] = call
    return made


# these record CUDA graphs of their own
RECORDED = ("compile, reduce-overhead", "compile, max-autotune")


def graphs(made: dict[str, Call], x: Tensor) -> dict[str, Call]:
    """A CUDA graph of every call that has none yet, on a GPU."""
    found = {}
    for name, call in made.items() if x.is_cuda else ():
        if name not in RECORDED:
            try:
                found[f"{name}, graph"] = graph(call, x)
            except Exception as error:
                skipped[f"{name}, graph"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def graph(call: Call, x: Tensor) -> Call:
    replay, y = record(lambda _: call(), [x])

    def run() -> Tensor:
        replay()
        return y

    return run
