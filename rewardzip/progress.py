"""What long work shows while it runs: a bar on a terminal, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def shown(name: str, total: float, progress: bool) -> Iterator[Callable[[str, float], None]]:
    """Yields ``now(what, done)``, to be told what happens now and how much of ``total`` is behind it."""
    # rich takes its time to import
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn(name), BarColumn(20), TextColumn("{task.description}", markup=False))
    with Progress(*columns, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, completed=done)
