"""What ``rz.refresh`` costs beside the training step it follows: an AMP discriminator, 210-1024-512-1.

python benchmarks/refresh.py
"""

import platform
from datetime import date

import torch
import torch.nn.functional as F
from torch import nn

import rewardzip as rz
from rewardzip.timing import interleaved

ROWS = 4096


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = (nn.Linear(210, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1))
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    fakes, motion = (torch.randn(ROWS, 210, device=device) for _ in range(2))
    models = {"int8": rz.swap(model, rz.Int8()), "int8 x int8": rz.swap(model, rz.Int8(activations="dynamic"))}

    def step() -> None:
        wanted = torch.ones(ROWS, 1, device=device)
        loss = F.binary_cross_entropy_with_logits(model(fakes), 0 * wanted)
        loss = loss + F.binary_cross_entropy_with_logits(model(motion), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    calls = {f"training step, 2 x {ROWS} rows": step, f"rewards of {ROWS} rows, fp32": lambda: model(fakes)}
    for name, fast in models.items():
        calls[f"rewards of {ROWS} rows, {name}"] = lambda fast=fast: fast(fakes)
        # the call after a refresh packs what the kernels read: both belong to its cost
        calls[f"rz.refresh and those, {name}"] = lambda fast=fast: (rz.refresh(fast, model), fast(fakes))
    for name in calls:
        if "rewards" in name or "refresh" in name:
            calls[name] = torch.no_grad()(calls[name])
    print(
        f"{platform.machine()}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {date.today()}"
    )
    for name, taken in interleaved(calls, device, seconds=8).items():
        print(f"{name:34} {taken.p50 * 1e3:8.2f} ms   ({taken.p10 * 1e3:.2f} to {taken.p90 * 1e3:.2f})")


if __name__ == "__main__":
    main()
