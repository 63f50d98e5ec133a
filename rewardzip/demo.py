"""The demonstration: learn Pendulum's reward from real rollouts, swap the layers, see what it cost and what it gave."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from .explain import explain
from .fidelity import pair_agreement
from .fit import fit
from .int8 import Int8
from .models import RewardMLP
from .swap import swap
from .timing import interleaved

BATCHES = (1, 1024, 65536)


def pendulum_transitions(steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(state [steps, 3], action [steps, 1], reward [steps]) of a random policy in Gymnasium's Pendulum."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("the demo learns from Gymnasium: pip install rewardzip[rl]") from error
    environment = gymnasium.make("Pendulum-v1")
    environment.action_space.seed(seed)
    state, _ = environment.reset(seed=seed)
    rows: list[tuple[Any, Any, float]] = []
    for _ in track(range(steps), "rollouts"):
        action = environment.action_space.sample()
        after, reward, terminated, truncated, _ = environment.step(action)
        rows.append((state, action, float(reward)))
        state = environment.reset()[0] if terminated or truncated else after
    environment.close()
    state_rows, action_rows, rewards = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(state_rows)), torch.from_numpy(np.stack(action_rows)), torch.tensor(rewards)


def main(steps: int = 20_000, training_steps: int = 2_000) -> None:
    """Print the whole comparison; about half a minute on two cores."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, action, reward = pendulum_transitions(steps)
    held_out = steps // 5
    model = RewardMLP(3, 1, (64, 64)).to(device)
    fit(model, (state[held_out:], action[held_out:], reward[held_out:]), steps=training_steps)
    model.eval().requires_grad_(False)
    test = (state[:held_out].to(device), action[:held_out].to(device))

    models: dict[str, nn.Module] = {
        "fp32": model,
        "int8": swap(model, Int8()),
        "int8, rows too": swap(model, Int8(activations="dynamic")),
    }
    console.print("\n[bold]What became of each layer[/] (rz.explain)")
    console.print(str(explain(models["int8"])), markup=False, highlight=False, soft_wrap=True)

    amp_type = torch.float16 if device == "cuda" else torch.bfloat16
    runs: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(models)
    runs = {"fp32": runs.pop("fp32"), f"AMP {str(amp_type)[6:]}": _amp(model, device, amp_type), **runs}
    with torch.no_grad():
        _fidelity(console, runs, test, reward[:held_out])
        _speed(console, runs, device)
    console.print(
        "\nNext, your own model: fast = rz.swap(model, rz.Int8()), then rz.save(fast, 'reward/')", soft_wrap=True
    )


def _amp(model: nn.Module, device: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    def run(state: Tensor, action: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            result: Tensor = model(state, action)
            return result

    return run


def _fidelity(console: Console, runs: dict[str, Any], test: tuple[Tensor, Tensor], truth: Tensor) -> None:
    table = Table(title="Fidelity on held-out transitions", title_justify="left")
    for column in ("model", "order of pairs kept", "largest change", "error against the true reward (RMSE)"):
        table.add_column(column, justify="left" if column == "model" else "right")
    before = runs["fp32"](*test).float().cpu()
    for name, run in runs.items():
        after = run(*test).float().cpu()
        rmse = (after - truth).square().mean().sqrt()
        agreement, change = pair_agreement(before, after), (after - before).abs().max()
        table.add_row(name, f"{agreement:.4%}", f"{change:.4f}", f"{rmse:.4f}")
    console.print(table)


def _speed(console: Console, runs: dict[str, Any], device: str) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    title = f"Microseconds a call, median, rivals in turn; {where}, {torch.get_num_threads()} threads"
    table = Table(title=title, title_justify="left")
    for column in ("rows", *runs):
        table.add_column(column, justify="right")
    for batch in track(BATCHES, "timing"):
        state, action = torch.randn(batch, 3, device=device), torch.randn(batch, 1, device=device)
        taken = interleaved({name: _bound(run, state, action) for name, run in runs.items()}, device)
        base = taken["fp32"].p50
        table.add_row(str(batch), *(f"{_short(t.p50 * 1e6)} ({base / t.p50:.2f}x)" for t in taken.values()))
    console.print(table)
    console.print("(..x): times faster than fp32; below 1 it is slower, and the dense model is the better choice.")


def _short(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def _bound(run: Callable[[Tensor, Tensor], Tensor], state: Tensor, action: Tensor) -> Callable[[], Tensor]:
    return lambda: run(state, action)
