"""The sweep over tiles: a table as the package ships it, and what every candidate took.

    python benchmarks/tiles.py --out FOLDER [--seconds 65] [--quick]

FOLDER/measured_tiles.json is the table, FOLDER/tiles.json a row a candidate. --quick: one tiny layer, without a GPU in
Triton's interpreter (TRITON_INTERPRET=1), whose times mean nothing. ``rewardzip tune`` is the same for a user's cache.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from measured import machine

from rewardzip import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=65)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        parser.error("there is no GPU here: only --quick runs, in Triton's interpreter")
    cases = [partial(tune.linear, 9, 40, 3, torch.float32)] if options.quick else tune.cases()
    told, rows, wrong = machine(), [], 0
    for found in tune.sweep(device, options.out / "measured_tiles.json", options.seconds, cases):
        print(found, flush=True)
        cell = {"op": "tile", "bucket": found.bucket, "rule": found.rule, **told}
        rows += [cell | {"tile": tile, **asdict(t)} for tile, t in found.times.items()]
        rows += [cell | {"tile": tile, "failed": why} for tile, why in found.failed.items()]
        (options.out / "tiles.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
        wrong += sum("wrong result" in why for why in found.failed.values())
    if wrong:
        raise SystemExit(f"{wrong} tiles gave a wrong result")


if __name__ == "__main__":
    main()
