"""What each technique alone, and the best of their combinations, make of a reward net: bytes, speed, fidelity.

    python benchmarks/techniques.py train TASK SEED [--recipes "distil*" ...]    one net, every recipe or these
    python benchmarks/techniques.py time TASK SEED                               what that left, timed in turn
    python benchmarks/techniques.py table TASK                                   the table of all seeds there are
    python benchmarks/techniques.py search TASK SEED                             what rz.search finds for that net

TASK is cheetah (40-256-256-1 on HalfCheetah-v5: state, action and next state) or pendulum (4-64-64-1 on Pendulum-v1:
state and action). Inputs are scaled to mean 0 and deviation 1. The dense net learns the reward of real transitions; a
fifth of the episodes is held out and everything is judged on those. agreement: the share of random pairs of rows that
stay in order. best of 16: the true reward of the row picked out of 16, as a share of what the dense net's pick gets,
from the mean reward up. EPIC: on the transitions held out, discount .99. bytes: of the saved weights. Steps see the
rows without their rewards, Distil with task above 0 excepted: what they keep is the dense net's answers. Needs
gymnasium[mujoco].
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rewardzip as rz
from rewardzip.distil import nearest
from rewardzip.epic import Transitions, reward_of
from rewardzip.fidelity import pair_agreement
from rewardzip.recipe import run_steps
from rewardzip.steps import Work
from rewardzip.timing import interleaved

INT8 = rz.Quantize(8, activations="dynamic")
TUNE = rz.FineTune(1000, blend=True)
LONG = rz.FineTune(12_000, learning_rate=2e-3, batch_size=512, blend=True)
LONGER = replace(LONG, steps=20_000)
LAST = rz.FineTune(4000, batch_size=512, blend=True)


@dataclass(frozen=True)
class Alone(rz.Distil):
    """The nearest of the students that Distil compares its own with: the same beginnings, the rewards, no teacher."""

    def apply(self, model: torch.nn.Module, work: Work) -> torch.nn.Module:
        return nearest(self.students(work)[1])


def neurons(amount: float) -> rz.Prune:
    return rz.Prune("neurons", amount, importance="second-order", scope="model")


def few(bits: int) -> rz.Quantize:
    return rz.Quantize(bits, activations="dynamic", ranges="mse")


def recipes(widths: tuple[int, ...]) -> dict[str, list]:
    half, quarter = (tuple(w // part for w in widths) for part in (2, 4))
    most = tuple(3 * w // 4 for w in widths)
    distil = {"task": 0.0, "batch_size": 512, "blend": True}
    rewarded = {"task": 0.5, "batch_size": 512, "steps": 5000}
    deep = rz.Distil((half[0],) * 3, steps=2500, **distil)
    return {
        "int8": [rz.Quantize(8)],
        "int8 x int8": [INT8],
        "int8 x int8, static": [rz.Quantize(8, activations="static")],
        "int8 with a zero point": [rz.Quantize(8, scheme="affine")],
        "4 bits": [rz.Quantize(4, ranges="mse")],
        "4 bits, means corrected": [rz.Quantize(4, ranges="mse", correct_bias=True)],
        "4 bits, compensated": [rz.Quantize(4, ranges="mse", rounding="compensated", correct_bias=True)],
        "4 bits x int8, fine-tuned": [few(4), TUNE],
        "4 bits in groups of 32": [rz.Quantize(4, scheme="affine", per="group")],
        "2 bits x int8, fine-tuned": [few(2), TUNE],
        "low rank, energy .9": [rz.LowRank(energy=0.9)],
        "low rank, energy .9, weighted": [rz.LowRank(energy=0.9, weighted=True)],
        "low rank, fine-tuned, int8": [rz.LowRank(energy=0.8, weighted=True), TUNE, INT8],
        "codebook of 16": [rz.Share(16)],
        "codebook of 16, fine-tuned": [rz.Share(16), TUNE],
        "neurons merged": [rz.Share(of="neurons", similarity=0.9)],
        "neurons merged, int8": [rz.Share(of="neurons", similarity=0.9), TUNE, INT8],
        "2:4, fine-tuned, int8": [rz.Prune("2:4"), TUNE, INT8],
        "half of the neurons": [neurons(0.5)],
        "half of the neurons, fine-tuned": [neurons(0.5), TUNE],
        "distilled, three layers": [deep, TUNE],
        "distilled, three layers, two shared": [deep, rz.Share(of="layers", similarity=-1.0), TUNE],
        "distilled": [rz.Distil(half, steps=5000, **distil)],
        "distilled with the rewards": [rz.Distil(half, **rewarded)],
        "the same student without the teacher": [Alone(half, **rewarded)],
        "distilled, int8": [rz.Distil(half, steps=5000, **distil), INT8],
        "distilled smaller, int8": [rz.Distil(quarter, steps=5000, **distil), INT8],
        "distilled, neurons, int8": [rz.Distil(most, steps=10_000, **distil), neurons(0.25), LONGER, INT8],
        "neurons, int8": [neurons(0.435), LONG, INT8],
        "neurons, int8, not blended": [neurons(0.435), replace(LONG, blend=False), INT8],
        "two thirds of the neurons, int8": [neurons(0.67), LONG, INT8],
        "neurons, 5 bits x int8": [neurons(0.29), LONG, few(5), LAST],
    }


TASKS = {"cheetah": ("HalfCheetah-v5", 250, (256, 256)), "pendulum": ("Pendulum-v1", 200, (64, 64))}
ROWS, TRAINING, SECONDS = 250_000, 10_000, 8


def transitions(task: str, seed: int) -> tuple[rz.Data, rz.Data, tuple[Tensor, Tensor]]:
    """(rows to learn from, rows of other episodes, the states after the ones and the others).

    Random actions, gaits and linear policies, an episode each.
    """
    import gymnasium

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
    cut = round(0.8 * ROWS / length) * length
    # states are scaled alike before and after a step: EPIC puts the ones in the place of the others
    after, state = ((x - state[:cut].mean(0)) / state[:cut].std(0) for x in (after, state))
    action = (action - action[:cut].mean(0)) / action[:cut].std(0)
    data = rz.Data((state, action, after) if task == "cheetah" else (state, action), reward)
    return data[:cut], data[cut:], (after[:cut], after[cut:])


def dense(task: str, data: rz.Data, seed: int) -> rz.MLP:
    torch.manual_seed(seed)
    model = rz.MLP([x.shape[1] for x in data.inputs], TASKS[task][2])
    rz.fit(model, data, steps=TRAINING, learning_rate=2e-3, seed=seed, progress=False)
    return model.eval().requires_grad_(False)


def best_of_16(model: torch.nn.Module, held: rz.Data) -> float:
    """The mean true reward of the rows picked, above that of all rows."""
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    order = order[: len(held) // 16 * 16].view(-1, 16)
    truth, pick = held.rewards[order], model(*held.inputs)[order].argmax(1)
    return float(truth.gather(1, pick[:, None]).mean() - held.rewards.mean())


@torch.no_grad()
def judge(model: torch.nn.Module, original: torch.nn.Module, held: rz.Data, reached: Tensor) -> dict:
    after, transitions = model(*held.inputs), Transitions.of(held.inputs, reached)
    canonical = [transitions.canonical(reward_of(m, len(held.inputs))) for m in (original, model)]
    return {
        "agreement": pair_agreement(original(*held.inputs), after),
        "epic": transitions.distance(*canonical, draws=2).value,
        "best of 16": best_of_16(model, held) / best_of_16(original, held),
        "rmse": float((after - held.rewards).square().mean().sqrt()),
    }


def train(task: str, seed: int, out: Path, patterns: list[str]) -> None:
    """Results are added to those of earlier runs of the same seed, whose dense net is used again."""
    torch.set_num_threads(1)
    data, held, (_, reached) = transitions(task, seed)
    folder, file = out / f"models-{task}-{seed}", out / f"techniques-{task}-{seed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"task": task, "seed": seed, "date": str(date.today()), "machine": machine(), "rows": len(held)}
    found = json.loads(file.read_text())["results"] if file.exists() else {}
    model = rz.load(folder / "dense") if (folder / "dense").exists() else dense(task, data, seed)
    model.requires_grad_(False)
    for name, steps in {"dense": [], **recipes(TASKS[task][2])}.items():
        if name == "dense" or any(fnmatchcase(name, pattern) for pattern in patterns):
            start = time.perf_counter()
            # rows of episodes held out are the benchmark's own, so every row of the others is the recipe's
            rows = data if any(isinstance(step, rz.Distil) and step.task for step in steps) else rz.Data(data.inputs)
            small, notes = run_steps(model, steps, rows, seed=seed, progress=False)
            seconds = round(time.perf_counter() - start, 2)
            rz.save(small, folder / name)
            found[name] = judge(rz.load(folder / name), model, held, reached)
            found[name] |= {"bytes": (folder / name / "model.safetensors").stat().st_size}
            found[name] |= {"seconds": seconds, "notes": list(notes)}
            file.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")


def search(task: str, seed: int, out: Path) -> None:
    """By the default gate, with EPIC; judged here on the episodes held out as well."""
    torch.set_num_threads(1)
    data, held, (after, reached) = transitions(task, seed)
    model = rz.load(out / f"models-{task}-{seed}" / "dense").requires_grad_(False)
    start = time.perf_counter()
    found = rz.search(model, rz.Data(data.inputs), next_states=after, budget=500, seed=seed, progress=False)
    seconds = round(time.perf_counter() - start, 1)
    rz.save(found.model, out / f"models-{task}-{seed}" / "found")
    about = {"task": task, "seed": seed, "date": str(date.today()), "machine": machine(), "seconds": seconds}
    about |= {"recipe": [step.to_dict() for step in found.recipe], "passed": found.passed}
    about |= {"other episodes": judge(found.model, model, held, reached), "report": found.report.to_dict()}
    (out / f"search-{task}-{seed}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(found.report)


def clock(task: str, seed: int, out: Path) -> None:
    """Add what 1024 rows take: the tenth percentile, as others on the machine slow calls and never speed them."""
    torch.set_num_threads(1)
    file, searched = out / f"techniques-{task}-{seed}.json", out / f"search-{task}-{seed}.json"
    folder = out / f"models-{task}-{seed}"
    content = json.loads(file.read_text())
    found = {searched: json.loads(searched.read_text())} if searched.exists() else {}
    names = [name for name in (*content["results"], *("found" for _ in found)) if (folder / name).exists()]
    models = {name: rz.load(folder / name).requires_grad_(False) for name in names}
    inputs = [torch.randn(1024, width) for width in models["dense"].inputs]
    with torch.no_grad():
        taken = interleaved({name: lambda m=m: m(*inputs) for name, m in models.items()}, seconds=SECONDS)
    for name, timing in taken.items():
        line = found[searched] if name == "found" else content["results"][name]
        line |= {"us": timing.p10 * 1e6, "faster": taken["dense"].p10 / timing.p10}
    for path, new in {file: content, **found}.items():
        path.write_text(json.dumps(new, indent=1) + "\n")


def machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    return f"{model.partition(':')[2].strip()}, torch {torch.__version__}, Python {platform.python_version()}"


def table(task: str, out: Path) -> None:
    seeds = [json.loads(file.read_text())["results"] for file in sorted(out.glob(f"techniques-{task}-*.json"))]
    print("| recipe | KiB | smaller | us | faster | agreement | EPIC | best of 16 |\n|---|---|---|---|---|---|---|---|")
    for name in ("dense", *recipes(TASKS[task][2])):
        runs = [(seed["dense"], seed[name]) for seed in seeds if name in seed]
        if runs:
            size = statistics.mean(row["bytes"] for _, row in runs)
            smaller = statistics.mean(dense["bytes"] / row["bytes"] for dense, row in runs)
            timed = [row for _, row in runs if "us" in row]
            taken = f"{statistics.median(row['us'] for row in timed):.0f}" if timed else ""
            faster = f"{statistics.median(row['faster'] for row in timed):.1f}x" if timed else ""
            kinds = ("agreement", "epic", "best of 16")
            figures = [_spread([row[kind] for _, row in runs if kind in row]) for kind in kinds]
            cost = f"{size / 1024:.1f} | {smaller:.1f}x | {taken} | {faster}"
            print(f"| {name} | {cost} | {' | '.join(figures)} |")


def _spread(numbers: list[float]) -> str:
    if not numbers:
        return ""
    ends = f" ({min(numbers):.4f} to {max(numbers):.4f})" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.4f}{ends}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "time", "table", "search"))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--recipes", nargs="+", default=["*"])
    parser.add_argument("--out", type=Path, default=Path("out/techniques"))
    given = parser.parse_args()
    if given.what == "train":
        train(given.task, given.seed, given.out, given.recipes)
    elif given.what == "search":
        search(given.task, given.seed, given.out)
    elif given.what == "time":
        clock(given.task, given.seed, given.out)
    else:
        table(given.task, given.out)
