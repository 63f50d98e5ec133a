"""A report as one page of HTML that needs nothing else: no request leaves it, plots are drawn into it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fidelity import LABELS, short

if TYPE_CHECKING:
    from .report import Report, Sheet


@dataclass(frozen=True)
class Told:
    """The words of the page."""

    title: str
    verdict: str
    reasons: list[str]
    where: str
    numbers: list[tuple[str, str]]
    tables: list[Sheet]


def check(file: str | os.PathLike[str] | None) -> None:
    """That a page can be written there, before there is one."""
    if file is None:
        return
    target = Path(file)
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"report: {target.parent} is not a folder to write {target.name or target} in")
    _need()


def write(report: Report, file: str | os.PathLike[str]) -> None:
    """The whole page under its name, or nothing."""
    check(file)
    target, text = Path(file), render(report)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as page:
            page.write(text)
        draft.chmod(0o644)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _need() -> tuple[Any, Any]:
    """(jinja2, the plots), or an error that names the extra."""
    try:
        import jinja2

        from . import plots
    except ImportError as error:
        raise ImportError(
            "a report as a page is made with jinja2 and matplotlib: pip install rewardzip[report]"
        ) from error
    return jinja2, plots


def render(report: Report) -> str:
    jinja2, plots = _need()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("templates/report.html").read_text("utf-8"))
    return str(template.render(r=report, plots=plots.draw(report), told=_told(report)))


def _told(report: Report) -> Told:
    times = report.speeds[-1]
    title = f"{report.smaller:.1f} times smaller, {times.ratio:.1f} times faster"
    if report.failures:
        verdict, reasons = "Failed", report.failures
    elif report.gate is None:
        verdict, reasons = "Sound; no gate was given", []
    else:
        verdict, reasons = "Passed the gate", report.gate.undecided(report.figures)
    numbers = [
        (f"{report.smaller:.2f}x", "smaller on disk"),
        *((f"{s.ratio:.2f}x", f"as fast with {s.batch:,} row{'s' if s.batch > 1 else ''}") for s in report.speeds),
    ]
    distance = "epic" if "epic" in report.figures else "pearson_distance"
    for name, meaning in (("agreement", "of pairs in the same order"), ("best_of_n", "lost by best of 16")):
        if name in report.figures:
            numbers.append((f"{report.figures[name].value:.2%}", meaning))
    if distance in report.figures:
        numbers.append((short(report.figures[distance].value), LABELS[distance]))
    where = f"Judged on {report.rows:,} rows; timed on {report.machine}, rivals in turn."
    return Told(title, verdict, reasons, where, numbers, report.sheets())
