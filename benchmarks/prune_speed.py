"""Half the neurons gone: a 23-256-256-1 reward net, eager and swapped to int8, before and after.

python benchmarks/prune_speed.py [--threads N] [--out FOLDER]
"""

import argparse
import json
import platform
from datetime import date
from functools import partial
from pathlib import Path

import torch

import rewardzip as rz
from rewardzip.timing import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for prune_speed-N-threads.json, a line a cell")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = rz.RewardMLP(17, 6, (256, 256)).eval().requires_grad_(False)
    small = rz.prune(model, rz.Prune("neurons", 0.5))
    dynamic = rz.Int8(activations="dynamic")
    models = {
        "fp32": model,
        "int8": rz.swap(model, dynamic),
        "half the neurons, fp32": small,
        "half the neurons, int8": rz.swap(small, dynamic),
    }
    told = {"machine": platform.machine(), "torch": torch.__version__, "date": str(date.today())}
    lines = []
    for rows in (1, 32, 1024, 65536):
        inputs = torch.randn(rows, 17), torch.randn(rows, 6)
        with torch.inference_mode():
            taken = interleaved({name: partial(m, *inputs) for name, m in models.items()}, seconds=3.0)
        for name, t in taken.items():
            ratio = taken["fp32"].p50 / t.p50
            print(f"{rows:6} rows  {name:24} {t.p50 * 1e6:10.1f} us {ratio:6.2f}x", flush=True)
            cell = {"rows": rows, "threads": options.threads, "model": name, "us": t.p50 * 1e6, "over_fp32": ratio}
            lines.append(json.dumps(cell | told))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"prune_speed-{options.threads}-threads.json").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
