"""What compression cost and what it gave: for eyes as a table, for machines as a dict, for others as a page."""

from __future__ import annotations

import io
import math
import os
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
class Sheet:
    """A table in words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """What ``evaluate`` found; ``print`` it, or ``save`` it as a page."""

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

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one page of HTML that needs nothing else; takes the extra ``report``."""
        from .page import write

        write(self, file)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self, soft_wrap=True)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: object) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        for line, style in self.verdict():
            # one line however narrow the terminal: a log that breaks a reason in two is hard to search
            yield Text(line, style=style, no_wrap=True, overflow="ignore")
        for sheet in self.sheets():
            table = Table(title=sheet.title, title_justify="left", title_style="bold")
            for i, column in enumerate(sheet.columns):
                table.add_column(column, justify="right" if i else "left")
            for row in sheet.rows:
                table.add_row(*row)
            yield table
        listed = ", ".join(f"{name} {error:.2%}" for name, error in self.layers.items())
        for line in [f"error of each layer's outputs: {listed}"] * bool(listed) + [f"note: {n}" for n in self.notes]:
            yield Text(line, no_wrap=True, overflow="ignore")

    def verdict(self) -> list[tuple[str, str]]:
        """(line, style) of the answer and its reasons."""
        if self.failures:
            return [(f"failed: {reason}", "bold red") for reason in self.failures]
        if self.gate is None:
            return [("sound; no gate was given", "")]
        close = self.gate.undecided(self.figures)
        return [("passed the gate", "bold green"), *((f"close: {reason}", "yellow") for reason in close)]

    def sheets(self) -> list[Sheet]:
        """What the report says in tables."""
        of = f", the worst of {self.outputs} outputs" if self.outputs > 1 else ""
        limits = self.gate.limits(self.figures) if self.gate else {}
        kept = [
            (LABELS[n], short(f.value), _interval(f), f"{limits[n]:g}" if n in limits else "")
            for n in LABELS
            if (f := self.figures.get(n))
        ]
        kept += [(check.name, "yes" if check.passed else "NO", "", "always") for check in self.checks]
        columns: tuple[str, ...] = ("figure", "value", "95 % interval", "limit")
        sheets = [Sheet(f"Kept, on {self.rows:,} rows, against the original{of}", columns, tuple(kept))]
        before, after = self.truth.get("before", {}), self.truth.get("after", {})
        true = [(LABELS[name], str(before[name]), str(after[name])) for name in LABELS if name in before]
        if self.returns:
            true.append(("return", str(self.returns["before"]), str(self.returns["after"])))
        if true:
            sheets.append(Sheet("Against the truth", ("figure", "original", "compressed"), tuple(true)))
        if self.each_output:
            names = ("agreement", "pearson_distance", "best_of_n", "max_error")
            each = [(str(i), *(short(f[name].value) for name in names)) for i, f in enumerate(self.each_output)]
            sheets.append(Sheet("Each output", ("output", *(LABELS[name] for name in names)), tuple(each)))
        old, new = self.sizes
        cost = [
            (where, kilobytes(a), kilobytes(b), f"{a / b:.2f}x {'smaller' if a >= b else 'as small: LARGER'}")
            for where, a, b in (("on disk", old.disk, new.disk), ("in memory", old.memory, new.memory))
        ]
        for s in self.speeds:
            rows = f"{s.batch:,} row{'s' if s.batch > 1 else ''}"
            word = "faster" if s.ratio >= 1.05 else "as fast" if s.ratio >= 0.95 else "as fast: SLOWER"
            cost.append((rows, microseconds(s.before.p50), microseconds(s.after.p50), f"{s.ratio:.2f}x {word}"))
        columns = ("", "original", "compressed", "")
        return [*sheets, Sheet(f"Size and speed; {self.machine}", columns, tuple(cost))]

    def trade_off(self) -> tuple[Candidate, ...]:
        """The candidates of a search; without one, the original and this model."""
        if self.front or not self.figures:
            return self.front
        faster = self.speeds[-1].ratio
        mine = Candidate("this model", self.smaller, faster, self.figures["agreement"].value, self.passed, chosen=True)
        return Candidate("original", 1, 1, 1, True), mine


def kilobytes(size: int) -> str:
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-4 else f"{seconds * 1e6:,.0f} us"


def _interval(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"{short(figure.low)} to {short(figure.high)}"


def _figures(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: asdict(figure) for name, figure in figures.items()}


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
