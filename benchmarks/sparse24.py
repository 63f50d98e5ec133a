"""One linear layer with ReLU, pruned: the 2:4 and the compressed-row forms beside dense ones, on one thread by default.

    python benchmarks/sparse24.py [--sizes 256 ...] [--rows 1 ...] [--patterns "2:4" ...] [--seconds 0.3] [--out FILE]
                                  [--quick]

2:4 pruning for the 2:4 forms, random pruning at 95, 98 and 99 % for the others; every result is checked against float64
before it is timed. One thread is timed by its processor time, which other work on the machine hardly touches; a GPU by
its events, the L2 cache overwritten before each call, and there this package's forms take fp16 rows. A line a cell:
microseconds of dense fp32 (on a GPU fp16), and how many times faster each of the others is. The JSON objects count as
read and multiplied what a form stores.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from measured import Weights, csr_weights, halved_weights, machine, weights_of, work
from torch import Tensor, nn

from rewardzip.nn import Int8Linear, Sparse24Linear, SparseRowsLinear
from rewardzip.timing import interleaved

TOLERANCE = 0.03
# what takes fp32 rows on a GPU as well
FLOAT32 = ("fp32", "AMP bf16", "torch CSR")
PATTERNS = ("2:4", "95 %", "98 %", "99 %")


def pruned(n: int, k: int, pattern: str, device: str) -> nn.Linear:
    layer = nn.Linear(k, n, device=device).requires_grad_(False)
    if pattern == "2:4":
        order = layer.weight.abs().view(n, -1, 4).argsort(2).argsort(2)
        layer.weight *= (order >= 2).view(n, k)
    else:
        layer.weight *= torch.rand(n, k, device=device) >= float(pattern.split()[0]) / 100
    return layer


Form = tuple[Callable[[Tensor], Tensor], Weights | int]


def forms(layer: nn.Linear, pattern: str) -> dict[str, Form]:
    """What the layer can be, each made once: rows in, ReLU out, and its weights."""

    def eager(x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, layer.weight, layer.bias))

    def mixed(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return torch.relu(F.linear(x, layer.weight, layer.bias))

    packed: dict[str, nn.Module] = {
        "int8": Int8Linear.from_linear(layer),
        "int8 x int8": Int8Linear.from_linear(layer, rows="dynamic"),
    }
    count = layer.weight.numel()
    found: dict[str, Form] = {"fp32": (eager, count), "AMP bf16": (mixed, count)}
    if pattern == "2:4":
        packed |= {
            "2:4 int8": Sparse24Linear.from_linear(layer),
            "2:4 int8 x int8": Sparse24Linear.from_linear(layer, rows="dynamic"),
            "2:4 fp16": Sparse24Linear.from_linear(layer, "float16"),
            "2:4 bf16": Sparse24Linear.from_linear(layer, "bfloat16"),
        }
    else:
        packed |= {
            "rows int8": SparseRowsLinear.from_linear(layer),
            "rows fp32": SparseRowsLinear.from_linear(layer, "float32"),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR a beta
            csr = layer.weight.to_sparse_csr()
        found["torch CSR"] = (lambda x: torch.relu((csr @ x.t()).t() + layer.bias), csr_weights(csr))
    if layer.weight.is_cuda:
        weight, bias = layer.weight.half(), layer.bias.half()
        found["fp16"] = (lambda x: torch.relu(F.linear(x, weight, bias)), count)
        if pattern == "2:4":
            del packed["2:4 bf16"]
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            kept = halved_weights(weight)
            found["torch 2:4 fp16"] = (lambda x: torch.relu(F.linear(x, sparse, bias)), kept)
    return found | {name: (lambda x, form=form: form(x, "relu"), weights_of(form)) for name, form in packed.items()}


def cells(
    sizes: list[int],
    row_counts: list[int],
    patterns: list[str],
    seconds: float,
    clock: Callable[[], float],
    device: str,
    told: dict[str, str],
) -> Iterator[dict[str, object]]:
    for size in sizes:
        for pattern in patterns:
            layer = pruned(size, size, pattern, device)
            known = forms(layer, pattern)
            exact_weight, exact_bias = layer.weight.double(), layer.bias.double()
            for m in row_counts:
                x = torch.randn(m, size, device=device)
                # of many rows the first are enough to tell
                exact = F.relu(F.linear(x[:64].double(), exact_weight, exact_bias))
                calls, types = {}, {}
                for name, (form, _) in known.items():
                    rows = x if device == "cpu" or name in FLOAT32 else x.half()
                    try:
                        error = float((form(rows)[:64].double() - exact).norm() / exact.norm())
                    except RuntimeError as failed:  # a rival that does not take such rows
                        print(f"{size} {pattern} {m} {name}: {failed}".splitlines()[0])
                        continue
                    if error <= TOLERANCE:
                        calls[name], types[name] = (lambda form=form, rows=rows: form(rows)), rows.dtype
                    else:
                        print(f"{size} {pattern} {m} {name}: wrong result ({error:.1e}), not timed")
                with torch.no_grad():
                    taken = interleaved(calls, device, seconds, clock)
                against = "fp32" if device == "cpu" else "fp16"
                base = taken[against].p50
                ratios = "  ".join(f"{name} {base / t.p50:.2f}x" for name, t in taken.items() if name != against)
                print(f"{size} {pattern:5} {m:5} rows  {base * 1e6:10.1f} us  {ratios}", flush=True)
                for name, t in taken.items():
                    done = work(name, m, 2 * size, known[name][1], t.p50, told["device"], dtype=types[name])
                    cell = {"op": "sparse", "size": size, "pattern": pattern, "rows": m, "provider": name}
                    yield cell | asdict(t) | done | told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32, 256, 1024])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each line of the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to add a JSON object a measurement to")
    parser.add_argument("--quick", action="store_true", help="one tiny size, a moment each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes, rows, seconds = options.sizes, options.rows, options.seconds
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    if options.quick:
        sizes, rows, seconds = [64], [1, 20], 0.05
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = machine()
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    for cell in cells(sizes, rows, options.patterns, seconds, clock, device, told):
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")


if __name__ == "__main__":
    main()
