"""Bulk scoring against a plain loop of pyarrow and torch: rows a second from parquet to parquet.

    python benchmarks/score.py [--rows N] [--rounds N] [--out FOLDER]

State 17 and action 6, 256-256-1. The rivals run in turn, the first round of each is thrown away, medians are printed.
The plain loop reads a batch, runs the dense model, writes the scores; it is timed at two batch sizes.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measured import machine

import rewardzip as rz

WIDTHS = {"state": 17, "action": 6}


def write_rows(file: Path, rows: int) -> None:
    make = np.random.default_rng(0)
    schema = pa.schema([(name, pa.list_(pa.float32(), width)) for name, width in WIDTHS.items()])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, 100_000):
            count = min(100_000, rows - start)
            numbers = [make.standard_normal(count * width, dtype=np.float32) for width in WIDTHS.values()]
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(x), w) for x, w in zip(numbers, WIDTHS.values(), strict=True)
            ]
            writer.write_batch(pa.record_batch(columns, schema))


def plain(model: torch.nn.Module, file: Path, target: Path, batch_size: int) -> None:
    schema = pa.schema([("score", pa.float32())])
    with pq.ParquetWriter(target / "scores.parquet", schema) as writer:
        for batch in pq.ParquetFile(file).iter_batches(batch_size):
            arrays = [batch.column(name).flatten().to_numpy().reshape(-1, width) for name, width in WIDTHS.items()]
            with torch.no_grad():
                score = model(*[torch.tensor(x) for x in arrays])
            writer.write_batch(pa.record_batch([pa.array(score.numpy())], schema))


def ours(model: torch.nn.Module, file: Path, target: Path) -> None:
    rz.score(model, file, target, columns=list(WIDTHS), progress=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for score.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    dense = rz.RewardMLP(17, 6, (256, 256)).eval()
    int8, both = rz.swap(dense, rz.Int8()), rz.swap(dense, rz.Int8(activations="dynamic"))
    rivals: dict[str, Callable[[Path, Path], None]] = {
        "plain loop, dense, 65536 rows a batch": partial(plain, dense, batch_size=65536),
        "plain loop, dense, 1024 rows a batch": partial(plain, dense, batch_size=1024),
        "rz.score, dense": partial(ours, dense),
        "rz.score, int8": partial(ours, int8),
        "rz.score, int8 x int8": partial(ours, both),
    }
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    with tempfile.TemporaryDirectory() as folder:
        few, many, target = Path(folder) / "few.parquet", Path(folder) / "many.parquet", Path(folder) / "scores"
        write_rows(few, 20_000)
        write_rows(many, options.rows)
        for turn in range(options.rounds + 1):
            for name, run in rivals.items():
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                start = time.perf_counter()
                run(many if turn else few, target)
                if turn:
                    taken[name].append(options.rows / (time.perf_counter() - start))
    told = machine() | {"threads": torch.get_num_threads(), "rows": options.rows}
    rates = {name: statistics.median(rate) for name, rate in taken.items()}
    base = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"{name:40} {rate:12,.0f} rows/s {rate / base:6.2f}x")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        cells = [{"op": "score", "provider": name, "rows_per_second": rate} | told for name, rate in rates.items()]
        (options.out / "score.json").write_text("\n".join(json.dumps(cell) for cell in cells) + "\n")


if __name__ == "__main__":
    main()
