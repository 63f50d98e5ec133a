"""The table of one Linear + ReLU layer: every provider, shapes of real reward models, checked before it is timed.

    python benchmarks/linear.py [--quick] [--rows 1 16 ...] [--seconds 2] [--out FOLDER] [--no-compile]

Prints microseconds (median) and the ratio to fp32; writes one JSON object a cell. A provider whose result is wrong
gets no time. On a GPU the L2 cache is cold, a CUDA graph of every rival is listed beside it, and the rows also have
each call's parts (``apart``).
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measured import in_words, machine, work, write
from providers import graphs, providers, skipped
from torch import nn

from rewardzip.timing import Timing, apart, interleaved

# inputs, outputs: imitation's default, the usual MLP, AMP discriminators, reward heads of 7B language models
SHAPES = ((64, 64), (256, 256), (1024, 512), (4096, 4096))
ROWS = (1, 16, 256, 4096, 65536)

# the largest relative error, in the norm, that still counts as the same function: int8 weights on 16-bit rows
TOLERANCE = 0.03


def cells(
    shapes: Any, row_counts: Any, seconds: float, compile: bool
) -> Iterator[tuple[int, int, int, dict[str, Timing], dict[str, dict[str, float]], list[str]]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for k, n in shapes:
        layer = nn.Linear(k, n, device=device).requires_grad_(False)
        for m in row_counts:
            x = torch.randn(m, k, device=device)
            calls: dict[str, Callable[[], object]] = {}
            wrong = []
            exact = torch.relu(x.double() @ layer.weight.double().t() + layer.bias.double())
            made = providers(layer, x, compile)
            for name, call in (made | graphs(made, x)).items():
                try:
                    error = (call().double() - exact).norm() / exact.norm()
                except Exception as failure:  # what compiles at its first call fails there
                    skipped[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
                    continue
                if error <= TOLERANCE:
                    calls[name] = call
                else:
                    wrong.append(name)
            with torch.no_grad():
                taken = interleaved(calls, device, seconds)
                parts = {name: apart(call, device) for name, call in calls.items()} if device == "cuda" else {}
            yield k, n, m, taken, parts, wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a moment each")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a cell")
    parser.add_argument("--out", type=Path, help="folder for linear.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    options = parser.parse_args()
    shapes, row_counts, seconds = SHAPES, options.rows, options.seconds
    if options.quick:
        shapes, row_counts, seconds = ((24, 40),), (1, 20), 0.2
    told, rows = machine(), []
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    for k, n, m, taken, parts, wrong in cells(shapes, row_counts, seconds, not options.no_compile):
        base = taken["fp32"].p50
        print(f"\n{k} -> {n}, {m} rows")
        for name, t in taken.items():
            done = work(name, m, k + n, n * k, t.p50, told["device"], products="tf32")
            print(f"  {name:28} {t.p50 * 1e6:10.1f} us {base / t.p50:6.2f}x  {in_words(done)}")
            cell = {"op": "linear", "in": k, "out": n, "rows": m, "provider": name, **asdict(t), **parts.get(name, {})}
            rows.append(cell | done | told)
        for name in wrong:
            print(f"  {name:28} wrong result: not timed")
        if options.out:  # after every cell: whoever stops the run keeps what it has
            write(options.out / "linear.json", rows)
    for name, reason in sorted(skipped.items()):
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
