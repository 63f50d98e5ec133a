"""Bulk scoring: parquet in, parquet out."""

from __future__ import annotations

import copy
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .checkpoint import load
from .identity import model_hash
from .models import input_widths
from .score_folder import open_folder
from .score_parts import leftover, score_parts
from .score_plan import Columns, Inputs, Plan, make_plan
from .score_rows import Scorer, placement

Engine = Literal["local", "ray"]

# seconds between two lines where progress does not go to a terminal
SAY_EVERY = 10.0


@dataclass(frozen=True)
class Scores:
    """What a run wrote, the parts that an earlier run had finished included."""

    folder: Path
    rows: int
    parts: int
    bad_rows: int
    """Rows whose inputs are null, NaN, inf or of another length: their score is null."""
    bad: dict[str, tuple[int, int]]
    """"column: what" to (rows, the first of them in its file)."""
    not_finite: int
    """Rows whose inputs are right and whose score is inf or NaN."""
    scored: int
    """Rows of this run alone."""
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.scored / self.seconds:,.0f} rows/s" if self.scored else ", nothing was left to do"
        lines = [f"{self.rows:,} rows in {self.parts} parts in {self.folder}{rate}"]
        if self.bad_rows:
            lines.append(f"{self.bad_rows:,} rows have no score:")
        lines += [f"  {what}: {count:,} rows, the first is row {first}" for what, (count, first) in self.bad.items()]
        if self.not_finite:
            lines.append(f"{self.not_finite:,} rows have the score inf or NaN from inputs that are finite")
        return "\n".join(lines)


def score(
    model: nn.Module | str | os.PathLike[str],
    inputs: Inputs,
    output: str | os.PathLike[str],
    *,
    columns: Columns,
    keep: Sequence[str] = (),
    engine: Engine = "local",
    batch_size: int | None = None,
    part_rows: int = 1_000_000,
    strict: bool = False,
    progress: bool = True,
) -> Scores:
    """Score every row of parquet files into a folder of parquet files, in their order; a killed run goes on.

    model: a module, or a folder written by ``rz.save``, which is then scored on a GPU if there is one.
    inputs: a path, a glob, a folder, or a list of them. columns: one entry per input of the model, each a column of
    numbers or of lists, or several side by side, ``["state", "action"]`` or ``["s0, s1, s2", "a*"]``: a wildcard stands
    for what it matches, in the file's order. keep: columns copied to the output, which also has ``file`` and ``row``.
    batch_size: rows in one call of the model. part_rows: rows of a file of scores, or a row group of the input where
    that has more. Rows with null, NaN or inf get a null for a score and are counted; ``strict`` makes them an error.
    The same call on an unfinished folder goes on where it was, with either engine; other settings are refused.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"score: engine is {engine!r}; it must be 'local' or 'ray'")
    folder = Path(output).resolve()
    plan = make_plan(inputs, columns, keep, part_rows, folder, progress)
    on_ray = engine == "ray"
    if isinstance(model, nn.Module):
        # a copy: modules in training mode compute otherwise, and actors take their model from the CPU
        model = copy.deepcopy(model).cpu() if on_ray else copy.deepcopy(model)
    else:
        model = load(model, device="cuda" if torch.cuda.is_available() and not on_ray else None)
    model.eval()
    takes = input_widths(model)
    if takes and list(takes) != plan.widths:
        raise ValueError(f"score: the columns are {plan.widths} wide, {type(model).__name__} takes {list(takes)}")
    if on_ray:
        from .score_ray import cluster_device

        device = cluster_device()
    else:
        device = placement(model)[0].type
    if batch_size is None:
        batch_size = 1024 if device == "cpu" else 65536
    if batch_size < 1:
        raise ValueError(f"score: batch_size is {batch_size}; it must be 1 or more")
    scorer = Scorer(model, plan, batch_size, strict)
    settings = {"model": model_hash(model), "device": device, "batch_size": batch_size, "part_rows": part_rows}
    with open_folder(folder, plan, settings):
        missing, told, done = leftover(plan, folder)
        start = time.perf_counter()
        with _progress(plan.rows, done, progress) as advance, _room(plan, folder):
            if on_ray:
                from .score_ray import score_on_ray

                told = score_on_ray(scorer, model, device, folder, advance)
            else:
                for _, found in score_parts(scorer, missing, folder, advance):
                    told.add(found)
    took = time.perf_counter() - start
    return Scores(folder, plan.rows, len(plan.parts), told.bad_rows, told.bad, told.not_finite, plan.rows - done, took)


@contextmanager
def _room(plan: Plan, folder: Path) -> Iterator[None]:
    """A full disk, said in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        finished = len(plan.parts) - len(leftover(plan, folder)[0])
        raise OSError(
            error.errno,
            f"score: no room to write into {folder} ({os.strerror(error.errno)}); {finished} of {len(plan.parts)} "
            "parts are finished and stay; make room and run the same again",
        ) from error


@contextmanager
def _progress(total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told of rows as they are written: a bar with rate and time left, or a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = said = time.perf_counter()
    rows = 0
    columns = (TextColumn("score"), BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.fields[rate]} rows/s"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("score", total=total, completed=done, rate="-")

        def advance(count: int) -> None:
            nonlocal rows, said
            rows += count
            now = time.perf_counter()
            rate = rows / (now - began)
            bar.update(task, advance=count, rate=f"{rate:,.0f}")
            if shown and not console.is_terminal and now - said > SAY_EVERY:
                said, left = now, (total - done - rows) / rate
                console.print(f"score: {(done + rows) / total:.1%}, {rate:,.0f} rows/s, {left:,.0f} s left")

        yield advance
