"""What compression cost and what it gave: for eyes as a table, for machines as a dict."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import Check
from .fidelity import LABELS, Figure, short
from .footprint import Size
from .gate import Gate
from .timing import Timing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class Speed:
    """Times of one call with ``batch`` rows, rivals in turn."""

    batch: int
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        return self.before.p50 / self.after.p50


@dataclass(frozen=True)
class Sample:
    """Some rows' outputs [rows, outputs], for plots."""

    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Candidate:
    """A point of the trade-off between size, speed and fidelity."""

    name: str
    smaller: float
    faster: float
    agreement: float
    passed: bool
    chosen: bool = False
    on_front: bool = True
    returns: float | None = None


@dataclass(frozen=True)
class Report:
    """What ``evaluate`` found; ``print`` it."""

    machine: str
    rows: int
    outputs: int
    spread: float
    """The standard deviation of the original's outputs, the unit to read errors in."""
    figures: dict[str, Figure]
    """Against the original; of several outputs the worst. Empty where the outputs are NaN or constant."""
    each_output: tuple[dict[str, Figure], ...]
    truth: dict[str, dict[str, Figure]]
    """Of ``before`` and ``after``, against the rewards or preferences in the data."""
    returns: dict[str, Figure]
    checks: tuple[Check, ...]
    sizes: tuple[Size, Size]
    speeds: tuple[Speed, ...]
    layers: dict[str, float]
    """Error of each layer's outputs as a share of them, in the order the layers run."""
    flips: tuple[tuple[float, float], ...]
    """(margin of pairs in standard deviations, share of them flipped), of the first output."""
    gate: Gate | None
    sample: Sample
    notes: tuple[str, ...] = ()
    front: tuple[Candidate, ...] = field(default=())

    @property
    def failures(self) -> list[str]:
        """Why the model does not pass; also without a gate, what is broken."""
        broken = [f"{check.name}: {check.found}" for check in self.checks if not check.passed]
        return broken + (self.gate.failures(self.figures) if self.gate and self.figures else [])

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def smaller(self) -> float:
        """Times smaller on disk."""
        return self.sizes[0].disk / self.sizes[1].disk

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sampled rows, as JSON holds it."""
        undecided = self.gate.undecided(self.figures) if self.gate else []
        found: dict[str, Any] = {
            "passed": self.passed,
            "failures": self.failures,
            "undecided": undecided,
            "gate": asdict(self.gate) if self.gate else None,
            "machine": self.machine,
            "rows": self.rows,
            "outputs": self.outputs,
            "spread": self.spread,
            "figures": _figures(self.figures),
            "each_output": [_figures(figures) for figures in self.each_output],
            "truth": {name: _figures(figures) for name, figures in self.truth.items()},
            "returns": _figures(self.returns),
            "checks": [asdict(check) for check in self.checks],
            "size": {name: asdict(size) for name, size in zip(("before", "after"), self.sizes, strict=True)},
            "seconds": [asdict(speed) for speed in self.speeds],
            "layers": self.layers,
            "flips_by_margin": [list(point) for point in self.flips],
            "notes": list(self.notes),
            "front": [asdict(candidate) for candidate in self.front],
        }
        plain: dict[str, Any] = _plain(found)
        return plain

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self, soft_wrap=True)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: object) -> Iterator[RenderableType]:
        yield self._verdict()
        yield self._fidelity()
        if self.truth or self.returns:
            yield self._truth()
        yield self._cost()
        if self.layers:
            listed = ", ".join(f"{name} {error:.2%}" for name, error in self.layers.items())
            yield _line(f"error of each layer's outputs: {listed}")
        for note in self.notes:
            yield _line(f"note: {note}")

    def _verdict(self) -> RenderableType:
        from rich.console import Group

        if self.failures:
            return Group(*(_line(f"failed: {reason}", style="bold red") for reason in self.failures))
        if self.gate is None:
            return _line("sound; no gate was given")
        lines = [_line("passed the gate", style="bold green")]
        return Group(
            *lines, *(_line(f"close: {reason}", style="yellow") for reason in self.gate.undecided(self.figures))
        )

    def _fidelity(self) -> Table:
        what = "the original" + (f", the worst of {self.outputs} outputs" if self.outputs > 1 else "")
        table = _table(f"Kept, on {self.rows:,} rows, against {what}", "figure", "value", "95 % interval", "limit")
        limits = self.gate.limits(self.figures) if self.gate else {}
        for name in LABELS:
            if name in self.figures:
                figure = self.figures[name]
                limit = f"{limits[name]:g}" if name in limits else ""
                table.add_row(LABELS[name], short(figure.value), _interval(figure), limit)
        for check in self.checks:
            table.add_row(check.name, "yes" if check.passed else "NO", "", "always")
        return table

    def _truth(self) -> Table:
        table = _table("Against the truth", "figure", "original", "compressed")
        before, after = self.truth.get("before", {}), self.truth.get("after", {})
        for name in LABELS:
            if name in before:
                table.add_row(LABELS[name], str(before[name]), str(after[name]))
        if self.returns:
            table.add_row("return", str(self.returns["before"]), str(self.returns["after"]))
        return table

    def _cost(self) -> Table:
        table = _table(f"Size and speed; {self.machine}", "", "original", "compressed", "")
        before, after = self.sizes
        for name in ("disk", "memory"):
            old, new = getattr(before, name), getattr(after, name)
            table.add_row(
                f"on {name}" if name == "disk" else f"in {name}", kilobytes(old), kilobytes(new), smaller(old / new)
            )
        for speed in self.speeds:
            rows = f"{speed.batch:,} row{'s' if speed.batch > 1 else ''}"
            times = [microseconds(t.p50) for t in (speed.before, speed.after)]
            table.add_row(rows, *times, f"{speed.ratio:.2f}x {'faster' if speed.ratio >= 1 else 'as fast: SLOWER'}")
        return table


def kilobytes(size: int) -> str:
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-4 else f"{seconds * 1e6:,.0f} us"


def smaller(ratio: float) -> str:
    return f"{ratio:.2f}x {'smaller' if ratio >= 1 else 'as small: LARGER'}"


def _line(text: str, style: str = "") -> Text:
    """One line however narrow the terminal: a log that breaks a reason in two is hard to search."""
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _interval(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"{short(figure.low)} to {short(figure.high)}"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _figures(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
