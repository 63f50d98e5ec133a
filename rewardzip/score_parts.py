"""Scoring the parts of a plan: reading on one thread, computing on others, a finished part renamed into place.

A part stands under its name only when it is whole and on the disk, so a run may be killed at any moment. Its bytes
depend on the plan and the model alone: batches are cut the same way whoever scores them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .score_plan import Part, Plan, need_pyarrow
from .score_rows import Found, Scorer

# in a part's footer: what was wrong with its rows
FOUND = b"rewardzip"


def score_parts(
    scorer: Scorer, parts: Iterable[Part], folder: Path, advance: Callable[[int], object] = int
) -> Iterator[tuple[Part, Found]]:
    """Write the parts in turn, and tell of each what was wrong with its rows; ``advance`` hears of rows written."""
    threads, several = torch.get_num_threads(), scorer.workers > 1
    pool = ThreadPoolExecutor(scorer.workers, "score", partial(torch.set_num_threads, 1 if several else threads))
    waiting: deque[tuple[Part, Future[Any]]] = deque()
    writer: PartWriter | None = None
    unreadable: ValueError | None = None
    batches = _batches(scorer, parts)
    try:
        while True:
            # this thread reads and writes while the pool computes
            try:
                following = next(batches, None)
            except ValueError as error:
                # what was read before is finished first
                unreadable, following = error, None
            if following is not None:
                part, batch, first_row = following
                waiting.append((part, pool.submit(scorer.score, batch, part, first_row)))
                if len(waiting) <= scorer.workers + 1:
                    continue
            if not waiting:
                if unreadable is not None:
                    raise unreadable
                return
            part, future = waiting.popleft()
            table, found = future.result()
            writer = writer or PartWriter(folder, part, scorer.schema)
            writer.write(table, found)
            advance(table.num_rows)
            if writer.rows == part.rows:
                writer.finish()
                done, writer = writer.found, None
                yield part, done
    finally:
        pool.shutdown(cancel_futures=True)
        # what a worker sets for itself is also what later threads start with
        torch.set_num_threads(threads)
        if writer is not None:
            writer.abandon()


def _batches(scorer: Scorer, parts: Iterable[Part]) -> Iterator[tuple[Part, Any, int]]:
    """(part, batch, the batch's first row in its file), in order."""
    pa = need_pyarrow()
    for part in parts:
        file = scorer.plan.root / part.file
        row, end = part.first_row, part.first_row + part.rows
        try:
            # a buffer, so that a row group is not read whole
            with pa.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
                for batch in parquet.iter_batches(scorer.read_rows, list(part.row_groups), scorer.plan.names):
                    if batch.num_rows:
                        yield part, batch, row
                        row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"score: {file} cannot be read from row {row} on: {error}") from error
        if row != end:
            raise ValueError(f"score: {file} has {row - part.first_row} rows in {part.name}, {part.rows} were planned")


class PartWriter:
    """A part under a temporary name until it is whole."""

    def __init__(self, folder: Path, part: Part, schema: Any) -> None:
        pa = need_pyarrow()
        self.target, self.rows, self.found = folder / part.name, 0, Found()
        self.draft = folder / f".{part.name}-{secrets.token_hex(4)}.tmp"
        self.sink = open(self.draft, "xb")  # noqa: SIM115
        encodings = {"use_dictionary": ["file"], "column_encoding": {"row": "DELTA_BINARY_PACKED"}}
        self.parquet = pa.parquet.ParquetWriter(self.sink, schema, **encodings)

    def write(self, table: Any, found: Found) -> None:
        self.parquet.write_batch(table)
        self.rows += table.num_rows
        self.found.add(found)

    def finish(self) -> None:
        self.parquet.add_key_value_metadata({FOUND: json.dumps(dataclasses.asdict(self.found))})
        self.parquet.close()
        self.sink.flush()
        os.fsync(self.sink.fileno())
        self.sink.close()
        os.replace(self.draft, self.target)

    def abandon(self) -> None:
        """Leave nothing behind; on a full disk closing fails too."""
        for close in (self.parquet.close, self.sink.close):
            with suppress(Exception):
                close()
        self.draft.unlink(missing_ok=True)


def finished(folder: Path, part: Part) -> Found | None:
    """What a finished part tells of its rows; None where it is not there, or not whole."""
    pa = need_pyarrow()
    try:
        metadata = pa.parquet.read_metadata(folder / part.name)
        found = Found(**json.loads(metadata.metadata[FOUND]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return found if metadata.num_rows == part.rows else None


def leftover(plan: Plan, folder: Path) -> tuple[list[Part], Found, int]:
    """(the parts still to do, what the finished ones tell, their rows)."""
    missing, told, rows = [], Found(), 0
    present = {entry.name for entry in os.scandir(folder)}
    for part in plan.parts:
        found = finished(folder, part) if part.name in present else None
        if found is None:
            missing.append(part)
        else:
            told.add(found)
            rows += part.rows
    return missing, told, rows
