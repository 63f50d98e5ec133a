"""The demo as one HTML file: plots inline, nothing fetched."""

from __future__ import annotations

import html
import io
import platform
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .candidates import Candidate
from .planner import HORIZON, SAMPLES

COLOURS = {"fp32": "#475569", "int8": "#2563eb", "int8 x int8": "#0d9488", "ternary": "#dc2626"}


def write_page(path: Path, found: Sequence[Candidate], truth: Tensor, speed: Table) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the demo's page is drawn by matplotlib: pip install 'rewardzip[rl,report]'") from error
    style: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "rewardzip"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        plots = {
            "returns": _draw((6.4, 3.4), _returns, found),
            "times": _draw((6.4, 3.4), _times, found),
            "angles": _draw((6.4, 3.4), _angles, found),
            "fidelity": _draw((6.4, 3.4), _fidelity, found),
        }
    dense, best = found[0], min(found[:-1], key=lambda c: c.planning)
    text = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        plots,
        best=best.name,
        returns_best=f"{best.returned:.1f}",
        returns_dense=f"{dense.returned:.1f}",
        returns_bad=f"{found[-1].returned:.0f}",
        faster=f"{dense.planning / best.planning:.1f}",
        faster_net=f"{dense.in_reward / best.in_reward:.1f}",
        smaller=f"{dense.size / best.size:.1f}",
        agreement=f"{best.agreement:.2%}",
        share=f"{dense.in_reward / dense.planning:.0%}",
        seeds=len(dense.episodes),
        steps=len(dense.episodes[0].angles),
        held_out=f"{len(truth):,}",
        samples=SAMPLES,
        horizon=HORIZON,
        rows=_rows(found),
        speed=_table(speed),
        machine=html.escape(f"{platform.machine()}, torch {torch.__version__}, one thread"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _draw(size: tuple[float, float], plot: Callable[[Any, Sequence[Candidate]], None], found: Any) -> str:
    """An SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    plot(figure.subplots(), found)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _returns(axes: Any, found: Sequence[Candidate]) -> None:
    width = 0.8 / len(found)
    for i, c in enumerate(found):
        at = [e.seed + (i - (len(found) - 1) / 2) * width for e in c.episodes]
        axes.bar(at, [e.total for e in c.episodes], width * 0.9, color=COLOURS[c.name], label=c.name)
    axes.set(xlabel="seed", ylabel="return (0 is best)", xticks=[e.seed for e in found[0].episodes])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.legend(loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.02))


def _times(axes: Any, found: Sequence[Candidate]) -> None:
    names = [c.name for c in found]
    inside = [c.in_reward * 1e3 for c in found]
    rest = [(c.planning - c.in_reward) * 1e3 for c in found]
    axes.barh(names, inside, color=[COLOURS[name] for name in names], label="reward net")
    axes.barh(names, rest, left=inside, color="#cbd5e1")
    for i, c in enumerate(found):
        label = f"  {c.planning * 1e3:.1f} ms  ({found[0].planning / c.planning:.1f}x)"
        axes.text(c.planning * 1e3, i, label, va="center")
    axes.margins(x=0.24)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds to plan one action (grey: dynamics net and planner)")


def _angles(axes: Any, found: Sequence[Candidate]) -> None:
    # of the seeds, the one that starts furthest from upright tells most
    hardest = max(range(len(found[0].episodes)), key=lambda i: abs(found[0].episodes[i].angles[0]))
    styles = dict(zip(COLOURS, ("-", "--", ":", "-"), strict=True))
    for c in found:
        angles = [abs(a) for a in c.episodes[hardest].angles]
        axes.plot(angles, styles[c.name], color=COLOURS[c.name], label=c.name, lw=2 if c is found[0] else 1.6)
    seed = found[0].episodes[hardest].seed
    axes.set(xlabel=f"step (seed {seed})", ylabel="degrees from upright", yticks=[0, 45, 90, 135, 180], ylim=(-4, 184))
    axes.legend(loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.16))


def _fidelity(axes: Any, found: Sequence[Candidate]) -> None:
    shown = slice(0, 400)
    for c in reversed(found[1:]):
        axes.scatter(found[0].scored[shown], c.scored[shown], s=7, color=COLOURS[c.name], alpha=0.7, label=c.name)
    low, high = float(found[0].scored.min()), 0.0
    axes.plot([low, high], [low, high], color="#94a3b8", lw=1, zorder=0)
    axes.set(xlabel="reward by the dense net", ylabel="by the compressed")
    axes.legend(loc="lower right", markerscale=2)


def _rows(found: Sequence[Candidate]) -> str:
    dense = found[0]
    return "\n".join(
        f"<tr><td><b style='color:{COLOURS[c.name]}'>{c.name}</b><br><small>{html.escape(c.about)}</small></td>"
        f"<td>{c.size:,}</td><td>{c.agreement:.3%}</td><td>{c.error:.3f}</td><td>{c.returned:.1f}</td>"
        f"<td>{c.planning * 1e3:.1f} <small>({dense.planning / c.planning:.2f}x)</small></td>"
        f"<td>{c.in_reward * 1e3:.1f} <small>({dense.in_reward / c.in_reward:.2f}x)</small></td></tr>"
        for c in found
    )


def _table(table: Table) -> str:
    """A rich table in HTML."""
    heads = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(str(table.title))}</caption><tr>{heads}</tr>{body}</table>"
