"""The CPU table: compressed MLPs beside every engine a user could pick, rivals in turn, checked before they are timed.

    python benchmarks/cpu.py [--threads N ...] [--quick] [--out FOLDER]
    python benchmarks/cpu.py --table FILE

Prints microseconds (median of one call), and how many times faster than its best rival RewardZip is: ``rz.Fused()``
among what computes in fp32, the better of its two int8 forms among what rounds to 8 or 16 bits. A result further than
5 % of float64's, in the norm over 256 rows or more, gets no time. Writes one JSON object a cell and provider;
``--table`` prints such a file as the documentation has it.
"""

import argparse
import copy
import json
import platform
import warnings
from dataclasses import asdict
from itertools import pairwise
from math import nan
from pathlib import Path

import torch
from cpu_rivals import RIVALS, Nets, together
from measured import machine, work, write
from torch import Tensor, nn

import rewardzip as rz
from rewardzip.timing import interleaved

# widths, activation, members
NETS = {
    "23-32-32-1": ((23, 32, 32, 1), nn.ReLU, 1),
    "24-64-64-1": ((24, 64, 64, 1), nn.ReLU, 1),
    "23-256-256-1 x 5": ((23, 256, 256, 1), nn.ReLU, 5),
    "393-256-256-1": ((393, 256, 256, 1), nn.ReLU, 1),
    "48-512-256-128-1 ELU": ((48, 512, 256, 128, 1), nn.ELU, 1),
    "125-1024-512-1": ((125, 1024, 512, 1), nn.ReLU, 1),
    "1024-1024-1024-1": ((1024, 1024, 1024, 1), nn.ReLU, 1),
    "4096-4096-1": ((4096, 4096, 1), nn.ReLU, 1),
}
ROWS = (1, 32, 1024, 65536)
TOLERANCE = 0.05

# multiply-adds a call: cells beyond take minutes
WORK = 5e10


def make(widths: tuple[int, ...], activation: type[nn.Module], members: int) -> Nets:
    nets = []
    for _ in range(members):
        parts = [part for k, n in pairwise(widths) for part in (nn.Linear(k, n), activation())]
        nets.append(nn.Sequential(*parts[:-1]).eval().requires_grad_(False))
    return nets


OURS = {"fused fp32": rz.Fused(), "int8": rz.Int8(), "int8 x int8": rz.Int8(activations="dynamic")}


def ours(nets: Nets) -> dict[str, nn.Module]:
    """By our names; some networks may have no fp32 form of ours."""
    found = {}
    for name, config in OURS.items():
        if len(nets) > 1:
            found[f"rewardzip {name}"] = rz.fuse_ensemble(nets, config)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fast = rz.swap(nets[0], config)
            if isinstance(config, rz.Int8) or getattr(fast, "rz_chains", []):
                found[f"rewardzip {name}"] = fast
    return found


def gains(us: dict[str, float]) -> tuple[float, float]:
    """Times faster than the best rival: in fp32, and among those that round; NaN where there is none."""
    rivals = [min((us[c] for c, (_, r) in RIVALS.items() if r == rounds and c in us), default=nan) for rounds in (0, 1)]
    best = min((us[c] for c in ("rewardzip int8", "rewardzip int8 x int8") if c in us), default=nan)
    return rivals[0] / us.get("rewardzip fused fp32", nan), rivals[1] / best


