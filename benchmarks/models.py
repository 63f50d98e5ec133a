"""The table of whole reward models: swapped, against every way torch runs them; checked before it is timed.

    python benchmarks/models.py [--quick] [--models NAME ...] [--rows 1 1024 ...] [--out FOLDER] [--no-compile]

Prints microseconds (median of rivals in turn), the ratio to eager fp32, and what that is in GB/s and TFLOP/s of the
least there is to do; writes one JSON object a cell. On a GPU the L2 cache is cold, a CUDA graph of every rival is
listed beside it, and the rows also have each call's parts (``apart``). What cannot run here is named below the table.
tiny-cuda-nn is no column: its networks have no biases, so it cannot compute these.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from measured import in_words, machine, rows_dtype, work, write
from torch import Tensor, nn

import rewardzip as rz
from rewardzip.timing import apart, interleaved


@dataclass(frozen=True)
class Shape:
    """A reward network, or ``members`` of them; ``inputs`` are the widths of what it is given, state and action."""

    inputs: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: type[nn.Module] = nn.ReLU
    outputs: int = 1
    norm: bool = False
    members: int = 1


MODELS = {
    "32-64-64-1": Shape((24, 8), (64, 64)),
    "24-64-64-1": Shape((18, 6), (64, 64)),
    "23-256-256-1": Shape((17, 6), (256, 256)),
    "23-256-256-1 x 5": Shape((17, 6), (256, 256), members=5),
    "4096-4096-1": Shape((4096,), (4096,)),
    "125-1024-512-1": Shape((100, 25), (1024, 512)),
    "TD-MPC2 512-512-512-101": Shape((512,), (512, 512), nn.Mish, outputs=101, norm=True),
    "48-512-256-128-1 ELU": Shape((36, 12), (512, 256, 128), nn.ELU),
    "3584-3584-1": Shape((3584,), (3584,)),
    "393-256-256-1": Shape((376, 17), (256, 256)),
    "23-32-32-1": Shape((17, 6), (32, 32)),
    "48-256-128-1 ELU": Shape((36, 12), (256, 128), nn.ELU),
}
ROWS = (1, 32, 1024, 65536)

# multiply-adds a call; on a CPU, cells beyond it would take minutes
CPU_WORK = 1e11
# bytes of a hidden layer in float64, which the check keeps several of; on a GPU, cells beyond it would fill the memory
GPU_BYTES = 2e10
# beyond so many, launches are nothing beside the work, and each graph keeps memory of its own
GRAPH_ROWS = 65536

# the largest relative error, in the norm, that still counts as the same function
TOLERANCE = 0.05


# this one records CUDA graphs itself
REDUCED = "compile, reduce-overhead"


class Reward(nn.Module):
    """An MLP over its inputs, concatenated, with any activation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        sizes, parts = (sum(shape.inputs), *shape.hidden), []
        for a, b in zip(sizes, shape.hidden, strict=False):
            parts += [nn.Linear(a, b), *([nn.LayerNorm(b)] if shape.norm else []), shape.activation()]
        self.net = nn.Sequential(*parts, nn.Linear(sizes[-1], shape.outputs))

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.net(torch.cat(inputs, -1))
        return y.squeeze(-1) if self.shape.outputs == 1 else y


