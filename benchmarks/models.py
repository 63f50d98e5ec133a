"""The table of whole reward models: swapped, against every way torch runs them; checked before it is timed.

    python benchmarks/models.py [--quick] [--rows 1 1024 ...] [--out FOLDER] [--no-compile] [--threads N]

Prints microseconds (median of rivals in turn), the ratio to eager fp32, and what that is in GB/s and TFLOP/s of the
least there is to do; writes one JSON object a cell. On a GPU the L2 cache is cold, a CUDA graph of every rival is
listed beside it, and the rows also have each call's parts (``apart``). tiny-cuda-nn is no column: its networks have no
biases, so it cannot compute these.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from linear import machine
from static_evidence import roofline
from torch import Tensor, nn

import rewardzip as rz
from rewardzip.timing import apart, interleaved

# name: inputs (state, action), hidden widths, activation
MODELS = {
    "23-32-32-1": ((17, 6), (32, 32), nn.ReLU),
    "24-64-64-1": ((18, 6), (64, 64), nn.ReLU),
    "23-256-256-1": ((17, 6), (256, 256), nn.ReLU),
    "48-256-128-1 ELU": ((36, 12), (256, 128), nn.ELU),
    "393-256-256-1": ((376, 17), (256, 256), nn.ReLU),
    "125-1024-512-1": ((100, 25), (1024, 512), nn.ReLU),
    "4096-4096-1": ((4000, 96), (4096,), nn.ReLU),
}
ROWS = (1, 32, 1024, 65536)

# multiply-adds a call; on a CPU, cells beyond it would take minutes
CPU_WORK = 1e11
# bytes of a hidden layer in float64, which the check keeps several of; on a GPU, cells beyond it would fill the memory
GPU_BYTES = 2e10

# the largest relative error, in the norm, that still counts as the same function
TOLERANCE = 0.05


class Reward(nn.Module):
    """A reward of (state, action) with any activation."""

    def __init__(self, inputs: tuple[int, int], hidden: tuple[int, ...], activation: type[nn.Module]) -> None:
        super().__init__()
        sizes = (sum(inputs), *hidden)
        layers = [part for a, b in zip(sizes, hidden, strict=False) for part in (nn.Linear(a, b), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([state, action], -1)).squeeze(-1)


def amp(model: nn.Module, device: str, dtype: torch.dtype, grad: bool = False) -> Callable[..., Tensor]:
    """Mixed precision; with weights that require gradients autocast keeps what it has cast."""
    model = copy.deepcopy(model).requires_grad_(grad)

    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return model(*inputs)

    return run


def tf32(model: nn.Module) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return model(*inputs)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def half(model: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    narrow = copy.deepcopy(model).to(dtype)
    return lambda *inputs: narrow(*[x.to(dtype) for x in inputs])


def providers(model: nn.Module, inputs: tuple[Tensor, ...], compile: bool) -> dict[str, Callable[..., Tensor]]:
    device = inputs[0].device.type
    made = {
        "fp32": model,
        "AMP bf16": amp(model, device, torch.bfloat16),
        "AMP bf16, training": amp(model, device, torch.bfloat16, grad=True),
        "bf16": half(model, torch.bfloat16),
        "rewardzip int8": rz.swap(model, rz.Int8()),
        "rewardzip int8 x int8": rz.swap(model, rz.Int8(activations="dynamic")),
        "rewardzip int8, layers": rz.swap(model, rz.Int8(), fuse=False),
    }
    if device == "cuda":
        made["fp32, TF32"] = tf32(model)
        made |= {"AMP fp16": amp(model, device, torch.float16), "fp16": half(model, torch.float16)}
    if compile:
        made["compile"] = torch.compile(model)
        if device == "cuda":
            made["compile, max-autotune"] = torch.compile(model, mode="max-autotune-no-cudagraphs")
    if device == "cuda":
        made |= {
            f"{name}, graph": rz.capture(call, inputs) for name, call in made.items() if isinstance(call, nn.Module)
        }
    return made


def work(name: str, model: nn.Module, inputs: tuple[Tensor, ...], seconds: float, device: str) -> dict[str, Any]:
    """The least a provider could do: read the rows and its weights once, write the rewards, multiply. With the
    roofline's share of its time, where the device's is known."""
    rows, name = inputs[0].shape[0], name.removesuffix(", graph")
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    byte = 1 if "int8" in name else 2 if name in ("bf16", "fp16") else 4
    moved = sum(x.numel() * x.element_size() for x in inputs) + 4 * rows + byte * sum(weights)
    operations = 2 * rows * sum(weights)
    kind = "int8" if "int8 x int8" in name else "16 bit" if "int8" in name or "16" in name else "tf32"
    floor = roofline(device, moved, operations, kind)
    return {"bytes": moved, "operations": operations, "roofline": None if floor is None else floor / seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one small model, a moment each")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, help="folder for models.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a cell")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = list(MODELS)[:1] if options.quick else list(MODELS)
    told, written = machine(), []
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    for name in names:
        sizes, hidden, activation = MODELS[name]
        model = Reward(sizes, hidden, activation).to(device).eval().requires_grad_(False)
        for rows in (1, 32) if options.quick else options.rows:
            weights = sum(p.numel() for p in model.parameters())
            if device == "cpu" and rows * weights > CPU_WORK:
                continue
            if device == "cuda" and 8 * rows * max(sum(sizes), *hidden) > GPU_BYTES:
                continue
            inputs = tuple(torch.randn(rows, k, device=device) for k in sizes)
            # one row's error says little: the check takes many
            many = tuple(torch.randn(max(rows, 256), k, device=device) for k in sizes)
            exact = copy.deepcopy(model).double()(*[x.double() for x in many])
            print(f"\n{name}, {rows} rows")
            with torch.no_grad():
                calls = {}
                for provider, call in providers(model, many, not options.no_compile).items():
                    error = float((call(*many).double() - exact).norm() / exact.norm())
                    if error > TOLERANCE:
                        print(f"  {provider:28} wrong by {error:.2g}: not timed")
                        continue
                    calls[provider] = partial(call, *inputs)
                taken = interleaved(calls, device, 0.2 if options.quick else options.seconds)
                parts = {name: apart(call, device) for name, call in calls.items()} if device == "cuda" else {}
            for provider, t in taken.items():
                least = work(provider, model, inputs, t.p50, told["device"])
                speed = f"{least['bytes'] / t.p50 / 1e9:8.1f} GB/s {least['operations'] / t.p50 / 1e12:8.3f} TFLOP/s"
                share = "" if least["roofline"] is None else f"  {least['roofline']:4.0%} of the roofline"
                print(f"  {provider:28} {t.p50 * 1e6:10.1f} us {taken['fp32'].p50 / t.p50:6.2f}x  {speed}{share}")
                cell = {"op": "model", "model": name, "rows": rows, "provider": provider}
                written.append(cell | asdict(t) | parts.get(provider, {}) | least | told)
            if options.out:  # after every cell: whoever stops the run keeps what it has
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"models-{options.threads}-threads.json").write_text(
                    "\n".join(json.dumps(row) for row in written) + "\n"
                )


if __name__ == "__main__":
    main()
