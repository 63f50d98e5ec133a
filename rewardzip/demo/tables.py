"""What the demo prints: returns and planning time, fidelity, microseconds a call."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ..timing import interleaved
from .candidates import Candidate

BATCHES = (1, 1024, 65536)
Reward = Callable[[Tensor, Tensor], Tensor]


def returns_table(found: Sequence[Candidate]) -> Table:
    episodes = found[0].episodes
    table = Table(title=f"What Pendulum paid, {len(episodes[0].angles)} steps planned with MPPI", title_justify="left")
    _columns(table, "reward net", "mean return", *(f"seed {e.seed}" for e in episodes))
    for c in found:
        table.add_row(c.name, f"{c.returned:.1f}", *(f"{e.total:.0f}" for e in c.episodes))
    return table


def cost_table(found: Sequence[Candidate]) -> Table:
    dense = found[0]
    table = Table(title="Size, fidelity on held-out transitions, planning time", title_justify="left")
    _columns(table, "reward net", "bytes", "order kept", "RMSE", "ms an action", "in the net")
    for c in found:
        planning = f"{c.planning * 1e3:.1f} ({dense.planning / c.planning:.2f}x)"
        inside = f"{c.in_reward * 1e3:.1f} ({dense.in_reward / c.in_reward:.2f}x)"
        table.add_row(c.name, f"{c.size:,}", f"{c.agreement:.2%}", f"{c.error:.3f}", planning, inside)
    return table


def speed_table(found: Sequence[Candidate], device: str) -> Table:
    """One call of each model and of AMP, at several numbers of rows."""
    amp = torch.float16 if device == "cuda" else torch.bfloat16
    runs: dict[str, Reward] = {c.name: c.model for c in found if c.name != "ternary"}
    runs[f"AMP {str(amp).removeprefix('torch.')}"] = _under_amp(found[0].model, device, amp)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    title = f"Microseconds a call, median, rivals in turn; {where}, one thread"
    table = Table(title=title, title_justify="left")
    _columns(table, "rows", *runs)
    with torch.no_grad():
        for rows in track(BATCHES, "timing"):
            state, action = torch.randn(rows, 3, device=device), torch.randn(rows, 1, device=device)
            taken = interleaved({name: _bound(run, state, action) for name, run in runs.items()}, device)
            base = taken[found[0].name].p50
            table.add_row(f"{rows:,}", *(f"{_short(t.p50 * 1e6)} ({base / t.p50:.2f}x)" for t in taken.values()))
    return table


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right" if table.columns else "left")


def _under_amp(model: nn.Module, device: str, dtype: torch.dtype) -> Reward:
    def run(state: Tensor, action: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            result: Tensor = model(state, action)
            return result

    return run


def _short(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def _bound(run: Reward, state: Tensor, action: Tensor) -> Callable[[], Tensor]:
    return lambda: run(state, action)