def table(file: Path) -> str:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["rows"]), {})[row["provider"]] = row["p50"] * 1e6
    columns = [c for c in (*RIVALS, *(f"rewardzip {name}" for name in OURS)) if any(c in us for us in cells.values())]
    heads = [c.replace("rewardzip ", "**") + "**" if c.startswith("rewardzip") else c for c in columns[1:]]
    lines = [["network", "rows", "fp32", *heads, "fp32 to best", "int8 to best"], ["---"] * (len(columns) + 4)]
    for (model, count), us in cells.items():
        ratios = [f"{us['fp32'] / us[c]:.2f}x" if c in us else "" for c in columns[1:]]
        ends = ["" if gain != gain else f"{gain:.2f}x" for gain in gains(us)]
        lines.append([model, str(count), f"{us['fp32']:,.1f} us", *ratios, *ends])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(nets: Nets, rows: int, threads: int, seconds: float) -> tuple[dict[str, object], dict[str, str]]:
    """(the timing of each provider that is right, why the others have none)."""
    many, x = torch.randn(max(rows, 256), nets[0][0].in_features), torch.randn(rows, nets[0][0].in_features)
    exact = together([copy.deepcopy(net).double() for net in nets])(many[:4096].double())
    forms = ours(nets)

    def engines(batch: Tensor) -> dict[str, object]:
        made: dict[str, object] = {}
        for name, (maker, _) in RIVALS.items():
            try:
                made[name] = maker(nets, batch, threads)
            except Exception as error:  # what cannot run here is named in the table's foot
                left[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return made | {name: lambda form=form: form(batch) for name, form in forms.items()}

    left: dict[str, str] = {}
    checked = engines(many[:4096])
    calls = engines(x)
    for name, call in checked.items():
        try:
            error = float((call().reshape(exact.shape).double() - exact).norm() / exact.norm())
        except Exception as failure:
            error, left[name] = float("inf"), f"{type(failure).__name__}: {failure}".splitlines()[0]
        if not error <= TOLERANCE:
            left.setdefault(name, f"wrong by {error:.2g}")
            calls.pop(name, None)
    return interleaved(calls, "cpu", seconds, rest=0.02 if threads > 1 else 0.0), left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--quick", action="store_true", help="one small network, a moment each")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for a cell")
    parser.add_argument("--out", type=Path, help="folder for cpu-N-threads.json")
    parser.add_argument("--table", type=Path, help="print this file as a table instead")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    told = {**machine(), "python": platform.python_version()}
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    for threads in options.threads:
        torch.set_num_threads(threads)
        columns = [*RIVALS, *(f"rewardzip {name}" for name in OURS)]
        heads = (f"{c.removeprefix('rewardzip '):>16}" for c in columns)
        print(f"\n{threads} thread{'s' * (threads > 1)}, us; times faster than the best rival, in fp32 and rounded")
        print(f"{'network':>21} {'rows':>6}", *heads, "     fp32     int8")
        written = []
        for name in options.nets[: 1 if options.quick else None]:
            nets = make(*NETS[name])
            for rows in (1, 32) if options.quick else options.rows:
                weights = sum(p.numel() for net in nets for p in net.parameters())
                if rows * weights > WORK:
                    continue
                taken, left = cell(nets, rows, threads, 0.2 if options.quick else options.seconds)
                us = {provider: t.p50 * 1e6 for provider, t in taken.items()}
                line = (f"{us[c]:16,.1f}" if c in us else f"{'-':>16}" for c in columns)
                print(
                    f"{name:>21} {rows:>6}",
                    *line,
                    *(f"{gain:8.2f}x" if gain == gain else f"{'-':>9}" for gain in gains(us)),
                    flush=True,
                )
                linears = [layer for net in nets for layer in net if isinstance(layer, nn.Linear)]
                values = nets[0][0].in_features + len(nets)
                matrices = sum(layer.weight.numel() for layer in linears)
                for provider, t in taken.items():
                    row = {"op": "model", "model": name, "rows": rows, "provider": provider}
                    done = work(provider, rows, values, matrices, t.p50, told["device"])
                    written.append(row | asdict(t) | done | told | {"threads": str(threads)})
                for provider, reason in left.items():
                    if rows == options.rows[0]:
                        print(f"{'':>21} {provider}: {reason}")
        if options.out:
            write(options.out / f"cpu-{threads}-threads.json", written)


if __name__ == "__main__":
    main()