class Ensemble(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.members = nn.ModuleList(Reward(shape) for _ in range(shape.members))

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([member(*inputs) for member in self.members])


class Within(nn.Module):
    """A model whose calls happen within a context: a module, so that a CUDA graph of it can be had."""

    def __init__(self, model: nn.Module, context: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.context():
            return self.model(*inputs)


def amp(model: nn.Module, device: str, dtype: torch.dtype, grad: bool = False) -> nn.Module:
    """Mixed precision; with weights that require gradients autocast keeps what it has cast."""
    return Within(copy.deepcopy(model).requires_grad_(grad), partial(torch.autocast, device, dtype))


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def ours(model: nn.Module, config: rz.Int8 | rz.Fused, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = copy.deepcopy(model).to(dtype)
    return rz.fuse_ensemble(list(model.members), config) if isinstance(model, Ensemble) else rz.swap(model, config)


def providers(
    model: nn.Module, inputs: tuple[Tensor, ...], compile: bool, skipped: dict[str, str]
) -> dict[str, nn.Module]:
    """What can run here, by name, each to be given rows of its ``rows_dtype``; why others cannot goes to skipped."""
    device, half, brain = inputs[0].device.type, torch.float16, torch.bfloat16
    makers: dict[str, Callable[[], nn.Module]] = {
        "fp32": lambda: model,
        "AMP bf16": lambda: amp(model, device, brain),
        "AMP bf16, training": lambda: amp(model, device, brain, grad=True),
        "bf16": lambda: copy.deepcopy(model).to(brain),
        "rewardzip fused, bf16 rows": lambda: ours(model, rz.Fused(), brain),
        "rewardzip int8": lambda: ours(model, rz.Int8()),
        "rewardzip int8, fp16 rows": lambda: ours(model, rz.Int8(), half),
        "rewardzip int8, bf16 rows": lambda: ours(model, rz.Int8(), brain),
        "rewardzip int8 x int8": lambda: ours(model, rz.Int8(activations="dynamic")),
        "rewardzip int8, layers": lambda: rz.swap(model, rz.Int8(), fuse=False),
    }
    if device == "cuda":
        makers |= {
            "fp32, TF32": lambda: Within(model, tf32),
            "AMP fp16": lambda: amp(model, device, half),
            "AMP fp16, training": lambda: amp(model, device, half, grad=True),
            "fp16": lambda: copy.deepcopy(model).to(half),
        }
    if compile:
        torch.compiler.reset()  # after some shapes it would stop compiling
        modes = {"compile": "default"}
        if device == "cuda":
            modes |= {"compile, max-autotune": "max-autotune-no-cudagraphs", REDUCED: "reduce-overhead"}
        makers |= {
            name: lambda mode=mode: torch.compile(model, mode=mode, dynamic=False) for name, mode in modes.items()
        }
    made: dict[str, nn.Module] = {}

    def attempt(name: str, make: Callable[[], nn.Module]) -> None:
        try:
            made[name] = make()
        except Exception as failure:  # a rival that cannot run here is noted, not fatal
            skipped[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]

    for name, make in makers.items():
        attempt(name, make)
    for name in list(made) if device == "cuda" and len(inputs[0]) <= GRAPH_ROWS else ():
        if name != REDUCED:
            rows = tuple(x.to(rows_dtype(name)) for x in inputs)
            attempt(f"{name}, graph", partial(rz.capture, made[name], rows))
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one small model, a moment each")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, help="folder for models.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a cell")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told, written = machine(), []
    skipped: dict[str, str] = {}
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    for name in options.models[: 1 if options.quick else None]:
        shape = MODELS[name]
        model = (Ensemble(shape) if shape.members > 1 else Reward(shape)).to(device).eval().requires_grad_(False)
        weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        for rows in (1, 32) if options.quick else options.rows:
            if device == "cpu" and rows * weights > CPU_WORK:
                continue
            if device == "cuda" and 8 * rows * max(sum(shape.inputs), *shape.hidden) > GPU_BYTES:
                continue
            # one row's error says little: the check takes many
            many = tuple(torch.randn(max(rows, 256), k, device=device) for k in shape.inputs)
            exact = copy.deepcopy(model).double()(*[x.double() for x in many])
            print(f"\n{name}, {rows} rows", flush=True)
            calls = {}
            with torch.no_grad():
                for provider, call in providers(model, many, not options.no_compile, skipped).items():
                    given = [x.to(rows_dtype(provider)) for x in many]
                    timed = partial(call, *[x[:rows] for x in given])
                    try:
                        error = float((call(*given).double() - exact).norm() / exact.norm())
                        timed()
                    except Exception as failure:  # what compiles or records at its first call fails there
                        skipped[provider] = f"{type(failure).__name__}: {failure}".splitlines()[0]
                        continue
                    if not error <= TOLERANCE:
                        print(f"  {provider:28} wrong by {error:.2g}: not timed")
                        continue
                    calls[provider] = timed
                taken = interleaved(calls, device, 0.2 if options.quick else options.seconds)
                parts = {name: apart(call, device) for name, call in calls.items()} if device == "cuda" else {}
            values = sum(shape.inputs) + shape.outputs * shape.members
            for provider, t in taken.items():
                done = work(provider, rows, values, weights, t.p50, told["device"])
                print(
                    f"  {provider:28} {t.p50 * 1e6:10.1f} us {taken['fp32'].p50 / t.p50:6.2f}x  {in_words(done)}",
                    flush=True,
                )
                cell = {"op": "model", "model": name, "rows": rows, "provider": provider}
                written.append(cell | asdict(t) | parts.get(provider, {}) | done | told)
            if options.out:  # after every cell: whoever stops the run keeps what it has
                write(options.out / f"models-{options.threads}-threads.json", written)
    for name, reason in sorted(skipped.items()):
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
