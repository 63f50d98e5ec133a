"""The pictures of a report, as SVG to stand in a page: text in the page's own colour and type."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure as Canvas

if TYPE_CHECKING:
    from .report import Report

LONGEST = 24
INK = "#010203"  # stands for the page's text colour until the SVG is written
GOOD, BAD, QUIET = "#12908e", "#e0603a", "#8a94a0"
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "grid.color": QUIET,
    "grid.alpha": 0.18,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    title: str
    says: str
    svg: str


def draw(report: Report) -> list[Plot]:
    pictures: list[tuple[bool, str, str, Callable[[Any, Report], None]]] = [
        (
            bool(report.figures),
            "Rewards before and after",
            "One point a row. On a straight line, whatever its slope, every choice is the same.",
            _scatter,
        ),
        (
            bool(report.flips),
            "Which pairs flip",
            "Share of pairs put in the other order, by how far apart the original had them. "
            "Flips belong at the left, among pairs that were nearly tied.",
            _flips,
        ),
        (
            bool(report.layers),
            "Error by layer",
            "Error of each layer's outputs as a share of them, in the order the layers run.",
            _layers,
        ),
        (
            bool(report.trade_off()),
            "Size, speed, fidelity",
            "Up and to the right is better; larger points are faster. "
            + ("The line joins what nothing smaller matches." if report.front else "The original is at the left."),
            _trade_off,
        ),
    ]
    return [Plot(title, says, _svg(title, picture, report)) for there, title, says, picture in pictures if there]


def _svg(title: str, picture: Callable[[Any, Report], None], report: Report) -> str:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        canvas = Canvas(figsize=(5.2, 3.5), layout="constrained")
        picture(canvas.subplots(), report)
        text = io.StringIO()
        canvas.savefig(text, format="svg", transparent=True, dpi=220, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _scatter(axes: Any, report: Report) -> None:
    before, after = report.sample.before.flatten(), report.sample.after.flatten()
    axes.scatter(before, after, s=7, alpha=0.45, color=GOOD, linewidths=0, rasterized=True)
    ends = [float(before.min()), float(before.max())]
    axes.plot(ends, ends, color=QUIET, lw=1, ls=(0, (4, 3)), zorder=0)
    axes.set(xlabel="original", ylabel="compressed")


def _flips(axes: Any, report: Report) -> None:
    margin, share = zip(*report.flips, strict=True)
    axes.fill_between(margin, share, color=BAD, alpha=0.15, lw=0)
    axes.plot(margin, share, color=BAD, marker="o", ms=3.5, lw=1.4)
    axes.set(
        xlabel="margin, in standard deviations of the reward", ylabel="pairs flipped", ylim=(0, None), xscale="log"
    )
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, symbol=" %"))


def _layers(axes: Any, report: Report) -> None:
    names, errors = list(report.layers), list(report.layers.values())
    axes.barh(range(len(names)), errors, color=GOOD, height=min(0.55, 0.15 * len(names)))
    # of a deep model some names
    step = max(1, len(names) // 16)
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, symbol=" %"))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("error, root mean square")


def _trade_off(axes: Any, report: Report) -> None:
    points = report.trade_off()
    for point in points:
        color = GOOD if point.passed else BAD
        area = 14 * min(max(point.faster, 0.5), 16)
        full = point.on_front or point.chosen
        edge = {"linewidths": 1.6, "edgecolors": INK} if point.chosen else {"linewidths": 0}
        at = (point.smaller, point.agreement)
        axes.scatter(*at, s=area, color=color, alpha=0.75 if full else 0.25, zorder=2 + point.chosen, **edge)
        if point.chosen or point.name == "original":
            # a recipe is too long for a picture; the notes have it
            name = point.name if len(point.name) <= LONGEST else "chosen"
            label = f"{name}\n{point.smaller:.3g}x smaller, {point.faster:.3g}x faster" if point.chosen else "original"
            axes.annotate(
                label, at, (0, 10), ha="left" if point.chosen else "center", textcoords="offset points", fontsize=8.5
            )
    # what is both the smallest and the most faithful so far, from the right; speed has a dimension of its own
    best = sorted((p.smaller, p.agreement) for p in points)
    front = [(x, y) for i, (x, y) in enumerate(best) if all(y > other for _, other in best[i + 1 :])]
    axes.plot(*zip(*front, strict=True), color=QUIET, lw=1, zorder=1)
    if report.gate:
        axes.axhline(report.gate.agreement, color=QUIET, lw=1, ls=(0, (4, 3)), zorder=0)
        axes.text(1, report.gate.agreement, "gate ", ha="right", va="bottom", transform=axes.get_yaxis_transform())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:.3g}x"))
    low = min(p.agreement for p in points)
    if report.gate:
        low = min(low, report.gate.agreement)
    room = max(1 - low, 1e-3)
    axes.set(xlabel="times smaller on disk", ylabel="pair agreement", ylim=(low - 0.2 * room, 1 + 0.35 * room))
    axes.set_yticks([tick for tick in axes.get_yticks() if low - 0.2 * room < tick <= 1])
    axes.margins(x=0.25)
