"""The demonstration: a reward learned from real rollouts, compressed, and planned with, beside the dense one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ..explain import explain
from ..fit import fit
from ..models import RewardMLP
from .candidates import Candidate, candidates
from .page import write_page
from .pendulum import Dynamics, transitions
from .planner import fly
from .tables import cost_table, returns_table, speed_table

NEXT = (
    "Try next, on your own model: small = rz.compress(model, [rz.Quantize()], (state, action)); print(small.report); "
    "rz.save(small.model, 'reward/'). Or the best of many: rz.search(model, (state, action), budget=120), "
    "`rewardzip search`"
)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches this small gain little from a second thread, and where it waits for a busy core they lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def main(
    page: Path = Path("out/demo.html"),
    *,
    rows: int = 20_000,
    training_steps: int = 2_000,
    seeds: int = 5,
    episode_steps: int = 120,
) -> list[Candidate]:
    """Print the comparison and write it as a page; under a minute on two cores."""
    console = Console()
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, action, reward, after = transitions(rows)
    held_out = rows // 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense, dynamics = RewardMLP(3, 1, (256, 256)).to(device), Dynamics().to(device)
    console.print("learning the reward, then the dynamics")
    for model, wanted in ((dense, reward), (dynamics, after)):
        fit(model, (state[held_out:], action[held_out:], wanted[held_out:]), steps=training_steps)
        model.eval().requires_grad_(False)

    found = candidates(dense, (state[:held_out].to(device), action[:held_out].to(device)), reward[:held_out])
    console.print("\n[bold]What became of each layer of the reward[/] (rz.explain)")
    console.print(str(explain(found[1].model)), markup=False, highlight=False, soft_wrap=True)

    with Progress(console=console) as progress:
        task = progress.add_task("planning", total=seeds * len(found))
        # seed after seed, the models in turn: a machine that slows down does so for all of them
        for seed in range(seeds):
            for candidate in found:
                progress.update(task, description=f"planning, seed {seed}, {candidate.name}")
                candidate.episodes.append(fly(candidate.model, dynamics, seed, episode_steps))
                progress.advance(task)
        progress.update(task, description="planning")
    console.print(returns_table(found))
    console.print(cost_table(found))
    speed = speed_table(found, device)
    console.print(speed)
    console.print("(..x): times faster than fp32; below 1 it is slower, and the dense model is the better choice.")
    write_page(page, found, reward[:held_out], speed)
    console.print(f"\n{time.perf_counter() - start:.0f} seconds. With plots: {page.resolve()}", soft_wrap=True)
    console.print(NEXT, soft_wrap=True, markup=False, highlight=False)
    return found
