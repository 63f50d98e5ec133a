"""What each pattern and sparsity costs: a reward net for HalfCheetah, pruned with and without fine-tuning.

    python benchmarks/prune_fidelity.py [--seeds 0 1 2] [--patterns "16 x 4" ...] [--out FOLDER]

The net takes state, action and next state (40-256-256-1, inputs scaled to mean 0 and deviation 1) and learns the reward
of real transitions: random actions, gaits (a sine for each joint) and random linear policies, in stretches of 250
steps; one stretch in five is held out. Each cell is the share of random pairs of held-out rows that the pruned net puts
in the order of the dense one. Needs gymnasium[mujoco].
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import rewardzip as rz
from rewardzip.fidelity import pair_agreement

PATTERNS = {
    "unstructured": ("unstructured", {}),
    "2:4": ("2:4", {}),
    "16 x 4": ("block", {"block": (16, 4)}),
    "16 x 16": ("block", {"block": (16, 16)}),
    "32 x 32": ("block", {"block": (32, 32)}),
    "64 x 64": ("block", {"block": (64, 64)}),
    "neurons": ("neurons", {}),
}
HOW = ("random", "L1", "second order", "second order, fine-tuned")
AMOUNTS = (0.5, 0.75, 0.9, 0.95)
ROWS, STRETCH, TRAINING, ROUNDS, FINETUNING = 60_000, 250, 5000, 3, 1000


class Reward(nn.Module):
    """A reward of (state, action, next state)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(40, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return self.net(torch.cat([state, action, after], -1)).squeeze(-1)


def transitions(rows: int, seed: int) -> tuple[Tensor, ...]:
    """(state [rows, 17], action [rows, 6], next state [rows, 17], reward [rows])."""
    environment, chance = gymnasium.make("HalfCheetah-v5"), np.random.default_rng(seed)
    state, _ = environment.reset(seed=seed)
    found = []
    for step in range(rows):
        if step % STRETCH == 0:
            kind, weights = chance.integers(3), chance.normal(0, 0.3, (6, 17))
            height, speed, phase = chance.uniform(0.3, 1, 6), chance.uniform(0.1, 0.9), chance.uniform(0, 2 * np.pi, 6)
        if kind == 0:
            action = chance.uniform(-1, 1, 6)
        else:
            steered = height * np.sin(speed * step + phase) if kind == 1 else np.tanh(weights @ state)
            action = steered + chance.normal(0, 0.2, 6)
        action = action.clip(-1, 1).astype(np.float32)
        after, reward, terminated, truncated, _ = environment.step(action)
        found.append((state, action, after, reward))
        state = environment.reset()[0] if terminated or truncated else after
    environment.close()
    *inputs, reward = (torch.from_numpy(np.stack(column)).float() for column in zip(*found, strict=True))
    order = torch.randperm(rows // STRETCH, generator=torch.Generator().manual_seed(seed))
    mixed = torch.arange(rows).view(-1, STRETCH)[order].flatten()
    return (*(((x - x.mean(0)) / x.std(0))[mixed] for x in inputs), reward[mixed])


def trained(data: tuple[Tensor, ...], seed: int) -> Reward:
    torch.manual_seed(seed)
    model = Reward()
    rz.fit(model, data, steps=TRAINING, seed=seed, progress=False)
    return model.eval().requires_grad_(False)


def steps(pattern: str, amount: float | None) -> dict[str, rz.Prune]:
    """The ways that one cell of the table is pruned: amounts by L1 are of each layer, the others of the model."""
    kind, settings = PATTERNS[pattern]
    second = {"importance": "second-order", "scope": "layer" if amount is None else "model", **settings}
    return {
        "random": rz.Prune(kind, amount, importance="random", **settings),
        "L1": rz.Prune(kind, amount, **settings),
        "second order": rz.Prune(kind, amount, **second),
        "second order, fine-tuned": rz.Prune(kind, amount, **second, rounds=ROUNDS, finetune_steps=FINETUNING),
    }


def cells(seed: int, patterns: list[str]):
    data = transitions(ROWS, seed)
    held, rest = tuple(t[: ROWS // 5] for t in data), tuple(t[ROWS // 5 :] for t in data)
    model = trained(rest, seed)
    with torch.no_grad():
        before = model(*held[:-1])
    error = float((before - held[-1]).square().mean() / held[-1].var())
    yield {"pattern": "dense", "explained": 1 - error, "truth": pair_agreement(held[-1], before)}
    for pattern in patterns:
        for amount in (None,) if pattern == "2:4" else AMOUNTS:
            for name, step in steps(pattern, amount).items():
                cell = {"pattern": pattern, "amount": amount or 0.5, "how": name}
                start = time.perf_counter()
                try:
                    pruned = rz.prune(model, step, rest[:-1], seed=seed, progress=False)
                except ValueError as error:
                    yield cell | {"impossible": str(error)}
                    continue
                taken = time.perf_counter() - start
                with torch.no_grad():
                    yield cell | {"agreement": pair_agreement(before, pruned(*held[:-1])), "seconds": taken}


def table(lines: list[dict[str, Any]]) -> str:
    """Means over the seeds, the worst of the fine-tuned, and how many there were; -: a layer would be left empty."""
    head = ("pattern", "gone", "random", "L1", "second order", "fine-tuned", "worst seed", "seeds")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for pattern in PATTERNS:
        for amount in AMOUNTS:
            here = [line for line in lines if (line["pattern"], line.get("amount")) == (pattern, amount)]
            if here:
                found = {how: [c.get("agreement") for c in here if c["how"] == how] for how in HOW}
                means = [f"{sum(v) / len(v):.3f}" if v and None not in v else "-" for v in found.values()]
                tuned = [a for a in found[HOW[-1]] if a is not None]
                worst = f"{min(tuned):.3f}" if tuned else "-"
                rows.append(f"| {pattern} | {amount:.0%} | {' | '.join(means)} | {worst} | {len(found[HOW[-1]])} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS))
    parser.add_argument("--out", type=Path, help="folder for prune_fidelity.json, a line a cell, those there replaced")
    options = parser.parse_args()
    told = {"machine": platform.machine(), "torch": torch.__version__, "date": str(date.today())}
    file = options.out / "prune_fidelity.json" if options.out else None
    for seed in options.seeds:
        for cell in cells(seed, options.patterns):
            new = {"seed": seed} | cell | told
            print(new, flush=True)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                lines = list(map(json.loads, file.read_text().splitlines())) if file.exists() else []
                key = ("seed", "pattern", "amount", "how")
                lines = [line for line in lines if any(line.get(k) != new.get(k) for k in key)] + [new]
                file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if file:
        print(table(list(map(json.loads, file.read_text().splitlines()))))


if __name__ == "__main__":
    main()
