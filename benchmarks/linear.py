"""The table of one Linear + ReLU layer: every provider, shapes of real reward models, checked before it is timed.

    python benchmarks/linear.py [--quick] [--out FOLDER] [--no-compile]

Prints microseconds (median) and the ratio to fp32; writes one JSON object a cell. A provider whose result is wrong
gets no time.
"""

import argparse
import json
import platform
import subprocess
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from providers import providers, skipped
from static_evidence import roofline
from torch import nn

from rewardzip.timing import apart, interleaved

# inputs, outputs: imitation's default, the usual MLP, AMP discriminators, reward heads of 7B language models
SHAPES = ((64, 64), (256, 256), (1024, 512), (4096, 4096))
ROWS = (1, 16, 256, 4096, 65536)

# the largest relative error, in the norm, that still counts as the same function: int8 weights on 16-bit rows
TOLERANCE = 0.03


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {name.strip(): value.strip() for name, value in fields.items()}
    name = told.get("model name", platform.machine())
    return f"{name} (family {told['cpu family']})" if "cpu family" in told else name


def machine() -> dict[str, str]:
    found = {"device": _processor(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        found |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "driver, clocks": told}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return found | {"commit": commit, "date": str(date.today()), "threads": str(torch.get_num_threads())}


def cells(shapes, row_counts, seconds: float, compile: bool):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for k, n in shapes:
        layer = nn.Linear(k, n, device=device).requires_grad_(False)
        for m in row_counts:
            x = torch.randn(m, k, device=device)
            calls, wrong = {}, []
            exact = torch.relu(x.double() @ layer.weight.double().t() + layer.bias.double())
            for name, call in providers(layer, x, compile).items():
                error = (call().double() - exact).norm() / exact.norm()
                if error <= TOLERANCE:
                    calls[name] = call
                else:
                    wrong.append(name)
            with torch.no_grad():
                taken = interleaved(calls, device, seconds)
                parts = {name: apart(call, device) for name, call in calls.items()} if device == "cuda" else {}
            yield k, n, m, taken, parts, wrong


def work(name: str, m: int, n: int, k: int, seconds: float, device: str) -> tuple[int, int, float | None]:
    """(bytes a provider's tensors have, operations, the roofline's share of its time where the device's is known)."""
    narrow = name in ("bf16", "fp16") or name.endswith("bf16 rows")
    row, weight = 2 if narrow else 4, 1 if "int8" in name else 2 if narrow else 4
    moved, operations = m * k * row + n * k * weight + m * n * row, 2 * m * n * k
    kind = "int8" if "int8 x int8" in name else "16 bit" if narrow or "AMP" in name else "tf32"
    floor = roofline(device, moved, operations, kind)
    return moved, operations, None if floor is None else floor / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a moment each")
    parser.add_argument("--out", type=Path, help="folder for linear.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    options = parser.parse_args()
    shapes, row_counts = (((24, 40),), (1, 20)) if options.quick else (SHAPES, ROWS)
    told, rows = machine(), []
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    for k, n, m, taken, parts, wrong in cells(
        shapes, row_counts, 0.2 if options.quick else 2.0, not options.no_compile
    ):
        base = taken["fp32"].p50
        print(f"\n{k} -> {n}, {m} rows")
        for name, t in taken.items():
            moved, operations, share = work(name, m, n, k, t.p50, told["device"])
            speed = f"{moved / t.p50 / 1e9:8.1f} GB/s {operations / t.p50 / 1e12:8.3f} TFLOP/s"
            print(f"  {name:28} {t.p50 * 1e6:10.1f} us {base / t.p50:6.2f}x  {speed}")
            cell = {"op": "linear", "in": k, "out": n, "rows": m, "provider": name, **asdict(t), **parts.get(name, {})}
            rows.append(cell | {"bytes": moved, "operations": operations, "roofline": share} | told)
        for name in wrong:
            print(f"  {name:28} wrong result: not timed")
    for name, reason in sorted(skipped.items()):
        print(f"not run: {name}: {reason}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "linear.json").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
