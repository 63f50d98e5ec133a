"""What each technique alone, and the best of their combinations, make of a reward net: bytes, speed, fidelity.

    python benchmarks/techniques.py train TASK SEED [--recipes "distil*" ...]    one net, every recipe or these
    python benchmarks/techniques.py table TASK                                   the table of all seeds there are

TASK is cheetah (40-256-256-1 on HalfCheetah-v5: state, next state and action) or pendulum (4-64-64-1 on Pendulum-v1:
state and action). Inputs are scaled to mean 0 and deviation 1. The dense net learns the reward of real transitions; a
fifth of the episodes is held out and everything is judged on those. agreement: the share of random pairs of rows that
stay in order. best of 16: the true reward of the row picked out of 16, as a share of what the dense net's pick gets,
from the mean reward up. bytes: of the saved weights. Needs gymnasium[mujoco].
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor

import rewardzip as rz
from rewardzip.fidelity import pair_agreement
from rewardzip.recipe import run_steps
from rewardzip.timing import interleaved

INT8 = rz.Quantize(8, activations="dynamic")
TUNE = rz.FineTune(1000)


def recipes(widths: tuple[int, ...]) -> dict[str, list]:
    half, quarter = (tuple(w // part for w in widths) for part in (2, 4))
    return {
        "int8": [rz.Quantize(8)],
        "int8 x int8": [INT8],
        "int8 x int8, static": [rz.Quantize(8, activations="static")],
        "4 bits": [rz.Quantize(4, ranges="mse")],
        "4 bits, compensated": [rz.Quantize(4, ranges="mse", rounding="compensated", correct_bias=True)],
        "4 bits, fine-tuned": [rz.Quantize(4, ranges="mse"), TUNE],
        "4 bits in groups of 32": [rz.Quantize(4, scheme="affine", per="group")],
        "2 bits, fine-tuned": [rz.Quantize(2, ranges="mse"), TUNE],
        "low rank, energy .9": [rz.LowRank(energy=0.9)],
        "low rank, energy .9, weighted": [rz.LowRank(energy=0.9, weighted=True)],
        "low rank, fine-tuned, int8": [rz.LowRank(energy=0.8, weighted=True), TUNE, INT8],
        "codebook of 16": [rz.Share(16)],
        "codebook of 16, fine-tuned": [rz.Share(16), TUNE],
        "neurons merged, int8": [rz.Share(of="neurons", similarity=0.9), TUNE, INT8],
        "distilled, int8": [rz.Distil(half, task=0.0, steps=2500), INT8],
        "distilled smaller, int8": [rz.Distil(quarter, task=0.0, steps=2500), INT8],
        "distilled, neurons merged, int8": [
            rz.Distil(half, task=0.0, steps=2500),
            rz.Share(of="neurons", similarity=0.95),
            TUNE,
            INT8,
        ],
    }


TASKS = {"cheetah": ("HalfCheetah-v5", 250, (256, 256)), "pendulum": ("Pendulum-v1", 200, (64, 64))}
ROWS, TRAINING = 40_000, 5000


def transitions(task: str, seed: int) -> tuple[rz.Data, rz.Data]:
    """(rows to learn from, rows of other episodes): random actions, gaits and linear policies, an episode each."""
    name, length, _ = TASKS[task]
    environment, chance = gymnasium.make(name), np.random.default_rng(seed)
    space = environment.action_space
    size, limit, width = space.shape[0], space.high, environment.observation_space.shape[0]
    found = []
    for episode in range(ROWS // length):
        state, _ = environment.reset(seed=1000 * seed + episode)
        kind, weights = chance.integers(3), chance.normal(0, 0.3, (size, width))
        height, speed, phase = (chance.uniform(*ends, size) for ends in ((0.3, 1), (0.1, 0.9), (0, 2 * np.pi)))
        for step in range(length):
            steered = height * np.sin(speed * step + phase) if kind == 1 else np.tanh(weights @ state)
            action = chance.uniform(-1, 1, size) if kind == 0 else steered + chance.normal(0, 0.2, size)
            action = (action.clip(-1, 1) * limit).astype(np.float32)
            after, reward, *_ = environment.step(action)
            found.append((state, after, action, reward))
            state = after
    environment.close()
    state, after, action, reward = (torch.from_numpy(np.stack(part)).float() for part in zip(*found, strict=True))
    inputs = (torch.cat([state, after], 1) if task == "cheetah" else state, action)
    cut = round(0.8 * ROWS / length) * length
    inputs = tuple((x - x[:cut].mean(0)) / x[:cut].std(0) for x in inputs)
    data = rz.Data(inputs, reward)
    return data[:cut], data[cut:]


def dense(task: str, data: rz.Data, seed: int) -> rz.RewardMLP:
    torch.manual_seed(seed)
    model = rz.RewardMLP(*(x.shape[1] for x in data.inputs), TASKS[task][2])
    rz.fit(model, data, steps=TRAINING, learning_rate=2e-3, seed=seed, progress=False)
    return model.eval().requires_grad_(False)


def best_of_16(model: torch.nn.Module, held: rz.Data) -> float:
    """The mean true reward of the rows picked, above that of all rows."""
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    order = order[: len(held) // 16 * 16].view(-1, 16)
    truth, pick = held.rewards[order], model(*held.inputs)[order].argmax(1)
    return float(truth.gather(1, pick[:, None]).mean() - held.rewards.mean())


@torch.no_grad()
def judge(model: torch.nn.Module, original: Tensor, dense_pick: float, held: rz.Data, folder: Path) -> dict:
    rz.save(model, folder)
    after = rz.load(folder)(*held.inputs)
    return {
        "bytes": (folder / "model.safetensors").stat().st_size,
        "agreement": pair_agreement(original, after),
        "best of 16": best_of_16(model, held) / dense_pick,
        "rmse": float((after - held.rewards).square().mean().sqrt()),
    }


def train(task: str, seed: int, out: Path, patterns: list[str]) -> None:
    """Results are added to those of earlier runs of the same seed, whose dense net is used again."""
    torch.set_num_threads(1)
    data, held = transitions(task, seed)
    folder, file = out / f"models-{task}-{seed}", out / f"techniques-{task}-{seed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    model = rz.load(folder / "dense") if (folder / "dense").exists() else dense(task, data, seed)
    with torch.no_grad():
        original, pick = model(*held.inputs), best_of_16(model, held)
    models = {"dense": model.requires_grad_(False)}
    found = {"dense": judge(model, original, pick, held, folder / "dense")}
    for name, steps in recipes(TASKS[task][2]).items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            start = time.perf_counter()
            # rows of episodes held out are the benchmark's own, so every row of the others is the recipe's
            models[name], notes = run_steps(model, steps, data, seed=seed, progress=False)
            seconds = round(time.perf_counter() - start, 2)
            found[name] = judge(models[name], original, pick, held, folder / name)
            found[name] |= {"seconds": seconds, "notes": list(notes)}
    inputs = [x[:1024] for x in held.inputs]
    taken = interleaved({name: lambda m=m: m(*inputs) for name, m in models.items()}, seconds=5)
    for name, timing in taken.items():
        found[name] |= {"us": timing.p50 * 1e6, "faster": taken["dense"].p50 / timing.p50}
    about = {"task": task, "seed": seed, "date": str(date.today()), "machine": machine(), "rows": len(held)}
    before = json.loads(file.read_text())["results"] if file.exists() else {}
    file.write_text(json.dumps({**about, "results": {**before, **found}}, indent=1) + "\n")


def machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    return f"{model.partition(':')[2].strip()}, torch {torch.__version__}, Python {platform.python_version()}"


def table(task: str, out: Path) -> None:
    seeds = [json.loads(file.read_text())["results"] for file in sorted(out.glob(f"techniques-{task}-*.json"))]
    print("| recipe | KiB | smaller | faster | agreement | best of 16 |\n|---|---|---|---|---|---|")
    for name in ("dense", *recipes(TASKS[task][2])):
        runs = [(seed["dense"], seed[name]) for seed in seeds if name in seed]
        if runs:
            size = statistics.mean(row["bytes"] for _, row in runs)
            smaller = statistics.mean(dense["bytes"] / row["bytes"] for dense, row in runs)
            faster = statistics.median(row["faster"] for _, row in runs)
            figures = [_spread([row[key] for _, row in runs]) for key in ("agreement", "best of 16")]
            print(f"| {name} | {size / 1024:.1f} | {smaller:.1f}x | {faster:.1f}x | {' | '.join(figures)} |")


def _spread(numbers: list[float]) -> str:
    ends = f" ({min(numbers):.4f} to {max(numbers):.4f})" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.4f}{ends}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--recipes", nargs="+", default=["*"])
    parser.add_argument("--out", type=Path, default=Path("out/techniques"))
    given = parser.parse_args()
    if given.what == "train":
        train(given.task, given.seed, given.out, given.recipes)
    else:
        table(given.task, given.out)
